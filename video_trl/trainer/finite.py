"""Stop at the first loss or gradient that is not finite, and say which samples were in that step."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class NonFiniteLossError(RuntimeError):
    """A loss or gradient was infinite or not a number; the weights have not been updated with it."""


class FiniteLossGuard(TrainerCallback):
    """
    Check the losses and gradients of a step before the optimizer uses them.

    Costs one wait for the device (and, with several processes, one scalar all-reduce) per optimizer step, after its
    backward pass has been queued. Checking less often would be cheaper and wrong: an update with a gradient that is
    not a number destroys the weights, and the next checkpoint would overwrite good ones with them.

    With float16 only losses are checked: there the gradient scaler skips overflowing gradients itself.

    Args:
        accelerator (`Accelerator`): Of the trainer; the processes agree through it, so that all of them stop.
        describe (callable): Sample index to a dict for the report, such as its prompt.
    """

    def __init__(self, accelerator: Accelerator, describe: Callable[[int], dict[str, Any]]) -> None:
        self._accelerator = accelerator
        self._describe = describe
        self._losses: list[Tensor] = []
        self._indices: list[Tensor] = []

    def watch(self, loss: Tensor, indices: Tensor) -> None:
        """Remember the loss (scalar) of a micro-batch and the dataset indices (B,) of its samples."""
        self._losses.append(loss.detach())
        self._indices.append(indices)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Raise [`NonFiniteLossError`] on every process if any process has seen a non-finite value in this step."""
        losses = torch.stack(self._losses).float()
        finite = losses.isfinite().all()
        if self._accelerator.scaler is None:
            finite = finite & _gradients_are_finite(kwargs["model"], losses.device)
        bad_processes = self._accelerator.reduce((~finite).float(), reduction="sum").item()
        indices = torch.cat(self._indices)
        self._losses, self._indices = [], []
        if bad_processes:
            self._stop(args, state, losses.tolist(), indices.tolist())

    def _stop(self, args: TrainingArguments, state: TrainerState, losses: list[float], indices: list[int]) -> None:
        step = state.global_step + 1
        report = {
            "step": step,
            "process": args.process_index,
            "losses": [loss if math.isfinite(loss) else str(loss) for loss in losses],
            "learning_rate": args.learning_rate,
            "samples": [{"index": index, **self._describe(index)} for index in indices],
        }
        path = Path(args.output_dir) / f"non_finite_step_{step}_process_{args.process_index}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=2, ensure_ascii=False))
        raise NonFiniteLossError(
            f"Step {step}: expected finite losses and gradients, got losses {report['losses']} (on this process). The "
            f"weights were not updated and earlier checkpoints are intact. The samples of the step are listed in "
            f"{path}. Look at them, or lower `learning_rate` or `beta`, and resume from the last checkpoint."
        )


def _gradients_are_finite(model: nn.Module, device: torch.device) -> Tensor:
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    if not gradients:  # DeepSpeed keeps them to itself; the loss of the next step tells
        return torch.ones((), dtype=torch.bool, device=device)
    # The norm of a tensor is finite exactly if its entries are (up to overflow beyond 1e38, which is no good either).
    return torch.stack(torch._foreach_norm(gradients)).isfinite().all()
