"""Count the memory and FLOPs of a training step by running it on fake tensors, without the weights."""

import json
import math
import re
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import astuple, dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import torch
from accelerate.utils import convert_outputs_to_fp32
from diffusers import CogVideoXDDIMScheduler, ModelMixin
from peft import LoraConfig
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count
from torch.utils.weak import WeakTensorKeyDictionary

from ...diffusion import VPrediction
from ...models import TRANSFORMERS, ModelFamily, depth_options, family_for, lora_targets
from ..setup.activation_checkpointing import check_policy, enable_recompute
from ..setup.quantization import Quantization, quantised_bytes, quantised_layers, unpacking_bytes
from ..step.denoising import Denoising
from ..step.passes import SequentialErrors, StepMode, forward_errors


_FEW_BLOCKS = 3  # of each kind are counted, and one more; the peak of fewer may be at another moment
_IN_ONE_BLOCK = re.compile(r"^\w+\.\d+\.")  # what the name of a layer of a single block begins with
_ADAM_BYTES = 8  # two moments in float32 of each trainable parameter
_SCHEDULE_BYTES = 24  # of a schedule that is a table, for a timestep: two numbers in float64, and both in float32
_NUMBERS = 16  # of a video, that are drawn, looked up and recorded: timestep, scores, weight, index, errors, metrics


@dataclass(frozen=True)
class StepCost:
    """
    Cost of one micro-batch on one device. Memory in bytes.

    Attributes:
        weights (`int`): Of the transformer, with its adapter, and of a copied reference.
        gradients (`int`): Of the trainable parameters.
        optimizer (`int`): Two moments of Adam.
        activations (`int`): Everything else that is alive at the peak.
        trained (`int`): Number of trainable parameters.
        tokens (`int`): Tokens of one video.
        flops (`int`): Floating-point operations of matrix products, convolutions and attention, as
            `torch.utils.flop_counter` counts them.
        block_weights (`int`): Of the weights, the frozen ones of all blocks.
        largest_block (`int`): Of these, those of the block that has most.
        host (`int`): Activations that are in the host's memory at its peak, and not among those above.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    trained: int
    tokens: int
    flops: int
    block_weights: int
    largest_block: int
    host: int

    @property
    def peak(self) -> int:
        """Bytes at the peak; an allocator needs a few percent more for its gaps, and CUDA about 0.5 GiB for itself."""
        return self.weights + self.gradients + self.optimizer + self.activations


def class_name(transformer: nn.Module) -> str:
    """The `_class_name` in a transformer's `config.json`; of a derived class, that of the class that has a family."""
    names = (name for name, kind in TRANSFORMERS.items() if isinstance(transformer, kind))
    return next(names, type(transformer).__name__)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of live storages and the FLOPs of operations, of real and of fake tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self.flops = 0
        self._known: set[int] = set()

    def add(self, tensor: Tensor) -> None:
        """Count the storage of a tensor, once; of a tensor subclass made of tensors, those of its parts."""
        subclass: Any = tensor
        if is_traceable_wrapper_subclass(subclass):
            for name in subclass.__tensor_flatten__()[0]:
                self.add(subclass.__dict__[name])
            return
        storage = tensor.untyped_storage()
        key, nbytes = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.live += nbytes
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._drop, key, nbytes)

    def _drop(self, key: int, nbytes: int) -> None:
        self._known.discard(key)
        self.live -= nbytes

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # Asked by torch before each operation, and answered here: two dispatches of three would be for this.
        if function is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].device
        output = function(*args, **(kwargs or {}))
        for leaf in (output,) if isinstance(output, Tensor) else tree_leaves(output):
            if isinstance(leaf, Tensor):
                self.add(leaf)
        # torch's own FlopCounterMode keeps tensors of every module alive, which would be counted as memory.
        packet, shapes = function._overloadpacket, [arg.shape for arg in args[:4] if isinstance(arg, Tensor)]
        if packet is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:  # torch counts those of GPUs only
            self.flops += sdpa_flop_count(*shapes[:3])
        elif packet is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward:
            self.flops += sdpa_backward_flop_count(*shapes)
        elif packet in flop_registry:
            self.flops += flop_registry[packet](*args, **(kwargs or {}), out_val=output)
        return output


