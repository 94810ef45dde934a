"""Attention for context parallelism: Ulysses, ring, and the joint attention of CogVideoX."""
