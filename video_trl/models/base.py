"""The protocol of a model family: prediction, encoding, LoRA targets and sizes."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Protocol, get_args

import PIL.Image
import torch
from accelerate.utils import extract_model_from_parallel
from diffusers import ContextParallelConfig, DiffusionPipeline, ModelMixin
from torch import Tensor, nn
from typing_extensions import Self

from ..diffusion import NoiseProcess


FRAME_RATE = "frame_rate"
"""Condition `()`, float32, in frames per second, of families whose positions in time depend on it."""


@dataclass(frozen=True)
class GenerationRules:
    """
    What the pipelines of a family make, and how they want to be called.

    Args:
        fps (`float`): Frames per second at which their videos are meant to be seen.
        side_multiple (`int`): What height and width must be divisible by; other sizes are rounded or refused.
        one_video_a_call (`bool`, defaults to `False`): Whether a call with several prompts or images fails.
        guidance_scale (`float`, *optional*): What to ask for, where the default of the call is none of the model's.
        lost_frames (`int`, defaults to `0`): First frames that are made and thrown away, the given one among them.
    """

    fps: float
    side_multiple: int
    one_video_a_call: bool = False
    guidance_scale: float | None = None
    lost_frames: int = 0


@dataclass(frozen=True)
class Expert:
    """
    One of the transformers of a pipeline that has several, each for a part of the noise.

    Args:
        name (`str`): What the option `expert` calls it.
        component (`str`): Component of the pipeline.
        low, high (`float`): The timesteps that the pipeline gives it.
    """

    name: str
    component: str
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.name!r} (`{self.component}`, timesteps {self.low:g} to {self.high:g})"


class ModelFamily(Protocol):
    """
    Differences between model families, as a small frozen object without weights.

    Found by [`family_for`] from the class of the transformer. Methods that run a transformer take it as prepared for
    training too (inside `DistributedDataParallel`, compiled).
    """

    @property
    def name(self) -> str:
        """Short name of the family and its form, as in `"wan"` and `"wan-i2v"`."""

    @property
    def pipeline_classes(self) -> tuple[str, ...]:
        """Names of the diffusers pipelines whose transformer this family has."""

    @staticmethod
    def experts(index: Mapping[str, Any]) -> tuple[Expert, ...]:
        """Transformers of a pipeline, from its `model_index.json`, if it has several; highest noise first."""

    @staticmethod
    def generation_rules(index: Mapping[str, Any], transformer_config: Mapping[str, Any]) -> GenerationRules:
        """Rules of a pipeline, from its `model_index.json` and the `config.json` of its transformer."""

    @property
    def noise_process(self) -> NoiseProcess:
        """How latents get noisy and which velocity is regressed."""

    @property
    def prompt_columns(self) -> tuple[str, ...]:
        """What rows carry of a prompt: `"prompt_embeds"` first, then those of further text encoders."""

    @property
    def image_columns(self) -> tuple[str, ...]:
        """What rows carry of a first frame: `"first_frame_latents"`, `"image_embeds"`, ...; none for text-to-video."""

    @property
    def condition_columns(self) -> tuple[str, ...]:
        """What `predict` reads from its `conditions`: the columns above, masks that `pad_prompts` makes, and
        `"frame_rate"` `()`, in frames per second, where positions in time depend on it."""

    @property
    def row_columns(self) -> tuple[str, ...]:
        """Those of them that rows carry: all but the masks."""

    @property
    def given_frames(self) -> int:
        """Number of latent frames, from the first, that `predict` replaces by conditions: left out of the loss."""

    @property
    def frames_per_latent(self) -> int:
        """Frames that make one of a latent in the published checkpoints, for where there is no VAE to ask."""

    @property
    def text_encoders(self) -> dict[str, str]:
        """Components of the pipeline that encode prompts, each with the component that is its tokenizer."""

    @property
    def image_encoders(self) -> dict[str, str]:
        """Components, besides the VAE, that encode first frames, each with the component that prepares its input."""

    @property
    def prompt_image_processor(self) -> str | None:
        """Component that prepares first frames for the first text encoder, where that sees them beside the prompt."""

    @property
    def guidance(self) -> float | None:
        """Guidance scale that a transformer is told which was distilled to guide itself; `None` for the others."""

    def with_guidance(self, guidance: float) -> "ModelFamily":
        """The same family with another `guidance`."""

    @property
    def published_prompt_tokens(self) -> int:
        """Tokens to which the pipeline's call pads prompts if it is told no other number."""

    def compression(self, vae: ModelMixin) -> tuple[int, int]:
        """Frames and pixels of a side that make one of a latent, apart from the first frame, which is one alone."""

    def flow_shift(self, scheduler_config: Mapping[str, Any], num_tokens: int) -> float | None:
        """Flow shift at which the pipeline samples videos of so many tokens; `None` if the scheduler has none."""

    @property
    def lora_target_modules(self) -> list[str]:
        """Query, key, value and output projections of every self-attention, as suffixes of module names."""

    @property
    def ffn_target_modules(self) -> list[str]:
        """Linear layers of the feed-forward network of every block, as suffixes of module names."""

    def idle_weights(self, transformer: nn.Module) -> frozenset[str]:
        """Names of weights that take no part in `predict`, and so are neither trained nor adapted."""

    @property
    def context_parallel_methods(self) -> tuple[str, ...]:
        """How `share_tokens` can share tokens: `"ulysses"`, `"ring"`."""

    def predict(
        self, transformer: nn.Module, noisy_latents: Tensor, timesteps: Tensor, conditions: dict[str, Tensor]
    ) -> Tensor:
        """Velocity `(B, C, F, H, W)`, in the dtype of the transformer, of noisy latents at timesteps `(B,)`."""

    def encode_video(self, vae: ModelMixin, video: Tensor) -> Tensor:
        """Normalised latents `(B, C, F, H, W)`, float32, of videos `(B, 3, T, H, W)` in [-1, 1]. No gradient."""

    def decode_latents(self, vae: ModelMixin, latents: Tensor) -> Tensor:
        """Videos `(B, 3, T, H, W)` in [-1, 1], float32, of normalised latents. No gradient."""

    def encode_prompt(
        self, pipeline: DiffusionPipeline, prompts: list[str], max_sequence_length: int
    ) -> list[dict[str, Tensor]]:
        """The `prompt_columns` of each prompt, without what `pad_prompts` can add again. No gradient."""

    def encode_prompt_with_image(
        self,
        pipeline: DiffusionPipeline,
        prompts: list[str],
        images: list[PIL.Image.Image],
        max_sequence_length: int,
    ) -> list[dict[str, Tensor]]:
        """The same of prompts and their first frames; those are of no use without a `prompt_image_processor`."""

    def pad_prompts(self, prompts: list[dict[str, Tensor]], max_sequence_length: int) -> dict[str, Tensor]:
        """Conditions `(B, ...)` of prompts, padded as the pipeline pads them, with the masks that it makes."""

    def prompt_length(self, transformer: nn.Module) -> int | None:
        """Number of tokens that the transformer needs prompts padded to; `None` where any number will do."""

    def encode_image(
        self, pipeline: DiffusionPipeline, images: list[PIL.Image.Image], num_frames: int
    ) -> dict[str, Tensor]:
        """
        The `image_columns` `(B, ...)` of first frames, for videos of `num_frames` frames and the size of the images.
        Empty for text-to-video. No gradient.
        """

    def condition_shapes(
        self, transformer: nn.Module, latents_shape: Sequence[int], prompt_tokens: int | None
    ) -> dict[str, tuple[int, ...]]:
        """
        Shapes, without the batch, of all `condition_columns` for latents `(C, F, H, W)`; prompts have that many
        tokens, or what `prompt_length` asks for, or those of the published checkpoints.
        """

    def blocks(self, transformer: nn.Module) -> nn.ModuleList:
        """Transformer blocks, in order."""

    def token_grid(self, transformer: nn.Module, latents_shape: Sequence[int]) -> tuple[int, int, int]:
        """Tokens `(F', H', W')` into which latents of shape `(..., C, F, H, W)` are cut; `N = F' * H' * W'`."""

    def share_tokens(self, transformer: ModelMixin, config: ContextParallelConfig) -> None:
        """Let the processes of `config` share the tokens of videos, from now on, in every forward of a transformer."""

    def check_latents(self, transformer: nn.Module, shape: Sequence[int]) -> None:
        """Raise a `ValueError` unless the transformer takes latents of shape `(..., C, F, H, W)`."""

    def check_video(self, vae: ModelMixin, shape: Sequence[int]) -> None:
        """Raise a `ValueError` unless the VAE encodes every frame and pixel of videos of shape `(T, H, W)`."""


