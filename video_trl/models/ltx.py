"""LTX-Video, text to video and image to video."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import PIL.Image
import torch
from diffusers import (
    AutoencoderKLLTXVideo,
    DiffusionPipeline,
    LTXVideoTransformer3DModel,
    SchedulerMixin,
)
from torch import Tensor, nn

from ..diffusion import FlowMatching, NoiseProcess
from .base import (
    FRAME_RATE,
    FamilyDefaults,
    GenerationRules,
    check_channels,
    check_frames_behind_the_first,
    check_pixels,
    encode_mode,
    module_device,
    pad_with_zeros,
    prompt_mask,
    unwrap,
    weights_dtype,
)


# What one latent frame and one latent pixel stand for in every checkpoint. The positions of tokens are in pixels and
# seconds, and the transformer does not say it.
FRAMES_PER_LATENT, PIXELS_PER_LATENT = 8, 32


@dataclass(frozen=True)
class LTXFamily(FamilyDefaults):
    """
    [`ModelFamily`] of `LTXVideoTransformer3DModel` in its text-to-video form.

    Positions in time are in seconds, so that rows carry their frame rate. Padding of a prompt is masked in the
    transformer, and so is not stored; but not in the text encoder: embeddings depend on `max_sequence_length`, which
    must be that of the pipeline's call (128 if nothing is said there).
    """

    name: str = "ltx"
    pipeline_classes: tuple[str, ...] = ("LTXPipeline",)
    noise_process: NoiseProcess = FlowMatching()
    frames_per_latent: int = FRAMES_PER_LATENT
    published_prompt_tokens: int = 128

    @staticmethod
    def generation_rules(index: Mapping[str, Any], transformer_config: Mapping[str, Any]) -> GenerationRules:
        """25 fps, which the pipeline takes for granted if it is told no other, and sides of 32."""
        return GenerationRules(25.0, PIXELS_PER_LATENT)

    @property
    def condition_columns(self) -> tuple[str, ...]:
        return ("prompt_embeds", "prompt_mask", *self.image_columns, FRAME_RATE)

    def predict(
        self, transformer: nn.Module, noisy_latents: Tensor, timesteps: Tensor, conditions: dict[str, Tensor]
    ) -> Tensor:
        """
        Velocity predicted by one transformer call, the one that `LTXPipeline` makes in a denoising step.

        Args:
            transformer (`torch.nn.Module`):
                `LTXVideoTransformer3DModel`, possibly inside `DistributedDataParallel`.
            noisy_latents (`torch.Tensor` of shape `(B, C, F, H, W)`):
                Noisy latents, any floating dtype; cast to the dtype of the transformer.
            timesteps (`torch.Tensor` of shape `(B,)`):
                Timesteps on [0, 1000]; keep them float32 also where the transformer is bfloat16.
            conditions (`dict[str, torch.Tensor]`):
                `prompt_embeds` `(B, L, D)`, `prompt_mask` `(B, L)` and `frame_rate` `(B,)`.

        Returns:
            `torch.Tensor` of shape `(B, C, F, H, W)`: Velocity, in the dtype of the transformer.
        """
        return self._call(transformer, noisy_latents, timesteps, conditions)

    @torch.no_grad()
    def encode_video(self, vae: AutoencoderKLLTXVideo, video: Tensor) -> Tensor:
        """
        Normalised latents of videos: the mode of the posterior, so that encoding is deterministic.

        Args:
            vae (`AutoencoderKLLTXVideo`):
                VAE of the pipeline, any dtype and device.
            video (`torch.Tensor` of shape `(B, 3, T, H, W)`):
                Pixels in [-1, 1].

        Returns:
            `torch.Tensor` of shape `(B, C, F, H', W')`: Latents of mean 0 and standard deviation 1 or so, float32.

        Raises:
            ValueError: If the shape is not one that the VAE encodes completely.
        """
        check_pixels(video)
        self.check_video(vae, video.shape[2:])
        return self._mode(vae, video) * vae.config.scaling_factor

    @torch.no_grad()
    def decode_latents(self, vae: AutoencoderKLLTXVideo, latents: Tensor) -> Tensor:
        """
        Videos of normalised latents, as `LTXPipeline` decodes them if nothing else is said.

        Args:
            vae (`AutoencoderKLLTXVideo`):
                VAE of the pipeline, any dtype and device.
            latents (`torch.Tensor` of shape `(B, C, F, H', W')`):
                Normalised latents.

        Returns:
            `torch.Tensor` of shape `(B, 3, T, H, W)`: Pixels, about [-1, 1], float32.
        """
        latents = latents.to(module_device(vae), torch.float32)
        mean, std = (each.view(1, -1, 1, 1, 1).to(latents) for each in (vae.latents_mean, vae.latents_std))
        latents = (latents * std / vae.config.scaling_factor + mean).to(vae.dtype)
        timestep = latents.new_zeros(len(latents)) if vae.config.timestep_conditioning else None
        return vae.decode(latents, timestep, return_dict=False)[0].float()

    @torch.no_grad()
    def encode_prompt(
        self, pipeline: DiffusionPipeline, prompts: list[str], max_sequence_length: int
    ) -> list[dict[str, Tensor]]:
        """
        `prompt_embeds` `(L_i, D)` of each prompt, those of its own tokens, in the dtype and on the device of the text
        encoder.

        Args:
            pipeline (`LTXPipeline` or `LTXImageToVideoPipeline`): Pipeline with its tokenizer and text encoder.
            prompts (`list[str]`): Prompts.
            max_sequence_length (`int`): Prompts are cut and padded to this number of tokens for the text encoder.
        """
        embeds, mask, _, _ = pipeline.encode_prompt(
            prompts,
            do_classifier_free_guidance=False,
            max_sequence_length=max_sequence_length,
            device=module_device(pipeline.text_encoder),
        )
        # Cloned, or every short embedding would keep the whole padded batch alive.
        return [{"prompt_embeds": embed[own].clone()} for embed, own in zip(embeds, mask, strict=True)]

    def pad_prompts(self, prompts: list[dict[str, Tensor]], max_sequence_length: int) -> dict[str, Tensor]:
        """`prompt_embeds` `(B, max_sequence_length, D)`, zeros behind each prompt; `prompt_mask`, true where it is."""
        embeds = [prompt["prompt_embeds"] for prompt in prompts]
        padded = pad_with_zeros(embeds, max_sequence_length)
        return {"prompt_embeds": padded, "prompt_mask": prompt_mask(embeds, padded)}

    def condition_shapes(
        self, transformer: nn.Module, latents_shape: Sequence[int], prompt_tokens: int | None
    ) -> dict[str, tuple[int, ...]]:
        """Prompts of 128 tokens if not said otherwise; of a first frame, one latent frame."""
        length = prompt_tokens or self.published_prompt_tokens
        channels, _, height, width = latents_shape[-4:]
        shapes = {
            "prompt_embeds": (length, unwrap(transformer).config.caption_channels),
            "prompt_mask": (length,),
            "first_frame_latents": (channels, 1, height, width),
            FRAME_RATE: (),
        }
        return {name: shapes[name] for name in self.condition_columns}

    def blocks(self, transformer: nn.Module) -> nn.ModuleList:
        """Transformer blocks, in order; each returns hidden states `(B, N, D)`."""
        return unwrap(transformer).transformer_blocks

    def token_grid(self, transformer: nn.Module, latents_shape: Sequence[int]) -> tuple[int, int, int]:
        """One token a latent pixel: `(F, H, W)` of latents of shape `(C, F, H, W)` or `(B, C, F, H, W)`."""
        self.check_latents(transformer, latents_shape)
        frames, height, width = latents_shape[-3:]
        return frames, height, width

    def check_latents(self, transformer: nn.Module, shape: Sequence[int]) -> None:
        """Raise a `ValueError` unless latents `(C, F, H, W)` or `(B, C, F, H, W)` have the transformer's channels."""
        check_channels(shape, unwrap(transformer).config.out_channels)

    def _mode(self, vae: AutoencoderKLLTXVideo, video: Tensor) -> Tensor:
        latents = encode_mode(vae, video)
        mean, std = (each.view(1, -1, 1, 1, 1).to(latents) for each in (vae.latents_mean, vae.latents_std))
        return (latents - mean) / std

    def _call(
        self, transformer: nn.Module, latents: Tensor, timesteps: Tensor, conditions: dict[str, Tensor]
    ) -> Tensor:
        """The transformer's output `(B, C, F, H, W)`, for timesteps `(B,)` or `(B, F * H * W)`."""
        dtype = weights_dtype(transformer)
        frames, height, width = latents.shape[2:]
        rate = conditions[FRAME_RATE].float().view(-1, 1, 1, 1, 1)
        velocity = transformer(
            hidden_states=latents.to(dtype).flatten(2).transpose(1, 2).contiguous(),  # (B, N, C)
            encoder_hidden_states=conditions["prompt_embeds"].to(dtype),
            timestep=timesteps,
            encoder_attention_mask=conditions["prompt_mask"],
            num_frames=frames,
            height=height,
            width=width,
            rope_interpolation_scale=(FRAMES_PER_LATENT / rate, PIXELS_PER_LATENT, PIXELS_PER_LATENT),
            return_dict=False,
        )[0]
        return velocity.transpose(1, 2).unflatten(2, (frames, height, width))


