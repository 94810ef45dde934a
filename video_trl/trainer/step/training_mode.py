"""Put a model into training mode without a walk through all of its modules in every step."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def training_mode_kept(wrapped: nn.Module, model: nn.Module) -> Iterator[None]:
    """
    Context in which `wrapped.train()` does nothing if the model is in training mode already.

    `transformers.Trainer` calls it in every micro-batch. It sets the flag of each module, thousands of them in a large
    transformer, which takes longer than the loss of a small step.

    Args:
        wrapped (`torch.nn.Module`): What Trainer calls, such as the wrapper of data parallelism.
        model (`torch.nn.Module`): The model in it, which callbacks and pipelines put into evaluation mode.
    """
    if not (wrapped.training and model.training):
        yield
        return
    wrapped.__dict__["train"] = lambda mode=True: wrapped  # of this object alone, before its class's
    try:
        yield
    finally:
        del wrapped.__dict__["train"]
