"""Published preference datasets of other projects, as rows of this package."""
