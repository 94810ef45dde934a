"""VideoMAE and VideoMAEv2 as teachers: tubelets of two frames, full attention, fixed sinusoid positions."""

import os
import re
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import VideoMAEConfig, VideoMAEModel

from ..files import fingerprint
from .base import ModelTeacher


Grid = tuple[int, int, int]

# The weights do not tell the number of heads: width -> heads of ViT-Ti, S, B, L, H and g.
HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16, 1408: 16}
# What published checkpoints wrap around the encoder's keys, in any order and number.
_PREFIXES = re.compile(r"^(?:(?:module|model|encoder|backbone)\.)+")
# Parts of a checkpoint that come after the residual stream (or are no part of the encoder).
_DROPPED = re.compile(r"^(?:head|fc_norm|norm|decoder|encoder_to_decoder|mask_token|pos_embed)(?:\.|$)")
_RENAMED = (
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
    (r"^blocks\.(\d+)\.norm1\.", r"encoder.layer.\1.layernorm_before."),
    (r"^blocks\.(\d+)\.norm2\.", r"encoder.layer.\1.layernorm_after."),
    (r"^blocks\.(\d+)\.attn\.q_bias$", r"encoder.layer.\1.attention.attention.query.bias"),
    (r"^blocks\.(\d+)\.attn\.v_bias$", r"encoder.layer.\1.attention.attention.value.bias"),
    (r"^blocks\.(\d+)\.attn\.proj\.", r"encoder.layer.\1.attention.output.dense."),
    (r"^blocks\.(\d+)\.mlp\.fc1\.", r"encoder.layer.\1.intermediate.dense."),
    (r"^blocks\.(\d+)\.mlp\.fc2\.", r"encoder.layer.\1.output.dense."),
)


