"""
The sandbox experiment: what judged data and preferences do to a model that breaks laws of motion.

A pool of clips as a crawl would find them, more than half of which break their law. Arms: fine-tuning on the pool as
found; on the clips that the judge passes; PhyGDPO and Reg-DPO, which set these against the model's own bad ones. All
are compared with the base model, and with each other, on held-out sentences and the same noise.
"""

import gc
import itertools
import json
import multiprocessing
import os
import platform
import re
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .files import read_json, recorded, write_atomically
from .load import SANDBOX, ScriptArguments


if TYPE_CHECKING:
    import datasets
    import numpy as np

    from .evaluation.report.page import Comparison, Table
    from .evaluation.runs.prompts import EvaluationPrompt
    from .evaluation.runs.tables import RunTable
    from .trainer.group_dpo_config import VideoGroupDPOConfig

BASE, REAL = "base", "real clips"
FOUND, JUDGED, PHYGDPO, REG_DPO = "SFT as found", "SFT judged", "PhyGDPO", "Reg-DPO"
ARMS = (FOUND, JUDGED, PHYGDPO, REG_DPO)
PLAIN, LONGER = "PhyGDPO, r = 0", "SFT judged, longer"  # controls: without the regulariser, and at equal time
_IN_WORDS = {
    BASE: "the base model",
    FOUND: "fine-tuning on the clips as found",
    JUDGED: "fine-tuning on the clips that the judge passed",
}
_LONGEST_FIRST = (REG_DPO, PLAIN, PHYGDPO, LONGER, JUDGED)  # so that no processor waits at the end
_SFT_STEPS = 2.3  # steps of fine-tuning in the time of a step of a preference method, measured

# The recipe was chosen on draw 0 of the held-out prompts with noise seed 0, and on another pool: none is used again.
PROMPT_DRAW, FIRST_NOISE_SEED = 1, 1
_NUM_SAMPLES = 14  # prompts whose videos the page shows
_DATA = "clips, judged, and rejected videos"
_RESULT = "arm.json"  # an arm that has it is not trained again
# Values of the trainer's configuration that the results name; the first four say how much was trained.
_SETTINGS = (
    "max_steps", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate",
    "beta", "loss_type", "shared_noise", "sft_weight", "rejected_score_below", "timestep_sampling", "timestep_range",
    "lora_rank", "lora_alpha", "lora_target_modules",
)  # fmt: skip
_SCORES = (
    "pc says how well the path of a clip fits its law of motion, 0 to 1; sa how well the clip shows what the sentence "
    "says, lawful or not; both come from an exact judge that measures the pixels. A clip obeys its law if the nearest "
    "simulated path, of the same motion, is a lawful one; it breaks it if that is a violation with a name; it does "
    "neither if no path is within two pixels. Diversity is the root mean squared difference of two videos of one "
    "sentence, from two noises, in grey levels of 255."
)
_CURVES = (
    "Of the first training seed. loss falls noisily, since most of it is noise that no model predicts. win_gap is the "
    "error of the trained model on chosen clips minus that of the base: below 0 it has become better at them. "
    "lose_gap is the same for rejected clips. eval_ marks rows that no arm was trained on; only these count."
)


@dataclass
class ExperimentArguments:
    """How the sandbox experiment finds its clips, and how it evaluates."""

    found_clips: int = field(
        default=600, metadata={"help": "Sandbox experiment: clips in the pool as found; the judge passes about 40 %."}
    )
    eval_prompts: int = field(default=84, metadata={"help": "Sandbox experiment: held-out prompts evaluated."})
    eval_seeds: int = field(
        default=2, metadata={"help": "Sandbox experiment: videos of each held-out prompt, each from another noise."}
    )
    arms_at_once: int = field(
        default=2,
        metadata={"help": "Sandbox experiment: arms trained at a time on a CPU, each by a process of one thread."},
    )
    controls: bool = field(
        default=False,
        metadata={"help": "Sandbox experiment: also PhyGDPO without `sft_weight`, and fine-tuning in its time."},
    )
    seeds: list[int] = field(
        default_factory=lambda: [0],
        metadata={"help": "Sandbox experiment: training seeds. Three or more are needed to call a method better."},
    )

    def check(self) -> None:
        """
        Raises:
            ValueError: If a number is too small for an interval, or for anything to be done.
        """
        for name, least in (("found_clips", 2), ("eval_prompts", 2), ("eval_seeds", 1), ("arms_at_once", 1)):
            if vars(self)[name] < least:
                raise ValueError(f"`{name}` must be at least {least}, got {vars(self)[name]}.")


