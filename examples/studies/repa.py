# /// script
# requires-python = ">=3.10"
# dependencies = ["video-trl[evaluation]"]
# ///
"""
VideoREPA (https://huggingface.co/papers/2505.23656) against its baselines on the sandbox: does alignment with a video
encoder make the model understand more, and learn to make videos faster, than the same training without it?

The shipped model knows as much as the teacher, so that there is nothing to hand on. The study starts from a young
one: the same architecture and autoencoder, few steps from fresh weights. Arms: that base, SFT on the same clips, REPA
(token-wise cosine), TRD, TRD that stops after 30 or 50 % of the steps (SFT stops at 0), TRD on one kind of relations,
at other blocks, with other weights. Beside the trained teacher stands an oracle, whose tokens are the true state of
the scene: what no encoder can better. Measured are a probe
("will the two balls touch?") on hidden states, the denoising error on held-out clips, and on request the judge's
scores of generated videos. Every arm and seed leaves one result file; what is there is not made again, so that the
study can be interrupted and continued:

    accelerate launch examples/studies/repa.py
    accelerate launch examples/studies/repa.py --arms base sft trd --seeds 0 1 2

and, when the result files are there, its tables and figure:

    accelerate launch examples/studies/repa.py --report docs/benchmarks/repa.md --figure docs/assets/repa_study.svg
"""

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from video_trl.files import atomic_file, write_atomically


if TYPE_CHECKING:
    import datasets
    import numpy as np
    from diffusers import DiffusionPipeline
    from torch import Tensor

    from video_trl import VideoREPAConfig
    from video_trl.data.probe_clips import ProbeClip
    from video_trl.evaluation import PairedDifference
    from video_trl.sandbox import Clip, Sandbox


STUDY_CONFIG = Path(__file__).parents[1] / "configs" / "sandbox-repa-study.yaml"
# Clips that neither the sandbox model nor its teacher was trained on, and that training and evaluation do not share
FIRST_HELD_OUT_SEED = 21_000_000
PROMPT_DRAW, NOISE_SEED = 4, 5
BASE, SFT, TRD = "base", "sft", "trd"
# Arm -> what differs from the configuration file.
ARMS: dict[str, dict[str, Any]] = {
    BASE: {},
    SFT: {},
    "repa": {"alignment_loss": "repa"},
    TRD: {"alignment_loss": "trd"},
    "trd-stop-0.3": {"coefficient_cutoff": 0.3},
    "trd-stop-0.5": {"coefficient_cutoff": 0.5},
    "oracle-repa": {"alignment_loss": "repa", "teacher": None},
    "oracle": {"teacher": None},
    "oracle-stop-0.3": {"teacher": None, "coefficient_cutoff": 0.3},
    "oracle-stop-0.5": {"teacher": None, "coefficient_cutoff": 0.5},
    "oracle-no-projector": {"teacher": None, "projector": "none"},
    "trd-spatial": {"relations": "spatial"},
    "trd-temporal": {"relations": "temporal"},
    "trd-paper": {"relation_weighting": "paper"},
    "trd-no-projector": {"projector": "none"},
    "trd-block-2": {"align_layer": 2},
    "trd-block-6": {"align_layer": 6},
    "trd-0.1": {"coefficient": 0.1},
    "trd-2": {"coefficient": 2.0},
    "trd-8": {"coefficient": 8.0},
}
TEACHER, PIXELS, SHIPPED = EXTRAS = ("teacher", "pixels", "shipped model")  # probed beside the base model
PROBE_BLOCK, PROBE_NOISE = 4, 0.5  # of every arm, wherever it was aligned; noise is a proportion of the schedule
EVERY_TOKEN: dict[str, Any] = {"num_slices": 6, "cells": (4, 4)}  # the sandbox has so few that none need be pooled
C_GRID = (1e-3, 1e-2, 1e-1, 1.0)
ERROR_LEVELS = (0.125, 0.375, 0.625, 0.875)  # proportions of the schedule at which the denoising error is measured


