# /// script
# requires-python = ">=3.11"
# dependencies = ["video-trl", "matplotlib"]
# ///
"""
The ablation of PhyGDPO (https://huggingface.co/papers/2512.24551, Table 2b, 2c and 2d) on the sandbox: what the
switched adapter, the group, and physics-guided rewarding add, what other preference methods reach with the same data
and settings, and what a copied reference costs.

Every arm and training seed leaves an adapter, a training log and an evaluation run; what is there is not made again,
so that the study can be interrupted and continued:

    accelerate launch examples/studies/phygdpo.py                                  # all of it (make study-phygdpo)
    accelerate launch examples/studies/phygdpo.py --arms sft phygdpo --seeds 0     # a part of it

and, when everything is there, its tables and its figure:

    accelerate launch examples/studies/phygdpo.py --report docs/benchmarks/phygdpo_ablation.md
"""

import gc
import itertools
import json
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from video_trl.files import write_atomically


if TYPE_CHECKING:
    from video_trl.evaluation.runs.prompts import EvaluationPrompt
    from video_trl.sandbox import Sandbox


@dataclass(frozen=True)
class Arm:
    """What an arm is trained with: a method, what its rejected videos are, and which weights are trained."""

    shown: str
    method: str  # "sft", "dpo" or "gdpo"
    pairs: str = ""  # of "dpo": "real" (simulated clip, one generated) or "generated" (the best one, the worst one)
    physics_rewarding: bool = False
    lora: bool = True
    rate: float = 1.0  # learning rate, in units of the setting's


BASE, SFT, PAIRS, OWN_PAIRS, GROUP, FULL_METHOD = "base", "sft", "flow-dpo", "video-dpo", "groupwise", "phygdpo"
COPIED, COPIED_SLOW = "phygdpo-copied", "phygdpo-copied-slow"
ARMS: dict[str, Arm | None] = {
    BASE: None,
    SFT: Arm("LoRA-SFT", "sft"),
    PAIRS: Arm("Flow-DPO", "dpo", pairs="real"),
    OWN_PAIRS: Arm("VideoDPO", "dpo", pairs="generated"),
    GROUP: Arm("groupwise", "gdpo"),
    FULL_METHOD: Arm("PhyGDPO", "gdpo", physics_rewarding=True),
    COPIED: Arm("PhyGDPO, copied reference", "gdpo", physics_rewarding=True, lora=False),
    COPIED_SLOW: Arm("PhyGDPO, copied reference, a tenth of the rate", "gdpo", True, lora=False, rate=0.1),
}
MEASURED = (SFT, COPIED, FULL_METHOD)  # memory and size, as in Table 2d
# The two motions that the autoencoder renders least well: a fast fall, and two bodies that touch.
HARD_MOTIONS, HARD = ("free_fall", "collision"), "hard"
PROMPT_DRAW, NOISE_SEEDS = 6, (7,)  # of the held-out evaluation; the setting was chosen on other draws
TRAINING_LOG = "training.json"


@dataclass
class Setting:
    """Everything that the numbers depend on, the same for every arm; kept with the results, and others are refused."""

    num_groups: int = field(default=256, metadata={"help": "Groups of the training set."})
    num_rejected: int = field(default=3, metadata={"help": "Generated videos in each group."})
    max_steps: int = field(default=200, metadata={"help": "Optimizer steps of each run."})
    batch_size: int = field(default=8, metadata={"help": "Rows in a step."})
    learning_rate: float = field(default=3e-4, metadata={"help": "At the start; down to a tenth along a cosine."})
    beta: float = field(default=500.0, metadata={"help": "Beta of the preference losses."})
    lora_rank: int = field(default=48, metadata={"help": "Rank and scale of the adapter."})
    eval_prompts: int = field(default=84, metadata={"help": "Held-out sentences, one video each."})


