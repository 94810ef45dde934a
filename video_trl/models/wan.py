"""Wan 2.1 and 2.2, text to video and image to video."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import PIL.Image
import torch
from diffusers import (
    AutoencoderKLWan,
    ContextParallelConfig,
    DiffusionPipeline,
    ModelMixin,
    SchedulerMixin,
)
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from torch import Tensor, nn

from ..diffusion import FlowMatching, NoiseProcess
from .attention.ulysses import share_tokens_of_wan
from .base import (
    Expert,
    FamilyDefaults,
    GenerationRules,
    check_channels,
    check_frames_behind_the_first,
    check_patches,
    check_pixels,
    check_video_size,
    encode_first_frames,
    encode_mode,
    module_device,
    pad_with_zeros,
    unwrap,
    weights_dtype,
)


# `AutoencoderKLWan` encodes the first frame alone and then frames in chunks of four, whatever its temporal factor is,
# and silently leaves out an incomplete last chunk.
VAE_FRAME_CHUNK = 4
# With image embeddings, `WanTransformer3DModel` takes the last so many tokens of its context for the prompt, whatever
# the prompt's length: with fewer, image tokens would silently be read as words.
PROMPT_TOKENS_WITH_IMAGE = 512


@dataclass(frozen=True)
class WanFamily(FamilyDefaults):
    """
    [`ModelFamily`] of `WanTransformer3DModel` in its text-to-video form.

    Wan's cross-attention has no mask: the zeros behind a prompt take part in attention, so prompts must be padded to
    the same length in training as in the pipeline's call (`max_sequence_length`).
    """

    name: str = "wan"
    pipeline_classes: tuple[str, ...] = ("WanPipeline",)
    noise_process: NoiseProcess = FlowMatching()
    context_parallel_methods: tuple[str, ...] = ("ulysses", "ring")

    @staticmethod
    def experts(index: Mapping[str, Any]) -> tuple[Expert, ...]:
        """Two in Wan 2.2's A14B, which share no weight: `boundary_ratio` of the timesteps lies below the first."""
        if index.get("boundary_ratio") is None:
            return ()
        steps = FlowMatching().num_train_timesteps
        boundary = index["boundary_ratio"] * steps
        return Expert("high_noise", "transformer", boundary, steps), Expert("low_noise", "transformer_2", 0, boundary)

    @staticmethod
    def generation_rules(index: Mapping[str, Any], transformer_config: Mapping[str, Any]) -> GenerationRules:
        """16 fps and sides of 8 (VAE) times 2 (patch); 24 fps and 16 times 2 of Wan 2.2's 5B, with another VAE."""
        # The image-to-video pipeline encodes all images once for every video, and takes no list of them.
        one_video = index["_class_name"] == "WanImageToVideoPipeline"
        return (
            GenerationRules(24.0, 32, one_video)
            if index.get("expand_timesteps")
            else GenerationRules(16.0, 16, one_video)
        )

    @property
    def ffn_target_modules(self) -> list[str]:
        """The two layers of `ffn`."""
        return ["ffn.net.0.proj", "ffn.net.2"]

    def predict(
        self, transformer: nn.Module, noisy_latents: Tensor, timesteps: Tensor, conditions: dict[str, Tensor]
    ) -> Tensor:
        """
        Velocity predicted by one transformer call, the one that `WanPipeline` makes in a denoising step.

        Args:
            transformer (`torch.nn.Module`):
                `WanTransformer3DModel`, possibly inside `DistributedDataParallel`.
            noisy_latents (`torch.Tensor` of shape `(B, C, F, H, W)`):
                Noisy latents, any floating dtype; cast to the dtype of the transformer.
            timesteps (`torch.Tensor` of shape `(B,)`):
                Timesteps on [0, 1000]; keep them float32 also where the transformer is bfloat16.
            conditions (`dict[str, torch.Tensor]`):
                `prompt_embeds` of shape `(B, L, D)`, padded by [`WanFamily.pad_prompts`].

        Returns:
            `torch.Tensor` of shape `(B, C, F, H, W)`: Velocity, in the dtype of the transformer.
        """
        dtype = weights_dtype(transformer)
        return transformer(
            hidden_states=noisy_latents.to(dtype),
            timestep=timesteps,
            encoder_hidden_states=conditions["prompt_embeds"].to(dtype),
            return_dict=False,
        )[0]

    @torch.no_grad()
    def encode_video(self, vae: AutoencoderKLWan, video: Tensor) -> Tensor:
        """
        Normalised latents of videos: the mode of the posterior, so that encoding is deterministic.

        Args:
            vae (`AutoencoderKLWan`):
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
        latents = encode_mode(vae, video)
        mean, inverse_std = _latent_statistics(vae, latents)
        return (latents - mean) * inverse_std

    @torch.no_grad()
    def decode_latents(self, vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
        """
        Videos of normalised latents, as `WanPipeline` decodes them.

        Args:
            vae (`AutoencoderKLWan`):
                VAE of the pipeline, any dtype and device.
            latents (`torch.Tensor` of shape `(B, C, F, H', W')`):
                Normalised latents.

        Returns:
            `torch.Tensor` of shape `(B, 3, T, H, W)`: Pixels in [-1, 1], float32.
        """
        latents = latents.to(module_device(vae), vae.dtype)
        mean, inverse_std = _latent_statistics(vae, latents)
        return vae.decode(latents / inverse_std + mean, return_dict=False)[0].float()

    @torch.no_grad()
    def encode_prompt(
        self, pipeline: DiffusionPipeline, prompts: list[str], max_sequence_length: int
    ) -> list[dict[str, Tensor]]:
        """
        Embeddings of prompts, cut to their true number of tokens (the end-of-sequence token included).

        Args:
            pipeline (`WanPipeline` or `WanImageToVideoPipeline`):
                Pipeline with its tokenizer and text encoder.
            prompts (`list[str]`):
                Prompts; cleaned as the pipeline cleans them.
            max_sequence_length (`int`):
                Longer prompts are truncated to this number of tokens.

        Returns:
            `list[dict[str, torch.Tensor]]`: For each prompt `prompt_embeds` `(L_i, D)`, in the dtype and on the device
            of the text encoder, equal to what the pipeline computes before it pads with zeros.
        """
        device = module_device(pipeline.text_encoder)
        padded, _ = pipeline.encode_prompt(
            prompts, do_classifier_free_guidance=False, max_sequence_length=max_sequence_length, device=device
        )
        token_ids = pipeline.tokenizer(
            [prompt_clean(prompt) for prompt in prompts], max_length=max_sequence_length, truncation=True
        ).input_ids
        # Cloned, or every short embedding would keep the whole padded batch alive.
        return [{"prompt_embeds": embeds[: len(ids)].clone()} for embeds, ids in zip(padded, token_ids, strict=True)]

    def pad_prompts(self, prompts: list[dict[str, Tensor]], max_sequence_length: int) -> dict[str, Tensor]:
        """
        `prompt_embeds` `(B, max_sequence_length, D)`, with zeros behind each prompt.

        Raises:
            ValueError: If there is no prompt, or one is no `(L_i, D)` tensor or longer than `max_sequence_length`.
        """
        return {"prompt_embeds": pad_with_zeros([prompt["prompt_embeds"] for prompt in prompts], max_sequence_length)}

    def condition_shapes(
        self, transformer: nn.Module, latents_shape: Sequence[int], prompt_tokens: int | None
    ) -> dict[str, tuple[int, ...]]:
        """Prompts of 512 tokens if not said otherwise; images of 257 tokens of CLIP, and as many latents as videos."""
        config = unwrap(transformer).config
        length = self.prompt_length(transformer) or prompt_tokens or PROMPT_TOKENS_WITH_IMAGE
        shapes = {
            "prompt_embeds": (length, config.text_dim),
            "first_frame_latents": tuple(latents_shape[-4:]),
            "image_embeds": (257, config.image_dim),
        }
        return {name: shapes[name] for name in self.condition_columns}

    def blocks(self, transformer: nn.Module) -> nn.ModuleList:
        """Transformer blocks, in order; each returns hidden states `(B, N, D)`."""
        return unwrap(transformer).blocks

    def token_grid(self, transformer: nn.Module, latents_shape: Sequence[int]) -> tuple[int, int, int]:
        """Tokens `(F', H', W')` of latents of shape `(C, F, H, W)` or `(B, C, F, H, W)`."""
        self.check_latents(transformer, latents_shape)
        frames, height, width = latents_shape[-3:]
        patch_frames, patch_height, patch_width = unwrap(transformer).config.patch_size
        return frames // patch_frames, height // patch_height, width // patch_width

    def share_tokens(self, transformer: ModelMixin, config: ContextParallelConfig) -> None:
        """Let the processes of `config` share the tokens of videos in every forward; see `context_parallel_size`."""
        share_tokens_of_wan(transformer, config)

    def check_latents(self, transformer: nn.Module, shape: Sequence[int]) -> None:
        """
        Raise a `ValueError` unless the transformer takes latents of shape `(C, F, H, W)` or `(B, C, F, H, W)`.

        The channel count must be that of the transformer's output, frames and sides divisible by its patch, and no
        longer than its table of positions.
        """
        config = unwrap(transformer).config
        check_channels(shape, config.out_channels or config.in_channels)
        check_patches(shape, config.patch_size)
        longest = max(size // step for size, step in zip(shape[-3:], config.patch_size, strict=True))
        if longest > config.rope_max_seq_len:
            raise ValueError(
                f"The transformer knows {config.rope_max_seq_len} positions along a side, got {longest} for latents "
                f"of shape {tuple(shape)}. Change `num_frames`, `height` or `width` of the videos."
            )

    def check_video(self, vae: AutoencoderKLWan, shape: Sequence[int]) -> None:
        """
        Raise a `ValueError` unless the VAE encodes every frame and pixel of videos of shape `(T, H, W)`.

        `T` must be `4k + 1` and the sides divisible by the VAE's spatial factor.
        """
        chunk = max(VAE_FRAME_CHUNK, vae.config.scale_factor_temporal)
        check_video_size(shape, frame_chunk=chunk, side=vae.config.scale_factor_spatial)

    def compression(self, vae: AutoencoderKLWan) -> tuple[int, int]:
        """4 frames and, with Wan 2.1's VAE, 8 pixels; with that of Wan 2.2's 5B 16."""
        return vae.config.scale_factor_temporal, vae.config.scale_factor_spatial


@dataclass(frozen=True)
class WanImageToVideoFamily(WanFamily):
    """
    [`ModelFamily`] of `WanTransformer3DModel` in its image-to-video form.

    Rows carry `first_frame_latents` `(C, F, H, W)`, the latents of the first frame followed by grey frames: the VAE is
    causal, so the image shows in the later latent frames too, and all of them have to be kept. The mask channels
    beside them are the same for every video and are made in `predict`. `image_embeds` `(L, D)` are there where the
    transformer takes them, as in the 14B checkpoints of Wan 2.1.
    """

    name: str = "wan-i2v"
    pipeline_classes: tuple[str, ...] = ("WanImageToVideoPipeline",)
    image_columns: tuple[str, ...] = ("first_frame_latents", "image_embeds")

    @property
    def image_encoders(self) -> dict[str, str]:
        """CLIP, where the transformer takes its embeddings."""
        return {"image_encoder": "image_processor"} if "image_embeds" in self.image_columns else {}

    def predict(
        self, transformer: nn.Module, noisy_latents: Tensor, timesteps: Tensor, conditions: dict[str, Tensor]
    ) -> Tensor:
        """
        Velocity predicted by one transformer call, the one that `WanImageToVideoPipeline` makes.

        Args:
            transformer (`torch.nn.Module`):
                `WanTransformer3DModel`, possibly inside `DistributedDataParallel`.
            noisy_latents (`torch.Tensor` of shape `(B, C, F, H, W)`):
                Noisy latents, any floating dtype; cast to the dtype of the transformer.
            timesteps (`torch.Tensor` of shape `(B,)`):
                Timesteps on [0, 1000]; keep them float32 also where the transformer is bfloat16.
            conditions (`dict[str, torch.Tensor]`):
                `prompt_embeds` `(B, L, D)`, `first_frame_latents` `(B, C, F, H, W)` and, if in `image_columns`,
                `image_embeds` `(B, L', D')`; then L must be 512.

        Returns:
            `torch.Tensor` of shape `(B, C, F, H, W)`: Velocity, in the dtype of the transformer.

        Raises:
            ValueError: If there are image embeddings and prompts are not padded to 512 tokens.
        """
        base = unwrap(transformer)
        required, num_tokens = self.prompt_length(transformer), conditions["prompt_embeds"].shape[1]
        if required not in (None, num_tokens):
            raise ValueError(f"Prompts must be padded to {required} tokens beside image embeddings, got {num_tokens}.")
        first_frame_latents = conditions["first_frame_latents"].to(noisy_latents.dtype)
        batch_size, channels, frames, height, width = noisy_latents.shape
        mask = noisy_latents.new_zeros(batch_size, base.config.in_channels - 2 * channels, frames, height, width)
        mask[:, :, 0] = 1  # one channel for each of the pixel frames of a latent frame; the first frame is given
        image_embeds = conditions["image_embeds"].to(base.dtype) if "image_embeds" in self.image_columns else None
        return transformer(
            hidden_states=torch.cat([noisy_latents, mask, first_frame_latents], dim=1).to(base.dtype),
            timestep=timesteps,
            encoder_hidden_states=conditions["prompt_embeds"].to(base.dtype),
            encoder_hidden_states_image=image_embeds,
            return_dict=False,
        )[0]

    def prompt_length(self, transformer: nn.Module) -> int | None:
        """512 beside image embeddings, else any."""
        return PROMPT_TOKENS_WITH_IMAGE if "image_embeds" in self.image_columns else None

    @torch.no_grad()
    def encode_image(
        self, pipeline: DiffusionPipeline, images: list[PIL.Image.Image], num_frames: int
    ) -> dict[str, Tensor]:
        """
        Conditions of first frames, as `WanImageToVideoPipeline` builds them.

        Args:
            pipeline (`WanImageToVideoPipeline`): Pipeline with its VAE and, where it has one, image encoder.
            images (`list[PIL.Image.Image]`): First frames, all of the size of the videos.
            num_frames (`int`): Number of frames of the videos, the first included.

        Returns:
            `dict[str, torch.Tensor]`: `first_frame_latents` `(B, C, F, H, W)`, float32, on the device of the VAE; with
            an image encoder `image_embeds` `(B, L, D)`, in its dtype and on its device.
        """
        pixels = pipeline.video_processor.preprocess(images).to(module_device(pipeline.vae))[:, :, None]
        grey = pixels.new_zeros(*pixels.shape[:2], num_frames - 1, *pixels.shape[3:])
        conditions = {"first_frame_latents": self.encode_video(pipeline.vae, torch.cat([pixels, grey], dim=2))}
        if "image_embeds" in self.image_columns:
            device = module_device(pipeline.image_encoder)
            conditions["image_embeds"] = pipeline.encode_image(images, device)
        return conditions


@dataclass(frozen=True)
class WanFirstFrameFamily(WanFamily):
    """
    [`ModelFamily`] of `WanTransformer3DModel` where a first frame takes the place of the first latent frame, as in the
    image-to-video form of Wan 2.2's 5B.

    Rows carry `first_frame_latents` `(C, 1, H, W)`. The transformer sees them without noise and at timestep 0, and
    predicts nothing for them: the loss is that of the frames behind.
    """

    name: str = "wan-ti2v"
    pipeline_classes: tuple[str, ...] = ("WanImageToVideoPipeline",)
    image_columns: tuple[str, ...] = ("first_frame_latents",)
    context_parallel_methods: tuple[str, ...] = ("ulysses",)  # ring attention is set up for one timestep a video
    given_frames: int = 1

    def predict(
        self, transformer: nn.Module, noisy_latents: Tensor, timesteps: Tensor, conditions: dict[str, Tensor]
    ) -> Tensor:
        """
        Velocity predicted by one transformer call, the one that `WanImageToVideoPipeline` makes for Wan 2.2's 5B.

        Takes and returns what [`WanFamily.predict`] does, with `first_frame_latents` `(B, C, 1, H, W)` in `conditions`
        too. The noise of the first latent frame is not looked at, and its velocity has no meaning.
        """
        base = unwrap(transformer)
        frames, height, width = self.token_grid(transformer, noisy_latents.shape)
        first = conditions["first_frame_latents"].to(noisy_latents.dtype)
        is_noisy = timesteps.new_ones(frames, height * width)
        is_noisy[0] = 0
        return transformer(
            hidden_states=torch.cat([first, noisy_latents[:, :, 1:]], dim=2).to(base.dtype),
            timestep=timesteps[:, None] * is_noisy.flatten(),  # (B, tokens)
            encoder_hidden_states=conditions["prompt_embeds"].to(base.dtype),
            return_dict=False,
        )[0]

    @torch.no_grad()
    def encode_image(
        self, pipeline: DiffusionPipeline, images: list[PIL.Image.Image], num_frames: int
    ) -> dict[str, Tensor]:
        """
        `first_frame_latents` `(B, C, 1, H, W)`, float32, on the device of the VAE: the images as videos of one frame.

        Args:
            pipeline (`WanImageToVideoPipeline`): Pipeline with its VAE.
            images (`list[PIL.Image.Image]`): First frames, all of the size of the videos.
            num_frames (`int`): Not needed: an image's latents do not depend on what follows.
        """
        return encode_first_frames(self, pipeline, images)

    def condition_shapes(
        self, transformer: nn.Module, latents_shape: Sequence[int], prompt_tokens: int | None
    ) -> dict[str, tuple[int, ...]]:
        """As in text to video, and one latent frame."""
        channels, _, height, width = latents_shape[-4:]
        shapes = {"first_frame_latents": (channels, 1, height, width)}
        return WanFamily().condition_shapes(transformer, latents_shape, prompt_tokens) | shapes

    def check_latents(self, transformer: nn.Module, shape: Sequence[int]) -> None:
        """As in text to video, and there must be a frame behind the first one."""
        super().check_latents(transformer, shape)
        check_frames_behind_the_first(shape)


def wan_family(transformer: nn.Module, scheduler: SchedulerMixin | None, index: Mapping[str, Any]) -> WanFamily:
    """
    Family of a Wan transformer. Rectified flow has no constants that checkpoints differ in, so that a scheduler is
    not needed.

    Raises:
        ValueError: If the transformer takes other inputs than those of Wan's text or image to video.
    """
    config = unwrap(transformer).config
    extra = config.in_channels - (config.out_channels or config.in_channels)  # channels beside the noisy latents
    if not extra and config.image_dim is None:
        first_frame = index.get("_class_name") == "WanImageToVideoPipeline" and index.get("expand_timesteps")
        return WanFirstFrameFamily() if first_frame else WanFamily()
    # Beside them, the channels of a first frame, and of a mask one for each pixel frame of a latent frame.
    if extra != (config.out_channels or 0) + VAE_FRAME_CHUNK or config.pos_embed_seq_len is not None:
        raise ValueError(
            f"The transformer takes {config.in_channels} channels, returns {config.out_channels} and has "
            f"`image_dim={config.image_dim}` and `pos_embed_seq_len={config.pos_embed_seq_len}`: it is neither Wan's "
            "text-to-video nor its (first frame) image-to-video model. Use one of those."
        )
    if config.image_dim is None:
        return WanImageToVideoFamily(image_columns=("first_frame_latents",))
    return WanImageToVideoFamily()


def _latent_statistics(vae: AutoencoderKLWan, latents: Tensor) -> tuple[Tensor, Tensor]:
    # The inverse, and in this order of casts, because WanPipeline computes it so: decoding stays bit-equal to it.
    mean = torch.tensor(vae.config.latents_mean).view(1, -1, 1, 1, 1)
    inverse_std = 1.0 / torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1)
    return mean.to(latents.device, latents.dtype), inverse_std.to(latents.device, latents.dtype)
