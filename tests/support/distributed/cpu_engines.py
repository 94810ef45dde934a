"""What makes accelerate set up its engines on CPUs, where it would silently leave them out. For tests alone."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedType


# Each block of the transformer is a unit, as in examples/accelerate_configs.
FSDP2: dict[str, Any] = {
    "fsdp": True,
    "fsdp_config": {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"},
}


def zero(stage: int, *, bf16: bool = False, sgd: bool = False, offload: bool = False) -> dict[str, Any]:
    """Arguments of a trainer that ask for DeepSpeed."""
    on_host = {"offload_param": {"device": "cpu"}, "offload_optimizer": {"device": "cpu"}} if offload else {}
    config = {
        # Small weights would stay whole on every process, and all of a tiny transformer's are.
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0, **on_host},
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": bf16},
        "zero_allow_untested_optimizer": sgd,
    }
    return {"deepspeed": config}


@contextmanager
def engine(arguments: dict[str, Any]) -> Iterator[None]:
    """Context in which trainers with these arguments get the engine that they ask for, whatever was before."""
    if not dist.is_initialized():  # which it does not do itself for the kinds of processes below
        dist.init_process_group("gloo")
    reset()
    prepare_backend = PartialState._prepare_backend
    if "deepspeed" in arguments:
        # With DeepSpeed accelerate picks no backend on a CPU, and reports one process on every rank.
        PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_CPU)
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    elif "fsdp" in arguments:
        # It drops FSDP for processes on CPUs, and asks for the kind of processes only then.
        PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
        set_device = PartialState.set_device
        PartialState.set_device = lambda state: setattr(state, "device", torch.device("cpu"))
    try:
        yield
    finally:
        PartialState._prepare_backend = prepare_backend
        if "deepspeed" not in arguments and "fsdp" in arguments:
            PartialState.set_device = set_device
        reset()


def reset() -> None:
    """Forget the engine and its settings; the process group stays."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    for name in list(os.environ):
        if name.startswith(("FSDP_", "ACCELERATE_")):
            del os.environ[name]
