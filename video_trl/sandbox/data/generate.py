"""Videos of the sandbox's pipeline, in memory: one for each sentence and seed."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from tqdm.auto import tqdm


@torch.no_grad()
def generate(
    pipeline: DiffusionPipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    call_kwargs: dict[str, Any],
    *,
    batch_size: int = 16,
    description: str = "Generating",
) -> np.ndarray:
    """
    One video for each (prompt, seed), the same whatever the batch size up to float summation order.

    Returns:
        uint8 `(N, T, H, W, 3)`.
    """
    videos = []
    with tqdm(total=len(prompts), desc=description, unit="video") as progress:
        for start in range(0, len(prompts), batch_size):
            chunk = list(prompts[start : start + batch_size])
            generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds[start : start + batch_size]]
            frames = pipeline(chunk, generator=generators, output_type="np", **call_kwargs).frames
            videos.append(np.rint(np.asarray(frames).clip(0, 1) * 255).astype(np.uint8))
            progress.update(len(chunk))
    return np.concatenate(videos)
