"""
PhyGenBench (https://huggingface.co/papers/2410.05363): 160 sentences, 27 laws, three stages of 0 to 3 points.

The benchmark has no licence, so nothing of it is shipped: these functions read its files from a folder of yours. Run
its own judges for the stage points, or give points of your own; the arithmetic is here, as published and without the
published rounding.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ...files import read_json
from ..runs.prompts import EvaluationPrompt, check_prompts


MAX_POINTS = 3
CATEGORIES = {
    "Force": "Mechanics",
    "Light": "Optics",
    "Heat": "Thermal",
    "Physical Properties": "Material",
    "Chemical Properties": "Material",
}
_CLOSED = ("single", "multi_gpt", "video_gpt")
_OPEN = ("single", "multi_llava", "video_intern")

Mode = Literal["published", "closed", "open", "exact"]


@dataclass(frozen=True)
class PhyGenScore:
    """
    Proportion of the points reached.

    Attributes:
        by_category (`dict[str, float]`): In [0, 1], for each category that has items.
        average (`float`): Over all items; categories weigh by their number of items.
        counts (`dict[str, int]`): Items in each category.
    """

    by_category: Mapping[str, float]
    average: float
    counts: Mapping[str, int]


def load_phygenbench(folder: str | os.PathLike[str], *, explicit: bool = False) -> tuple[EvaluationPrompt, ...]:
    """
    The sentences of PhyGenBench from your copy of its folder `PhyGenBench/`.

    Args:
        folder (path): Folder with `prompts.json` (and `explicit_prompts.json`).
        explicit (`bool`, *optional*, defaults to `False`): Give the model the sentence that names the outcome.

    Raises:
        ValueError: If a file is missing or an entry is not of the benchmark's form.
    """
    path = Path(folder) / ("explicit_prompts.json" if explicit else "prompts.json")
    prompts = []
    for item in _items(path, ["caption", "main_category", *(["explicit_caption"] if explicit else [])]):
        category = _category(item, path)
        longer = item["explicit_caption"] if explicit else None
        prompts.append(EvaluationPrompt(item["caption"], longer, category, (category,)))
    return check_prompts(prompts)


def load_phygenbench_items(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """
    Stage points of a result file (`result/MODEL.json`): `single`, `multi_gpt`, `video_gpt`, `multi_llava` and
    `video_intern`, each 0 to 3, beside `main_category`.

    Raises:
        ValueError: If the file is missing or an entry lacks a key.
    """
    return _items(Path(path), ["main_category", *_CLOSED, *_OPEN[1:]])


def phygenbench_points(item: Mapping[str, Any], mode: Mode = "published") -> float:
    """
    Points of one video, 0 to 3.

    The published rule rounds the mean of the three stages for each set of judges (closed and open models), and then
    takes the *floor* of half their sum, which lowers the result by up to half a point. `"exact"` is the mean of both
    sets without any rounding.

    Args:
        item (`dict`): Stage points, as in [`load_phygenbench_items`]; one set of them for `"closed"` and `"open"`.
        mode (`str`, *optional*, defaults to `"published"`): `"published"`, `"closed"`, `"open"` or `"exact"`.

    Raises:
        ValueError: If a stage is missing or outside 0 to 3, or the mode is unknown.
    """
    if mode == "closed":
        return round(_mean(item, _CLOSED))  # thirds never lie half way, so the kind of rounding does not matter
    if mode == "open":
        return round(_mean(item, _OPEN))
    if mode == "published":
        return (round(_mean(item, _CLOSED)) + round(_mean(item, _OPEN))) // 2
    if mode == "exact":
        return (_mean(item, _CLOSED) + _mean(item, _OPEN)) / 2
    raise ValueError(f"`mode` must be 'published', 'closed', 'open' or 'exact', got {mode!r}.")


def phygenbench_aggregate(items: Sequence[Mapping[str, Any]], mode: Mode = "published") -> PhyGenScore:
    """
    Score of a model: points reached over points possible, by category and over all items.

    Args:
        items (list of `dict`): One for each video; see [`phygenbench_points`].
        mode (`str`, *optional*, defaults to `"published"`): As there.

    Returns:
        [`PhyGenScore`]

    Raises:
        ValueError: If there is no item, or as in [`phygenbench_points`].
    """
    if not items:
        raise ValueError("PhyGenBench needs at least one item, got none.")
    points: dict[str, list[float]] = {category: [] for category in dict.fromkeys(CATEGORIES.values())}
    for item in items:
        points[_category(item, "an item")].append(phygenbench_points(item, mode))
    present = {category: values for category, values in points.items() if values}
    return PhyGenScore(
        by_category={category: sum(values) / (MAX_POINTS * len(values)) for category, values in present.items()},
        average=sum(sum(values) for values in present.values()) / (MAX_POINTS * len(items)),
        counts={category: len(values) for category, values in present.items()},
    )


def _mean(item: Mapping[str, Any], stages: Sequence[str]) -> float:
    values = []
    for stage in stages:
        value = item.get(stage)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_POINTS:
            raise ValueError(
                f"Expected 0 to {MAX_POINTS} points for {stage!r}, got {value!r} ({item.get('caption', 'an item')!r})."
            )
        values.append(value)
    return sum(values) / len(values)


def _items(path: Path, keys: Sequence[str]) -> list[dict[str, Any]]:
    items = read_json(path)
    if not isinstance(items, list) or not items:
        raise ValueError(f"{path}: expected a list of items, got {type(items).__name__}.")
    for number, item in enumerate(items):
        missing = [key for key in keys if not isinstance(item, dict) or key not in item]
        if missing:
            raise ValueError(f"{path}: item {number} (from 0) lacks {', '.join(missing)}.")
    return items


def _category(item: Mapping[str, Any], where: object) -> str:
    name = item.get("main_category")
    if name not in CATEGORIES:
        raise ValueError(f"{where}: expected a main_category among {', '.join(CATEGORIES)}, got {name!r}.")
    return CATEGORIES[str(name)]
