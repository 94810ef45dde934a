"""Estimate memory, FLOPs and communication per GPU, and find a configuration that fits."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, get_args

import torch
from diffusers import ModelMixin
from torch._subclasses.fake_tensor import FakeTensorMode

from ...losses.alignment import trd_loss
from ...models import ModelFamily
from ..setup.quantization import Quantization, check_quantised_engine
from ..step.passes import StepMode
from .counter import LiveBytes, StepCost, class_name, count_step, fake_weights


EngineName = Literal["ddp", "zero1", "zero2", "zero3", "zero3-offload", "fsdp2"]
ReferencePass = Literal["none", "adapter", "copy"]
LONG_VIDEO = 512  # tokens with which a forward a video takes no more time than one for all; docs/benchmarks/step.md
HEADROOM = 0.9  # proportion of a GPU's memory to plan with: the allocator's gaps and CUDA need the rest
_SHARDS_WEIGHTS = ("zero3", "zero3-offload", "fsdp2")
# Options of a step that save memory, fastest first: (step mode, checkpointing policy).
_STEP_OPTIONS: list[tuple[StepMode, str | None]] = [
    ("concat", None),
    ("sequential", None),
    ("concat", "attention"),
    ("singles", "attention"),
    ("sequential", "attention"),
    ("concat", "full"),
    ("singles", "full"),
    ("sequential", "full"),
    ("sequential", "offload"),
]


@dataclass(frozen=True)
class Workload:
    """
    A step to estimate. The fields are those of [`~video_trl.trainer.planning.counter.count_step`].

    Attributes:
        config (`Mapping`): Content of the transformer's `config.json`.
        latents_shape (`tuple` of 4 `int`): Shape `(C, F, H, W)` of one video.
        num_videos (`int`): Videos in a micro-batch on one GPU.
        reference (`"none"`, `"adapter"` or `"copy"`): The reference: none, the policy with its adapter off, or a copy.
        lora_rank (`int`, *optional*): Rank of the adapter; `None` trains all weights.
        lora_target_modules (`str` or list of `str`, *optional*): Its layers, as the trainers take them.
        bf16 (`bool`): Compute in bfloat16.
        frozen_dtype (`torch.dtype`, *optional*): Of the frozen weights; as the trainers load them if not given.
        quantization (`str`, *optional*): Format of frozen weights.
        prompt_tokens (`int`, *optional*): Tokens of a prompt; those of the published checkpoints if not given.
        alignment (`tuple[int, int, int]`, *optional*): For VideoREPA: frames, tokens of a frame, and width of the
            teacher's tokens, which the relation loss compares.
    """

    config: Mapping[str, Any]
    latents_shape: tuple[int, int, int, int]
    num_videos: int
    reference: ReferencePass = "none"
    lora_rank: int | None = 48
    lora_target_modules: str | Sequence[str] | None = None
    bf16: bool = True
    frozen_dtype: torch.dtype | None = None
    quantization: Quantization | None = None
    prompt_tokens: int | None = None
    alignment: tuple[int, int, int] | None = None

    @classmethod
    def of(
        cls,
        transformer: ModelMixin,
        latents_shape: tuple[int, int, int, int],
        videos_of_row: int,
        options: "WorkloadOptions",
        reference: ReferencePass,
    ) -> "Workload":
        """Of a transformer, the videos of a row that are on one GPU, and the configuration of a trainer."""
        config = json.loads(transformer.to_json_string())  # where dtypes and the like are words
        config.pop("quantization_config", None)
        return cls(
            config={**config, "_class_name": class_name(transformer)},
            latents_shape=latents_shape,
            num_videos=videos_of_row * options.per_device_train_batch_size,
            reference=reference,
            lora_rank=options.lora_rank if options.use_peft else None,
            lora_target_modules=options.lora_target_modules,
            bf16=bool(options.bf16),
            quantization=options.quantization,
            prompt_tokens=options.max_sequence_length,
        )


class WorkloadOptions(Protocol):
    """What a [`Workload`] takes from the configuration of a trainer, or from a command line with the same names."""

    per_device_train_batch_size: int
    use_peft: bool
    lora_rank: int

    @property
    def lora_target_modules(self) -> str | list[str] | None: ...

    bf16: bool
    quantization: Quantization | None
    max_sequence_length: int | None


@dataclass(frozen=True)
class Placement:
    """
    GPUs, engine and options of a step.

    Attributes:
        num_gpus (`int`): GPUs in all.
        engine (`str`): `"ddp"`, DeepSpeed's `"zero1"`, `"zero2"`, `"zero3"` and `"zero3-offload"`, or `"fsdp2"`.
        context_parallel (`int`): GPUs that share the tokens of a video.
        step_mode (`"concat"`, `"singles"` or `"sequential"`): See `step_mode` of the preference trainers.
        checkpointing_policy (`str`, *optional*): Which activations are checkpointed; none if `None`.
        offload_weights (`bool`): Whether the frozen weights of the blocks are in the host's memory.

    Raises:
        ValueError: If a number is not positive, the GPUs are not divided by `context_parallel`, or there is no such
            engine.
    """

    num_gpus: int = 1
    engine: EngineName = "ddp"
    context_parallel: int = 1
    step_mode: StepMode = "concat"
    checkpointing_policy: str | None = "full"
    offload_weights: bool = False

    def __post_init__(self) -> None:
        if self.engine not in get_args(EngineName):
            raise ValueError(f"`engine` must be one of {', '.join(get_args(EngineName))}, got {self.engine!r}.")
        if self.num_gpus < 1 or self.context_parallel < 1 or self.num_gpus % self.context_parallel:
            raise ValueError(
                f"`num_gpus` must be a positive multiple of `context_parallel`, got {self.num_gpus} and "
                f"{self.context_parallel}."
            )

    @property
    def cluster(self) -> tuple[EngineName, int, bool]:
        """What decides where weights are, and how videos are divided among the GPUs."""
        return self.engine, self.context_parallel, self.offload_weights

    def __str__(self) -> str:
        checkpointing = self.checkpointing_policy or "none"
        division = f", {self.context_parallel} GPUs a video" if self.context_parallel > 1 else ""
        of = f"{self.num_gpus} x {self.engine}" if self.num_gpus > 1 else "one GPU"
        offloaded = ", offload_weights" if self.offload_weights else ""
        return f"{of}{division}, step_mode={self.step_mode}, activation checkpointing: {checkpointing}{offloaded}"


@dataclass(frozen=True)
class Estimate:
    """
    Memory, FLOPs and communication of one micro-batch per GPU.

    Attributes:
        placement ([`Placement`]): GPUs, engine and options of the step.
        parts (`dict[str, int]`): Bytes at the peak, by part.
        host (`dict[str, int]`): Bytes that each process has in the host's memory instead, by part.
        flops (`int`): Floating-point operations.
        sent (`dict[str, int]`): Bytes sent in an optimizer step of one micro-batch, by purpose.
        trained (`int`): Number of trainable parameters, on all GPUs together.
        tokens (`int`): Tokens of one video.
    """

    placement: Placement
    parts: dict[str, int]
    host: dict[str, int]
    flops: int
    sent: dict[str, int]
    trained: int
    tokens: int

    @property
    def peak(self) -> int:
        """Bytes at the peak, without the gaps of an allocator."""
        return sum(self.parts.values())

    @property
    def activations(self) -> int:
        """Bytes of activations."""
        return sum(self.parts.get(part, 0) for part in ("block inputs", "other activations"))


def estimate(workload: Workload, placement: Placement) -> Estimate:
    """
    Estimate memory by part, FLOPs and communication from a step that [`count_step`] counts.

    Weights, gradients, moments and activations are divided as the engine divides them. Where weights are sharded, a
    rank holds its shard and two gathered blocks.

    Raises:
        ValueError: As `count_step`; or if quantised weights are to be sharded, which no trainer does.
    """
    check_quantised_engine(workload.quantization, placement.engine)
    return _divided(workload, placement, _count(workload, placement))


def _count(workload: Workload, placement: Placement) -> StepCost:
    policy = placement.checkpointing_policy
    return count_step(
        workload.config,
        workload.latents_shape,
        num_videos=workload.num_videos,
        reference=workload.reference,
        step_mode=placement.step_mode,
        checkpointing=policy is not None,
        checkpointing_policy=policy or "full",
        lora_rank=workload.lora_rank,
        lora_target_modules=workload.lora_target_modules,
        bf16=workload.bf16,
        frozen_dtype=workload.frozen_dtype,
        quantization=workload.quantization,
        prompt_tokens=workload.prompt_tokens,
    )


def _divided(workload: Workload, placement: Placement, step: StepCost) -> Estimate:
    flops = step.flops // placement.context_parallel
    sent = _communication(workload, placement, step)
    parts, host = _parts(workload, placement, step), _host_parts(workload, placement, step)
    return Estimate(placement, parts, host, flops, sent, step.trained, step.tokens)


def _adapter(workload: Workload, step: StepCost) -> int:
    return 4 * step.trained if workload.lora_rank is not None else 0


def _host_parts(workload: Workload, placement: Placement, step: StepCost) -> dict[str, int]:
    number, on_host = placement.num_gpus, placement.engine == "zero3-offload"
    of_blocks = step.block_weights if placement.offload_weights else 0
    parts = {
        "weights": (step.weights - _adapter(workload, step)) // number if on_host else of_blocks,
        "optimizer": step.optimizer // number if on_host else 0,
        "block inputs": step.host // placement.context_parallel,
    }
    return {name: count for name, count in parts.items() if count}


def _parts(workload: Workload, placement: Placement, step: StepCost) -> dict[str, int]:
    number, engine = placement.num_gpus, placement.engine
    depth = int(workload.config["num_layers"])
    adapter = _adapter(workload, step)
    base = step.weights - adapter
    one_block = base // depth // (2 if workload.reference == "copy" else 1)
    sharded = engine in _SHARDS_WEIGHTS and number > 1
    on_host = engine == "zero3-offload"
    resident = 0 if on_host else base // number if sharded else base
    if placement.offload_weights:  # a block that runs, and the one that comes next
        resident = base - step.block_weights + 2 * step.largest_block
    inputs = min(_block_inputs(workload, placement, step), step.activations)
    parts = {
        "weights": resident + (2 * one_block if on_host or sharded else 0),
        "adapter": adapter // number if sharded else adapter,
        "gradients": step.gradients if engine in ("ddp", "zero1") else step.gradients // number,
        "optimizer": 0 if on_host else step.optimizer if engine == "ddp" else step.optimizer // number,
        "buckets": step.gradients if number > 1 and not sharded else 0,
        "block inputs": inputs // placement.context_parallel,
        "other activations": (step.activations - inputs) // placement.context_parallel,
    }
    if workload.alignment is not None:
        parts["relation loss"] = _relation_bytes(workload)
    return {name: count for name, count in parts.items() if count}


def _block_inputs(workload: Workload, placement: Placement, step: StepCost) -> int:
    """Bytes of the hidden states saved for the backward pass, of all videos whose graphs are alive at once."""
    config, policy = workload.config, placement.checkpointing_policy
    if policy is None or policy == "offload":
        return 0
    alive = 1 if placement.step_mode == "sequential" else workload.num_videos
    width = config["num_attention_heads"] * config["attention_head_dim"]
    return alive * step.tokens * width * int(config["num_layers"]) * (2 if workload.bf16 else 4)


def _relation_bytes(workload: Workload) -> int:
    """Bytes at the peak of the relation loss and its gradient, counted on fake tensors."""
    assert workload.alignment is not None
    frames, tokens, width = workload.alignment
    counter = LiveBytes()
    with FakeTensorMode(), counter:
        student = torch.randn(workload.num_videos, frames, tokens, width, requires_grad=True)
        teacher = torch.randn(workload.num_videos, frames, tokens, width)
        trd_loss(student, teacher)[0].backward()
    return counter.peak


def _communication(workload: Workload, placement: Placement, step: StepCost) -> dict[str, int]:
    number, videos, degree = placement.num_gpus, workload.num_videos, placement.context_parallel
    others = (number - 1) / number
    deepspeed = placement.engine.startswith("zero")
    trained = (2 if deepspeed and workload.bf16 else 4) * step.trained  # DeepSpeed rounds what is trained as well
    sent: dict[str, float] = {}
    one_by_one = placement.step_mode == "sequential"
    if number > 1:
        # A ring all-reduce is a reduce-scatter and an all-gather; sharded gradients need the first alone.
        sent["gradients"] = others * trained * (1 if placement.engine in _SHARDS_WEIGHTS else 2)
        if deepspeed and one_by_one and placement.engine != "zero1":
            sent["gradients"] *= videos  # which it does not keep until the last backward pass
    if placement.engine in ("zero1", "zero2") and number > 1:
        sent["weights"] = others * trained  # each process updates its part, and the others get it
    if placement.engine in _SHARDS_WEIGHTS and number > 1:
        sent["weights"] = others * _gathered_weights(workload, placement, step, trained)
    if degree > 1:
        config = workload.config
        width, depth = config["num_attention_heads"] * config["attention_head_dim"], int(config["num_layers"])
        repeated = 0 if placement.checkpointing_policy in (None, "attention") else 1
        passes = videos * (2 + repeated + (workload.reference != "none")) + (videos - 1 if one_by_one else 0)
        # Queries, keys, values and the output change between tokens and heads: four exchanges of a block's states.
        of_block = 4 * step.tokens / degree * width * (2 if workload.bf16 else 4)
        sent["tokens and heads"] = passes * depth * of_block * (degree - 1) / degree
    return {name: int(count) for name, count in sent.items()}


def _gathered_weights(workload: Workload, placement: Placement, step: StepCost, trained: int) -> int:
    """Bytes of weights that are gathered in a micro-batch; `trained` are those of the trained ones."""
    videos, one_by_one = workload.num_videos, placement.step_mode == "sequential"
    of_reference = (videos if one_by_one else 1) if workload.reference != "none" else 0
    backward = videos if one_by_one else 1
    forward = 2 * videos - 1 if one_by_one else 1  # again but for the last
    passes = of_reference + forward + backward
    adapter = _adapter(workload, step)
    base = (step.weights - adapter) // (2 if workload.reference == "copy" else 1)
    if not adapter:
        return passes * (base if placement.engine == "fsdp2" else trained)
    if placement.engine != "fsdp2":  # layer by layer: without the adapter where it is off
        return base * passes + trained * (passes - of_reference)
    if workload.reference == "copy":
        return base * passes + adapter * (passes - of_reference)
    # What is in no block stays whole until a backward pass ends: gathered once for each of these.
    return (step.block_weights + adapter) * passes + (base - step.block_weights) * backward


def encoding_peak(vae: ModelMixin, family: ModelFamily, size: tuple[int, int, int]) -> int:
    """
    Bytes at the peak of encoding one video in float32, as before training, weights of the VAE included.

    Args:
        vae (`ModelMixin`): On the device `meta`; its weights are replaced by fake tensors.
        family ([`ModelFamily`]): Of the pipeline.
        size (`tuple[int, int, int]`): Frames, height and width in pixels.
    """
    counter = LiveBytes()
    with fake_weights(vae), torch.no_grad():
        for weight in vae.parameters():
            counter.add(weight)
        with counter:
            family.encode_video(vae, torch.randn(1, 3, *size))
    return counter.peak


def placements(
    num_gpus: int, engines: Sequence[EngineName], heads: int, *, offloadable: bool = False
) -> Iterator[Placement]:
    """
    Configurations for a number of GPUs, roughly fastest first: options of the step, then weights in the host's memory
    where they are frozen (`offloadable`), then sharded weights, then context parallelism over 2, 4 and 8 GPUs, which
    must divide the attention heads.
    """
    for degree in (1, 2, 4, 8):
        if num_gpus % degree or heads % degree:
            continue
        for engine in engines:
            if degree > 1 and engine == "ddp" and len(engines) > 1:
                continue
            for mode, policy in _STEP_OPTIONS:
                yield Placement(num_gpus, engine, degree, mode, policy)
            if offloadable and engine == "ddp":
                for mode, policy in _STEP_OPTIONS:
                    if policy is not None:
                        yield Placement(num_gpus, engine, degree, mode, policy, offload_weights=True)


def recommend(
    workload: Workload, gpu_memory: int, num_gpus: int = 1, engines: Sequence[EngineName] = ("ddp", "fsdp2")
) -> Estimate | None:
    """
    Find the first of `placements` whose peak fits the memory of a GPU.

    Args:
        workload ([`Workload`]): The step.
        gpu_memory (`int`): Bytes of memory of each GPU, of which a tenth is left free.
        num_gpus (`int`, defaults to `1`): Number of GPUs.
        engines (`Sequence[str]`, defaults to `("ddp", "fsdp2")`): Engines to choose from; one GPU needs none.

    Returns:
        [`Estimate`] or `None`: `None` if none fits.
    """
    if gpu_memory < 1:
        raise ValueError(f"`gpu_memory` must be a positive number of bytes, got {gpu_memory}.")
    # No engine shards quantised weights.
    engines = engines if num_gpus > 1 and workload.quantization is None else ("ddp",)
    steps: dict[tuple[str, str | None], StepCost] = {}
    too_large: set[tuple[EngineName, int, bool]] = set()
    compares = workload.reference != "none"  # other trainers have no step mode
    offloadable = workload.lora_rank is not None and workload.quantization is None
    for placement in placements(num_gpus, engines, workload.config["num_attention_heads"], offloadable=offloadable):
        if placement.step_mode != "concat" and not compares:
            continue
        if placement.step_mode == "singles" and placement.engine != "ddp":
            continue  # which the trainer refuses
        if placement.cluster in too_large:
            continue
        key = (placement.step_mode, placement.checkpointing_policy)
        if key not in steps:
            steps[key] = _count(workload, placement)
        divided = _divided(workload, placement, steps[key])
        if divided.peak <= HEADROOM * gpu_memory:
            return divided
        if divided.peak - divided.activations > HEADROOM * gpu_memory:  # options of the step save activations only
            too_large.add(placement.cluster)
    return None


def fitting_step_mode(workload: Workload, placement: Placement, gpu_memory: int | None, tokens: int) -> StepMode:
    """
    Choose the fastest step mode that fits; of equally fast ones, that of less memory.

    Long videos go one by one, which takes no more time and less memory than all in one forward; of short ones the cost
    of a call would count. `"sequential"`, which needs a forward more for most videos, is for what does not fit else.

    Args:
        workload ([`Workload`]): The step.
        placement ([`Placement`]): GPUs, engine and options; its step mode is not used.
        gpu_memory (`int`, *optional*): Bytes of memory of each GPU, of which a tenth is left free; `None` on a CPU.
        tokens (`int`): Tokens of a video.
    """
    modes: tuple[StepMode, ...] = ("concat",)
    if placement.engine == "ddp":
        modes = ("singles",) if tokens >= LONG_VIDEO else ("concat", "singles")
    for mode in modes:
        if gpu_memory is None or estimate(workload, replace(placement, step_mode=mode)).peak <= HEADROOM * gpu_memory:
            return mode
    return "sequential"


def accelerator_memory(device: torch.device) -> int | None:
    """Total bytes of memory of an accelerator, `None` for the CPU. Not the free ones: every start decides alike."""
    return None if device.type == "cpu" else torch.get_device_module(device).mem_get_info(device)[1]


def describe_estimate(cost: Estimate) -> str:
    """Format an estimate as lines of text."""
    unit, size = memory_unit(cost)
    flops = f"{cost.flops / 1e15:9.3f} PFLOP" if cost.flops >= 1e12 else f"{cost.flops / 1e9:9.3f} GFLOP"
    lines = [f"{cost.placement}; {cost.tokens:,} tokens a video, {cost.trained:,} trainable parameters"]
    lines += [f"  {name + ':':22}{count / size:9.2f} {unit}" for name, count in cost.parts.items()]
    lines += [f"  {'peak:':22}{cost.peak / size:9.2f} {unit} on each GPU"]
    lines += [f"  {name + ':':22}{count / size:9.2f} {unit} in the host's memory" for name, count in cost.host.items()]
    lines += [f"  {'FLOPs:':22}{flops} a micro-batch on each GPU"]
    lines += [
        f"  {'sent, ' + name + ':':22}{count / size:9.2f} {unit} a step by each GPU"
        for name, count in cost.sent.items()
    ]
    return "\n".join(lines)


def memory_unit(cost: Estimate) -> tuple[str, int]:
    """Name and bytes of the unit in which all parts of an estimate can be read: of tiny models, MiB."""
    return ("GiB", 2**30) if cost.peak >= 2**30 / 4 else ("MiB", 2**20)


def advise(workload: Workload, placement: Placement, gpu_memory: int | None) -> str:
    """
    Say what to change after a step has run out of memory.

    Args:
        workload ([`Workload`]): The step.
        placement ([`Placement`]): GPUs, engine and options.
        gpu_memory (`int`, *optional*): Bytes of memory of each GPU; `None` where that is not known.
    """
    cost = estimate(workload, placement)
    # Less than the step was estimated to take: it has run out of that, whatever else is on the GPU.
    room = min(gpu_memory or cost.peak, cost.peak) - 1
    return (
        f"Memory ran out. As estimated, a step takes\n{describe_estimate(cost)}\n"
        f"{describe_recommendation(workload, room, placement.num_gpus)}\n"
        "`step_mode`, `checkpointing_policy` and `offload_weights` are arguments of the trainer; engines: "
        "docs/trainers/scaling.md."
    )


def describe_recommendation(workload: Workload, gpu_memory: int, num_gpus: int) -> str:
    """
    Say what `recommend` finds. If nothing fits, try the frozen weights in 8 and then in 4 bits.

    Quantisation comes last because it changes the base model.
    """
    fitting = recommend(workload, gpu_memory, num_gpus)
    if fitting is not None:
        return f"This should fit:\n{describe_estimate(fitting)}"
    gpus = f"{num_gpus} GPU{'s' if num_gpus > 1 else ''} of {gpu_memory / 2**30:.4g} GiB"
    advice = f"No configuration fits {gpus}. Use more GPUs, fewer frames or a lower resolution."
    if workload.lora_rank is not None and workload.quantization is None:
        for kind in ("int8", "nf4"):
            fitting = recommend(replace(workload, quantization=kind), gpu_memory, num_gpus)
            if fitting is not None:
                return f"{advice} Or use `quantization='{kind}'`, with which this fits:\n{describe_estimate(fitting)}"
    return advice
