"""HunyuanVideo, text to video and image to video."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import PIL.Image
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
    check_frames_behind_the_first,
    check_patches,
    check_pixels,
    encode_first_frames,
    encode_mode,
    module_device,
    pad_with_zeros,
    prompt_mask,
    unwrap,
    weights_dtype,
)


POOLED = "pooled_prompt_embeds"
"""Column `(D,)`: what the second text encoder (CLIP) makes of a whole prompt."""

GUIDANCE = 6.0
"""The scale that the published checkpoints are told by their authors."""

# Image to video. LLaVA makes 576 tokens of a first frame, of which the pipeline takes every fourth one; of the tokens
# that it makes of a prompt's template it drops four behind the prompt.
IMAGE_STRIDE, IMAGE_TOKENS, DROPPED_TOKENS = 4, 144, 4


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
    guidance: float | None = GUIDANCE
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


@dataclass(frozen=True)
class HunyuanVideoImageToVideoFamily(HunyuanVideoFamily):
    """
    [`ModelFamily`] of `HunyuanVideoTransformer3DModel` in its image-to-video form, where a first frame takes the place
    of the first latent frame (`image_condition_type="token_replace"`).

    The first text encoder, LLaVA, sees the first frame beside the prompt. Rows carry what it makes of the prompt,
    `prompt_embeds` `(L, D)`, and of the image, `image_embeds` `(144, D)`, and `first_frame_latents` `(C, 1, H, W)`,
    which the transformer sees without noise and at timestep 0: it predicts nothing for them.
    """

    name: str = "hunyuan-i2v"
    pipeline_classes: tuple[str, ...] = ("HunyuanVideoImageToVideoPipeline",)
    prompt_columns: tuple[str, ...] = ("prompt_embeds", POOLED, "image_embeds")
    image_columns: tuple[str, ...] = ("first_frame_latents",)
    prompt_image_processor: str | None = "image_processor"
    given_frames: int = 1

    @staticmethod
    def generation_rules(index: Mapping[str, Any], transformer_config: Mapping[str, Any]) -> GenerationRules:
        """
        24 fps, sides of 16, and the guidance that transformers are told, for which the call's default is 1. Of several
        prompts the pipeline cuts those wrongly that are too long.
        """
        guidance = GUIDANCE if transformer_config.get("guidance_embeds", True) else None
        lost = 4 if transformer_config.get("image_condition_type") == "latent_concat" else 0
        return GenerationRules(24.0, 16, one_video_a_call=True, guidance_scale=guidance, lost_frames=lost)

    @property
    def condition_columns(self) -> tuple[str, ...]:
        return (*self.prompt_columns, "prompt_mask", *self.image_columns)

    def predict(
        self, transformer: nn.Module, noisy_latents: Tensor, timesteps: Tensor, conditions: dict[str, Tensor]
    ) -> Tensor:
        """
        Velocity predicted by one transformer call, the one that `HunyuanVideoImageToVideoPipeline` makes.

        Takes and returns what [`HunyuanVideoFamily.predict`] does, with `first_frame_latents` `(B, C, 1, H, W)` and
        `image_embeds` `(B, 144, D)` in `conditions` too. The noise of the first latent frame is not looked at, and its
        velocity has no meaning.
        """
        image, prompt, mask = (conditions[name] for name in ("image_embeds", "prompt_embeds", "prompt_mask"))
        first = conditions["first_frame_latents"].to(noisy_latents.dtype)
        context = {
            "prompt_embeds": torch.cat([image, prompt], dim=1),
            "prompt_mask": torch.cat([mask.new_ones(image.shape[:2]), mask], dim=1),
        }
        latents = torch.cat([first, noisy_latents[:, :, 1:]], dim=2)
        return super().predict(transformer, latents, timesteps, conditions | context)

    @torch.no_grad()
    def encode_prompt_with_image(
        self,
        pipeline: DiffusionPipeline,
        prompts: list[str],
        images: list[PIL.Image.Image],
        max_sequence_length: int,
    ) -> list[dict[str, Tensor]]:
        """
        `prompt_embeds` `(L_i, D)` of each prompt, those of its own tokens, `image_embeds` `(144, D)` of its first
        frame, and `pooled_prompt_embeds` `(D',)`, in the dtypes and on the device of the text encoders.

        Args:
            pipeline (`HunyuanVideoImageToVideoPipeline`): Pipeline with its tokenizers, text encoders and image
                processor.
            prompts (`list[str]`): Prompts; put into the pipeline's template.
            images (`list[PIL.Image.Image]`): First frame of each.
            max_sequence_length (`int`): Longer prompts are truncated to this number of tokens, less four.
        """
        encoded = []
        for prompt, image in zip(prompts, images, strict=True):  # one at a time: see `generation_rules`
            embeds, pooled, mask = pipeline.encode_prompt(
                image,
                prompt,
                max_sequence_length=max_sequence_length,
                image_embed_interleave=IMAGE_STRIDE,
                device=module_device(pipeline.text_encoder),
            )
            own = embeds[0][mask[0].bool()]
            seen, read = own[:IMAGE_TOKENS].clone(), own[IMAGE_TOKENS:].clone()
            encoded.append({"prompt_embeds": read, POOLED: pooled[0], "image_embeds": seen})
        return encoded

    def pad_prompts(self, prompts: list[dict[str, Tensor]], max_sequence_length: int) -> dict[str, Tensor]:
        """As in text to video, to four tokens less, as the pipeline does; and `image_embeds` `(B, 144, D)`."""
        images = torch.stack([prompt["image_embeds"] for prompt in prompts])
        return super().pad_prompts(prompts, max_sequence_length - DROPPED_TOKENS) | {"image_embeds": images}

    @torch.no_grad()
    def encode_image(
        self, pipeline: DiffusionPipeline, images: list[PIL.Image.Image], num_frames: int
    ) -> dict[str, Tensor]:
        """
        `first_frame_latents` `(B, C, 1, H, W)`, float32, on the device of the VAE: the images as videos of one frame.

        Args:
            pipeline (`HunyuanVideoImageToVideoPipeline`): Pipeline with its VAE.
            images (`list[PIL.Image.Image]`): First frames, all of the size of the videos.
            num_frames (`int`): Not needed: an image's latents do not depend on what follows.
        """
        return encode_first_frames(self, pipeline, images)

    def condition_shapes(
        self, transformer: nn.Module, latents_shape: Sequence[int], prompt_tokens: int | None
    ) -> dict[str, tuple[int, ...]]:
        """Prompts of 256 tokens, less four, if not said otherwise; 144 tokens of the image, and one latent frame."""
        length = (prompt_tokens or self.published_prompt_tokens) - DROPPED_TOKENS
        channels, _, height, width = latents_shape[-4:]
        return super().condition_shapes(transformer, latents_shape, length) | {
            "image_embeds": (IMAGE_TOKENS, unwrap(transformer).config.text_embed_dim),
            "first_frame_latents": (channels, 1, height, width),
        }

    def check_latents(self, transformer: nn.Module, shape: Sequence[int]) -> None:
        """As in text to video, and there must be a frame behind the first one."""
        super().check_latents(transformer, shape)
        check_frames_behind_the_first(shape)


def hunyuan_family(
    transformer: HunyuanVideoTransformer3DModel, scheduler: SchedulerMixin | None, index: Mapping[str, Any]
) -> HunyuanVideoFamily:
    """
    Family of a HunyuanVideo transformer, whose configuration says whether it begins with a given frame.

    Raises:
        ValueError: If the transformer takes more channels than it returns, for a first frame or something else.
    """
    config = transformer.config
    if config.image_condition_type == "latent_concat":
        raise ValueError(
            "The transformer takes the first frame as further channels (`image_condition_type='latent_concat'`, "
            "HunyuanVideo-I2V-33ch), and its pipeline throws the first four frames of what it makes away: what it "
            "generates does not begin with that frame. Use `hunyuanvideo-community/HunyuanVideo-I2V`."
        )
    if config.in_channels != config.out_channels:
        raise ValueError(
            f"The transformer takes {config.in_channels} channels and returns {config.out_channels}: HunyuanVideo's "
            "control models are not supported. Use `hunyuanvideo-community/HunyuanVideo` or `-I2V`."
        )
    family = HunyuanVideoFamily if config.image_condition_type is None else HunyuanVideoImageToVideoFamily
    return family(guidance=GUIDANCE if config.guidance_embeds else None)
