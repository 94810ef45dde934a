"""Several processes: DDP, FSDP2, DeepSpeed, and tokens or groups divided among them."""
