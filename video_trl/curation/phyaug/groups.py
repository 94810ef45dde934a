"""Last stages of PhyAugPipe: judge the generated videos and write rows of type "group"."""

import glob
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import torch

from ...data.columns import group_features
from ...files import fingerprint, read_json
from ...judges import VideoJudge
from ...judges.base import score_each
from ...losses.preference import physics_weights
from ..engine.manifest import Batch, kept_rows
from .config import public


JUDGED_VERSION = 1

#: Columns that judging adds to a table of generated videos.
JUDGED: dict[str, pa.DataType] = {"sa": pa.float64(), "pc": pa.float64(), "judge": pa.string()}

RUN_NAME = "run.json"
#: The dataset, in the folder `groups` of a run.
GROUPS_NAME = "train-00000-of-00001.parquet"


@dataclass
class JudgeBatch:
    """
    Stage "judge" as a batch function. It travels to other processes without the judge, which loads at first use.

    Args:
        make: makes the judge.
        root: the run's folder, which paths are relative to.
    """

    make: Callable[[], VideoJudge]
    root: Path
    _judge: VideoJudge | None = field(default=None, init=False, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {"make": self.make, "root": self.root, "_judge": None}

    def __call__(self, batch: Batch) -> Batch:
        """Columns `rejected` and `prompt` -> the columns `JUDGED`; no scores: dropped by "not_judged"."""
        self._judge = judge = self._judge or self.make()
        videos = [str(self.root / path) for path in batch["rejected"]]
        scores = score_each(judge, videos, batch["prompt"])
        missing = [score["sa"] is None or score["pc"] is None for score in scores]
        return {
            "sa": [score["sa"] for score in scores],
            "pc": [score["pc"] for score in scores],
            "judge": [judge.identity] * len(scores),
            "dropped_by": ["not_judged" if bad else None for bad in missing],
            "detail": [
                str(score.get("error", ""))[:1000] if bad else None for score, bad in zip(scores, missing, strict=True)
            ],
        }


def judge_settings(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """What decides a judge's scores, as the settings of its stage: of a table, which may be completed, its content."""
    settings = {"judge": name, "options": public(dict(options)), "version": JUDGED_VERSION}
    table = {"table": fingerprint(Path(name))} if Path(name).is_file() else {}
    return json.loads(json.dumps(settings | table, default=str))


def phyaug_features() -> datasets.Features:
    """Columns of the dataset: those that `VideoGroupDPOTrainer` reads, and where each of them comes from."""
    text, real = datasets.Value("string"), datasets.Value("float32")
    generation = {"model": text, "revision": text, "seed": datasets.Value("int64"), "settings": text}
    return datasets.Features(
        {
            **group_features("category", "seeds", "generator", "provenance"),
            "rejected_weights": datasets.List({"alpha": real, "gamma": real}),
            "rejected_generation": datasets.List(generation),
            "prompt_extended": text,
            "physics": {"richness": real, "parse": text, "vision_check": text, "reason": text, "scores": text},
            "action": {"similarity": real, "margin": real, "difficulty": real},
        }
    )


def build_groups(
    clips: pa.Table, rejected: pa.Table, root: Path, *, difficulty: Mapping[str, float], config_hash: str
) -> datasets.Dataset:
    """
    The dataset of a run: one row for each clip that has all of its rejected videos.

    Args:
        clips (`pyarrow.Table`): The manifest with the columns of all stages.
        rejected (`pyarrow.Table`): Generated and judged videos, the same number for each clip.
        root (`Path`): The run's folder; paths in the dataset are absolute.
        difficulty (`dict`): d of each category.
        config_hash (`str`): Of the configuration; goes into `provenance`.

    Returns:
        `datasets.Dataset`: Columns of `phyaug_features`, videos as files. `rejected_weights` are Eq. 10 with the
            paper's values, to look at: the trainer computes its own from the scores.
    """
    jobs: dict[str, list[dict[str, Any]]] = {}
    for job in kept_rows(rejected).to_pylist():
        jobs.setdefault(job["content"], []).append(job)
    rows = [
        _row(clip, jobs[clip["content"]], root, difficulty[clip["category"]], config_hash)
        for clip in kept_rows(clips).to_pylist()
    ]
    features = phyaug_features()
    return datasets.Dataset.from_dict({name: [row[name] for row in rows] for name in features}, features=features)


def _row(
    clip: Mapping[str, Any], jobs: list[dict[str, Any]], root: Path, difficulty: float, config_hash: str
) -> dict[str, Any]:
    sa, pc = (torch.tensor([job[name] for job in jobs], dtype=torch.float64) for name in ("sa", "pc"))
    alpha, gamma = physics_weights(sa, pc)
    origin = {name: clip[name] for name in ("content", "fps", "seconds", "annotator", "embedder")}
    provenance = {"route": "phyaug", "config": config_hash, "source": clip["source_id"], "judge": jobs[0]["judge"]}
    return {
        "prompt": clip["prompt"],
        "chosen": str(root / clip["video"]),
        "rejected": [str(root / job["rejected"]) for job in jobs],
        "rejected_scores": [{"sa": job["sa"], "pc": job["pc"]} for job in jobs],
        "category": clip["category"],
        "seeds": [job["seed"] for job in jobs],
        "generator": jobs[0]["model"],
        "provenance": json.dumps(provenance | origin),
        "rejected_weights": [{"alpha": a, "gamma": g} for a, g in zip(alpha.tolist(), gamma.tolist(), strict=True)],
        "rejected_generation": [
            {"model": job["model"], "revision": job["revision"], "seed": job["seed"], "settings": job["generation"]}
            for job in jobs
        ],
        "prompt_extended": clip["extended"],
        "physics": {
            "richness": clip["physics_richness"],
            "parse": clip["parse"],
            "vision_check": clip["vision_check"],
            "reason": clip["reason"],
            "scores": clip["physics_scores"],
        },
        "action": {"similarity": clip["similarity"], "margin": clip["margin"], "difficulty": difficulty},
    }


def load_groups(output_dir: str | os.PathLike[str]) -> datasets.Dataset:
    """
    The dataset of a finished run.

    Raises:
        ValueError: There is no run in `output_dir`, or it isn't finished.
    """
    root = Path(output_dir)
    stamp = root / RUN_NAME
    state = read_json(stamp)["state"] if stamp.is_file() else None
    if state != "finished":
        status = "no run" if state is None else f"a run that is not finished (state {state!r})"
        raise ValueError(f"{root} holds {status}. Start the pipeline with the same settings: it goes on where it was.")
    table = glob.escape(str(root / "groups" / GROUPS_NAME))  # `datasets` takes a path for a pattern
    return datasets.Dataset.from_parquet(table, cache_dir=str(root / ".cache"))