class VideoMAETeacher(ModelTeacher):
    """
    VideoMAE or VideoMAEv2, at any length and size. Its tokens are the residual stream after the last block, before any
    final norm, as VideoREPA takes them.

    The table of positions is not part of the weights: `transformers` makes a new one, over the flat index of the
    token, for whatever size a configuration names, which is right for the size of the pretraining alone. Here every
    other grid gets the table of the pretraining, interpolated (bicubic in space, then linear in time), as the official
    code does. It is made anew on loading, so that nothing is lost when the model is saved.

    Args:
        model (`VideoMAEModel`): Its configuration names the size of the *pretraining*.
        table (`torch.Tensor` of shape `(N, D)`, *optional*): Positions of the pretraining; VideoMAE's when not given.
        trilinear (`bool`, defaults to `False`): Interpolate it linearly in all directions at once, as V-JEPA does.
        options: `height`, `width`, `antialias`, `skip_first_frame` of [`ModelTeacher`].
    """

    def __init__(
        self,
        model: VideoMAEModel,
        name: str = "videomae",
        *,
        table: Tensor | None = None,
        trilinear: bool = False,
        **options: Any,
    ) -> None:
        config = model.config
        image, patch = _pair(config.image_size), _pair(config.patch_size)
        if patch[0] != patch[1]:
            raise ValueError(f"{name}: expected square patches, got {patch}.")
        super().__init__(
            model, name, patch_size=patch[0], tubelet_size=config.tubelet_size, native_size=image, **options
        )
        self.native_grid = (config.num_frames // config.tubelet_size, image[0] // patch[0], image[1] // patch[1])
        self._table, self._trilinear = table, trilinear
        self._tables: dict[Grid, Tensor] = {}

    def positions(self, grid: Grid) -> Tensor:
        """Table of positions `(N, D)` of a grid, float32, on the CPU."""
        if grid not in self._tables:
            table = self._table
            if table is None:
                table = sinusoid_table(self.native_grid, self.model.config.hidden_size)
            interpolate = interpolate_trilinearly if self._trilinear else interpolate_table
            self._tables[grid] = interpolate(table, self.native_grid, grid)
        return self._tables[grid]

    def _settings(self) -> list[Any]:
        if self._table is None:
            return super()._settings()
        return [*super()._settings(), fingerprint(self._table.tolist()), self._trilinear]

    def _encode(self, pixels: Tensor, grid: Grid) -> Tensor:
        patches = self.model.embeddings.patch_embeddings.projection(pixels.transpose(1, 2))  # (B, D, F', H', W')
        tokens = patches.flatten(2).transpose(1, 2)
        hidden: Tensor = self.model.encoder(tokens + self.positions(grid).to(tokens)).last_hidden_state
        return hidden


def load_videomae(name_or_path: str, *, dtype: torch.dtype, **options: Any) -> VideoMAETeacher:
    """A VideoMAE in `transformers` layout, with or without a decoder or a classifier on top."""
    # Mean pooling leaves out the final norm, which the tokens do not go through.
    model, info = VideoMAEModel.from_pretrained(
        name_or_path, use_mean_pooling=True, dtype=dtype, output_loading_info=True
    )
    if info["missing_keys"]:
        raise ValueError(f"{name_or_path} lacks weights of VideoMAE: {some_of(info['missing_keys'])}.")
    return VideoMAETeacher(model, Path(name_or_path).name, **options)


def load_videomaev2(
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype,
    name: str | None = None,
    num_attention_heads: int | None = None,
    **options: Any,
) -> VideoMAETeacher:
    """
    A VideoMAEv2 from a `.pth` of its authors or a `.safetensors` file.

    Args:
        path: The file.
        num_attention_heads: Needed where the width is none of ViT-S, B, L, H or g.

    Raises:
        ValueError: The file holds more than tensors, is no VideoMAEv2, or lacks or has other weights than expected.
    """
    config, weights = convert_videomaev2(
        weights_in(read_checkpoint(Path(path)), path), num_attention_heads=num_attention_heads
    )
    return VideoMAETeacher(
        whole_model(config, weights, path, "VideoMAEv2").to(dtype), name or Path(path).stem, **options
    )


def whole_model(
    config: VideoMAEConfig, weights: dict[str, Tensor], path: str | os.PathLike[str], kind: str
) -> VideoMAEModel:
    """
    The network with these weights, to the last one.

    Raises:
        ValueError: A weight is missing, unknown or of another shape.
    """
    model = VideoMAEModel(config)
    state = model.state_dict()
    # Keys have a bias in transformers before 5.18; in no file, for it would be the same for all tokens that compete.
    biases = {key: torch.zeros_like(bias) for key, bias in state.items() if key.endswith(".attention.key.bias")}
    weights = biases | weights
    expected = {key: tuple(tensor.shape) for key, tensor in state.items()}
    shapes = {key: tuple(tensor.shape) for key, tensor in weights.items()}
    if shapes != expected:
        missing, unknown = sorted(expected.keys() - shapes.keys()), sorted(shapes.keys() - expected.keys())
        misshapen = sorted(key for key in shapes.keys() & expected.keys() if shapes[key] != expected[key])
        raise ValueError(
            f"{path} is no whole {kind}: missing {some_of(missing)}; unknown {some_of(unknown)}; of another shape "
            f"{some_of(misshapen)}."
        )
    model.load_state_dict(weights, strict=True)
    return model


def convert_videomaev2(
    weights: dict[str, Tensor], *, num_attention_heads: int | None = None
) -> tuple[VideoMAEConfig, dict[str, Tensor]]:
    """
    Weights of the authors' layout as a configuration and weights of `VideoMAEModel`.

    Width, depth, patch and tubelet are read off the weights; the pretraining is taken to be at 16 frames of 224
    pixels, as all published ones are. Keys without a counterpart keep their names.

    Raises:
        ValueError: There is no patch embedding, the number of heads is unknown, or the positions were learned.
    """
    weights = {_PREFIXES.sub("", key): tensor for key, tensor in weights.items()}
    patch_embedding = weights.get("patch_embed.proj.weight")
    depth = 1 + max((int(m[1]) for key in weights if (m := re.match(r"blocks\.(\d+)\.", key))), default=-1)
    mlp = weights.get("blocks.0.mlp.fc1.weight")
    if patch_embedding is None or mlp is None or patch_embedding.ndim != 5:
        raise ValueError(f"No VideoMAEv2 encoder among the weights {some_of(sorted(weights))}.")
    width, _, tubelet, patch, _ = patch_embedding.shape
    heads = num_attention_heads or HEADS.get(width)
    if heads is None:
        raise ValueError(f"Width {width} is of no published VideoMAEv2: pass `num_attention_heads`.")
    config = VideoMAEConfig(
        image_size=224,
        patch_size=patch,
        num_frames=16,
        tubelet_size=tubelet,
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        intermediate_size=len(mlp),
        layer_norm_eps=1e-6,  # the default of the configuration is 1e-12
        use_mean_pooling=True,
        qv_bias="blocks.0.attn.q_bias" in weights,
    )
    if "pos_embed" in weights:
        table = sinusoid_table((16 // tubelet, 224 // patch, 224 // patch), width)
        positions = weights["pos_embed"].float().reshape(-1, width)
        if positions.shape != table.shape or not torch.allclose(positions, table, atol=1e-3):
            raise ValueError("The positions are learned or of another pretraining size; only the sinusoids are known.")
    converted: dict[str, Tensor] = {}
    for key, tensor in weights.items():
        if _DROPPED.match(key):
            continue
        if match := re.match(r"^blocks\.(\d+)\.attn\.qkv\.weight$", key):
            for part, chunk in zip(("query", "key", "value"), tensor.chunk(3, 0), strict=True):
                converted[f"encoder.layer.{match[1]}.attention.attention.{part}.weight"] = chunk
            continue
        for pattern, replacement in _RENAMED:
            key = re.sub(pattern, replacement, key)
        converted[key] = tensor
    return config, converted


def sinusoid_table(grid: Grid, width: int) -> Tensor:
    """`(N, D)`: sine at even and cosine at odd channels of the flat index of a token, the positions of VideoMAE."""
    index = torch.arange(grid[0] * grid[1] * grid[2], dtype=torch.float64)[:, None]
    channel = torch.arange(width, dtype=torch.float64)
    angles = index / 10000 ** (2 * (channel // 2) / width)
    return torch.where(channel % 2 == 0, angles.sin(), angles.cos()).float()


def interpolate_table(table: Tensor, native: Grid, grid: Grid) -> Tensor:
    """The table `(N, D)` of the grid `native` for another one: bicubic in space, then linear in time."""
    if grid == native:
        return table
    frames = table.view(*native, -1).permute(0, 3, 1, 2)  # (F, D, H, W)
    if grid[1:] != native[1:]:
        frames = F.interpolate(frames, grid[1:], mode="bicubic", align_corners=False)
    lines = frames.permute(2, 3, 1, 0).flatten(0, 1)  # (H * W, D, F)
    if grid[0] != native[0]:
        lines = F.interpolate(lines, grid[0], mode="linear", align_corners=False)
    return lines.permute(2, 0, 1).flatten(0, 1)


def interpolate_trilinearly(table: Tensor, native: Grid, grid: Grid) -> Tensor:
    """The table `(N, D)` of the grid `native` for another one: linear in time, height and width."""
    if grid == native:
        return table
    volume = table.view(*native, -1).permute(3, 0, 1, 2)[None]  # (1, D, F, H, W)
    # By the factors and not the sizes, as V-JEPA's own code: the two differ by rounding.
    factors = [new / old for new, old in zip(grid, native, strict=True)]
    volume = F.interpolate(volume, scale_factor=factors, mode="trilinear", align_corners=False)
    assert tuple(volume.shape[2:]) == grid, (volume.shape, grid)
    return volume[0].permute(1, 2, 3, 0).flatten(0, 2)


def read_checkpoint(path: Path) -> Any:
    """
    What a file of weights holds, tensors and numbers alone.

    Raises:
        ValueError: It cannot be read, or holds more than that.
    """
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # many kinds are raised for a file that is damaged or holds more than tensors
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"{path} cannot be read as weights alone ({type(error).__name__}: {reason}). If it is whole and you trust "
            "it, open it once with torch and save its tensors as .safetensors."
        ) from error


def weights_in(content: Any, path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """
    The tensors of a checkpoint by their names, out of the containers that published ones have.

    Raises:
        ValueError: There are none.
    """
    for container in ("module", "model"):
        if isinstance(content, dict) and isinstance(content.get(container), dict):
            content = content[container]
            break
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected weights by their names, got {type(content).__name__}.")
    return {key: tensor for key, tensor in content.items() if isinstance(tensor, Tensor)}


def _pair(size: int | list[int] | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def some_of(names: list[str] | set[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "") if names else "none"
