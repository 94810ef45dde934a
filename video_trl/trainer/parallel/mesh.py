"""Device mesh: which processes work on a row together, and context parallelism over the tokens of its videos."""

import math
from collections.abc import Iterable, Sequence

from diffusers import ContextParallelConfig, ModelMixin
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ...models import ModelFamily
from ...models.attention.ring import mend_ring_attention
from ..base_config import VideoConfig


def make_mesh(args: VideoConfig) -> DeviceMesh | None:
    """
    The processes by what they share. Those that share a video are neighbours, on one machine where possible.

    Args:
        args (`VideoConfig`): Says how many processes share what.

    Returns:
        `DeviceMesh`, *optional*: With the dimensions `"data"` (processes with other rows), `"group"` (with other
        videos of the same rows), and diffusers' `"ring"` and `"ulysses"` (with other tokens of the same videos), of
        which one has the size 1. `None` if every process works on rows of its own.
    """
    if args.processes_per_row == 1:
        return None
    tokens = args.context_parallel_size
    ring, ulysses = (tokens, 1) if args.context_parallel_method == "ring" else (1, tokens)
    shape = (args.data_parallel_size, args.processes_per_row // tokens, ring, ulysses)
    return init_device_mesh(args.device.type, shape, mesh_dim_names=("data", "group", "ring", "ulysses"))


def enable_context_parallelism(transformer: ModelMixin, family: ModelFamily, mesh: DeviceMesh) -> None:
    """Let the processes along `"ring"` or `"ulysses"` share the tokens of each video in a transformer's forwards."""
    config = ContextParallelConfig(ring_degree=mesh["ring"].size(), ulysses_degree=mesh["ulysses"].size(), mesh=mesh)
    if config.ring_degree > 1:
        mend_ring_attention()
    family.share_tokens(transformer, config)


def check_context_parallel_method(transformer: ModelMixin, family: ModelFamily, args: VideoConfig) -> None:
    """
    Raise a `ValueError` if the tokens of the transformer's family cannot be shared by the method that is asked for, or
    its heads divided, or if they are shared already.
    """
    if transformer._parallel_config is not None:
        raise ValueError(
            "The transformer shares the tokens of its videos among processes, as an earlier trainer's "
            "`context_parallel_size` or `enable_parallelism` has set it up. That cannot be undone: load the model "
            "again."
        )
    methods = family.context_parallel_methods
    if args.context_parallel_size > 1 and args.context_parallel_method not in methods:
        raise ValueError(
            f"`context_parallel_method={args.context_parallel_method!r}` is not supported for {family.name!r}. "
            + (f"Use {' or '.join(map(repr, methods))}." if methods else "Leave `context_parallel_size` at 1.")
        )
    check_context_parallelism(transformer, family, (), args)  # tokens are divided once the sizes of videos are known


def check_context_parallelism(
    transformer: ModelMixin, family: ModelFamily, shapes: Iterable[Sequence[int]], args: VideoConfig
) -> None:
    """
    Check that attention heads, or with ring attention tokens, can be divided among the processes that share a video.

    Args:
        transformer (`ModelMixin`): The transformer.
        family (`ModelFamily`): Of its family.
        shapes (`Iterable`): The shapes `(C, F, H, W)` of latents that occur.
        args (`VideoConfig`): Says how many processes share a video, and how: `"ulysses"` fills tokens up.

    Raises:
        ValueError: If they cannot; names the numbers that would do.
    """
    if args.context_parallel_method == "ulysses":
        heads = transformer.config.num_attention_heads
        _check_divides(args.context_parallel_size, heads, f"the {heads} attention heads of the transformer")
        return
    for shape in shapes:
        grid = family.token_grid(transformer, shape)
        tokens = f"the {math.prod(grid)} tokens ({' x '.join(map(str, grid))}) of videos with latents {tuple(shape)}"
        _check_divides(args.context_parallel_size, math.prod(grid), tokens)


def _check_divides(size: int, number: int, what: str) -> None:
    if number % size:
        possible = [degree for degree in range(1, min(number, 64) + 1) if number % degree == 0]
        raise ValueError(f"`context_parallel_size={size}` must divide {what}: {possible} do. Use one of these.")
