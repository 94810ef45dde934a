"""Score the videos of a run with a judge. Each score is a small file with the hash of its video."""

import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from ...data.video_io import video_hash
from ...files import read_json, remove_leftovers, write_json
from ...judges import Video, VideoJudge
from ...judges.base import score_each
from .run import SCORE_FOLDER, Case, EvaluationRun, cases_of, claimed, load_run, shard


_JUDGE_FILE = "judge.json"
_REQUIRED = ("sa", "pc")


def score_run(
    run_dir: str | os.PathLike[str],
    judge: VideoJudge,
    *,
    batch_size: int = 8,
    rank: int | None = None,
    num_ranks: int | None = None,
) -> EvaluationRun:
    """
    Scores the videos of a run that this judge has not scored yet, split over processes like [`generate_run`]. The
    judge reads the prompt's `text`, also where the model was given a longer one.

    Args:
        run_dir (path): Directory of the run.
        judge ([`VideoJudge`]): Any judge; its `name` and `identity` tell it from others.
        batch_size (`int`, *optional*, defaults to `8`): Videos given to the judge together.
        rank (`int`, *optional*), num_ranks (`int`, *optional*): Part of this process, by default as launched.

    Returns:
        [`EvaluationRun`]

    Raises:
        ValueError: If a video of this process is missing or cannot be opened, or scores of that name were given by
            another judge; and after all others are scored and kept, if a video has no score in [0, 1].
    """
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
    run = load_run(run_dir)
    default_rank, default_ranks = shard()
    cases = cases_of(run, default_rank if rank is None else rank, default_ranks if num_ranks is None else num_ranks)
    folder = open_scores(run, judge)
    with claimed(folder / ".lock", [position for position, _ in cases]):
        remove_leftovers(folder)
        todo = [case for _, case in cases if not (folder / f"{case.key}.json").is_file()]
        run.check_videos(todo)
        failures = []
        with tqdm(total=len(todo), desc=f"Scoring {run.name}", unit="video") as progress:
            for start in range(0, len(todo), batch_size):
                batch = todo[start : start + batch_size]
                failures += write_scores(run, judge, batch, [run.video(case) for case in batch], folder)
                progress.update(len(batch))
    require_scores(judge, failures, len(cases))
    return run


def write_scores(
    run: EvaluationRun, judge: VideoJudge, cases: Sequence[Case], videos: Sequence[Video], folder: Path
) -> list[str]:
    """Lets the judge see the videos of the cases and writes each score; returns what is wrong with unusable ones."""
    failures = []
    scores = score_each(judge, videos, [case.prompt.text for case in cases])
    if len(scores) != len(cases):
        raise ValueError(f"Judge {judge.name!r} gave {len(scores)} scores for {len(cases)} videos.")
    for case, score in zip(cases, scores, strict=True):
        fault = _fault(score, case)
        if fault:
            failures.append(fault)
        else:
            content = {"video_hash": video_hash(run.video(case)), "score": _plain(score)}
            write_json(folder / f"{case.key}.json", content)
    return failures


def require_scores(judge: VideoJudge, failures: Sequence[str], total: int) -> None:
    """
    Raises:
        ValueError: If the judge left videos without a score that can be used.
    """
    if failures:
        raise ValueError(
            f"Judge {judge.name!r} left {len(failures)} of {total} videos without a usable score; the others are "
            f"kept. Repair the judge and score again: it does what is missing. The first: {failures[0]}"
        )


