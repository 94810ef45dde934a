"""
PhyAugPipe (PhyGDPO, https://huggingface.co/papers/2512.24551, Section 2.1): from a pool of captioned videos to groups.

A model that sees the clip keeps what is rich in physics, captions are sorted by action, the base model shows which
actions it finds hard, clips are sampled accordingly, and the base model's own videos become the losers.
"""

import json
import logging
import os
import re
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa

from ...files import write_atomically
from ...load import check_judge, load_judge
from ..clips.normalise import NORMALISE_VERSION, NORMALISED, normalise_batch
from ..clips.probe import PROBE_VERSION, PROBED, probe_batch
from ..clips.sources import list_clips
from ..engine.manifest import (
    Batch,
    Rule,
    Shard,
    Stage,
    account,
    alive,
    count_outcomes,
    digest,
    drop_repeats,
    drop_where,
    judge,
    run_stage,
    with_columns,
    write_table,
)
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
from .annotate import ANNOTATED, AnnotateBatch, check_annotator, load_annotator, prompt_hash
from .config import PhyAugConfig, public
from .groups import JUDGED, JUDGED_VERSION, RUN_NAME, JudgeBatch, build_groups, load_groups
from .report import write_card, write_funnel
from .sampling import allocate, category_scores, draw, representatives


__all__ = ["Category", "PhyAugConfig", "PhyAugResult", "allocate", "load_groups", "push_groups", "run_phyaug"]

logger = logging.getLogger(__name__)

#: Columns that are made of content and caption: their hash, which names what models say about them, and what the
#: pool's own rules read.
TOLD: dict[str, pa.DataType] = {"clip": pa.string(), "prompt_words": pa.int64(), "latin_share": pa.float64()}


@dataclass(frozen=True)
class Category:
    """
    One action category of a run.

    Attributes:
        name: the action.
        found: clips that came out of the filter and were assigned to it, H_f.
        representatives: how many of them the base model was tried on.
        score: mean of their judge scores, S_f in [0, 1]; None if there was nothing to judge.
        difficulty: 1 - score.
        taken: clips sampled, H_r.
    """

    name: str
    found: int
    representatives: int
    score: float | None
    difficulty: float | None
    taken: int


