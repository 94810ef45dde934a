"""Add to a diffusers transformer the methods that `transformers.Trainer` expects of a model."""

import json
from typing import Any

from diffusers import ModelMixin
from diffusers.configuration_utils import FrozenDict

from ..repa.head import detach_head
from .activation_checkpointing import enable_recompute
from .offloaded_weights import restore_weights


class _TrackedConfig(FrozenDict):
    """Configuration with the two methods that experiment trackers call."""

    def to_dict(self) -> dict[str, Any]:
        return dict(self)

    def to_json_string(self) -> str:
        return json.dumps(self.to_dict(), indent=2, default=str)


def adapt_for_trainer(transformer: ModelMixin, checkpointing_policy: str) -> None:
    """Add, to this instance, a configuration that trackers can read and the switch of activation checkpointing."""
    # An earlier trainer's accelerator has left its mixed precision on the instance, and would hide this one's; the
    # trainer itself may have left its head, and weights in the host's memory.
    for name in ("forward", "_original_forward", "_is_accelerate_prepared"):
        transformer.__dict__.pop(name, None)
    detach_head(transformer)
    restore_weights(transformer)
    transformer._internal_dict = _TrackedConfig(transformer.config)

    def activation_checkpointing_enable(**kwargs: Any) -> None:  # the configuration has refused every argument
        enable_recompute(transformer, checkpointing_policy)

    transformer.activation_checkpointing_enable = activation_checkpointing_enable
    transformer.gradient_checkpointing_enable = activation_checkpointing_enable  # its name before transformers 5.23
