"""Write the model card of a run: model, dataset, method, settings, cost and results."""

import csv
import dataclasses
import json
import logging
import os
import platform
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import datasets
import torch
from diffusers import ModelMixin
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ... import hub
from ...data import read_video, write_video
from ...data.columns import MapDataset, as_videos, column_names, undecoded
from ...files import write_atomically, write_json
from ...models import Expert
from ..base_config import VideoConfig
from .sampling import Sampler
from .uploader import Uploader


logger = logging.getLogger(__name__)

RESOURCES_NAME = "video_trl_resources.json"
_GENERAL_SETTINGS = (
    "learning_rate",
    "lr_scheduler_type",
    "weight_decay",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "bf16",
    "seed",
)
# Paths, hosts and accounts: of no use to a reader, or private.
_PRIVATE = re.compile(
    r"output_dir|.*_dir|hub_.*|push_to_hub|report_to|run_name|project|trackio_.*|log.*|disable_tqdm|save_.*|eval_on_.*|"
    r"model_init_kwargs|resume_from_checkpoint|use_cpu|dataloader_.*|ddp_.*|local_rank|.*_token|remove_unused_columns"
)
_FILES = ("init_adapter", "transformer_file")  # or a repository, which a reader wants to know
_SAMPLE_ROWS, _LOG_ROWS, _LOG_COLUMNS = 3, 10, 7
_VIDEO_COLUMNS = ("video", "chosen", "rejected")
_NOT_LOGGED = re.compile(r"step|epoch|total_flos|train_.*|.*_runtime|.*_per_second|learning_rate|grad_norm")


class TrainingData:
    """
    What the card says about a dataset, looked at before it is encoded.

    Args:
        dataset (`MapDataset`): The rows, raw or encoded.
    """

    def __init__(self, dataset: MapDataset) -> None:
        self.name, self.revision = _origin(dataset)
        self.counts = {"rows": len(dataset)}
        columns, rows = column_names(dataset), undecoded(dataset)
        first = [rows[number] for number in range(min(_SAMPLE_ROWS, len(dataset)))]
        if "rejected" in columns:
            self.counts["rejected videos in the first row"] = len(as_videos(first[0]["rejected"]))
        self._samples = [
            (
                str(row.get("prompt") or ""),
                {name: (row[name], as_videos(row[name])) for name in _VIDEO_COLUMNS if name in columns},
            )
            for row in first
        ]
        self.prompt = self._samples[0][0]

    def facts(self, output_dir: Path, fps: float, name: str | None) -> hub.DatasetFacts:
        """The same for the card; the sample videos are written where they are not there yet."""
        samples = []
        for number, (prompt, cells) in enumerate(self._samples):
            videos = {}
            for label, video in _labelled(cells).items():
                path = output_dir / "samples" / "data" / f"row_{number}_{label.replace(' ', '_')}.mp4"
                try:
                    _write_sample(video, path, fps)
                except (OSError, ValueError) as error:  # a row that training has skipped, or a file that is gone
                    logger.warning("The model card goes without the %s video of row %d: %s", label, number, error)
                    continue
                videos[label] = str(path.relative_to(output_dir))
            samples.append({"prompt": prompt, "videos": videos})
        return hub.DatasetFacts(name or self.name, self.revision, self.counts, samples)


@dataclass(frozen=True)
class RunFacts:
    """
    What is known of a run before its first step.

    Attributes:
        tag (`str`), method (`str`), citation (`str`, *optional*): Of the trainer's class.
        base_model (`str`): Where the base weights are from.
        pipeline_class (`str`): What loads the trained weights.
        transformer_class (`str`, *optional*): Class of the transformer where all of its weights are trained.
        data ([`TrainingData`]): What is trained on.
        expert ([`~video_trl.models.Expert`], *optional*): Which of the pipeline's several transformers is trained.
    """

    tag: str
    method: str
    citation: str | None
    base_model: str
    pipeline_class: str
    transformer_class: str | None
    data: TrainingData
    expert: Expert | None = None


