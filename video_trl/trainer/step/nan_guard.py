"""Stop a run at the first loss or gradient that is NaN or infinite, and name the samples of that step."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ...files import write_atomically


class NonFiniteLossError(RuntimeError):
    """A loss or gradient was infinite or not a number; the weights have not been updated with it, nor since."""


@dataclass(frozen=True)
class _Step:
    """What is known of an optimizer step whose numbers nobody has looked at yet."""

    number: int
    losses: Tensor  # (micro-batches,) on the device
    indices: list[int]
    bad: Tensor  # scalar on the device: 1 if a process has seen a non-finite value, else 0


class FiniteLossGuard(TrainerCallback):
    """
    Check the losses and gradients of every step before the optimizer uses them, without waiting for the device.

    The result of the check stays on the device, as a flag that the fused optimizers of torch obey there (`found_inf`,
    made for gradient scaling): from the first bad step on they change no weight and no moment. The host looks at the
    flags where it waits for the device anyway, in [`check`], which the trainer calls before it logs, evaluates or
    saves; so the steps in between are lost, and nothing else is.

    An optimizer that cannot skip a step on the device, because it is not fused, its weights are sharded, or a
    gradient scaler has a flag of its own there, is protected by a look in every step. With float16 only losses are
    checked: the scaler skips overflowing gradients itself. And so it is with DeepSpeed, which hides its gradients.

    Args:
        accelerator (`Accelerator`): Of the trainer; the processes agree through it, so that all of them stop.
        describe (callable): Sample index to a dict for the report, such as its prompt.
    """

    def __init__(self, accelerator: Accelerator, describe: Callable[[int], dict[str, Any]]) -> None:
        self._accelerator = accelerator
        self._describe = describe
        self._reset()

    def _reset(self) -> None:
        self._losses: list[Tensor] = []
        self._indices: list[int] = []
        self._steps: list[_Step] = []
        self._stopped: Tensor | None = None  # scalar on the device: 1 from the first bad step on

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Forget what a run that was interrupted has left."""
        self._reset()

    def watch_samples(self, indices: Sequence[int]) -> None:
        """Remember the dataset indices of the samples of a micro-batch."""
        self._indices.extend(indices)

    def watch_loss(self, loss: Tensor) -> None:
        """Remember the loss (scalar) of a micro-batch."""
        self._losses.append(loss.detach())

    def check_losses(self, args: TrainingArguments, state: TrainerState) -> None:
        """End the step here and look at it, for an engine that updates the weights within its backward pass."""
        self._end_step(state, None)
        self.check(args, state)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Hand the flag to the optimizer; where it cannot use it, raise what [`check`] raises."""
        if not self._losses:  # ended by `check_losses`
            return
        optimizer = kwargs["optimizer"]
        optimizer = optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer
        bad = self._end_step(state, optimizer if self._accelerator.scaler is None else None)
        if self._accelerator.scaler is None and _skips_on_device(optimizer):
            self._stopped = bad if self._stopped is None else torch.maximum(self._stopped, bad)
            optimizer.found_inf = self._stopped  # an attribute, no part of its state dict
        else:
            self.check(args, state)

    def _end_step(self, state: TrainerState, optimizer: torch.optim.Optimizer | None) -> Tensor:
        """The flag of the step: whether a process has seen a bad loss, or a bad gradient of a trained weight."""
        losses = torch.stack(self._losses).float()
        finite = losses.isfinite().all()
        if optimizer is not None:
            finite = finite & _gradients_are_finite(optimizer, losses.device)
        bad = self._accelerator.reduce((~finite).float(), reduction="sum").clamp(max=1)
        self._steps.append(_Step(state.global_step + 1, losses, self._indices, bad))
        self._losses, self._indices = [], []
        return bad

    def check(self, args: TrainingArguments, state: TrainerState) -> None:
        """
        Look at the steps since the last look; every process must call this at the same time.

        Raises:
            NonFiniteLossError: If one was bad. Weights, optimizer and `state.global_step` are those before it.
        """
        if not self._steps:
            return
        steps, self._steps = self._steps, []
        flags = torch.stack([step.bad for step in steps]).tolist()
        for step, bad in zip(steps, flags, strict=True):
            if bad:
                state.global_step = step.number - 1
                self._stop(args, step)

    def _stop(self, args: TrainingArguments, step: _Step) -> None:
        report = {
            "step": step.number,
            "process": args.process_index,
            "losses": [loss if math.isfinite(loss) else str(loss) for loss in step.losses.tolist()],
            "learning_rate": args.learning_rate,
            "samples": [{"index": index, **self._describe(index)} for index in step.indices],
        }
        path = Path(args.output_dir) / f"non_finite_step_{step.number}_process_{args.process_index}.json"
        write_atomically(path, json.dumps(report, indent=2, ensure_ascii=False))
        raise NonFiniteLossError(
            f"Step {step.number}: expected finite losses and gradients, got losses {report['losses']} (on this "
            "process). The weights were not updated and earlier checkpoints are intact. The samples of the step are "
            f"listed in {path}. Look at them, or lower `learning_rate` or `beta`, and resume from the last checkpoint."
        )


def _skips_on_device(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a step is skipped, on the device, when the optimizer's `found_inf` is 1."""
    # torch's own sign for it, set by fused optimizers; their kernels take no flag beside sharded weights.
    supported = optimizer.__dict__.get("_step_supports_amp_scaling", False)
    sharded = any(isinstance(weight, DTensor) for group in optimizer.param_groups for weight in group["params"])
    return supported and not sharded


def _gradients_are_finite(optimizer: torch.optim.Optimizer, device: torch.device) -> Tensor:
    # Of the optimizer, which holds all that are trained: looking through the model takes longer than the norms.
    weights = (weight for group in optimizer.param_groups for weight in group["params"])
    gradients = [weight.grad for weight in weights if weight.grad is not None]
    if not gradients:
        return torch.ones((), dtype=torch.bool, device=device)
    gradients = [gradient.to_local() if isinstance(gradient, DTensor) else gradient for gradient in gradients]
    # The norm of a tensor is finite exactly if its entries are (up to overflow beyond 1e38, which is no good either).
    return torch.stack(torch._foreach_norm(gradients)).isfinite().all()
