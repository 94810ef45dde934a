"""From arguments, a model and rows to what a trainer trains on, all checked before the first step."""