@dataclass(frozen=True)
class _Adapter:
    """A trained adapter: its arm, training seed, folder, cost, held-out gaps of its rows, and training log."""

    method: str
    seed: int | None
    folder: str | None
    cpu_seconds: float
    win_gaps: list[float]
    log_history: list[dict[str, Any]]


_BASE_MODEL = _Adapter(BASE, None, None, 0.0, [], [])  # the arm without an adapter


@dataclass
class _Phases:
    """One line for each phase that is done, with the time that is left if each takes as long as its weight says."""

    weights: dict[str, float]
    shown: bool
    done: list[str] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)

    def finish(self, name: str) -> None:
        if not self.shown:
            return
        from tqdm.auto import tqdm

        self.done.append(name)
        elapsed = time.monotonic() - self.started
        before = sum(self.weights[done] for done in self.done)
        left = elapsed / before * (sum(self.weights.values()) - before)
        number = f"{len(self.done)}/{len(self.weights)}"
        line = f"[{number:>5}] {elapsed / 60:4.1f} min, about {left / 60:.0f} min left. Done: {name}"
        tqdm.write(line, file=sys.stdout)  # above a bar, if one is shown
        sys.stdout.flush()


def run_sandbox_experiment(
    data: ScriptArguments, experiment: ExperimentArguments, args: "VideoGroupDPOConfig"
) -> str | None:
    """
    Finds and judges clips, trains the arms, evaluates, and leaves datasets, adapters, runs, `report.html` and
    `results.json` in `args.output_dir`. Arms that are whole in that folder are not trained again.

    Args:
        data ([`~video_trl.load.ScriptArguments`]): Number of rejected videos.
        experiment ([`ExperimentArguments`]): Pool, evaluation, controls and training seeds.
        args ([`VideoGroupDPOConfig`]): Training of PhyGDPO; the other arms have the same where it applies to them.

    Returns:
        `str` or `None`: What happened in words, the comparisons as a table, and where everything is; `None` on all
        processes but the first.

    Raises:
        ValueError: If `args` asks for what only one run can do: to resume, or to upload; if the folder holds arms of
            another recipe; or as `experiment.check`.
    """
    from .evaluation.report.comparison import compare_tables
    from .evaluation.report.page import summary_table

    _refuse_what_needs_one_run(args)
    experiment.check()
    folder = Path(args.output_dir)
    _claim(folder, data, experiment, args)
    arms = [*ARMS, *((PLAIN, LONGER) if experiment.controls else ())]
    units = [(arm, seed) for arm in arms for seed in experiment.seeds]
    phases = _Phases(_phases(units, experiment, args), shown=args.process_index == 0)
    if args.process_index == 0:
        sys.stdout.write(
            f"Finding {experiment.found_clips} clips, making rejected videos; then {len(units)} trainings\n"
        )
    adapters, groups = _train_and_evaluate(units, data, args, experiment, phases)
    if args.process_index != 0:
        return None
    base, *tables = [_evaluate(folder / "runs", adapter, experiment) for adapter in (_BASE_MODEL, *adapters)]
    pairs = [(arm, BASE) for arm in arms] + [(arm, JUDGED) for arm in arms if arm != JUDGED]
    comparisons = compare_tables([base, *tables], pairs)
    results = _Results(base, adapters, tables, comparisons, real_clips_pc([p.text for p in base.run.prompts]))
    settings = _settings(data, experiment, args) | {"winners": f"{len(groups)} of {experiment.found_clips} clips"}
    results.save(folder / "results.json", settings)
    report = results.write_report(folder / "report.html", settings)
    return (
        f"\n{results.sentence()}\n\n{results.arms_table()}\n\n{summary_table(comparisons)}\n\n"
        f"Videos, curves and scores: {report}\nAdapters: {', '.join(str(adapter.folder) for adapter in adapters)}"
    )


