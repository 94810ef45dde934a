"""Group parallelism: the videos of a pair or group on different processes, which exchange their errors only."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from .denoising import Denoising


class GroupParallel:
    """
    The videos of a step divided among processes.

    The loss is computed from all errors, alike on all processes; the gradients of a process are those of its videos,
    and sum up to the gradient over the processes.

    Args:
        mesh (`DeviceMesh`): The processes that share the videos of their rows; one-dimensional.
    """

    def __init__(self, mesh: DeviceMesh) -> None:
        self._group, self._rank, self._size = mesh.get_group(), mesh.get_local_rank(), mesh.size()

    def own(self, denoising: Denoising) -> Denoising:
        """Of N videos, the N / size consecutive ones of this process."""
        size, rest = divmod(len(denoising.timesteps), self._size)
        assert not rest, "refused by the trainer"
        return denoising[self._rank * size : (self._rank + 1) * size]

    def gather(self, errors: Tensor) -> Tensor:
        """Errors `(N,)` of all videos, of which this process has those `(N / size,)` of its own."""
        return _Gather.apply(errors, self._group, self._rank, self._size)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, errors: Tensor, group: dist.ProcessGroup, rank: int, size: int) -> Tensor:
        ctx.rank, ctx.size = rank, size
        parts = [torch.empty_like(errors) for _ in range(size)]
        dist.all_gather(parts, errors.detach().contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        # All engines average gradients over all processes; those of one row's videos are to be added up.
        return ctx.size * gradient.chunk(ctx.size)[ctx.rank], None, None, None