class HostBytes:
    """
    Counts bytes of tensors that a graph saves in the host's memory, in place of which nothing stays on the device.

    Attributes:
        live (`int`): Bytes now.
        peak (`int`): The most that there were at once.
    """

    def __init__(self) -> None:
        self.live = 0
        self.peak = 0

    def saved(self) -> AbstractContextManager[None]:
        """Context in which what is saved goes there; when it is needed, a tensor of its shape is made again."""
        return torch.autograd.graph.saved_tensors_hooks(self._forget, lambda saved: saved.empty())

    def _forget(self, tensor: Tensor) -> "_OnHost":
        saved = _OnHost(tensor.shape, tensor.dtype)
        self.live += tensor.nbytes
        self.peak = max(self.peak, self.live)
        weakref.finalize(saved, self._drop, tensor.nbytes)
        return saved

    def _drop(self, nbytes: int) -> None:
        self.live -= nbytes


@dataclass(frozen=True, eq=False)
class _OnHost:
    """What is known on the device of a tensor that is in the host's memory."""

    shape: torch.Size
    dtype: torch.dtype

    def empty(self) -> Tensor:
        return torch.empty(self.shape, dtype=self.dtype)


class FullMasks(TorchFunctionMode):
    """
    Answers what a transformer asks of the contents of fake tensors, which have none: masks that choose tokens choose
    all of them, and their negations none, so that there are as many tokens as with any other mask; other conditions
    are false.
    """

    def __init__(self) -> None:
        super().__init__()
        self._empty: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is Tensor.__bool__:
            return False
        if function is Tensor.__getitem__ and isinstance(args[1], Tensor) and args[1].dtype == torch.bool:
            return args[0][:0] if args[1] in self._empty else args[0][:]
        output = function(*args, **(kwargs or {}))
        if function is Tensor.__invert__:
            self._empty[output] = True
        return output


def count_step(
    config: Mapping[str, Any],
    latents_shape: tuple[int, int, int, int],
    *,
    num_videos: int,
    reference: Literal["none", "adapter", "copy"] = "none",
    step_mode: StepMode = "concat",
    checkpointing: bool = True,
    checkpointing_policy: str = "full",
    lora_rank: int | None = 48,
    lora_target_modules: str | Sequence[str] | None = None,
    bf16: bool = True,
    frozen_dtype: torch.dtype | None = None,
    quantization: Quantization | None = None,
    prompt_tokens: int | None = None,
) -> StepCost:
    """
    Count the memory and FLOPs of a step of a transformer of any size, without its weights.

    The step runs the code of training (modules, adapter, passes) on fake tensors: 14 billion parameters take seconds
    and little memory. Not counted: encoding, which is done ahead, generation of sample videos, and what an engine
    adds, such as the buckets of `DistributedDataParallel`.

    Args:
        config (`Mapping`): Content of the transformer's `config.json`, of a class with a family.
        latents_shape (`tuple` of 4 `int`): Shape `(C, F, H, W)` of one video.
        num_videos (`int`): Videos in a micro-batch: 1 for fine-tuning, 2 for a pair, 1 + m for a group.
        reference (`"none"`, `"adapter"` or `"copy"`, defaults to `"none"`): The reference: none, the policy with its
            adapter off, or a second set of weights.
        step_mode (`"concat"`, `"singles"` or `"sequential"`): See `step_mode` of the preference trainers.
        checkpointing (`bool`, defaults to `True`): Whether activations are checkpointed.
        checkpointing_policy (`str`, defaults to `"full"`): Which activations; see `enable_recompute`.
        lora_rank (`int`, *optional*, defaults to `48`): Rank of the default adapter; `None` trains all weights.
        lora_target_modules (`str` or list of `str`, *optional*): Its layers, as the trainers take them;
            layers of a single block count as those of every block.
        bf16 (`bool`, defaults to `True`): Compute in bfloat16.
        frozen_dtype (`torch.dtype`, *optional*): Of the frozen weights under an adapter, but for those that the
            class keeps in float32; as the trainers load them if not given: bfloat16 with `bf16`, else float32.
        quantization (`str`, *optional*): Format of frozen weights: `"nf4"`, `"int8"` or `"fp8"`.
        prompt_tokens (`int`, *optional*): Tokens of a prompt; 512 for Wan and 226 for CogVideoX if not given.

    Returns:
        [`StepCost`]: For AdamW; for an optimizer without state, subtract `optimizer`.

    Raises:
        ValueError: If the transformer is not supported, the latents do not suit it, a number is not positive, or
            weights are both quantised and trained.
    """
    for name, value in (("num_videos", num_videos), ("lora_rank", lora_rank), ("prompt_tokens", prompt_tokens)):
        if value is not None and value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}.")
    if quantization is not None and lora_rank is None:
        raise ValueError(f"`quantization={quantization!r}` is for weights under an adapter: give a `lora_rank`.")
    check_policy(checkpointing_policy)
    policy = checkpointing_policy if checkpointing else None
    shape = (latents_shape[0], latents_shape[1], latents_shape[2], latents_shape[3])
    targets = lora_target_modules or "attention"
    targets = (targets,) if isinstance(targets, str) else tuple(targets)
    adapter = None if lora_rank is None else (lora_rank, targets)
    frozen = frozen_dtype or (torch.bfloat16 if bf16 else torch.float32)
    settings = (shape, num_videos, reference, step_mode, policy, adapter, bf16, frozen, prompt_tokens)
    cost = _count_all_blocks(config, settings)
    if quantization is None:
        return cost
    layers, saved = [], 0
    for option in _depths(config):  # a block of each kind
        others = {other: 0 for other in _depths(config) if other != option}
        one_block, _ = _without_contents({**config, **others, option: 1}, adapter, frozen)
        kind = list(quantised_layers(one_block))
        saved += config[option] * sum(layer.weight.nbytes - quantised_bytes(quantization, layer) for layer in kind)
        layers += kind
    return replace(
        cost,
        weights=cost.weights - saved * (2 if reference == "copy" else 1),
        activations=cost.activations + max(unpacking_bytes(quantization, layer) for layer in layers),
    )