@dataclass(frozen=True)
class PhyAugResult:
    """
    What a run made.

    Attributes:
        groups (`datasets.Dataset`): Row type "group".
        manifest (`pyarrow.Table`): One row for every clip of the pool, with its fate.
        losers (`pyarrow.Table`): One row for every generated loser.
        categories (`list[Category]`): The histograms.
        funnel (`dict`): Clips left after each stage.
        summary (`str`): The line that accounts for every clip.
    """

    groups: datasets.Dataset
    manifest: pa.Table
    losers: pa.Table
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
    sources: Sequence[str | os.PathLike[str] | datasets.Dataset] = (),
    *,
    shard: Shard | None = None,
) -> PhyAugResult:
    """
    Runs all stages, or what is left of them: a run that was stopped, however, goes on where it was.

    `output_dir` must be on a disk that all processes or nodes see. It receives `manifest.parquet` (the fate of every
    clip), `losers.parquet`, `representatives.parquet`, `funnel.html`, and at last `groups/` with the dataset and its
    card. `run.json` says whether the run is finished; while it isn't, there is no `groups/`.

    Args:
        config ([`PhyAugConfig`]): Everything but objects.
        sources (`list`, *optional*): Further sources, also `datasets.Dataset` objects.
        shard ([`Shard`], *optional*): Part of this process; read from the environment.

    Returns:
        [`PhyAugResult`].

    Raises:
        ValueError: No sources, a source, model, judge or list that cannot be read, or a stage that no clip passed.
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
    run = Runner(config, root, shard)
    if shard.index == 0:
        begin(root, config)
    table = read_pool(config, every, root, run)
    funnel = {"pool": len(table), "usable": left(table, "reading the pool")}
    table = annotate(table, config, run)
    funnel["physics-rich"] = left(table, f"the filter (richness of {config.min_richness:g} and more)")
    table = cluster(table, config, actions, run)
    funnel["in a category"] = left(table, "clustering")
    tried = try_representatives(table, config, root, run)
    table, categories = sample(table, tried, config)
    funnel["sampled"] = left(table, "sampling")
    table, losers = generate(table, config, root, run)
    funnel["groups"] = left(table, "generation")
    assert len(table) == funnel["pool"] == len(alive(table)) + sum(count_outcomes(table).values())
    difficulty = {category.name: category.difficulty or 0.0 for category in categories}
    groups = build_groups(table, losers, root, difficulty=difficulty, config_hash=config.fingerprint)
    result = PhyAugResult(groups, table, losers, categories, funnel, f"{account(table)}; {len(groups)} groups")
    if shard.index == 0:
        finish(result, tried, config, root)
    logger.info(result.summary)
    return result


def check_models(config: PhyAugConfig) -> None:
    """
    Finds now what would stop a run hours later: models, judge or options that are not there. Reads no weights.

    Raises:
        ValueError: The first of them.
    """
    check_annotator(config.annotator, config.options("annotator_options"))
    check_embedder(config.embedder)
    check_model(config.video_model(), config.num_frames, config.fps)
    try:
        check_judge(config.judge, **config.options("judge_options"))
    except TypeError as error:
        raise ValueError(f"judge {config.judge!r}: {error}. Check `judge_options`.") from error


def begin(root: Path, config: PhyAugConfig) -> None:
    """Says that a run is under way, before anything else; what an earlier one finished must not look like its end."""
    _write_state(root, config, "running", {})
    shutil.rmtree(root / "groups", ignore_errors=True)
    for name in ("manifest.parquet", "losers.parquet", "representatives.parquet", "funnel.html"):
        (root / name).unlink(missing_ok=True)


def finish(result: PhyAugResult, tried: pa.Table, config: PhyAugConfig, root: Path) -> None:
    """Writes what people and trainers read; the stamp comes last."""
    write_table(result.manifest, root / "manifest.parquet")
    write_table(result.losers, root / "losers.parquet")
    write_table(tried, root / "representatives.parquet")
    identities = {
        "annotator": _only(result.manifest["annotator"]),
        "embedder": _only(result.manifest["embedder"]),
        "generator": config.model,
        "judge": _only(result.losers["judge"]),
    }
    told = {"config": config.fingerprint, "prompt template": prompt_hash(), **identities}
    fates = count_outcomes(result.manifest)
    write_funnel(root / "funnel.html", result.funnel, fates, result.categories, told)
    write_table(result.groups.with_format("arrow")[:], root / "groups" / "train-00000-of-00001.parquet")
    write_card(
        root / "groups" / "README.md",
        result.funnel,
        fates,
        result.categories,
        told,
        config.settings(),
        num_rejected=len(config.seeds),
        license=config.license,
        license_notes=config.license_notes,
    )
    _write_state(root, config, "finished", result.funnel)


def _write_state(root: Path, config: PhyAugConfig, state: str, funnel: dict[str, int]) -> None:
    record = {"state": state, "config": config.fingerprint, "funnel": funnel, "settings": config.settings()}
    write_atomically(root / RUN_NAME, json.dumps(record, indent=1, default=str))


def left(table: pa.Table, stage: str) -> int:
    """
    Number of clips that are still there.

    Raises:
        ValueError: None is: the message tells what became of them.
    """
    number = len(alive(table))
    if not number:
        raise ValueError(
            f"No clip is left after {stage}: {account(table)}. `manifest.parquet` is not written; look at the sources "
            "and settings that the largest of these counts depends on."
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
        table, Stage("probe", probe_batch, PROBED, "listing", {"version": PROBE_VERSION}, 8 * config.batch_size)
    )
    prompts = table["prompt"].to_pylist()
    table = with_columns(table, describe_prompts(table.select(["content", "prompt"]).to_pydict()), TOLD)
    untold = [prompt is None for prompt in prompts]
    table = drop_repeats(table, "content", name="repeated", rank=untold)  # of two copies, the one with a caption stays
    return judge(drop_where(table, untold, "no_prompt"), config.pool_rules())


def describe_prompts(batch: Batch) -> Batch:
    """Columns `content` and `prompt` -> the columns `TOLD`; a caption without letters has no Latin ones."""
    added: Batch = {name: [] for name in TOLD}
    for content, prompt in zip(batch["content"], batch["prompt"], strict=True):
        letters = [letter for letter in prompt or "" if letter.isalpha()]
        # Latin with its extensions ends at U+024F.
        latin = sum(letter <= "\u024f" for letter in letters) / len(letters) if letters else 0.0
        added["clip"].append(None if content is None else digest(f"{content}\0{prompt}"))
        added["prompt_words"].append(len(re.findall(r"\S+", prompt or "")))
        added["latin_share"].append(latin)
    return added


def annotate(table: pa.Table, config: PhyAugConfig, run: Runner) -> pa.Table:
    """Stage 2: Algorithm 1, then the threshold."""
    options = config.options("annotator_options")
    stage = Stage(
        "annotate",
        AnnotateBatch(partial(load_annotator, config.annotator, options)),
        ANNOTATED,
        "clip",
        {"annotator": config.annotator, "options": public(options), "prompts": prompt_hash()},
        config.batch_size,
    )
    return judge(run(table, stage, gpu=True), [Rule("physics_poor", "physics_richness", config.min_richness)])


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
    return judge(run(table, stage, gpu=True), rules)


def try_representatives(table: pa.Table, config: PhyAugConfig, root: Path, run: Runner) -> pa.Table:
    """Stage 4: what the base model makes of the captions nearest to each action, judged. One row a video."""
    kept = alive(table)
    chosen = representatives(kept["category"].to_pylist(), kept["similarity"].to_pylist(), config.representatives)
    rows = [row for rows in chosen.values() for row in rows]
    tried = make_videos(kept.take(rows), config, config.seeds[:1], root, run)
    categories = pa.chunked_array([pa.array([name for name, rows in chosen.items() for _ in rows], pa.string())])
    return tried.append_column("category", categories)


def make_videos(clips: pa.Table, config: PhyAugConfig, seeds: Sequence[int], root: Path, run: Runner) -> pa.Table:
    """The base model's videos of some clips, one for each seed, with their scores; in the order clips x seeds."""
    model = config.video_model()
    told = clips.select(["source_id", "content", "prompt"]).to_pydict()
    told |= {"reference_image": [None] * len(clips), "bucket": [f"{config.height}x{config.width}"] * len(clips)}
    jobs = job_table(told, model, seeds, {"fps": config.fps, "num_frames": config.num_frames})
    jobs = run(jobs, generation_stage(model, root, fps=config.fps, num_frames=config.num_frames), gpu=True)
    options = config.options("judge_options")
    stage = Stage(
        "judge",
        JudgeBatch(partial(load_judge, config.judge, **options), root),
        JUDGED,
        "job",
        {"judge": config.judge, "options": public(options), "version": JUDGED_VERSION},
        config.batch_size,
    )
    return run(jobs, stage, gpu=True)


