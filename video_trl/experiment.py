"""
The sandbox experiment: train an adapter by PhyGDPO and one by supervised fine-tuning, and compare both with the base
model on held-out prompts.
"""

import json
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .files import write_atomically
from .load import SANDBOX, ScriptArguments, load_training_rows


if TYPE_CHECKING:
    import datasets

    from .evaluation.report.page import Comparison, Table
    from .evaluation.runs.tables import RunTable
    from .trainer.group_dpo_config import VideoGroupDPOConfig


METHOD, CONTROL, BASE = "PhyGDPO", "SFT", "base"
# The configuration was chosen on draw 0 of the held-out prompts with noise seed 0: neither is used again.
_PROMPT_DRAW, _FIRST_NOISE_SEED = 1, 1
_NUM_SAMPLES = 14  # prompts whose videos the page shows
# Values of the trainer's configuration that the results name; the first four say how much was trained.
_SETTINGS = (
    "max_steps", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate",
    "beta", "loss_type", "shared_noise", "timestep_sampling", "lora_rank", "lora_alpha",
)  # fmt: skip


@dataclass
class ExperimentArguments:
    """How the sandbox experiment evaluates, and what it compares with."""

    eval_prompts: int = field(default=84, metadata={"help": "Sandbox experiment: held-out prompts evaluated."})
    eval_seeds: int = field(
        default=2, metadata={"help": "Sandbox experiment: videos of each held-out prompt, each from another noise."}
    )
    sft_control: bool = field(
        default=True,
        metadata={"help": "Sandbox experiment: also train on the chosen videos alone, with the same budget."},
    )
    sft_learning_rate: float | None = field(
        default=None, metadata={"help": "Sandbox experiment: learning rate of the control. Unset: that of the method."}
    )
    seeds: list[int] = field(
        default_factory=lambda: [0],
        metadata={"help": "Sandbox experiment: training seeds. Three or more are needed to call a method better."},
    )


@dataclass(frozen=True)
class _Adapter:
    """A trained adapter: its method, training seed, folder and training log."""

    method: str
    seed: int
    folder: str
    log_history: list[dict[str, Any]]


def run_sandbox_experiment(
    data: ScriptArguments, experiment: ExperimentArguments, args: "VideoGroupDPOConfig"
) -> str | None:
    """
    Builds the group dataset, trains, evaluates, and leaves dataset, adapters, runs, `report.html` and `results.json`
    in `args.output_dir`.

    Args:
        data ([`~video_trl.load.ScriptArguments`]): Size of the dataset.
        experiment ([`ExperimentArguments`]): Evaluation, control and training seeds.
        args ([`VideoGroupDPOConfig`]): Training of the method; the control has the same budget.

    Returns:
        `str` or `None`: The comparisons as a table and where everything is; `None` on all processes but the first.

    Raises:
        ValueError: If `args` asks for what only one run can do: to resume, or to upload.
    """
    from .evaluation.report.comparison import compare_tables
    from .evaluation.report.page import summary_table

    _refuse_what_needs_one_run(args)
    folder = Path(args.output_dir)
    groups = load_training_rows(data, args, "group")
    methods = [METHOD, CONTROL] if experiment.sft_control else [METHOD]
    adapters = [_train(method, seed, args, groups, experiment) for method in methods for seed in experiment.seeds]
    if args.process_index != 0:
        return None
    base, *tables = _evaluate(folder / "runs", adapters, experiment)
    pairs = [(method, BASE) for method in methods] + [(METHOD, other) for other in methods[1:]]
    comparisons = compare_tables([base, *tables], pairs)
    settings = _settings(data, experiment, args)
    _save_results(folder / "results.json", base, adapters, tables, comparisons, settings)
    report = _write_report(folder / "report.html", base, adapters, tables, comparisons, settings)
    return (
        f"{summary_table(comparisons)}\n\nVideos, curves and scores: {report}\n"
        f"Adapters: {', '.join(adapter.folder for adapter in adapters)}"
    )


def _refuse_what_needs_one_run(args: "VideoGroupDPOConfig") -> None:
    """The experiment trains several adapters: which one would be resumed or uploaded is not ours to guess."""
    from .trainer.checkpoints.weights import named_checkpoint

    options = {
        "--push_to_hub": args.push_to_hub,
        "--resume_from_checkpoint": named_checkpoint(args.resume_from_checkpoint),
    }
    refused = [option for option, value in options.items() if value]
    if refused:
        raise ValueError(
            f"The sandbox experiment trains several adapters; expected none of the options of a single run, got "
            f"{', '.join(refused)}. For one run on the same data add --dataset_name "
            f"{Path(args.output_dir) / 'dataset' / 'table'} (built by the experiment)."
        )


def _train(
    method: str,
    seed: int,
    args: "VideoGroupDPOConfig",
    groups: "datasets.Dataset",
    experiment: ExperimentArguments,
) -> _Adapter:
    """Trains one adapter and saves it."""
    from .trainer.group_dpo_trainer import VideoGroupDPOTrainer
    from .trainer.sft_config import VideoSFTConfig
    from .trainer.sft_trainer import VideoSFTTrainer

    output_dir = str(Path(args.output_dir) / f"{method.lower()}-seed{seed}")
    changes: dict[str, Any] = {"seed": seed, "data_seed": seed, "output_dir": output_dir, "overwrite_output_dir": True}
    args = replace(args, **changes)
    trainer: VideoGroupDPOTrainer | VideoSFTTrainer
    if method == METHOD:
        trainer = VideoGroupDPOTrainer(SANDBOX, args, groups)
    else:
        shared = {item.name for item in fields(VideoSFTConfig) if item.init}
        values = {name: value for name, value in vars(args).items() if name in shared}
        values["learning_rate"] = experiment.sft_learning_rate or args.learning_rate
        trainer = VideoSFTTrainer(SANDBOX, VideoSFTConfig(**values), groups)
    trainer.train()
    trainer.save_model()
    return _Adapter(method, seed, output_dir, trainer.state.log_history)


