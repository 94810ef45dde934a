"""Attach, save and detach a head: a module that is trained with the transformer and not needed afterwards."""

from typing import Any

import torch
from diffusers import ModelMixin
from torch import nn

from ..setup.lora import disable_dropout


HEAD = "trained_head"
"""Name of the submodule of the transformer that holds it."""


def attach_head(transformer: ModelMixin, module: nn.Module) -> None:
    """
    Register a module on the transformer, trainable, in float32, without dropout, and kept out of its state dict.

    As a submodule it is moved, zeroed and averaged over processes together with the transformer; the hooks keep it out
    of whatever is saved of that: adapters, whole transformers, pipelines.

    Args:
        transformer (`ModelMixin`): The policy, in the form in which it is trained.
        module (`torch.nn.Module`): What to register.
    """
    assert HEAD not in transformer._modules, "an earlier trainer's is detached first"
    disable_dropout(module)
    transformer.add_module(HEAD, module.float().requires_grad_(True))
    transformer.register_state_dict_post_hook(_leave_out)
    transformer.register_load_state_dict_post_hook(_do_not_miss)


def detach_head(transformer: ModelMixin) -> None:
    """Remove what an earlier trainer attached, if there is something. Its hooks stay, with nothing to do."""
    transformer._modules.pop(HEAD, None)


def describe_head(module: nn.Module) -> dict[str, Any]:
    """What a resumed run's module must agree on: the kind of every submodule, the shape of every weight, by name."""
    kinds = {name: f"{type(part).__name__}({part.extra_repr()})" for name, part in module.named_modules()}
    shapes = {name: list(tensor.shape) for name, tensor in module.state_dict().items()}
    return kinds | shapes


def give_own_learning_rate(optimizer: torch.optim.Optimizer, module: nn.Module, learning_rate: float) -> None:
    """Move the module's weights to groups of their own, which differ from those they were in by the learning rate."""
    own = {id(parameter) for parameter in module.parameters()}
    for group in list(optimizer.param_groups):
        moved = [parameter for parameter in group["params"] if id(parameter) in own]
        if moved:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in own]
            optimizer.add_param_group({**group, "params": moved, "lr": learning_rate})


def add_to_optimizer(optimizer: torch.optim.Optimizer, module: nn.Module, learning_rate: float | None) -> None:
    """Add the module's weights to an optimizer without them, by default at the optimizer's own learning rate."""
    group: dict[str, Any] = {"params": list(module.parameters())}
    optimizer.add_param_group(group if learning_rate is None else {**group, "lr": learning_rate})


def _leave_out(transformer: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any]) -> None:
    for name in [name for name in state if name.startswith(f"{prefix}{HEAD}.")]:
        del state[name]


def _do_not_miss(transformer: nn.Module, incompatible: Any) -> None:
    missing = incompatible.missing_keys
    missing[:] = [name for name in missing if f".{HEAD}." not in f".{name}"]
