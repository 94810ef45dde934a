# /// script
# requires-python = ">=3.10"
# dependencies = ["video-trl"]
# ///
"""
Time, arithmetic and memory of a preference step: every step mode and checkpointing policy, next to how other trainers
arrange the same step; then the overhead of the trainer, the speed of cached latents, and one process next to two.

    python examples/studies/steps.py --output_dir outputs/steps            # all of it, on one core
    python examples/studies/steps.py --output_dir outputs/steps --only steps --model tiny --videos 2

Writes results.json and results.md, where other models' and parts' results stay. Every ratio is between numbers of the
same run, measured in turns; times of steps are medians of CPU time, which other programs on the machine disturb less
than they do the clock. Rows named "policy first" stand for other trainers, and the row "(auto)" is what
`step_mode="auto"` takes. Memory is the peak of live tensors in a step, without weights; operations are counted by
torch's formulas.
"""

import argparse
import json
import math
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial, wraps
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from peft import LoraConfig
from torch import Tensor
from transformers import TrainerCallback

from video_trl import VideoDPOConfig, VideoDPOTrainer
from video_trl.data.encoding.store import EncodedDataset, EncodedWriter
from video_trl.losses import dpo_loss, group_dpo_loss, implicit_reward
from video_trl.models import ModelFamily, family_for
from video_trl.trainer.planning.counter import LiveBytes
from video_trl.trainer.planning.estimate import Placement, Workload, fitting_step_mode
from video_trl.trainer.setup.activation_checkpointing import enable_recompute
from video_trl.trainer.step.denoising import Denoising
from video_trl.trainer.step.passes import AdapterReference, SequentialErrors, forward_errors


BETA = 500.0
MODELS = {  # name -> (heads of 32, blocks, latents of a video)
    "tiny": (2, 2, (16, 4, 8, 8)),
    "2k tokens": (4, 4, (16, 8, 32, 32)),
}
POLICIES = (None, "attention", "full")
VIDEOS = {2: "pair", 4: "group of 1 + 3"}
OVERHEAD_STEPS = {"tiny": 100, "2k tokens": 4}
PEERS = ("singles, policy first", "concat, policy first")


def transformer_of(name: str) -> tuple[WanTransformer3DModel, ModelFamily, tuple[int, int, int, int]]:
    """A Wan transformer with an adapter of rank 16 whose output is not zero."""
    heads, blocks, shape = MODELS[name]
    torch.manual_seed(0)
    transformer = WanTransformer3DModel(
        num_attention_heads=heads,
        attention_head_dim=32,
        num_layers=blocks,
        ffn_dim=heads * 32 * 4,
        text_dim=64,
        freq_dim=64,
        qk_norm="rms_norm_across_heads",
    )
    family = family_for(transformer)
    transformer.requires_grad_(False)
    config = LoraConfig(r=16, lora_alpha=16, target_modules=family.lora_target_modules, init_lora_weights=False)
    transformer.add_adapter(config)
    return transformer.train(), family, shape


