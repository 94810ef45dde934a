"""List clips of a source, measure them, and write them in one format."""
