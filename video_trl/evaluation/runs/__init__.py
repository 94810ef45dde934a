"""Evaluation runs on disk: prompts, generated videos, scores and tables."""