@dataclass
class ScriptArguments:
    """What is compared and measured; how each arm is trained is said by [`VideoREPAConfig`]."""

    model_name_or_path: str = field(default="sandbox", metadata={"help": "The study is about the sandbox alone."})
    base_steps: int = field(
        default=150, metadata={"help": "Steps from fresh weights that make the base model; 0: the shipped model."}
    )
    base_clips: int = field(default=1024, metadata={"help": "Clips of its corpus, half of them violated."})
    num_clips: int = field(default=512, metadata={"help": "Simulated clips to train the arms on."})
    arms: list[str] = field(
        default_factory=lambda: [
            *(BASE, SFT, "repa", TRD, "trd-stop-0.3", "trd-stop-0.5", "trd-no-projector"),
            *("oracle-repa", "oracle", "oracle-stop-0.3", "oracle-stop-0.5", "oracle-no-projector"),
            *("trd-spatial", "trd-temporal", "trd-block-2", "trd-block-6", "trd-0.1", "trd-2"),
        ],
        metadata={"help": f"Any of {', '.join(ARMS)}."},
    )
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Training seeds of every arm."})
    probe_train: int = field(default=900, metadata={"help": "Clips that the probe is fitted on; a multiple of 6."})
    probe_test: int = field(default=900, metadata={"help": "Clips that it is tested on; a multiple of 6."})
    probe_seed: int = field(default=21, metadata={"help": "Of the probe's clips; the test clips have the next one."})
    held_out: int = field(default=140, metadata={"help": "Clips for the denoising error."})
    eval_prompts: int = field(default=0, metadata={"help": "Held-out prompts whose videos are judged; 0: no judge."})
    eval_seeds: int = field(default=2, metadata={"help": "Videos of each of them."})
    report: str | None = field(
        default=None, metadata={"help": "Markdown file to write from the result files, without running anything."}
    )
    figure: str | None = field(default=None, metadata={"help": "Picture to write beside the report."})


def main(argv: list[str]) -> None:
    from trl import TrlParser

    from video_trl import VideoREPAConfig

    study, args = TrlParser((ScriptArguments, VideoREPAConfig)).parse_args_and_config(args=argv)
    unknown = [arm for arm in study.arms if arm not in ARMS]
    if unknown or study.model_name_or_path != "sandbox":
        raise ValueError(f"Expected the sandbox and arms of {list(ARMS)}, got {study.model_name_or_path}, {unknown}.")
    folder = Path(args.output_dir)
    if study.report is None:
        run_arms(study, args, folder)
        return
    results = read_results(folder)
    Path(study.report).write_text(report(results))
    if study.figure is not None:
        draw(results, study.figure)


# ---- Running -------------------------------------------------------------------------------------


def run_arms(study: ScriptArguments, args: "VideoREPAConfig", folder: Path) -> None:
    """Train and measure what has no result file yet."""
    from video_trl.sandbox import build_clip_dataset

    folder.mkdir(parents=True, exist_ok=True)
    base = make_base(study, folder)
    clips = build_clip_dataset(folder / "clips", num_clips=study.num_clips)
    material = prepare(study, folder)
    for seed in study.seeds:  # the outer loop, so that an interruption leaves whole seeds
        for arm in study.arms:
            path = folder / "results" / f"{arm}-seed{seed}.json"
            if path.is_file() or (arm == BASE and seed != study.seeds[0]):
                continue
            started = time.process_time()
            trained = folder / f"{arm}-seed{seed}"
            own: dict[str, Any] = {"seed": seed, "data_seed": seed, "output_dir": str(trained)}
            own["overwrite_output_dir"] = True  # an arm that was cut off is trained again
            log = train(arm, base, replace(args, **own), clips)
            seconds = time.process_time() - started
            measured = measure(study, args, arm, base, trained, material)
            result = {"arm": arm, "seed": seed, "log": log, "training_seconds": seconds, **measured}
            result["seconds"] = time.process_time() - started
            write_atomically(path, json.dumps(result, indent=1))


