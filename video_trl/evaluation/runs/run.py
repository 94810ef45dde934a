"""
An evaluation run: a folder with the videos of one model for some prompts and seeds, and how they were generated.

    RUN/run.json                  what was generated: model, revision, adapter, prompts, seeds, call, versions
    RUN/videos/00003-1.mp4        prompt 3 with seed 1
    RUN/scores/JUDGE/00003-1.json what a judge said about it

A file stands under its name only when it is whole, so its presence says that the work is done: any number of processes
may work on one run, each may be killed at any moment, and a restart does the rest.
"""

import contextlib
import fcntl
import json
import logging
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from ...data.video_io import VideoDecodeError, probe_video, video_hash
from ...files import fingerprint, read_json, remove_folder, remove_leftovers, write_atomically
from .prompts import EvaluationPrompt, check_prompts, prompts_hash


logger = logging.getLogger(__name__)

RUN_FILE = "run.json"
VIDEO_FOLDER = "videos"
SCORE_FOLDER = "scores"
_OWN_NAMES = (RUN_FILE, VIDEO_FOLDER, SCORE_FOLDER)
_FORMAT = 1
_PACKAGES = ("video-trl", "torch", "diffusers", "transformers", "peft")


@dataclass(frozen=True)
class Case:
    """One video of a run: a prompt with a seed. `key` names its files."""

    prompt_index: int
    prompt: EvaluationPrompt
    seed: int

    @property
    def key(self) -> str:
        return f"{self.prompt_index:05d}-{self.seed}"

    @property
    def noise_seed(self) -> int:
        """Seed of the starting noise: another one for every prompt, the same for every model."""
        return int(np.random.default_rng([self.seed, *self.prompt.text.encode()]).integers(2**31))


@dataclass(frozen=True)
class EvaluationRun:
    """
    A run directory, opened by [`load_run`] or made by [`generate_run`].

    Attributes:
        folder (`Path`): The directory.
        name (`str`): Method or model, as tables show it.
        training_seed (`int` or `None`): Seed of the run that trained the adapter; none for a base model.
        benchmark (`str`): Rule that its scores are counted by, a key of `video_trl.evaluation.runs.tables.BENCHMARKS`.
        generation (`dict`): What determines the videos: weights, adapter, call, frame rate, seeds, prompts.
        provenance (`dict`): Where model and adapter came from.
        versions (`dict`): Packages that generated them.
        prompts (`tuple[EvaluationPrompt, ...]`), seeds (`tuple[int, ...]`): The videos are their product.
    """

    folder: Path
    name: str
    training_seed: int | None
    benchmark: str
    generation: Mapping[str, Any]
    provenance: Mapping[str, Any]
    versions: Mapping[str, str]
    prompts: tuple[EvaluationPrompt, ...]
    seeds: tuple[int, ...]

    @cached_property
    def cases(self) -> tuple[Case, ...]:
        """All videos in the order prompts x seeds."""
        return tuple(Case(index, prompt, seed) for index, prompt in enumerate(self.prompts) for seed in self.seeds)

    @property
    def identity(self) -> str:
        """Hash of what determines the videos: equal for two runs that must have the same ones."""
        return fingerprint(self.generation)

    def video(self, case: Case) -> Path:
        return self.folder / VIDEO_FOLDER / f"{case.key}.mp4"

    def missing(self) -> list[Case]:
        """Cases without a video, in order."""
        return [case for case in self.cases if not self.video(case).is_file()]

    def check_videos(self, cases: Sequence[Case] | None = None) -> None:
        """
        Opens every video (of `cases`, or all).

        Raises:
            ValueError: If videos are missing or cannot be opened; all of them are counted, the first one is named.
        """
        cases = self.cases if cases is None else cases
        self.require_videos(cases)
        faults = []
        for case in cases:
            try:
                probe_video(self.video(case))
            except VideoDecodeError as error:
                faults.append(str(error))
        if faults:
            raise ValueError(
                f"{self.folder}: {len(faults)} of {len(cases)} videos cannot be read. Delete them and start the "
                f"evaluation again with the same arguments. The first: {faults[0]}"
            )

    def require_videos(self, cases: Sequence[Case]) -> None:
        """
        Raises:
            ValueError: If videos are missing; all of them are counted, the first one is named.
        """
        missing = [case for case in cases if not self.video(case).is_file()]
        if missing:
            raise ValueError(
                f"{self.folder}: {len(missing)} of {len(cases)} videos are missing, the first being "
                f"{self.video(missing[0]).name} for {missing[0].prompt.text!r} with seed {missing[0].seed}. Start the "
                "evaluation again with the same arguments: it generates what is missing."
            )

    def video_hashes(self) -> dict[str, str]:
        """Content hash of each video by its key; together they say which bytes a score or vote is about."""
        return {case.key: video_hash(self.video(case)) for case in self.cases}


