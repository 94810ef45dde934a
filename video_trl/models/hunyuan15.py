"""HunyuanVideo-1.5, text to video and image to video."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import PIL.Image
import torch
from diffusers import (
    AutoencoderKLHunyuanVideo15,
    DiffusionPipeline,
    HunyuanVideo15Transformer3DModel,
    SchedulerMixin,
)
from torch import Tensor, nn

from .base import GenerationRules, encode_mode, module_device, pad_with_zeros, prompt_mask, unwrap
from .hunyuan import HunyuanVideoFamily


GLYPHS, GLYPH_MASK = "prompt_embeds_2", "prompt_mask_2"
"""Column `(L, D)`: what the second text encoder (ByT5) makes of the words that a prompt quotes; and its mask."""
# Numbers of tokens that the pipeline pads quoted words, and its zeros in place of an image, to.
GLYPH_TOKENS, IMAGE_TOKENS = 256, 729


@dataclass(frozen=True)
class HunyuanVideo15Family(HunyuanVideoFamily):
    """
    [`ModelFamily`] of `HunyuanVideo15Transformer3DModel` in its text-to-video form.

    Padding of a prompt is masked, and so is not stored. The transformer asks whether the embeddings of all images of a
    batch are zeros, and takes it for text to video then.
    """

    name: str = "hunyuan1.5"
    pipeline_classes: tuple[str, ...] = ("HunyuanVideo15Pipeline",)
    prompt_columns: tuple[str, ...] = ("prompt_embeds", GLYPHS)
    published_prompt_tokens: int = 1000
    guidance: float | None = None
    depth_options: ClassVar[tuple[str, ...]] = ("num_layers",)

    @staticmethod
    def generation_rules(index: Mapping[str, Any], transformer_config: Mapping[str, Any]) -> GenerationRules:
        """24 fps, and sides of 16 (VAE), whose attention fails for several videos at once."""
        return GenerationRules(24.0, 16, one_video_a_call=True)

    @property
    def condition_columns(self) -> tuple[str, ...]:
        return ("prompt_embeds", "prompt_mask", GLYPHS, GLYPH_MASK, *self.image_columns)

    @property
    def ffn_target_modules(self) -> list[str]:
        """Feed-forward layers of the video's tokens."""
        return ["ff.net.0.proj", "ff.net.2"]

    def idle_weights(self, transformer: nn.Module) -> frozenset[str]:
        """Those of the last block that make the text's tokens, which nothing reads; without images, theirs."""
        last = f"transformer_blocks.{len(self.blocks(transformer)) - 1}."
        idle = tuple(
            last + part for part in ("ff_context.", "attn.to_add_out.", "attn.add_q_proj.", "attn.norm_added_q.")
        )
        idle += () if self.image_columns else ("image_embedder.",)
        return frozenset(name for name, _ in unwrap(transformer).named_parameters() if name.startswith(idle))

    def predict(
        self, transformer: nn.Module, noisy_latents: Tensor, timesteps: Tensor, conditions: dict[str, Tensor]
    ) -> Tensor:
        """
        Velocity predicted by one transformer call, the one that `HunyuanVideo15Pipeline` makes in a denoising step.

        Args:
            transformer (`torch.nn.Module`):
                `HunyuanVideo15Transformer3DModel`, possibly inside `DistributedDataParallel`.
            noisy_latents (`torch.Tensor` of shape `(B, C, F, H, W)`):
                Noisy latents, any floating dtype; cast to the dtype of the transformer.
            timesteps (`torch.Tensor` of shape `(B,)`):
                Timesteps on [0, 1000]; cast to the dtype of the transformer, as in the pipeline.
            conditions (`dict[str, torch.Tensor]`):
                `prompt_embeds` `(B, L, D)`, `prompt_mask` `(B, L)`, `prompt_embeds_2` `(B, L', D')`, `prompt_mask_2`
                `(B, L')`; from a first frame also `first_frame_latents` `(B, C, 1, H, W)` and `image_embeds`
                `(B, L'', D'')`.

        Returns:
            `torch.Tensor` of shape `(B, C, F, H, W)`: Velocity, in the dtype of the transformer.
        """
        base = unwrap(transformer)
        latents = noisy_latents.to(base.dtype)
        given, mask = torch.zeros_like(latents), torch.zeros_like(latents[:, :1])
        image_embeds = latents.new_zeros(len(latents), IMAGE_TOKENS, base.config.image_embed_dim)
        if self.image_columns:
            given[:, :, :1] = conditions["first_frame_latents"].to(latents.dtype)
            mask[:, :, :1] = 1
            image_embeds = conditions["image_embeds"].to(latents.dtype)
        return transformer(
            hidden_states=torch.cat([latents, given, mask], dim=1),
            timestep=timesteps.to(latents.dtype),
            encoder_hidden_states=conditions["prompt_embeds"].to(latents.dtype),
            encoder_attention_mask=conditions["prompt_mask"].to(latents.dtype),
            encoder_hidden_states_2=conditions[GLYPHS].to(latents.dtype),
            encoder_attention_mask_2=conditions[GLYPH_MASK].to(latents.dtype),
            image_embeds=image_embeds,
            return_dict=False,
        )[0]

    @torch.no_grad()
    def encode_video(self, vae: AutoencoderKLHunyuanVideo15, video: Tensor) -> Tensor:
        """As [`HunyuanVideoFamily.encode_video`], one video at a time: the VAE's attention takes no more."""
        return torch.cat([super(HunyuanVideo15Family, self).encode_video(vae, one) for one in video.split(1)])

    @torch.no_grad()
    def decode_latents(self, vae: AutoencoderKLHunyuanVideo15, latents: Tensor) -> Tensor:
        """As [`HunyuanVideoFamily.decode_latents`], one video at a time."""
        return torch.cat([super(HunyuanVideo15Family, self).decode_latents(vae, one) for one in latents.split(1)])

    @torch.no_grad()
    def encode_prompt(
        self, pipeline: DiffusionPipeline, prompts: list[str], max_sequence_length: int
    ) -> list[dict[str, Tensor]]:
        """
        `prompt_embeds` `(L_i, D)` of each prompt, those of its own tokens, and `prompt_embeds_2` `(L'_i, D')` of the
        words that it quotes (none: `L'_i` is 0), in the dtype and on the device of the text encoder.

        Args:
            pipeline (`HunyuanVideo15Pipeline` or `HunyuanVideo15ImageToVideoPipeline`): Pipeline with its tokenizers
                and text encoders.
            prompts (`list[str]`): Prompts; put into the pipeline's template.
            max_sequence_length (`int`): Longer prompts are cut to this number of tokens.
        """
        embeds, mask, glyphs, glyph_mask = pipeline.encode_prompt(
            prompts, batch_size=len(prompts), device=module_device(pipeline.text_encoder)
        )
        rows = zip(embeds, mask.bool(), glyphs, glyph_mask.bool(), strict=True)
        # Cloned, or every short embedding would keep the whole padded batch alive. The text encoder is causal: what
        # is cut off has left no trace in what remains.
        return [
            {"prompt_embeds": embed[own][:max_sequence_length].clone(), GLYPHS: glyph[quoted].clone()}
            for embed, own, glyph, quoted in rows
        ]

    def pad_prompts(self, prompts: list[dict[str, Tensor]], max_sequence_length: int) -> dict[str, Tensor]:
        """The columns as batches, with zeros behind them (quoted words are 256 tokens), and masks of what is not."""
        padded = {}
        for column, mask, length in (
            ("prompt_embeds", "prompt_mask", max_sequence_length),
            (GLYPHS, GLYPH_MASK, GLYPH_TOKENS),
        ):
            embeds = [prompt[column] for prompt in prompts]
            padded[column] = pad_with_zeros(embeds, length)
            padded[mask] = prompt_mask(embeds, padded[column])
        return padded

    def condition_shapes(
        self, transformer: nn.Module, latents_shape: Sequence[int], prompt_tokens: int | None
    ) -> dict[str, tuple[int, ...]]:
        """Prompts of 1000 tokens if not said otherwise; images of 729 tokens of SigLIP, and one latent frame."""
        config, length = unwrap(transformer).config, prompt_tokens or self.published_prompt_tokens
        channels, _, height, width = latents_shape[-4:]
        shapes = {
            "prompt_embeds": (length, config.text_embed_dim),
            "prompt_mask": (length,),
            GLYPHS: (GLYPH_TOKENS, config.text_embed_2_dim),
            GLYPH_MASK: (GLYPH_TOKENS,),
            "first_frame_latents": (channels, 1, height, width),
            "image_embeds": (IMAGE_TOKENS, config.image_embed_dim),
        }
        return {name: shapes[name] for name in self.condition_columns}

    def blocks(self, transformer: nn.Module) -> nn.ModuleList:
        """Transformer blocks, in order; each returns hidden states `(B, N, D)` of the video and those of the text."""
        return unwrap(transformer).transformer_blocks


