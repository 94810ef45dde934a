"""
PhyGround (https://huggingface.co/papers/2605.10806): 250 prompts with first frames and an expected outcome, 13 laws.

Prompts and frames are the user's or the Hub's (CC-BY-4.0); nothing of them is shipped. `PhyGroundJudge` rates videos
by law; the benchmark reports mean ratings.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...judges.phyground import GENERAL, LAWS, read_entries
from ..report.page import Table
from ..runs.prompts import EvaluationPrompt, check_prompts
from ..runs.tables import RunTable


REPOSITORY = "NU-World-Model-Embodied-AI/phyground"


def load_phyground(source: str | os.PathLike[str] = REPOSITORY) -> tuple[EvaluationPrompt, ...]:
    """
    The prompts of PhyGround with their first frames, grouped by domain.

    Args:
        source (path or `str`, *optional*): `phyground.json`, the folder that it lies in (or whose folder `prompts` it
            lies in) with `first_images` beside it, or the id of the dataset repository.

    Returns:
        `tuple[EvaluationPrompt, ...]`: Category and group are the domain; `image` is the first frame.

    Raises:
        ValueError: If there is no such file or repository, it is of another form, or a first frame is missing.
    """
    path = Path(source)
    if not path.exists():
        path = _fetched(str(source))
    root = path if path.is_dir() else path.parent
    prompts, missing = [], []
    for entry in read_entries(path):
        image = _first_frame(root, entry)
        if image is None:
            missing.append(entry["name"] or entry["prompt"])
        groups = (entry["domain"],) if entry["domain"] else ()
        prompts.append(
            EvaluationPrompt(entry["prompt"], category=entry["domain"], groups=groups, image=image and str(image))
        )
    if missing:
        raise ValueError(
            f"{root}: {len(missing)} of {len(prompts)} first frames are missing, the first being that of "
            f"{missing[0]!r}. Fetch the folder first_images of {REPOSITORY}, too."
        )
    return check_prompts(prompts)


def law_table(table: RunTable) -> Table:
    """
    Mean ratings of a run, 1 to 5, by question and law, with the number of videos that were asked about each.

    Raises:
        ValueError: If the scores are not those of `PhyGroundJudge`.
    """
    ratings: dict[str, list[int]] = {name: [] for name in (*GENERAL, *LAWS)}
    for score in table.scores:
        given: Mapping[str, Any] = score.get("raw") or {}
        if not set(GENERAL) <= set(given):
            raise ValueError(f"{table.run.name}: scores of {table.judge} hold no ratings of PhyGround's questions.")
        for name, rating in given.items():
            ratings[name].append(rating)
    physical = [rating for name in LAWS for rating in ratings[name]]
    rows = [[name, str(len(given)), f"{sum(given) / len(given):.2f}"] for name, given in ratings.items() if given]
    if physical:
        rows.append(["all laws", str(len(physical)), f"{sum(physical) / len(physical):.2f}"])
    return Table(f"{table.run.name}, PhyGround by law", ["question", "videos", "mean rating"], rows, table.judge)


def _fetched(repository: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        patterns = ["prompts/*.json", "first_images/*"]
        return Path(snapshot_download(repository, repo_type="dataset", allow_patterns=patterns))
    except (OSError, ValueError, HfHubHTTPError, HFValidationError) as error:
        raise ValueError(
            f"No file or folder {repository!r}, and the dataset of that id cannot be loaded ({error}). Download it "
            "where there is a connection and pass its folder."
        ) from error


def _first_frame(root: Path, entry: Mapping[str, Any]) -> Path | None:
    """Where the first frame of a prompt lies: at its own name, else under the name of the prompt's video."""
    homes = [root / "first_images", root.parent / "first_images"]
    named = Path(entry["image"]).name
    places = [root / entry["image"], *(home / named for home in homes)] if named else []
    places += [path for home in homes if entry["name"] for path in home.glob(f"{entry['name']}.*")]
    return next((path for path in places if path.is_file()), None)
