"""Linear probes: what the hidden states of a model or a teacher know about physics."""