class Step:
    """One step of a loss over `videos` videos, arranged in one of several ways; gradients are dropped."""

    def __init__(self, name: str, videos: int) -> None:
        self.transformer, self.family, shape = transformer_of(name)
        self.base = AdapterReference(self.transformer)  # for all rows: PEFT's own switch takes longer
        latents, noise = torch.randn(videos, *shape), torch.randn(1, *shape)
        conditions = {"prompt_embeds": torch.randn(1, 32, 64).expand(videos, -1, -1)}
        timesteps = torch.full((videos,), 500.0)
        self.denoising = Denoising(0.5 * latents + 0.5 * noise, timesteps, conditions, noise - latents)

    def errors(self, videos: Denoising) -> Tensor:
        return forward_errors(self.family, self.transformer, videos)

    def checkpoint(self, policy: str | None) -> None:
        self.transformer.disable_gradient_checkpointing()
        if policy is not None:
            enable_recompute(self.transformer, policy)

    def chosen_mode(self) -> str:
        """What `step_mode="auto"` takes on a CPU."""
        shape = tuple(self.denoising.target.shape[1:])
        config = {**self.transformer.config, "_class_name": "WanTransformer3DModel"}
        work = Workload(config, shape, len(self.denoising.timesteps), "adapter")
        return fitting_step_mode(work, Placement(), None, math.prod(self.family.token_grid(self.transformer, shape)))

    def loss(self, policy: Tensor, reference: Tensor) -> Tensor:
        rewards = implicit_reward(policy, reference, BETA)
        if len(rewards) == 2:
            return dpo_loss(rewards[:1], rewards[1:]).mean()
        return group_dpo_loss(rewards[:1], rewards[None, 1:]).mean()

    def reference(self, *, one_by_one: bool) -> Tensor:
        videos = self.denoising.one_by_one() if one_by_one else [self.denoising]
        with torch.no_grad(), self.base():
            return torch.cat([self.errors(video) for video in videos])

    def finetuning(self) -> None:
        """The step of supervised fine-tuning on one video, the yardstick of memory."""
        self.errors(self.denoising[:1]).mean().backward()

    def singles(self) -> None:
        """Policy on one video after the other, all graphs kept, then the reference: how most trainers do it."""
        errors = [self.errors(video) for video in self.denoising.one_by_one()]
        self.loss(torch.cat(errors), self.reference(one_by_one=True)).backward()

    def policy_first(self) -> None:
        """Policy on all videos at once, then the reference: the other common way."""
        errors = self.errors(self.denoising)
        self.loss(errors, self.reference(one_by_one=False)).backward()

    def concat(self, cached: Tensor | None = None) -> None:
        """`step_mode="concat"`."""
        reference = self.reference(one_by_one=False) if cached is None else cached
        self.loss(self.errors(self.denoising), reference).backward()

    def separate(self, cached: Tensor | None = None) -> None:
        """`step_mode="singles"`: as `singles`, but the reference first, so that its tensors meet no graph."""
        reference = self.reference(one_by_one=True) if cached is None else cached
        errors = [self.errors(video) for video in self.denoising.one_by_one()]
        self.loss(torch.cat(errors), reference).backward()

    def sequential(self, cached: Tensor | None = None) -> None:
        """`step_mode="sequential"`."""
        reference = self.reference(one_by_one=True) if cached is None else cached
        errors = SequentialErrors(self.denoising, self.family, self.transformer)
        self.loss(errors.errors, reference).backward()
        errors.backward()


def counted(step: Step, run: Callable[[], None]) -> tuple[int, int]:
    """Operations of a step, and bytes at its peak without the weights."""
    counter = LiveBytes()
    tensors = [*step.transformer.parameters(), *step.transformer.buffers()]
    for tensor in tensors:
        counter.add(tensor)
    weights = counter.live
    with counter:
        run()
    step.transformer.zero_grad(set_to_none=True)
    return counter.flops, counter.peak - weights


def steps(name: str, videos: int, repeats: int) -> list[dict[str, Any]]:
    """Every way to make a step, timed in turns."""
    step = Step(name, videos)
    cached = step.reference(one_by_one=True)
    ways: list[tuple[str, str | None, Callable[[], None]]] = [("SFT, one video", None, step.finetuning)]
    for policy in POLICIES:
        ways += [
            ("singles, policy first", policy, step.singles),
            ("concat, policy first", policy, step.policy_first),
            ("concat", policy, step.concat),
            ("singles", policy, step.separate),
            ("sequential", policy, step.sequential),
            ("concat, cached reference", policy, partial(step.concat, cached)),
            ("singles, cached reference", policy, partial(step.separate, cached)),
            ("sequential, cached reference", policy, partial(step.sequential, cached)),
        ]
    rows = []
    chosen = step.chosen_mode()
    for way, policy, run in ways:
        step.checkpoint(policy)
        flops, peak = counted(step, run)
        row = {"model": name, "videos": videos, "way": way, "recomputed": policy, "flops": flops, "peak": peak}
        rows.append({**row, "auto": way == chosen})
    seconds: list[list[float]] = [[] for _ in ways]
    for _ in range(repeats):
        for measured, (_, policy, run) in zip(seconds, ways, strict=True):
            step.checkpoint(policy)
            start = time.process_time()
            run()
            measured.append(time.process_time() - start)
            step.transformer.zero_grad(set_to_none=True)
    return [{**row, "seconds": statistics.median(times)} for row, times in zip(rows, seconds, strict=True)]


def encoded_pairs(directory: Path, shape: tuple[int, ...], number: int) -> EncodedDataset:
    generator = torch.Generator().manual_seed(0)
    with EncodedWriter(directory, "preference", "benchmark") as writer:
        rows: list[dict[str, Any]] = []
        for index in range(number):
            for kind in ("chosen", "rejected"):
                writer.add(f"{kind}/{index}", torch.randn(shape, generator=generator))
            writer.add(f"prompt/{index}", torch.randn(32, 64, generator=generator))
            row = {"prompt": "", "chosen": f"chosen/{index}", "rejected": [f"rejected/{index}"]}
            rows.append({**row, "prompt_embeds": f"prompt/{index}"})
        writer.finish(rows, [])
    return EncodedDataset(directory)


