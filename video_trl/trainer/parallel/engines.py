"""
Choose and set up what distributes a run: DDP, FSDP2 or DeepSpeed; gather and assign weights that they shard.

- `ddp`: every process has all weights (also a single process counts as this);
- `fsdp2`: weights, gradients and optimizer states are sharded, by torch;
- `zero1`, `zero2`, `zero3`: DeepSpeed shards the optimizer states; the gradients too; the weights too.
"""

import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import convert_outputs_to_fp32
from accelerate.utils.deepspeed import (  # accelerate.utils has them only beside DeepSpeed
    DeepSpeedEngineWrapper,
    DeepSpeedOptimizerWrapper,
    DummyOptim,
)
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from accelerate.utils.modeling import get_mixed_precision_context_manager
from diffusers import ModelMixin
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import TrainingArguments
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

from ..step.nan_guard import FiniteLossGuard


Engine = Literal["ddp", "fsdp2", "zero1", "zero2", "zero3"]
_ZERO_STAGES: tuple[Engine, ...] = ("ddp", "zero1", "zero2", "zero3")

#: Engines whose every forward pass is a joint effort of all processes, because none has all weights.
SHARDED: tuple[Engine, ...] = ("fsdp2", "zero3")


def engine_of(accelerator: Accelerator) -> Engine:
    """The engine that an accelerator has been set up for."""
    if accelerator.is_fsdp2:
        return "fsdp2"
    plugin = accelerator.state.deepspeed_plugin
    return "ddp" if plugin is None else _ZERO_STAGES[plugin.zero_stage]


def requested_engine(args: TrainingArguments) -> Engine:
    """
    The engine that is asked for, in the arguments of a trainer or by `accelerate launch`.

    Raises:
        ValueError: If it is not installed, or is one, or has an option, that does not work here.
    """
    if args.deepspeed_plugin is not None:
        return _ZERO_STAGES[args.deepspeed_plugin.zero_stage]
    if args.fsdp_plugin_args is None and not _is_true("ACCELERATE_USE_FSDP"):
        return "ddp"

    def option(name: str) -> str:
        # `fsdp_config` holds what transformers 5.5 hands to accelerate later.
        value = (args.fsdp_plugin_args or {}).get(name, (args.fsdp_config or {}).get(name))
        return str(
            os.environ.get(f"FSDP_{name.removeprefix('fsdp_').upper()}", "") if value is None else value
        ).lower()

    if option("fsdp_version") != "2":
        raise ValueError("FSDP is supported in its second version only. Set `fsdp_version: 2`.")
    for name, why in (
        ("cpu_ram_efficient_loading", "every process loads the transformer itself"),
        ("activation_checkpointing", "blocks are checkpointed by the trainer: use its option of that name"),
    ):
        if option(name) in ("true", "1"):
            raise ValueError(f"FSDP's `{name}` is not supported: {why}. Set it to false.")
    return "fsdp2"


def offloads_weights(accelerator: Accelerator) -> bool:
    """Whether the weights stay in the host's memory, which is ZeRO-3's."""
    plugin = accelerator.state.deepspeed_plugin
    offload = {} if plugin is None else plugin.deepspeed_config["zero_optimization"].get("offload_param") or {}
    return offload.get("device", "none") != "none"


def is_deepspeed(optimizer: Any) -> bool:
    """Whether DeepSpeed has made an optimizer, or will, from its own configuration."""
    return isinstance(optimizer, DeepSpeedOptimizerWrapper | DummyOptim)


def check_set_up(requested: Engine, accelerator: Accelerator) -> None:
    """Raise a `ValueError` if accelerate has set up another engine than the one that was asked for."""
    actual = engine_of(accelerator)
    if actual != requested:
        raise ValueError(
            f"The engine '{requested}' was asked for, but accelerate has set up '{actual}' for "
            f"{accelerator.num_processes} process(es) on {accelerator.device.type}. Start one process per GPU, with "
            "`accelerate launch --config_file` or `torchrun`."
        )


def check_deepspeed_installed(args: TrainingArguments) -> None:
    """Raise a `ValueError` if DeepSpeed is asked for, by arguments or by `accelerate launch`, and not installed."""
    if (args.deepspeed or _is_true("ACCELERATE_USE_DEEPSPEED")) and importlib.util.find_spec("deepspeed") is None:
        raise ValueError("DeepSpeed is asked for and not installed. Run: pip install 'video-trl[deepspeed]'")


@contextmanager
def whole_weights() -> Iterator[None]:
    """
    Context in which models of transformers are loaded whole.

    With ZeRO-3 they would be born sharded, text encoders and judges too, and could not run outside the engine.
    """
    from transformers.integrations import deepspeed

    reference = deepspeed._hf_deepspeed_config_weak_ref
    config = None if reference is None else reference()
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if config is not None:
            set_hf_deepspeed_config(config)


def configure_fsdp(accelerator: Accelerator, transformer: ModelMixin) -> None:
    """
    Let FSDP2 gather weights as they are stored, and run the transformer under autocast as the other engines do.

    Then a step has the numbers of one without FSDP2: float32 adapters get float32 gradients on a bfloat16 base, and
    timesteps and rotary embeddings are not rounded on their way into a block.
    """
    accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy()
    if accelerator.native_amp:
        autocast = get_mixed_precision_context_manager(True, accelerator.autocast_handler)
        transformer.forward = convert_outputs_to_fp32(autocast(transformer.forward))


