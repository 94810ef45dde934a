"""
Examples:

  video-trl estimate gdpo                                                        the sandbox
  video-trl estimate gdpo --preset phygdpo-paper --num_gpus 8 --gpu_gib 80
  video-trl estimate dpo --model_name_or_path Wan-AI/Wan2.1-T2V-1.3B-Diffusers --num_frames 81 --height 480 \\
      --width 832 --gpu_gib 24
  video-trl estimate dpo --config examples/configs/wan2.1-14b-dpo.yaml \\
      --accelerate_config examples/accelerate_configs/fsdp2.yaml --context_parallel_size 4

Memory of each GPU by part, operations and communication of a training step, and if that does not fit the GPU, the
cheapest way found that does. Nothing of the model's size is allocated and no weights are loaded: only the small JSON
files of the pipeline are read. The file of --config is that of `video-trl train`.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, make_dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, get_type_hints

from ..load import SANDBOX
from ..methods import Method
from .methods import DataArguments, config_of, method_named, preset_values
from .parser import UsageError, check, parse, read_yaml, required, say
from .sources import read_attribute
from .train import launched


if TYPE_CHECKING:
    from ..trainer.planning.estimate import Placement, Workload


logger = logging.getLogger(__name__)


@dataclass
class EstimateArguments:
    """The options of a run on which its memory depends, and the GPUs."""

    preset: str | None = field(
        default=None, metadata={"help": "Settings of a published run, as of `video-trl train`."}
    )
    model_name_or_path: str = field(
        default=SANDBOX, metadata={"help": "Repository id or path of a pipeline in diffusers layout, or 'sandbox'."}
    )
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of its repository."})
    num_frames: int | None = field(default=None, metadata={"help": "Frames of a video."})
    height: int | None = field(default=None, metadata={"help": "Its height in pixels."})
    width: int | None = field(default=None, metadata={"help": "Its width in pixels."})
    max_sequence_length: int | None = field(
        default=None, metadata={"help": "Tokens of a prompt; unset: those of the published checkpoints."}
    )
    per_device_train_batch_size: int = field(default=1, metadata={"help": "Rows (videos, pairs, groups) at a time."})
    num_rejected: int = field(default=3, metadata={"help": "Rejected videos of a row, where it has any."})
    relation_tokens: int = field(
        default=3600, metadata={"help": "Methods with a teacher: its tokens that the relation loss compares."}
    )
    use_peft: bool = field(default=True, metadata={"help": "Train an adapter; off: all weights."})
    lora_rank: int = field(default=48, metadata={"help": "Rank of the adapter."})
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={"help": "Its layers: 'attention' (if unset), 'attention+ffn', 'all-linear', or names."},
    )
    bf16: bool = field(default=True, metadata={"help": "Compute in bfloat16."})
    quantization: Literal["nf4", "int8", "fp8"] | None = field(
        default=None, metadata={"help": "What frozen weights are kept in: 'nf4', 'int8' or 'fp8'."}
    )
    step_mode: Literal["auto", "concat", "singles", "sequential"] = field(
        default="auto", metadata={"help": "'concat', 'singles', 'sequential', or the fastest that fits."}
    )
    activation_checkpointing: bool = field(default=True, metadata={"help": "Checkpoint activations."})
    checkpointing_policy: str = field(default="full", metadata={"help": "Which; as in training."})
    offload_weights: bool = field(
        default=False, metadata={"help": "Frozen weights of the blocks in the host's memory; as in training."}
    )
    accelerate_config: str | None = field(
        default=None, metadata={"help": "File of `accelerate launch` that says `num_gpus` and `engine`."}
    )
    num_gpus: int = field(default=1, metadata={"help": "GPUs in all."})
    engine: str = field(default="ddp", metadata={"help": "'ddp', 'zero2', 'zero3', 'zero3-offload' or 'fsdp2'."})
    context_parallel_size: int = field(default=1, metadata={"help": "GPUs that share the tokens of a video."})
    group_parallel_size: int = field(default=1, metadata={"help": "GPUs that share the videos of a pair or group."})
    gpu_gib: float = field(default=80.0, metadata={"help": "Memory of each GPU, in GiB."})


def run(argv: Sequence[str]) -> int:
    method, rest = method_named("estimate", argv, __doc__)
    args = _arguments(method, rest)
    from ..trainer.planning.estimate import (
        HEADROOM,
        describe_estimate,
        describe_recommendation,
        estimate,
        fitting_step_mode,
    )
    from .dry_run import empty_models

    size = _size(args)
    models = empty_models(args.model_name_or_path, args.revision)
    work = workload(method.load(), args, models, size)
    gpu_memory = int(args.gpu_gib * 2**30)
    mode = args.step_mode
    if mode == "auto":
        family, transformer, _ = models
        tokens = math.prod(family.token_grid(transformer, work.latents_shape))
        mode = fitting_step_mode(work, _placement(args, "concat"), gpu_memory, tokens)
    cost = estimate(work, _placement(args, mode))
    hint = ", the built-in tiny model; --model_name_or_path names a real one" * (args.model_name_or_path == SANDBOX)
    say(f"{method.name} of {args.model_name_or_path}{hint}; videos of {' x '.join(map(str, size))}")
    say(describe_estimate(cost))
    fits = cost.peak <= HEADROOM * gpu_memory
    say(f"{'Fits' if fits else 'Does not fit'} {args.gpu_gib:g} GiB, a tenth of it left free for the allocator.")
    if not fits:
        logger.info("Looking for the cheapest way that fits, which takes up to a minute.")
        say(describe_recommendation(work, gpu_memory, args.num_gpus))
    say(f"Before training: {before(args, models, size)}.\nNot counted: sample videos; CUDA itself (about 0.5 GiB).")
    return 0


def before(args: EstimateArguments, models: tuple[Any, Any, Any], size: tuple[int, int, int]) -> str:
    """Memory of encoding videos and prompts, whose models leave the GPU when training begins."""
    from ..trainer.planning.estimate import encoding_peak
    from .dry_run import empty_encoders

    family, _, vae = models
    parts = [f"{encoding_peak(vae, family, size) / 2**30:.3g} GiB to encode a video"]
    # All encoders of prompts are there at once, then the VAE, then those of first frames, which are float32.
    for what, names, width in (
        ("text encoders", family.text_encoders, 2 if args.bf16 else 4),
        ("image encoders", family.image_encoders, 4),
    ):
        encoders = empty_encoders(args.model_name_or_path, args.revision, names)
        weights = width * sum(weight.numel() for encoder in encoders.values() for weight in encoder.parameters())
        parts += [f"{weights / 2**30:.3g} GiB of {what} ({', '.join(names)})"] if names else []
    return ", ".join(parts)


def _size(args: EstimateArguments) -> tuple[int, int, int]:
    """Frames, height and width of a video."""
    sizes = (args.num_frames, args.height, args.width)
    if args.model_name_or_path == SANDBOX and sizes == (None, None, None):
        return (13, 64, 64)
    frames, height, width = (
        required(key, value, example)
        for key, value, example in zip(("num_frames", "height", "width"), sizes, ("81", "480", "832"), strict=True)
    )
    return frames, height, width


def workload(
    trainer_class: type[Any], args: EstimateArguments, models: tuple[Any, Any, Any], size: tuple[int, int, int]
) -> "Workload":
    """What these options train."""
    from ..trainer.planning.estimate import Workload
    from .dry_run import latents_shape, reference_pass

    family, transformer, vae = models
    videos, degree = trainer_class.videos_per_row(args, args.num_rejected), args.group_parallel_size
    if degree > 1 and (videos % degree or args.num_gpus % (degree * args.context_parallel_size)):
        raise UsageError(
            f"--group_parallel_size={degree} must divide the number of videos that the loss of a row compares, "
            f"{videos}, and times --context_parallel_size={args.context_parallel_size} the number of GPUs, "
            f"{args.num_gpus}."
        )
    return replace(
        Workload.of(
            transformer,
            latents_shape(family, vae, size),
            videos // degree,
            args,
            reference_pass(trainer_class, args),
        ),
        alignment=(1, args.relation_tokens, 1024) if trainer_class.aligns_with_teacher else None,
    )


def _placement(args: EstimateArguments, step_mode: Any) -> "Placement":
    from ..trainer.planning.estimate import Placement

    policy = args.checkpointing_policy if args.activation_checkpointing else None
    engine: Any = args.engine
    shared, offloaded = args.context_parallel_size, args.offload_weights
    return Placement(args.num_gpus, engine, shared, step_mode, policy, offload_weights=offloaded)


def _arguments(method: Method, argv: Sequence[str]) -> EstimateArguments:
    """Of a file for training, the options that matter here; a misspelt one is refused all the same."""
    config = config_of(method)
    kind = _with_options_of(method, config)
    words = list(argv)
    content = preset_values(method.name, words)
    if any(word.partition("=")[0] == "--config" for word in words):
        words = check((kind, DataArguments, config), words)
        place = words.index("--config")
        content |= read_yaml(words[place + 1])
        words = [*words[:place], *words[place + 2 :]]
    if "--accelerate_config" in words:
        number, engine = launched(["--config_file", words[words.index("--accelerate_config") + 1]])
        content |= {"num_gpus": number, "engine": engine}
    known = {item.name for item in fields(kind)}
    for key, value in content.items():
        if key in known and value is not None:
            given = [f"--{key}", *map(str, value)] if isinstance(value, list) else [f"--{key}={value}"]
            words = [*given, *words]
    (args,) = parse(f"estimate {method.name}", __doc__, [kind], words)
    for key in ("num_rejected", "per_device_train_batch_size", "relation_tokens", "gpu_gib", "group_parallel_size"):
        if not 0 < vars(args)[key] < math.inf:
            raise UsageError(f"--{key} must be positive, got {vars(args)[key]}.")
    return args


def _with_options_of(method: Method, config: type[Any]) -> type[EstimateArguments]:
    """The arguments, with those options of the method's configuration that decide how much a step computes."""
    decisive = read_attribute(method.path, "workload_options")
    if decisive is None:
        decisive = method.load().workload_options
    types = get_type_hints(config)  # where annotations are strings, too
    own = [
        (item.name, types[item.name], field(default=item.default, metadata=item.metadata))
        for item in fields(config)
        if item.name in decisive
    ]
    return make_dataclass("EstimateArguments", own, bases=(EstimateArguments,))
