"""End a distributed process cleanly: destroy its process groups before Python ends."""

import atexit
import functools
import sys
import weakref

import torch.distributed as dist
from transformers import Trainer


_trainers: weakref.WeakSet[Trainer] = weakref.WeakSet()


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