@dataclass
class StudyArguments(Setting):
    """What to run."""

    output_dir: str = field(default="outputs/study-phygdpo", metadata={"help": "Folder of data and results."})
    arms: list[str] = field(default_factory=lambda: list(ARMS), metadata={"help": f"Some of {', '.join(ARMS)}."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Training seeds."})
    report: str | None = field(
        default=None,
        metadata={
            "help": "Train nothing; put the tables of all results into this page, between its two marks, and the "
            "figure beside it."
        },
    )

    @property
    def folder(self) -> Path:
        return Path(self.output_dir)

    def setting(self) -> dict[str, Any]:
        """The part that the numbers depend on."""
        return {name: self.__dict__[name] for name in Setting.__dataclass_fields__}


def main(argv: list[str]) -> None:
    from trl import TrlParser

    (args,) = TrlParser((StudyArguments,)).parse_args_and_config(args=argv)
    unknown = [arm for arm in args.arms if arm not in ARMS]
    if unknown or not args.seeds:
        raise ValueError(f"Expected arms among {list(ARMS)} and at least one seed, got {unknown} and {args.seeds}.")
    claim_folder(args)
    if args.report is not None:
        write_report(Path(args.report), args)
        return
    for seed in args.seeds:  # seed by seed: an interrupted study has whole seeds
        for arm in args.arms:
            if arm != BASE:
                train(args, arm, seed)
            if arm != BASE or seed == args.seeds[0]:
                evaluate(args, arm, seed)
    for arm in MEASURED:
        if arm in args.arms:
            measure_memory(args, arm)


def claim_folder(args: StudyArguments) -> None:
    """
    Raises:
        ValueError: The folder holds results of another setting.
    """
    path = args.folder / "setting.json"
    if not path.is_file():
        write_atomically(path, json.dumps(args.setting()))
    setting = json.loads(path.read_text())
    if setting != args.setting():
        raise ValueError(
            f"{args.folder} was made with {setting}, expected {args.setting()}. Pass another --output_dir."
        )


# ---- Training -------------------------------------------------------------------------------------------------------


def train(args: StudyArguments, arm: str, seed: int) -> None:
    """Train one arm with one seed, and leave its weights and its log."""
    from video_trl.sandbox import load_sandbox

    folder = weights_folder(args, arm, seed)
    if (folder / TRAINING_LOG).is_file():
        return
    started = time.perf_counter()
    trainer = make_trainer(args, arm, seed, load_sandbox(), args.max_steps)
    prepared = time.perf_counter()
    trainer.train()
    trainer.save_model()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    seconds = {"prepare": prepared - started, "train": time.perf_counter() - prepared}
    # Last: it says that all is there.
    write_atomically(folder / TRAINING_LOG, json.dumps({"log": log, "seconds": seconds}))


def make_trainer(args: StudyArguments, arm: str, seed: int, sandbox: "Sandbox", max_steps: int) -> Any:
    """The trainer of an arm. Same data, order, adapter, schedule and noise wherever the method leaves them alike."""
    from video_trl import (
        VideoDPOConfig,
        VideoDPOTrainer,
        VideoGroupDPOConfig,
        VideoGroupDPOTrainer,
        VideoSFTConfig,
        VideoSFTTrainer,
    )

    spec = ARMS[arm]
    assert spec is not None, "the base model is not trained"
    common: dict[str, Any] = {
        "output_dir": str(weights_folder(args, arm, seed)),
        "overwrite_output_dir": True,  # an arm that was cut off is trained again
        "cache_dir": str(args.folder / "encoded"),
        "max_steps": max_steps,
        "per_device_train_batch_size": args.batch_size,
        "learning_rate": args.learning_rate * spec.rate,
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
        "weight_decay": 0.01,
        "use_peft": spec.lora,
        "lora_rank": args.lora_rank,
        "lora_alpha": args.lora_rank,
        "timestep_sampling": "shifted",
        "seed": seed,
        "use_cpu": True,
        "bf16": False,
        "logging_steps": 5,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    rows = training_rows(args, sandbox, spec)
    if spec.method == "sft":
        return VideoSFTTrainer(sandbox.pipeline, VideoSFTConfig(**common), rows)
    if spec.method == "dpo":
        return VideoDPOTrainer(sandbox.pipeline, VideoDPOConfig(**common, beta=args.beta), rows)
    config = VideoGroupDPOConfig(**common, beta=args.beta, physics_rewarding=spec.physics_rewarding)
    return VideoGroupDPOTrainer(sandbox.pipeline, config, rows)


def training_rows(args: StudyArguments, sandbox: "Sandbox", spec: Arm) -> Any:
    """The groups, or the pairs that a pairwise method makes of the same videos."""
    from video_trl.sandbox import build_group_dataset

    groups = build_group_dataset(
        sandbox, args.folder / "dataset", num_groups=args.num_groups, num_rejected=args.num_rejected
    )
    if spec.pairs == "real":
        return [{"prompt": g["prompt"], "chosen": g["chosen"], "rejected": g["rejected"][0]} for g in groups]
    if spec.pairs == "generated":
        return [{"prompt": g["prompt"], **best_and_worst(g)} for g in groups]
    return groups


def best_and_worst(group: dict[str, Any]) -> dict[str, Any]:
    """The model's own videos, ranked by the judge: the pairs of VideoDPO. Equal scores: the first and the last one."""
    scores = [(score["sa"] + score["pc"]) / 2 for score in group["rejected_scores"]]
    order = sorted(range(len(scores)), key=lambda number: -scores[number])
    return {"chosen": group["rejected"][order[0]], "rejected": group["rejected"][order[-1]]}


def weights_folder(args: StudyArguments, arm: str, seed: int) -> Path:
    return args.folder / "weights" / f"{arm}-seed{seed}"


# ---- Measuring ------------------------------------------------------------------------------------------------------


def evaluate(args: StudyArguments, arm: str, seed: int) -> None:
    """Generate and judge the held-out videos of what was saved, loaded the way a user will load it."""
    from video_trl.evaluation.runs.generate import generate_run, load_generator
    from video_trl.evaluation.runs.score import score_run
    from video_trl.sandbox import SandboxJudge

    spec, weights = ARMS[arm], weights_folder(args, arm, seed)
    generator = load_generator(adapter=str(weights) if spec is not None and spec.lora else None, device="cpu")
    if spec is not None and not spec.lora:
        transformer = generator.pipeline.transformer
        trained = type(transformer).from_pretrained(weights / "transformer")
        generator.pipeline.transformer = trained.eval()
        generator = replace(generator, model=f"sandbox with {weights}", revision=None)  # None: hash what is in memory
    run = generate_run(
        run_folder(args, arm, seed),
        generator,
        prompts(args.eval_prompts),
        seeds=NOISE_SEEDS,
        name=arm,
        training_seed=None if arm == BASE else seed,
        batch_size=14,
    )
    score_run(run.folder, SandboxJudge())


def prompts(number: int) -> "tuple[EvaluationPrompt, ...]":
    """Held-out sentences; the motions that are hard for the base model form a group, as VideoPhy-2 has one."""
    from video_trl.evaluation.evaluate import sandbox_prompts

    sentences = sandbox_prompts(number, seed=PROMPT_DRAW)
    return tuple(replace(p, groups=(*p.groups, HARD)) if p.category in HARD_MOTIONS else p for p in sentences)


def run_folder(args: StudyArguments, arm: str, seed: int) -> Path:
    """The base model is not trained, so it has one run for all seeds."""
    return args.folder / "runs" / (arm if arm == BASE else f"{arm}-seed{seed}")


def measure_memory(args: StudyArguments, arm: str) -> None:
    """Bytes that tensors take at the peak of a few steps: the weights, and what training allocates on top."""
    from torch.profiler import ProfilerActivity, profile

    from video_trl.sandbox import load_sandbox

    path = args.folder / "memory" / f"{arm}.json"
    if path.is_file():
        return
    spec = ARMS[arm]
    assert spec is not None, "the base model is not trained"
    trainer = make_trainer(args, arm, 0, load_sandbox(), max_steps=3)
    weights = size_of(trainer.model.parameters())
    gc.collect()  # what is freed later must not count as freed by training
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        trainer.train()
    path.parent.mkdir(parents=True, exist_ok=True)
    trace = path.with_suffix(".trace")
    profiler.export_chrome_trace(str(trace))
    events = [event for event in json.loads(trace.read_text())["traceEvents"] if event.get("name") == "[memory]"]
    trace.unlink()
    events.sort(key=lambda event: event["ts"])
    content = {
        "weights": weights if spec.lora else 2 * weights,  # with the copied reference
        "training": max(itertools.accumulate(event["args"]["Bytes"] for event in events)),
        "trained": sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad),
    }
    write_atomically(path, json.dumps(content))


def file_size(args: StudyArguments, arm: str) -> int:
    """Of the weights that are published, in bytes."""
    files = weights_folder(args, arm, args.seeds[0]).rglob("*.safetensors")
    return sum(file.stat().st_size for file in files)


def size_of(tensors: Iterable[Any]) -> int:
    """In bytes."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


# ---- The report -----------------------------------------------------------------------------------------------------

MARKS = ("<!-- results of examples/studies/phygdpo.py -->", "<!-- end of results -->")
LAST_ENTRIES = 8  # of the log that stand for the end of a run: a fifth of it
# Decided before there were results: every comparison that a sentence of the paper makes.
COMPARISONS = (
    (PAIRS, BASE), (GROUP, PAIRS), (FULL_METHOD, GROUP), (FULL_METHOD, BASE), (FULL_METHOD, PAIRS),
    (FULL_METHOD, OWN_PAIRS), (FULL_METHOD, SFT), (FULL_METHOD, COPIED), (FULL_METHOD, COPIED_SLOW),
)  # fmt: skip
TABLES = {
    "Table 2b: what each part adds": {
        BASE: "base", PAIRS: "+ LoRA-SR", GROUP: "+ groupwise", FULL_METHOD: "+ PGR"
    },
    "Table 2c: other preference methods": {
        BASE: "base", PAIRS: "Flow-DPO", OWN_PAIRS: "VideoDPO", FULL_METHOD: "PhyGDPO"
    },
}  # fmt: skip
COSTS = ((SFT, "LoRA-SFT"), (COPIED, "copied reference"), (COPIED_SLOW, "copied reference, a tenth of the rate"),
         (FULL_METHOD, "LoRA-SR"))  # fmt: skip


@dataclass(frozen=True)
class Measured:
    """Scores of an arm, its seeds one after the other; a model without training once for each seed of the others."""

    values: dict[str, list[float]]  # "pc", "sa", "joint"
    prompts: list[int]
    hard: list[bool]
    copies: int

    def mean(self, name: str) -> float:
        return sum(self.values[name]) / len(self.prompts)


def load_results(args: StudyArguments) -> dict[str, Measured]:
    """
    Raises:
        ValueError: A run is missing or not complete.
    """
    from video_trl.evaluation.runs.tables import tabulate

    results = {}
    for arm in args.arms:
        tables = [tabulate(run_folder(args, arm, seed)) for seed in args.seeds]
        scores = [score for table in tables for score in table.scores]
        values = {name: [float(score[name]) for score in scores] for name in ("pc", "sa")}
        values["joint"] = [float(tables[0].benchmark.passes["joint"](score)) for score in scores]
        cases = [case for table in tables for case in table.run.cases]
        results[arm] = Measured(
            values,
            [case.prompt_index for case in cases],
            [HARD in case.prompt.groups for case in cases],
            copies=len(args.seeds) if arm == BASE else 1,
        )
    return results


def write_report(page: Path, args: StudyArguments) -> None:
    """
    Puts the tables into the page and the figure beside it.

    Raises:
        ValueError: The page has no place for them, or arms are missing.
    """
    text = page.read_text() if page.is_file() else ""
    if any(text.count(mark) != 1 for mark in MARKS) or set(args.arms) != set(ARMS):
        raise ValueError(f"Expected each of the lines {MARKS} once in {page}, and all arms, got {args.arms}.")
    results = load_results(args)
    figure = page.with_name("phygdpo_ablation.png")
    draw(figure, results, len(args.seeds))
    setting = ", ".join(f"{name} {value}" for name, value in args.setting().items())
    block = [
        MARKS[0],
        f"Setting: {setting}; training seeds {', '.join(map(str, args.seeds))}.",
        f"![Change of pc over the base model, of every arm]({figure.name})",
    ]
    for title, rows in TABLES.items():
        body = [[label, *cells(results, arm)] for arm, label in rows.items()]
        block += [f"### {title}", markdown_table([["model", *CELLS], *body])]
    block += [
        "### Table 2d: the reference",
        cost_table(args, results),
        "### Comparisons",
        comparison_table(results, args),
    ]
    block += ["### At the end of training", log_table(args), MARKS[1]]
    before, rest = text.split(MARKS[0])
    write_atomically(page, before + "\n\n".join(block) + rest.split(MARKS[1])[1])
    print(f"{page} and {figure} are written.")


CELLS = ("hard, right in both", "all, right in both", "mean pc", "mean sa", "pc over base")


def cells(results: dict[str, Measured], arm: str) -> list[str]:
    from video_trl.evaluation import proportion_of

    measured = results[arm]
    rows = list(zip(measured.values["joint"], measured.prompts, measured.hard, strict=True))
    rows = rows[: len(rows) // measured.copies]  # every video counts once
    groups = [[row for row in rows if row[2]], rows]
    proportions = [proportion_of([row[0] > 0 for row in group], [row[1] for row in group]) for group in groups]
    over = "" if arm == BASE else interval(difference(results, arm, BASE, "pc"))
    return [*map(str, proportions), f"{measured.mean('pc'):.3f}", f"{measured.mean('sa'):.3f}", over]


def cost_table(args: StudyArguments, results: dict[str, Measured]) -> str:
    rows = [["method", "trained parameters", "weights", "peak of tensors", "file", *CELLS[:2], CELLS[-1]]]
    for arm, label in COSTS:
        path = args.folder / "memory" / f"{COPIED if arm == COPIED_SLOW else arm}.json"
        memory = json.loads(path.read_text())
        numbers = (memory["weights"], memory["weights"] + memory["training"], file_size(args, arm))
        sizes = [f"{number / 2**20:.1f} MiB" for number in numbers]
        hard, joint, _, _, over = cells(results, arm)
        rows.append([label, f"{memory['trained']:,}", *sizes, hard, joint, over])
    return markdown_table(rows)


def comparison_table(results: dict[str, Measured], args: StudyArguments) -> str:
    from video_trl.evaluation import holm, prompt_sign_test, verdict

    rows = [["comparison", "pc", "p (Holm)", "verdict", "right in both", "sa"]]
    raw = [
        prompt_sign_test(results[a].values["pc"], results[b].values["pc"], results[a].prompts) for a, b in COMPARISONS
    ]
    for (a, b), p in zip(COMPARISONS, holm(raw), strict=True):
        result = difference(results, a, b, "pc")
        others = [interval(difference(results, a, b, name)) for name in ("joint", "sa")]
        words = verdict(result, num_seeds=len(args.seeds), p_adjusted=p)
        rows.append([f"{a} over {b}", interval(result), f"{p:.2g}", words, *others])
    return markdown_table(rows)


def log_table(args: StudyArguments) -> str:
    names = ("rewards/accuracies", "win_gap", "lose_gap")
    rows = [["arm", *(f"`{name}`" for name in names), "seconds of training"]]
    for arm in args.arms:
        if arm == BASE:
            continue
        logs = [json.loads((weights_folder(args, arm, seed) / TRAINING_LOG).read_text()) for seed in args.seeds]
        row = [arm]
        for name in names:
            ends = [[entry[name] for entry in log["log"][-LAST_ENTRIES:] if name in entry] for log in logs]
            means = [sum(end) / len(end) for end in ends if end]
            row.append(f"{sum(means) / len(means):.3g} [{min(means):.3g}, {max(means):.3g}]" if means else "")
        row.append(", ".join(f"{log['seconds']['train']:.0f}" for log in logs))
        rows.append(row)
    return markdown_table(rows)


def difference(results: dict[str, Measured], a: str, b: str, name: str) -> Any:
    """Paired difference of two arms; whole sentences are resampled, with the videos of all seeds."""
    from video_trl.evaluation import paired_bootstrap

    return paired_bootstrap(results[a].values[name], results[b].values[name], clusters=results[a].prompts)


def interval(result: Any) -> str:
    return f"{result.difference:+.3f} [{result.low:+.3f}, {result.high:+.3f}]"


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    header, *body = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([header, "|" + "---|" * len(rows[0]), *body])


def draw(path: Path, results: dict[str, Measured], num_seeds: int) -> None:
    """Change of pc over the base model: intervals over sentences, all seeds pooled, and each seed as a dot."""
    from matplotlib.figure import Figure

    panel = (figure := Figure(figsize=(7.5, 3.4), layout="constrained")).subplots()
    arms = [arm for arm in ARMS if arm != BASE]
    for height, arm in enumerate(reversed(arms)):
        result = difference(results, arm, BASE, "pc")
        panel.plot([result.low, result.high], [height, height], color="tab:blue", linewidth=3, solid_capstyle="round")
        panel.plot([result.difference], [height], "o", color="tab:blue", markersize=8)
        each = len(results[arm].prompts) // num_seeds
        gains = [a - b for a, b in zip(results[arm].values["pc"], results[BASE].values["pc"], strict=True)]
        seeds = [sum(gains[start : start + each]) / each for start in range(0, len(gains), each)]
        panel.plot(seeds, [height - 0.25] * num_seeds, "|", color="black", markersize=8)
    panel.axvline(0, color="gray", linewidth=0.8, linestyle="--")
    panel.set_yticks(range(len(arms)), [spec.shown for spec in reversed(ARMS.values()) if spec is not None])
    panel.set_xlabel("mean pc over base: 95 % interval, seeds below")
    panel.locator_params(axis="x", nbins=6)
    panel.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main(sys.argv[1:])
