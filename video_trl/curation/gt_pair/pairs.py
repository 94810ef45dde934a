"""Stage 5: write rows for the trainers. The real clip is chosen; the generated videos of its caption are rejected."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa

from ...data.video_io import VideoInfo, probe_video
from ..engine.manifest import digest, kept_rows


_GENERATION = {
    "model": datasets.Value("string"),
    "revision": datasets.Value("string"),
    "seed": datasets.Value("int64"),
    "settings": datasets.Value("string"),
}


def pair_features(row_type: str) -> datasets.Features:
    """Columns of `"preference"` or `"group"` rows; a group has lists where a preference row has single values."""
    several = row_type == "group"
    video = datasets.Video(decode=False)
    return datasets.Features(
        {
            "prompt": datasets.Value("string"),
            "chosen": video,
            "rejected": datasets.List(video) if several else video,
            "rejected_generation": datasets.List(_GENERATION) if several else _GENERATION,
            "seeds": datasets.List(datasets.Value("int64")),
            "generator": datasets.Value("string"),
            "reference_image": datasets.Value("string"),
            "provenance": datasets.Value("string"),
        }
    )


def build_pairs(
    clips: pa.Table, generations: pa.Table, root: Path, row_type: str, settings: Mapping[str, Any]
) -> datasets.Dataset:
    """
    The dataset of a run.

    Args:
        clips (`pyarrow.Table`): The manifest with the columns of normalisation.
        generations (`pyarrow.Table`): Jobs with their files.
        root (`Path`): The run's folder, which paths are relative to; those of the dataset are absolute.
        row_type (`str`): "preference" (a row for each generated video), "group" (a row for each clip) or "auto":
            "group" where clips have several generated videos.
        settings (`dict`): The run's configuration; its hash goes into `provenance`.

    Returns:
        `datasets.Dataset`: Undecoded videos, as files.

    Raises:
        ValueError: Chosen and rejected video of a row differ in size, length or clock, or a file is gone.
    """
    jobs_by_clip: dict[str, list[dict[str, Any]]] = {}
    for job in kept_rows(generations).to_pylist():
        jobs_by_clip.setdefault(job["content"], []).append(job)
    config = digest(json.dumps(dict(settings), sort_keys=True, default=str))
    rows = []
    for clip in kept_rows(clips).to_pylist():
        jobs = jobs_by_clip[clip["content"]]
        _check_formats(root, clip, jobs)
        rows.append(_group_row(root, clip, jobs, config))
    if row_type == "auto":
        row_type = "group" if any(len(row["rejected"]) > 1 for row in rows) else "preference"
    if row_type == "preference":
        rows = [single for row in rows for single in _split(row)]
    features = pair_features(row_type)
    return datasets.Dataset.from_dict({name: [row[name] for row in rows] for name in features}, features=features)


def _check_formats(root: Path, clip: Mapping[str, Any], jobs: list[dict[str, Any]]) -> None:
    """A model that is trained on pairs of two formats learns the format."""
    real = probe_video(root / clip["video"])
    for job in jobs:
        info = probe_video(root / job["rejected"])
        if _format(info) != _format(real):
            raise ValueError(
                f"{root / job['rejected']}: expected the format of {root / clip['video']}, {_format(real)}, got "
                f"{_format(info)} (frames, fps, height, width). Delete the file and run again."
            )


def _format(info: VideoInfo) -> tuple[int, float, int, int]:
    return info.num_frames, round(info.fps, 3), info.height, info.width


def _group_row(root: Path, clip: Mapping[str, Any], jobs: list[dict[str, Any]], config: str) -> dict[str, Any]:
    generation = [
        {"model": job["model"], "revision": job["revision"], "seed": job["seed"], "settings": job["generation"]}
        for job in jobs
    ]
    origin = {"source": clip["source_id"], "content": clip["content"], "seconds": clip["seconds"], "fps": clip["fps"]}
    return {
        "prompt": clip["prompt"],
        "chosen": str(root / clip["video"]),
        "rejected": [str(root / job["rejected"]) for job in jobs],
        "rejected_generation": generation,
        "seeds": [job["seed"] for job in jobs if job["seed"] is not None],  # unknown of what was made elsewhere
        "generator": ", ".join(dict.fromkeys(job["model"] for job in jobs)),
        "reference_image": str(root / clip["reference_image"]),
        "provenance": json.dumps({"route": "gt-pair", "config": config, **origin}),
    }


def _split(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A group as preference rows, one for each rejected video."""
    return [
        {
            **row,
            "rejected": rejected,
            "rejected_generation": generation,
            "seeds": [generation["seed"]] if generation["seed"] is not None else [],
            "generator": generation["model"],
        }
        for rejected, generation in zip(row["rejected"], row["rejected_generation"], strict=True)
    ]
