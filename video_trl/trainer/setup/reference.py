"""Choose the frozen model that a preference loss measures the policy against."""

import copy
import logging

import torch
from diffusers import DiffusionPipeline, ModelMixin

from ...models import Expert
from ..step.passes import AdapterReference, ModuleReference, Reference
from .lora import REFERENCE_ADAPTER, copy_adapter


logger = logging.getLogger(__name__)


def make_reference(
    transformer: ModelMixin,
    ref_model: ModelMixin | None,
    adapter_name: str | None,
    *,
    keeps_adapter: bool,
) -> Reference:
    """
    Choose the reference of a policy.

    Args:
        transformer (`ModelMixin`): The policy, before its first update.
        ref_model (`ModelMixin`, *optional*): A reference given by the user; comes first.
        adapter_name (`str`, *optional*): Adapter that is trained; none when all weights are.
        keeps_adapter (`bool`): Whether that adapter was there before training and a frozen copy of it is to be the
            reference, not the bare base.

    Returns:
        [`Reference`]: `ref_model`; else, for an adapter, the base without it or with its frozen copy; else a deep copy
        of the transformer.
    """
    if ref_model is not None:
        return ModuleReference(ref_model)
    if adapter_name is not None:
        if not keeps_adapter:
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


def reference_transformer(
    ref_model: ModelMixin | DiffusionPipeline | None, expert: Expert | None
) -> ModelMixin | None:
    """
    The reference that the user gave: of a pipeline with several transformers, the one that is trained.

    Raises:
        ValueError: If the pipeline was loaded without it.
    """
    if not isinstance(ref_model, DiffusionPipeline):
        return ref_model
    component = "transformer" if expert is None else expert.component
    transformer: ModelMixin | None = ref_model.components.get(component)
    if transformer is None:
        raise ValueError(f"Expected `ref_model` with a `{component}`, got a {type(ref_model).__name__} without it.")
    return transformer


def check_ref_model(transformer: ModelMixin, ref_model: ModelMixin | None, *, use_peft: bool) -> None:
    """
    Raise a `ValueError` if a reference given by the user is the policy itself, or of other architecture or precision.

    Args:
        transformer (`ModelMixin`): The policy, as the user passed it.
        ref_model (`ModelMixin`, *optional*): The reference.
        use_peft (`bool`): Whether an adapter is trained; all weights are trained in float32.
    """
    if ref_model is None:
        return
    if ref_model is transformer:
        raise ValueError(
            "`ref_model` is the very transformer that is trained, so it would change along. Load it a second time, or "
            "leave `ref_model` out: the base without the adapter is then the reference, at no cost."
        )
    if type(ref_model) is not type(transformer):
        raise ValueError(
            f"`ref_model` must be of the class of the model, {type(transformer).__name__}, got "
            f"{type(ref_model).__name__}."
        )
    different = {
        name: (value, ref_model.config.get(name))
        for name, value in transformer.config.items()
        if not name.startswith("_") and ref_model.config.get(name) != value
    }
    if different:
        listing = ", ".join(f"{name}: {ours} / {theirs}" for name, (ours, theirs) in sorted(different.items()))
        raise ValueError(
            f"`ref_model` must have the architecture of the model; they differ (model / ref) in {listing}."
        )
    ours, theirs = _dtypes(transformer), _dtypes(ref_model)
    if not use_peft and any(dtype.itemsize < 4 for dtype in ours.values()):
        ours = dict.fromkeys(ours, torch.float32)  # see `train_all_weights`
    others = [name for name, dtype in theirs.items() if ours.get(name, dtype) != dtype]
    if others:
        raise ValueError(
            f"`ref_model` must be in the precision in which the model is trained, or the two would differ before the "
            f"first step: {others[0]!r} is {ours[others[0]]} in the model and {theirs[others[0]]} in `ref_model`. "
            f"Load it with `dtype={ours[others[0]]}`."
        )


def _dtypes(transformer: ModelMixin) -> dict[str, torch.dtype]:
    """The dtype of every weight by its name, with or without adapters around it."""
    named = ((name.replace(".base_layer", ""), weight) for name, weight in transformer.named_parameters())
    return {name: weight.dtype for name, weight in named if ".lora_" not in name}
