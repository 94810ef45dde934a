"""Report the speed, memory and remaining time of a run, and at its end where the results are."""

import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ...hub import LORA_FILE_NAME
from ..base_config import VideoConfig


# What a run may leave in its directory.
_WEIGHTS = {LORA_FILE_NAME: "adapter", "transformer": "all weights"}
_CONTENTS = _WEIGHTS | {
    "ema": "averaged weights",
    "README.md": "model card",
    "samples": "videos",
    "evaluation": "runs of the evaluator",
    "runs": "curves for TensorBoard",
}


class ProgressReport(TrainerCallback):
    """
    Adds speed, memory and remaining time to what the progress bar and the trackers show of each log.

    - `samples_per_second`: rows (videos, pairs, groups) of all processes in a second of training steps.
    - `proportion_outside_steps`: proportion of the time since the last log, or the start, that was not spent on
      steps but on waiting for data, evaluation, sample videos, saving.
    - `peak_memory_gib`: largest memory of tensors on any accelerator since training began; on a CPU, of any process.
    - `minutes_left`: to the last step, at the average pace so far, evaluations included.

    `trainer.state.log_history` gets none of them: it stays a function of data and seeds, and a resumed run has the
    log of an uninterrupted one.

    Args:
        accelerator (`Accelerator`): Of the trainer.

    Attributes:
        summary (`str`): Steps, time, speed and memory of the training that has ended.
    """

    summary: str

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._start = self._last_log = self._step_start = 0.0  # seconds
        self._first_step = self._steps = 0
        self._in_steps = self._in_all_steps = 0.0  # seconds in steps: since the last log, since the start

    def on_train_begin(self, args: VideoConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if args.device.type != "cpu":
            torch.get_device_module(args.device).reset_peak_memory_stats()
        self._start = self._last_log = time.perf_counter()
        self._first_step, self._steps = state.global_step, 0
        self._in_steps = self._in_all_steps = 0.0

    def on_step_begin(self, args: VideoConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._step_start = time.perf_counter()

    def on_step_end(self, args: VideoConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if args.device.type != "cpu" and _is_waited_for(args, state):
            torch.accelerator.synchronize()  # what this step and those before it have queued counts as theirs
        seconds = time.perf_counter() - self._step_start
        self._in_steps += seconds
        self._in_all_steps += seconds
        self._steps += 1

    def on_log(
        self,
        args: VideoConfig,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is None or "loss" not in logs or not self._steps:  # evaluations, and the summary at the end
            return
        now = time.perf_counter()
        done = state.global_step - self._first_step
        logs["samples_per_second"] = self._steps * _rows_of_a_step(args) / max(self._in_steps, 1e-9)
        logs["proportion_outside_steps"] = max(0.0, 1 - self._in_steps / max(now - self._last_log, 1e-9))
        logs["peak_memory_gib"] = self._peak_memory(args.device)
        logs["minutes_left"] = (state.max_steps - state.global_step) * (now - self._start) / done / 60
        self._last_log, self._in_steps, self._steps = now, 0.0, 0

    def on_train_end(self, args: VideoConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        steps = state.global_step - self._first_step
        speed = steps * _rows_of_a_step(args) / max(self._in_all_steps, 1e-9)
        self.summary = (
            f"{steps} step{'s' * (steps != 1)} in {duration(time.perf_counter() - self._start)}, {speed:.3g} rows a "
            f"second, peak memory {self._peak_memory(args.device):.3g} GiB."
        )

    def _peak_memory(self, device: torch.device) -> float:
        """In GiB, the largest of all processes; every process must call this."""
        if device.type == "cpu":
            unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB on Linux
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        else:
            peak = torch.get_device_module(device).max_memory_allocated()
        peaks = self._accelerator.gather(torch.tensor([peak / 2**30], device=device))
        return peaks.max().item()


class ClosingLine(TrainerCallback):
    """
    Says at the end of a training how long it took and where everything is.

    Who saves the weights afterwards can take it off the trainer (`pop_callback`), and call it then.

    Args:
        progress ([`ProgressReport`]): Of the same trainer.
    """

    def __init__(self, progress: ProgressReport) -> None:
        self._progress = progress

    def on_train_end(self, args: VideoConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            tqdm.write(self(args, state), file=sys.stderr)

    def __call__(self, args: VideoConfig, state: TrainerState) -> str:
        return f"{self._progress.summary} {where_everything_is(Path(args.output_dir), state)}"


def duration(seconds: float) -> str:
    """In words, such as "40 s", "12 min" or "3.5 h"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def where_everything_is(directory: Path, state: TrainerState) -> str:
    """
    Describe in one line what is in the directory of a run.

    Args:
        directory (`Path`): `output_dir`.
        state (`TrainerState`): Of the trainer; it knows the best checkpoint.

    Returns:
        `str`: Such as `"In out/sft: pytorch_lora_weights.safetensors (adapter), checkpoint-200 (last)."`.
    """
    contents = [f"{name} ({meaning})" for name, meaning in _CONTENTS.items() if (directory / name).exists()]
    checkpoints = sorted(
        directory.glob(f"{PREFIX_CHECKPOINT_DIR}-[0-9]*"), key=lambda path: int(path.name.rpartition("-")[2])
    )
    best = Path(state.best_model_checkpoint).name if state.best_model_checkpoint else None
    if checkpoints:
        contents.append(f"{checkpoints[-1].name} (last checkpoint)")
    if best is not None:
        contents.append(f"{best} (best checkpoint: {state.best_metric:.4g})")
    if not any((directory / name).exists() for name in _WEIGHTS):
        contents.append(f"{'' if not contents else 'and '}the trained weights after trainer.save_model()")
    return f"In {directory}: {', '.join(contents)}."


def _is_waited_for(args: VideoConfig, state: TrainerState) -> bool:
    """Whether a log, an evaluation, a checkpoint or the end follows the step: the host waits for the device anyway."""
    if args.logging_first_step and state.global_step == 1:
        return True
    intervals = (state.logging_steps, state.eval_steps, state.save_steps, state.max_steps)
    return any(every and state.global_step % every == 0 for every in intervals)


def _rows_of_a_step(args: VideoConfig) -> int:
    return args.per_device_train_batch_size * args.gradient_accumulation_steps * args.data_parallel_size
