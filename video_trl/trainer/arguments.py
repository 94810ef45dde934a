"""What a trainer refuses before it looks at a model or a dataset."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import PeftConfig

from .base_config import _BaseVideoConfig


if TYPE_CHECKING:
    from .base_trainer import _BaseVideoTrainer


def check_arguments(
    kind: "type[_BaseVideoTrainer]",
    model: Any,
    args: _BaseVideoConfig | None,
    train_dataset: Any,
    eval_dataset: Any,
    ref_model: Any,
    peft_config: PeftConfig | None,
    optimizers: tuple[Any, Any],
) -> _BaseVideoConfig:
    """
    Check a trainer's arguments against its class and against each other.

    Args:
        kind (`type[_BaseVideoTrainer]`): The trainer's class.
        model, args, train_dataset, eval_dataset, ref_model, peft_config, optimizers: As passed to its constructor.

    Returns:
        `_BaseVideoConfig`: `args`, or the defaults of the trainer's own configuration.

    Raises:
        ValueError: If they do not go together, or ask for a kind of parallelism that is not supported.
    """
    if args is None:
        name = Path(model).name if isinstance(model, str | os.PathLike) else type(model).__name__
        args = kind.config_class(output_dir=f"{name}-{kind._name}")
    if not isinstance(args, kind.config_class):
        raise ValueError(f"`args` must be a `{kind.config_class.__name__}`, got a `{type(args).__name__}`.")
    if train_dataset is None and eval_dataset is None:
        raise ValueError("Expected a `train_dataset` (or, to evaluate only, an `eval_dataset`), got neither.")
    if ref_model is not None and not kind.uses_reference:
        raise ValueError(f"{kind.__name__} has no reference; leave `ref_model` out.")
    if peft_config is not None and not args.use_peft:
        raise ValueError("`peft_config` describes an adapter, but `use_peft=False` trains all weights. Drop one.")
    if optimizers[1] is not None and kind.has_auxiliary():
        raise ValueError(
            f"`optimizers` holds a scheduler, which has counted the groups of its optimizer; {kind.__name__} adds "
            "one, for the module that it trains beside the transformer. Pass `optimizers=(optimizer, None)` and name "
            "the schedule by `lr_scheduler_type`."
        )
    if args.deepspeed_plugin is not None or args.fsdp_plugin_args is not None:
        raise ValueError(
            "DeepSpeed and FSDP shard the weights, which checkpoints of this version do not gather. Use plain "
            "data parallelism (`accelerate launch --multi_gpu`)."
        )
    if args.n_gpu > 1:
        raise ValueError(
            f"One process sees {args.n_gpu} GPUs. Launch one process for each, with `accelerate launch` or "
            "`torchrun --nproc_per_node`, or show it one with `CUDA_VISIBLE_DEVICES=0`."
        )
    return args