def _claim(folder: Path, data: ScriptArguments, experiment: ExperimentArguments, args: "VideoGroupDPOConfig") -> None:
    """
    Raises:
        ValueError: If the folder holds arms of another recipe, whose results would be shown as those of this one.
    """
    if args.process_index != 0:
        return
    values = {name: vars(args)[name] for name in _SETTINGS} | {"found_clips": experiment.found_clips}
    found, recipe = recorded(folder / "recipe.json", values | {"num_rejected": data.num_rejected})
    if found != recipe:
        changed = {name: (found.get(name), value) for name, value in recipe.items() if found.get(name) != value}
        raise ValueError(
            f"{folder} holds arms of another recipe, whose results would be taken for these (there, asked for): "
            f"{changed}. Pass another `output_dir`."
        )


def _phases(
    units: Sequence[tuple[str, int]], experiment: ExperimentArguments, args: "VideoGroupDPOConfig"
) -> dict[str, float]:
    """Phases, and about how long each takes, in seconds of a processor."""
    evaluation = 0.3 * experiment.eval_prompts * experiment.eval_seeds
    steps = args.max_steps if args.max_steps > 0 else 400
    training = {FOUND: 0.15 * steps, JUDGED: 0.15 * steps}
    return {
        _DATA: 0.2 * experiment.found_clips,
        BASE: evaluation,
        **{_phase(arm, seed): training.get(arm, 0.45 * steps) + evaluation for arm, seed in units},
    }


def _phase(arm: str, seed: int) -> str:
    return arm if arm == BASE else f"{arm}, seed {seed}"


def _train_and_evaluate(
    units: Sequence[tuple[str, int]],
    data: ScriptArguments,
    args: "VideoGroupDPOConfig",
    experiment: ExperimentArguments,
    phases: _Phases,
) -> "tuple[list[_Adapter], datasets.Dataset]":
    """
    Makes the datasets, trains each arm and makes its videos. On a CPU several at a time: the model is too small for a
    second thread to help, and arms know nothing of each other; those that need no rejected videos are trained while
    these are made. A launch of several processes shares each training instead. Returns the arms, and the groups.
    """
    at_once = experiment.arms_at_once if args.world_size == 1 and args.device.type == "cpu" else 1
    found = _found(experiment, args)
    work = [(BASE, 0), *units]
    early = [unit for unit in work if unit[0] in (BASE, FOUND)]
    if at_once == 1:
        groups = _groups(data, experiment, args)
        phases.finish(_DATA)
        adapters = {}
        for unit in work:
            adapters[unit] = _train_and_evaluate_one(*unit, args, experiment, found if unit in early else groups)
            phases.finish(_phase(*unit))
        return [adapters[unit] for unit in units], groups
    late = sorted((unit for unit in work if unit not in early), key=lambda unit: _LONGEST_FIRST.index(unit[0]))
    with _environment(TQDM_DISABLE="1", OMP_NUM_THREADS="1"):  # children read it; bars of several would mix
        pool = ProcessPoolExecutor(at_once, mp_context=multiprocessing.get_context("spawn"))
        futures: dict[tuple[str, int], Future[_Adapter]] = {}

        def start(unit: tuple[str, int], rows: "datasets.Dataset") -> None:
            def finish(future: "Future[_Adapter]") -> None:
                if not future.cancelled() and future.exception() is None:
                    phases.finish(_phase(*unit))

            futures[unit] = pool.submit(_train_and_evaluate_one, *unit, args, experiment, rows)
            futures[unit].add_done_callback(finish)

        for unit in early:
            start(unit, found)
    try:
        groups = _groups(data, experiment, args)
        phases.finish(_DATA)
        for unit in late:
            start(unit, groups)
        for future in as_completed(futures.values()):
            future.result()
    finally:
        pool.shutdown(cancel_futures=True)  # after a failure nothing more is begun; what is whole is kept
    return [futures[unit].result() for unit in units], groups


