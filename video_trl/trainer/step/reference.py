"""The frozen model that a preference loss measures the policy against, in its three forms."""

import copy
import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from accelerate import Accelerator
from diffusers import DiffusionPipeline, ModelMixin
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..parallel.engines import engine_of, prepare_reference
from ..setup.lora import REFERENCE_ADAPTER, copy_adapter


logger = logging.getLogger(__name__)


class Reference(Protocol):
    """A context manager factory: inside `with reference() as module`, `module` predicts as the reference does."""

    def __call__(self) -> AbstractContextManager[nn.Module]: ...

    def prepare(self, accelerator: Accelerator) -> None:
        """Place the reference on the device of the policy, with the same mixed precision."""

    def set_aside(self) -> None:
        """Make room on the device until the reference is used again, which brings it back by itself."""


class AdapterReference:
    """
    The policy's own base weights, its adapter switched off or exchanged for a frozen one: no memory for a copy.

    Policy and reference run through the same module and the same kernels, so that they agree to the last bit while
    the adapter has not been trained.

    Args:
        transformer (`ModelMixin`): Transformer with the trained adapter, not wrapped for distributed training.
        reference_adapter (`str`, *optional*): Name of the adapter that is the reference; none: the bare base.
    """

    def __init__(self, transformer: ModelMixin, reference_adapter: str | None = None) -> None:
        self._transformer = transformer
        self._reference_adapter = reference_adapter

    @contextmanager
    def __call__(self) -> Iterator[nn.Module]:
        # PEFT's own switches flip `requires_grad` too, which FSDP2 and the optimizer must not see, not even for a
        # moment: so only the flags that a layer's forward reads are set, and set back.
        layers = [module for module in self._transformer.modules() if isinstance(module, BaseTunerLayer)]
        before = [(layer._disable_adapters, layer._active_adapter) for layer in layers]
        try:
            for layer in layers:
                layer._disable_adapters = self._reference_adapter is None
                if self._reference_adapter is not None:
                    layer._active_adapter = [self._reference_adapter]
            yield self._transformer
        finally:
            for layer, (disabled, active) in zip(layers, before, strict=True):
                layer._disable_adapters, layer._active_adapter = disabled, active

    def prepare(self, accelerator: Accelerator) -> None:
        """Nothing to do: the reference is part of the policy."""

    def set_aside(self) -> None:
        """Nothing to do, for the same reason."""


class ModuleReference:
    """
    A second transformer, frozen.

    Args:
        transformer (`ModelMixin`): The reference; set to evaluation mode, its gradients switched off.
    """

    def __init__(self, transformer: ModelMixin) -> None:
        self.transformer = transformer.requires_grad_(False).eval()
        self._prepared: nn.Module | None = None
        self._accelerator: Accelerator | None = None
        self._is_aside = False

    @contextmanager
    def __call__(self) -> Iterator[nn.Module]:
        assert self._accelerator is not None and self._prepared is not None, "the trainer calls prepare"
        if self._is_aside:
            self.transformer.to(self._accelerator.device)
            self._is_aside = False
        with self._accelerator.autocast():  # the policy's forward has it built in
            yield self._prepared

    def prepare(self, accelerator: Accelerator) -> None:
        # Not `accelerator.prepare_model`: the accelerator would then take the policy to be prepared already.
        self._prepared = prepare_reference(self.transformer, accelerator, engine_of(accelerator))
        self._accelerator = accelerator

    def set_aside(self) -> None:
        assert self._accelerator is not None, "the trainer calls prepare"
        if not self._is_aside and engine_of(self._accelerator) == "ddp":  # engines that shard it hold it themselves
            self.transformer.to("cpu")
            self._is_aside = True


def make_reference(
    transformer: ModelMixin,
    ref_model: ModelMixin | DiffusionPipeline | None,
    *,
    adapter_name: str | None,
    continues_adapter: bool,
) -> Reference:
    """
    Choose the reference of a policy.

    Args:
        transformer (`ModelMixin`): The policy, before its first update.
        ref_model (`ModelMixin` or `DiffusionPipeline`, *optional*): A reference given by the user; comes first.
        adapter_name (`str`, *optional*): Adapter that is trained; none when all weights are.
        continues_adapter (`bool`): Whether that adapter was there before training: then a frozen copy of it is the
            reference, not the bare base.

    Returns:
        [`Reference`]: `ref_model`; else, for an adapter, the base without it or with its frozen copy; else a deep copy
        of the transformer.
    """
    if ref_model is not None:
        return ModuleReference(_transformer_of(ref_model))
    if adapter_name is not None:
        if not continues_adapter:
            return AdapterReference(transformer)
        copy_adapter(transformer, adapter_name)
        return AdapterReference(transformer, REFERENCE_ADAPTER)
    gib = sum(parameter.numel() * parameter.element_size() for parameter in transformer.parameters()) / 2**30
    logger.warning(
        "No `ref_model` given while all weights are trained: the transformer is copied as the reference, which takes "
        "%.2f GiB more. `use_peft=True` needs no copy.",
        gib,
    )
    return ModuleReference(copy.deepcopy(transformer))


def check_ref_model(transformer: ModelMixin, ref_model: ModelMixin | DiffusionPipeline | None) -> None:
    """Raise a `ValueError` if a reference given by the user is the policy itself, or of another architecture."""
    if ref_model is None:
        return
    reference = _transformer_of(ref_model)
    if reference is transformer:
        raise ValueError(
            "`ref_model` is the very transformer that is trained, so it would change along. Load it a second time, or "
            "leave `ref_model` out: the base without the adapter is then the reference, at no cost."
        )
    if type(reference) is not type(transformer):
        raise ValueError(
            f"`ref_model` must be of the class of the model, {type(transformer).__name__}, got "
            f"{type(reference).__name__}."
        )
    different = {
        name: (value, reference.config.get(name))
        for name, value in transformer.config.items()
        if not name.startswith("_") and reference.config.get(name) != value
    }
    if different:
        listing = ", ".join(f"{name}: {ours} / {theirs}" for name, (ours, theirs) in sorted(different.items()))
        raise ValueError(
            f"`ref_model` must have the architecture of the model; they differ (model / ref) in {listing}."
        )


def _transformer_of(ref_model: ModelMixin | DiffusionPipeline) -> ModelMixin:
    return ref_model.transformer if isinstance(ref_model, DiffusionPipeline) else ref_model
