# /// script
# requires-python = ">=3.11"
# dependencies = ["video-trl", "matplotlib"]
# ///
"""
The stability study of Reg-DPO (https://huggingface.co/papers/2511.01450, Section 4.3) on the sandbox.

Its eleven arms: the base model, DPO, a fixed weight r of 0.2, 0.4, 1, 2.4 and 4 times DGR(0) = beta / 4, and r = DGR
times 1/5, 1/2, 1 and 2, each with several training seeds. Every arm and seed leaves one result file; what is there is
not made again, so that the study can be interrupted, continued and shared between processes:

    accelerate launch examples/studies/reg_dpo.py                                  # all of it (make study-regdpo)
    accelerate launch examples/studies/reg_dpo.py --arms dpo dgr-1 --seeds 0 1     # a part of it

and, when all result files are there, its figures and tables:

    accelerate launch examples/studies/reg_dpo.py --report docs/benchmarks/reg_dpo_stability.md
"""

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from video_trl.files import write_atomically


if TYPE_CHECKING:
    from video_trl.data import EncodedDataset
    from video_trl.sandbox import Sandbox

BASE = "base"
# Arm -> (mode, coefficient) of the SFT weight; a fixed one in units of DGR(0), as the paper's 25 ... 500 of 125 are.
ARMS: dict[str, tuple[str, float] | None] = {
    BASE: None,
    "dpo": None,
    "fixed-0.2": ("fixed", 0.2),
    "fixed-0.4": ("fixed", 0.4),
    "fixed-1": ("fixed", 1.0),
    "fixed-2.4": ("fixed", 2.4),
    "fixed-4": ("fixed", 4.0),
    "dgr-0.2": ("dgr", 0.2),
    "dgr-0.5": ("dgr", 0.5),
    "dgr-1": ("dgr", 1.0),
    "dgr-2": ("dgr", 2.0),
}
METRICS = ("loss", "loss/dpo", "loss/sft", "win_gap", "lose_gap", "s_theta", "dgr", "sft_weight", "chosen_weight")
PROMPT_DRAW, NOISE_SEED = 2, 3  # of the held-out evaluation; the setting was chosen on other draws


@dataclass
class Setting:
    """Everything that the numbers depend on; stored in each result file, and files of another setting are refused."""

    num_groups: int = field(default=128, metadata={"help": "Groups of the training set, each with 3 rejected videos."})
    max_steps: int = field(default=240, metadata={"help": "Optimizer steps of each run."})
    eval_every: int = field(default=120, metadata={"help": "Steps between two evaluations; the last step is one."})
    eval_prompts: int = field(default=42, metadata={"help": "Held-out sentences, one video each."})
    batch_size: int = field(default=4, metadata={"help": "Pairs in a step."})
    learning_rate: float = field(default=2e-3, metadata={"help": "Constant after ten steps of warm-up."})
    beta: float = field(default=500.0, metadata={"help": "Beta of the DPO loss."})
    lora_rank: int = field(default=16, metadata={"help": "Rank of the adapter."})
    lora_alpha: int = field(default=32, metadata={"help": "Scale of the adapter."})


