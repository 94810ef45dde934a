"""An evaluated run on disk: prompts, generated videos, scores and their tables."""
