"""Tables of PhyGDPO (https://huggingface.co/papers/2512.24551, version 1), as printed."""

# Shares of VideoPhy-2 are counts over these numbers of prompts. 11 of the 590 prompts belong to no category.
PROMPTS = {"hard": 180, "activity": 420, "interaction": 159, "all": 590}

TABLE_1A = {
    "Vcrafter2": (0.0222, 0.1071, 0.0943, 0.1034),
    "Wan2.1-14B": (0.0111, 0.1190, 0.1572, 0.1288),
    "Hunyuan": (0.0222, 0.1286, 0.1572, 0.1356),
    "VideoDPO": (0.0167, 0.1310, 0.1572, 0.1373),
    "PhyT2V": (0.0389, 0.1405, 0.1698, 0.1492),
    "Sora2": (0.0389, 0.1429, 0.1698, 0.1508),
    "Veo3.1": (0.0444, 0.1405, 0.1887, 0.1525),
    "PhyGDPO": (0.0500, 0.1571, 0.1761, 0.1627),
}

TABLE_2B = {
    "Baseline": (0.0111, 0.1190, 0.1572, 0.1288),
    "+ LoRA-SR": (0.0278, 0.1381, 0.1635, 0.1458),
    "+ Groupwise Model": (0.0389, 0.1500, 0.1698, 0.1559),
    "+ Physics Rewarding": (0.0500, 0.1571, 0.1761, 0.1627),
}

# The rest of Table 2 by group. The cells named below are no count over these numbers: scored on a subset, it seems.
TABLE_2A_2C = {
    "2a Baseline": (0.0333, 0.1405, 0.1635, 0.1475),
    "2a + Chain-of-Thought": (0.0389, 0.1452, 0.1698, 0.1525),
    "2a + Action Clustering": (0.0500, 0.1524, 0.1698, 0.1575),
    "2a + Physics Rewarding": (0.0500, 0.1571, 0.1761, 0.1627),
    "2c Baseline": (0.0118, 0.1136, 0.1447, 0.1232),
    "2c Flow-DPO": (0.0296, 0.1247, 0.1342, 0.1283),
    "2c VideoDPO": (0.0278, 0.1262, 0.1509, 0.1305),
    "2c PhyGDPO": (0.0444, 0.1357, 0.1635, 0.1407),
}
NO_COUNT = {
    ("2a + Action Clustering", "all"),
    ("2c Baseline", "hard"),
    ("2c Baseline", "activity"),
    ("2c Baseline", "all"),
    ("2c Flow-DPO", "hard"),
    ("2c Flow-DPO", "activity"),
    ("2c Flow-DPO", "interaction"),
    ("2c Flow-DPO", "all"),
}

# PhyGenBench: mechanics, optics, thermal, material, printed average. LaVIE's average does not follow from its row.
ITEMS_1B = (40, 50, 30, 40)
TABLE_1B = {
    "Lavie": (0.40, 0.44, 0.38, 0.32, 0.36),
    "Wan2.1-14B": (0.36, 0.53, 0.36, 0.33, 0.40),
    "Open-Sora": (0.43, 0.50, 0.44, 0.37, 0.44),
    "Pika": (0.35, 0.56, 0.43, 0.39, 0.44),
    "Vchitect-2.0": (0.41, 0.56, 0.44, 0.37, 0.45),
    "PhyT2V": (0.45, 0.55, 0.43, 0.53, 0.50),
    "VideoDPO": (0.48, 0.60, 0.47, 0.58, 0.54),
    "PhyGDPO": (0.55, 0.60, 0.58, 0.47, 0.55),
}

# Preference for PhyGDPO in per cent; 104 participants.
PARTICIPANTS = 104
TABLE_1C = {
    "Vcrafter2": 94.2,
    "VideoDPO": 89.4,
    "PhyT2V": 88.5,
    "Wan2.1-14B": 86.5,
    "Hunyuan": 82.7,
    "Sora2": 67.3,
    "Veo3.1": 64.4,
}
