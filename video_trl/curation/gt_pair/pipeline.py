"""
GT-Pair (Reg-DPO, https://huggingface.co/papers/2511.01450): pairs of a real video and a video that a model generates.

The generated video has the real one's prompt or first frame. Stages: acquisition, filtering, normalisation,
generation, pair construction.
"""

import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import datasets
import pyarrow as pa
import pyarrow.compute as pc

from ...data.buckets import AspectBucket, aspect_buckets, nearest_bucket
from ...data.video_file import MAX_PIXELS, VideoLimits
from ...files import remove_leftovers, write_atomically
from ...load import SANDBOX
from ..captions import load_captioner
from ..clips.container import CONTAINER, CONTAINER_VERSION, read_containers
from ..clips.measures import MEASURE_LIMITS, MEASURES, MEASURES_VERSION, measure_batch
from ..clips.normalise import NORMALISE_VERSION, NORMALISED, normalise_batch
from ..clips.sources import ClipSource, list_clips
from ..clips.text_overlay import LineDetector, TextDetector
from ..engine.manifest import (
    Rule,
    Shard,
    Stage,
    apply_rules_to_table,
    count_outcomes,
    digest,
    drop_repeats,
    drop_where,
    kept_rows,
    run_stage,
    summarize,
    with_columns,
    write_table,
)
from ..engine.output import output_folder, sweep
from ..generate import VideoModel, check_model, job_table, run_jobs
from .elsewhere import bring_to_format, clip_name, find_videos, jobs_elsewhere
from .pairs import build_pairs


logger = logging.getLogger(__name__)

# 150 frames at 29.97 fps are 5.005 s, and nobody means to exclude them from "5 seconds".
DURATION_TOLERANCE = 0.05
_OUTPUTS = ("manifest.parquet", "generations.parquet", "pairs", "held_out")
_HELD_OUT = ("clips.parquet", "prompts.jsonl")
# Those of `ASPECT_RATIOS`, written out: `video-trl curate --help` reads this file without importing it.
RATIOS = ("9:16", "3:4", "1:1", "16:9")


class Captioner(Protocol):
    """Writes captions for clips that have none."""

    @property
    def name(self) -> str:
        """Model and version; another name makes new captions."""

    def __call__(self, videos: Sequence[str]) -> list[str]:
        """One caption for each file."""