def prepare_reference(transformer: ModelMixin, accelerator: Accelerator, engine: Engine) -> nn.Module:
    """Place a frozen reference that has weights of its own, sharded and in the precision in which the policy is."""
    if engine == "fsdp2":
        return fsdp2_prepare_model(accelerator, transformer.to(accelerator.device))
    if engine == "ddp":
        return transformer.to(accelerator.device)
    import deepspeed

    plugin_config = accelerator.state.deepspeed_plugin.deepspeed_config
    stage = 3 if engine == "zero3" else 0
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage},
        **{name: plugin_config[name] for name in ("bf16", "fp16") if name in plugin_config},
    }
    wrapped, *_ = deepspeed.initialize(model=transformer, config=config)
    wrapped.eval()
    return wrapped


# ---- Weights ----


def full_weight(weight: Tensor) -> Tensor:
    """
    All of a weight, in the precision in which it is trained. Every process must call this, in the same order.

    Args:
        weight (`torch.Tensor`): A parameter or buffer, whole or sharded.
    """
    if isinstance(weight, DTensor):
        return weight.full_tensor().detach()
    if not _belongs_to_deepspeed(weight):
        return weight.detach()
    from deepspeed import zero
    from deepspeed.utils import safe_get_full_fp32_param

    if weight.requires_grad and _has_master(weight):
        return safe_get_full_fp32_param(weight).detach()
    with zero.GatheredParameters([weight]):
        return weight.detach().clone()


@torch.no_grad()
def assign_weight(weight: Tensor, value: Tensor) -> None:
    """Overwrite a weight, whole or sharded, by a whole value that every process has."""
    if isinstance(weight, DTensor):
        weight.copy_(shard_like(value, weight))
        return
    if not _belongs_to_deepspeed(weight):
        weight.copy_(value)
        return
    from deepspeed import zero
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

    value = value.to(weight.device)
    with zero.GatheredParameters([weight], modifier_rank=0):
        weight.copy_(value)
    if not _has_master(weight):
        return
    if "ds_id" not in weight.__dict__:
        safe_set_full_fp32_param(weight, value.float())
        return
    # Part by part: DeepSpeed cannot set all of a weight that its processes do not divide.
    size, group = weight.__dict__["ds_tensor"].numel(), weight.__dict__["ds_process_group"]
    filled = nn.functional.pad(value.float().flatten(), (0, size * dist.get_world_size(group) - value.numel()))
    safe_set_local_fp32_param(weight, filled.narrow(0, size * dist.get_rank(group), size))


def full_shape(weight: Tensor) -> tuple[int, ...]:
    """Shape of all of a weight."""
    return tuple(weight.__dict__.get("ds_shape", weight.shape))  # DeepSpeed leaves an empty tensor in its place


def shard_like(value: Tensor, weight: DTensor) -> DTensor:
    """This process's part of a whole tensor, as that of `weight`. No process talks to another."""
    value = value.to(device=weight.device, dtype=weight.dtype)
    return distribute_tensor(value, weight.device_mesh, weight.placements, src_data_rank=None)


def _belongs_to_deepspeed(weight: Tensor) -> bool:
    return "ds_id" in weight.__dict__ or "_hp_mapping" in weight.__dict__


def _has_master(weight: Tensor) -> bool:
    """Whether DeepSpeed's optimizer holds the weight, in float32."""
    return "_z3_optimizer" in weight.__dict__ or "_hp_mapping" in weight.__dict__


def _is_true(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("true", "1")


# ---- Optimizer states ----


def full_optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The state dict of an optimizer, whole, on the CPU of the first process. Every process must call this."""
    state = optimizer.state_dict()
    first = not dist.is_initialized() or dist.get_rank() == 0

    def whole(value: Any) -> Any:
        if isinstance(value, DTensor):
            value = value.full_tensor()
        return value.cpu() if isinstance(value, Tensor) and first else value if first else None

    return {
        **state,
        "state": {
            key: {name: whole(value) for name, value in entries.items()} for key, entries in state["state"].items()
        },
    }


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Give an optimizer, of whole or sharded weights, what `full_optimizer_state` has returned."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    entries = {}
    for number, weight in zip(numbers, weights, strict=True):
        entries[number] = {
            name: shard_like(value, weight)
            if isinstance(weight, DTensor) and isinstance(value, Tensor) and value.shape == weight.shape
            else value
            for name, value in state["state"].get(number, {}).items()
        }
    optimizer.load_state_dict({**state, "state": entries})


# ---- DeepSpeed's step ----


class DeepSpeedSteps(DeepSpeedEngineWrapper):
    """
    accelerate's way to run DeepSpeed's backward pass and update, which are one call, with two things it lacks.

    A loss that is not finite must not reach the weights, so it is looked at before. And a step may have several
    backward passes: after `expect_passes`, the next loss is not the engine's business (its graph ends before the
    weights), and the passes over the weights come through `backward_pass`.

    Args:
        engine (`deepspeed.DeepSpeedEngine`): The engine.
        guard ([`FiniteLossGuard`]): Is shown every loss.
        before_update (`Callable`): Called before weights are updated.
    """

    def __init__(self, engine: Any, guard: FiniteLossGuard, before_update: Callable[[], None]) -> None:
        super().__init__(engine)
        self._guard = guard
        self._before_update = before_update
        self._expects_passes = False
        self._updates = False

    def expect_passes(self) -> None:
        """The next `backward` is of a loss whose graph does not reach the weights."""
        self._expects_passes = True

    def backward(self, loss: Tensor, sync_gradients: bool = True, **kwargs: Any) -> None:
        self._guard.watch_loss(loss)
        if sync_gradients:
            self._before_update()
        if self._expects_passes:
            self._expects_passes, self._updates = False, sync_gradients
            loss.backward()
        else:
            super().backward(loss, sync_gradients=sync_gradients, **kwargs)

    def backward_pass(self, value: Tensor, final: bool) -> None:
        """Add the gradient of a scalar; with the final one, if this micro-batch ends a step, update the weights."""
        super().backward(value, sync_gradients=final and self._updates, scale_wrt_gas=False)
