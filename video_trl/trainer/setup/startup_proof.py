"""
The proof at the start of a run: what is trained is what is saved, what the optimizer holds, and what gets a gradient.

A run in which one of these differs trains less than it says, and its loss may fall all the same.
"""

from collections.abc import Collection, Iterator
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from diffusers import ModelMixin
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..repa.head import HEAD
from .lora import adapter_configs


def check_given_optimizer(transformer: ModelMixin, optimizer: torch.optim.Optimizer | None, *, use_peft: bool) -> None:
    """
    Check an optimizer of the user before anything is encoded.

    Args:
        transformer (`ModelMixin`): Transformer as the user passed it.
        optimizer (`torch.optim.Optimizer`, *optional*): The optimizer, if there is one.
        use_peft (`bool`): Whether an adapter or all weights are trained.

    Raises:
        ValueError: If it cannot hold an adapter that is yet to be made, or lacks weights that will be trained, or
            holds tensors that are none of the transformer's; or if it has other weights for evaluation.
    """
    if optimizer is None:
        return
    if use_peft and not adapter_configs(transformer):
        raise ValueError(
            "`optimizers` holds an optimizer that was made before the adapter, so that it would train none of it. Add "
            "the adapter first (`transformer.add_adapter(LoraConfig(...))`) and give the optimizer its parameters, or "
            "leave `optimizers` out."
        )
    trained = {name: weight for name, weight in transformer.named_parameters() if ".lora_" in name or not use_peft}
    _compare(trained, optimizer, transformer)


def check_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """
    Check, before training, that an optimizer holds every weight that is trained, and no tensor of another model.

    Args:
        model (`torch.nn.Module`): The policy, as it is when the optimizer is made.
        optimizer (`torch.optim.Optimizer`): Its optimizer. It may hold frozen weights: without a gradient they stay.

    Raises:
        ValueError: If it does not, or has other weights for evaluation.
    """
    _compare(dict(_trained(model)), optimizer, model)


def _compare(trained: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    kind = type(optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer)
    if "eval" in dir(kind):
        raise ValueError(
            f"The optimizer is of the class {kind.__name__}, which exchanges the weights for averaged ones "
            "when it is told to evaluate: what is saved would not be what is evaluated, and every evaluation would "
            "change the training that follows. Use an optimizer without modes, such as AdamW."
        )
    held = {id(weight) for group in optimizer.param_groups for weight in group["params"]}
    missing = [name for name, weight in trained.items() if id(weight) not in held]
    if missing:
        raise ValueError(
            f"The optimizer lacks {_some(missing)} of the {len(trained)} weights that are trained; they would never "
            "change. Give it all weights of the adapter (with `use_peft=False`, of the transformer), or leave "
            "`optimizers` out."
        )
    others = held - {id(weight) for weight in model.parameters()}
    if others:
        raise ValueError(
            f"The optimizer holds {len(others)} tensors that are no weights of the model that is trained, so they "
            "would never get a gradient. Make it from the parameters of this model, or leave `optimizers` out."
        )


def check_trained(transformer: ModelMixin, saved: Collection[Tensor]) -> None:
    """
    Check that the weights with gradients are those that are saved, but for those of a head.

    Args:
        transformer (`ModelMixin`): The policy, in the form in which it is trained.
        saved (`Collection[torch.Tensor]`): The tensors that its files will hold; buffers among them do not count.

    Raises:
        ValueError: If they differ.
    """
    trained = {name: weight for name, weight in _trained(transformer) if not name.startswith(f"{HEAD}.")}
    kept = {id(tensor) for tensor in saved if isinstance(tensor, nn.Parameter)}
    lost = [name for name, weight in trained.items() if id(weight) not in kept]
    frozen = len(kept - {id(weight) for weight in trained.values()})
    if lost or frozen or not trained:
        raise ValueError(
            f"Expected to train what is saved: of {len(trained)} weights that would be trained, {len(lost)} would not "
            f"be saved{f' ({_some(lost)})' if lost else ''}, and {frozen} that are saved would not be trained. Use "
            "another `target_modules` of `peft_config`, or leave `peft_config` out."
        )


class GradientProof(TrainerCallback):
    """
    Look, in the first step of every `train()`, whether each weight that is trained gets a gradient.

    Hooks tell, which work alike where weights are whole, averaged over processes (DDP) or sharded (FSDP2, DeepSpeed);
    they are gone after the step. A gradient of zeros counts: half of a new adapter begins with it.
    """

    def __init__(self) -> None:
        self._waiting: set[str] = set()
        self._handles: list[RemovableHandle] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._remove()
        for name, weight in _trained(kwargs["model"]):
            self._waiting.add(name)
            self._handles.append(weight.register_post_accumulate_grad_hook(self._noting(name)))

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """
        Raises:
            ValueError: If a weight got none, before the optimizer takes its step.
        """
        if not self._handles:
            return
        without = sorted(self._waiting)
        number = len(self._handles)
        self._remove()
        if without:
            raise ValueError(
                f"In the first step {_some(without)} of the {number} weights that are trained got no gradient: they "
                "take no part in the forward. Look for modules that are fused, replaced or skipped there, or leave "
                "them out of `target_modules`. No weight has been saved."
            )

    def _noting(self, name: str) -> Any:
        return lambda weight: self._waiting.discard(name)

    def _remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._waiting = [], set()


def _trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, weight) for name, weight in model.named_parameters() if weight.requires_grad)


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return f"{len(names)} ({shown}{', ...' if len(names) > 3 else ''})"
