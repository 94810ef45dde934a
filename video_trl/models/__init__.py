"""Model families. A new one is a file here and a line in `_FAMILIES`."""

from collections.abc import Callable, Mapping
from typing import Any

from diffusers import (
    CogVideoXTransformer3DModel,
    DiffusionPipeline,
    HunyuanVideo15Transformer3DModel,
    HunyuanVideoTransformer3DModel,
    LTX2VideoTransformer3DModel,
    LTXVideoTransformer3DModel,
    ModelMixin,
    SchedulerMixin,
    SkyReelsV2Transformer3DModel,
    WanTransformer3DModel,
)
from torch import nn

from .base import BlockTap, Expert, GenerationRules, ModelFamily, lora_targets, tap_block
from .cogvideox import CogVideoXFamily, CogVideoXImageToVideoFamily, cogvideox_family
from .hunyuan import HunyuanVideoFamily, HunyuanVideoImageToVideoFamily, hunyuan_family
from .hunyuan15 import HunyuanVideo15Family, HunyuanVideo15ImageToVideoFamily, hunyuan15_family
from .ltx import LTXFamily, LTXImageToVideoFamily, ltx_family
from .ltx2 import LTX2Family, ltx2_family
from .skyreels import SkyReelsFamily, SkyReelsImageToVideoFamily, skyreels_family
from .wan import WanFamily, WanFirstFrameFamily, WanImageToVideoFamily, wan_family


__all__ = [
    "TRANSFORMERS",
    "BlockTap",
    "CogVideoXFamily",
    "CogVideoXImageToVideoFamily",
    "Expert",
    "GenerationRules",
    "HunyuanVideo15Family",
    "HunyuanVideo15ImageToVideoFamily",
    "HunyuanVideoFamily",
    "HunyuanVideoImageToVideoFamily",
    "LTX2Family",
    "LTXFamily",
    "LTXImageToVideoFamily",
    "ModelFamily",
    "SkyReelsFamily",
    "SkyReelsImageToVideoFamily",
    "WanFamily",
    "WanFirstFrameFamily",
    "WanImageToVideoFamily",
    "depth_options",
    "experts_of",
    "family_for",
    "family_of",
    "generation_rules",
    "lora_targets",
    "pipeline_index",
    "rules_of",
    "supported_pipelines",
    "tap_block",
]

# Class of the transformer -> what makes its family object, and the forms (text, image to video) that this may be.
_FAMILIES: dict[type[nn.Module], tuple[Callable[..., ModelFamily], tuple[Any, ...]]] = {
    WanTransformer3DModel: (wan_family, (WanFamily, WanImageToVideoFamily, WanFirstFrameFamily)),
    CogVideoXTransformer3DModel: (cogvideox_family, (CogVideoXFamily, CogVideoXImageToVideoFamily)),
    HunyuanVideo15Transformer3DModel: (hunyuan15_family, (HunyuanVideo15Family, HunyuanVideo15ImageToVideoFamily)),
    HunyuanVideoTransformer3DModel: (hunyuan_family, (HunyuanVideoFamily, HunyuanVideoImageToVideoFamily)),
    LTX2VideoTransformer3DModel: (ltx2_family, (LTX2Family,)),
    LTXVideoTransformer3DModel: (ltx_family, (LTXFamily, LTXImageToVideoFamily)),
    SkyReelsV2Transformer3DModel: (skyreels_family, (SkyReelsFamily, SkyReelsImageToVideoFamily)),
}

TRANSFORMERS: dict[str, type[nn.Module]] = {kind.__name__: kind for kind in _FAMILIES}
"""The classes of transformers that have a family, by name."""


def depth_options(transformer_class: str) -> tuple[str, ...]:
    """Options of the configuration of a class in `TRANSFORMERS` that are its numbers of blocks."""
    _, forms = _FAMILIES[TRANSFORMERS[transformer_class]]
    return forms[0].depth_options


