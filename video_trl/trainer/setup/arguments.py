"""Check the arguments of a trainer, before a model or a dataset is loaded."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from peft import PeftConfig

from ...data import check_columns
from ..base_config import VideoConfig
from ..parallel.engines import SHARDED, Engine, requested_engine
from ..publishing.sampling import SamplingCallback
from .models import check_can_generate
from .run_options import check_run_options


def check_arguments(
    kind: type[Any],
    model: Any,
    args: VideoConfig | None,
    train_dataset: Any,
    eval_dataset: Any,
    ref_model: Any,
    peft_config: PeftConfig | None,
    optimizers: tuple[Any, Any],
    evaluator: object | None = None,
) -> tuple[VideoConfig, Engine]:
    """
    Check a trainer's arguments against its class and against each other.

    Args:
        kind (`type[VideoTrainer]`): The trainer's class.
        model, args, train_dataset, eval_dataset, ref_model, peft_config, optimizers, evaluator: As
            passed to its constructor.

    Returns:
        `tuple[VideoConfig, Engine]`: `args`, or the defaults of the trainer's own configuration, and the engine.

    Raises:
        ValueError: If they do not go together, or ask for a kind of parallelism that is not supported, or that the
            number of processes does not allow.
    """
    if args is None:
        name = Path(model).name if isinstance(model, str | os.PathLike) else type(model).__name__
        args = kind.config_class(output_dir=f"{name}-{kind.method_name}")
    if not isinstance(args, kind.config_class):
        raise ValueError(f"`args` must be a `{kind.config_class.__name__}`, got a `{type(args).__name__}`.")
    if train_dataset is None and eval_dataset is None:
        raise ValueError("Expected a `train_dataset` (or, to evaluate only, an `eval_dataset`), got neither.")
    if isinstance(train_dataset, dict):  # of `eval_dataset` each is evaluated; here, which one to train on is unclear
        check_columns(train_dataset, kind.row_type)
    if ref_model is not None and not kind.has_reference(args):
        raise ValueError(f"{kind.__name__} has no reference; leave `ref_model` out.")
    if peft_config is not None and not args.use_peft:
        raise ValueError("`peft_config` describes an adapter, but `use_peft=False` trains all weights. Drop one.")
    if optimizers[1] is not None and kind.has_head(args):
        raise ValueError(
            f"`optimizers` holds a scheduler, which has counted the groups of its optimizer; {kind.__name__} adds "
            "one, for its head. Pass `optimizers=(optimizer, None)` and name "
            "the schedule by `lr_scheduler_type`."
        )
    evaluates = eval_dataset not in (None, {}) or evaluator is not None
    check_run_options(args, evaluates=evaluates, has_optimizer=optimizers[0] is not None)
    engine = requested_engine(args)
    if any(optimizers) and engine.startswith("zero"):
        raise ValueError(
            f"`optimizers` has no effect with the engine '{engine}': DeepSpeed makes its own from the configuration. "
            "Name the optimizer by `optim` and the schedule by `lr_scheduler_type`, or train with another engine."
        )
    args.check_engine(engine)
    if args.world_size % args.processes_per_row:
        raise ValueError(
            f"{args.world_size} process(es) cannot be divided into groups of {args.processes_per_row} "
            f"({args.describe_processes_per_row()}). Launch a multiple of that, or lower the sizes."
        )
    if args.context_parallel_size > 1 and kind.has_head(args):
        raise ValueError(
            f"`context_parallel_size={args.context_parallel_size}` is not supported by {kind.__name__}: its head "
            "would see a part of the tokens only. Set it to 1."
        )
    if args.n_gpu > 1:
        raise ValueError(
            f"One process sees {args.n_gpu} GPUs. Launch one process for each, with `accelerate launch` or "
            "`torchrun --nproc_per_node`, or show it one with `CUDA_VISIBLE_DEVICES=0`."
        )
    return args, engine


def check_generation(
    engine: Engine, args: VideoConfig, evaluator: object | None, callbacks: Sequence[object] | None
) -> None:
    """Raise a `ValueError` if sample videos are asked for and no process could make them by itself."""
    generators = [evaluator, *(callback for callback in callbacks or () if isinstance(callback, SamplingCallback))]
    asking = [type(generator).__name__ for generator in generators if generator is not None]
    if asking and (engine in SHARDED or args.context_parallel_size > 1):
        how = f"the engine '{engine}'" if engine in SHARDED else "`context_parallel_size` > 1"
        raise ValueError(
            f"{', '.join(asking)} would generate videos on the main process, which with {how} cannot run the "
            "transformer alone. Evaluate the checkpoints afterwards, with one process."
        )


def check_generators(
    pipeline: DiffusionPipeline | None, evaluator: object | None, callbacks: Sequence[object] | None
) -> None:
    """Raise a `ValueError` if sample videos are asked for and there is no pipeline, or no whole one, to make them."""
    check_can_generate(pipeline, "`evaluator`", needed=evaluator is not None)
    for callback in callbacks or ():
        check_can_generate(pipeline, f"`{type(callback).__name__}`", needed=isinstance(callback, SamplingCallback))
