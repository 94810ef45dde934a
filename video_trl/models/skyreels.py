"""SkyReels-V2, text to video and image to video."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from diffusers import ContextParallelConfig, ModelMixin, SchedulerMixin, SkyReelsV2Transformer3DModel

from .base import GenerationRules
from .wan import WanFamily, WanImageToVideoFamily, wan_family


@dataclass(frozen=True)
class SkyReelsFamily(WanFamily):
    """
    [`ModelFamily`] of `SkyReelsV2Transformer3DModel` in its text-to-video form: laid out as Wan 2.1, with its VAE and
    text encoder. The diffusion forcing pipelines, with a noise level for every latent frame, are other models.
    """

    name: str = "skyreels"
    pipeline_classes: tuple[str, ...] = ("SkyReelsV2Pipeline",)
    context_parallel_methods: tuple[str, ...] = ()

    @staticmethod
    def generation_rules(index: Mapping[str, Any], transformer_config: Mapping[str, Any]) -> GenerationRules:
        """24 fps, and sides of 8 (VAE) times 2 (patch)."""
        return GenerationRules(24.0, 16)

    def share_tokens(self, transformer: ModelMixin, config: ContextParallelConfig) -> None:
        raise AssertionError("refused before: there is no method in `context_parallel_methods`")


@dataclass(frozen=True)
class SkyReelsImageToVideoFamily(WanImageToVideoFamily):
    """[`ModelFamily`] of `SkyReelsV2Transformer3DModel` in its image-to-video form, laid out as Wan 2.1's."""

    name: str = "skyreels-i2v"
    pipeline_classes: tuple[str, ...] = ("SkyReelsV2ImageToVideoPipeline",)
    context_parallel_methods: tuple[str, ...] = ()

    @staticmethod
    def generation_rules(index: Mapping[str, Any], transformer_config: Mapping[str, Any]) -> GenerationRules:
        """24 fps, and sides of 8 (VAE) times 2 (patch)."""
        return GenerationRules(24.0, 16, one_video_a_call=True)

    def share_tokens(self, transformer: ModelMixin, config: ContextParallelConfig) -> None:
        raise AssertionError("refused before: there is no method in `context_parallel_methods`")


def skyreels_family(
    transformer: SkyReelsV2Transformer3DModel, scheduler: SchedulerMixin | None, index: Mapping[str, Any]
) -> WanFamily:
    """
    Family of a SkyReels-V2 transformer.

    Raises:
        ValueError: If the transformer takes other inputs than those of text or image to video.
    """
    form = wan_family(transformer, scheduler, {})
    if isinstance(form, WanImageToVideoFamily):
        return SkyReelsImageToVideoFamily(image_columns=form.image_columns)
    return SkyReelsFamily()
