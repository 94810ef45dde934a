"""The protocol of a model family: prediction, encoding, LoRA targets and sizes."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import PIL.Image
import torch
from accelerate.utils import extract_model_from_parallel
from diffusers import ContextParallelConfig, DiffusionPipeline, ModelMixin
from torch import Tensor, nn

from ..diffusion import NoiseProcess


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

    @property
    def noise_process(self) -> NoiseProcess:
        """How latents get noisy and which velocity is regressed."""

    @property
    def condition_columns(self) -> tuple[str, ...]:
        """What `predict` reads from its `conditions`, and rows therefore carry: `"prompt_embeds"`, and for
        image-to-video `"first_frame_latents"` and, where the transformer takes them, `"image_embeds"`."""

    @property
    def lora_target_modules(self) -> list[str]:
        """Query, key, value and output projections of every self-attention, as suffixes of module names."""

    @property
    def ffn_target_modules(self) -> list[str]:
        """Linear layers of the feed-forward network of every block, as suffixes of module names."""

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

    def encode_prompt(self, pipeline: DiffusionPipeline, prompts: list[str], max_sequence_length: int) -> list[Tensor]:
        """Embeddings `(L_i, D)` of prompts, without what `pad_prompt_embeds` can add again. No gradient."""

    def pad_prompt_embeds(self, embeds: list[Tensor], max_sequence_length: int) -> Tensor:
        """Embeddings `(B, max_sequence_length, D)`, padded as the pipeline pads them."""

    def prompt_length(self, transformer: nn.Module) -> int | None:
        """Number of tokens that the transformer needs prompts padded to; `None` where any number will do."""

    def encode_image(
        self, pipeline: DiffusionPipeline, images: list[PIL.Image.Image], num_frames: int
    ) -> dict[str, Tensor]:
        """
        Conditions `(B, ...)` of first frames, by the names in `condition_columns` (without `"prompt_embeds"`), for
        videos of `num_frames` frames and the size of the images. Empty for text-to-video. No gradient.
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
        return family.lora_target_modules
    if names == ["attention+ffn"]:
        return family.lora_target_modules + family.ffn_target_modules
    linear = {
        name for block in family.blocks(transformer) for name, layer in block.named_modules() if _is_linear(layer)
    }
    if names == ["all-linear"]:
        return sorted(linear)
    presets = [name for name in names if name in get_args(LoraPreset)]
    layers = [f".{name}" for name, layer in transformer.named_modules() if _is_linear(layer)]
    unknown = [name for name in names if not any(layer.endswith(f".{name}") for layer in layers)]
    if presets or unknown or not names:
        raise ValueError(
            f"`lora_target_modules` must be one of {', '.join(map(repr, get_args(LoraPreset)))}, or name linear "
            f"layers of {type(transformer).__name__}, got {choice!r}. Those of a block are {sorted(linear)}."
        )
    return names


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)


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


def unwrap(transformer: nn.Module) -> ModelMixin:
    """Transformer inside the wrappers of distributed training and `torch.compile`."""
    return extract_model_from_parallel(transformer, keep_torch_compile=False)


def module_device(module: nn.Module) -> torch.device:
    """Device of the weights of a module."""
    return next(module.parameters()).device
