"""The exact physics judge: it tracks the bodies of a video and fits the law of its motion."""
