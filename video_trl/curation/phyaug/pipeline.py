"""
PhyAugPipe (PhyGDPO, https://huggingface.co/papers/2512.24551, Section 2.1): from a pool of captioned videos to groups.

1. A vision-language model keeps clips that are rich in physics. 2. Captions are assigned to actions. 3. The base
model's scores show which actions are hard for it. 4. More clips are sampled from hard actions. 5. The base model's own
videos of these captions become the rejected ones.
"""

import contextlib
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from huggingface_hub import CommitInfo

from ...data.buckets import AspectBucket
from ...files import write_atomically
from ...hub.card import CARD_NAME
from ...hub.dataset import export_dataset, push_dataset
from ...load import check_judge, load_judge
from ..clips.container import CONTAINER, CONTAINER_VERSION, read_containers
from ..clips.normalise import NORMALISE_VERSION, NORMALISED, normalise_batch
from ..clips.sources import ClipSource, decode_clips, list_clips
from ..engine.manifest import (
    Batch,
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
from ..engine.output import output_folder
from ..engine.ray import run_stage_on_ray
from ..generate import check_model, generation_stage, job_table
from .actions import (
    CLUSTER_VERSION,
    CLUSTERED,
    Actions,
    ClusterBatch,
    check_embedder,
    load_embedder,
    read_actions,
)
from .annotate import ANNOTATED, CAPTION_ANNOTATED, NO_ANSWER, AnnotateBatch, check_annotator, load_annotator
from .annotation import prompt_hash
from .config import PhyAugConfig, public
from .groups import GROUPS_NAME, JUDGED, RUN_NAME, JudgeBatch, build_groups, judge_settings, load_groups
from .report import write_dataset_card, write_funnel
from .sampling import allocate, category_scores, draw, representatives


__all__ = ["Category", "PhyAugConfig", "PhyAugResult", "allocate", "load_groups", "push_groups", "run_phyaug"]

logger = logging.getLogger(__name__)

_TABLES = ("manifest.parquet", "rejected.parquet", "representatives.parquet", "funnel.html")

#: Columns computed from content and caption: their hash, which is the key of what models answer about the clip, and
#: the values that the rules of the pool read.
PROMPT_COLUMNS: dict[str, pa.DataType] = {
    "clip": pa.string(),
    "prompt_words": pa.int64(),
    "latin_proportion": pa.float64(),
}


@dataclass(frozen=True)
class Category:
    """
    One action category of a run.

    Attributes:
        name: the action.
        available: clips of this action that passed the filter, H_f.
        representatives: captions of this action for which the base model's videos were scored.
        score: mean of their judge scores, S_f in [0, 1]; None if there was nothing to judge.
        difficulty: 1 - score.
        sampled: clips that were sampled, H_r.
    """

    name: str
    available: int
    representatives: int
    score: float | None
    difficulty: float | None
    sampled: int


@dataclass(frozen=True)
class PhyAugResult:
    """
    Results of a run.

    Attributes:
        groups (`datasets.Dataset`): Row type "group".
        manifest (`pyarrow.Table`): One row for every clip of the pool, with its outcome.
        rejected (`pyarrow.Table`): One row for each generated video.
        categories (`list[Category]`): The histograms.
        funnel (`dict`): Clips left after each stage.
        summary (`str`): The line that accounts for every clip.
    """

    groups: datasets.Dataset
    manifest: pa.Table
    rejected: pa.Table
    categories: list[Category]
    funnel: dict[str, int]
    summary: str


class Runner:
    """Runs stages where the configuration says."""

    def __init__(self, config: PhyAugConfig, root: Path, shard: Shard) -> None:
        self.config, self.stores, self.shard = config, root / "stages", shard

    def __call__(self, table: pa.Table, stage: Stage, *, gpu: bool = False) -> pa.Table:
        if self.config.engine == "ray":
            return run_stage_on_ray(table, stage, self.stores, self.config.cluster(gpu=gpu))
        return run_stage(table, stage, self.stores, self.shard)


def run_phyaug(
    config: PhyAugConfig,
    sources: Sequence[ClipSource] = (),
    *,
    shard: Shard | None = None,
) -> PhyAugResult:
    """
    Runs all stages. A run that was stopped is resumed where it was.

    `output_dir` must be on a disk that all processes or nodes see. It receives `manifest.parquet` (the outcome of
    every clip), `rejected.parquet`, `representatives.parquet`, `funnel.html`, and at last `groups/` with the dataset
    and its card. `run.json` says whether the run is finished; while it isn't, there is no `groups/`.

    Args:
        config ([`PhyAugConfig`]): Everything but objects.
        sources (`list`, *optional*): Further sources, also `datasets.Dataset` objects.
        shard ([`Shard`], *optional*): Part of this process; read from the environment.

    Returns:
        [`PhyAugResult`].

    Raises:
        ValueError: No sources, a source, model, judge or list that cannot be read, or a stage that no clip passed; or
            `output_dir` holds files of others, or another launch works there.
        ChatUnavailableError: A server cannot be reached. What was computed before stays.
        OSError: The disk is full, or a file of an earlier run is gone.
    """
    shard = shard or Shard.from_environment()
    every = [*config.sources, *sources]
    if not every:
        raise ValueError("Expected at least one source: a folder, a tar or a dataset (`--sources`).")
    if config.engine == "ray" and shard.count > 1:
        raise ValueError("With `engine='ray'` start one process: Ray brings the workers.")
    actions = read_actions(config.actions)
    check_models(config)
    root = Path(config.output_dir).absolute()
    with output_folder(root, "phyaug", (RUN_NAME, "groups", *_TABLES), shard):
        return _run_stages(config, every, root, shard, actions)


def _run_stages(
    config: PhyAugConfig, sources: Sequence[Any], root: Path, shard: Shard, actions: Actions
) -> PhyAugResult:
    run = Runner(config, root, shard)
    if shard.index == 0:
        begin(root, config)
    table = read_pool(config, sources, root, run)
    funnel = {"pool": len(table), "usable": require_rows(table, "reading the pool")}
    table = read_captions(table, config, run)
    if config.text_annotator is not None:
        reader = f"the captions (richness of {config.min_text_richness:g} and more)"
        funnel["physics-rich caption"] = require_rows(table, reader)
    table = annotate(table, config, run)
    funnel["physics-rich"] = require_rows(table, f"the filter (richness of {config.min_richness:g} and more)")
    table = cluster(table, config, actions, run)
    funnel["in a category"] = require_rows(table, "clustering")
    attempts = try_representatives(table, config, root, run)
    table, categories = sample(table, attempts, config)
    funnel["sampled"] = require_rows(table, "sampling")
    table, rejected = generate(table, config, root, run)
    funnel["groups"] = require_rows(table, "generation")
    assert len(table) == funnel["pool"] == len(kept_rows(table)) + sum(count_outcomes(table).values())
    difficulty = {category.name: category.difficulty or 0.0 for category in categories}
    groups = build_groups(table, rejected, root, difficulty=difficulty, config_hash=config.fingerprint)
    result = PhyAugResult(groups, table, rejected, categories, funnel, f"{summarize(table)}; {len(groups)} groups")
    if shard.index == 0:
        finish(result, attempts, config, root)
    return result


def check_models(config: PhyAugConfig) -> None:
    """
    Finds now what would stop a run hours later: models, judge or options that are not there. Reads no weights.

    Raises:
        ValueError: The first of them.
    """
    check_annotator(config.annotator, config.options("annotator_options"))
    if config.text_annotator is not None:
        check_annotator(config.text_annotator, config.options("text_annotator_options"))
    check_embedder(config.embedder)
    check_model(config.video_model(), config.num_frames, config.fps, [AspectBucket(config.height, config.width)])
    try:
        check_judge(config.judge, **config.options("judge_options"))
    except TypeError as error:
        raise ValueError(f"judge {config.judge!r}: {error}. Check `judge_options`.") from error


def begin(root: Path, config: PhyAugConfig) -> None:
    """Says that a run is under way, before anything else; what an earlier one finished must not look like its end."""
    _write_state(root, config, "running", {})
    for name in (f"groups/{GROUPS_NAME}", f"groups/{CARD_NAME}", *_TABLES):
        (root / name).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # it stays where it holds files of others
        (root / "groups").rmdir()


def finish(result: PhyAugResult, attempts: pa.Table, config: PhyAugConfig, root: Path) -> None:
    """Writes what people and trainers read; the stamp comes last."""
    write_table(result.manifest, root / "manifest.parquet")
    write_table(result.rejected, root / "rejected.parquet")
    write_table(attempts, root / "representatives.parquet")
    readers = {"annotator of captions": _only(result.manifest["text_annotator"])} if config.text_annotator else {}
    identities = {
        **readers,
        "annotator": _only(result.manifest["annotator"]),
        "embedder": _only(result.manifest["embedder"]),
        "generator": config.model,
        "judge": _only(result.rejected["judge"]),
    }
    provenance = {"config": config.fingerprint, "prompt template": prompt_hash(), **identities}
    fates = count_outcomes(result.manifest)
    write_funnel(root / "funnel.html", result.funnel, fates, result.categories, provenance)
    write_table(result.groups.with_format("arrow")[:], root / "groups" / GROUPS_NAME)
    write_dataset_card(
        root / "groups" / CARD_NAME,
        result.funnel,
        fates,
        result.categories,
        provenance,
        config.settings(),
        num_rejected=len(config.seeds),
        license=config.license,
        license_notes=config.license_notes,
    )
    _write_state(root, config, "finished", result.funnel)


def _write_state(root: Path, config: PhyAugConfig, state: str, funnel: dict[str, int]) -> None:
    record = {"state": state, "config": config.fingerprint, "funnel": funnel, "settings": config.settings()}
    write_atomically(root / RUN_NAME, json.dumps(record, indent=1, default=str))


def require_rows(table: pa.Table, stage: str) -> int:
    """
    Number of clips that no rule has dropped.

    Raises:
        ValueError: Every clip was dropped; the message says by which rules.
    """
    number = len(kept_rows(table))
    if not number:
        raise ValueError(
            f"No clip is left after {stage}: {summarize(table)}. `manifest.parquet` is not written; change the "
            "sources or the settings that the largest of these counts depends on."
        )
    return number


def read_pool(config: PhyAugConfig, sources: Sequence[Any], root: Path, run: Runner) -> pa.Table:
    """Stage 1: containers read; unreadable, repeated, too short and undescribed clips dropped."""
    table = list_clips(
        sources,
        spool=root / "sources",
        split=config.dataset_split,
        video_column=config.video_column,
        prompt_column=config.prompt_column,
    )
    table = run(
        table,
        Stage(
            "probe",
            read_containers,
            CONTAINER,
            "listing",
            {"version": CONTAINER_VERSION},
            8 * config.batch_size,
            trial=read_containers,
        ),
    )
    prompts = table["prompt"].to_pylist()
    table = with_columns(table, describe_prompts(table.select(["content", "prompt"]).to_pydict()), PROMPT_COLUMNS)
    unread = {name: [None] * len(table) for name in CAPTION_ANNOTATED}
    table = with_columns(table, unread, CAPTION_ANNOTATED)
    uncaptioned = [prompt is None for prompt in prompts]
    # Of two copies, the one with a caption stays.
    table = drop_repeats(table, "content", name="repeated", rank=uncaptioned)
    return apply_rules_to_table(drop_where(table, uncaptioned, "no_prompt"), config.pool_rules())


def describe_prompts(batch: Batch) -> Batch:
    """Columns `content` and `prompt` -> the columns `PROMPT_COLUMNS`; a caption without letters has no Latin ones."""
    added: Batch = {name: [] for name in PROMPT_COLUMNS}
    for content, prompt in zip(batch["content"], batch["prompt"], strict=True):
        letters = [letter for letter in prompt or "" if letter.isalpha()]
        # Latin with its extensions ends at U+024F.
        latin = sum(letter <= "\u024f" for letter in letters) / len(letters) if letters else 0.0
        added["clip"].append(None if content is None else digest(f"{content}\0{prompt}"))
        added["prompt_words"].append(len(re.findall(r"\S+", prompt or "")))
        added["latin_proportion"].append(latin)
    return added


def read_captions(table: pa.Table, config: PhyAugConfig, run: Runner) -> pa.Table:
    """Stage 2, first half: captions that promise no physics are dropped before a frame is decoded."""
    if config.text_annotator is None:
        return table
    options = config.options("text_annotator_options")
    stage = Stage(
        "captions",
        AnnotateBatch(partial(load_annotator, config.text_annotator, options), captions=True),
        CAPTION_ANNOTATED,
        "clip",
        {"annotator": config.text_annotator, "options": public(options), "prompts": prompt_hash()},
        8 * config.batch_size,
        again=NO_ANSWER,
    )
    rule = Rule("physics_poor_caption", "text_richness", config.min_text_richness)
    return apply_rules_to_table(run(table, stage, gpu=True), [rule])


def annotate(table: pa.Table, config: PhyAugConfig, run: Runner) -> pa.Table:
    """Stage 2: Algorithm 1, then the threshold."""
    options = config.options("annotator_options")
    drafts = {"drafts": [config.text_annotator, public(config.options("text_annotator_options"))]}
    stage = Stage(
        "annotate",
        AnnotateBatch(partial(load_annotator, config.annotator, options)),
        ANNOTATED,
        "clip",
        {"annotator": config.annotator, "options": public(options), "prompts": prompt_hash()}
        | (drafts if config.text_annotator else {}),
        config.batch_size,
        trial=decode_clips,  # the first stage that decodes whole clips; its model need not be loaded for that
        again=NO_ANSWER,
    )
    return apply_rules_to_table(
        run(table, stage, gpu=True), [Rule("physics_poor", "physics_richness", config.min_richness)]
    )


def cluster(table: pa.Table, config: PhyAugConfig, actions: Actions, run: Runner) -> pa.Table:
    """Stage 3: the nearest action of every caption."""
    stage = Stage(
        "cluster",
        ClusterBatch(partial(load_embedder, config.embedder), actions),
        CLUSTERED,
        "clip",
        {"embedder": config.embedder, "actions": actions, "version": CLUSTER_VERSION},
        8 * config.batch_size,
    )
    rules = [
        Rule("no_action", "similarity", minimum=config.min_similarity),
        Rule("ambiguous_action", "margin", minimum=config.min_margin),
    ]
    return apply_rules_to_table(run(table, stage, gpu=True), rules)


def try_representatives(table: pa.Table, config: PhyAugConfig, root: Path, run: Runner) -> pa.Table:
    """Stage 4: videos of the base model for the captions nearest to each action, with scores. One row per video."""
    clips = kept_rows(table)
    indices = representatives(clips["category"].to_pylist(), clips["similarity"].to_pylist(), config.representatives)
    rows = [row for rows in indices.values() for row in rows]
    attempts = make_videos(clips.take(rows), config, config.seeds[:1], root, run)
    categories = pa.chunked_array([pa.array([name for name, rows in indices.items() for _ in rows], pa.string())])
    return attempts.append_column("category", categories)


def make_videos(clips: pa.Table, config: PhyAugConfig, seeds: Sequence[int], root: Path, run: Runner) -> pa.Table:
    """The base model's videos of some clips, one for each seed, with their scores; in the order clips x seeds."""
    model = config.video_model()
    columns = clips.select(["source_id", "content", "prompt"]).to_pydict()
    columns |= {"reference_image": [None] * len(clips), "bucket": [f"{config.height}x{config.width}"] * len(clips)}
    jobs = job_table(columns, model, seeds, {"fps": config.fps, "num_frames": config.num_frames})
    jobs = run(jobs, generation_stage(model, root, fps=config.fps, num_frames=config.num_frames), gpu=True)
    options = config.options("judge_options")
    stage = Stage(
        "judge",
        JudgeBatch(partial(load_judge, config.judge, **options), root),
        JUDGED,
        "job",
        judge_settings(config.judge, options),
        config.batch_size,
    )
    return run(jobs, stage, gpu=True)


def sample(table: pa.Table, attempts: pa.Table, config: PhyAugConfig) -> tuple[pa.Table, list[Category]]:
    """Stage 5: scores of the categories, Eq. 1, and which clips it takes."""
    scored = kept_rows(attempts)
    means = [(sa + pc) / 2 for sa, pc in zip(scored["sa"].to_pylist(), scored["pc"].to_pylist(), strict=True)]
    scores = category_scores(scored["category"].to_pylist(), means)
    categories = table["category"].to_pylist()
    unknown = [name is not None and name not in scores for name in categories]
    table = drop_where(table, unknown, "no_score")  # none of the category's representatives could be judged
    available = Counter(kept_rows(table)["category"].to_pylist())
    if config.budget > available.total():
        logger.warning("The budget of %d is larger than what there is, %d clips.", config.budget, available.total())
    counts = {name: available[name] for name in sorted(available)}
    quotas = allocate(counts, scores, tau=config.tau, budget=config.budget, redistribute=config.redistribute)
    clips = kept_rows(table).select(["content", "category"]).to_pydict()
    members: dict[str, list[str]] = {}
    for content, name in zip(clips["content"], clips["category"], strict=True):
        members.setdefault(name, []).append(content)
    selection = {
        content for name, names in members.items() for content in draw(names, quotas[name], config.sample_seed)
    }
    table = drop_where(table, [content not in selection for content in table["content"].to_pylist()], "not_sampled")
    tries = Counter(attempts["category"].to_pylist())
    summary = [
        Category(name, count, tries[name], scores[name], 1 - scores[name], quotas[name])
        for name, count in counts.items()
    ]
    return table, summary


def generate(table: pa.Table, config: PhyAugConfig, root: Path, run: Runner) -> tuple[pa.Table, pa.Table]:
    """Stage 6: real clips brought to the format of the model's, and m rejected videos for each, with scores."""
    size = f"{config.height}x{config.width}"
    table = with_columns(table, {"bucket": [size] * len(table)}, {"bucket": pa.string()})
    folder = f"videos/{size}-{config.num_frames}-{config.fps:g}"
    function = partial(normalise_batch, root=root, folder=folder, fps=config.fps, num_frames=config.num_frames)
    settings = {"version": NORMALISE_VERSION, "bucket": size, "fps": config.fps, "num_frames": config.num_frames}
    stage = Stage("normalise", function, NORMALISED, "content", settings, config.batch_size, trial=function)
    table = run(table, stage)
    require_rows(table, "normalisation")
    rejected = make_videos(kept_rows(table), config, config.seeds, root, run)
    failed: dict[str, str] = {}
    for content, rule, name in zip(
        *(rejected[n].to_pylist() for n in ("content", "dropped_by", "source_id")), strict=True
    ):
        if rule is not None:
            failed.setdefault(content, f"{rule}: {name}")
    details = [failed.get(content) for content in table["content"].to_pylist()]
    return drop_where(table, [detail is not None for detail in details], "generation", details), rejected


def push_groups(
    output_dir: str | os.PathLike[str], repo_id: str, *, private: bool | None = None, token: str | None = None
) -> CommitInfo:
    """
    Uploads the dataset of a finished run, its card and its videos (inside the tables), to the Hub, and nothing else.

    Args:
        output_dir (`str` or `Path`): Of the run.
        repo_id (`str`): Repository, `"user/name"`; made where needed.
        private (`bool`, *optional*): Visibility of a new repository; the account's default.
        token (`str`, *optional*): Access token; the one logged in with.

    Returns:
        `huggingface_hub.CommitInfo`: The commit, with its URL.

    Raises:
        ValueError: The run is not finished, or as [`export_groups`]. Raised before anything is sent.
        HubUploadError: The Hub refused, or cannot be reached.
    """
    return push_dataset(export_groups(output_dir), repo_id, private=private, token=token)


def export_groups(output_dir: str | os.PathLike[str]) -> Path:
    """
    Writes the dataset of a finished run as [`~video_trl.hub.export_dataset`] does, with its own card, to the folder
    `export` of the run.

    Raises:
        ValueError: The run is not finished, a video is gone or cannot be read, or `export` holds anything else.
    """
    root = Path(output_dir)
    card = root / "groups" / CARD_NAME
    groups = load_groups(root)
    return export_dataset(
        groups, root / "export", name=root.name, media_folders=[root], card=card.read_text(encoding="utf-8")
    )


def _only(column: pa.ChunkedArray) -> str:
    """The values of a column that are there, without repetition."""
    return ", ".join(sorted({value for value in column.to_pylist() if value is not None}))