@dataclass
class GTPairConfig:
    """What to curate and how. Defaults are the paper's; where it has none, docs/data/gt_pair.md says why ours."""

    sources: list[str] = field(
        default_factory=list,
        metadata={"help": "Folders, WebDataset tars, saved datasets or dataset ids to take real clips from."},
    )
    output_dir: str = field(
        default="outputs/gt-pairs",
        metadata={"help": "Folder of the run: stores, videos, manifest, pairs. A run that was stopped goes on here."},
    )
    dataset_split: str = field(default="train", metadata={"help": "Split of sources that are dataset ids."})
    video_column: str = field(default="video", metadata={"help": "Column of datasets with videos or paths."})
    prompt_column: str = field(default="prompt", metadata={"help": "Column of datasets with captions."})

    min_fps: float = field(default=16.0, metadata={"help": "Acquisition: lowest frame rate."})
    max_fps: float = field(default=45.0, metadata={"help": "Acquisition: highest frame rate."})
    min_seconds: float = field(default=5.0, metadata={"help": "Acquisition: shortest clip."})
    max_seconds: float = field(default=6.0, metadata={"help": "Acquisition: longest clip."})
    min_edge: int = field(default=512, metadata={"help": "Acquisition: shortest side in pixels."})
    ratios: list[str] = field(
        default_factory=lambda: [*RATIOS],
        metadata={"help": "Aspect ratios, width:height, that clips are cropped to: any of 9:16 3:4 1:1 16:9."},
    )
    max_crop: float = field(
        default=0.15,
        metadata={"help": "Acquisition: largest proportion of the picture that the nearest ratio cuts off."},
    )
    max_pixels: int = field(
        default=MAX_PIXELS,
        metadata={"help": "Acquisition: most pixels of a frame (8K); a file with more is not decoded."},
    )

    min_motion: float = field(default=2.0, metadata={"help": "Filter 'static': least `motion` (grey levels)."})
    min_object_motion: float = field(
        default=8.5, metadata={"help": "Filter 'slideshow' (also pans over stills): least `object_motion`."}
    )
    max_cuts: int = field(default=1, metadata={"help": "Filter 'cuts': most changes of scene."})
    max_blended: float = field(
        default=0.35,
        metadata={"help": "Filter 'blended' (fades, dissolves): largest `blended` proportion of the picture."},
    )
    max_flashes: int = field(default=0, metadata={"help": "Filter 'flashes': most flashes."})
    max_text: float = field(
        default=0.002, metadata={"help": "Filter 'text': largest proportion of the picture with text."}
    )

    short_edge: int = field(default=720, metadata={"help": "Normalisation: shorter side of every clip in pixels."})
    side_multiple: int = field(
        default=16,
        metadata={
            "help": "Normalisation: what both sides are rounded to a multiple of; 32 for Wan2.2-TI2V-5B and "
            "LTX-Video, which make no others."
        },
    )
    fps: float = field(default=16.0, metadata={"help": "Normalisation: frames per second."})
    num_frames: int = field(default=81, metadata={"help": "Normalisation: frames of every clip, 4k + 1."})

    captioner: str | None = field(
        default=None,
        metadata={
            "help": "Captions for clips without one, which are dropped otherwise: a server's URL, or a folder or "
            "repository id of a Qwen-VL model."
        },
    )
    captioner_options: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Options of the captioner (model, num_frames, max_pixels, ...), as a dict or JSON."},
    )
    num_held_out: int = field(
        default=0,
        metadata={
            "help": "Clips that are held out for evaluation: their captions and first frames go into `held_out/`, and "
            "no pair is made of them."
        },
    )

    models: list[str] = field(
        default_factory=lambda: [SANDBOX],
        metadata={
            "help": "Generation: repository ids or paths of diffusers pipelines, or 'sandbox'; none where "
            "`made_elsewhere` has all."
        },
    )
    made_elsewhere: dict[str, str] | str | None = field(
        default=None,
        metadata={
            "help": "Rejected videos of services and other programs: name of the generator to a folder of videos "
            "named as the clips are, or to a table with the columns source and video; as a dict or JSON."
        },
    )
    model_options: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Generation: options of a model by its name (revision, fps, dtype, call_kwargs, batch_size), as a "
            "dict or JSON."
        },
    )
    seeds: list[int] = field(
        default_factory=lambda: [0], metadata={"help": "Generation: one video for each clip, model and seed."}
    )
    row_type: str = field(
        default="auto",
        metadata={
            "help": "'preference': a row a generated video; 'group': a row a clip; 'auto': group where several."
        },
    )
    batch_size: int = field(default=8, metadata={"help": "Clips probed, measured or normalised between two commits."})

    def __post_init__(self) -> None:
        for name in ("model_options", "captioner_options", "made_elsewhere"):
            if isinstance(vars(self)[name], str):
                setattr(self, name, json.loads(vars(self)[name]))
        for low, high in (("min_fps", "max_fps"), ("min_seconds", "max_seconds")):
            if not 0 < vars(self)[low] <= vars(self)[high]:
                raise ValueError(f"Expected 0 < {low} <= {high}, got {vars(self)[low]} and {vars(self)[high]}.")
        if self.num_frames < 1 or self.num_frames % 4 != 1:
            near = max(self.num_frames // 4 * 4 + 1, 1)
            raise ValueError(f"`num_frames` must be 4k + 1 for the VAEs, got {self.num_frames}. Use {near}.")
        if self.short_edge < 16 or self.short_edge % 16 or self.fps <= 0 or self.batch_size < 1:
            raise ValueError(
                f"Expected `short_edge` in multiples of 16, `fps` > 0 and `batch_size` >= 1, got {self.short_edge}, "
                f"{self.fps} and {self.batch_size}."
            )
        VideoLimits(max_pixels=self.max_pixels)  # raises where it is not positive
        if self.side_multiple < 1:
            raise ValueError(f"`side_multiple` must be at least 1, got {self.side_multiple}.")
        if (self.num_frames - 2) / self.fps >= self.max_seconds + DURATION_TOLERANCE:
            raise ValueError(
                f"{self.num_frames} frames at {self.fps:g} fps are longer than the longest clip that is acquired, "
                f"{self.max_seconds:g} s: nothing would be left."
            )
        unknown = [ratio for ratio in self.ratios if ratio not in RATIOS]
        if unknown or not self.ratios or not 0 <= self.max_crop < 1:
            raise ValueError(f"Expected `ratios` out of {list(RATIOS)} and `max_crop` in [0, 1), got {unknown}.")
        strangers = sorted(set(self.model_options or {}) - set(self.models))
        generators = [*self.models, *self.generators_elsewhere()]
        if not generators or not self.seeds or strangers or len(set(generators)) < len(generators):
            raise ValueError(
                "Expected at least one model or generator and one seed, each model once, and options only for models, "
                f"got models={self.models}, made_elsewhere={self.made_elsewhere}, seeds={self.seeds}, options for "
                f"{strangers or 'no other model'}."
            )
        if self.num_held_out < 0:
            raise ValueError(f"`num_held_out` must not be negative, got {self.num_held_out}.")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"Each seed makes one video: expected different ones, got {self.seeds}.")
        if self.row_type not in ("auto", "preference", "group"):
            raise ValueError(f"`row_type` must be 'auto', 'preference' or 'group', got {self.row_type!r}.")
        self.video_models()  # raises for options that no model has

    def video_models(self) -> list[VideoModel]:
        """The models with their options."""
        assert not isinstance(self.model_options, str)
        options = self.model_options or {}
        try:
            return [VideoModel(name, **options.get(name, {})) for name in self.models]
        except TypeError as error:
            raise ValueError(
                f"`model_options`: {error}. Known: revision, fps, dtype, call_kwargs, batch_size."
            ) from error

    def generators_elsewhere(self) -> dict[str, str]:
        """Folder or table of each generator whose videos are there already."""
        assert not isinstance(self.made_elsewhere, str)
        return dict(self.made_elsewhere or {})

    def load_captioner(self) -> Captioner | None:
        """The captioner that is named, where one is."""
        assert not isinstance(self.captioner_options, str)
        return None if self.captioner is None else load_captioner(self.captioner, self.captioner_options or {})

    def buckets(self) -> list[AspectBucket]:
        """Sizes that clips are brought to."""
        every = zip(RATIOS, aspect_buckets(self.short_edge, multiple=self.side_multiple), strict=True)
        return [bucket for ratio, bucket in every if ratio in self.ratios]

    def acquisition_rules(self) -> list[Rule]:
        return [
            Rule("frame_rate", "fps", self.min_fps, self.max_fps),
            Rule("duration", "seconds", self.min_seconds - DURATION_TOLERANCE, self.max_seconds + DURATION_TOLERANCE),
            Rule("resolution", "short_edge", self.min_edge),
            Rule("aspect", "crop_proportion", maximum=self.max_crop),
        ]

    def filter_rules(self) -> list[Rule]:
        """In the order of naming: a still is also a slideshow, a slideshow also has cuts."""
        return [
            Rule("static", "motion", minimum=self.min_motion),
            Rule("flashes", "flashes", maximum=self.max_flashes),
            Rule("slideshow", "object_motion", minimum=self.min_object_motion),
            Rule("cuts", "cuts", maximum=self.max_cuts),
            Rule("blended", "blended", maximum=self.max_blended),
            Rule("text", "text", maximum=self.max_text),
        ]


