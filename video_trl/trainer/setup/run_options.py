"""Check optimizer, schedule, trackers and evaluations of a run before anything is loaded or encoded."""

import math
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import get_scheduler
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

from ..base_config import VideoConfig
from .loaders import worker_options
from .optimizers import optimizer_and_options, unread_options


_STEPS = 100  # of a schedule that is made to see whether it can be


def check_run_options(args: VideoConfig, *, evaluates: bool, has_optimizer: bool = False) -> None:
    """
    Make the optimizer and schedule of a configuration for one number; look for trackers, evaluations and the folder.

    Args:
        args (`VideoConfig`): The configuration.
        evaluates (`bool`): Whether there are rows, or an evaluator, to evaluate with.
        has_optimizer (`bool`): Whether the user brings the optimizer.

    Raises:
        ValueError: If one of them could not be made, is not installed, or has nothing to work on.
    """
    for name in ("learning_rate", "weight_decay", "max_grad_norm"):
        value = args.__dict__[name]
        if value is not None and not 0 <= value < math.inf:
            raise ValueError(f"`{name}` must be finite and not negative, got {value}.")
    for name in ("seed", "data_seed"):
        if not 0 <= args.__dict__[name] < 2**32:
            raise ValueError(f"`{name}` must be at least 0 and less than 2**32, got {args.__dict__[name]}.")
    if args.dataloader_num_workers < 0:
        raise ValueError(f"`dataloader_num_workers` must not be negative, got {args.dataloader_num_workers}.")
    if args.max_steps < 1 and args.max_steps != -1:
        raise ValueError(
            f"`max_steps` must be positive, or -1 where `num_train_epochs` says when a run ends, got {args.max_steps}."
        )
    _check_workers(args)
    _check_writable(Path(args.output_dir))
    _check_schedule(args, None if has_optimizer else _make_optimizer(args))
    for tracker in args.report_to:
        if tracker not in INTEGRATION_TO_CALLBACK:
            raise ValueError(
                f"`report_to`: there is no tracker {tracker!r}; known: {sorted(INTEGRATION_TO_CALLBACK)}."
            )
        if tracker not in [*get_available_reporting_integrations(), "flyte"]:  # the latter is not looked for
            raise ValueError(
                f"`report_to={tracker!r}` needs a package that is not installed. Install the tracker's, or set "
                "`report_to='none'`."
            )
    asks = {
        f"eval_strategy={args.eval_strategy.value!r}": args.eval_strategy != "no",
        f"save_strategy={args.save_strategy.value!r}": args.save_strategy == "best",
        "eval_on_start=True": args.eval_on_start,
    }
    asking = [option for option, given in asks.items() if given]
    if asking and not evaluates:
        raise ValueError(
            f"`{asking[0]}` needs an `eval_dataset` or an `evaluator`, got neither. Pass one (on the command line, by "
            "`--eval_rows` or `--evaluator_judge`), or leave the option out."
        )


def _check_writable(folder: Path) -> None:
    """Make a folder, for a moment, where the first one that is missing will be made: permissions do not tell all."""
    place = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    try:
        with tempfile.TemporaryDirectory(dir=place, prefix=".writable-"):
            pass
    except OSError as error:
        raise ValueError(f"`output_dir`: {folder} cannot be written ({error}). Pass another folder.") from error


def _check_workers(args: VideoConfig) -> None:
    """Make a loader, of nothing, with the options of `make_loader`; its workers start later."""
    options = worker_options(args)
    try:
        DataLoader(TensorDataset(torch.zeros(1)), num_workers=args.dataloader_num_workers, **options)
    except (ValueError, AssertionError) as error:
        raise ValueError(
            f"The loader cannot be made with dataloader_num_workers={args.dataloader_num_workers} and "
            f"{', '.join(f'dataloader_{name}={value!r}' for name, value in options.items())}: {error}"
        ) from error


def _make_optimizer(args: VideoConfig) -> torch.optim.Optimizer:
    weight = nn.Parameter(torch.zeros(1, 1))  # a matrix: Muon takes nothing else
    try:
        kind, options = optimizer_and_options(args)
        optimizer: torch.optim.Optimizer = kind([weight], **options)
        if "optim_args" not in args.options_without_effect() and (unread := unread_options(args)):
            raise ValueError(f"it has no option {unread[0]!r}")
        return optimizer
    except Exception as error:  # of any library
        raise ValueError(
            f"The optimizer {_optimizer_name(args)} cannot be made, with learning_rate={args.learning_rate}, "
            f"optim_args={args.optim_args!r}: {error}"
        ) from error


def _optimizer_name(args: VideoConfig) -> str:
    return f"`optim={args.optim.value!r}`" if args.optim_class is None else f"`optim_class={args.optim_class!r}`"


def _check_schedule(args: VideoConfig, optimizer: torch.optim.Optimizer | None) -> None:
    options: Any = args.lr_scheduler_kwargs
    try:
        get_scheduler(
            args.lr_scheduler_type,
            optimizer=optimizer or torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=args.learning_rate),
            num_warmup_steps=args.get_warmup_steps(_STEPS),
            num_training_steps=_STEPS,
            scheduler_specific_kwargs=options,
        )
    except Exception as error:
        raise ValueError(
            f"The schedule `lr_scheduler_type={args.lr_scheduler_type.value!r}` cannot be made with "
            f"`lr_scheduler_kwargs={options!r}`: {error}"
        ) from error
