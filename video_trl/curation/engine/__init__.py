"""Run a stage over many rows: on one machine or on a Ray cluster, resumable."""