@dataclass(frozen=True)
class LTXImageToVideoFamily(LTXFamily):
    """
    [`ModelFamily`] of `LTXVideoTransformer3DModel` in its image-to-video form.

    Rows carry `first_frame_latents` `(C, 1, H, W)`, which take the place of the first latent frame: the transformer
    sees them without noise and at timestep 0, and predicts nothing for them.
    """

    name: str = "ltx-i2v"
    pipeline_classes: tuple[str, ...] = ("LTXImageToVideoPipeline",)
    image_columns: tuple[str, ...] = ("first_frame_latents",)
    given_frames: int = 1

    def predict(
        self, transformer: nn.Module, noisy_latents: Tensor, timesteps: Tensor, conditions: dict[str, Tensor]
    ) -> Tensor:
        """
        Velocity predicted by one transformer call, the one that `LTXImageToVideoPipeline` makes.

        Takes and returns what [`LTXFamily.predict`] does, with `first_frame_latents` `(B, C, 1, H, W)` in `conditions`
        too. The noise of the first latent frame is not looked at, and its velocity has no meaning.
        """
        first = conditions["first_frame_latents"].to(noisy_latents.dtype)
        is_noisy = timesteps.new_ones(noisy_latents.shape[2:])
        is_noisy[0] = 0
        latents = torch.cat([first, noisy_latents[:, :, 1:]], dim=2)
        return self._call(transformer, latents, timesteps[:, None] * is_noisy.flatten(), conditions)

    @torch.no_grad()
    def encode_image(
        self, pipeline: DiffusionPipeline, images: list[PIL.Image.Image], num_frames: int
    ) -> dict[str, Tensor]:
        """
        Latents of first frames: the mode of the posterior, of which the pipeline takes a sample, and as there without
        the VAE's `scaling_factor` (which is 1 in the published checkpoints).

        Args:
            pipeline (`LTXImageToVideoPipeline`): Pipeline with its VAE.
            images (`list[PIL.Image.Image]`): First frames, all of the size of the videos.
            num_frames (`int`): Not needed: an image's latents do not depend on what follows.

        Returns:
            `dict[str, torch.Tensor]`: `first_frame_latents` `(B, C, 1, H, W)`, float32, on the device of the VAE.
        """
        pixels = pipeline.video_processor.preprocess(images)[:, :, None]
        return {"first_frame_latents": self._mode(pipeline.vae, pixels)}

    def check_latents(self, transformer: nn.Module, shape: Sequence[int]) -> None:
        """As in text to video, and there must be a frame behind the first one."""
        super().check_latents(transformer, shape)
        check_frames_behind_the_first(shape)


def ltx_family(
    transformer: LTXVideoTransformer3DModel, scheduler: SchedulerMixin | None, index: Mapping[str, Any]
) -> LTXFamily:
    """Family of an LTX-Video transformer; the pipeline alone says whether it begins with a given frame."""
    return LTXImageToVideoFamily() if index.get("_class_name") == "LTXImageToVideoPipeline" else LTXFamily()