def load_run(folder: str | os.PathLike[str]) -> EvaluationRun:
    """
    Opens a run directory.

    Raises:
        ValueError: If it is no run directory, is of another format, or its description was changed by hand.
    """
    folder = Path(folder)
    if not (folder / RUN_FILE).is_file():
        raise ValueError(
            f"Expected an evaluation run in {folder}, found no {RUN_FILE}. Pass a directory that `evaluate_model` or "
            "`generate_run` wrote."
        )
    content = read_json(folder / RUN_FILE)
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise ValueError(
            f"{folder / RUN_FILE} is not in format {_FORMAT}, the one this version reads. Use the version of "
            "video_trl that wrote it."
        )
    prompts = check_prompts([EvaluationPrompt.from_dict(values) for values in content["prompts"]])
    generation = content["generation"]
    if generation["prompts_hash"] != prompts_hash(prompts):
        raise ValueError(
            f"{folder / RUN_FILE}: the prompts are not those of the recorded hash; the file was edited after the run. "
            "Restore it, or generate again in a new directory."
        )
    return EvaluationRun(
        folder=folder,
        name=content["name"],
        training_seed=content["training_seed"],
        benchmark=content["benchmark"],
        generation=generation,
        provenance=content["provenance"],
        versions=content["versions"],
        prompts=prompts,
        seeds=tuple(generation["seeds"]),
    )


def create_run(
    folder: str | os.PathLike[str],
    *,
    name: str,
    prompts: Sequence[EvaluationPrompt | str],
    seeds: Sequence[int],
    source: Mapping[str, Any],
    provenance: Mapping[str, Any] | None = None,
    training_seed: int | None = None,
    benchmark: str = "custom",
) -> EvaluationRun:
    """
    Writes the description of a run, or opens the directory when it describes the same one. Of several processes that
    start together one writes and the others compare.

    Args:
        folder (path): Directory; made where needed.
        name (`str`): Method or model, as tables show it.
        prompts (list of [`EvaluationPrompt`] or `str`), seeds (list of `int`): Distinct; seeds are at least 0.
        source (`dict`): The rest of what determines the videos (weights, adapter, call, frame rate), for JSON.
        provenance (`dict`, *optional*): Where these came from: names and paths, which may change between two starts.
        training_seed (`int`, *optional*): Seed of the run that trained the adapter.
        benchmark (`str`, *optional*, defaults to `"custom"`): Rule that scores are counted by.

    Returns:
        [`EvaluationRun`]

    Raises:
        ValueError: If prompts or seeds repeat, a value has no JSON form, or the directory holds another run or other
            files.
    """
    folder, prompts = Path(folder), check_prompts(prompts)
    seeds = [int(seed) for seed in seeds]
    if not seeds or len(set(seeds)) != len(seeds) or min(seeds) < 0:
        raise ValueError(f"Seeds must be distinct, at least 0, and there must be one; got {seeds}.")
    if not name.strip():
        raise ValueError("A run needs a name: it is what tables and reports call the model.")
    generation = {**source, "seeds": seeds, "prompts_hash": prompts_hash(prompts)}
    content = {
        "format": _FORMAT,
        "name": name,
        "training_seed": training_seed,
        "benchmark": benchmark,
        "generation": generation,
        "provenance": dict(provenance or {}),
        "versions": package_versions(),
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "prompts": [prompt.to_dict() for prompt in prompts],
    }
    try:
        text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"The description of a run is written as JSON, and a value has no such form: {error}."
        ) from error
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    # The description is written first: videos or scores without it are those of somebody else.
    strange = [path.name for path in folder.iterdir() if path.name != RUN_FILE and not path.name.startswith(".")]
    if strange and not (folder / RUN_FILE).exists():
        raise ValueError(f"{folder} holds files that are no evaluation run ({strange[0]}). Pass a new directory.")
    with contextlib.suppress(FileExistsError):
        write_atomically(folder / RUN_FILE, text, replace=False)
    run = load_run(folder)
    _check_same(run, json.loads(text))
    (folder / VIDEO_FOLDER).mkdir(exist_ok=True)
    return run


