"""Clips of a source file: where they come from, what they measure, and the uniform clips that are written."""