@dataclass(frozen=True)
class GTPairResult:
    """
    What a run made.

    Attributes:
        pairs (`datasets.Dataset`): Row type "preference" or "group".
        manifest (`pyarrow.Table`): One row for every clip that came in.
        generations (`pyarrow.Table`): One row for every generated video.
        funnel (`dict`): Clips left after each stage, then the number of rows of `pairs`.
        summary (`str`): The line that accounts for every clip.
    """

    pairs: datasets.Dataset
    manifest: pa.Table
    generations: pa.Table
    funnel: dict[str, int]
    summary: str


def run_gt_pair(
    config: GTPairConfig,
    sources: Sequence[ClipSource] = (),
    *,
    captioner: Captioner | None = None,
    text_detector: TextDetector | None = None,
    shard: Shard | None = None,
) -> GTPairResult:
    """
    Runs all five stages, or what is left of them: a run that was stopped, however, goes on where it was.

    Started by `accelerate launch` or `torchrun` every process takes a part of each stage. `output_dir` must be on a
    disk that all of them see. The first process writes `manifest.parquet`, `generations.parquet` and `pairs/`.

    Args:
        config ([`GTPairConfig`]): Everything but objects.
        sources (`list`, *optional*): Further sources, also `datasets.Dataset` and `IterableDataset` objects.
        captioner ([`Captioner`], *optional*): For clips without a prompt, instead of the one that the configuration
            names.
        text_detector ([`TextDetector`], *optional*): Instead of the heuristic that needs no download.
        shard ([`Shard`], *optional*): Part of this process; read from the environment.

    Returns:
        [`GTPairResult`].

    Raises:
        ValueError: No sources, a source that is none, a model that cannot be loaded or makes clips that are too short;
            or `output_dir` holds files of others, or another launch works there.
        OSError: The disk is full, or a file of an earlier run is gone.
    """
    shard = shard or Shard.from_environment()
    every = [*config.sources, *sources]
    if not every:
        raise ValueError("Expected at least one source: a folder, a tar or a dataset (`--sources`).")
    for model in config.video_models():
        check_model(model, config.num_frames, config.fps, config.buckets())
    elsewhere = {name: find_videos(source) for name, source in config.generators_elsewhere().items()}
    captioner = captioner or config.load_captioner()
    root = Path(config.output_dir).absolute()
    with output_folder(root, "gt-pair", _OUTPUTS, shard):
        return _run_stages(config, every, root, shard, captioner, text_detector, elsewhere)