def sample(table: pa.Table, tried: pa.Table, config: PhyAugConfig) -> tuple[pa.Table, list[Category]]:
    """Stage 5: scores of the categories, Eq. 1, and which clips it takes."""
    judged = alive(tried)
    means = [(sa + pc) / 2 for sa, pc in zip(judged["sa"].to_pylist(), judged["pc"].to_pylist(), strict=True)]
    scores = category_scores(judged["category"].to_pylist(), means)
    categories = table["category"].to_pylist()
    unknown = [name is not None and name not in scores for name in categories]
    table = drop_where(table, unknown, "no_score")  # none of the category's representatives could be judged
    found = Counter(alive(table)["category"].to_pylist())
    if config.budget > found.total():
        logger.warning("The budget of %d is larger than what there is, %d clips.", config.budget, found.total())
    counts = {name: found[name] for name in sorted(found)}
    taken = allocate(counts, scores, tau=config.tau, budget=config.budget, redistribute=config.redistribute)
    kept = alive(table).select(["content", "category"]).to_pydict()
    members: dict[str, list[str]] = {}
    for content, name in zip(kept["content"], kept["category"], strict=True):
        members.setdefault(name, []).append(content)
    drawn = {content for name, names in members.items() for content in draw(names, taken[name], config.sample_seed)}
    table = drop_where(table, [content not in drawn for content in table["content"].to_pylist()], "not_sampled")
    tries = Counter(tried["category"].to_pylist())
    summary = [
        Category(name, count, tries[name], scores[name], 1 - scores[name], taken[name])
        for name, count in counts.items()
    ]
    return table, summary


