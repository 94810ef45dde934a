"""Let a run that is told to end save a checkpoint first."""

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


logger = logging.getLogger(__name__)

#: Exit code of a program that a signal has ended after its checkpoint was saved: "try again later" in sysexits.h.
EXIT_CODE = os.EX_TEMPFAIL
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class TrainingInterrupted(SystemExit):
    """
    A signal has ended training, and a checkpoint is saved. As it is a `SystemExit`, a program that does not catch it
    ends with its code, 75.
    """


class StopOnSignal(TrainerCallback):
    """
    Ends a run after the step in which SIGTERM or SIGUSR1 comes, with a checkpoint of it.

    With several processes any of them may get the signal, and all end after the same step, the one after it: each step
    starts a sum of who got one, on the CPU, and the next step reads it, so that no step waits for another process.

    Args:
        num_processes (`int`): Of the run.
    """

    def __init__(self, num_processes: int) -> None:
        self._num_processes = num_processes
        self._received: signal.Signals | None = None
        self._group: dist.ProcessGroup | None = None
        self._told: tuple[dist.Work, torch.Tensor] | None = None
        #: What ends the run, once all processes agree; `"another process"` where the signal came to one of those.
        self.stopped_by: str | None = None

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Context in which the signals end the run; outside of it they do what they did before."""
        self._received, self.stopped_by = None, None
        before = {}
        if threading.current_thread() is threading.main_thread():  # Python allows it nowhere else
            before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def interruption(self, step: int) -> TrainingInterrupted:
        """The exception that ends the program."""
        logger.warning(
            "Ended by %s after step %d, whose checkpoint is saved. Start again with `resume_from_checkpoint=True`.",
            self.stopped_by,
            step,
        )
        return TrainingInterrupted(EXIT_CODE)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._num_processes > 1 and self._group is None:
            self._group = dist.new_group(backend="gloo")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._all_know() and state.global_step < state.max_steps:
            self.stopped_by = "another process" if self._received is None else self._received.name
            control.should_training_stop = control.should_save = True
            control.should_evaluate = False

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._told is not None:
            self._told[0].wait()
            self._told = None
        if self._group is not None:  # its threads end with it, and none may be left when Python ends
            dist.destroy_process_group(self._group)
            self._group = None

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = signal.Signals(number)

    def _all_know(self) -> bool:
        if self._group is None:
            return self._received is not None
        if self._told is not None:
            work, total = self._told
            work.wait()
            if total.item():
                self._told = None
                return True
        total = torch.tensor(int(self._received is not None))
        self._told = dist.all_reduce(total, group=self._group, async_op=True), total
        return False