def _run_stages(
    config: GTPairConfig,
    sources: Sequence[ClipSource],
    root: Path,
    shard: Shard,
    captioner: Captioner | None,
    text_detector: TextDetector | None,
    elsewhere: Mapping[str, Mapping[str, Path]],
) -> GTPairResult:
    stores = root / "stages"
    stores.mkdir(parents=True, exist_ok=True)
    table = list_clips(
        sources,
        spool=root / "sources",
        split=config.dataset_split,
        video_column=config.video_column,
        prompt_column=config.prompt_column,
    )
    funnel = {"listed": len(table)}
    table = acquire(table, config, stores, shard, needs_prompt=captioner is None)
    funnel["acquired"] = len(kept_rows(table))
    table = filter_clips(table, config, stores, shard, text_detector)
    funnel["filtered"] = len(kept_rows(table))
    table = normalise(table, config, root, shard)
    if captioner is not None:
        table = write_captions(table, captioner, root, shard)
    funnel["normalised"] = len(kept_rows(table))
    table = hold_out(table, config.num_held_out)
    table, generations = generate(table, config, root, shard, elsewhere)
    funnel["generated"] = len(kept_rows(table))

    assert len(table) == funnel["listed"] == len(kept_rows(table)) + sum(count_outcomes(table).values())
    pairs = build_pairs(table, generations, root, config.row_type, settings={**asdict(config), "output_dir": None})
    funnel["pairs"] = len(pairs)
    if shard.index == 0:
        write_table(table, root / "manifest.parquet")
        write_table(generations, root / "generations.parquet")
        write_held_out(table, root)
        write_table(pairs.with_format("arrow")[:], root / "pairs" / "train.parquet")
        sweep(root, ("stages", "sources", "videos", "generated"))
    row_type = "group" if isinstance(pairs.features["rejected"], datasets.List) else "preference"
    summary = f"{summarize(table)}; {len(pairs)} {row_type} rows"
    return GTPairResult(pairs, table, generations, funnel, summary)