def _train_and_evaluate_one(
    arm: str,
    seed: int,
    args: "VideoGroupDPOConfig",
    experiment: ExperimentArguments,
    rows: "datasets.Dataset",
) -> _Adapter:
    """Nothing is trained for the base model."""
    adapter = _BASE_MODEL if arm == BASE else _train(arm, seed, args, rows)
    if args.process_index == 0:
        _evaluate(Path(args.output_dir) / "runs", adapter, experiment)
    return adapter


@contextmanager
def _environment(**variables: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


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


def _found(experiment: ExperimentArguments, args: "VideoGroupDPOConfig") -> "datasets.Dataset":
    """The pool as found, as video rows."""
    from .sandbox import build_clip_dataset

    with args.main_process_first():
        return build_clip_dataset(Path(args.output_dir) / "found", num_clips=experiment.found_clips, found=True)


def _groups(data: ScriptArguments, experiment: ExperimentArguments, args: "VideoGroupDPOConfig") -> "datasets.Dataset":
    """Groups of what the judge passed and of the base model's own videos."""
    from .sandbox import build_group_dataset, load_sandbox

    with args.main_process_first():
        return build_group_dataset(
            load_sandbox(),
            Path(args.output_dir) / "dataset",
            num_groups=experiment.found_clips,
            num_rejected=data.num_rejected,
            found=True,
        )


def _train(arm: str, seed: int, args: "VideoGroupDPOConfig", rows: "datasets.Dataset") -> _Adapter:
    """
    Trains one adapter and saves it, or reads what an earlier call has left. `rows` are groups, whose last ones are
    held out; fine-tuning on the clips as found takes all of these.
    """
    from transformers import PrinterCallback

    from .evaluation.runs.run import make_room
    from .sandbox.data.regimes import HELD_OUT
    from .trainer.publishing.progress import ClosingLine

    folder = Path(args.output_dir) / f"{re.sub(r'[^a-z0-9]+', '-', arm.lower())}-seed{seed}"
    stored = folder / _RESULT
    if stored.is_file():
        return _Adapter(**read_json(stored))
    if args.process_index == 0:
        make_room(Path(args.output_dir) / "runs" / folder.name)  # of videos of an earlier training
    held_out = 0 if arm == FOUND else max(1, round(HELD_OUT * len(rows)))
    trained = rows.select(range(max(1, len(rows) - held_out)))
    changes: dict[str, Any] = {"output_dir": str(folder), "overwrite_output_dir": True}
    trainer = _trainer(arm, seed, replace(args, **changes), trained)
    for printed in (PrinterCallback, ClosingLine):  # the phases say how far it is
        trainer.remove_callback(printed)
    start = time.process_time()
    trainer.train()
    cpu_seconds = time.process_time() - start
    trainer.save_model()
    rest = range(len(trained), len(rows))
    gaps = [] if arm in (FOUND, JUDGED, LONGER) or not rest else held_out_win_gaps(trainer, rows.select(rest))
    adapter = _Adapter(arm, seed, str(folder), cpu_seconds, gaps, trainer.state.log_history)
    if args.process_index == 0:
        write_atomically(stored, json.dumps(asdict(adapter)))
    return adapter


def _trainer(arm: str, seed: int, args: "VideoGroupDPOConfig", rows: "datasets.Dataset") -> Any:
    """The trainer of an arm. What is not said of an arm here is as `args` says of PhyGDPO."""
    from .trainer.group_dpo_config import as_sft_weight
    from .trainer.group_dpo_trainer import VideoGroupDPOTrainer
    from .trainer.reg_dpo_config import VideoRegDPOConfig
    from .trainer.reg_dpo_trainer import VideoRegDPOTrainer
    from .trainer.sft_config import VideoSFTConfig
    from .trainer.sft_trainer import VideoSFTTrainer

    changes: dict[str, Any] = {"seed": seed, "data_seed": seed, "disable_tqdm": True}
    if arm in (PHYGDPO, PLAIN):
        changes |= {"sft_weight": 0.0} if arm == PLAIN else {}
        return VideoGroupDPOTrainer(SANDBOX, replace(args, **changes), rows)
    if arm == REG_DPO:
        weight = as_sft_weight(args.sft_weight)
        mode, coefficient = weight if isinstance(weight, tuple) else ("fixed", weight)
        changes |= {"sft_weight_mode": mode, "sft_coefficient": coefficient}
        return VideoRegDPOTrainer(SANDBOX, VideoRegDPOConfig(**_shared(args, VideoRegDPOConfig) | changes), rows)
    if arm == LONGER:
        changes["max_steps"] = round(_SFT_STEPS * args.max_steps)
    config = VideoSFTConfig(**_shared(args, VideoSFTConfig) | changes)
    return VideoSFTTrainer(SANDBOX, config, rows)


def _shared(args: "VideoGroupDPOConfig", config_class: type[Any]) -> dict[str, Any]:
    names = {item.name for item in fields(config_class) if item.init}
    return {name: value for name, value in vars(args).items() if name in names}


def held_out_win_gaps(trainer: Any, rows: "datasets.Dataset") -> list[float]:
    """
    Of each row: error of the policy minus that of the reference on the chosen video, on one noise.

    Args:
        trainer (`VideoTrainer`): A trained preference trainer, whose noise is used.
        rows (`datasets.Dataset`): Rows that it was not trained on, of the type that it takes.
    """
    import torch

    loader = trainer.get_eval_dataloader(trainer.prepare_dataset(rows, trainer.model))
    trainer.model.eval()
    rewards = []
    with torch.no_grad():
        for batch in loader:
            rewards += trainer.compute_loss(trainer.model, batch, return_outputs=True)[1]["chosen_rewards"].tolist()
    return [-2 / trainer.args.beta * reward for reward in rewards]


def _evaluate(folder: Path, adapter: _Adapter, experiment: ExperimentArguments) -> "RunTable":
    """Videos and scores of the base model or of an adapter. The judge sees frames before they are compressed."""
    from .evaluation.evaluate import sandbox_prompts

    return evaluate_trained(
        folder / (BASE if adapter.folder is None else Path(adapter.folder).name),
        adapter.folder,
        sandbox_prompts(experiment.eval_prompts, seed=PROMPT_DRAW),
        seeds=range(FIRST_NOISE_SEED, FIRST_NOISE_SEED + experiment.eval_seeds),
        name=adapter.method,
        training_seed=adapter.seed,
    )


def evaluate_trained(
    run_dir: str | Path,
    weights: str | Path | None,
    prompts: "Sequence[EvaluationPrompt]",
    *,
    seeds: Sequence[int],
    name: str,
    training_seed: int | None,
) -> "RunTable":
    """
    Videos and scores of what was trained on the sandbox, loaded the way a user will load it. What is there already is
    not made again, unless another number of videos is asked for.

    Args:
        run_dir (path): Directory of the run.
        weights (path or `None`): Folder in which a trainer saved an adapter, or all weights; `None`: the base model.
        prompts (list of `EvaluationPrompt`), seeds (list of `int`): One video of each prompt for each seed.
        name (`str`), training_seed (`int` or `None`): As in `generate_run`.
    """
    from .evaluation.evaluate import evaluate_pipeline
    from .evaluation.runs.generate import load_generator
    from .evaluation.runs.run import RUN_FILE, load_run
    from .load import load_judge

    whole = weights is not None and (Path(weights) / "transformer").is_dir()  # all weights were trained
    adapter = None if weights is None or whole else str(weights)
    generator = load_generator(SANDBOX, adapter=adapter, device="cpu")  # the same videos on every machine
    if whole:
        transformer = generator.pipeline.transformer
        generator.pipeline.transformer = type(transformer).from_pretrained(Path(str(weights)) / "transformer").eval()
        generator = replace(generator, model=f"sandbox with {weights}", revision=None)  # None: hash what is there
    stored = load_run(run_dir) if (Path(run_dir) / RUN_FILE).is_file() else None
    return evaluate_pipeline(
        run_dir,
        generator,
        load_judge(SANDBOX),
        prompts,
        seeds=tuple(seeds),
        name=name,
        training_seed=training_seed,
        resume=stored is not None and (stored.prompts, tuple(stored.seeds)) == (tuple(prompts), tuple(seeds)),
    )


def stored_table(run_dir: str | Path) -> "RunTable | None":
    """The scores of a run, if they are whole."""
    from .evaluation.runs.run import RUN_FILE
    from .evaluation.runs.tables import tabulate

    if not (Path(run_dir) / RUN_FILE).is_file():
        return None
    try:
        return tabulate(run_dir)
    except ValueError:  # cut while it was made
        return None


def peak_of_tensors(trainer: Any) -> int:
    """Bytes of tensors that the training of a trainer of a few steps allocates at its peak, beside the weights."""
    from torch.profiler import ProfilerActivity, profile

    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # read when it starts; else it writes lines of its own
    gc.collect()  # what is freed later must not count as freed by training
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        trainer.train()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = [event for event in json.loads(trace.read_text())["traceEvents"] if event.get("name") == "[memory]"]
    events.sort(key=lambda event: event["ts"])
    return int(max(itertools.accumulate(event["args"]["Bytes"] for event in events)))


def real_clips_pc(prompts: Sequence[str]) -> float:
    """Mean `pc` of lawful clips of the sandbox's sentences, after the autoencoder: what can be reached."""
    import numpy as np
    import torch

    from .sandbox import load_sandbox, simulate
    from .sandbox.world.prompts import parse_prompt

    sandbox = load_sandbox()
    clips = np.stack([simulate(seed, spec=parse_prompt(prompt)).video for seed, prompt in enumerate(prompts)])
    videos = []
    with torch.no_grad():
        for part in torch.from_numpy(clips).permute(0, 4, 1, 2, 3).split(16):
            latents = sandbox.pipeline.vae.encode(part.float() / 127.5 - 1).latent_dist.mode()
            decoded = sandbox.pipeline.vae.decode(latents).sample.clamp(-1, 1)
            videos += list(((decoded + 1) * 127.5).round().byte().permute(0, 2, 3, 4, 1).numpy())
    return float(np.mean([float(score["pc"]) for score in sandbox.judge.score(videos, list(prompts))]))


def _settings(data: ScriptArguments, experiment: ExperimentArguments, args: "VideoGroupDPOConfig") -> dict[str, Any]:
    """What has to be known to make the numbers again."""
    import torch

    from . import __version__

    return {
        "command": shlex.join(["accelerate", "launch", *sys.argv]),
        "video_trl": __version__,
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {args.device.type}, {torch.get_num_threads()} threads",
        "num_rejected": data.num_rejected,
        **vars(experiment),
        **{name: vars(args)[name] for name in _SETTINGS},
    }


class _Results:
    """All that was measured, in words, as tables, as a page and as JSON."""

    def __init__(
        self,
        base: "RunTable",
        adapters: Sequence[_Adapter],
        tables: "Sequence[RunTable]",
        comparisons: "Sequence[Comparison]",
        real_pc: float,
    ) -> None:
        self.base, self.adapters, self.tables = base, adapters, tables
        self.comparisons, self.real_pc = comparisons, real_pc
        self.runs = [base, *tables]
        videos = [[_read(row["video"]) for row in table.rows()] for table in self.runs]
        self.modes = [_modes(table, each) for table, each in zip(self.runs, videos, strict=True)]
        self.spread = [_spreads(table, each) for table, each in zip(self.runs, videos, strict=True)]

    def sentence(self) -> str:
        """What happened, for somebody who knows nothing of it; the counts are those of the first training seed."""
        first = [index for index, adapter in enumerate(self.adapters) if adapter.seed == self.adapters[0].seed]
        counts = {
            self.runs[index].run.name: sum(mode == "lawful" for mode in self.modes[index])
            for index in [0, *(1 + index for index in first)]
        }
        total = len(self.modes[0])
        base, *others = counts
        after = ", ".join(f"{counts[name]} after {_IN_WORDS.get(name, name)}" for name in others if name in ARMS)
        gap = self._difference("pc", PHYGDPO, JUDGED)
        verdict = "ahead of" if gap.low > 0 else "behind" if gap.high < 0 else "not to be told apart from"
        return (
            f"On sentences that no model was trained on, {_IN_WORDS[base]} obeys the law of motion in {counts[base]} "
            f"of {total} videos; it does so in {after}. In the physics score, PhyGDPO is {verdict} fine-tuning on the "
            f"same clips ({gap.difference:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}])."
        )

    def _difference(self, metric: str, a: str, b: str) -> Any:
        return next(c.difference for c in self.comparisons if (c.metric, c.a, c.b) == (metric, a, b))

    def arms(self) -> "Table":
        """Every run: scores, share of the gap to real clips, ways, diversity, held-out gap, and cost."""
        from .evaluation.report.page import Table
        from .sandbox.judge.modes import mode_shares

        base_pc = self.base.means["all"]["pc"]
        rows = []
        for index, table in enumerate(self.runs):
            adapter = None if index == 0 else self.adapters[index - 1]
            pc, sa = (table.means["all"][name] for name in ("pc", "sa"))
            shares = mode_shares(self.modes[index])
            closed = "" if adapter is None else f"{100 * (pc - base_pc) / (self.real_pc - base_pc):.0f} %"
            rows.append(
                [
                    table.run.name,
                    "" if adapter is None else str(adapter.seed),
                    f"{pc:.3f}",
                    closed,
                    f"{sa:.3f}",
                    *(f"{100 * share:.0f} %" for share in shares.values()),
                    f"{self.spread[index].mean():.1f}" if len(self.spread[index]) else "",
                    _interval(adapter.win_gaps, "+.4f") if adapter and len(adapter.win_gaps) > 1 else "",
                    "" if adapter is None else f"{adapter.cpu_seconds:.0f} s",
                ]
            )
        header = ["model", "seed", "pc", "gap closed", "sa", "lawful", "violated", "neither", "diversity"]
        header += ["held-out win_gap", "training, CPU"]
        note = (
            f"Gap: between the base model and lawful clips of the same sentences after the autoencoder, pc "
            f"{self.real_pc:.3f}. held-out win_gap: mean over rows with its bootstrap 95 % interval."
        )
        return Table("Which way the clips went, and what it cost", header, rows, note)

    def arms_table(self) -> str:
        """The table of the arms for the terminal."""
        table = self.arms()
        rows = [list(table.header), *map(list, table.rows)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)

    def diversity(self) -> "Table":
        """Diversity over noises of every arm against the base model, sentence by sentence, seeds pooled."""
        import numpy as np

        from .evaluation.report.page import Table
        from .evaluation.statistics import paired_bootstrap

        rows = []
        for arm in dict.fromkeys(adapter.method for adapter in self.adapters):
            own = [spread for spread, run in zip(self.spread, self.runs, strict=True) if run.run.name == arm]
            if not len(own[0]):
                continue
            found = paired_bootstrap(
                np.concatenate(own), np.tile(self.spread[0], len(own)), clusters=list(range(len(own[0]))) * len(own)
            )
            rows.append([arm, f"{found.mean_a:.1f}", f"{found.difference:+.1f} [{found.low:+.1f}, {found.high:+.1f}]"])
        return Table("Diversity over noises", ["arm", "diversity", f"over {BASE}"], rows)

    def shown(self) -> tuple[list[int], str]:
        """
        Cases whose videos the page shows: of each motion, among the base model's clips with a named violation, the one
        of median gain in `pc` under PhyGDPO; then first ones of each motion.
        """
        index = next(i for i, adapter in enumerate(self.adapters) if adapter.method == PHYGDPO)
        gains = [
            after["pc"] - before["pc"]
            for before, after in zip(self.base.scores, self.tables[index].scores, strict=True)
        ]
        cases = list(self.base.run.cases)
        chosen = []
        for motion in dict.fromkeys(case.prompt.category for case in cases):
            broken = [
                number
                for number, case in enumerate(cases)
                if case.prompt.category == motion and self.modes[0][number] not in ("lawful", "neither")
            ]
            if broken:
                chosen.append(sorted(broken, key=lambda number: gains[number])[len(broken) // 2])
        seen = {cases[number].prompt_index for number in chosen}
        first = [
            number
            for number in range(0, len(cases), len(self.base.run.seeds))
            if cases[number].prompt_index not in seen
        ]
        rule = (
            f"first, of each motion, the video of median gain in pc under {PHYGDPO} among those in which the base "
            "model breaks the law in a way with a name; then the first sentences of the evaluation, whatever came out."
        )
        return [*chosen, *first[: max(0, _NUM_SAMPLES - len(chosen))]], rule

    def write_report(self, path: Path, settings: Mapping[str, Any]) -> Path:
        """One page: the sentence, videos of the first training seed, scores, comparisons, every run, curves."""
        from .evaluation.report.comparison import training_curves, write_page

        first = [i for i, adapter in enumerate(self.adapters) if adapter.seed == self.adapters[0].seed]
        curves = [curve for i in first for curve in training_curves(self._log(i), self.adapters[i].method)]
        return write_page(
            path,
            self.runs,
            self.comparisons,
            shown=[self.base, *(self.tables[i] for i in first)],
            further_tables=[self.arms(), self.diversity()],
            curves=curves,
            title="Sandbox: before and after",
            notes=[f"{key}: {value}" for key, value in settings.items()],
            videos=self.shown(),
            lead=self.sentence(),
            explanations={"Scores": _SCORES, "Training curves": _CURVES},
        )

    def _log(self, index: int) -> list[dict[str, Any]]:
        """What the curves of an adapter show: loss and gaps."""
        wanted = ("loss", "loss/dpo", "win_gap", "lose_gap", "eval_win_gap", "eval_lose_gap")
        log = self.adapters[index].log_history
        return [{name: value for name, value in entry.items() if name in ("step", *wanted)} for entry in log]

    def save(self, path: Path, settings: Mapping[str, Any]) -> None:
        """Every number behind the report as JSON, with the settings that made it."""
        cases, rule = self.shown()
        content = {
            "sentence": self.sentence(),
            "shown": {"cases": cases, "rule": rule},
            "base_modes": self.modes[0],
            "settings": dict(settings),
            "real_pc": self.real_pc,
            "comparisons": [{**asdict(each), "verdict": each.verdict} for each in self.comparisons],
            BASE: self.base.rows(),
            "runs": [
                {**asdict(adapter), "modes": modes, "records": table.rows()}
                for adapter, modes, table in zip(self.adapters, self.modes[1:], self.tables, strict=True)
            ],
            "tables": [asdict(self.arms()), asdict(self.diversity())],
        }
        write_atomically(path, json.dumps(content, indent=1))


def _read(video: str) -> "np.ndarray":
    from .data.video_io import read_video

    return read_video(video)


def _modes(table: "RunTable", videos: "Sequence[np.ndarray]") -> list[str]:
    from .sandbox.judge.modes import find_mode

    return [find_mode(video, row["prompt"]).name for video, row in zip(videos, table.rows(), strict=True)]


def _spreads(table: "RunTable", videos: "Sequence[np.ndarray]") -> "np.ndarray":
    """Root mean squared difference of the first two videos of each sentence; empty where there is one of each."""
    import numpy as np

    each = len(table.run.seeds)
    if each < 2:
        return np.zeros(0)
    pairs = zip(videos[0::each], videos[1::each], strict=True)
    return np.array([np.sqrt(np.square(a.astype(np.float64) - b).mean()) for a, b in pairs])


def _interval(values: Sequence[float], form: str) -> str:
    """Mean and bootstrap 95 % interval."""
    from .evaluation.statistics import paired_bootstrap

    found = paired_bootstrap(values, [0.0] * len(values))
    return f"{found.difference:{form}} [{found.low:{form}}, {found.high:{form}}]"
