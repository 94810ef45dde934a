"""Attach a LoRA adapter, and set which weights are trained."""

import copy
import logging
import math
import re
import warnings
from collections.abc import Collection, Sequence

import torch
from diffusers import ModelMixin
from peft import LoraConfig, PeftConfig, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from torch import nn

from ...hub import check_lora_config
from ...hub.lora import acting_alpha, adapter_weights
from ...models import ModelFamily, lora_targets
from ..base_config import VideoConfig
from ..step.dropout import set_dropout


logger = logging.getLogger(__name__)

REFERENCE_ADAPTER = "ref"
_ADAPTED = (nn.Linear, nn.Conv2d, nn.Conv3d)  # kinds of layers whose adapters tests/hub/test_round_trips.py proves


def adapter_configs(transformer: ModelMixin) -> dict[str, PeftConfig]:
    """PEFT configurations of the adapters that a transformer carries, by name."""
    return getattr(transformer, "peft_config", {})  # PEFT sets the attribute with the first adapter


def check_adapters(
    transformer: ModelMixin, family: ModelFamily, peft_config: PeftConfig | None, args: VideoConfig
) -> None:
    """
    Check that it is clear what is to be trained, and that it could be saved and loaded again faithfully.

    Args:
        transformer (`ModelMixin`): Transformer as the user passed it.
        family ([`ModelFamily`]): Its family.
        peft_config (`PeftConfig`, *optional*): Adapter to add instead of the default one.
        args (`VideoConfig`): Says whether an adapter or all weights are trained, and describes the default adapter.

    Raises:
        ValueError: If the transformer carries several adapters, or one besides a `peft_config`, or one although all
            weights are to be trained; if the adapter is of an unsupported kind, is switched off, merged into the base
            or scaled, or a target module does not exist; if projections have been fused; or if `lora_target_modules`
            describes an adapter that is not made.
    """
    existing, use_peft = adapter_configs(transformer), args.use_peft
    if args.lora_target_modules is not None and (existing or peft_config or not use_peft):
        reason = "`use_peft=False` trains all weights"
        if existing or peft_config:
            reason = "`peft_config` describes another" if peft_config else "the transformer already carries one"
        raise ValueError(
            f"`lora_target_modules={args.lora_target_modules!r}` describes an adapter to make, but {reason}. Drop one."
        )
    fuse = "fuse it into the base first (`pipeline.fuse_lora()`, `pipeline.unload_lora_weights()`)"
    if existing and not use_peft:
        raise ValueError(
            f"`use_peft=False` trains all weights, but the transformer carries the adapters {sorted(existing)}. "
            f"Leave `use_peft` on to continue an adapter, or {fuse}."
        )
    if len(existing) > 1:
        raise ValueError(
            f"The transformer carries the adapters {sorted(existing)}; which one to train is unclear. Keep one, with "
            "`transformer.delete_adapters(name)` for the others."
        )
    if existing and peft_config is not None:
        raise ValueError(
            f"The transformer already carries the adapter {next(iter(existing))!r} and `peft_config` asks for "
            f"another. Leave `peft_config` out to continue the adapter, or {fuse}."
        )
    for config in (*existing.values(), *([peft_config] if peft_config is not None else [])):
        check_lora_config(config)
    if peft_config is not None:
        args.check_dropout(peft_config.__dict__["lora_dropout"])
    for name in existing:
        _check_state(transformer, name)
    _check_projections(transformer)
    if peft_config is not None:
        _check_target_modules(transformer, peft_config)
    elif use_peft and not existing:
        lora_targets(family, transformer, args.lora_target_modules)