@dataclass
class StudyArguments(Setting):
    """What to run."""

    output_dir: str = field(default="outputs/study-regdpo", metadata={"help": "Folder of data and result files."})
    arms: list[str] = field(default_factory=lambda: list(ARMS), metadata={"help": f"Some of {', '.join(ARMS)}."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Training seeds."})
    report: str | None = field(
        default=None,
        metadata={
            "help": "Train nothing; put the tables of all result files into this page, between its two marks, and the "
            "figures beside it."
        },
    )

    def setting(self) -> dict[str, Any]:
        """The part that the numbers depend on."""
        return {name: self.__dict__[name] for name in Setting.__dataclass_fields__}


def main(argv: list[str]) -> None:
    from trl import TrlParser

    (args,) = TrlParser((StudyArguments,)).parse_args_and_config(args=argv)
    unknown = [arm for arm in args.arms if arm not in ARMS]
    if unknown or not args.seeds:
        raise ValueError(f"Expected arms among {list(ARMS)} and at least one seed, got {unknown} and {args.seeds}.")
    if args.report is not None:
        write_report(Path(args.report), load_results(args), args)
        return
    for seed in args.seeds:  # seed by seed: an interrupted study has whole seeds
        for arm in args.arms:
            path = result_path(args, arm, seed)
            if path.is_file():
                read_result(path, args)
            elif arm != BASE or seed == args.seeds[0]:
                write_atomically(path, json.dumps(run_arm(args, arm, seed)))
                print(f"{path} is written.")


def run_arm(args: StudyArguments, arm: str, seed: int) -> dict[str, Any]:
    """Train and evaluate one arm with one seed; the content of its result file."""
    from video_trl.sandbox import load_sandbox
    from video_trl.trainer import CollapseMonitor
    from video_trl.trainer.publishing.sampling import generation

    sandbox = load_sandbox()
    result: dict[str, Any] = {"arm": arm, "seed": seed, "setting": args.setting(), "scores": {}}
    videos = Path(args.output_dir) / "videos" / result_path(args, arm, seed).stem
    if arm == BASE:
        with generation(sandbox.pipeline, sandbox.pipeline.device):
            result["scores"]["0"] = judged(sandbox, args.eval_prompts, videos / "step_0")
        return result
    monitor = CollapseMonitor()
    trainer = make_trainer(args, arm, seed, sandbox)

    class Evaluate(TrainerCallback):
        def on_step_end(self, training_args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            step = state.global_step
            if step % args.eval_every == 0 or step == args.max_steps:
                with generation(sandbox.pipeline, sandbox.pipeline.device):
                    result["scores"][str(step)] = judged(sandbox, args.eval_prompts, videos / f"step_{step}")

    trainer.add_callback(Evaluate())
    trainer.add_callback(monitor)
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "win_gap" in entry]
    result["log"] = [{name: entry[name] for name in ("step", *METRICS) if name in entry} for entry in entries]
    result["collapse"] = monitor.events
    return result


def make_trainer(args: StudyArguments, arm: str, seed: int, sandbox: "Sandbox") -> Any:
    """The trainer of an arm; all arms of a seed start from the same adapter and see the same pairs and noise."""
    from video_trl import VideoDPOConfig, VideoDPOTrainer, VideoRegDPOConfig, VideoRegDPOTrainer

    dataset = training_data(args, sandbox)
    common: dict[str, Any] = {
        "output_dir": str(Path(args.output_dir) / "runs" / f"{arm}-seed{seed}"),
        "overwrite_output_dir": True,  # an arm that was cut off is trained again
        "max_steps": args.max_steps,
        "per_device_train_batch_size": args.batch_size,
        "learning_rate": args.learning_rate,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": 10,
        "lora_rank": args.lora_rank,
        "lora_alpha": args.lora_alpha,
        "beta": args.beta,
        "seed": seed,
        "use_cpu": True,
        "bf16": False,
        "logging_steps": 10,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    weight = ARMS[arm]
    if weight is None:
        return VideoDPOTrainer(sandbox.pipeline, VideoDPOConfig(**common), dataset)
    mode, coefficient = weight
    coefficient *= args.beta / 4 if mode == "fixed" else 1.0
    config = VideoRegDPOConfig(**common, sft_weight_mode=mode, sft_coefficient=coefficient)
    return VideoRegDPOTrainer(sandbox.pipeline, config, dataset)


def training_data(args: StudyArguments, sandbox: "Sandbox") -> "EncodedDataset":
    """The sandbox's group dataset, encoded; made by the first process that needs it while the others wait."""
    from filelock import FileLock

    from video_trl.data import encode_dataset
    from video_trl.models import family_for
    from video_trl.sandbox import build_group_dataset

    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "dataset.lock"):
        groups = build_group_dataset(sandbox, folder / "dataset", num_groups=args.num_groups)
        return encode_dataset(
            groups,
            sandbox.pipeline,
            family_for(sandbox.pipeline.transformer),
            "preference",
            cache_dir=folder / "encoded",
            max_sequence_length=sandbox.call_kwargs["max_sequence_length"],
            device="cpu",
        )


def judged(sandbox: "Sandbox", number: int, folder: Path) -> list[dict[str, Any]]:
    """Scores of one video of each held-out sentence, always from the same noise."""
    from video_trl.evaluation.evaluate import evaluate_pipeline, sandbox_prompts
    from video_trl.evaluation.runs.generate import VideoGenerator

    prompts = sandbox_prompts(number, seed=PROMPT_DRAW)
    generator = VideoGenerator(sandbox.pipeline, "sandbox", fps=8, call_kwargs=dict(sandbox.call_kwargs))
    table = evaluate_pipeline(folder, generator, sandbox.judge, prompts, seeds=[NOISE_SEED])
    return [{name: row[name] for name in ("prompt", "pc", "sa", "video")} for row in table.rows()]


def result_path(args: StudyArguments, arm: str, seed: int) -> Path:
    """The base model is not trained, so it has one file for all seeds."""
    return Path(args.output_dir) / (f"{arm}.json" if arm == BASE else f"{arm}-seed{seed}.json")


def read_result(path: Path, args: StudyArguments) -> dict[str, Any]:
    """
    Raises:
        ValueError: The file was made with another setting.
    """
    result: dict[str, Any] = json.loads(path.read_text())
    if result["setting"] != args.setting():
        raise ValueError(
            f"{path} was made with {result['setting']}, expected {args.setting()}. Pass the same setting, or another "
            "--output_dir."
        )
    return result


def load_results(args: StudyArguments) -> dict[str, list[dict[str, Any]]]:
    """
    The results of each arm, in the order of the seeds.

    Raises:
        ValueError: A result file is missing, or of another setting.
    """
    paths: dict[str, Sequence[Path]] = {
        arm: list(dict.fromkeys(result_path(args, arm, seed) for seed in args.seeds)) for arm in args.arms
    }
    missing = [str(path) for arm_paths in paths.values() for path in arm_paths if not path.is_file()]
    if missing:
        raise ValueError(f"Run the study first; {len(missing)} result files are missing: {', '.join(missing)}.")
    return {arm: [read_result(path, args) for path in arm_paths] for arm, arm_paths in paths.items()}


# ---- The report -----------------------------------------------------------------------------------------------------

Results = dict[str, list[dict[str, Any]]]
MARKS = ("<!-- results of examples/studies/reg_dpo.py -->", "<!-- end of results -->")
LAST_ENTRIES = 5  # of the log that stand for the end of a run


def write_report(page: Path, results: Results, args: StudyArguments) -> None:
    """
    Puts the tables into the page and the figures beside it.

    Raises:
        ValueError: The page has no place for them.
    """
    text = page.read_text() if page.is_file() else ""
    if any(text.count(mark) != 1 for mark in MARKS):
        raise ValueError(f"{page}: expected each of the lines {MARKS} once, between which the tables are written.")
    curves, scores = page.with_name("reg_dpo_curves.png"), page.with_name("reg_dpo_scores.png")
    draw_curves(curves, results)
    draw_scores(scores, results)
    setting = ", ".join(f"{name} {value}" for name, value in args.setting().items())
    block = [
        MARKS[0],
        f"Setting: {setting}; training seeds {', '.join(map(str, args.seeds))}.",
        f"![Training curves of every arm]({curves.name})",
        *training_table(results),
        f"![Judge scores of every arm]({scores.name})",
        *score_table(results),
        *claim_table(results),
        MARKS[1],
    ]
    before, rest = text.split(MARKS[0])
    write_atomically(page, before + "\n\n".join(block) + rest.split(MARKS[1])[1])
    print(f"{page}, {curves} and {scores} are written.")


def at_end(result: dict[str, Any], metric: str) -> float:
    """Mean of a metric over the last entries of a log."""
    values = [entry.get(metric, entry["loss"]) for entry in result["log"][-LAST_ENTRIES:]]
    return float(sum(values) / len(values))


def training_table(results: Results) -> list[str]:
    names = ("dgr", "loss/dpo", "win_gap", "lose_gap", "s_theta")
    rows = [["arm", *(f"`{name}`" for name in names), "`CollapseMonitor` warned at step"]]
    for arm, runs in results.items():
        if arm == BASE:
            continue
        cells = []
        for name in names:
            values = [at_end(run, name) for run in runs]
            cells.append(f"{sum(values) / len(values):.3g} [{min(values):.3g}, {max(values):.3g}]")
        steps = [str(run["collapse"][0]) if run["collapse"] else "never" for run in runs]
        rows.append([arm, *cells, ", ".join(steps)])
    note = f"Mean of the last {LAST_ENTRIES} log entries; mean over seeds [smallest, largest]."
    return ["### At the end of training", note, markdown_table(rows)]


def score_table(results: Results) -> list[str]:
    rows = [["arm", "mean pc", "pc over base", "pc over DPO", "mean sa", "sa over base", "sa over DPO"]]
    for arm in results:
        cells = []
        for score in ("pc", "sa"):
            cells.append(f"{mean(pooled(results, arm, score)):.3f}")
            cells += ["" if arm in (BASE, other) else compared(results, arm, other, score) for other in (BASE, "dpo")]
        rows.append([arm, *cells])
    runs = len(results["dpo"])
    note = (
        f"Last evaluation, {runs} training seeds pooled ({len(pooled(results, 'dpo', 'pc'))} videos an arm). Paired "
        "differences with bootstrap 95 % intervals over sentences; each interval stands for itself, so of "
        f"{2 * (2 * len(results) - 3)} of them about {0.1 * (2 * len(results) - 3):.0f} would exclude zero by chance."
    )
    return ["### Scores of the judge", note, markdown_table(rows)]


def claim_table(results: Results) -> list[str]:
    """The paper's claims (Section 4.3), each with the rule that decides it here; written before there were results."""
    regularised = [arm for arm, weight in ARMS.items() if weight is not None]
    strong = ["fixed-1", "fixed-2.4", "fixed-4", "dgr-1", "dgr-2"]
    dpo = results["dpo"]
    beta = dpo[0]["setting"]["beta"]
    falls = all(
        at_end(run, "dgr") < beta / 8 and min(entry["loss"] for entry in run["log"]) < math.log(2) / 2 for run in dpo
    )
    rises = all(at_end(run, "win_gap") > 0 and at_end(run, "lose_gap") > 0 for run in dpo)
    smaller = [arm for arm in regularised if max(ends(results, arm, "win_gap")) < min(ends(results, "dpo", "win_gap"))]
    negative = [arm for arm in strong if max(ends(results, arm, "win_gap")) < 0]
    higher = [
        arm for arm in regularised if min(ends(results, arm, "chosen_weight")) > max(ends(results, "dpo", "dgr"))
    ]
    worse = [score for score in ("pc", "sa") if difference(results, "dpo", BASE, score).high < 0]
    over_dpo = [score for score in ("pc", "sa") if difference(results, "dgr-1", "dpo", score).low > 0]
    over_base = [score for score in ("pc", "sa") if difference(results, "dgr-1", BASE, score).low > 0]
    apart = [
        f"{a} and {b} ({score})"
        for a, b in (("fixed-1", "fixed-4"), ("dgr-1", "dgr-2"))
        for score in ("pc", "sa")
        if difference(results, a, b, score).excludes_zero
    ]
    differing = ", ".join(apart)
    every_seed = "every seed of the one against every seed of the other"
    rows = [
        ("claim of the paper", "rule here", "outcome"),
        ("DPO: gradient ratio and loss fall sharply", "DGR at the end, loss once halved, every seed", holds(falls)),
        ("... while both gaps rise", "both above 0 at the end, every seed", holds(rises)),
        ("DPO degrades the videos", "pc, sa below base, interval without 0", listed(worse, 2)),
        ("the SFT term curbs the win gap", f"below DPO's, {every_seed}", listed(smaller, len(regularised))),
        ("the win gap is negative from about r = DGR on", "below 0, every seed", listed(negative, len(strong))),
        ("DGR + r stays up where DPO's DGR vanishes", f"above DPO's, {every_seed}", listed(higher, len(regularised))),
        ("r = DGR beats DPO", "pc, sa above, interval without 0", listed(over_dpo, 2)),
        ("r = DGR beats the base model", "pc, sa above, interval without 0", listed(over_base, 2)),
        ("beyond r = DGR nothing changes", "no interval excludes 0", "holds" if not apart else f"fails: {differing}"),
    ]
    return ["### The paper's claims", "The rules were fixed before the study was run.", markdown_table(rows)]


def holds(value: bool) -> str:
    return "holds" if value else "fails"


def listed(names: Sequence[str], number: int) -> str:
    """Which of `number` arms or scores a rule holds for."""
    word = "holds" if len(names) == number else "fails" if not names else "in part"
    return f"{word}: {', '.join(names) or 'none'} ({len(names)} of {number})"


def ends(results: Results, arm: str, metric: str) -> list[float]:
    return [at_end(run, metric) for run in results[arm]]


def pooled(results: Results, arm: str, score: str) -> list[float]:
    """Scores of the last evaluation, seed after seed; those of the base model once for every seed of the others."""
    runs = results[arm] * (len(results["dpo"]) if arm == BASE else 1)
    return [record[score] for run in runs for record in run["scores"][max(run["scores"], key=int)]]


def difference(results: Results, a: str, b: str, score: str) -> Any:
    """Paired difference of two arms; whole sentences are resampled, with the videos of all seeds."""
    from video_trl.evaluation import paired_bootstrap

    prompts = [record["prompt"] for run in results["dpo"] for record in run["scores"][max(run["scores"], key=int)]]
    return paired_bootstrap(pooled(results, a, score), pooled(results, b, score), clusters=prompts)


def compared(results: Results, a: str, b: str, score: str) -> str:
    from video_trl.evaluation import verdict

    result = difference(results, a, b, score)
    words = verdict(result, num_seeds=len(results["dpo"]))
    return f"{result.difference:+.3f} [{result.low:+.3f}, {result.high:+.3f}] {words}"


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    header, *body = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([header, "|" + "---|" * len(rows[0]), *body])


def draw_curves(path: Path, results: Results) -> None:
    """Logged metrics over steps: a line is the mean over seeds, the shade of DPO and r = DGR the range."""
    figure, panels = new_figure(2, 3)
    names = ("dgr", "loss/dpo", "s_theta", "win_gap", "lose_gap", "chosen_weight")
    for name, panel in zip(names, panels, strict=True):
        for arm, style in styles(results).items():
            steps = [entry["step"] for entry in results[arm][0]["log"]]
            fallback = {"loss/dpo": "loss", "chosen_weight": "dgr"}.get(name, name)  # DPO has no weight beside
            columns = [[entry.get(name, entry[fallback]) for entry in run["log"]] for run in results[arm]]
            columns = list(zip(*columns, strict=True))
            panel.plot(steps, [mean(values) for values in columns], label=arm, **style)
            if arm in ("dpo", "dgr-1"):
                low, high = [min(values) for values in columns], [max(values) for values in columns]
                panel.fill_between(steps, low, high, color=style["color"], alpha=0.15, linewidth=0)
        panel.set_title("DGR + r" if name == "chosen_weight" else name)
        panel.set_yscale("symlog", linthresh={"dgr": 1, "loss/dpo": 0.1, "chosen_weight": 10}.get(name, 0.01))
    save_figure(figure, panels, path)


def draw_scores(path: Path, results: Results) -> None:
    """Judge scores of held-out sentences over steps, mean over seeds; step 0 is the base model."""
    figure, panels = new_figure(1, 2)
    for score, panel in zip(("pc", "sa"), panels, strict=True):
        start = mean(pooled(results, BASE, score))
        for arm, style in styles(results).items():
            steps = sorted(map(int, results[arm][0]["scores"]))
            values = [
                mean([record[score] for run in results[arm] for record in run["scores"][str(step)]]) for step in steps
            ]
            panel.plot([0, *steps], [start, *values], label=arm, marker="o", markersize=3, **style)
        panel.axhline(start, color="gray", linewidth=0.8, linestyle=":")
        panel.set_title({"pc": "physics (pc)", "sa": "agreement with the sentence (sa)"}[score])
    save_figure(figure, panels, path)


def styles(results: Results) -> dict[str, dict[str, Any]]:
    """DPO black, fixed weights dashed, dynamic ones solid, the darker the stronger."""
    import matplotlib

    by_arm: dict[str, dict[str, Any]] = {}
    for kind, name, line in (("fixed", "Blues", "--"), ("dgr", "Oranges", "-")):
        arms = [arm for arm in results if arm.startswith(kind)]
        for number, arm in enumerate(arms):
            colour = matplotlib.colormaps[name](0.35 + 0.6 * number / max(len(arms) - 1, 1))
            by_arm[arm] = {"color": colour, "linestyle": line, "linewidth": 1.4}
    return {"dpo": {"color": "black", "linestyle": "-", "linewidth": 1.8}, **by_arm}


def new_figure(rows: int, columns: int) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * columns, 3.2 * rows + 0.5), layout="constrained")
    return figure, list(figure.subplots(rows, columns).flat)


def save_figure(figure: Any, panels: list[Any], path: Path) -> None:
    for panel in panels:
        panel.set_xlabel("step")
        panel.grid(alpha=0.3)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=8)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main(sys.argv[1:])