class ModelCardCallback(TrainerCallback):
    """
    Measures what a run takes, and writes the model card: at every save, and at the end.

    Args:
        args (`VideoConfig`): Of the trainer.
        facts ([`RunFacts`]): Of the run.
        sampler ([`Sampler`]): Knows how the model is called, and which samples were made.
        uploader ([`Uploader`]): Knows the repository.
    """

    def __init__(self, args: VideoConfig, facts: RunFacts, sampler: Sampler, uploader: Uploader) -> None:
        self._args, self._facts, self._sampler, self._uploader = args, facts, sampler, uploader
        self._seconds = 0.0
        self._since: float | None = None
        self._license: dict[str, str] | None = None
        self._details: dict[str, Any] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step < state.max_steps:  # a finished run, resumed, spends nothing more
            self._since = time.monotonic()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._seconds, self._since = self.seconds(), None
        if args.should_save and (Path(args.output_dir) / hub.CARD_NAME).exists():
            self.write(Path(args.output_dir), state)

    def seconds(self) -> float:
        """Time spent in training, that before an interruption included."""
        return self._seconds + (0.0 if self._since is None else time.monotonic() - self._since)

    def restore(self, checkpoint: Path) -> None:
        """Go on from what a checkpoint, or the folder of the run, says was spent."""
        for path in (checkpoint / RESOURCES_NAME, Path(self._args.output_dir) / RESOURCES_NAME):
            if path.is_file():
                self._seconds = max(self._seconds, float(json.loads(path.read_text())["seconds"]))

    def write(self, directory: Path, state: TrainerState, **details: Any) -> None:
        """
        Write the card, and what was spent so far, into the folder of the run or of a checkpoint. A `README.md` there
        that is not a card of this package stays as it is.

        Args:
            directory (`Path`): Folder.
            state (`TrainerState`): Of the trainer.
            **details: `dataset_name`, `license`, `evaluation` and `model_name`, as of `create_model_card`; they hold
                for later cards as well.
        """
        self._details |= {name: value for name, value in details.items() if value is not None}
        write_json(directory / RESOURCES_NAME, {"seconds": self.seconds()})
        path = directory / hub.CARD_NAME
        if path.is_file() and not hub.card.is_model_card(path.read_text(encoding="utf-8", errors="replace")):
            logger.warning("%s is not a card of video_trl and stays. Move it for the run's card to be written.", path)
            return
        write_atomically(path, self._card(state))  # an upload may be reading the old one

    def _card(self, state: TrainerState) -> str:
        args, facts, details = self._args, self._facts, self._details
        output_dir = Path(args.output_dir)
        options = args.model_init_kwargs if isinstance(args.model_init_kwargs, dict) else {}
        revision = options.get("revision")
        named = self._uploader.repository or args.hub_model_id or details.get("model_name")
        return hub.model_card(
            repo_id=named or args.output_dir,
            base_model=facts.base_model,
            revision=revision,
            method=facts.tag,
            method_name=facts.method,
            citation=facts.citation,
            prompt=facts.data.prompt or "A red ball falls to the floor.",
            fps=self._sampler.fps,
            pipeline_class=facts.pipeline_class,
            transformer_class=facts.transformer_class,
            averaged=args.ema_decay > 0,
            expert=None if facts.expert is None else (facts.expert.name, facts.expert.component),
            call_kwargs=self._sampler.call_kwargs,
            loss_parameters=loss_parameters(args),
            hyperparameters=hyperparameters(args)
            | {"optimizer steps": state.global_step, "processes": args.world_size},
            log=log_table(state.log_history),
            evaluation=details.get("evaluation") or measurements(state),
            videos=_sample_videos(self._sampler.prompts, output_dir, state.global_step),
            dataset=facts.data.facts(output_dir, self._sampler.fps, details.get("dataset_name")),
            resources_used=self._resources(),
            license=details.get("license") or self._inherited_license(revision),
        )

    def _inherited_license(self, revision: str | None) -> dict[str, str]:
        if self._license is None:
            base_model, args = self._facts.base_model, self._args
            self._license = hub.inherited_license(base_model, revision, ask_hub=args.push_to_hub, token=args.hub_token)
        return self._license

    def _resources(self) -> dict[str, Any]:
        resources: dict[str, Any] = {"hardware": hardware(self._args), "hours": round(self.seconds() / 3600, 4)}
        energy = measured_energy(Path(self._args.output_dir))
        if energy is not None:
            resources["energy in kWh (CodeCarbon)"] = energy
        return resources