def _depths(config: Mapping[str, Any]) -> dict[str, int]:
    """The numbers of blocks of a transformer, by the option of its configuration."""
    name = config.get("_class_name", "")
    options = depth_options(name) if name in TRANSFORMERS else ()
    return {option: int(config[option]) for option in options if option in config}


def _count_all_blocks(config: Mapping[str, Any], settings: tuple[Any, ...]) -> StepCost:
    """The cost of a step; of a deep transformer, from counts of few blocks of each kind."""
    few = {option: min(depth, _FEW_BLOCKS) for option, depth in _depths(config).items()}
    more = {option: depth - few[option] for option, depth in _depths(config).items() if depth > few[option]}
    if sum(more.values()) <= len(more) * (sum(few.values()) + 1):  # no more blocks than the counts below have
        return _count(json.dumps({**config}), *settings)
    low = astuple(_count(json.dumps({**config, **few}), *settings))
    total = list(low)
    for option, number in more.items():
        high = astuple(_count(json.dumps({**config, **few, option: few[option] + 1}), *settings))
        # Blocks are alike: what one more of them costs, so do the rest.
        total = [sum_ + number * (b - a) for sum_, a, b in zip(total, low, high, strict=True)]
    return StepCost(*total)


@lru_cache(maxsize=64)
def _count(
    config: str,
    latents_shape: tuple[int, int, int, int],
    num_videos: int,
    reference: str,
    step_mode: str,
    policy: str | None,
    adapter: tuple[int, tuple[str, ...]] | None,
    bf16: bool,
    frozen: torch.dtype,
    prompt_tokens: int | None,
) -> StepCost:
    transformer, family = _without_contents(json.loads(config), adapter, frozen)
    family.check_latents(transformer, latents_shape)
    host = HostBytes()
    if policy is not None:
        enable_recompute(transformer, policy, host=host.saved)
    transformer.train()
    if bf16:  # as accelerate prepares a model: the output of each forward is made float32 outside of autocast
        forward = torch.autocast("cpu", torch.bfloat16)(transformer.forward)
        transformer.__dict__["forward"] = convert_outputs_to_fp32(forward)
    trained = sum(weight.numel() for weight in transformer.parameters() if weight.requires_grad)
    blocks = [
        sum(weight.nbytes for weight in block.parameters() if not weight.requires_grad)
        for block in family.blocks(transformer)
    ]
    counter = LiveBytes()
    with fake_weights(transformer):
        for weight in transformer.parameters():
            counter.add(weight)
        weights = counter.live
        copied = 0 if reference != "copy" else weights - (0 if adapter is None else 4 * trained)
        buffers = sum(buffer.nbytes for buffer in transformer.buffers()) if copied else 0
        with counter, FullMasks():
            batch, conditions, _kept = _batch(transformer, family, latents_shape, num_videos, prompt_tokens)
            errors, sequential = _errors(transformer, family, batch, conditions, reference, step_mode)
            errors.square().sum().backward()
            if sequential is not None:
                sequential.backward()
    gradients = 4 * trained
    return StepCost(
        weights=weights + copied,
        gradients=gradients,
        optimizer=_ADAM_BYTES * trained,
        activations=counter.peak + buffers - weights - gradients,
        trained=trained,
        tokens=math.prod(family.token_grid(transformer, latents_shape)),
        flops=counter.flops,
        block_weights=sum(blocks) * (2 if reference == "copy" else 1),
        largest_block=max(blocks) * (2 if reference == "copy" else 1),
        host=host.peak,
    )