def load_scores(run: EvaluationRun, judge: str | None = None) -> list[dict[str, Any]]:
    """
    Scores of all videos of a run, in the order of `run.cases`.

    Args:
        run ([`EvaluationRun`]): The run.
        judge (`str`, *optional*): Name of the judge. May be left out when a single judge scored the run.

    Returns:
        `list[dict]`: What the judge returned, with at least `sa` and `pc` in [0, 1].

    Raises:
        ValueError: If no judge or several judges scored the run, scores are missing or not finite, or a video is not
            the one that was scored. No row is ever left out.
    """
    folder = _score_folder(run, judge)
    missing = [case for case in run.cases if not (folder / f"{case.key}.json").is_file()]
    if missing:
        rank, num_ranks = shard()
        part = f" This is RANK={rank} of WORLD_SIZE={num_ranks}; if it is alone, unset both." if num_ranks > 1 else ""
        raise ValueError(
            f"{folder}: {len(missing)} of {len(run.cases)} videos have no score, the first being {missing[0].key} "
            f"({missing[0].prompt.text!r}). Score the run again with the same judge: it does what is missing.{part}"
        )
    # Nothing is decoded: the judge has, and a video of the same content is as readable as it was then.
    run.require_videos(run.cases)
    scores = []
    for case in run.cases:
        content = read_json(folder / f"{case.key}.json")
        if content["video_hash"] != video_hash(run.video(case)):
            raise ValueError(
                f"{run.video(case)} is not the video that was scored: it changed afterwards. Delete {folder} and "
                "score the run again."
            )
        fault = _fault(content["score"], case)
        if fault:
            raise ValueError(
                f"{folder}: a score was changed by hand: {fault} Delete its file and score the run again."
            )
        scores.append(content["score"])
    return scores


def judge_of(run: EvaluationRun, judge: str | None = None) -> dict[str, str]:
    """
    `name` and `identity` of the judge whose scores [`load_scores`] reads, and `judged` where it saw frames as the
    model made them instead of compressed files.

    Raises:
        ValueError: As in [`load_scores`].
    """
    return {key: str(value) for key, value in read_json(_score_folder(run, judge) / _JUDGE_FILE).items()}


def open_scores(run: EvaluationRun, judge: VideoJudge, *, of_frames: bool = False) -> Path:
    """
    Folder of the judge's scores; refuses one that another judge of that name has begun, and one where it saw the other
    thing: frames as the model made them (`of_frames`), or the compressed files.
    """
    folder = run.folder / SCORE_FOLDER / slug(judge.name)
    description = {"name": judge.name, "identity": judge.identity, **({"judged": "frames"} if of_frames else {})}
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / _JUDGE_FILE).is_file():
        write_json(folder / _JUDGE_FILE, description)
    stored = read_json(folder / _JUDGE_FILE)
    if stored != description:
        raise ValueError(
            f"{folder} holds the scores of another judge ({stored}), not of this one ({description}). Rename or "
            "delete that folder to score the run again."
        )
    return folder


def _score_folder(run: EvaluationRun, judge: str | None) -> Path:
    folders = sorted(path.parent for path in (run.folder / SCORE_FOLDER).glob(f"*/{_JUDGE_FILE}"))
    names = {str(read_json(folder / _JUDGE_FILE)["name"]): folder for folder in folders}
    if judge is not None and judge not in names:
        raise ValueError(f"{run.folder} has no scores of the judge {judge!r}; it has those of {sorted(names)}.")
    if judge is None and len(names) != 1:
        stored = f"those of {sorted(names)}: name one by `judge`" if names else "none: score it with `score_run`"
        raise ValueError(f"Expected {run.folder} to hold the scores of one judge, got {stored}.")
    return names[judge] if judge is not None else next(iter(names.values()))


def slug(name: str) -> str:
    """A folder name for a judge's name, which may hold slashes."""
    return re.sub(r"[^A-Za-z0-9.-]+", "_", name).strip(".") or "judge"


def _fault(score: Mapping[str, Any], case: Case) -> str | None:
    """What is wrong with a score, or None. A judge that calls a server may leave a video without one and say why."""
    for key in _REQUIRED:
        value = score.get(key)
        if isinstance(value, (bool, str)) or value is None or not 0 <= float(value) <= 1:  # NaN fails the comparison
            reason = f" ({score['error']})" if score.get("error") else ""
            return f"{key}={value!r}{reason} for video {case.key} ({case.prompt.text!r}), expected a number in [0, 1]."
    return None


def _plain(value: Any) -> Any:
    """The value in JSON's types. Numbers that are not finite, such as a fit that failed, become null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
