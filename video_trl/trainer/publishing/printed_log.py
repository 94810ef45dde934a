"""Print the logs of a run so that each fits a line; trackers, files and `log_history` keep all of them."""

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from accelerate import Accelerator
from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, TrainerCallback, TrainerControl, TrainerState

from ..base_config import VideoConfig
from ..step.metrics import Metrics
from .progress import ClosingLine, ProgressReport, duration


WIDTH = 100  # columns
_SHORT = {"learning_rate": "lr", "rewards/accuracies": "accuracy"}
# Of interest in curves. The last of these begins the summary of transformers, which the closing line replaces.
_NOT_PRINTED = re.compile(
    r"epoch|step|grad_norm|total_flos|peak_memory_gib|proportion_outside_steps|minutes_left|num_input_tokens_seen"
    r"|(.+_)?runtime|.+_per_second|.+_preparation_time|train_loss"
)


class LogLine:
    """
    Makes a line of a log: the step, the loss, the learning rate, whatever the trainer did not record itself (an
    evaluator's scores), the metrics that tell a method's state, and the time that is left.

    Args:
        metrics ([`~video_trl.trainer.step.metrics.Metrics`]): Of the trainer; what they recorded is printed if named.
        names (`Sequence[str]`): The metrics that are printed, in this order, where the log has them.
    """

    def __init__(self, metrics: Metrics, names: Sequence[str]) -> None:
        self._metrics, self._names = metrics, names

    def __call__(self, logs: Mapping[str, Any], state: TrainerState) -> str | None:
        """
        Args:
            logs (`Mapping[str, Any]`): What is logged; an evaluation's names have a prefix, such as `eval_`.
            state (`TrainerState`): Of the trainer.

        Returns:
            `str`: At most `WIDTH` columns; three dots stand for what has no place. None if nothing is to be printed.
        """
        order = ["loss", "learning_rate", None, *self._names]  # None: recorded by somebody else
        recorded = {"loss", "learning_rate", *self._metrics.train.names, *self._metrics.eval.names}
        known = {key: _recorded_name(key, recorded) for key in logs if not _NOT_PRINTED.fullmatch(key)}
        shown = [key for name in order for key in known if known[key] == name]
        if not shown:
            return None
        left = [f"{duration(60 * logs['minutes_left'])} left"] if "minutes_left" in logs else []
        parts = [f"step {state.global_step}/{state.max_steps}"]
        texts = [f"{_printed_name(key, known[key])} {_short(logs[key])}" for key in shown]
        while len("  ".join([*parts, *texts, *left])) > WIDTH:
            texts = [*(texts[:-2] if texts[-1] == "..." else texts[:-1]), "..."]
        return "  ".join([*parts, *texts, *left])


def _recorded_name(key: str, recorded: set[str]) -> str | None:
    """The metric that a key of a log stands for, if the trainer recorded it: the key, or what follows its prefix."""
    return max((name for name in recorded if key == name or key.endswith(f"_{name}")), key=len, default=None)


def _printed_name(key: str, recorded: str | None) -> str:
    return key if recorded is None else key.removesuffix(recorded) + _SHORT.get(recorded, recorded)


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


class _ProgressBar(ProgressCallback):
    """The progress bar of transformers, with lines of our own above it."""

    def __init__(self, line: LogLine) -> None:
        super().__init__()
        self._line = line

    def on_log(
        self,
        args: VideoConfig,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if self.training_bar is not None and (line := self._line(logs or {}, state)):
            self.training_bar.write(line)


class _Printer(PrinterCallback):
    """The same lines where there is no bar (`disable_tqdm`)."""

    def __init__(self, line: LogLine) -> None:
        self._line = line

    def on_log(
        self,
        args: VideoConfig,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if state.is_world_process_zero and (line := self._line(logs or {}, state)):
            tqdm.write(line, file=sys.stdout)


def with_progress(
    callbacks: Sequence[TrainerCallback], line: LogLine, accelerator: Accelerator
) -> list[TrainerCallback]:
    """
    Callbacks of a trainer, with those that report its progress. The two of transformers that print whole logs are
    exchanged for ours; what is derived from them, such as the table of a notebook, stays.
    """
    own: dict[type, Callable[[LogLine], TrainerCallback]] = {ProgressCallback: _ProgressBar, PrinterCallback: _Printer}
    shown = [own[type(each)](line) if type(each) in own else each for each in callbacks]
    report = ProgressReport(accelerator)
    return [report, *shown, ClosingLine(report)]  # the others show what the first one adds to a log
