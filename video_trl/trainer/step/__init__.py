"""What `compute_loss` calls: noise, passes through policy and reference, metrics, checks of values."""
