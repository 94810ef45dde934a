"""End a distributed process cleanly: destroy its process groups before Python ends."""

import atexit
import functools
import gc
import sys

import torch.distributed as dist


@functools.cache
def leave_at_exit() -> None:
    """Let this process leave its process groups when the program ends; asked again, it does nothing."""
    atexit.register(leave)


def leave() -> None:
    """
    Destroy the process groups and wait for their threads. Nothing happens after an error, where other processes may
    still be waiting for this one.

    A thread of gloo that is not done with the last tensors when Python ends is killed with "terminate called without
    an active exception", and the exit code of a run that has done all its work is that of a crash. The threads end
    with their group, and a group with the last that refers to it: trainers do, by the wrapper of their model, and they
    are circles of references, which only the collector takes apart.
    """
    if "last_value" in vars(sys):  # Python has printed the traceback of what ends the program
        return
    gc.collect()
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