@dataclass(frozen=True)
class FamilyDefaults:
    """What holds for most families: one text encoder, text to video, weights of the self-attention called `attn1`."""

    prompt_columns: tuple[str, ...] = ("prompt_embeds",)
    image_columns: tuple[str, ...] = ()
    context_parallel_methods: tuple[str, ...] = ()
    given_frames: int = 0
    frames_per_latent: int = 4
    published_prompt_tokens: int = 512
    prompt_image_processor: str | None = None
    guidance: float | None = None
    depth_options: ClassVar[tuple[str, ...]] = ("num_layers",)
    """Options of the transformer's configuration that are its numbers of blocks."""

    @staticmethod
    def experts(index: Mapping[str, Any]) -> tuple[Expert, ...]:
        """None: the pipeline has one transformer."""
        return ()

    @property
    def condition_columns(self) -> tuple[str, ...]:
        return (*self.prompt_columns, *self.image_columns)

    @property
    def row_columns(self) -> tuple[str, ...]:
        rate = (FRAME_RATE,) if FRAME_RATE in self.condition_columns else ()
        return (*self.prompt_columns, *self.image_columns, *rate)

    def with_guidance(self, guidance: float) -> Self:
        return replace(self, guidance=guidance)

    @property
    def text_encoders(self) -> dict[str, str]:
        return {"text_encoder": "tokenizer"}

    @property
    def image_encoders(self) -> dict[str, str]:
        return {}

    @property
    def lora_target_modules(self) -> list[str]:
        """Projections of the self-attention `attn1`; a cross-attention `attn2` is left alone."""
        return ["attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0"]

    @property
    def ffn_target_modules(self) -> list[str]:
        """Both layers of the feed-forward network `ff`."""
        return ["ff.net.0.proj", "ff.net.2"]

    def idle_weights(self, transformer: nn.Module) -> frozenset[str]:
        """None."""
        return frozenset()

    def flow_shift(self, scheduler_config: Mapping[str, Any], num_tokens: int) -> float | None:
        """As configured; where the scheduler shifts by the number of tokens, the shift for that number."""
        config = scheduler_config
        if not config.get("use_dynamic_shifting"):
            shift = config.get("flow_shift", config.get("shift"))  # the names that schedulers have for it
            return None if shift is None else float(shift)
        few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
        mu = low + (high - low) * (num_tokens - few) / (many - few)
        return math.exp(mu) if config.get("time_shift_type", "exponential") == "exponential" else mu

    def prompt_length(self, transformer: nn.Module) -> int | None:
        """Any: training must pad to the length that the pipeline's call is given."""
        return None

    def encode_prompt(
        self, pipeline: DiffusionPipeline, prompts: list[str], max_sequence_length: int
    ) -> list[dict[str, Tensor]]:
        raise NotImplementedError

    def encode_prompt_with_image(
        self,
        pipeline: DiffusionPipeline,
        prompts: list[str],
        images: list[PIL.Image.Image],
        max_sequence_length: int,
    ) -> list[dict[str, Tensor]]:
        """Those of the prompts alone."""
        return self.encode_prompt(pipeline, prompts, max_sequence_length)

    def encode_image(
        self, pipeline: DiffusionPipeline, images: list[PIL.Image.Image], num_frames: int
    ) -> dict[str, Tensor]:
        """Nothing: text-to-video has no first frame."""
        return {}

    def compression(self, vae: ModelMixin) -> tuple[int, int]:
        """What the VAE says of itself."""
        return vae.temporal_compression_ratio, vae.spatial_compression_ratio

    def check_video(self, vae: ModelMixin, shape: Sequence[int]) -> None:
        """Raise a `ValueError` unless `(T, H, W)` are a first frame and whole latent frames, with whole sides."""
        frames, side = self.compression(vae)
        check_video_size(shape, frame_chunk=frames, side=side)

    def share_tokens(self, transformer: ModelMixin, config: ContextParallelConfig) -> None:
        raise AssertionError("refused before: there is no method in `context_parallel_methods`")