def _evaluate(folder: Path, adapters: Sequence[_Adapter], experiment: ExperimentArguments) -> "list[RunTable]":
    """Base model first, then each adapter as it was saved, loaded the way a user will load it."""
    from .evaluation.evaluate import evaluate_pipeline, sandbox_prompts
    from .evaluation.runs.generate import load_generator
    from .load import load_judge

    prompts = sandbox_prompts(experiment.eval_prompts, seed=_PROMPT_DRAW)
    seeds = range(_FIRST_NOISE_SEED, _FIRST_NOISE_SEED + experiment.eval_seeds)
    judge = load_judge(SANDBOX)

    def evaluated(name: str, adapter: str | None = None, training_seed: int | None = None) -> "RunTable":
        return evaluate_pipeline(
            folder / (BASE if adapter is None else Path(adapter).name),
            load_generator(SANDBOX, adapter=adapter, device="cpu"),  # the same videos on every machine
            judge,
            prompts,
            seeds=seeds,
            name=name,
            training_seed=training_seed,
        )

    return [evaluated(BASE), *(evaluated(adapter.method, adapter.folder, adapter.seed) for adapter in adapters)]


def _settings(data: ScriptArguments, experiment: ExperimentArguments, args: "VideoGroupDPOConfig") -> dict[str, Any]:
    """What has to be known to make the numbers again."""
    import torch

    from . import __version__

    return {
        "command": shlex.join(["accelerate", "launch", *sys.argv]),
        "video_trl": __version__,
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {args.device.type}, {torch.get_num_threads()} threads",
        **vars(data),
        **vars(experiment),
        **{name: vars(args)[name] for name in _SETTINGS},
    }


def _save_results(
    path: Path,
    base: "RunTable",
    adapters: Sequence[_Adapter],
    tables: "Sequence[RunTable]",
    comparisons: "Sequence[Comparison]",
    settings: Mapping[str, Any],
) -> None:
    """Every number behind the report as JSON, with the settings that made it."""
    content = {
        "settings": dict(settings),
        "comparisons": [{**asdict(comparison), "verdict": comparison.verdict} for comparison in comparisons],
        BASE: base.rows(),
        "runs": [
            {
                "method": adapter.method,
                "seed": adapter.seed,
                "records": table.rows(),
                "log_history": adapter.log_history,
            }
            for adapter, table in zip(adapters, tables, strict=True)
        ],
    }
    write_atomically(path, json.dumps(content, indent=1))


def _write_report(
    path: Path,
    base: "RunTable",
    adapters: Sequence[_Adapter],
    tables: "Sequence[RunTable]",
    comparisons: "Sequence[Comparison]",
    settings: Mapping[str, Any],
) -> Path:
    """One page: comparisons, every run, and of the first training seed the videos and curves."""
    from .evaluation.report.comparison import training_curves, write_page

    first = [
        (adapter, table) for adapter, table in zip(adapters, tables, strict=True) if adapter.seed == adapters[0].seed
    ]
    return write_page(
        path,
        [base, *tables],
        comparisons,
        shown=[base, *(table for _, table in first)],
        max_prompts=_NUM_SAMPLES,
        further_tables=[_gains(base, adapters, tables), _ways([base, *tables])],
        curves=[curve for adapter, _ in first for curve in training_curves(adapter.log_history, adapter.method)],
        title="Sandbox: before and after",
        notes=[f"{key}: {value}" for key, value in settings.items()],
    )


def _gains(base: "RunTable", adapters: Sequence[_Adapter], tables: "Sequence[RunTable]") -> "Table":
    """The gain of each run over the base model, seed by seed."""
    from .evaluation.report.comparison import METRICS, compare_tables
    from .evaluation.report.page import Table

    rows = []
    for adapter, table in zip(adapters, tables, strict=True):
        gains = [comparison.difference for comparison in compare_tables([base, table], [(adapter.method, BASE)])]
        cells = (f"{gain.difference:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}]" for gain in gains)
        rows.append([adapter.method, str(adapter.seed), *cells])
    header = ["method", "training seed", *(f"{metric} over {BASE}" for metric in METRICS)]
    return Table("Each training seed", header, rows, "Paired, bootstrap 95 % interval over prompts.")


def _ways(tables: "Sequence[RunTable]") -> "Table":
    """Shares of clips that obey their law, that break it in a way with a name, and of those that do neither."""
    from .data.video_io import read_video
    from .evaluation.report.page import Table
    from .sandbox.judge.modes import find_mode, mode_shares

    rows = []
    for table in tables:
        modes = [find_mode(read_video(row["video"]), row["prompt"]).name for row in table.rows()]
        seed = "" if table.run.training_seed is None else str(table.run.training_seed)
        rows.append([table.run.name, seed, *(f"{100 * share:.0f} %" for share in mode_shares(modes).values())])
    note = "By the nearest simulated path: one that obeys the law, one that breaks it as the base model was taught to."
    return Table("Which way the clips went", ["model", "training seed", "lawful", "violated", "neither"], rows, note)
