"""
VideoDPO (https://huggingface.co/papers/2412.14167): pairs of a model's own videos, chosen by a judge.

Each prompt gets several videos. The best and the worst of them, by the judge, are a pair; pairs whose scores hardly
differ are dropped, and each pair has a weight, by which `VideoDPOConfig(pair_weights=True)` multiplies its loss.
"""

import json
import logging
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import datasets
import numpy as np
import pyarrow as pa

from ..data.buckets import AspectBucket
from ..data.tables import load_rows
from ..load import SANDBOX, check_judge, heldout_prompts, load_judge
from .engine.manifest import Shard, Stage, digest, kept_rows, run_stage, write_table
from .engine.output import output_folder
from .generate import VideoModel, check_model, job_table, run_jobs
from .phyaug.groups import JUDGED, JudgeBatch, judge_settings


logger = logging.getLogger(__name__)

Weighting = Literal["none", "frequency", "score"]
_TYPICAL_PRODUCT = 0.72  # of the scores of a pair, by which the official code divides; weights are brought to mean 1


@dataclass
class SelfPairsConfig:
    """What to generate, judge and keep. Numbers of videos and the weights are VideoDPO's."""

    prompts: str = field(
        default=SANDBOX,
        metadata={
            "help": "File with a prompt a line (.txt), a dataset with a column 'prompt', or 'sandbox' for its own."
        },
    )
    num_prompts: int | None = field(default=None, metadata={"help": "Only the first so many; 32 of the sandbox's."})
    output_dir: str = field(
        default="outputs/self-pairs",
        metadata={"help": "Folder of the run. One that was stopped goes on where it was."},
    )
    model: str = field(
        default=SANDBOX, metadata={"help": "Model whose videos are compared, and that is to be trained."}
    )
    model_options: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Its options: revision, fps, dtype, call_kwargs, batch_size, as a mapping or JSON."},
    )
    num_videos: int = field(default=4, metadata={"help": "Videos of each prompt, of which two become the pair."})
    height: int = field(default=480, metadata={"help": "Height of the files in pixels."})
    width: int = field(default=832, metadata={"help": "Width of the files in pixels."})
    fps: float = field(default=16.0, metadata={"help": "Frames per second of the files."})
    num_frames: int = field(default=81, metadata={"help": "Frames of the files, 4k + 1."})
    judge: str = field(default="videophy2", metadata={"help": "Judge, by the name that `load_judge` takes."})
    judge_options: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Options of the judge, as a mapping or JSON."}
    )
    drop_proportion: float = field(
        default=0.25, metadata={"help": "Proportion of pairs to drop: those whose scores differ least."}
    )
    weighting: Weighting = field(
        default="frequency",
        metadata={
            "help": "Column 'weight', in the mean 1. 'frequency': the rarer the scores of both videos, the more (the "
            "paper). 'score': the lower their product, the more (the official code). 'none': 1 for every pair."
        },
    )
    weighting_power: float = field(default=1.0, metadata={"help": "Exponent of the weights; 0 makes all of them 1."})
    batch_size: int = field(default=8, metadata={"help": "Videos judged between two commits."})

    def __post_init__(self) -> None:
        for name in ("model_options", "judge_options"):
            if isinstance(vars(self)[name], str):
                setattr(self, name, json.loads(vars(self)[name]))
        if self.num_videos < 2 or self.batch_size < 1 or (self.num_prompts is not None and self.num_prompts < 1):
            raise ValueError(
                "A pair needs two videos, and a run prompts and batches: expected `num_videos` >= 2, `num_prompts` "
                f"and `batch_size` >= 1, got {self.num_videos}, {self.num_prompts} and {self.batch_size}."
            )
        if not 0 <= self.drop_proportion < 1 or not 0 <= self.weighting_power < math.inf:
            raise ValueError(
                "Expected `drop_proportion` in [0, 1) and a finite `weighting_power` that is not negative, got "
                f"{self.drop_proportion} and {self.weighting_power}."
            )
        if self.weighting not in get_args(Weighting):
            raise ValueError(f"`weighting` must be one of {', '.join(get_args(Weighting))}, got {self.weighting!r}.")
        if self.num_frames < 1 or self.num_frames % 4 != 1 or self.height % 16 or self.width % 16 or self.fps <= 0:
            raise ValueError(
                "Expected `num_frames` of 4k + 1, sides in multiples of 16 and a positive `fps`, got "
                f"{self.num_frames}, {self.height} x {self.width} and {self.fps}."
            )

    def video_model(self) -> VideoModel:
        """The model with its options."""
        assert not isinstance(self.model_options, str)
        try:
            return VideoModel(self.model, **(self.model_options or {}))
        except TypeError as error:
            raise ValueError(f"`model_options`: {error}.") from error

    def judge_arguments(self) -> dict[str, Any]:
        """Options of the judge as keyword arguments."""
        assert not isinstance(self.judge_options, str)
        return dict(self.judge_options or {})