class TimeOptimizer(TrainerCallback):
    """Times the update of the weights."""

    def __init__(self, timed: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        self.timed = timed

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        kwargs["optimizer"].step = self.timed(kwargs["optimizer"].step)


class Timed(VideoDPOTrainer):
    """Adds up the time of the model: forward passes, backward passes and the optimizer."""

    clock = staticmethod(time.process_time)
    inside = 0.0
    outside = 0.0

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        if self.state.global_step == 2:  # the first steps fill caches
            self.inside, self.outside = 0.0, -self.clock()
        return super().training_step(*args, **kwargs)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self.model.forward = self.timed(self.model.forward)
        self.accelerator.backward = self.timed(self.accelerator.backward)
        self.add_callback(TimeOptimizer(self.timed))
        result = super().train(*args, **kwargs)
        self.outside += self.clock()
        return result

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            start = self.clock()
            try:
                return function(*args, **kwargs)
            finally:
                self.inside += self.clock() - start

        return run


class TimedByTheClock(Timed):
    """As processes that wait for each other must be timed."""

    clock = staticmethod(time.perf_counter)


def trained(name: str, steps_to_time: int, trainer_class: type[Timed], number: int = 8) -> Timed:
    """A trainer that has trained for two steps more, on so many pairs."""
    transformer, _, shape = transformer_of(name)
    transformer.delete_adapters("default")
    with tempfile.TemporaryDirectory() as folder:
        rows = encoded_pairs(Path(folder) / "rows", shape, number)
        options = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "max_sequence_length": 32}
        args = VideoDPOConfig(folder, use_cpu=True, max_steps=steps_to_time + 2, lora_rank=16, **options)
        trainer = trainer_class(transformer, args, rows)
        trainer.train()
    return trainer


def by_hand(name: str, steps_to_time: int) -> float:
    """CPU seconds of as many steps in a loop that does nothing else: rows in memory, no metrics, no checks."""
    step = Step(name, 2)
    run = step.separate if step.chosen_mode() == "singles" else step.concat
    weights = [weight for weight in step.transformer.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-6, fused=True)
    clean = step.denoising.noisy_latents - 0.5 * step.denoising.target
    for number in range(steps_to_time + 2):
        if number == 2:
            start = time.process_time()
        noise = torch.randn_like(clean[:1])
        step.denoising = replace(step.denoising, noisy_latents=0.5 * (clean + noise), target=noise - clean)
        run()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return time.process_time() - start


def overhead(name: str, steps_to_time: int, repeats: int) -> dict[str, float]:
    """Proportion of the time of training that is not the model's, and time next to a loop by hand, in turns."""
    whole, inside, hand = [], [], []
    for _ in range(repeats):
        trainer = trained(name, steps_to_time, Timed)
        whole.append(trainer.outside / steps_to_time)
        inside.append(trainer.inside / steps_to_time)
        hand.append(by_hand(name, steps_to_time) / steps_to_time)
    shares = [1 - model / both for model, both in zip(inside, whole, strict=True)]
    return {
        "CPU seconds a step": statistics.median(whole),
        "outside of the model": statistics.median(shares),
        "CPU seconds by hand": statistics.median(hand),
        "next to it": statistics.median(both / alone for both, alone in zip(whole, hand, strict=True)),
    }


def loading(shape: tuple[int, ...], number: int, repeats: int) -> dict[str, float]:
    """Cached pairs a second, through the dataset and as plain reads of the same files."""
    with tempfile.TemporaryDirectory() as folder:
        rows = encoded_pairs(Path(folder) / "rows", shape, number)
        files = sorted(rows.directory.glob("*.safetensors"))
        through, plain = [], []
        for _ in range(repeats):
            start = time.perf_counter()
            for path in files:
                path.read_bytes()
            plain.append(time.perf_counter() - start)
            rows = EncodedDataset(rows.directory)
            start = time.perf_counter()
            for index in range(len(rows)):
                row = rows[index]
                row["chosen_latents"].sum(), row["rejected_latents"].sum()  # mapped memory is read when it is used
            through.append(time.perf_counter() - start)
    return {
        "pairs_per_second": number / statistics.median(through),
        "plain_reads": number / statistics.median(plain),
        "MB": sum(8 * torch.Size(shape).numel() for _ in range(number)) / 1e6,
    }


