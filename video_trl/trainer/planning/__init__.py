"""Memory, FLOPs and communication of a training step, counted or estimated before it runs."""
