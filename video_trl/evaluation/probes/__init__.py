"""Linear probes: measure what the hidden states of a model or a teacher contain about physics."""
