"""The parts of a training step: noise, passes through policy and reference, metrics, checks for NaN."""
