# /// script
# requires-python = ">=3.10"
# dependencies = ["video-trl"]
# ///
"""
A training step at real sizes on one GPU: Wan2.1-1.3B and 14B with random weights, latents of 81 frames at 480 x 832.

    python examples/studies/gpu.py --plan                  # anywhere, minutes of a CPU: what is expected
    python examples/studies/gpu.py --minutes 10            # on the GPU

The script itself can be tried on a CPU: the same two commands with `--tiny`.

Both write into outputs/gpu: plan.json, and after every measurement results.json, so that a run that is cut keeps what
it has; started again, it goes on with what is missing. A measurement whose operations, at the rate that was measured,
would not end within the minutes left is passed over, and the next one tried.

A step is what a trainer does with one row: reference, policy, loss, backward passes, AdamW. LoRA of rank 48 in float32
on a base in bfloat16, activation checkpointing unless said otherwise. Memory is the peak that the allocator has given
out (on a CPU, that of live tensors); "plan" is what `count_step` says of the same step, AdamW's moments included.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import convert_outputs_to_fp32
from diffusers import ModelMixin
from peft import LoraConfig
from torch import Tensor

from video_trl.losses import dpo_loss, implicit_reward
from video_trl.models import TRANSFORMERS, ModelFamily, family_for
from video_trl.models.checkpoints import known_checkpoint
from video_trl.trainer.planning.counter import LiveBytes
from video_trl.trainer.planning.estimate import Estimate, Placement, Workload, estimate
from video_trl.trainer.setup.activation_checkpointing import enable_recompute
from video_trl.trainer.setup.attention_and_compile import compile_blocks, set_attention_backend
from video_trl.trainer.setup.offloaded_weights import offload_weights, restore_weights
from video_trl.trainer.step.denoising import Denoising
from video_trl.trainer.step.passes import AdapterReference, SequentialErrors, forward_errors


LIMIT = 80 * 10**9  # bytes of the GPU that the longest clip is to fit
SIZE = (81, 480, 832)  # frames, height and width in pixels
MODELS = {"1.3B": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "14B": "Wan-AI/Wan2.1-T2V-14B-Diffusers"}
TINY = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16, "ffn_dim": 64, "text_dim": 32}
TINY_SIZE = (9, 64, 64)
BACK_ENDS = ("_native_flash", "_native_cudnn", "_native_efficient", "flash", "_flash_3")


@dataclass(frozen=True)
class Case:
    """One measurement: a model, and how its step is made."""

    model: str
    what: str
    mode: str = "sequential"  # "sft": one video and no reference
    policy: str | None = "full"
    reference: str = "adapter"  # or "copy"
    rank: int | None = 48
    attention: str | None = None
    compiled: bool = False
    offloaded: bool = False
    frames: int = SIZE[0]

    @property
    def videos(self) -> int:
        return 1 if self.mode == "sft" else 2

    @property
    def key(self) -> str:
        return f"{self.model}, {self.what}"


def cases() -> list[Case]:
    """In the order in which they are worth their time."""
    small, large = "1.3B", "14B"
    first = [Case(small, mode, mode) for mode in ("sft", "singles", "concat", "sequential")]
    # Table 2d of PhyGDPO; the first two rows of it are "sft" and "singles".
    first += [Case(small, "a copy under LoRA", "singles", reference="copy")]
    first += [Case(small, "a copy, all weights", "singles", reference="copy", rank=None)]
    first += [Case(large, "sequential"), Case(large, "sft", "sft"), Case(large, "singles", "singles")]
    first += [Case(large, "weights on the host", policy="offload", offloaded=True)]
    first += [Case(small, f"recomputed: {policy}", policy=policy) for policy in ("attention", "offload")]
    first += [Case(small, f"attention {name}", attention=name) for name in BACK_ENDS]
    first += [Case(small, "weights on the host", offloaded=True)]
    return [*first, Case(small, "compiled", compiled=True), Case(large, "concat", "concat")]


class Study:
    """
    Measurements, written as they come.

    Args:
        directory (`Path`): Of plan.json and results.json.
        minutes (`float`): Budget of the whole run.
        tiny (`bool`): Tiny models of two blocks, to try the script.
    """

    def __init__(self, directory: Path, minutes: float, *, tiny: bool) -> None:
        self.directory, self.tiny, self.end = directory, tiny, time.monotonic() + 60 * minutes
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        directory.mkdir(parents=True, exist_ok=True)
        self.path = directory / "results.json"
        self.results: dict[str, Any] = json.loads(self.path.read_text()) if self.path.is_file() else {}
        self.results["command"] = " ".join(sys.argv)
        self.rate = 0.0
        self._loaded: tuple[tuple[Any, ...], Step] | None = None

    def workload(self, case: Case) -> Workload:
        known = known_checkpoint(MODELS[case.model])
        assert known is not None
        config = {**known["transformer"], **(TINY if self.tiny else {})}
        frames, height, width = (
            replace_frames(TINY_SIZE, case.frames) if self.tiny else replace_frames(SIZE, case.frames)
        )
        shape = (config["in_channels"], (frames - 1) // 4 + 1, height // 8, width // 8)
        reference: Any = "none" if case.mode == "sft" else case.reference
        tokens = 8 if self.tiny else 512
        return Workload(config, shape, case.videos, reference, lora_rank=case.rank, prompt_tokens=tokens)

    def expected(self, case: Case) -> Estimate:
        mode: Any = "concat" if case.mode == "sft" else case.mode
        placement = Placement(step_mode=mode, checkpointing_policy=case.policy, offload_weights=case.offloaded)
        return estimate(self.workload(case), placement)

    def plan(self) -> None:
        """What is expected of every case, and the longest clip that is expected to fit."""
        found = {case.key: {"peak": (cost := self.expected(case)).peak, "flops": cost.flops} for case in cases()}
        for model in MODELS:
            case = self.longest(model)
            cost = self.expected(case)
            found[case.key] = {"peak": cost.peak, "flops": cost.flops, "frames": case.frames}
        (self.directory / "plan.json").write_text(json.dumps(found, indent=1))

    def longest(self, model: str) -> Case:
        """The longest clip whose step, one graph alive at a time, fits 80 GB with a tenth to spare."""
        case = Case(model, "longest clip in 80 GB", "sft")
        limit, frames = (LIMIT // 10**4 if self.tiny else LIMIT) * 0.9, 5
        while self.expected(replace(case, frames=2 * frames - 1)).peak <= limit:
            frames = 2 * frames - 1
        step = frames // 2
        while step >= 4:  # a latent frame is four
            longer = frames + step // 4 * 4
            frames = longer if self.expected(replace(case, frames=longer)).peak <= limit else frames
            step //= 2
        return replace(case, frames=frames)

    def run(self) -> None:
        """Everything that the minutes allow."""
        planned = json.loads((self.directory / "plan.json").read_text())
        self._note("device", self._describe)
        self.rate = self.results["device"]["matmul_flops_per_s"] / 2  # what a step reaches of it, with care
        for case in cases():
            self._measure(case, planned[case.key])
        for model in MODELS:
            key = Case(model, "longest clip in 80 GB").key
            case = Case(model, "longest clip in 80 GB", "sft", frames=planned[key]["frames"])
            if self.device.type == "cuda":
                total = torch.cuda.get_device_properties(self.device).total_memory
                torch.cuda.set_per_process_memory_fraction(min(LIMIT / total, 1.0))
            self._measure(case, planned[key])

    def _measure(self, case: Case, planned: dict[str, Any]) -> None:
        left = self.end - time.monotonic()
        needed = 2 * planned["flops"] / self.rate + (60 if case.compiled else 5)  # a first step, and another
        if case.key in self.results and "error" not in self.results[case.key]:
            return
        if needed > left:
            self.results.setdefault("passed over", {})[case.key] = f"{needed:.0f} s needed"
            self._write("minutes left", round(left / 60, 1))
            return
        self._note(case.key, lambda: self._time(case, planned))

    def _time(self, case: Case, planned: dict[str, Any]) -> dict[str, Any]:
        step = self._step(case)
        with step.arranged(case):
            step.run(case)
            self._synchronise()
            peak, seconds = self._peak_of(step, case, planned["flops"])
        found = {"seconds": seconds, "peak": peak, "planned_peak": planned["peak"], "flops": planned["flops"]}
        return found | {"flops_per_s": planned["flops"] / seconds, "frames": case.frames}

    def _peak_of(self, step: "Step", case: Case, flops: int) -> tuple[int, float]:
        """Bytes at the peak of a step, and its seconds; of the median of three where they are short."""
        repeats = 3 if flops / self.rate < 5 else 1
        counter = LiveBytes()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            step.count(counter)
            with counter:
                step.run(case)
        seconds = []
        for _ in range(repeats):
            start = time.perf_counter()
            step.run(case)
            self._synchronise()
            seconds.append(time.perf_counter() - start)
        peak = torch.cuda.max_memory_allocated() if self.device.type == "cuda" else counter.peak
        return peak, sorted(seconds)[repeats // 2]

    def _step(self, case: Case) -> "Step":
        """The model of a case, made anew only where it is another."""
        kind = (case.model, case.rank, case.reference, case.videos, case.frames)
        if self._loaded is None or self._loaded[0] != kind:
            self._loaded = None
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            self._loaded = kind, Step(self.workload(case), case, self.device)
        return self._loaded[1]

    def _describe(self) -> dict[str, Any]:
        """The device, and the rate of a large product of matrices in bfloat16."""
        size = 8192 if self.device.type == "cuda" else 256
        left, right = (torch.randn(size, size, device=self.device, dtype=torch.bfloat16) for _ in range(2))
        seconds = []
        for _ in range(10):
            start = time.perf_counter()
            _ = left @ right
            self._synchronise()
            seconds.append(time.perf_counter() - start)
        found = {"matmul_flops_per_s": 2 * size**3 / sorted(seconds)[5], "torch": torch.__version__}
        if self.device.type == "cpu":
            return found | {"name": "cpu"}
        properties = torch.cuda.get_device_properties(self.device)
        return found | {"name": properties.name, "memory": properties.total_memory, "cuda": torch.version.cuda}

    def _note(self, key: str, measure: Callable[[], dict[str, Any]]) -> None:
        if key in self.results and "error" not in self.results[key]:
            return
        try:
            found = measure()
        except Exception as error:  # a back end that is not there must not cost what comes after it
            found, self._loaded = {"error": f"{type(error).__name__}: {error}"[:500]}, None
        self._write(key, found)

    def _write(self, key: str, found: Any) -> None:
        self.results[key] = found
        self.path.write_text(json.dumps(self.results, indent=1))
        sys.stdout.write(json.dumps({key: found}) + "\n")
        sys.stdout.flush()

    def _synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


class Step:
    """A model with random weights and the latents of a row; makes steps in any arrangement."""

    def __init__(self, work: Workload, case: Case, device: torch.device) -> None:
        self.device = device
        self.transformer, self.family = random_transformer(work, device)
        self.reference = (
            random_transformer(replace(work, lora_rank=None), device)[0] if case.reference == "copy" else None
        )
        if self.reference is not None:
            self.reference.requires_grad_(False).to(torch.bfloat16 if case.rank else torch.float32)
        self.trained = [weight for weight in self.transformer.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-6, fused=device.type == "cuda")
        shape, tokens = work.latents_shape, work.prompt_tokens
        shapes = self.family.condition_shapes(self.transformer, shape, tokens)
        latents, noise = (torch.randn(case.videos, *shape, device=device) for _ in range(2))
        conditions = {
            name: torch.randn(case.videos, *each, device=device, dtype=torch.bfloat16) for name, each in shapes.items()
        }
        timesteps = torch.full((case.videos,), 500.0, device=device)
        self.denoising = Denoising(0.5 * latents + 0.5 * noise, timesteps, conditions, noise - latents)

    def count(self, counter: LiveBytes) -> None:
        """What is there before a step."""
        states = [each for state in self.optimizer.state.values() for each in state.values() if torch.is_tensor(each)]
        copies = [] if self.reference is None else list(self.reference.parameters())
        for tensor in (*self.transformer.parameters(), *copies, *states):
            counter.add(tensor)

    def arranged(self, case: Case) -> "Arranged":
        return Arranged(self, case)

    def errors(self, module: ModelMixin, videos: Denoising) -> Tensor:
        return forward_errors(self.family, module, videos)

    def run(self, case: Case) -> None:
        """One step: reference, policy, loss, backward passes, AdamW."""
        one_by_one = case.mode in ("singles", "sequential")
        videos = self.denoising.one_by_one() if one_by_one else [self.denoising]
        if case.mode == "sft":
            self.errors(self.transformer, self.denoising).mean().backward()
        else:
            without = AdapterReference(self.transformer)() if self.reference is None else nullcontext(self.reference)
            with torch.no_grad(), without as module:
                of_reference = torch.cat([self.errors(module, video) for video in videos])
            if case.mode == "sequential":
                sequential = SequentialErrors(self.denoising, self.family, self.transformer)
                self.loss(sequential.errors, of_reference).backward()
                sequential.backward()
            else:
                policy = torch.cat([self.errors(self.transformer, video) for video in videos])
                self.loss(policy, of_reference).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def loss(self, policy: Tensor, reference: Tensor) -> Tensor:
        rewards = implicit_reward(policy, reference, 500.0)
        return dpo_loss(rewards[:1], rewards[1:]).mean()


class Arranged:
    """A context in which a model has the options of a case."""

    def __init__(self, step: Step, case: Case) -> None:
        self.step, self.case = step, case

    def __enter__(self) -> None:
        transformer, case, blocks = self.step.transformer, self.case, self.blocks()
        transformer.disable_gradient_checkpointing()
        if case.policy is not None:
            enable_recompute(transformer, case.policy)
        if case.attention is not None:
            set_attention_backend(transformer, case.attention)
        if case.compiled:
            compile_blocks(blocks, enabled=True)
        if case.offloaded:
            offload_weights(transformer, blocks, self.step.device)

    def __exit__(self, *error: Any) -> None:
        transformer, case = self.step.transformer, self.case
        if case.offloaded:
            restore_weights(transformer)
            transformer.to(self.step.device)
        if case.compiled:
            compile_blocks(self.blocks(), enabled=False)
        if case.attention is not None:
            set_attention_backend(transformer, "native")

    def blocks(self) -> list[Any]:
        return list(self.step.family.blocks(self.step.transformer))


def random_transformer(work: Workload, device: torch.device) -> tuple[ModelMixin, ModelFamily]:
    """In the dtypes of training, on the device from the start; its adapter's output is not zero."""
    kind: Any = TRANSFORMERS[work.config["_class_name"]]
    with torch.device("meta"):
        transformer = kind.from_config({**work.config})
    exact = set(kind._keep_in_fp32_modules or ())
    for name, weight in transformer.named_parameters():
        full = work.lora_rank is None or exact & set(name.split("."))
        weight.data = weight.data.to(torch.float32 if full else torch.bfloat16)
    transformer.to_empty(device=device)
    transformer.rope = type(transformer.rope)(
        work.config["attention_head_dim"], tuple(work.config["patch_size"]), work.config["rope_max_seq_len"]
    ).to(device)
    for weight in transformer.parameters():
        weight.data.normal_(std=0.02)
    family = family_for(transformer)
    if work.lora_rank is not None:
        transformer.requires_grad_(False)
        targets = family.lora_target_modules
        rank = work.lora_rank
        transformer.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, init_lora_weights=False))
        for weight in transformer.parameters():
            if weight.requires_grad:
                weight.data = weight.data.float()
    forward = torch.autocast(device.type, torch.bfloat16)(transformer.forward)  # as accelerate prepares a model
    transformer.__dict__["forward"] = convert_outputs_to_fp32(forward)
    return transformer.train(), family


def replace_frames(size: tuple[int, int, int], frames: int) -> tuple[int, int, int]:
    """The size with so many frames; tiny clips have theirs, unless another number was asked for."""
    return size if frames == SIZE[0] else (frames, size[1], size[2])


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/gpu"))
    parser.add_argument("--minutes", type=float, default=10.0, help="budget of the run")
    parser.add_argument("--plan", action="store_true", help="count what is expected, which needs no GPU, and end")
    parser.add_argument("--tiny", action="store_true", help="tiny models, to try the script")
    args = parser.parse_args(argv)
    study = Study(args.output_dir, args.minutes, tiny=args.tiny)
    if args.plan:
        study.plan()
        return
    study.run()


if __name__ == "__main__":
    main(sys.argv[1:])