def family_of(pipeline: DiffusionPipeline) -> ModelFamily:
    """[`family_for`] the transformer of a pipeline, or the first one that it has of several."""
    index = pipeline_index(pipeline)
    return family_for(_transformer_of(pipeline, index), pipeline.scheduler, index)


def rules_of(pipeline: DiffusionPipeline) -> GenerationRules | None:
    """[`generation_rules`] of a pipeline; `None` if it is of none of the families here."""
    index = pipeline_index(pipeline)
    if index["_class_name"] not in supported_pipelines():
        return None
    return generation_rules(index, _transformer_of(pipeline, index).config)


def _transformer_of(pipeline: DiffusionPipeline, index: Mapping[str, Any]) -> ModelMixin:
    """The transformer, or the first one that is there of several."""
    names = [expert.component for expert in experts_of(index)] or ["transformer"]
    return next(part for part in (pipeline.components.get(name) for name in names) if part is not None)


def pipeline_index(pipeline: DiffusionPipeline) -> dict[str, Any]:
    """What the `model_index.json` of a pipeline says of it; a derived class has the name of the one known here."""
    classes = [parent.__name__ for parent in type(pipeline).__mro__]
    known = next((name for name in classes if name in supported_pipelines()), classes[0])
    return {**pipeline.config, "_class_name": known}


def family_for(
    transformer: nn.Module, scheduler: SchedulerMixin | None = None, index: Mapping[str, Any] | None = None
) -> ModelFamily:
    """
    Family of a transformer, by its class and the inputs it takes.

    ```python
    family = family_for(pipeline.transformer, pipeline.scheduler, pipeline_index(pipeline))
    ```

    Args:
        transformer (`torch.nn.Module`):
            Transformer of a diffusers pipeline, not wrapped.
        scheduler (`SchedulerMixin`, *optional*):
            Scheduler of the same pipeline. Needed where checkpoints of a family differ in their noise schedule
            (CogVideoX); Wan's family is the same without.
        index (`Mapping`, *optional*):
            Content of the `model_index.json` of the same pipeline. Some transformers (Wan 2.2's 5B,
            LTX-Video) are those of a text-to-video and of an image-to-video pipeline: without it, the former is meant.

    Returns:
        [`ModelFamily`]: Its family, in its form (text or image to video).

    Raises:
        ValueError: If the class is not supported (names those that are), the form is none that a pipeline of
            `supported_pipelines` has, or the scheduler is needed and missing or unsuitable.
    """
    for transformer_class, (make_family, _) in _FAMILIES.items():
        if isinstance(transformer, transformer_class):
            return make_family(transformer, scheduler, index or {})
    supported = ", ".join(transformer_class.__name__ for transformer_class in _FAMILIES)
    raise ValueError(f"`transformer` must be one of {supported}, got {type(transformer).__name__}.")


def supported_pipelines() -> list[str]:
    """Class names of the diffusers pipelines whose transformer has a family here."""
    names = (name for _, forms in _FAMILIES.values() for family in forms for name in family.pipeline_classes)
    return list(dict.fromkeys(names))  # two forms of a family may share a pipeline


def experts_of(index: Mapping[str, Any]) -> tuple[Expert, ...]:
    """Transformers of a pipeline, from its `model_index.json` (or [`pipeline_index`]), if it has several."""
    for _, forms in _FAMILIES.values():
        for family in forms:
            if index.get("_class_name") in family.pipeline_classes:
                return family.experts(index)
    return ()


def generation_rules(index: Mapping[str, Any], transformer_config: Mapping[str, Any]) -> GenerationRules | None:
    """
    What a pipeline makes and how it wants to be called; `None` if none of the families here has it.

    Args:
        index (`Mapping`): Content of its `model_index.json`.
        transformer_config (`Mapping`): Content of its transformer's `config.json`.
    """
    for _, forms in _FAMILIES.values():
        for family in forms:
            if index.get("_class_name") in family.pipeline_classes:
                return family.generation_rules(index, transformer_config)
    return None