def acquire(table: pa.Table, config: GTPairConfig, stores: Path, shard: Shard, *, needs_prompt: bool) -> pa.Table:
    """Stage 1: containers read, rules of acquisition applied, contents that came twice dropped."""
    function = partial(read_containers, limits=VideoLimits(max_pixels=config.max_pixels))
    settings = {"version": CONTAINER_VERSION, "max_pixels": config.max_pixels}
    stage = Stage("probe", function, CONTAINER, "listing", settings, config.batch_size, trial=function)
    table = run_stage(table, stage, stores, shard)
    sizes = table.select(["width", "height"]).to_pydict()
    added = {"bucket": pa.string(), "crop_proportion": pa.float64()}
    table = with_columns(table, choose_bucket(sizes, buckets=config.buckets()), added)
    table = apply_rules_to_table(table, config.acquisition_rules())
    untold = [prompt is None for prompt in table["prompt"].to_pylist()]
    table = drop_repeats(table, "content", name="repeated", rank=untold)  # of two copies, the one with a caption stays
    return drop_where(table, untold, "no_prompt") if needs_prompt else table


def choose_bucket(batch: dict[str, list[Any]], *, buckets: Sequence[AspectBucket]) -> dict[str, list[Any]]:
    """The nearest bucket of each `(width, height)` and the proportion of the picture that it cuts off, as columns."""
    added: dict[str, list[Any]] = {"bucket": [], "crop_proportion": []}
    for width, height in zip(batch["width"], batch["height"], strict=True):
        bucket = None if width is None else nearest_bucket(width, height, buckets)
        added["bucket"].append(bucket and str(bucket))
        added["crop_proportion"].append(bucket and bucket.crop_proportion(width, height))
    return added


def filter_clips(
    table: pa.Table, config: GTPairConfig, stores: Path, shard: Shard, text_detector: TextDetector | None = None
) -> pa.Table:
    """Stage 2: one decoding pass for what has not been measured before, then thresholds."""
    detector = text_detector or LineDetector()
    limits = replace(MEASURE_LIMITS, max_pixels=config.max_pixels)
    function = partial(measure_batch, text_detector=detector, limits=limits)
    stage = Stage(
        "measure",
        function,
        MEASURES,
        "content",
        {"version": MEASURES_VERSION, "text": detector.name},
        config.batch_size,
        trial=function,
    )
    return apply_rules_to_table(run_stage(table, stage, stores, shard), config.filter_rules())


def normalise(table: pa.Table, config: GTPairConfig, root: Path, shard: Shard) -> pa.Table:
    """Stage 3: files of one clock, length and bucket, and their first frames."""
    settings = {
        "version": NORMALISE_VERSION,
        "buckets": [str(bucket) for bucket in config.buckets()],
        "fps": config.fps,
        "num_frames": config.num_frames,
    }
    # A clip's bucket depends on which ratios there are, so they belong to the name as well.
    folder = f"videos/{config.short_edge}p-{config.fps:g}fps-{config.num_frames}f-{digest(str(settings), 6)}"
    function = partial(
        normalise_batch,
        root=root,
        folder=folder,
        fps=config.fps,
        num_frames=config.num_frames,
        limits=VideoLimits(max_pixels=config.max_pixels),
    )
    stage = Stage("normalise", function, NORMALISED, "content", settings, config.batch_size, trial=function)
    remove_leftovers(root / folder)
    return run_stage(table, stage, root / "stages", shard)