def generate(table: pa.Table, config: PhyAugConfig, root: Path, run: Runner) -> tuple[pa.Table, pa.Table]:
    """Stage 6: real clips brought to the format of the model's, and m judged losers for each."""
    size = f"{config.height}x{config.width}"
    table = with_columns(table, {"bucket": [size] * len(table)}, {"bucket": pa.string()})
    folder = f"videos/{size}-{config.num_frames}-{config.fps:g}"
    function = partial(normalise_batch, root=root, folder=folder, fps=config.fps, num_frames=config.num_frames)
    settings = {"version": NORMALISE_VERSION, "bucket": size, "fps": config.fps, "num_frames": config.num_frames}
    table = run(table, Stage("normalise", function, NORMALISED, "content", settings, config.batch_size))
    left(table, "normalisation")
    losers = make_videos(alive(table), config, config.seeds, root, run)
    failed: dict[str, str] = {}
    for content, rule, name in zip(
        *(losers[n].to_pylist() for n in ("content", "dropped_by", "source_id")), strict=True
    ):
        if rule is not None:
            failed.setdefault(content, f"{rule}: {name}")
    details = [failed.get(content) for content in table["content"].to_pylist()]
    return drop_where(table, [detail is not None for detail in details], "generation", details), losers


def push_groups(
    output_dir: str | os.PathLike[str], repo_id: str, *, private: bool | None = None, token: str | None = None
) -> Any:
    """
    Uploads the dataset of a finished run, its card and its videos (inside the tables), to the Hub.

    Args:
        output_dir (`str` or `Path`): Of the run.
        repo_id (`str`): Repository, `"user/name"`; made where needed.
        private (`bool`, *optional*): Visibility of a new repository; the account's default.
        token (`str`, *optional*): Access token; the one logged in with.

    Returns:
        `huggingface_hub.CommitInfo`: The commit, with its URL.

    Raises:
        ValueError: The run is not finished. Raised before anything is sent.
    """
    from huggingface_hub import HfApi

    folder = export_groups(output_dir)
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True).repo_id
    return api.upload_folder(
        repo_id=repo_id, repo_type="dataset", folder_path=folder, commit_message="Upload groups of PhyAugPipe"
    )


def export_groups(output_dir: str | os.PathLike[str], rows_per_file: int = 256) -> Path:
    """
    Writes the dataset of a finished run as a folder that can go anywhere: `README.md` and `data/*.parquet` with the
    bytes of the videos in them.

    Raises:
        ValueError: The run is not finished.
    """
    groups = load_groups(output_dir)
    folder = Path(output_dir) / "export"
    shutil.rmtree(folder, ignore_errors=True)
    files = -(-len(groups) // rows_per_file)
    for number in range(files):
        part = groups.select(range(number * rows_per_file, min((number + 1) * rows_per_file, len(groups))))
        table = datasets.table.embed_table_storage(part.with_format("arrow")[:])
        write_table(table, folder / "data" / f"train-{number:05d}-of-{files:05d}.parquet")
    shutil.copy(Path(output_dir) / "groups" / "README.md", folder / "README.md")
    return folder


def _only(column: pa.ChunkedArray) -> str:
    """The values of a column that are there, without repetition."""
    return ", ".join(sorted({value for value in column.to_pylist() if value is not None}))
