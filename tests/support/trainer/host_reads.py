"""
A device on which waiting shows: training runs on it as on a GPU, and every time the host waits for it is written down.

It is a backend of torch written in Python. Its tensors hold an ordinary tensor of the CPU, which does the arithmetic;
but to torch, to transformers and to the trainer they are on another device, so that the host gets at a number only
through an operation that a GPU would have to finish its work for: reading a scalar, copying to the CPU, looking for
what is not zero, comparing tensors, or copying to the device without `non_blocking`. Numbers that never leave the host
are ordinary tensors and do not count.

A backend cannot be taken back, so this runs in a process of its own:
`python -m tests.support.trainer.host_reads DIRECTORY` trains every trainer for three steps and
prints, as JSON, the waits of each step by trainer.
"""

import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend
from transformers import TrainerCallback

from tests.support.tiny import tiny_encoded_group, tiny_encoded_video, tiny_latents_shape, tiny_pipeline
from tests.support.trainer.repa_runs import aligned_rows
from video_trl import (
    VideoDPOConfig,
    VideoDPOTrainer,
    VideoGroupDPOConfig,
    VideoGroupDPOTrainer,
    VideoRegDPOConfig,
    VideoRegDPOTrainer,
    VideoREPAConfig,
    VideoREPATrainer,
    VideoSFTConfig,
    VideoSFTTrainer,
)
from video_trl.trainer.preference_config import PreferenceConfig
from video_trl.trainer.publishing.progress import ClosingLine, ProgressReport


BACKEND = "watched"


class Backend(_DummyBackendModule):
    """What torch asks about the device."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


_setup_privateuseone_for_python_backend(BACKEND, Backend())
DEVICE = torch.device(BACKEND, 0)
LOGGED_STEP = 2
aten = torch.ops.aten

# What a GPU must have finished before the host can go on; copies are told apart by where they go.
READS = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.is_nonzero.default,
    aten.equal.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.item.default,
}
waits: list[str] = []
pinned: list[Tensor] = []  # of the host, in the memory that a GPU copies from by itself


def wait(what: str) -> None:
    """Write down a wait, and the line of the package or of a library that caused it."""
    frames = [f for f in traceback.extract_stack()[:-2] if "/torch/" not in f.filename and __file__ != f.filename]
    waits.append(f"{what} at {Path(frames[-1].filename).name}:{frames[-1].lineno}")


def is_pinned(tensor: Tensor) -> bool:
    return any(tensor is other for other in pinned)


class WatchedTensor(Tensor):
    """A tensor of the device."""

    host: Tensor

    @staticmethod
    def __new__(cls, host: Tensor) -> "WatchedTensor":
        made = Tensor._make_wrapper_subclass(
            cls,
            host.shape,
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            device=DEVICE,
        )
        made.host = host
        return made

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(function, args, kwargs or {})

    __torch_function__ = torch._C._disabled_torch_function_impl

    def tolist(self) -> list[Any]:
        return self.cpu().tolist()  # what it does by itself, but not for subclasses


class WatchedDevice(TorchDispatchMode):
    """Sees the operations that have no tensor of the device among their inputs: new tensors, and copies to it."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in (aten.pin_memory.default, aten._pin_memory.default):
            pinned.append(args[0].clone())
            return pinned[-1]
        if function is aten.is_pinned.default:
            return is_pinned(args[0])
        if kwargs.get("device") is not None and torch.device(kwargs["device"]).type == BACKEND:
            return run(function, args, kwargs)
        if any(issubclass(kind, WatchedTensor) for kind in types):
            return run(function, args, kwargs)
        return function(*args, **kwargs)


