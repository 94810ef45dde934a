"""VideoREPA: hidden states of the transformer aligned with those of a frozen teacher."""
