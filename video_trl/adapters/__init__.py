"""Model families. Adding one takes a file here and a line in `_ADAPTERS`."""

from diffusers import WanTransformer3DModel
from torch import nn

from .base import BlockTap, VideoAdapter, tap_block
from .wan import WanAdapter


__all__ = ["BlockTap", "VideoAdapter", "WanAdapter", "adapter_for", "supported_pipelines", "tap_block"]

_ADAPTERS: dict[type[nn.Module], VideoAdapter] = {WanTransformer3DModel: WanAdapter()}


def adapter_for(transformer: nn.Module) -> VideoAdapter:
    """
    Adapter of a transformer, by its class.

    Args:
        transformer (`torch.nn.Module`):
            Transformer of a diffusers pipeline, not wrapped.

    Returns:
        [`VideoAdapter`]: Adapter of its family.

    Raises:
        ValueError: If the class is not supported; names those that are.
    """
    for transformer_class, adapter in _ADAPTERS.items():
        if isinstance(transformer, transformer_class):
            return adapter
    supported = ", ".join(transformer_class.__name__ for transformer_class in _ADAPTERS)
    raise ValueError(f"`transformer` must be one of {supported}, got {type(transformer).__name__}.")


def supported_pipelines() -> list[str]:
    """Class names of the diffusers pipelines whose transformer has an adapter."""
    return [pipeline for adapter in _ADAPTERS.values() for pipeline in adapter.pipeline_classes]
