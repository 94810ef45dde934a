"""Table 1 of VideoREPA (https://huggingface.co/papers/2505.23656): VideoPhy, per cent, as printed."""

STATES = {"solid_solid": 143, "solid_fluid": 146, "fluid_fluid": 55}

# SA and PC for each state of matter in this order, then overall. Rows taken over from another paper have no states.
TABLE_1 = {
    "VideoCrafter2": (50.4, 32.2, 50.7, 27.4, 48.1, 29.1, 50.3, 29.7),
    "DreamMachine": (55.1, 21.7, 59.6, 23.3, 58.2, 18.2, 57.5, 21.8),
    "LaVIE": (40.8, 18.3, 48.6, 37.0, 69.1, 50.9, 48.7, 31.5),
    "HunyuanVideo*": (55.2, 16.1, 67.1, 30.1, 54.5, 54.5, 60.2, 28.2),
    "CogVideoX-2B": (37.8, 12.6, 67.1, 30.1, 45.5, 50.9, 51.6, 26.2),
    "CogVideoX-2B*": (49.6, 13.3, 71.2, 28.1, 60.0, 50.9, 60.5, 25.6),
    "VideoREPA-2B*": (52.4, 18.2, 77.4, 32.2, 60.0, 52.7, 64.2, 29.7),
    "CogVideoX-5B": (53.1, 18.2, 75.3, 32.9, 56.4, 61.8, 63.1, 31.4),
    "CogVideoX-5B*": (62.9, 19.6, 76.0, 33.6, 72.7, 61.8, 70.0, 32.3),
    "VideoREPA-5B*": (58.0, 28.0, 82.9, 39.0, 80.0, 74.5, 72.1, 40.1),
}
