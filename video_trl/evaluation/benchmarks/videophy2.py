"""
VideoPhy-2 (https://huggingface.co/papers/2503.06800): about 590 test sentences about 200 actions.

Scores are counted by the rule `"videophy2"`: a rating of at least 4 of 5, joint for both, over all sentences, those of
hard actions, of physical activities and of object interactions.
"""

import os

from ..runs.prompts import EvaluationPrompt, check_prompts
from .videophy import table_rows


REPOSITORY = "videophysics/videophy2_test"
FILE_NAME = "videophy2_test.csv"
HARD = "hard"
GROUPS = {"physical activity": "activity", "object interactions": "interaction"}
_FLAGS = {"1": True, "1.0": True, "true": True, "0": False, "0.0": False, "false": False, "": False}


def load_videophy2(
    source: str | os.PathLike[str] = REPOSITORY, *, upsampled: bool = False
) -> tuple[EvaluationPrompt, ...]:
    """
    The sentences of VideoPhy-2.

    Args:
        source (path or `str`, *optional*): CSV file with the columns `caption`, `category`, `action` and `is_hard`, or
            the id of the dataset repository. A sentence stands there once for each rated model; the first row counts.
        upsampled (`bool`, *optional*, defaults to `False`): Give the model the column `upsampled_caption`, as
            VideoREPA does. PhyGDPO gives it the short sentence: numbers of the two settings do not compare. The judge
            reads the short one, since the long ones do not fit its window.

    Returns:
        `tuple[EvaluationPrompt, ...]`: Groups are `hard`, `activity` and `interaction`, where they apply (some
        sentences belong to no category); the category of the report is the action.

    Raises:
        ValueError: If the file is not there, lacks a column, or a value has no known meaning.
    """
    columns = ["caption", "category", "action", "is_hard", *(["upsampled_caption"] if upsampled else [])]
    prompts: dict[str, EvaluationPrompt] = {}
    for row in table_rows(source, FILE_NAME, columns):
        text, category, flag = row["caption"].strip(), row["category"].strip().lower(), row["is_hard"].strip().lower()
        if flag not in _FLAGS:
            raise ValueError(f"{source}: is_hard must be true or false, got {row['is_hard']!r} for {text!r}.")
        if category and category not in GROUPS:
            raise ValueError(f"{source}: expected a category among {', '.join(GROUPS)}, got {row['category']!r}.")
        groups = ([HARD] if _FLAGS[flag] else []) + ([GROUPS[category]] if category else [])
        longer = row["upsampled_caption"].strip() if upsampled else None
        prompts.setdefault(text, EvaluationPrompt(text, longer, row["action"].strip(), tuple(groups)))
    return check_prompts(list(prompts.values()))
