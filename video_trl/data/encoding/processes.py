"""Where to encode, and which process does it."""

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist


def default_device() -> torch.device:
    """The accelerator, if there is one."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found or torch.device("cpu")


def first_on_each_machine(work: Callable[[], str]) -> str:
    """
    Run `work` in one process of each machine while the others wait, and give all of them its result.

    The group is its own because encoding may take longer than the time limit of the default group. An error raises in
    every process, so that none waits for one that has given up.
    """
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return work()
    group = dist.new_group(backend="gloo", timeout=timedelta(days=30))
    result: str | None = None
    failure: Exception | None = None
    if int(os.environ.get("LOCAL_RANK", dist.get_rank())) == 0:
        try:
            result = work()
        except Exception as error:
            failure = error
    reports: list[Any] = [None] * dist.get_world_size()
    message = None if failure is None else (isinstance(failure, ValueError), f"{type(failure).__name__}: {failure}")
    dist.all_gather_object(reports, (result, message), group=group)
    dist.destroy_process_group(group)
    if failure is not None:
        raise failure
    for _, reported in reports:
        if reported is not None:
            is_value_error, text = reported
            raise ValueError(text) if is_value_error else RuntimeError(text)
    return next(name for name, _ in reports if name is not None)
