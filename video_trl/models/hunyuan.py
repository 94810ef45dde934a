"""HunyuanVideo, text to video."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    DiffusionPipeline,
    HunyuanVideoTransformer3DModel,
    SchedulerMixin,
)
from torch import Tensor, nn

from ..diffusion import FlowMatching, NoiseProcess
from .base import (
    FamilyDefaults,
    GenerationRules,
    check_channels,
    check_patches,
    check_pixels,
    encode_mode,
    module_device,
    pad_with_zeros,
    prompt_mask,
    unwrap,
    weights_dtype,
)


POOLED = "pooled_prompt_embeds"
"""Column `(D,)`: what the second text encoder (CLIP) makes of a whole prompt."""


@dataclass(frozen=True)
class HunyuanVideoFamily(FamilyDefaults):
    """
    [`ModelFamily`] of `HunyuanVideoTransformer3DModel` in its text-to-video form.

    The transformer was distilled to guide itself: it is told a guidance scale, and the pipeline makes one call a step.
    Padding of a prompt is masked, and so is not stored.

    Args:
        guidance (`float`, *optional*): Guidance scale that the transformer is told; `None` for one that takes none.
    """

    name: str = "hunyuan"
    pipeline_classes: tuple[str, ...] = ("HunyuanVideoPipeline",)
    noise_process: NoiseProcess = FlowMatching()
    prompt_columns: tuple[str, ...] = ("prompt_embeds", POOLED)
    published_prompt_tokens: int = 256
    guidance: float | None = 6.0
    depth_options: ClassVar[tuple[str, ...]] = ("num_layers", "num_single_layers")

    @staticmethod
    def generation_rules(index: Mapping[str, Any], transformer_config: Mapping[str, Any]) -> GenerationRules:
        """24 fps, and sides of 8 (VAE) times 2 (patch)."""
        return GenerationRules(24.0, 16)

    @property
    def condition_columns(self) -> tuple[str, ...]:
        return (*self.prompt_columns, "prompt_mask")

    @property
    def text_encoders(self) -> dict[str, str]:
        """Llama and CLIP."""
        return {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}

    @property
    def lora_target_modules(self) -> list[str]:
        """Projections of the video's tokens in the joint self-attention of both kinds of blocks."""
        return ["attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"]

    @property
    def ffn_target_modules(self) -> list[str]:
        """Feed-forward layers of the video's tokens; in blocks of one stream those of all tokens."""
        return ["ff.net.0.proj", "ff.net.2", "proj_mlp", "proj_out"]

    def predict(
        self, transformer: nn.Module, noisy_latents: Tensor, timesteps: Tensor, conditions: dict[str, Tensor]
    ) -> Tensor:
        """
        Velocity predicted by one transformer call, the one that `HunyuanVideoPipeline` makes in a denoising step.

        Args:
            transformer (`torch.nn.Module`):
                `HunyuanVideoTransformer3DModel`, possibly inside `DistributedDataParallel`.
            noisy_latents (`torch.Tensor` of shape `(B, C, F, H, W)`):
                Noisy latents, any floating dtype; cast to the dtype of the transformer.
            timesteps (`torch.Tensor` of shape `(B,)`):
                Timesteps on [0, 1000]; keep them float32 also where the transformer is bfloat16.
            conditions (`dict[str, torch.Tensor]`):
                `prompt_embeds` `(B, L, D)`, `prompt_mask` `(B, L)` and `pooled_prompt_embeds` `(B, D')`.

        Returns:
            `torch.Tensor` of shape `(B, C, F, H, W)`: Velocity, in the dtype of the transformer.
        """
        dtype = weights_dtype(transformer)
        latents = noisy_latents.to(dtype)
        # Rounded as in the pipeline: 6016 in bfloat16.
        guidance = None if self.guidance is None else latents.new_full((len(latents),), self.guidance) * 1000.0
        return transformer(
            hidden_states=latents,
            timestep=timesteps,
            encoder_hidden_states=conditions["prompt_embeds"].to(dtype),
            encoder_attention_mask=conditions["prompt_mask"].to(dtype),
            pooled_projections=conditions[POOLED].to(dtype),
            guidance=guidance,
            return_dict=False,
        )[0]

    @torch.no_grad()
    def encode_video(self, vae: AutoencoderKLHunyuanVideo, video: Tensor) -> Tensor:
        """
        Scaled latents of videos: the mode of the posterior, so that encoding is deterministic.

        Args:
            vae (`AutoencoderKLHunyuanVideo`):
                VAE of the pipeline, any dtype and device.
            video (`torch.Tensor` of shape `(B, 3, T, H, W)`):
                Pixels in [-1, 1].

        Returns:
            `torch.Tensor` of shape `(B, C, F, H', W')`: Latents of standard deviation 1 or so, float32.

        Raises:
            ValueError: If the shape is not one that the VAE encodes completely.
        """
        check_pixels(video)
        self.check_video(vae, video.shape[2:])
        return encode_mode(vae, video) * vae.config.scaling_factor

    @torch.no_grad()
    def decode_latents(self, vae: AutoencoderKLHunyuanVideo, latents: Tensor) -> Tensor:
        """
        Videos of scaled latents, as `HunyuanVideoPipeline` decodes them.

        Args:
            vae (`AutoencoderKLHunyuanVideo`):
                VAE of the pipeline, any dtype and device.
            latents (`torch.Tensor` of shape `(B, C, F, H', W')`):
                Scaled latents.

        Returns:
            `torch.Tensor` of shape `(B, 3, T, H, W)`: Pixels, about [-1, 1], float32.
        """
        latents = latents.to(module_device(vae), vae.dtype) / vae.config.scaling_factor
        return vae.decode(latents, return_dict=False)[0].float()

    @torch.no_grad()
    def encode_prompt(
        self, pipeline: DiffusionPipeline, prompts: list[str], max_sequence_length: int
    ) -> list[dict[str, Tensor]]:
        """
        `prompt_embeds` `(L_i, D)` of each prompt, those of its own tokens, and `pooled_prompt_embeds` `(D',)`, in the
        dtypes and on the device of the text encoders.

        Args:
            pipeline (`HunyuanVideoPipeline`): Pipeline with its tokenizers and text encoders.
            prompts (`list[str]`): Prompts; put into the pipeline's template.
            max_sequence_length (`int`): Longer prompts are truncated to this number of tokens.
        """
        embeds, pooled, mask = pipeline.encode_prompt(
            prompts, max_sequence_length=max_sequence_length, device=module_device(pipeline.text_encoder)
        )
        rows = zip(embeds, pooled, mask.bool(), strict=True)
        # Cloned, or every short embedding would keep the whole padded batch alive.
        return [{"prompt_embeds": embed[own].clone(), POOLED: whole.clone()} for embed, whole, own in rows]

    def pad_prompts(self, prompts: list[dict[str, Tensor]], max_sequence_length: int) -> dict[str, Tensor]:
        """The columns as batches, zeros behind each prompt; `prompt_mask` `(B, L)`, true where it is."""
        embeds = [prompt["prompt_embeds"] for prompt in prompts]
        padded = pad_with_zeros(embeds, max_sequence_length)
        return {
            "prompt_embeds": padded,
            "prompt_mask": prompt_mask(embeds, padded),
            POOLED: torch.stack([prompt[POOLED] for prompt in prompts]),
        }

    def condition_shapes(
        self, transformer: nn.Module, latents_shape: Sequence[int], prompt_tokens: int | None
    ) -> dict[str, tuple[int, ...]]:
        """Prompts of 256 tokens if not said otherwise."""
        config, length = unwrap(transformer).config, prompt_tokens or self.published_prompt_tokens
        return {
            "prompt_embeds": (length, config.text_embed_dim),
            POOLED: (config.pooled_projection_dim,),
            "prompt_mask": (length,),
        }

    def blocks(self, transformer: nn.Module) -> nn.ModuleList:
        """Blocks of two streams, then of one; each returns hidden states `(B, N, D)` of the video, and the text's."""
        base = unwrap(transformer)
        return nn.ModuleList([*base.transformer_blocks, *base.single_transformer_blocks])

    def token_grid(self, transformer: nn.Module, latents_shape: Sequence[int]) -> tuple[int, int, int]:
        """Tokens `(F', H', W')` of latents of shape `(C, F, H, W)` or `(B, C, F, H, W)`."""
        self.check_latents(transformer, latents_shape)
        config = unwrap(transformer).config
        frames, height, width = latents_shape[-3:]
        return frames // config.patch_size_t, height // config.patch_size, width // config.patch_size

    def check_latents(self, transformer: nn.Module, shape: Sequence[int]) -> None:
        """Raise a `ValueError` unless latents have the transformer's channels and can be cut into its patches."""
        config = unwrap(transformer).config
        check_channels(shape, config.out_channels)
        check_patches(shape, (config.patch_size_t, config.patch_size, config.patch_size))


def hunyuan_family(
    transformer: HunyuanVideoTransformer3DModel, scheduler: SchedulerMixin | None, index: Mapping[str, Any]
) -> HunyuanVideoFamily:
    """
    Family of a HunyuanVideo transformer.

    Raises:
        ValueError: If the transformer is one for image to video, whose prompts are made of images too.
    """
    config = transformer.config
    if config.image_condition_type is not None or config.in_channels != config.out_channels:
        raise ValueError(
            f"The transformer takes {config.in_channels} channels and has `image_condition_type="
            f"{config.image_condition_type!r}`: HunyuanVideo's image-to-video and control models are not supported. "
            "Use `hunyuanvideo-community/HunyuanVideo`."
        )
    return HunyuanVideoFamily(guidance=6.0 if config.guidance_embeds else None)
