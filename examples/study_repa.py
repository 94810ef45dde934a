# /// script
# requires-python = ">=3.11"
# dependencies = ["video-trl[evaluation]"]
# ///
"""
VideoREPA (https://huggingface.co/papers/2505.23656) against its baselines on the sandbox: does alignment with a video
encoder make the model understand more (probe), and make better videos (judge), than the same training without it?

Arms: the base model, SFT on the same clips, REPA (token-wise cosine), TRD; on request TRD on one kind of relations, at
another block, with another weight. Every arm and seed leaves one result file; what is there is not made again, so that
the study can be interrupted and continued:

    accelerate launch examples/study_repa.py
    accelerate launch examples/study_repa.py --arms trd-spatial trd-temporal --seeds 0 1 2

and, when the result files are there, its tables:

    accelerate launch examples/study_repa.py --report docs/benchmarks/repa.md
"""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    import datasets

    from video_trl import VideoREPAConfig


SANDBOX_CONFIG = Path(__file__).parent / "configs" / "sandbox-repa.yaml"
FIRST_SEED = 20_000_000  # away from the clips that the sandbox model and its teacher were trained on
PROMPT_DRAW, NOISE_SEED = 4, 5  # of the held-out evaluation; settings are chosen on other draws
PROBE_SEEDS = {"train": 11, "test": 12}
BASE, SFT = "base", "sft"
# Arm -> what differs from the configuration file.
ARMS: dict[str, dict[str, Any]] = {
    BASE: {},
    SFT: {},
    "repa": {"alignment_loss": "repa"},
    "trd": {"alignment_loss": "trd"},
    "trd-spatial": {"relations": "spatial"},
    "trd-temporal": {"relations": "temporal"},
    "trd-paper": {"relation_weighting": "paper"},
    "trd-no-projector": {"projector": "none"},
    "trd-block-2": {"align_layer": 2},
    "trd-block-5": {"align_layer": 5},
    "trd-0.1": {"coefficient": 0.1},
    "trd-2": {"coefficient": 2.0},
}
TEACHER, PIXELS = "teacher", "pixels"
NOISE_LEVELS = (0.1, 0.5)  # shares of the schedule; the probe takes the one that cross-validation favours
EVERY_TOKEN: dict[str, Any] = {"num_slices": 6, "cells": (4, 4)}  # the sandbox has so few that none need be pooled


@dataclass
class StudyArguments:
    """What is compared and measured; how each arm is trained is said by [`VideoREPAConfig`]."""

    model_name_or_path: str = field(default="sandbox", metadata={"help": "The study is about the sandbox alone."})
    num_clips: int = field(default=256, metadata={"help": "Simulated clips to train on."})
    arms: list[str] = field(
        default_factory=lambda: [BASE, SFT, "repa", "trd"], metadata={"help": f"Any of {', '.join(ARMS)}."}
    )
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Training seeds of every arm."})
    eval_prompts: int = field(default=84, metadata={"help": "Held-out prompts that are judged."})
    eval_seeds: int = field(default=2, metadata={"help": "Videos of each of them."})
    probe_train: int = field(default=480, metadata={"help": "Clips that the probe is fitted on; a multiple of 6."})
    probe_test: int = field(default=480, metadata={"help": "Clips that it is tested on; a multiple of 6."})
    report: str | None = field(
        default=None, metadata={"help": "Markdown file to write from the result files, without running anything."}
    )


def main(argv: list[str]) -> None:
    from trl import TrlParser

    from video_trl import VideoREPAConfig

    study, args = TrlParser((StudyArguments, VideoREPAConfig)).parse_args_and_config(args=argv)
    unknown = [arm for arm in study.arms if arm not in ARMS]
    if unknown or study.model_name_or_path != "sandbox":
        raise ValueError(f"Expected the sandbox and arms of {list(ARMS)}, got {study.model_name_or_path}, {unknown}.")
    folder = Path(args.output_dir)
    if study.report is None:
        run_arms(study, args, folder)
    else:
        Path(study.report).write_text(report(folder))


# ---- Running -------------------------------------------------------------------------------------


def run_arms(study: StudyArguments, args: "VideoREPAConfig", folder: Path) -> None:
    """Train and measure what has no result file yet."""
    from video_trl.sandbox.probe import contact_clips

    clips = simulated_clips(study.num_clips, folder / "clips")
    numbers = {"train": study.probe_train, "test": study.probe_test}
    probes = {split: contact_clips(numbers[split], seed=seed) for split, seed in PROBE_SEEDS.items()}
    for arm in study.arms:
        for seed in study.seeds if arm != BASE else study.seeds[:1]:
            path = folder / "results" / f"{arm}-seed{seed}.json"
            if path.is_file():
                continue
            started = time.process_time()
            adapter = folder / f"{arm}-seed{seed}"
            log = train(arm, replace(args, seed=seed, data_seed=seed, output_dir=str(adapter)), clips)
            result = {"arm": arm, "seed": seed, "log": log, **measure(study, args, arm, adapter, probes)}
            result["seconds"] = time.process_time() - started
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(result, indent=1))