def make_room(folder: str | os.PathLike[str]) -> None:
    """
    Deletes the run in a directory, where there is one, for another in its place. If there is anything else in the
    directory, or the description is not of a run, it stays under another name.
    """
    folder = Path(folder)
    if not (folder / RUN_FILE).is_file():
        return
    others = [path.name for path in folder.iterdir() if path.name not in _OWN_NAMES and not path.name.startswith(".")]
    with contextlib.suppress(ValueError):
        load_run(folder)
        if not others:
            remove_folder(folder)
            return
    kept = folder.rename(folder.with_name(f"{folder.name}.kept-{secrets.token_hex(4)}"))
    logger.warning("%s holds more than a run; it is %s now.", folder, kept)


def _check_same(run: EvaluationRun, record: Mapping[str, Any]) -> None:
    """Refuses to go on with another run's videos, or to mix videos of different versions."""
    present = {"name": run.name, "training_seed": run.training_seed, "benchmark": run.benchmark, **run.generation}
    requested = {key: record[key] for key in ("name", "training_seed", "benchmark")} | record["generation"]
    changed = [key for key in sorted(present | requested) if present.get(key) != requested.get(key)]
    if changed:
        key = changed[0]
        raise ValueError(
            f"{run.folder} holds another run, which differs in {', '.join(changed)} ({key}: has "
            f"{present.get(key)!r}, asked for {requested.get(key)!r}). Pass a new directory, or its arguments to "
            "resume it."
        )
    versions = {
        name: f"{run.versions.get(name)} then, {version} now"
        for name, version in record["versions"].items()
        if run.versions.get(name) != version
    }
    if versions and run.missing():
        raise ValueError(
            f"{run.folder} was begun with other versions ({versions}), and its videos would come from both. "
            "Finish it in the first one, or start in a new directory."
        )


def shard() -> tuple[int, int]:
    """(rank, number of processes) as `torchrun` and `accelerate launch` announce them; (0, 1) without them."""
    return int(os.environ.get("RANK") or 0), int(os.environ.get("WORLD_SIZE") or 1)


def cases_of(run: EvaluationRun, rank: int, num_ranks: int) -> list[tuple[int, Case]]:
    """Cases of one process, every `num_ranks`-th from `rank` on, with their position among all cases."""
    if not 0 <= rank < num_ranks:
        raise ValueError(f"Expected 0 <= rank < num_ranks, got rank {rank} of {num_ranks}.")
    return list(enumerate(run.cases))[rank::num_ranks]


@contextlib.contextmanager
def claimed(lock: Path, positions: Sequence[int]) -> Iterator[None]:
    """
    Claims cases for this process: one locked byte of a file for each. The kernel drops the locks when the process
    ends, however it ends, so nothing has to be cleaned up after a kill.

    Raises:
        ValueError: If another process holds one of them.
    """
    with open(lock, "ab") as file:
        for position in positions:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, position)
            except (BlockingIOError, PermissionError) as error:
                raise ValueError(
                    f"Another process is working in {lock.parent}. Let it finish, or end it and start again."
                ) from error
        yield


def package_versions() -> dict[str, str]:
    """Versions of the packages that shape a video."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # run from a checkout
            versions[name] = "not installed as a package"
    return versions
