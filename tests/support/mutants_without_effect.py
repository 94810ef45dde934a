"""
Changes that no test can notice, by file: why, and the line (as `ast.unparse` writes it) after the change.
"""

WITHOUT_EFFECT: dict[str, dict[str, tuple[str, ...]]] = {
    "video_trl/curation/clips/measures.py": {
        "a flash begins more than 15 levels away": ("sign = 1 if far[start] > 1 else -1",),
    },
    "video_trl/curation/phyaug/sampling.py": {
        "only differences of difficulties count": ("difficulty = np.where(there, 2 - np.nan_to_num(score), 0.0)",),
        "a category that gets exactly what it has is full either way": ("over = ~full & (quotas >= available)",),
        "remainders that differ in the tenth digit are rounding": (
            "order = np.lexsort((np.arange(len(quotas)), -difficulty, -np.round(quotas - floors, 10)))",
        ),
    },
}