def attach_lora(
    transformer: ModelMixin,
    peft_config: PeftConfig | None,
    targets: Sequence[str],
    *,
    rank: int,
    alpha: int,
    use_rslora: bool = False,
    use_dora: bool = False,
    dropout: float = 0.0,
) -> str:
    """
    Freeze a transformer and make one LoRA adapter on it trainable, in float32 also on a base in half precision.

    A bfloat16 adapter would lose most updates: at a learning rate of 1e-5 they round to nothing. On a float64 base the
    adapter is float64.

    Args:
        transformer (`ModelMixin`): Transformer that `check_adapters` has accepted. Its adapter, if it has one, is
            continued.
        peft_config (`PeftConfig`, *optional*): Adapter to add instead of the default one.
        targets (`Sequence[str]`), rank (`int`), alpha (`int`): Target modules, rank and scale of the default adapter.
        use_rslora (`bool`), use_dora (`bool`): Of the default adapter, as `peft.LoraConfig` has them.
        dropout (`float`): Of the default adapter, or of the one that is continued. A `peft_config` says its own.

    Returns:
        `str`: Name of the adapter that is trained.
    """
    name = next(iter(adapter_configs(transformer)), None)
    if name is None:
        name = "default"
        config = peft_config or LoraConfig(
            r=rank, lora_alpha=alpha, target_modules=list(targets), use_rslora=use_rslora, use_dora=use_dora
        )
        transformer.add_adapter(copy.deepcopy(config), adapter_name=name)  # PEFT writes into the configuration
    adapter_configs(transformer)[name].lora_dropout = 0.0  # see `set_dropout`; copies and files have none either
    set_dropout(transformer, name, dropout if peft_config is None else peft_config.__dict__["lora_dropout"])
    transformer.requires_grad_(False)
    transformer.set_adapter(name)
    _cast_adapters(transformer)
    return name


def copy_adapter(transformer: ModelMixin, source: str) -> None:
    """Freeze a copy of the adapter `source` as it is now, under the name `"ref"`; `source` stays the active one."""
    config = copy.deepcopy(adapter_configs(transformer)[source])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")  # a second one is meant
        transformer.add_adapter(config, adapter_name=REFERENCE_ADAPTER)
    state = adapter_weights(transformer, source, transformer.state_dict())
    set_peft_model_state_dict(transformer, state, adapter_name=REFERENCE_ADAPTER)
    _cast_adapters(transformer)
    transformer.set_adapter(source)  # adding an adapter activates it


def train_all_weights(transformer: ModelMixin, idle: Collection[str]) -> None:
    """Make the weights of a transformer trainable but those named `idle`; in float32, or float64 where it is that."""
    if any(parameter.dtype.itemsize < 4 for parameter in transformer.parameters()):
        gib = sum(parameter.numel() for parameter in transformer.parameters()) * 4 / 2**30
        logger.warning("Casting the transformer to float32 (%.1f GiB): in half precision small updates are lost.", gib)
        transformer.float()
    for name, weight in transformer.named_parameters():
        weight.requires_grad_(name not in idle)


def disable_dropout(transformer: nn.Module) -> None:
    """
    Set every dropout probability of torch's own layers to 0, with a warning if one was not.

    They draw from a global generator, which would break exact resuming, equal results for every batch split, and
    gradients of one video at a time; adapters have [`AdapterDropout`] instead.
    """
    active = [module for module in transformer.modules() if isinstance(module, nn.Dropout) and module.p > 0]
    if active:
        logger.warning(
            "Dropout that came with the model is switched off, in %d layers. The adapter that is trained drops its "
            "inputs with `lora_dropout`.",
            len(active),
        )
    for module in active:
        module.p = 0.0


def _check_state(transformer: nn.Module, adapter: str) -> None:
    """Raise a `ValueError` unless an adapter acts in the forward as its file would in a fresh pipeline."""
    layers = {name: module for name, module in transformer.named_modules() if isinstance(module, LoraLayer)}
    config = adapter_configs(transformer)[adapter]
    states = (
        (
            "is merged into the base, which rounds",
            lambda name, layer: bool(layer.merged_adapters),
            "Load base and adapter anew, without `fuse_lora`; or make it part of the base, by "
            "`pipeline.unload_lora_weights()` after it, and train another.",
        ),
        (
            "is switched off, so that it would get no gradient",
            lambda name, layer: layer._disable_adapters,
            "Switch it on: `pipeline.enable_lora()`.",
        ),
        (
            "is scaled, which its file does not say",
            lambda name, layer: adapter in layer.scaling and not _has_own_scale(layer, adapter, name, config),
            f"Set its scale back: `pipeline.set_adapters([{adapter!r}], [1.0])`; its alpha is that of `peft_config`.",
        ),
        (
            "is on layers that are neither linear nor convolutions",
            lambda name, layer: not isinstance(layer.get_base_layer(), _ADAPTED),
            "Make another, on layers such as 'attn1.to_q': others are not known to come back from its file.",
        ),
    )
    for what, applies, way_out in states:
        affected = [name for name, layer in layers.items() if applies(name, layer)]
        if affected:
            raise ValueError(
                f"The adapter {adapter!r} of the transformer {what}, in {len(affected)} layers such as "
                f"{affected[0]!r}. {way_out}"
            )


