"""What the tests of all adapters share: the calls that a pipeline makes, and pixels to start from."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import PIL.Image
import torch
from torch import Tensor, nn

from tests.support.tiny import tiny_video


Calls = list[tuple[dict[str, Any], Tensor]]


@contextmanager
def recorded_calls(module: nn.Module) -> Iterator[Calls]:
    """Keyword arguments and first output of each call of a module."""
    calls: Calls = []
    handle = module.register_forward_hook(
        lambda _, args, kwargs, output: calls.append((kwargs, output[0])), with_kwargs=True
    )
    yield calls
    handle.remove()


def pixels(batch: int = 2, **size: int) -> Tensor:
    """Videos `(B, 3, T, H, W)` in [-1, 1]."""
    videos = torch.stack([torch.from_numpy(tiny_video(seed, **size)) for seed in range(batch)])
    return videos.permute(0, 4, 1, 2, 3) / 127.5 - 1


def image(seed: int = 0, **size: int) -> PIL.Image.Image:
    """First frame of a tiny video."""
    return PIL.Image.fromarray(tiny_video(seed, **size)[0])