def make_base(study: ScriptArguments, folder: Path) -> str:
    """The base model: the shipped one, or a young one with its autoencoder, trained on a corpus of its own."""
    import torch
    from diffusers import WanTransformer3DModel

    from video_trl.sandbox import load_sandbox
    from video_trl.sandbox.weights.train_transformer import Schedule, TransformerRun, encode_corpus, normalised

    home, work = folder / "base", folder / "base-work"
    if study.base_steps == 0 or (home / "model_index.json").is_file():
        return str(home) if study.base_steps else "sandbox"
    work.mkdir(exist_ok=True)
    pipeline = load_sandbox().pipeline
    torch.manual_seed(5)
    pipeline.transformer = WanTransformer3DModel.from_config(pipeline.transformer.config)
    corpus = [
        encode_corpus(pipeline.vae, work / f"{name}.safetensors", study.base_clips // 2, seed=7, violated=violated)
        for name, violated in (("lawful", False), ("violated", True))
    ]
    mixture = Schedule(lawful=0, mixed=study.base_steps - study.base_steps // 3, final=study.base_steps // 3)
    run = TransformerRun(pipeline, train_text=False, seed=7)
    run.train(*(normalised(pipeline.vae, part) for part in corpus), mixture, work)
    pipeline.save_pretrained(home)
    return str(home)


class OracleTeacher:
    """
    A teacher that looks up the true state of each clip: what is where, how fast and how heavy it is.

    Tokens lie as those of the sandbox's own teacher: two frames of 13 each, behind the first, at 4 x 4 places. Their
    channels are a constant and, of the bodies in a place, the proportion of it that they cover, that times their
    velocity to the right and upwards, and that times their mass (as the radius squared), each in units of its standard
    deviation over all clips. A place without a body has the constant alone.

    Args:
        clips (`datasets.Dataset`): Rows of `build_clip_dataset`, whose files are named by the seeds of their scenes.
    """

    name = "sandbox-oracle"
    grid = (6, 4, 4)

    def __init__(self, clips: "datasets.Dataset") -> None:
        import numpy as np
        import torch

        from video_trl.data.video_io import read_video
        from video_trl.files import fingerprint
        from video_trl.sandbox import simulate
        from video_trl.sandbox.world.prompts import parse_prompt

        states, keys = [], []
        for row in clips:
            clip = simulate(int(Path(row["video"]).stem), motion=parse_prompt(row["prompt"]).motion)
            states.append(scene_state(clip))
            keys.append(read_video(row["video"]).tobytes())
        values = np.stack(states)  # (N, 6, 16, 4)
        values /= values.std(axis=(0, 1, 2))
        tokens = torch.from_numpy(np.concatenate([np.ones_like(values[..., :1]), values], axis=-1)).float()
        self._tokens = dict(zip(keys, tokens, strict=True))
        self.identity = fingerprint(self.name, tokens)

    def __call__(self, video: "Tensor") -> Any:
        """Tokens of clips `(B, T, 3, H, W)` in [0, 1] that it was made with."""
        import torch

        from video_trl.teachers import TeacherTokens

        frames = (video * 255).round().byte().movedim(2, -1).numpy()
        tokens = torch.stack([self._tokens[clip.tobytes()] for clip in frames])
        return TeacherTokens(tokens, self.grid, 1.5 + 2.0 * torch.arange(self.grid[0]))

    def to(self, device: Any) -> "OracleTeacher":
        return self


def scene_state(clip: "Clip") -> "np.ndarray":
    """`(6, 16, 4)`: covered proportion, that times velocity (two channels), that times mass, of each token's place."""
    import numpy as np

    places, side = 4, 16  # a row of places, and points in a place on which the cover is measured
    axis = (np.arange(places * side) + 0.5) / (places * side)
    x, y = np.meshgrid(axis, axis[::-1])  # y up, as positions are
    velocity = np.gradient(clip.positions, 1 / clip.fps, axis=0)  # (T, N, 2), frame heights a second
    state = np.zeros((len(clip.positions), places * places, 4))
    for body, radius in enumerate(clip.scene.appearance.radii):
        for frame, (centre, speed) in enumerate(zip(clip.positions[:, body], velocity[:, body], strict=True)):
            inside = (x - centre[0]) ** 2 + (y - centre[1]) ** 2 < radius**2
            cover = inside.reshape(places, side, places, side).mean(axis=(1, 3)).reshape(-1, 1)
            state[frame] += cover * np.array([1.0, *speed, radius**2])
    return state[1:].reshape(-1, 2, places * places, 4).mean(axis=1)


def train(arm: str, base: str, args: "VideoREPAConfig", clips: "datasets.Dataset") -> list[dict[str, Any]]:
    """Train an arm, leave its weights in `args.output_dir` and return its log; nothing for the base model."""
    from video_trl import VideoREPATrainer, VideoSFTConfig, VideoSFTTrainer

    trainer: Any
    if arm == BASE:
        return []
    if arm == SFT:
        shared = {item.name for item in fields(VideoSFTConfig) if item.init}
        values = {name: value for name, value in vars(args).items() if name in shared}
        trainer = VideoSFTTrainer(base, VideoSFTConfig(**values), clips)
    else:
        own = replace(args, **ARMS[arm])
        trainer = VideoREPATrainer(base, own, clips, teacher=None if own.teacher else OracleTeacher(clips))
    trainer.train()
    trainer.save_model()
    return trainer.state.log_history


# ---- Measuring -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Material:
    """What every arm is measured on; latents `(N, C, F, H, W)`, for all models of the study share an autoencoder."""

    probe_clips: dict[str, list["ProbeClip"]]
    probe_latents: dict[str, "Tensor"]
    held_out_latents: "Tensor"
    held_out_prompts: list[str]


def prepare(study: ScriptArguments, folder: Path) -> Material:
    import numpy as np
    import torch
    from safetensors.torch import load_file, save_file

    from video_trl.evaluation.probes.physion import DiffusionFeatures
    from video_trl.sandbox import load_sandbox, simulate
    from video_trl.sandbox.data.contact_clips import contact_clips

    features = DiffusionFeatures(load_sandbox().pipeline, block=PROBE_BLOCK)

    def encoded(name: str, videos: Sequence[Any]) -> "Tensor":
        path = folder / f"latents-{name}.safetensors"
        if not path.is_file():
            chunks = [np.stack(videos[start : start + 32]) for start in range(0, len(videos), 32)]
            latents = torch.cat([features.encode(torch.from_numpy(chunk)) for chunk in chunks])
            with atomic_file(path) as partial:
                save_file({"latents": latents}, partial)
        return load_file(path)["latents"]

    numbers = {"train": (study.probe_train, study.probe_seed), "test": (study.probe_test, study.probe_seed + 1)}
    probes = {split: contact_clips(number, seed=seed) for split, (number, seed) in numbers.items()}
    latents = {
        split: encoded(f"probe-{numbers[split][1]}-{len(clips)}", [clip.video for clip in clips])
        for split, clips in probes.items()
    }
    held_out = [simulate(FIRST_HELD_OUT_SEED + number) for number in range(study.held_out)]
    return Material(
        probes,
        latents,
        encoded(f"held-out-{study.held_out}", [clip.video for clip in held_out]),
        [clip.prompt for clip in held_out],
    )


def measure(
    study: ScriptArguments, args: "VideoREPAConfig", arm: str, base: str, trained: Path, material: Material
) -> dict[str, Any]:
    """Probes, denoising errors and, if asked for, judge's scores; with the base model, what it is compared with."""
    from video_trl.evaluation.probes.physion import DiffusionFeatures, PixelFeatures, TeacherFeatures, probe_features
    from video_trl.load import load_teacher
    from video_trl.sandbox import load_sandbox

    sandbox = load_sandbox(base) if base != "sandbox" else load_sandbox()
    if arm != BASE:  # what is measured is what was saved, loaded the way a user will load it
        load_trained(sandbox.pipeline, trained)

    def of_pipeline(pipeline: "DiffusionPipeline") -> Any:
        return DiffusionFeatures(pipeline, block=PROBE_BLOCK, noise_levels=(PROBE_NOISE,), **EVERY_TOKEN)

    probes = {arm: probed(of_pipeline(sandbox.pipeline), material)}
    if arm == BASE:
        probes[SHIPPED] = probed(of_pipeline(load_sandbox().pipeline), material)
        others: dict[str, Any] = {TEACHER: TeacherFeatures(load_teacher(args.teacher or "sandbox"), **EVERY_TOKEN)}
        for name, features in {**others, PIXELS: PixelFeatures()}.items():
            clips = material.probe_clips
            probes[name] = asdict(probe_features(features, clips["train"], clips["test"], name=name, c_grid=C_GRID))
    return {
        "probes": probes,
        "errors": denoising_errors(sandbox.pipeline, material),
        "records": judged_videos(study, sandbox, trained) if study.eval_prompts else [],
    }


def load_trained(pipeline: "DiffusionPipeline", trained: Path) -> None:
    if (trained / "transformer").is_dir():
        pipeline.transformer = type(pipeline.transformer).from_pretrained(trained, subfolder="transformer")
    else:
        pipeline.load_lora_weights(trained, weight_name="pytorch_lora_weights.safetensors")


def probed(features: Any, material: Material) -> dict[str, Any]:
    """Result of a probe on hidden states of the latents at hand."""
    import torch

    from video_trl.evaluation.probes.physion import fit_probe

    by_split = {
        split: torch.cat([features.of_latents(chunk)[:, 0] for chunk in latents.split(64)]).numpy()
        for split, latents in material.probe_latents.items()
    }
    clips = material.probe_clips
    return asdict(fit_probe(by_split["train"], clips["train"], by_split["test"], clips["test"], c_grid=C_GRID))


def denoising_errors(pipeline: "DiffusionPipeline", material: Material) -> list[float]:
    """Velocity error of each held-out clip, mean over the noise levels; the same noise for every model."""
    import torch

    from video_trl.losses import velocity_error
    from video_trl.models import family_for
    from video_trl.sandbox.weights.pipeline import MAX_PROMPT_TOKENS

    family = family_for(pipeline.transformer, pipeline.scheduler)
    latents, prompts = material.held_out_latents, material.held_out_prompts
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    rows = []
    with torch.no_grad():
        for start in range(0, len(latents), 56):
            part = slice(start, start + 56)
            clean, noises = latents[part], noise[part]
            encoded = family.encode_prompt(pipeline, prompts[part], MAX_PROMPT_TOKENS)
            conditions = family.pad_prompts(encoded, MAX_PROMPT_TOKENS)
            errors = []
            for level in ERROR_LEVELS:
                u = torch.full((len(clean),), level, dtype=torch.float64)
                timesteps = family.noise_process.sample_timesteps(u, scheme="uniform")
                noisy = family.noise_process.add_noise(clean, noises, timesteps)
                prediction = family.predict(pipeline.transformer, noisy, timesteps, conditions)
                target = family.noise_process.velocity(clean, noises, timesteps)
                errors.append(velocity_error(prediction, target))
            rows += torch.stack(errors).mean(0).tolist()
    return rows


def judged_videos(study: ScriptArguments, sandbox: "Sandbox", trained: Path) -> list[dict[str, Any]]:
    from video_trl.evaluation.evaluate import evaluate_pipeline, sandbox_prompts
    from video_trl.evaluation.runs.generate import VideoGenerator

    return evaluate_pipeline(
        trained / "videos",
        VideoGenerator(sandbox.pipeline, "sandbox", fps=8, call_kwargs=dict(sandbox.call_kwargs)),
        sandbox.judge,
        sandbox_prompts(study.eval_prompts, seed=PROMPT_DRAW),
        seeds=[NOISE_SEED + k for k in range(study.eval_seeds)],
        name=trained.name,
    ).rows()


# ---- Reporting -----------------------------------------------------------------------------------

Results = dict[str, list[dict[str, Any]]]  # arm -> what its result files hold


def read_results(folder: Path) -> Results:
    by_arm: Results = {}
    for path in sorted((folder / "results").glob("*.json")):
        result = json.loads(path.read_text())
        by_arm.setdefault(result["arm"], []).append(result)
    if BASE not in by_arm or SFT not in by_arm:
        raise ValueError(f"Expected results of {BASE!r} and {SFT!r} in {folder / 'results'}, got {sorted(by_arm)}.")
    return {arm: by_arm[arm] for arm in ARMS if arm in by_arm}


def report(results: Results) -> str:
    """Tables of all result files: probe, denoising error, judge, and what the training log says in the end."""
    minutes = sum(result["seconds"] for runs in results.values() for result in runs) / 60
    judged = any(result["records"] for result in results[BASE])
    lines = [
        f"{len(results[SFT])} training seeds, {minutes:.0f} CPU minutes. Differences are paired (same clips and "
        "noise, of two arms the same seeds) and pooled over seeds; the bootstrap resamples clips, not seeds, 95 %. "
        "The words of a column are those of a sign test over clips, corrected by Holm's method for its rows.",
        "",
        '## Probe: "will the two balls touch?"',
        "",
        "Proportion of test clips answered right; chance is 0.5.",
        "",
        *probe_table(results),
        "",
        "## Denoising error of held-out clips",
        "",
        *difference_table(results, errors, "mean error", "error below {}"),
        "",
        "## End of training",
        "",
        *log_table(results),
        "",
    ]
    if judged:
        table = difference_table(results, physics, "mean pc", "pc over {}")
        lines += ["## Judge: generated videos of held-out sentences", "", *table, ""]
    return "\n".join(lines)


Measured = list[tuple[str, float]]  # of one run: what was measured, by clip; larger is better
Measure = Callable[[dict[str, Any], str], Measured]


def answers(result: dict[str, Any], name: str) -> Measured:
    return [(str(number), float(right)) for number, right in enumerate(result["probes"][name]["correct"])]


def errors(result: dict[str, Any], name: str) -> Measured:
    return [(str(number), -error) for number, error in enumerate(result["errors"])]


def physics(result: dict[str, Any], name: str) -> Measured:
    return [(record["prompt"], record["pc"]) for record in result["records"]]


def probe_table(results: Results) -> list[str]:
    from video_trl.evaluation import proportion_of

    scenarios = list(dict.fromkeys(results[BASE][0]["probes"][BASE]["scenarios"]))
    heads = [*scenarios, "all", "all over base", "all over SFT"]
    lines = ["| features | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    names = [*results, *EXTRAS]
    columns = [compared(results, answers, names, other) for other in (BASE, SFT)]
    for name in names:
        probes = [run["probes"][name] for run in results.get(name, results[BASE])]
        cells = []
        for scenario in (*scenarios, None):
            pairs = [
                (number, right)
                for probe in probes
                for number, (right, where) in enumerate(zip(probe["correct"], probe["scenarios"], strict=True))
                if scenario in (None, where)
            ]
            accuracy = proportion_of([right for _, right in pairs], clusters=[number for number, _ in pairs])
            cells.append(f"{accuracy.value:.3f}" + ("" if scenario else f" [{accuracy.low:.3f}, {accuracy.high:.3f}]"))
        cells += [column[name] for column in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def difference_table(results: Results, measured: Measure, head: str, over: str) -> list[str]:
    """Mean of each arm, and its paired differences from base and SFT."""
    lines = [f"| arm | {head} | {over.format('base')} | {over.format('SFT')} |", "|---" * 4 + "|"]
    columns = [compared(results, measured, list(results), other) for other in (BASE, SFT)]
    for arm, runs in results.items():
        values = [abs(value) for run in runs for _, value in measured(run, arm)]
        cells = [column[arm] for column in columns]
        lines.append(f"| {arm} | {sum(values) / len(values):.4f} | {cells[0]} | {cells[1]} |")
    return lines


def log_table(results: Results) -> list[str]:
    """Means of the last four log entries of every run, and the cost of training."""
    metrics = ("loss/diffusion", "loss/alignment", "trd/raw")
    heads = ["loss", *(f"`{name}`" for name in metrics), "CPU seconds"]
    lines = ["| arm | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for arm, runs in results.items():
        if arm == BASE:
            continue
        entries = [entry for run in runs for entry in [entry for entry in run["log"] if "loss" in entry][-4:]]
        values = [[float(entry[name]) for entry in entries if name in entry] for name in ("loss", *metrics)]
        cells = [f"{sum(value) / len(value):.4f}" if value else "" for value in values]
        seconds = sum(run["training_seconds"] for run in runs) / len(runs)
        lines.append(f"| {arm} | " + " | ".join(cells) + f" | {seconds:.0f} |")
    return lines


def paired(results: Results, measured: Measure, ours: str, theirs: str) -> tuple[list[float], list[float], list[str]]:
    """
    Values of all runs of two arms, and their clips; what has no training seeds stands against every seed of the other.
    """
    runs = [[measured(run, name) for run in results.get(name, results[BASE])] for name in (ours, theirs)]
    number = max(map(len, runs))
    a, b = (values * number if len(values) == 1 else values for values in runs)
    ours_flat, theirs_flat = ([value for run in arm for _, value in run] for arm in (a, b))
    return ours_flat, theirs_flat, [label for run in a for label, _ in run]


def difference(results: Results, measured: Measure, ours: str, theirs: str) -> "PairedDifference":
    """Paired difference of all runs of two arms. Larger is better for everything that is `measured`."""
    from video_trl.evaluation import paired_bootstrap

    a, b, labels = paired(results, measured, ours, theirs)
    return paired_bootstrap(a, b, clusters=labels)


def compared(results: Results, measured: Measure, names: Sequence[str], theirs: str) -> dict[str, str]:
    """Each of `names` against another, in words, corrected for their number; empty for that one and the base."""
    from video_trl.evaluation import holm, prompt_sign_test, verdict

    names = [name for name in names if name not in (BASE, theirs)]
    pairs = [paired(results, measured, name, theirs) for name in names]
    adjusted = holm([prompt_sign_test(a, b, labels) for a, b, labels in pairs])
    cells = {BASE: "", theirs: ""}
    for name, p in zip(names, adjusted, strict=True):
        found = difference(results, measured, name, theirs)
        number = max(len(results.get(each, results[BASE])) for each in (name, theirs))
        sizes = f"{found.difference:+.4f} [{found.low:+.4f}, {found.high:+.4f}]"
        cells[name] = f"{sizes} {verdict(found, num_seeds=number, p_adjusted=p)}"
    return cells


def draw(results: Results, path: str) -> None:
    """Paired differences from SFT with their intervals: answers of the probe, and denoising error."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    arms = [arm for arm in results if arm not in (BASE, SFT)]
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 0.4 * len(arms) + 1.6), sharey=True)
    titles = ("probe: proportion of right answers", "denoising error, below SFT's")
    for axis, measured, title in zip(axes, (answers, errors), titles, strict=True):
        for row, arm in enumerate(arms):
            result = difference(results, measured, arm, SFT)
            axis.plot([result.low, result.high], [row, row], color="tab:blue")
            axis.plot(result.difference, row, "o", color="tab:blue")
        axis.axvline(0, color="grey", linewidth=0.8)
        axis.set_title(title, fontsize=10)
        axis.locator_params(axis="x", nbins=6)
        axis.set_xlabel("difference from SFT on the same clips; right is better")
    axes[0].set_yticks(range(len(arms)), arms)
    axes[0].invert_yaxis()
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


if __name__ == "__main__":
    argv = sys.argv[1:]
    main(argv if "--config" in argv else ["--config", str(STUDY_CONFIG), *argv])
