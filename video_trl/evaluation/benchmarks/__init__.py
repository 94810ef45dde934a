"""Published benchmarks: their prompts, judges and scores."""