@dataclass(frozen=True)
class SelfPairsResult:
    """
    What a run made.

    Attributes:
        pairs (`datasets.Dataset`): Row type "preference", with `chosen_score`, `rejected_score` and `weight`.
        videos (`pyarrow.Table`): One row for every generated video, with its scores.
        funnel (`dict`): Prompts, prompts with two judged videos, pairs.
    """

    pairs: datasets.Dataset
    videos: pa.Table
    funnel: dict[str, int]


def run_self_pairs(config: SelfPairsConfig, *, shard: Shard | None = None) -> SelfPairsResult:
    """
    Generates, judges and pairs; what is done already stays. Every process of `accelerate launch` takes a part.

    Args:
        config ([`SelfPairsConfig`]): Everything.
        shard ([`Shard`], *optional*): Part of this process; read from the environment.

    Returns:
        [`SelfPairsResult`]. The first process writes `videos.parquet` and `pairs/` into the folder of the run.

    Raises:
        ValueError: No prompts, a model or judge that cannot be loaded, or no prompt with two judged videos; or
            `output_dir` holds files of others, or another launch works there.
    """
    shard = shard or Shard.from_environment()
    model = config.video_model()
    check_model(model, config.num_frames, config.fps, [AspectBucket(config.height, config.width)])
    check_judge(config.judge, **config.judge_arguments())
    prompts = read_prompts(config.prompts, config.num_prompts)
    root = Path(config.output_dir).absolute()
    with output_folder(root, "self-pairs", ("videos.parquet", "pairs"), shard):
        return _run_stages(config, model, prompts, root, shard)


def _run_stages(
    config: SelfPairsConfig, model: VideoModel, prompts: Sequence[str], root: Path, shard: Shard
) -> SelfPairsResult:
    (root / "stages").mkdir(parents=True, exist_ok=True)

    size = f"{config.height}x{config.width}"
    clips: dict[str, list[Any]] = {
        "source_id": [f"prompt {number}" for number in range(len(prompts))],
        "content": [digest(prompt) for prompt in prompts],
        "prompt": [*prompts],
        "reference_image": [None] * len(prompts),
        "bucket": [size] * len(prompts),
    }
    clock = {"fps": config.fps, "num_frames": config.num_frames}
    jobs = job_table(clips, model, range(config.num_videos), clock)
    jobs = run_jobs(jobs, model, root, fps=config.fps, num_frames=config.num_frames, shard=shard)
    options = config.judge_arguments()
    judging = Stage(
        "judge",
        JudgeBatch(partial(load_judge, config.judge, **options), root),
        JUDGED,
        "job",
        judge_settings(config.judge, options),
        config.batch_size,
    )
    videos = run_stage(jobs, judging, root / "stages", shard)
    candidates = best_and_worst(kept_rows(videos).to_pylist())
    pairs = make_pairs(candidates, config, root)
    funnel = {"prompts": len(prompts), "judged": len(candidates), "pairs": len(pairs)}
    if shard.index == 0:
        write_table(videos, root / "videos.parquet")
        write_table(pairs.with_format("arrow")[:], root / "pairs" / "train.parquet")
    logger.info("%d prompts, %d with two judged videos, %d pairs.", *funnel.values())
    return SelfPairsResult(pairs, videos, funnel)


def read_prompts(source: str, number: int | None) -> list[str]:
    """
    Different prompts of a file, a dataset or the sandbox, in their order.

    Raises:
        ValueError: If there is none, the file cannot be read, or the dataset has no column `prompt`.
    """
    if source == SANDBOX:
        found = [text for text, _ in heldout_prompts(number or 32)]
    elif Path(source).suffix == ".txt":
        try:
            found = Path(source).read_text(encoding="utf-8-sig").split("\n")  # a text may hold other separators
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{source}: expected a text file in UTF-8 ({error}).") from error
    else:
        rows = load_rows(source, "train")
        if "prompt" not in rows.column_names:
            raise ValueError(f"{source}: expected a column 'prompt', got {rows.column_names}.")
        found = [text or "" for text in rows["prompt"]]
    prompts = list(dict.fromkeys(text.strip() for text in found if text.strip()))[:number]
    if not prompts:
        raise ValueError(f"{source}: expected at least one prompt, got none.")
    return prompts