def measured_energy(output_dir: Path) -> float | None:
    """
    Energy in kWh that CodeCarbon has written down in the folder of a run, `None` if it has not.

    `report_to="codecarbon"` leaves a row in `emissions.csv` whenever the run ends: also before it is resumed.
    """
    path = output_dir / "emissions.csv"
    if not path.is_file():
        return None
    with path.open(newline="") as file:
        energy = {row["run_id"]: float(row["energy_consumed"]) for row in csv.DictReader(file)}
    return sum(energy.values())  # of one `run_id`, the last row counts: a flushed tracker writes the sum again


def loss_parameters(args: VideoConfig) -> dict[str, Any]:
    """The settings of the method itself: fields that its configuration adds to those of every trainer."""
    general = {field.name for field in dataclasses.fields(VideoConfig)}
    return {
        field.name: _shown(args.__dict__[field.name])
        for field in dataclasses.fields(args)
        if field.name not in general and args.__dict__[field.name] is not None
    }


def hyperparameters(args: VideoConfig) -> dict[str, Any]:
    """Settings that matter in every run, and the others where they differ from their defaults."""
    own = loss_parameters(args)
    settings = {name: _shown(args.__dict__[name]) for name in _GENERAL_SETTINGS}
    for field in dataclasses.fields(args):
        value = _shown(args.__dict__.get(field.name))
        default = field.default if field.default is not dataclasses.MISSING else None
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if field.name in _FILES and value is not None and Path(value).is_absolute():
            value = Path(value).name  # where it lies here is nobody's business
        known = field.name in settings or field.name in own or _PRIVATE.fullmatch(field.name) is not None
        # What is unset by default has been filled in by now, with a value for this machine.
        if not known and field.init and isinstance(value, str | int | float | list) and value != _shown(default):
            if default is not None or field.name in VideoConfig.__annotations__:
                settings[field.name] = value
    return {name: value for name, value in settings.items() if value is not None}


