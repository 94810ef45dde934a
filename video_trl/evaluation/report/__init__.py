"""Compare evaluation runs, and write an HTML report."""
