"""Which processes work on a row together, and sharing the tokens of its videos among them."""

import math
from collections.abc import Iterable, Sequence

from diffusers import ContextParallelConfig, ModelMixin
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ..adapters import VideoAdapter
from .base_config import _BaseVideoConfig


def make_mesh(args: _BaseVideoConfig) -> DeviceMesh | None:
    """
    The processes by what they share. Those that share a video are neighbours, on one machine where possible.

    Args:
        args (`_BaseVideoConfig`): Says how many processes share what.

    Returns:
        `DeviceMesh`, *optional*: With the dimensions `"data"` (processes with other rows), `"group"` (with other
        videos of the same rows), and diffusers' `"ring"` (1) and `"ulysses"` (with other tokens of the same videos).
        `None` if every process works on rows of its own.
    """
    if args.processes_per_row == 1:
        return None
    tokens = args.context_parallel_size
    shape = (args.data_parallel_size, args.processes_per_row // tokens, 1, tokens)
    return init_device_mesh(args.device.type, shape, mesh_dim_names=("data", "group", "ring", "ulysses"))


def enable_context_parallelism(transformer: ModelMixin, adapter: VideoAdapter, mesh: DeviceMesh) -> None:
    """Let the processes along `"ulysses"` share the tokens of each video in every forward of a transformer."""
    config = ContextParallelConfig(ulysses_degree=mesh["ulysses"].size(), mesh=mesh)
    adapter.share_tokens(transformer, config)


def check_context_parallelism(
    transformer: ModelMixin, adapter: VideoAdapter, shapes: Iterable[Sequence[int]], size: int
) -> None:
    """
    Check that attention heads and tokens can be divided among the processes that share a video.

    Args:
        transformer (`ModelMixin`): The transformer.
        adapter (`VideoAdapter`): Of its family.
        shapes (`Iterable`): The shapes `(C, F, H, W)` of latents that occur.
        size (`int`): Number of processes that share a video.

    Raises:
        ValueError: If they cannot; names the numbers that would do.
    """
    heads = transformer.config.num_attention_heads
    for shape in shapes:
        grid = adapter.token_grid(transformer, shape)
        tokens = math.prod(grid)
        if tokens % size or heads % size:
            common = math.gcd(tokens, heads)
            possible = [degree for degree in range(1, common + 1) if common % degree == 0]
            raise ValueError(
                f"`context_parallel_size={size}` must divide the {heads} attention heads and the {tokens} tokens "
                f"({' x '.join(map(str, grid))}) of videos with latents {tuple(shape)}; {possible} do. Use one of "
                "these, or another video size."
            )