def log_table(history: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A few rows of the log, from the first step to the last, with the metrics that come first."""
    steps: dict[int, dict[str, Any]] = {}
    for entry in history:
        if "train_runtime" not in entry:
            steps.setdefault(entry["step"], {}).update(entry)
    logged = {name for entry in steps.values() for name in entry if not _NOT_LOGGED.fullmatch(name)}
    names = sorted(logged, key=lambda name: (not name.endswith("loss"), name))  # the log of a checkpoint is sorted
    training = [name for name in names if not name.startswith("eval_")]
    evaluated = [name for name in names if name.startswith("eval_")]
    columns = training[: _LOG_COLUMNS - min(len(evaluated), 3)] + evaluated[:3]
    rows = list(steps)
    if len(rows) > _LOG_ROWS:
        rows = [rows[round(k * (len(rows) - 1) / (_LOG_ROWS - 1))] for k in range(_LOG_ROWS)]
    return [{"step": step} | {name: steps[step].get(name, "") for name in columns} for step in rows]


def measurements(state: TrainerState) -> list[hub.Measurement]:
    """The metrics of the last evaluation, or of the best where one was chosen; `x_low` and `x_high` bound `x`."""
    entries = [entry for entry in state.log_history if any(name.startswith("eval_") for name in entry)]
    if state.best_global_step:
        entries = [entry for entry in entries if entry["step"] == state.best_global_step] or entries
    if not entries:
        return []
    last: dict[str, float] = {}
    for entry in entries:
        if entry["step"] == entries[-1]["step"]:
            last |= {name.removeprefix("eval_"): value for name, value in entry.items() if name.startswith("eval_")}
    metrics = {name: value for name, value in last.items() if not _NOT_LOGGED.fullmatch(name) and name != "runtime"}
    bounds = {f"{name}_{end}" for name in metrics for end in ("low", "high")}
    return [
        hub.Measurement(
            name,
            value,
            metrics.get(f"{name}_low"),
            metrics.get(f"{name}_high"),
            dataset=f"evaluation at step {entries[-1]['step']}",
        )
        for name, value in metrics.items()
        if name not in bounds and isinstance(value, int | float)
    ]


def base_model_name(model: Any, transformer: ModelMixin) -> str:
    """Repository or path that the user named, or that the pipeline or transformer remembers, or its class."""
    if isinstance(model, str | os.PathLike):
        return os.fspath(model)
    name = model.config.get("_name_or_path") or transformer.config.get("_name_or_path") or type(model).__name__
    return str(name)  # a pipeline loaded from a `Path` keeps that, which JSON has no form for


def hardware(args: TrainingArguments) -> str:
    """Name and number of the devices of a run."""
    if args.device.type == "cuda":
        return f"{args.world_size} x {torch.cuda.get_device_name(args.device)}"
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):  # not Linux, or not a PC
        pass
    return f"{model}, {torch.get_num_threads()} threads x {args.world_size} processes"


def _origin(dataset: MapDataset) -> tuple[str | None, str | None]:
    """Repository and commit that a dataset was loaded from, where it knows."""
    if isinstance(dataset, datasets.Dataset) and dataset.cache_files:
        # <cache>/<owner>___<name>/<configuration>/<version>/<commit>/<file>; a dataset does not say it otherwise
        pattern = r".*/([^/]+)___([^/]+)/[^/]+/[^/]+/([0-9a-f]{40})/[^/]+"
        match = re.fullmatch(pattern, Path(dataset.cache_files[0]["filename"]).as_posix())
        if match is not None:
            return f"{match[1]}/{match[2]}", match[3]
    return None, None


def _write_sample(video: Any, path: Path, fps: float) -> None:
    """Copy a file as it is; write frames at the frame rate of the run."""
    if path.is_file():
        return
    content = video.get("bytes") if isinstance(video, dict) else None
    source = video.get("path") if isinstance(video, dict) else video
    if content is None and isinstance(source, str | os.PathLike) and str(source).endswith(".mp4"):
        content = Path(source).read_bytes()
    if content is not None and content[4:8] == b"ftyp":
        write_atomically(path, content)
    else:
        write_video(path, read_video(video), fps)


def _labelled(cells: Mapping[str, tuple[Any, list[Any]]]) -> dict[str, Any]:
    """The videos of a row, by names such as `"chosen"` and `"rejected 2"`; with each column, its cell as it is."""
    labelled = {}
    for column, (cell, videos) in cells.items():
        several = column == "rejected" and isinstance(cell, list)
        for number, video in enumerate(videos):
            labelled[f"{column} {number + 1}" if several else column] = video
    return labelled


def _sample_videos(prompts: Sequence[str], output_dir: Path, step: int) -> list[tuple[str, str]]:
    """Prompts and the videos that were last made of them."""
    folders = {int(path.name[5:]): path for path in output_dir.glob("samples/step_*") if path.name[5:].isdigit()}
    last = max((number for number in folders if number <= step), default=None)
    if last is None:
        return []
    paths = [folders[last] / f"{number:02d}.mp4" for number in range(len(prompts))]
    return [(prompt, str(path.relative_to(output_dir))) for prompt, path in zip(prompts, paths, strict=True)]


def _shown(value: Any) -> Any:
    return value.value if isinstance(value, Enum) else value
