"""Encode videos and prompts once, keep them in shards, and read them back."""