def best_and_worst(videos: Sequence[dict[str, Any]]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """
    The videos with the highest and the lowest score of each prompt, prompts in their order.

    Args:
        videos (`list[dict]`): Rows of a judged table: `content`, `sa`, `pc` in [0, 1].

    Returns:
        `list[tuple[dict, dict]]`: Best and worst, each with `score`, the mean of `sa` and `pc`; prompts with a single
            video, or with equal scores only, have no pair.
    """
    of_prompt: dict[str, list[dict[str, Any]]] = {}
    for video in videos:
        of_prompt.setdefault(video["content"], []).append({**video, "score": (video["sa"] + video["pc"]) / 2})
    pairs = []
    for group in of_prompt.values():
        best = max(group, key=lambda video: video["score"])
        worst = min(group, key=lambda video: video["score"])
        if best["score"] > worst["score"]:
            pairs.append((best, worst))
    return pairs


def pair_weights(
    chosen: Sequence[float], rejected: Sequence[float], *, weighting: Weighting, power: float = 1.0, bins: int = 10
) -> np.ndarray:
    r"""
    Weights of pairs, with mean 1.

    `"frequency"`: \\( w = 1 / (p(s_w) \, p(s_l))^{b} \\), p being the proportion of all these videos whose score lies
    in the same of `bins` equal intervals. `"score"`: \\( w = (0.72 / (s_w s_l))^{b} \\), scores of 0 taken as 0.01.

    Args:
        chosen, rejected (`Sequence[float]`): Scores of the n pairs, in [0, 1].
        weighting (`"none"`, `"frequency"` or `"score"`): How.
        power (`float`, defaults to `1.0`): Exponent b, not negative.
        bins (`int`, defaults to `10`): Intervals between the lowest and the highest score.

    Returns:
        `np.ndarray` of shape `(n,)`: Positive, float64.
    """
    scores = np.asarray([chosen, rejected], dtype=np.float64)  # (2, n)
    if weighting == "none" or scores.size == 0:
        return np.ones(scores.shape[1])
    if weighting == "score":
        weights = (_TYPICAL_PRODUCT / np.maximum(scores, 0.01).prod(axis=0)) ** power
    else:
        counts, edges = np.histogram(scores, bins=bins)
        places = np.clip(np.digitize(scores, edges[1:-1]), 0, bins - 1)
        weights = (counts[places] / scores.size).prod(axis=0) ** -power
    return weights / weights.mean()


def make_pairs(
    candidates: Sequence[tuple[dict[str, Any], dict[str, Any]]], config: SelfPairsConfig, root: Path
) -> datasets.Dataset:
    """
    The dataset: pairs with a clear difference, and their weights. Of equal differences, the earlier prompt stays.

    Raises:
        ValueError: If no pair is left.
    """
    ordered = sorted(
        range(len(candidates)), key=lambda place: candidates[place][1]["score"] - candidates[place][0]["score"]
    )
    kept = sorted(ordered[: len(ordered) - math.floor(config.drop_proportion * len(ordered))])
    if not kept:
        raise ValueError(
            "No prompt has two videos that the judge scored differently. Make more videos of each (`num_videos`), or "
            "use a judge that tells them apart."
        )
    pairs = [candidates[place] for place in kept]
    chosen, rejected = ([pair[side]["score"] for pair in pairs] for side in (0, 1))
    weights = pair_weights(chosen, rejected, weighting=config.weighting, power=config.weighting_power)
    settings = digest(json.dumps(asdict(config) | {"output_dir": None}, sort_keys=True, default=str))
    real, video = datasets.Value("float64"), datasets.Video(decode=False)
    features = datasets.Features(
        {
            "prompt": datasets.Value("string"),
            "chosen": video,
            "rejected": video,
            "chosen_score": real,
            "rejected_score": real,
            "weight": real,
            "seeds": datasets.List(datasets.Value("int64")),
            "generator": datasets.Value("string"),
            "provenance": datasets.Value("string"),
        }
    )
    columns = {
        "prompt": [best["prompt"] for best, _ in pairs],
        "chosen": [
            os.fspath(root / best["rejected"]) for best, _ in pairs
        ],  # `rejected`: where generation put its file
        "rejected": [os.fspath(root / worst["rejected"]) for _, worst in pairs],
        "chosen_score": chosen,
        "rejected_score": rejected,
        "weight": weights.tolist(),
        "seeds": [[best["seed"], worst["seed"]] for best, worst in pairs],
        "generator": [best["model"] for best, _ in pairs],
        "provenance": [
            json.dumps({"route": "self-pairs", "config": settings, "judge": best["judge"]}) for best, _ in pairs
        ],
    }
    return datasets.Dataset.from_dict(columns, features=features)