def train(arm: str, args: "VideoREPAConfig", clips: "datasets.Dataset") -> list[dict[str, Any]]:
    """Train an arm, leave its adapter in `args.output_dir` and return its log; nothing for the base model."""
    from video_trl import VideoREPATrainer, VideoSFTConfig, VideoSFTTrainer

    trainer: Any
    if arm == BASE:
        return []
    if arm == SFT:
        shared = {item.name for item in fields(VideoSFTConfig) if item.init}
        values = {name: value for name, value in vars(args).items() if name in shared}
        trainer = VideoSFTTrainer("sandbox", VideoSFTConfig(**values), clips)
    else:
        trainer = VideoREPATrainer("sandbox", replace(args, **ARMS[arm]), clips)
    trainer.train()
    trainer.save_model()
    return trainer.state.log_history


def measure(
    study: StudyArguments, args: "VideoREPAConfig", arm: str, adapter: Path, probes: dict[str, list[Any]]
) -> dict[str, Any]:
    """Judge's scores of held-out prompts, and probes: of the model; with the base model, of teacher and pixels too."""
    from video_trl.evaluation.physion import DiffusionFeatures, PixelFeatures, TeacherFeatures, probe
    from video_trl.sandbox import load_sandbox
    from video_trl.sandbox.benchmark import balanced_prompts, evaluate
    from video_trl.teachers import load_teacher

    sandbox = load_sandbox()
    if arm != BASE:  # what is measured is what was saved, loaded the way a user will load it
        sandbox.pipeline.load_lora_weights(adapter, weight_name="pytorch_lora_weights.safetensors")
    records = evaluate(
        sandbox.pipeline,
        sandbox.judge,
        prompts=balanced_prompts("heldout", study.eval_prompts, seed=PROMPT_DRAW),
        seeds=[NOISE_SEED + k for k in range(study.eval_seeds)],
        call_kwargs=dict(sandbox.call_kwargs),
        output_dir=adapter / "videos",
        name=adapter.name,
    )
    features: dict[str, Any] = {
        arm: DiffusionFeatures(
            sandbox.pipeline, block=int(ARMS[arm].get("align_layer", args.align_layer)), cells=(2, 2)
        )
    }
    if arm == BASE:
        features[TEACHER] = TeacherFeatures(load_teacher(args.teacher or "sandbox"), **EVERY_TOKEN)
        features[PIXELS] = PixelFeatures()
    results = {name: probe(kind, probes["train"], probes["test"], name=name) for name, kind in features.items()}
    return {
        "records": [asdict(record) for record in records],
        "probes": {name: asdict(result) for name, result in results.items()},
    }


def simulated_clips(number: int, folder: Path) -> "datasets.Dataset":
    """Clips that obey the laws of motion, written as mp4 files, with their sentences."""
    import datasets

    from video_trl.data.video_io import write_video
    from video_trl.sandbox import simulate

    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for seed in range(FIRST_SEED, FIRST_SEED + number):
        clip = simulate(seed)
        rows.append({"prompt": clip.prompt, "video": str(write_video(folder / f"{seed}.mp4", clip.video, clip.fps))})
    return datasets.Dataset.from_list(rows)


# ---- Reporting -----------------------------------------------------------------------------------


def report(folder: Path) -> str:
    """Tables of all result files: judge, probe, and what the training log says in the end."""
    results: dict[str, list[dict[str, Any]]] = {}
    for path in sorted((folder / "results").glob("*.json")):
        result = json.loads(path.read_text())
        results.setdefault(result["arm"], []).append(result)
    if BASE not in results or SFT not in results:
        raise ValueError(f"Expected results of {BASE!r} and {SFT!r} in {folder / 'results'}, got {sorted(results)}.")
    order = [arm for arm in ARMS if arm in results]
    minutes = sum(result["seconds"] for runs in results.values() for result in runs) / 60
    count = len(results[SFT])
    return "\n".join(
        [
            "# VideoREPA on the sandbox",
            "",
            "```bash",
            "accelerate launch examples/study_repa.py",
            f"accelerate launch examples/study_repa.py --report docs/benchmarks/repa.md   # {minutes:.0f} CPU minutes",
            "```",
            "",
            f"{count} training seeds. Differences are paired (same prompts and noise; same clips), pooled over seeds; "
            "the bootstrap resamples whole prompts or clips, 95 %.",
            "",
            "## Judge: generated videos of held-out prompts",
            "",
            *judge_table(order, results),
            "",
            '## Probe: "will the two balls touch?"',
            "",
            "Share of test clips answered right, with its Wilson interval; chance is 0.5. "
            "`teacher` is the encoder that the model was aligned with, `pixels` the frames at 8 x 8 without a model.",
            "",
            *probe_tables(order, results),
            "",
            "## End of training",
            "",
            *log_table(order, results),
            "",
        ]
    )


