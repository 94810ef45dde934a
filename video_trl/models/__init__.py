"""Model families. Adding one takes a file here and a line in `_FAMILIES`."""

from collections.abc import Callable
from typing import Any

from diffusers import CogVideoXTransformer3DModel, SchedulerMixin, WanTransformer3DModel
from torch import nn

from .base import BlockTap, VideoAdapter, tap_block
from .cogvideox import CogVideoXAdapter, CogVideoXImageToVideoAdapter, cogvideox_adapter
from .wan import WanAdapter, WanImageToVideoAdapter, wan_adapter


__all__ = [
    "BlockTap",
    "CogVideoXAdapter",
    "CogVideoXImageToVideoAdapter",
    "VideoAdapter",
    "WanAdapter",
    "WanImageToVideoAdapter",
    "adapter_for",
    "supported_pipelines",
    "tap_block",
]

# Class of the transformer -> what makes its adapter, and the adapters that this may be.
_FAMILIES: dict[type[nn.Module], tuple[Callable[[Any, SchedulerMixin | None], VideoAdapter], tuple[Any, ...]]] = {
    WanTransformer3DModel: (wan_adapter, (WanAdapter, WanImageToVideoAdapter)),
    CogVideoXTransformer3DModel: (cogvideox_adapter, (CogVideoXAdapter, CogVideoXImageToVideoAdapter)),
}


def adapter_for(transformer: nn.Module, scheduler: SchedulerMixin | None = None) -> VideoAdapter:
    """
    Adapter of a transformer, by its class and the inputs it takes.

    ```python
    adapter = adapter_for(pipeline.transformer, pipeline.scheduler)
    ```

    Args:
        transformer (`torch.nn.Module`):
            Transformer of a diffusers pipeline, not wrapped.
        scheduler (`SchedulerMixin`, *optional*):
            Scheduler of the same pipeline. Needed where checkpoints of a family differ in their noise schedule
            (CogVideoX); Wan's adapter is the same without.

    Returns:
        [`VideoAdapter`]: Adapter of its family and form.

    Raises:
        ValueError: If the class is not supported (names those that are), the form is none that a pipeline of
            `supported_pipelines` has, or the scheduler is needed and missing or unsuitable.
    """
    for transformer_class, (make_adapter, _) in _FAMILIES.items():
        if isinstance(transformer, transformer_class):
            return make_adapter(transformer, scheduler)
    supported = ", ".join(transformer_class.__name__ for transformer_class in _FAMILIES)
    raise ValueError(f"`transformer` must be one of {supported}, got {type(transformer).__name__}.")


def supported_pipelines() -> list[str]:
    """Class names of the diffusers pipelines whose transformer has an adapter."""
    return [name for _, adapters in _FAMILIES.values() for adapter in adapters for name in adapter.pipeline_classes]