def train_for_scaling(name: str, steps_to_time: int) -> None:
    """A process of the scaling measurement: prints the seconds of its steps."""
    trainer = trained(name, steps_to_time, TimedByTheClock, number=16)
    if trainer.is_world_process_zero():
        sys.stdout.write(json.dumps({"seconds": trainer.outside / steps_to_time}) + "\n")


def scaling(name: str, steps_to_time: int, repeats: int) -> dict[str, float]:
    """Rows a second of two processes of one thread each, over twice those of one."""
    seconds: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(repeats):
        for number in seconds:
            with socket.socket() as probe:
                probe.bind(("localhost", 0))
                port = probe.getsockname()[1]
            launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(number), "--master_port", str(port)]
            options = ["--model", name, "--scaling_worker", str(steps_to_time)]
            process = subprocess.run(
                [sys.executable, *launcher, __file__, *options],
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                check=True,
                capture_output=True,
                text=True,
            )
            seconds[number].append(json.loads(process.stdout.strip().splitlines()[-1])["seconds"])
    one, two = (statistics.median(times) for times in seconds.values())
    return {"one_process": one, "two_processes": two, "efficiency": one / two}


def tables(results: dict[str, Any]) -> str:
    """The results as markdown; ratios are to the best of the rows "policy first" with the same checkpointing."""
    lines: list[str] = []
    for name, rows in results.get("steps", {}).items():
        lines += [
            f"### {name}",
            "",
            "| step | recomputed | GFLOP | CPU s | peak, MiB | FLOP ratio | time ratio | peak ratio |",
        ]
        lines += ["|---|---|---|---|---|---|---|---|"]
        for row in rows:
            peers = [each for each in rows if each["way"] in PEERS and each["recomputed"] == row["recomputed"]]
            way = row["way"] + (" (auto)" if row["auto"] else "")
            cells = [way, row["recomputed"] or "nothing", f"{row['flops'] / 1e9:.1f}", f"{row['seconds']:.3f}"]
            ratios = [row[key] / min(peer[key] for peer in peers) for key in ("flops", "seconds", "peak")]
            cells += [f"{row['peak'] / 2**20:.1f}", *(f"{ratio:.2f}" for ratio in ratios)]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    of_models = {f"overhead, {name}": found for name, found in results.get("overhead", {}).items()}
    for part, found in (of_models | {name: results.get(name, {}) for name in ("loading", "scaling")}).items():
        if found:
            lines += [f"- {part}: " + ", ".join(f"{key} {value:.4g}" for key, value in found.items())]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/steps"))
    parser.add_argument("--model", choices=MODELS, help="only this one")
    parser.add_argument("--only", choices=("steps", "overhead", "loading", "scaling"), nargs="+")
    parser.add_argument("--videos", type=int, choices=VIDEOS, help="of steps, only a pair or only a group")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--scaling_worker", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.scaling_worker is not None:
        train_for_scaling(args.model, args.scaling_worker)
        return
    parts = args.only or ("steps", "overhead", "loading", "scaling")
    path = args.output_dir / "results.json"
    results: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    results |= {"command": " ".join(sys.argv), "threads": torch.get_num_threads()}
    args.output_dir.mkdir(parents=True, exist_ok=True)

    def keep(part: str, name: str | None, found: dict[str, Any] | list[dict[str, Any]]) -> None:
        if name is None:
            results[part] = found
        else:
            results.setdefault(part, {})[name] = found
        path.write_text(json.dumps(results, indent=1))
        (args.output_dir / "results.md").write_text(tables(results))

    for part in parts:
        if part == "steps":
            for name in [args.model] if args.model else MODELS:
                for videos in [args.videos] if args.videos else VIDEOS:
                    keep(part, f"{name}, {VIDEOS[videos]}", steps(name, videos, args.repeats))
        elif part == "overhead":
            for name in [args.model] if args.model else MODELS:
                keep(part, name, overhead(name, OVERHEAD_STEPS[name], args.repeats))
        elif part == "loading":
            keep(part, None, loading((16, 21, 60, 104), 32, args.repeats))
        else:
            keep(part, None, scaling(args.model or "2k tokens", 6, args.repeats))
    sys.stdout.write(tables(results))


if __name__ == "__main__":
    main()