def encode_mode(vae: ModelMixin, pixels: Tensor) -> Tensor:
    """Mode of the posterior `(B, C, F, H', W')`, float32, of videos `(B, 3, T, H, W)`, as the VAE has it."""
    return vae.encode(pixels.to(module_device(vae), vae.dtype)).latent_dist.mode().float()


def encode_first_frames(
    family: ModelFamily, pipeline: DiffusionPipeline, images: list[PIL.Image.Image]
) -> dict[str, Tensor]:
    """`first_frame_latents` `(B, C, 1, H, W)` of images, encoded as videos of one frame of the family are."""
    pixels = pipeline.video_processor.preprocess(images)[:, :, None]
    return {"first_frame_latents": family.encode_video(pipeline.vae, pixels)}


def check_video_size(shape: Sequence[int], *, frame_chunk: int, side: int) -> None:
    """Raise a `ValueError` unless `(T, H, W)` are `k * frame_chunk + 1` frames and sides divisible by `side`."""
    frames, height, width = shape
    if frames % frame_chunk != 1:
        below = max(frames - 1, 0) // frame_chunk * frame_chunk + 1
        raise ValueError(
            f"Videos must have {frame_chunk} * k + 1 frames for this VAE, got {frames}. "
            f"Set `num_frames` to {below} or {below + frame_chunk}."
        )
    if height % side or width % side or not height or not width:
        raise ValueError(
            f"Height and width must be divisible by {side} for this VAE, got {height}x{width}. "
            f"Set `height` to {max(height // side, 1) * side} and `width` to {max(width // side, 1) * side}."
        )