def write_captions(table: pa.Table, captioner: Captioner, root: Path, shard: Shard) -> pa.Table:
    """Captions for clips without one, from their normalised files. Those that clips come with are not kept here."""

    def caption_batch(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        written = captioner([str(root / video) for video in batch["video"]])
        return {"caption": [caption.strip() or None for caption in written]}

    stage = Stage("caption", caption_batch, {"caption": pa.string()}, "content", {"captioner": captioner.name})
    untold = kept_rows(table.filter(pc.is_null(table["prompt"])))
    described = run_stage(untold, stage, root / "stages", shard)
    captions = dict(zip(described["content"].to_pylist(), described["caption"].to_pylist(), strict=True))
    columns = {"caption": [captions.get(content) for content in table["content"].to_pylist()]}
    prompts = [a or b for a, b in zip(table["prompt"].to_pylist(), columns["caption"], strict=True)]
    table = with_columns(table, columns | {"prompt": prompts}, {"caption": pa.string(), "prompt": pa.string()})
    return drop_where(table, [prompt is None for prompt in prompts], "no_prompt")


def hold_out(table: pa.Table, number: int) -> pa.Table:
    """
    Drops so many clips by "held_out". Their content decides which: the same ones in every run over these clips.

    Raises:
        ValueError: If none would be left.
    """
    left = sorted(kept_rows(table)["content"].to_pylist(), key=lambda content: digest(f"held out\0{content}"))
    if number and number >= len(left):
        raise ValueError(f"`num_held_out={number}` of {len(left)} clips leaves none to train on. Hold out fewer.")
    held_out = set(left[:number])
    return drop_where(table, [content in held_out for content in table["content"].to_pylist()], "held_out")


def write_held_out(table: pa.Table, root: Path) -> None:
    """
    The prompts of an evaluation, for `video-trl eval --prompts`: sentence, first frame and real clip of each. Where no
    clip is held out, those of an earlier run go: they are trained on now.
    """
    rows = table.filter(pc.equal(table["dropped_by"], "held_out")).to_pylist()
    if not rows:
        for name in _HELD_OUT:
            (root / "held_out" / name).unlink(missing_ok=True)
        return
    entries = [
        {"prompt": row["prompt"], "image": str(root / row["reference_image"]), "video": str(root / row["video"])}
        for row in rows
    ]
    write_table(pa.Table.from_pylist(entries), root / "held_out" / _HELD_OUT[0])
    prompts = [json.dumps({name: entry[name] for name in ("prompt", "image")}) for entry in entries]
    write_atomically(root / "held_out" / _HELD_OUT[1], "\n".join(prompts) + "\n")


def generate(
    table: pa.Table,
    config: GTPairConfig,
    root: Path,
    shard: Shard,
    elsewhere: Mapping[str, Mapping[str, Path]] = MappingProxyType({}),
) -> tuple[pa.Table, pa.Table]:
    """
    Stage 4: every model and seed for every clip, and what was made elsewhere. A clip that misses one of its videos is
    dropped; with single pairs, one that has none.
    """
    available = kept_rows(table)
    names = ["source_id", "path", "offset", "content", "prompt", "reference_image", "bucket"]
    clips = available.select(names).to_pydict()
    shared = _shared_names(table.select(names)) if elsewhere else set()
    tables = []
    for generator, videos in elsewhere.items():
        jobs = jobs_elsewhere(clips, generator, videos, shared)
        tables.append(bring_to_format(jobs, root, fps=config.fps, num_frames=config.num_frames, shard=shard))
    for model in config.video_models():
        jobs = job_table(clips, model, config.seeds, {"fps": config.fps, "num_frames": config.num_frames})
        tables.append(run_jobs(jobs, model, root, fps=config.fps, num_frames=config.num_frames, shard=shard))
    generations = pa.concat_tables(tables)
    failed: dict[str, str] = {}
    made: Counter[str] = Counter()
    for content, rule, name in zip(
        *(generations[column].to_pylist() for column in ("content", "dropped_by", "source_id")), strict=True
    ):
        made[content] += rule is None
        if rule is not None:
            failed.setdefault(content, f"{rule}: {name}")
    wanted = len(config.models) * len(config.seeds) + len(elsewhere)
    if config.row_type == "preference":
        failed = {content: words for content, words in failed.items() if not made[content]}
        wanted = 1
    for content in clips["content"]:
        if made[content] < wanted:
            failed.setdefault(content, f"{made[content]} of {wanted} videos")
    details = [failed.get(content) for content in table["content"].to_pylist()]
    return drop_where(table, [detail is not None for detail in details], "generation", details), generations


def _shared_names(table: pa.Table) -> set[str]:
    """Names that clips of different content have; those of dropped clips count too."""
    clips = table.filter(pc.is_valid(table["content"])).to_pylist()
    names = Counter(name for name, _ in {(clip_name(clip), clip["content"]) for clip in clips})
    return {name for name, number in names.items() if number > 1}