def _has_own_scale(layer: LoraLayer, adapter: str, name: str, config: PeftConfig) -> bool:
    """Whether a layer acts with the scale that its configuration says, which is what its file will say."""
    rank = layer.r[adapter]
    return math.isclose(layer.scaling[adapter], acting_alpha(config, name, rank) / rank, rel_tol=1e-6)


def _check_projections(transformer: nn.Module) -> None:
    """Raise a `ValueError` if queries, keys and values are computed by one module: their own get no gradient then."""
    fused = [name for name, module in transformer.named_modules() if module.__dict__.get("fused_projections")]
    if fused:
        raise ValueError(
            f"The projections of {len(fused)} attention modules, such as {fused[0]!r}, are fused: those that would be "
            "trained take no part in the forward. Undo it: `transformer.unfuse_qkv_projections()`."
        )


def _check_target_modules(transformer: nn.Module, config: PeftConfig) -> None:
    targets, modules = config.target_modules, dict(transformer.named_modules())
    names = [name for name in modules if name]
    if targets == "all-linear":
        _check_patterns(config, names, [name for name in names if isinstance(modules[name], nn.Linear)])
        return
    if isinstance(targets, str):
        missing = [] if any(re.fullmatch(targets, name) for name in names) else [targets]
    else:
        missing = [t for t in sorted(targets or ()) if not any(f".{name}".endswith(f".{t}") for name in names)]
    if missing or not targets:
        linear = (name for name, module in modules.items() if isinstance(module, nn.Linear))
        known = sorted({re.sub(r"^.*\.\d+\.(?=[a-z])", "", name) for name in linear})
        raise ValueError(
            f"`target_modules` of `peft_config` must name modules of {type(transformer).__name__}, got "
            f"{missing or targets}, which match none. Its linear layers are named {known[:20]}."
        )
    targeted = [name for name in names if check_target_module_exists(config, name)]
    others = [name for name in targeted if not isinstance(modules[name], _ADAPTED)]
    if others:
        raise ValueError(
            f"`target_modules` of `peft_config` match {others[0]!r}, which is a {type(modules[others[0]]).__name__}: "
            "adapters of linear layers and convolutions are known to come back. Name those, such as 'attn1.to_q'."
        )
    if not targeted:
        raise ValueError(
            f"`peft_config` leaves no layer of {type(transformer).__name__} to train, with "
            f"exclude_modules={config.exclude_modules}, layers_to_transform={config.layers_to_transform} and "
            f"layers_pattern={config.layers_pattern}. Blocks are counted from 0, and `layers_pattern` is the name "
            f"that stands before their number, such as {_numbered(names)!r}."
        )
    _check_patterns(config, names, targeted)


def _check_patterns(config: PeftConfig, names: Sequence[str], targeted: Sequence[str]) -> None:
    """Refuse ranks and alphas of layers that are not there, and tell of those of layers that are not trained."""
    for option in ("rank_pattern", "alpha_pattern"):
        pattern = config.__dict__[option]
        idle = set(pattern) - {get_pattern_key(pattern.keys(), name) for name in targeted}
        unknown = sorted(idle - {get_pattern_key(pattern.keys(), name) for name in names})
        if unknown:
            raise ValueError(
                f"`{option}` of `peft_config` names {unknown}, and no module is called so, or ends so, or an entry "
                "before it says its number. Name layers, such as 'attn1.to_q' or 'blocks.0.attn1.to_q'."
            )
        if idle:
            logger.warning("`%s` of `peft_config` names %s, which is not among its targets.", option, sorted(idle))


def _numbered(names: Sequence[str]) -> str:
    """What stands before the first number in names of modules."""
    return next((name.rpartition(".")[0] for name in names if name.rpartition(".")[2].isdigit()), "")


def _cast_adapters(transformer: nn.Module) -> None:
    for name, parameter in transformer.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
