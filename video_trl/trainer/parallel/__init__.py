"""Distributed training: DDP, FSDP2, DeepSpeed, context and group parallelism."""