def run(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """The operation on the tensors inside; its results are on the device unless they were asked for elsewhere."""
    check_devices(function, args, kwargs)
    if function in READS:
        wait(str(function))
    target = kwargs.get("device")
    if target is not None:
        target = torch.device(target)
        kwargs = {**kwargs, "device": torch.device("cpu")}
        if function is aten._to_copy.default:
            comes_from = args[0].device.type
            asynchronous = kwargs.pop("non_blocking", False) and is_pinned(args[0])
            if comes_from != target.type and (target.type == "cpu" or not asynchronous):
                wait(f"copy from {comes_from} to {target.type}")
    if function is aten.copy_.default and args[0].device != args[1].device:
        asynchronous = args[2:] == (True,) and is_pinned(args[1])
        if args[0].device.type == "cpu" or not asynchronous:
            wait(f"copy from {args[1].device.type} to {args[0].device.type}")
        if not isinstance(args[0], WatchedTensor):
            return args[0].copy_(args[1].host)
    inside = tree_map_only(WatchedTensor, lambda tensor: tensor.host, (args, kwargs))
    result = function(*inside[0], **inside[1])
    if target is not None and target.type == "cpu":
        return result
    result = tree_map_only(Tensor, WatchedTensor, result)
    return return_and_correct_aliasing(function, args, kwargs, result)


def check_devices(function: Any, args: Any, kwargs: dict[str, Any]) -> None:
    """As a GPU, which computes with no tensors of the host beside its own, but for single numbers and indices."""
    tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
    watched = [isinstance(each, WatchedTensor) for each in tensors]
    indexed = function in (aten.index.Tensor, aten.index_put_.default, aten.index_put.default) and watched[0]
    if function in (aten.copy_.default, aten._to_copy.default) or indexed or not any(watched):
        return
    if any(each.ndim > 0 for each, on_device in zip(tensors, watched, strict=True) if not on_device):
        raise RuntimeError(f"{function}: expected all tensors to be on {DEVICE}, got some of the host.")


def kernels() -> torch.library.Library:
    """Of the two operations that `torch.tensor(..., device=...)` makes below the level where tensors see them."""
    library = torch.library.Library("aten", "IMPL")
    library.impl("empty_strided", empty_strided, "PrivateUse1")
    library.impl("_copy_from", copy_from, "PrivateUse1")
    return library


def empty_strided(size: Any, stride: Any, *, dtype: Any = None, **kwargs: Any) -> WatchedTensor:
    return WatchedTensor(torch.empty_strided(size, stride, dtype=dtype))


def copy_from(source: Tensor, target: Any, non_blocking: bool = False) -> Tensor:
    wait(f"copy from {source.device.type} to {target.device.type}")
    target.host.copy_(source)
    return target


class WaitsOfSteps(TrainerCallback):
    """The waits of each optimizer step, its batch included, and those of the log between the second and the third."""

    def __init__(self) -> None:
        self.steps: list[list[str]] = []
        self.log: list[str] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps.append([])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps[-1] += waits
        waits.clear()
        control.should_log = state.global_step == LOGGED_STEP

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.log += waits
        waits.clear()


class ReadsWeights(TrainerCallback):
    """Looks at a number on the device in every step, as no callback should."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        next(kwargs["model"].parameters()).sum().item()


def config(kind: type, directory: Path, **changes: Any) -> Any:
    """Three steps, the second of them logged, of a configuration that takes the watched device for its own."""
    defaults = {"use_cpu": True, "max_steps": 3, "logging_strategy": "no", "save_strategy": "no", "lora_rank": 2}
    quiet = {"disable_tqdm": True, "report_to": []}
    made = kind(output_dir=str(directory), **(defaults | quiet | changes))
    assert made.device.type == "cpu"
    made.__dict__["_setup_devices"] = DEVICE
    made.dataloader_pin_memory = True
    return made


def groups(family: str) -> list[dict[str, Any]]:
    return tiny_encoded_group(4, latents_shape=tiny_latents_shape(family), family=family)


def trainers(directory: Path) -> dict[str, Callable[[], Any]]:
    """What makes each of the trainers, by the name of the run."""
    made: dict[str, Callable[[], Any]] = {}
    for family in ("cogvideox-t2v", "wan-t2v", "wan-i2v", "cogvideox-i2v"):
        made[f"dpo {family}"] = lambda family=family: VideoDPOTrainer(
            tiny_pipeline(family),
            config(VideoDPOConfig, directory, step_mode="concat"),
            groups(family),
        )
    wan = tiny_latents_shape("wan-t2v")
    made["sft"] = lambda: VideoSFTTrainer(
        tiny_pipeline("wan-t2v"),
        config(VideoSFTConfig, directory, timestep_sampling="logit_normal"),
        tiny_encoded_video(4, latents_shape=wan),
    )
    made["reg-dpo sequential"] = lambda: VideoRegDPOTrainer(
        tiny_pipeline("wan-t2v"),
        config(VideoRegDPOConfig, directory, step_mode="sequential"),
        groups("wan-t2v"),
    )
    made["group-dpo"] = lambda: VideoGroupDPOTrainer(
        tiny_pipeline("wan-t2v"),
        config(VideoGroupDPOConfig, directory, step_mode="concat"),
        groups("wan-t2v"),
    )
    made["group-dpo full"] = lambda: VideoGroupDPOTrainer(
        tiny_pipeline("wan-t2v"),
        config(VideoGroupDPOConfig, directory, step_mode="concat", use_peft=False, loss_type="sampled"),
        groups("wan-t2v"),
    )
    made["repa"] = lambda: VideoREPATrainer(
        tiny_pipeline("wan-t2v"),
        config(VideoREPAConfig, directory, align_layer=1, projector_width=8),
        aligned_rows(4),
    )
    made["with a reader"] = lambda: VideoSFTTrainer(
        tiny_pipeline("wan-t2v"),
        config(VideoSFTConfig, directory),
        tiny_encoded_video(4, latents_shape=wan),
        callbacks=[ReadsWeights()],
    )
    return made


def main(directory: Path, *names: str) -> None:
    report = {}
    registered = kernels()  # as long as this lives
    for name, make in trainers(directory).items():
        if names and name not in names:
            continue
        with WatchedDevice():
            watched = WaitsOfSteps()
            trainer = make()
            trainer.add_callback(watched)
            # This device has no memory to ask about.
            for kind in (ProgressReport, ClosingLine):
                trainer.remove_callback(kind)
            if isinstance(trainer.args, PreferenceConfig):
                trainer.__dict__["step_mode"] = trainer.args.step_mode
            waits.clear()
            trainer.train()
        report[name] = {"steps": watched.steps, "log": watched.log}
    del registered
    sys.stdout.write(json.dumps(report) + "\n")


if __name__ == "__main__":
    os.environ["ACCELERATE_TORCH_DEVICE"] = str(DEVICE)
    main(Path(sys.argv[1]), *sys.argv[2:])