def judge_table(order: Sequence[str], results: dict[str, list[dict[str, Any]]]) -> list[str]:
    from video_trl.evaluation import wilson_interval

    lines = ["| arm | pc | sa | right in both | pc over base | pc over SFT |", "|---" * 6 + "|"]
    for arm in order:
        records = [record for result in results[arm] for record in result["records"]]
        means = [sum(record[name] for record in records) / len(records) for name in ("pc", "sa")]
        right = int(sum(record["joint"] for record in records))
        low, high = wilson_interval(right, len(records))
        over = [
            "" if other == arm or arm == BASE else difference(*(judged(results[name], "pc") for name in (arm, other)))
            for other in (BASE, SFT)
        ]
        shown = f"{means[0]:.3f} | {means[1]:.3f} | {right}/{len(records)} [{low:.2f}, {high:.2f}]"
        lines.append(f"| {arm} | {shown} | {over[0]} | {over[1]} |")
    return lines


def probe_tables(order: Sequence[str], results: dict[str, list[dict[str, Any]]]) -> list[str]:
    from video_trl.evaluation import wilson_interval

    names = [*order, TEACHER, PIXELS]
    runs = {name: [result["probes"][name] for result in results.get(name, results[BASE])] for name in names}
    scenarios = list(dict.fromkeys(runs[BASE][0]["scenarios"]))
    lines = [
        "| features | " + " | ".join([*scenarios, "all"]) + " | over base | over SFT |",
        "|---" * (len(scenarios) + 4) + "|",
    ]
    for name in names:
        cells = []
        for scenario in (*scenarios, None):
            kept = [
                right
                for run in runs[name]
                for right, where in zip(run["correct"], run["scenarios"], strict=True)
                if scenario in (None, where)
            ]
            low, high = wilson_interval(sum(kept), len(kept))
            cells.append(f"{sum(kept) / len(kept):.3f} [{low:.2f}, {high:.2f}]")
        over = [
            "" if name in (other, BASE) else difference(answered(runs[name]), answered(runs[other]))
            for other in (BASE, SFT)
        ]
        lines.append(f"| {name} | " + " | ".join([*cells, *over]) + " |")
    return lines


def log_table(order: Sequence[str], results: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Means of the last tenth of every run."""
    metrics = ("loss/diffusion", "loss/alignment", "trd/raw")
    lines = ["| arm | loss | " + " | ".join(f"`{name}`" for name in metrics) + " |", "|---" * (len(metrics) + 2) + "|"]
    for arm in order:
        ends = [[entry for entry in result["log"] if "loss" in entry][-4:] for result in results[arm]]
        entries = [entry for end in ends for entry in end]
        values = [[entry[name] for entry in entries if name in entry] for name in ("loss", *metrics)]
        cells = [f"{float(sum(map(float, value))) / len(value):.4f}" if value else "" for value in values]
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return lines


Measured = list[tuple[str, list[float]]]  # of each run: what was measured, by prompt or clip


def judged(runs: Sequence[dict[str, Any]], metric: str) -> list[Measured]:
    return [[(record["prompt"], [record[metric]]) for record in run["records"]] for run in runs]


def answered(runs: Sequence[dict[str, Any]]) -> list[Measured]:
    return [[(str(number), [float(right)]) for number, right in enumerate(run["correct"])] for run in runs]


def difference(ours: list[Measured], theirs: list[Measured]) -> str:
    """Paired difference of all runs; a model without training seeds stands against every seed of the other."""
    from video_trl.evaluation import paired_bootstrap, verdict

    number = max(len(ours), len(theirs))
    a, b = (runs * number if len(runs) == 1 else runs for runs in (ours, theirs))
    labels = [label for run in a for label, _ in run]
    values = [[value for run in runs for _, cell in run for value in cell] for runs in (a, b)]
    found = paired_bootstrap(*values, clusters=labels)
    text = f"{found.difference:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"
    return f"{text} {verdict(found, num_seeds=number)}"


if __name__ == "__main__":
    given = sys.argv[1:]
    main(given if "--config" in given else ["--config", str(SANDBOX_CONFIG), "--output_dir", "outputs/repa", *given])
