"""Datasets made of simulated clips."""