def check_pixels(video: Tensor) -> None:
    """Raise a `ValueError` unless a batch of videos has shape `(B, 3, T, H, W)`."""
    if video.ndim != 5 or video.shape[1] != 3:
        raise ValueError(f"`video` must have shape (B, 3, T, H, W), got {tuple(video.shape)}.")


def check_channels(shape: Sequence[int], channels: int) -> None:
    """Raise a `ValueError` unless latents have shape `(C, F, H, W)` or `(B, C, F, H, W)`, with so many channels."""
    shape = tuple(shape)
    if len(shape) not in (4, 5):
        raise ValueError(f"Latents must have shape (C, F, H, W) or (B, C, F, H, W), got {shape}.")
    if shape[-4] != channels:
        raise ValueError(
            f"Latents must have {channels} channels for this transformer, got {shape[-4]} in {shape}. "
            "Encode the videos with the VAE of the same pipeline."
        )


def check_frames_behind_the_first(shape: Sequence[int]) -> None:
    """Raise a `ValueError` if latents `(..., C, F, H, W)` are one frame, where the first one is given."""
    if shape[-3] < 2:
        raise ValueError(
            f"Latents must have at least two frames, got {tuple(shape)}: the first one is given, and nothing would be "
            "left to learn. Raise `num_frames`."
        )


def check_patches(shape: Sequence[int], patch: Sequence[int]) -> None:
    """Raise a `ValueError` unless frames, height and width of latents are divisible by a transformer's patch."""
    sizes = tuple(shape[-3:])
    if any(size % step or not size for size, step in zip(sizes, patch, strict=True)):
        raise ValueError(
            f"Latent frames, height and width must be divisible by the patch {tuple(patch)} of the transformer, got "
            f"{sizes}. Change `num_frames`, `height` or `width` of the videos."
        )


def pad_with_zeros(embeds: list[Tensor], max_sequence_length: int) -> Tensor:
    """
    Embeddings `(L_i, D)` as one batch `(B, max_sequence_length, D)`, with zeros behind each prompt.

    Raises:
        ValueError: If there is no embedding, or one is no `(L_i, D)` tensor or longer than `max_sequence_length`.
    """
    if not embeds:
        raise ValueError("`prompts` must hold at least one embedding, got an empty list.")
    for row, embed in enumerate(embeds):
        if embed.ndim != 2 or len(embed) > max_sequence_length:
            raise ValueError(
                f"Embedding {row} must have shape (L, D) with L <= `max_sequence_length={max_sequence_length}`, "
                f"got {tuple(embed.shape)}. Raise `max_sequence_length`, or encode the prompts again with it."
            )
    padded = embeds[0].new_zeros(len(embeds), max_sequence_length, embeds[0].shape[1])
    for row, embed in enumerate(embeds):
        padded[row, : len(embed)] = embed
    return padded


LoraPreset = Literal["attention", "attention+ffn", "all-linear"]


def lora_targets(family: ModelFamily, transformer: nn.Module, choice: str | Sequence[str] | None) -> list[str]:
    """
    Layers that an adapter changes, as suffixes of module names.

    Args:
        family ([`ModelFamily`]):
            Family of the transformer.
        transformer (`torch.nn.Module`):
            Transformer, not wrapped; its weights are not read.
        choice (`str` or list of `str`, *optional*):
            `"attention"` or `None`: query, key, value and output projections of every self-attention (LoRA-SR).
            `"attention+ffn"`: these and the feed-forward networks. `"all-linear"`: every linear layer of the blocks,
            cross-attention too, but none of the embeddings and of the output layer. Or names of layers.

    Returns:
        `list[str]`: Suffixes of module names.

    Raises:
        ValueError: If a name matches no layer, or a preset stands beside other names.
    """
    names = [choice or "attention"] if choice is None or isinstance(choice, str) else list(choice)
    if names == ["attention"]:
        return _in_blocks(family, transformer, family.lora_target_modules)
    if names == ["attention+ffn"]:
        return _in_blocks(family, transformer, family.lora_target_modules + family.ffn_target_modules)
    linear = {
        name for block in family.blocks(transformer) for name, layer in block.named_modules() if _is_linear(layer)
    }
    if names == ["all-linear"]:
        return _in_blocks(family, transformer, sorted(linear))
    presets = [name for name in names if name in get_args(LoraPreset)]
    layers = [f".{name}" for name, layer in transformer.named_modules() if _is_linear(layer)]
    unknown = [name for name in names if not any(layer.endswith(f".{name}") for layer in layers)]
    if presets or unknown or not names:
        raise ValueError(
            f"`lora_target_modules` must be one of {', '.join(map(repr, get_args(LoraPreset)))}, or name linear "
            f"layers of {type(transformer).__name__}, got {choice!r}. Those of a block are {sorted(linear)}."
        )
    return names


