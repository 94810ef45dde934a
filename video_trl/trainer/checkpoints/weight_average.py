"""A moving average of the trained weights (EMA): updated after every step, evaluated, saved beside them, resumed."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffusers import ModelMixin
from diffusers.training_utils import EMAModel
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ...hub.lora import AVERAGE_FOLDER
from ..repa.head import HEAD
from .checkpointer import Checkpointer
from .weights import load_weights


class WeightAverage(TrainerCallback):
    """
    The average of the weights that are trained, by diffusers' `EMAModel`: after step n its decay is the smaller one of
    `decay` and n / (9 + n), so that short runs have an average too.

    Args:
        transformer (`ModelMixin`): The policy. A head is trained beside it, and not averaged.
        adapter_name (`str`, *optional*): Adapter that is trained; none when all weights are.
        decay (`float`): In [0, 1); 0 keeps no average, and every method then does nothing.
    """

    def __init__(self, transformer: ModelMixin, adapter_name: str | None, decay: float) -> None:
        self._transformer, self._adapter_name, self._decay = transformer, adapter_name, decay
        self._average: EMAModel | None = None
        self._is_shown = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._decay and (self._average is None or state.global_step == 0):
            self._average = EMAModel(self._weights(), decay=self._decay)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._average is not None:
            self._average.optimization_step = state.global_step - 1
            self._average.step(self._weights())

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Context in which the transformer has the averaged weights; nothing happens before training, or within it."""
        if self._average is None or self._is_shown:
            yield
            return
        own = [weight.detach().clone() for weight in self._weights()]  # on the device; EMAModel's go to the host
        self._average.copy_to(self._weights())
        self._is_shown = True
        try:
            yield
        finally:
            self._is_shown = False
            for weight, value in zip(self._weights(), own, strict=True):
                weight.data.copy_(value)

    def save(self, checkpointer: Checkpointer, directory: Path) -> None:
        """Write the averaged weights into the folder `ema` of a folder with the others."""
        if self._average is not None:
            with self.shown():
                checkpointer.save(directory / AVERAGE_FOLDER)

    def load(self, directory: Path) -> None:
        """
        Read what `save` wrote.

        Raises:
            ValueError: If the checkpoint has no average.
        """
        if not self._decay:
            return
        if not (directory / AVERAGE_FOLDER).is_dir():
            raise ValueError(
                f"`ema_decay={self._decay}`, but {directory} has no folder {AVERAGE_FOLDER!r}: that run kept none. "
                "Leave the option out, or start a new run from its weights."
            )
        own = [weight.detach().clone() for weight in self._weights()]
        load_weights(self._transformer, directory / AVERAGE_FOLDER, self._adapter_name)
        self._average = EMAModel(self._weights(), decay=self._decay)
        for weight, value in zip(self._weights(), own, strict=True):
            weight.data.copy_(value)

    def _weights(self) -> list[nn.Parameter]:
        named = self._transformer.named_parameters()
        return [weight for name, weight in named if weight.requires_grad and not name.startswith(f"{HEAD}.")]
