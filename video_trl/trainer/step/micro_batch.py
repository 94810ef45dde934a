"""What holds while a micro-batch goes through the model."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from .denoising import DenoisingStep
from .timestep_draws import RowsOfStep


@contextmanager
def micro_batch(step: DenoisingStep, rows: RowsOfStep, wrapped: nn.Module, model: nn.Module) -> Iterator[None]:
    """
    Context in which draws are for these rows, and in which `wrapped.train()` does nothing if the model is in training
    mode already.

    `transformers.Trainer` calls that in every micro-batch. It sets the flag of each module, thousands of them in a
    large transformer, which takes longer than the loss of a small step.

    Args:
        step ([`DenoisingStep`]): Draws.
        rows ([`RowsOfStep`]): Which rows of the step the micro-batch has.
        wrapped (`torch.nn.Module`): What Trainer calls, such as the wrapper of data parallelism.
        model (`torch.nn.Module`): The model in it, which callbacks and pipelines put into evaluation mode.
    """
    keeps_mode = wrapped.training and model.training
    if keeps_mode:
        wrapped.__dict__["train"] = lambda mode=True: wrapped  # of this object alone, before its class's
    step.rows = rows
    try:
        yield
    finally:
        step.rows = None
        if keeps_mode:
            del wrapped.__dict__["train"]