def _in_blocks(family: ModelFamily, transformer: nn.Module, suffixes: list[str]) -> list[str]:
    """The suffixes; the whole names of layers where others, outside of the blocks or idle, would match them too."""
    modules = set(family.blocks(transformer))
    blocks = [f"{name}." for name, module in transformer.named_modules() if module in modules]
    names = [name for name, module in transformer.named_modules() if _is_linear(module)]
    matching = [name for name in names if any(name.endswith(f".{suffix}") for suffix in suffixes)]
    idle = {weight.rpartition(".")[0] for weight in family.idle_weights(transformer)}
    inside = [name for name in matching if name.startswith(tuple(blocks)) and name not in idle]
    return suffixes if inside == matching else inside


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)


def prompt_mask(embeds: list[Tensor], padded: Tensor) -> Tensor:
    """Bool `(B, L)`, true where embeddings `(L_i, D)` stand in the batch `(B, L, D)` that they were padded to."""
    lengths = torch.tensor([len(embed) for embed in embeds], device=padded.device)
    return torch.arange(padded.shape[1], device=padded.device) < lengths[:, None]


@dataclass
class BlockTap:
    """Output of one transformer block."""

    tokens: Tensor | None = None
    """Hidden states `(B, N, D)` of the last forward, part of its graph; `None` before the first one."""


@contextmanager
def tap_block(family: ModelFamily, transformer: nn.Module, index: int) -> Iterator[BlockTap]:
    """
    Read the hidden states behind a transformer block while the transformer runs as usual.

    ```python
    with tap_block(family, transformer, 17) as tap:
        prediction = family.predict(transformer, noisy_latents, timesteps, conditions)
    hidden_states = tap.tokens  # (B, N, D)
    ```

    Leave the context before the backward pass: activation checkpointing runs blocks a second time there, and would
    replace the tokens by those of the second pass. Checkpointing must be non-reentrant (the default of diffusers), or
    the tokens carry no gradient.

    Args:
        family ([`ModelFamily`]):
            Adapter of the transformer.
        transformer (`torch.nn.Module`):
            Transformer, wrapped for distributed training or not.
        index (`int`):
            Block, counted from 0.

    Yields:
        [`BlockTap`]: Its `tokens` hold `(B, N, D)` hidden states after a forward; `N` is the product of `token_grid`.

    Raises:
        ValueError: If there is no block `index`.
    """
    blocks = family.blocks(transformer)
    if not 0 <= index < len(blocks):
        raise ValueError(f"`index` must be in [0, {len(blocks) - 1}] for {len(blocks)} blocks, got {index}.")
    tap = BlockTap()

    def store(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        # Overwrites: a hook fires again when a checkpointed block runs a second time; appending would count twice.
        tap.tokens = output[0] if isinstance(output, tuple) else output

    handle = blocks[index].register_forward_hook(store)
    try:
        yield tap
    finally:
        handle.remove()


def unwrap(module: nn.Module) -> ModelMixin:
    """Transformer inside the wrappers of distributed training and `torch.compile`."""
    if isinstance(module, ModelMixin):  # accelerate would look through its modules, in every pass
        return module
    transformer: ModelMixin = extract_model_from_parallel(module, keep_torch_compile=False)
    return transformer


def weights_dtype(transformer: nn.Module) -> torch.dtype:
    """
    What the property `dtype` of a diffusers transformer says, by its first weight that is not kept in float32.

    The property looks through all modules for hooks that change dtypes, in every pass; the trainers use none.
    """
    base = unwrap(transformer)
    kept = base._keep_in_fp32_modules or ()
    return next(
        weight.dtype
        for name, weight in base.named_parameters()
        if weight.is_floating_point() and not any(part in name for part in kept)
    )


def module_device(module: nn.Module) -> torch.device:
    """Device of the weights of a module."""
    return next(module.parameters()).device
