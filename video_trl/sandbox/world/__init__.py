"""The simulated world: its motions, their laws, how they are drawn and described."""
