"""Prepare arguments, model, reference and rows of a run, with all checks before the first step."""
