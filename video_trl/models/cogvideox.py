"""CogVideoX 1.0 (2B, 5B and 5B-I2V) and 1.5, text to video and image to video."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import PIL.Image
import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXTransformer3DModel,
    ContextParallelConfig,
    DiffusionPipeline,
    ModelMixin,
    SchedulerMixin,
)
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid
from torch import Tensor, nn

from ..diffusion import NoiseProcess, VPrediction
from .attention.ulysses import share_tokens_of_cogvideox
from .base import (
    FamilyDefaults,
    GenerationRules,
    check_channels,
    check_pixels,
    check_video_size,
    encode_mode,
    module_device,
    unwrap,
)


# `AutoencoderKLCogVideoX` decodes two latent frames at a time and gives a first frame of its own only to an odd number
# of them: 4 latent frames, which 13 frames are encoded to, come back as 16 frames.
VAE_FRAME_CHUNK = 8


@dataclass(frozen=True, kw_only=True)
class CogVideoXFamily(FamilyDefaults):
    """
    [`ModelFamily`] of `CogVideoXTransformer3DModel` in its text-to-video form.

    The transformer's layout is `(B, F, C, H, W)`; here as everywhere in this package it is `(B, C, F, H, W)`. Nothing
    in CogVideoX masks the padding of a prompt, neither the text encoder nor the transformer: an embedding is of one
    length, padding included, and only that length will do.

    Args:
        noise_process ([`NoiseProcess`]): The checkpoint's; the schedules of 2B and 5B differ, so there is no default.
    """

    noise_process: NoiseProcess
    name: str = "cogvideox"
    pipeline_classes: tuple[str, ...] = ("CogVideoXPipeline",)
    context_parallel_methods: tuple[str, ...] = ("ulysses",)

    @staticmethod
    def generation_rules(index: Mapping[str, Any], transformer_config: Mapping[str, Any]) -> GenerationRules:
        """8 fps, of CogVideoX 1.5 (which joins latent frames in pairs) 16; sides of 8 (VAE) times 2 (patch)."""
        return GenerationRules(8.0 if transformer_config.get("patch_size_t") is None else 16.0, 16)

    def predict(
        self, transformer: nn.Module, noisy_latents: Tensor, timesteps: Tensor, conditions: dict[str, Tensor]
    ) -> Tensor:
        """
        Velocity predicted by one transformer call, the one that `CogVideoXPipeline` makes in a denoising step.

        Args:
            transformer (`torch.nn.Module`):
                `CogVideoXTransformer3DModel`, possibly inside `DistributedDataParallel`.
            noisy_latents (`torch.Tensor` of shape `(B, C, F, H, W)`):
                Noisy latents, any floating dtype; cast to the dtype of the transformer.
            timesteps (`torch.Tensor` of shape `(B,)`):
                Integers in [0, 1000).
            conditions (`dict[str, torch.Tensor]`):
                `prompt_embeds` of shape `(B, L, D)`.

        Returns:
            `torch.Tensor` of shape `(B, C, F, H, W)`: Velocity, in the dtype of the transformer.
        """
        return _call(transformer, noisy_latents, timesteps, conditions["prompt_embeds"])

    @torch.no_grad()
    def encode_video(self, vae: AutoencoderKLCogVideoX, video: Tensor) -> Tensor:
        """
        Scaled latents of videos: the mode of the posterior, so that encoding is deterministic.

        Args:
            vae (`AutoencoderKLCogVideoX`):
                VAE of the pipeline, any dtype and device. Its `scaling_factor` is that of its checkpoint.
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
    def decode_latents(self, vae: AutoencoderKLCogVideoX, latents: Tensor) -> Tensor:
        """
        Videos of scaled latents, as `CogVideoXPipeline` decodes them.

        Args:
            vae (`AutoencoderKLCogVideoX`):
                VAE of the pipeline, any dtype and device.
            latents (`torch.Tensor` of shape `(B, C, F, H', W')`):
                Scaled latents.

        Returns:
            `torch.Tensor` of shape `(B, 3, T, H, W)`: Pixels, about [-1, 1], float32.
        """
        latents = latents.to(module_device(vae), vae.dtype)
        return vae.decode(1 / vae.config.scaling_factor * latents).sample.float()

    @torch.no_grad()
    def encode_prompt(
        self,
        pipeline: DiffusionPipeline,
        prompts: list[str],
        max_sequence_length: int,
    ) -> list[dict[str, Tensor]]:
        """
        Embeddings of prompts, padding included, as the pipeline computes them.

        Args:
            pipeline (`CogVideoXPipeline` or `CogVideoXImageToVideoPipeline`):
                Pipeline with its tokenizer and text encoder.
            prompts (`list[str]`):
                Prompts.
            max_sequence_length (`int`):
                Prompts are cut and padded to this number of tokens.

        Returns:
            `list[dict[str, torch.Tensor]]`: For each prompt `prompt_embeds` `(max_sequence_length, D)`, in the dtype
            and on the device of the text encoder.
        """
        embeds, _ = pipeline.encode_prompt(
            prompts,
            do_classifier_free_guidance=False,
            max_sequence_length=max_sequence_length,
            device=module_device(pipeline.text_encoder),
        )
        return [{"prompt_embeds": embed} for embed in embeds.clone()]

    def pad_prompts(self, prompts: list[dict[str, Tensor]], max_sequence_length: int) -> dict[str, Tensor]:
        """
        `prompt_embeds` `(B, max_sequence_length, D)`; they have that length already.

        Raises:
            ValueError: If there is no prompt, or one has another shape: nothing could be put behind it.
        """
        embeds = [prompt["prompt_embeds"] for prompt in prompts]
        if not embeds:
            raise ValueError("`prompts` must hold at least one embedding, got an empty list.")
        for row, embed in enumerate(embeds):
            if embed.ndim != 2 or len(embed) != max_sequence_length:
                raise ValueError(
                    f"Embedding {row} must have shape (L, D) with L = `max_sequence_length={max_sequence_length}`, "
                    f"got {tuple(embed.shape)}: CogVideoX attends to the padding too. Encode the prompts again."
                )
        return {"prompt_embeds": torch.stack(embeds)}

    def condition_shapes(
        self, transformer: nn.Module, latents_shape: Sequence[int], prompt_tokens: int | None
    ) -> dict[str, tuple[int, ...]]:
        """Prompts of `prompt_length` tokens; of a first frame, one latent frame."""
        channels, _, height, width = latents_shape[-4:]
        shapes = {
            "prompt_embeds": (self.prompt_length(transformer), unwrap(transformer).config.text_embed_dim),
            "first_frame_latents": (channels, 1, height, width),
        }
        return {name: shapes[name] for name in self.condition_columns}

    def prompt_length(self, transformer: nn.Module) -> int:
        """`max_text_seq_length` of the transformer, 226 in all checkpoints."""
        return unwrap(transformer).config.max_text_seq_length

    def blocks(self, transformer: nn.Module) -> nn.ModuleList:
        """Transformer blocks, in order; each returns hidden states `(B, N, D)` of the video and those of the text."""
        return unwrap(transformer).transformer_blocks

    def token_grid(self, transformer: nn.Module, latents_shape: Sequence[int]) -> tuple[int, int, int]:
        """Tokens `(F', H', W')` of latents of shape `(C, F, H, W)` or `(B, C, F, H, W)`."""
        self.check_latents(transformer, latents_shape)
        frames, height, width = latents_shape[-3:]
        config = unwrap(transformer).config
        return -(-frames // (config.patch_size_t or 1)), height // config.patch_size, width // config.patch_size

    def share_tokens(self, transformer: ModelMixin, config: ContextParallelConfig) -> None:
        """Let the processes of `config` share the tokens of videos in every forward; see `context_parallel_size`."""
        share_tokens_of_cogvideox(transformer, config)

    def check_latents(self, transformer: nn.Module, shape: Sequence[int]) -> None:
        """
        Raise a `ValueError` unless the transformer takes latents of shape `(C, F, H, W)` or `(B, C, F, H, W)`.

        The channel count must be the transformer's, the number of frames odd and the sides divisible by the patch.
        Learned positions (5B image-to-video) exist for one size only.
        """
        shape, config = tuple(shape), unwrap(transformer).config
        check_channels(shape, config.out_channels)
        frames, height, width = shape[-3:]
        patch = config.patch_size
        if frames % 2 == 0 or any(side % patch or not side for side in (height, width)):
            raise ValueError(
                f"Latents must have an odd number of frames, and height and width divisible by {patch} (the patch of "
                f"the transformer), got {shape[-3:]}. Change `num_frames`, `height` or `width` of the videos."
            )
        if config.patch_size_t is not None and (height > config.sample_height or width > config.sample_width):
            raise ValueError(
                f"Latents must be no larger than {config.sample_height}x{config.sample_width} (height x width), the "
                f"largest for which this transformer has positions, got {height}x{width}. Use smaller videos."
            )
        learned_for = (
            (config.sample_frames - 1) // config.temporal_compression_ratio + 1,
            config.sample_height,
            config.sample_width,
        )
        if config.use_learned_positional_embeddings and shape[-3:] != learned_for:
            # For another number of frames the transformer would silently take positions that were not learned.
            raise ValueError(
                f"This transformer has learned positions for latents of (frames, height, width) {learned_for} only, "
                f"got {shape[-3:]}. Set `num_frames={config.sample_frames}`, and `height` and `width` accordingly."
            )

    def check_video(self, vae: AutoencoderKLCogVideoX, shape: Sequence[int]) -> None:
        """
        Raise a `ValueError` unless the VAE encodes every frame and pixel of videos of shape `(T, H, W)`.

        `T` must be `8k + 1`, as the decoder has it, and the sides divisible by the VAE's spatial factor.
        """
        check_video_size(shape, frame_chunk=VAE_FRAME_CHUNK, side=self.compression(vae)[1])

    def compression(self, vae: AutoencoderKLCogVideoX) -> tuple[int, int]:
        """4 frames and 8 pixels."""
        return int(vae.config.temporal_compression_ratio), 2 ** (len(vae.config.block_out_channels) - 1)


@dataclass(frozen=True, kw_only=True)
class CogVideoXImageToVideoFamily(CogVideoXFamily):
    """
    [`ModelFamily`] of `CogVideoXTransformer3DModel` in its image-to-video form.

    Rows carry `first_frame_latents` `(C, 1, H, W)`; the frames behind it are zeros and made in `predict`.
    """

    name: str = "cogvideox-i2v"
    pipeline_classes: tuple[str, ...] = ("CogVideoXImageToVideoPipeline",)
    image_columns: tuple[str, ...] = ("first_frame_latents",)

    def predict(
        self, transformer: nn.Module, noisy_latents: Tensor, timesteps: Tensor, conditions: dict[str, Tensor]
    ) -> Tensor:
        """
        Velocity predicted by one transformer call, the one that `CogVideoXImageToVideoPipeline` makes.

        Takes and returns what [`CogVideoXFamily.predict`] does, with `first_frame_latents` `(B, C, 1, H, W)` in
        `conditions` too.
        """
        first = conditions["first_frame_latents"]
        return _call(transformer, noisy_latents, timesteps, conditions["prompt_embeds"], first)

    @torch.no_grad()
    def encode_image(
        self, pipeline: DiffusionPipeline, images: list[PIL.Image.Image], num_frames: int
    ) -> dict[str, Tensor]:
        """
        Latents of first frames: the mode of the posterior, of which the pipeline takes a sample.

        Args:
            pipeline (`CogVideoXImageToVideoPipeline`): Pipeline with its VAE.
            images (`list[PIL.Image.Image]`): First frames, all of the size of the videos.
            num_frames (`int`): Not needed: an image's latents do not depend on what follows.

        Returns:
            `dict[str, torch.Tensor]`: `first_frame_latents` `(B, C, 1, H, W)`, float32, on the device of the VAE.
        """
        vae = pipeline.vae
        pixels = pipeline.video_processor.preprocess(images)[:, :, None]  # (B, 3, 1, H, W)
        mode = encode_mode(vae, pixels)
        factor = vae.config.scaling_factor
        # Some checkpoints divide image latents by what they multiply video latents by.
        return {"first_frame_latents": 1 / factor * mode if vae.config.invert_scale_latents else factor * mode}


def cogvideox_family(
    transformer: CogVideoXTransformer3DModel, scheduler: SchedulerMixin | None, index: Mapping[str, Any]
) -> CogVideoXFamily:
    """
    Adapter of a CogVideoX transformer, with the noise schedule of its scheduler.

    Raises:
        ValueError: If there is no scheduler, or one of another kind; or if the transformer takes other inputs than
            those of CogVideoX's text or image to video.
    """
    if scheduler is None:
        raise ValueError(
            "CogVideoX checkpoints differ in their noise schedule (`snr_shift_scale`: 3.0 in 2B, 1.0 in 5B), which "
            "stands in the scheduler and not in the transformer. Pass the pipeline instead of the bare transformer; "
            "for encoded data, `CogVideoXPipeline.from_pretrained(..., text_encoder=None, vae=None)` is enough."
        )
    config, noise_process = transformer.config, VPrediction.from_config(scheduler.config)
    name = "cogvideox" if config.patch_size_t is None else "cogvideox1.5"
    if config.in_channels == config.out_channels:
        return CogVideoXFamily(noise_process=noise_process, name=name)
    if config.in_channels == 2 * config.out_channels:
        return CogVideoXImageToVideoFamily(noise_process=noise_process, name=f"{name}-i2v")
    raise ValueError(
        f"The transformer takes {config.in_channels} channels and returns {config.out_channels}: it is neither "
        "CogVideoX's text-to-video nor its image-to-video model. Use one of those."
    )


def _call(
    transformer: nn.Module, latents: Tensor, timesteps: Tensor, prompt_embeds: Tensor, first: Tensor | None = None
) -> Tensor:
    """The transformer's output `(B, C, F, H, W)` for inputs in the same layout, as its pipelines call it."""
    base = unwrap(transformer)
    config = base.config
    # CogVideoX 1.5 joins latent frames in pairs. What its pipeline puts before an odd number of them, and throws away
    # in the end, is a copy of the first one here: nothing that the others do not show.
    padding = -latents.shape[2] % (config.patch_size_t or 1)
    inputs = torch.cat([latents[:, :, :padding], latents], dim=2)
    if first is not None:
        image = torch.zeros_like(inputs)
        image[:, :, :1] = first.to(inputs.dtype)
        inputs = torch.cat([inputs, image], dim=1)
    inputs = inputs.to(base.dtype).transpose(1, 2)  # (B, F, C, H, W)
    frames, _, height, width = inputs.shape[1:]
    # A constant that the image-to-video checkpoints of 1.5 were trained with.
    extra = {} if config.ofs_embed_dim is None else {"ofs": inputs.new_full((1,), 2.0)}
    velocity = transformer(
        hidden_states=inputs,
        encoder_hidden_states=prompt_embeds.to(base.dtype),
        timestep=timesteps,
        image_rotary_emb=_rotary_embeddings(base, frames, height, width, inputs.device),
        return_dict=False,
        **extra,
    )[0]
    return velocity.transpose(1, 2)[:, :, padding:]


def _rotary_embeddings(
    base: ModelMixin, frames: int, height: int, width: int, device: torch.device
) -> tuple[Tensor, Tensor] | None:
    """Cosines and sines, each `(N, head dimension)`, of the positions of latents; `None` for transformers without."""
    config = base.config
    if not config.use_rotary_positional_embeddings:
        return None
    patch = config.patch_size
    base_grid = (config.sample_height // patch, config.sample_width // patch)
    grid = (height // patch, width // patch)
    if config.patch_size_t is not None:  # CogVideoX 1.5: a part of the largest grid
        return get_3d_rotary_pos_embed(
            embed_dim=config.attention_head_dim,
            crops_coords=None,
            grid_size=grid,
            temporal_size=frames // config.patch_size_t,
            grid_type="slice",
            max_size=base_grid,
            device=device,
        )
    # The positions of another size are scaled to those of the size that the transformer was trained for.
    region = get_resize_crop_region_for_grid(grid, base_grid[1], base_grid[0])
    return get_3d_rotary_pos_embed(
        embed_dim=config.attention_head_dim, crops_coords=region, grid_size=grid, temporal_size=frames, device=device
    )
