"""
Recognise a collapse of preference training while it happens.

The DPO loss fixes the difference of two errors only, so it can be met by raising both, the rejected video's faster.
Reg-DPO (https://huggingface.co/papers/2511.01450, Section 4.3) describes the signature: the gradient ratio and the
loss fall sharply while the gaps of chosen *and* rejected videos rise; the videos fall apart a little later.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal, get_args

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from .base_config import VideoConfig


logger = logging.getLogger(__name__)

Action = Literal["warn", "stop", "raise"]


@dataclass(frozen=True)
class Collapse:
    """
    The signature as it was seen in a log.

    Attributes:
        step (`int`): Optimizer step of the log entry that completed it.
        dgr (`float`), initial_dgr (`float`): DPO gradient ratio now and at step 0: beta / 4, less with
            smoothed labels.
        loss (`float`), initial_loss (`float`): DPO loss at its lowest and at first.
        win_gap (`float`), lose_gap (`float`): Gaps now; they start at 0.
        rows (`str`): Those on which both gaps rose: "training rows", or "held-out rows".
    """

    step: int
    dgr: float
    initial_dgr: float
    loss: float
    initial_loss: float
    win_gap: float
    lose_gap: float
    rows: str = "training rows"

    def __str__(self) -> str:
        return (
            f"the DPO gradient ratio fell from {self.initial_dgr:.4g} to {self.dgr:.4g} and the DPO loss from "
            f"{self.initial_loss:.4g} to {self.loss:.4g} at its lowest, while both gaps rose from 0: win_gap to "
            f"{self.win_gap:.4g}, lose_gap to {self.lose_gap:.4g}, on {self.rows}"
        )


def find_collapse(
    log_history: Sequence[Mapping[str, Any]],
    beta: float,
    *,
    window: int = 10,
    fall: float = 0.5,
    min_rise: float = 2.0,
    since: int = 0,
    label_smoothing: float = 0.0,
) -> Collapse | None:
    """
    Look for the signature of a collapse at the end of the log of a run.

    The DPO loss, above the least that it can be, has been below `1 - fall` of where it started, and over the last
    `window` entries, on average, the DPO gradient ratio is, and both gaps lie above their level at step `since`: by
    `min_rise` in units of reward, and in every entry, which noise around that level does to one window in
    `2 ** window`. The lowest loss counts, not the last: once the gaps are wide, a few pairs in the wrong order can
    lift its mean above the start again, while the ratio, which is bounded, stays low. A log without `dgr` (GroupDPO's)
    is read with the ratio at the logged margin.

    Training rows flatter a model that remembers them. Where the log has evaluations, it is enough that both gaps of
    one evaluation dataset rise in each of its last two: every evaluation sees the same noise.

    Args:
        log_history (`list[dict]`): `trainer.state.log_history`; entries without `win_gap` are passed over.
        beta (`float`): Of the configuration.
        window (`int`, *optional*, defaults to `10`): Log entries that are averaged.
        fall (`float`, *optional*, defaults to `0.5`): Relative fall of ratio and loss, in (0, 1).
        min_rise (`float`, *optional*, defaults to `2.0`): Rise of both gaps, times beta / 2: 2 makes a video
            7 times less likely under the policy than under the reference.
        since (`int`, *optional*, defaults to `0`): Step from which the gaps' rise is counted; 0: from the start, where
            they are 0.
        label_smoothing (`float`, *optional*, defaults to `0.0`): Of the configuration: the ratio then starts lower,
            and the loss does not fall to 0.

    Returns:
        [`Collapse`] or None.
    """
    entries = [entry for entry in log_history if "win_gap" in entry]
    recent = [entry for entry in entries if entry["step"] > since][-window:]
    if len(recent) < window:
        return None
    initial_dgr, ratio = beta / 2 * (0.5 - label_smoothing), fmean(_dgr(entry, beta) for entry in recent)
    # Every loss starts at log 2 or above; the first entry may be a mean over steps in which it has fallen already.
    initial_loss, loss = max(_loss(entries[0]), math.log(2)), min(_loss(entry) for entry in entries)
    least = sum(-part * math.log(part) for part in (label_smoothing, 1 - label_smoothing) if part)
    if ratio > (1 - fall) * initial_dgr or loss - least > (1 - fall) * (initial_loss - least):
        return None
    for prefix in ("", *_evaluation_prefixes(log_history)):
        gaps = _risen_gaps(log_history, prefix, 2 if prefix else window, 2 * min_rise / beta, since)
        if gaps is not None:
            rows = "held-out rows" if prefix else "training rows"
            return Collapse(recent[-1]["step"], ratio, initial_dgr, loss, initial_loss, *gaps, rows)
    return None


def _evaluation_prefixes(log_history: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the metrics of each evaluation dataset begin with, of those that log a `win_gap`."""
    names = {name for entry in log_history for name in entry if name.startswith("eval_") and name.endswith("_win_gap")}
    return sorted(name.removesuffix("win_gap") for name in names)


def _risen_gaps(
    log_history: Sequence[Mapping[str, Any]], prefix: str, window: int, rise: float, since: int
) -> tuple[float, float] | None:
    """Mean gaps over the last `window` entries, if all are above their level at step `since`, the means by `rise`."""
    gaps = []
    for name in (f"{prefix}win_gap", f"{prefix}lose_gap"):
        entries = [(entry["step"], entry[name]) for entry in log_history if name in entry]
        before = [value for step, value in entries if step <= since][-window:]
        values = [value for step, value in entries if step > since][-window:]
        level = fmean(before) if before else 0.0
        if len(values) < window or min(values) <= level or fmean(values) - level < rise:
            return None
        gaps.append(fmean(values))
    return gaps[0], gaps[1]


class CollapseMonitor(TrainerCallback, ExportableState):
    """
    Warn when preference training collapses, and optionally stop it or strengthen its regulariser.

    Works with every trainer whose configuration says `logs_gaps`, from what it logs: `win_gap`, `lose_gap`, the DPO
    loss as `loss` or `loss/dpo`, and `dgr` or `rewards/margins`. It costs nothing and changes no number until it acts.
    It reads the log that is part of every checkpoint, so that a resumed run acts at the same steps.

    ```python
    trainer = VideoRegDPOTrainer(model, args, dataset, callbacks=[CollapseMonitor(action="raise")])
    ```

    Args:
        action (`str`, *optional*, defaults to `"warn"`):
            `"warn"`: log the numbers and the remedy, once. `"stop"`: also end training after the step. `"raise"`:
            also multiply the coefficient that the configuration names as `regulariser_field` (`sft_coefficient` of
            RegDPO, `sft_weight` of GroupDPO) by `factor`, again whenever both gaps have risen further over a whole
            window since. The configuration gets its own value back when training ends.
        window (`int`, *optional*, defaults to `10`): Log entries that are averaged.
        fall (`float`, *optional*, defaults to `0.5`): Relative fall of gradient ratio and loss, in (0, 1).
        min_rise (`float`, *optional*, defaults to `2.0`): Rise of both gaps in units of reward, not negative.
        factor (`float`, *optional*, defaults to `2.0`): What `"raise"` multiplies the coefficient by, above 1.

    Attributes:
        events (`list[int]`): Steps at which the signature was found.

    Raises:
        ValueError: If an argument is out of range; when the trainer is made or training begins, if the trainer logs no
            gaps, has no coefficient to raise or one of 0, or has two monitors; and at the first log, if gaps that the
            configuration promised are not in it.
    """

    def __init__(
        self,
        action: Action = "warn",
        *,
        window: int = 10,
        fall: float = 0.5,
        min_rise: float = 2.0,
        factor: float = 2.0,
    ) -> None:
        if action not in get_args(Action):
            raise ValueError(f"`action` must be one of {', '.join(map(repr, get_args(Action)))}, got {action!r}.")
        if window < 1 or not 0 < fall < 1 or not 0 <= min_rise < math.inf or not 1 < factor < math.inf:
            raise ValueError(
                "Expected `window` >= 1, `fall` in (0, 1), `min_rise` >= 0 and `factor` > 1, got "
                f"window={window}, fall={fall}, min_rise={min_rise}, factor={factor}."
            )
        self.action: Action = action
        self.window = window
        self.fall = fall
        self.min_rise = min_rise
        self.factor = factor
        self.events: list[int] = []
        self._coefficient: float | str | None = None  # the configuration's own, while training may have raised it

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: the arguments, and the steps at which the signature was found."""
        names = ("action", "window", "fall", "min_rise", "factor")
        return {"args": {name: self.__dict__[name] for name in names}, "attributes": {"events": list(self.events)}}

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._check(args)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        config = self._check(args)
        stored: Any = state.stateful_callbacks
        saved = stored.setdefault(type(self).__name__, self.state())  # absent when an older run had no monitor
        if isinstance(saved, list):
            raise ValueError(f"A trainer takes one `CollapseMonitor`, got {len(saved)}. Keep the one that acts.")
        self.events = list(saved["attributes"]["events"]) if state.global_step > 0 else []
        self._restore(config)  # an interrupted run has not restored it
        if self.action == "raise":
            self._coefficient = _coefficient(config)
        self._apply(config)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        entry = state.log_history[-1]
        of_training, of_evaluation = "loss" in entry, bool(_evaluation_prefixes([entry]))
        if not (of_training or of_evaluation) or (self.action == "warn" and self.events):
            return
        config = self._check(args)
        missing = [name for name in ("win_gap", "lose_gap") if of_training and name not in entry]
        if missing:
            raise ValueError(
                f"{type(config).__name__} says `logs_gaps`, but its trainer did not log {' and '.join(missing)}. "
                "Record both in `compute_loss`, or leave `CollapseMonitor` out."
            )
        collapse = find_collapse(
            state.log_history,
            vars(config)["beta"],
            window=self.window,
            fall=self.fall,
            min_rise=self.min_rise,
            since=self.events[-1] if self.events else 0,
            label_smoothing=vars(config).get("label_smoothing", 0.0),  # an option of DPO
        )
        if collapse is None:
            return
        self.events.append(state.global_step)
        if self.action == "stop":
            control.should_training_stop = True
        self._apply(config)
        if state.is_world_process_zero:
            logger.warning("Collapse at step %d: %s. %s", state.global_step, collapse, self._remedy(config))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._restore(args)

    def _check(self, args: TrainingArguments) -> VideoConfig:
        """The configuration of a trainer that the monitor can watch."""
        if not isinstance(args, VideoConfig) or not args.logs_gaps:
            raise ValueError(
                "`CollapseMonitor` reads the gaps that trainers log whose configuration says `logs_gaps`, got the "
                f"arguments of another trainer, {type(args).__name__}. Leave it out."
            )
        if self.action == "raise" and not _coefficient(args):
            raise ValueError(
                "`action='raise'` multiplies the coefficient of a regulariser, such as `sft_coefficient` of "
                f"`VideoRegDPOTrainer`: expected one above 0, got {_coefficient(args)} in {type(args).__name__}. Use "
                "'warn' or 'stop', or Reg-DPO."
            )
        return args

    def _apply(self, config: VideoConfig) -> None:
        """Set the coefficient to what the events say. Always from the first value: a resumed run rounds alike."""
        if self._coefficient is not None:
            _set_coefficient(config, _scaled(self._coefficient, self.factor ** len(self.events)))

    def _restore(self, config: TrainingArguments) -> None:
        if self._coefficient is not None:
            _set_coefficient(config, self._coefficient)
        self._coefficient = None

    def _remedy(self, config: VideoConfig) -> str:
        if self.action == "raise":
            return f"`{config.regulariser_field}` is now {_coefficient(config)}."
        ending = "Training stops." if self.action == "stop" else "Training goes on; look at sample videos."
        cure = f"raise `{config.regulariser_field}`" if config.regulariser_field else "use `VideoRegDPOTrainer`"
        return f"The model gets worse at both videos of a pair: {cure}, or lower the learning rate. {ending}"


def _coefficient(config: VideoConfig) -> float | str | None:
    """Of the method's regulariser, where it has one: a number, or as in "0.4*dgr" a number times a ratio."""
    return None if config.regulariser_field is None else vars(config)[config.regulariser_field]


def _scaled(coefficient: float | str, factor: float) -> float | str:
    if not isinstance(coefficient, str):
        return coefficient * factor
    number, _, ratio = coefficient.rpartition("*")
    return f"{float(number or 1) * factor:g}*{ratio}"


def _set_coefficient(config: TrainingArguments, value: float | str) -> None:
    assert isinstance(config, VideoConfig) and config.regulariser_field is not None
    setattr(config, config.regulariser_field, value)


def _dgr(entry: Mapping[str, Any], beta: float) -> float:
    """The logged gradient ratio, or that of the logged reward margin."""
    if "dgr" in entry:
        return float(entry["dgr"])
    return beta / 2 * float(torch.sigmoid(torch.tensor(-entry["rewards/margins"])))


def _loss(entry: Mapping[str, Any]) -> float:
    """The DPO loss: its own entry where there is a regulariser beside it."""
    return float(entry.get("loss/dpo", entry["loss"]))