@dataclass(frozen=True)
class HunyuanVideo15ImageToVideoFamily(HunyuanVideo15Family):
    """
    [`ModelFamily`] of `HunyuanVideo15Transformer3DModel` in its image-to-video form.

    Rows carry `first_frame_latents` `(C, 1, H, W)`, which stand beside the noisy latents of the first frame, and
    `image_embeds` `(L, D)`. The pipeline chooses the size of a video by the shape of its image.
    """

    name: str = "hunyuan1.5-i2v"
    pipeline_classes: tuple[str, ...] = ("HunyuanVideo15ImageToVideoPipeline",)
    image_columns: tuple[str, ...] = ("first_frame_latents", "image_embeds")

    @property
    def image_encoders(self) -> dict[str, str]:
        """SigLIP."""
        return {"image_encoder": "feature_extractor"}

    @torch.no_grad()
    def encode_image(
        self, pipeline: DiffusionPipeline, images: list[PIL.Image.Image], num_frames: int
    ) -> dict[str, Tensor]:
        """
        Conditions of first frames, as `HunyuanVideo15ImageToVideoPipeline` makes them.

        Args:
            pipeline (`HunyuanVideo15ImageToVideoPipeline`): Pipeline with its VAE and image encoder.
            images (`list[PIL.Image.Image]`): First frames, all of the size of the videos.
            num_frames (`int`): Not needed: an image's latents do not depend on what follows.

        Returns:
            `dict[str, torch.Tensor]`: `first_frame_latents` `(B, C, 1, H, W)`, float32, on the device of the VAE, and
            `image_embeds` `(B, L, D)`, in the dtype and on the device of the image encoder.
        """
        encoder = pipeline.image_encoder
        pixels = pipeline.video_processor.preprocess(images)[:, :, None]  # (B, 3, 1, H, W)
        latents = torch.cat([encode_mode(pipeline.vae, one) for one in pixels.split(1)])
        embeds = [
            pipeline.encode_image(image, batch_size=1, device=module_device(encoder), dtype=encoder.dtype)
            for image in images
        ]
        return {
            "first_frame_latents": latents * pipeline.vae.config.scaling_factor,
            "image_embeds": torch.cat(embeds),
        }


def hunyuan15_family(
    transformer: HunyuanVideo15Transformer3DModel, scheduler: SchedulerMixin | None, index: Mapping[str, Any]
) -> HunyuanVideo15Family:
    """
    Family of a HunyuanVideo-1.5 transformer, whose configuration says which task it is for.

    Raises:
        ValueError: If the transformer was distilled to few steps, which a velocity at one time does not train.
    """
    if transformer.config.use_meanflow:
        raise ValueError(
            "The transformer was distilled to few steps (`use_meanflow`): it predicts velocities between two times, "
            "which these losses do not train. Use the checkpoint that is not distilled."
        )
    image = transformer.config.task_type == "i2v"
    return HunyuanVideo15ImageToVideoFamily() if image else HunyuanVideo15Family()
