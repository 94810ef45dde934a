"""What `transformers.Trainer` asks of a model and a diffusers transformer does not offer."""

import json
from functools import partial
from typing import Any

from diffusers import ModelMixin
from diffusers.configuration_utils import FrozenDict

from .auxiliary import detach_auxiliary


class _TrackedConfig(FrozenDict):
    """Configuration with the two methods that experiment trackers call."""

    def to_dict(self) -> dict[str, Any]:
        return dict(self)

    def to_json_string(self) -> str:
        return json.dumps(self.to_dict(), indent=2, default=str)


def adapt_for_trainer(transformer: ModelMixin) -> None:
    """Add, to this instance, a configuration that trackers can read and the switch of activation checkpointing."""
    # An earlier trainer's accelerator has left its mixed precision on the instance, and would hide this one's; the
    # trainer itself may have left a module beside the transformer.
    for name in ("forward", "_original_forward", "_is_accelerate_prepared"):
        transformer.__dict__.pop(name, None)
    detach_auxiliary(transformer)
    transformer._internal_dict = _TrackedConfig(transformer.config)
    transformer.activation_checkpointing_enable = partial(_enable_activation_checkpointing, transformer)


def _enable_activation_checkpointing(transformer: ModelMixin, **kwargs: Any) -> None:
    # The configuration has refused every argument, so `kwargs` holds defaults. diffusers checkpoints non-reentrantly,
    # and only while gradients are recorded: the reference and evaluation run without it.
    transformer.enable_gradient_checkpointing()
