"""Tell of restarts that fail, and end a distributed process cleanly: its groups destroyed before Python ends."""

import atexit
import functools
import logging
import os
import sys
import weakref

import torch.distributed as dist
from transformers import Trainer


logger = logging.getLogger(__name__)

_trainers: weakref.WeakSet[Trainer] = weakref.WeakSet()


def check_restarts() -> None:
    """
    Warn where `torchrun --max_restarts` would restart processes that cannot find each other.

    Since torch 2.5 the launcher's store outlives a restart (pytorch#135712): a restarted process reads there the
    address of one that is dead, and ends with "Connection refused".
    """
    asked = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))
    shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    is_first = os.environ.get("RANK") == "0" and os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0"
    if asked and shared and is_first:
        logger.warning(
            "`--max_restarts=%d` is set, but restarted processes will meet the addresses of those before them in the "
            "store of the launcher. Set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in the environment of `torchrun`, on "
            "every machine, and pass `resume_from_checkpoint='auto'`.",
            asked,
        )


@functools.cache
def _register() -> None:
    atexit.register(leave)


def leave_at_exit(trainer: Trainer) -> None:
    """Let this process leave its process groups when the program ends; `trainer` works on several processes."""
    _register()
    _trainers.add(trainer)


def leave() -> None:
    """
    Destroy the process groups and wait for their threads. Nothing happens after an error, where other processes may
    still be waiting for this one.

    A thread of gloo that is not done with the last tensors when Python ends is killed with "terminate called without
    an active exception", and the exit code of a run that has done all its work is that of a crash. The threads end
    with their group, and a group with the last that refers to it: the wrapper of the model, which a trainer holds; and
    a trainer is held by a script, or is a circle of references that nobody has collected.
    """
    if "last_value" in vars(sys):  # Python has printed the traceback of what ends the program
        return
    for trainer in _trainers:
        trainer.model_wrapped = trainer.model
        trainer.accelerator.free_memory()  # collects, too
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
