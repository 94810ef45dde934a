"""Checkpoints: their content, and how they are written, found and read."""
