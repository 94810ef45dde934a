"""What a run may be resumed from, and which of its settings are kept, change, or are refused."""

import json
import logging
from pathlib import Path
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from transformers import TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from ...files import read_json
from ..base_config import VideoConfig
from ..parallel.engines import Engine
from .weights import DESCRIPTION_NAME


logger = logging.getLogger(__name__)

ARGUMENTS_NAME = "training_args.json"
METHOD = "method"
"""Key of the description of a run under which its method stands."""
_DEEPSPEED_NAME = "latest"  # names the folder of DeepSpeed's states

# The optimizer's own numbers, which a checkpoint holds together with its states.
_KEPT = (
    "learning_rate", "head_learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "optim_args",
)  # fmt: skip
# States of one kind that another kind can go on with.
_SAME_STATES = ({"adamw_torch", "adamw_torch_fused"},)
_SCHEDULES_WITH_STATES = ("reduce_lr_on_plateau", "greedy")
# Of `TrainingArguments`, what the rest of a run depends on. `check_description` compares seeds, rows and batches.
_INHERITED = (
    "max_steps", "num_train_epochs", "warmup_steps", "lr_scheduler_type", "lr_scheduler_kwargs", "max_grad_norm",
    "bf16", "fp16",
)  # fmt: skip
# Of the package's own options, those that change no number of a resumed run, or are compared with the model.
_WITHOUT_EFFECT = {
    "per_device_train_batch_size", "per_device_eval_batch_size", "logging_steps", "logging_first_step",
    "logging_nan_inf_filter",
    "remove_unused_columns", "ddp_find_unused_parameters", "dataloader_pin_memory", "data_seed", "cache_dir",
    "encode_batch_size", "activation_checkpointing", "activation_checkpointing_kwargs", "gradient_checkpointing",
    "checkpointing_policy", "model_init_kwargs", "use_peft",
    "lora_rank", "lora_alpha", "use_rslora", "use_dora", "init_adapter",
    "teacher_batch_size", "row_chunk", "overwrite_output_dir",
}  # fmt: skip


def check_resumable(directory: Path, engine: Engine) -> None:
    """
    Check that a checkpoint holds what a run continues with, beside weights.

    Args:
        directory (`Path`): The checkpoint.
        engine (`str`): What writes the states of the optimizer.

    Raises:
        ValueError: If it has weights only: momentum and warm-up would begin anew.
    """
    names = [OPTIMIZER_NAME if engine in ("ddp", "fsdp2") else _DEEPSPEED_NAME, SCHEDULER_NAME]
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        raise ValueError(
            f"{directory} cannot be resumed: it lacks {' and '.join(missing)}, without which the optimizer and the "
            "learning rate would start anew (`save_only_model=True` saves no more). Start a new run from its weights: "
            f"`pipeline.load_lora_weights({str(directory)!r})`, or with all weights trained its folder `transformer`, "
            "and pass the pipeline as `model`."
        )


def check_settings(directory: Path, args: VideoConfig, method: str) -> None:
    """
    Compare the settings of a checkpoint with those of the trainer that is about to resume it, and say what differs.

    Args:
        directory (`Path`): The checkpoint.
        args (`VideoConfig`): Configuration of the trainer.
        method (`str`): Name of its method.

    Raises:
        ValueError: If the states of the checkpoint are of another optimizer, schedule or method.
    """
    before = read_json(directory / ARGUMENTS_NAME)
    trained_by = read_json(directory / DESCRIPTION_NAME).get(METHOD, method)
    if trained_by != method:
        raise ValueError(
            f"{directory} is of a run of {trained_by}, and this is {method}: the momentum of one loss means nothing "
            "to another. Start a new run, with the adapter of that one loaded in the pipeline."
        )
    now = json.loads(args.to_json_string())
    changed = {name: (before[name], now[name]) for name in before.keys() & now.keys() if before[name] != now[name]}
    _refuse(directory, changed)
    own = {
        name for kind in type(args).__mro__ if kind not in TrainingArguments.__mro__ for name in kind.__annotations__
    }
    kept = {name: pair for name, pair in changed.items() if name in _KEPT}
    applied = {
        name: pair
        for name, pair in changed.items()
        if name not in kept and (name in _INHERITED or name in own - _WITHOUT_EFFECT)
    }
    if kept:
        logger.warning(
            "Resuming keeps these settings as the checkpoint has them; the new values have no effect (checkpoint / "
            "trainer): %s. Start a new run from its weights to change them.",
            _listed(kept),
        )
    if applied:
        logger.warning(
            "Resuming with other settings, from this step on (checkpoint / trainer): %s. The result is none of either "
            "setting alone.",
            _listed(applied),
        )


def check_optimizer_state(state: dict[str, Any], optimizer: torch.optim.Optimizer, directory: Path) -> None:
    """
    Raise a `ValueError` if the states of a checkpoint are of another kind of optimizer, which may take them silently.

    Args:
        state (`dict`): State dict of the checkpoint's optimizer.
        optimizer (`torch.optim.Optimizer`): The one that is about to load it.
        directory (`Path`): The checkpoint.
    """
    optimizer = optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer
    theirs, ours = ({*groups[0]} for groups in (state["param_groups"], optimizer.param_groups))
    if theirs != ours:
        raise ValueError(
            f"{directory} holds the states of another optimizer than {type(optimizer).__name__}: its options are "
            f"{sorted(theirs - {'params'})}, expected {sorted(ours - {'params'})}. Pass the optimizer of that run, or "
            "start a new one."
        )


def _refuse(directory: Path, changed: dict[str, tuple[Any, Any]]) -> None:
    reasons = {
        "optim": lambda pair: not any({*pair} <= kinds for kinds in _SAME_STATES),
        "optim_class": lambda pair: True,
        "lr_scheduler_type": lambda pair: any(kind in _SCHEDULES_WITH_STATES for kind in pair),
        "metric_for_best_model": lambda pair: None not in pair,  # the best value so far is one of the other metric
        "greater_is_better": lambda pair: None not in pair,
    }
    for name, is_refused in reasons.items():
        if name in changed and is_refused(changed[name]):
            raise ValueError(
                f"{directory} cannot be resumed with another `{name}` (checkpoint / trainer): "
                f"{' / '.join(map(repr, changed[name]))}; its states would mean nothing. Use that of the run, or "
                "start a new run from its weights."
            )


def _listed(changes: dict[str, tuple[Any, Any]]) -> str:
    return ", ".join(f"{name}: {before} / {now}" for name, (before, now) in sorted(changes.items()))