def _batch(
    transformer: ModelMixin,
    family: ModelFamily,
    latents_shape: tuple[int, ...],
    num_videos: int,
    prompt_tokens: int | None,
) -> tuple[Tensor, dict[str, Tensor], list[Tensor]]:
    """Latents `(N, C, F, H, W)`, conditions of each video, and what a step keeps besides."""
    shapes = family.condition_shapes(transformer, latents_shape, prompt_tokens)
    of_rows = {name: torch.randn(num_videos, *shape, dtype=transformer.dtype) for name, shape in shapes.items()}
    # Rows bring theirs once, videos have copies. How many videos make a row is not known here: at most one each.
    conditions = {name: values.clone() for name, values in of_rows.items()}
    kept = [*of_rows.values(), torch.empty(num_videos, _NUMBERS)]
    if isinstance(family.noise_process, VPrediction):
        kept.append(torch.empty(_SCHEDULE_BYTES * family.noise_process.num_train_timesteps, dtype=torch.uint8))
    return torch.randn(num_videos, *latents_shape), conditions, kept


def _errors(
    transformer: ModelMixin,
    family: ModelFamily,
    batch: Tensor,
    conditions: dict[str, Tensor],
    reference: str,
    step_mode: str,
) -> tuple[Tensor, SequentialErrors | None]:
    """
    Errors of the policy minus those of the reference, by the passes that `compute_loss` makes.

    What only these passes needed is freed before the backward pass begins, as in `compute_loss`.
    """
    # The videos that are compared are put side by side, a single one stays where it is; and a noise for each.
    latents, noise = batch.clone() if len(batch) > 1 else batch, torch.randn_like(batch)
    # In place of the noise process, which looks at its numbers to check them; it makes two tensors as well.
    timesteps, noisy_latents, target = torch.zeros(len(batch), dtype=torch.int64), latents + noise, noise - latents
    denoising = Denoising(noisy_latents, timesteps, conditions, target)
    offset = torch.zeros(len(batch))
    if reference != "none":
        videos = [denoising] if step_mode == "concat" else denoising.one_by_one()
        with torch.no_grad():
            if reference == "adapter":
                transformer.disable_adapters()
            offset = torch.cat([forward_errors(family, transformer, video) for video in videos])
            if reference == "adapter":
                transformer.enable_adapters()
    if step_mode != "sequential":
        videos = [denoising] if step_mode == "concat" else denoising.one_by_one()
        return torch.cat([forward_errors(family, transformer, video) for video in videos]) - offset, None
    sequential = SequentialErrors(denoising, family, transformer)
    return sequential.errors - offset, sequential


def _without_contents(
    config: Mapping[str, Any], adapter: tuple[int, tuple[str, ...]] | None, frozen: torch.dtype
) -> tuple[ModelMixin, ModelFamily]:
    """A transformer with its LoRA on the meta device, in the dtypes of training, and its family."""
    kind: Any = TRANSFORMERS.get(config.get("_class_name", ""))
    if kind is None:
        raise ValueError(
            f"Expected the config.json of one of {', '.join(TRANSFORMERS)}, got `_class_name` "
            f"{config.get('_class_name')!r}. It lies in the folder `transformer` of a pipeline."
        )
    with torch.device("meta"):
        transformer = kind.from_config({**config})
        family = family_for(transformer, CogVideoXDDIMScheduler(prediction_type="v_prediction"))  # any will do
        idle = family.idle_weights(transformer)
        for name, weight in transformer.named_parameters():
            weight.requires_grad_(name not in idle)
        if adapter is not None:
            rank, choice = adapter
            transformer.requires_grad_(False)
            exact = set(transformer._keep_in_fp32_modules or ())
            for name, weight in transformer.named_parameters():
                weight.data = weight.data.to(torch.float32 if exact & set(name.split(".")) else frozen)
            targets = lora_targets(family, transformer, [_IN_ONE_BLOCK.sub("", name) for name in choice])
            transformer.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets))
            for weight in transformer.parameters():
                if weight.requires_grad:
                    weight.data = weight.data.float()
    return transformer, family


@contextmanager
def fake_weights(model: nn.Module) -> Iterator[None]:
    """Replace weights and buffers by fake tensors on the CPU, whose operations allocate as real kernels do."""
    with FakeTensorMode():
        for module in model.modules():
            for name, weight in module._parameters.items():
                if weight is not None:
                    empty = torch.empty(weight.shape, dtype=weight.dtype)
                    module._parameters[name] = nn.Parameter(empty, requires_grad=weight.requires_grad)
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
        yield
