"""Compare linear probes on a model before and after training, its teacher, and plain pixels."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline

from ...data.encoding.processes import default_device
from ...hub.attach import find_adapter, load_adapter
from ...hub.published import Alpha
from ...load import DTYPE_OPTION, SANDBOX, contact_clips, default_teacher, load_pipeline, load_teacher
from .physion import (
    CELLS,
    DiffusionFeatures,
    PixelFeatures,
    ProbeResult,
    TeacherFeatures,
    probe_features,
    read_physion,
)


def probe_models(
    model: str = SANDBOX,
    adapters: Sequence[str] = (),
    *,
    adapter_alpha: Alpha | None = None,
    adapter_scale: float = 1.0,
    block: int = 4,
    noise_levels: Sequence[float] = (0.1, 0.3, 0.5),
    teacher: str | None = None,
    teacher_kwargs: Mapping[str, Any] | None = None,
    physion: str | None = None,
    num_frames: int = 49,
    frame_step: int = 1,
    num_train: int = 480,
    num_test: int = 480,
    height: int | None = None,
    width: int | None = None,
    batch_size: int = 16,
    cells: tuple[int, int] | Literal["all"] | None = None,
) -> dict[str, ProbeResult]:
    """
    Fit a linear probe on each of: pixels (the floor), the model, the model with each adapter, the teacher (the
    ceiling). It answers whether two objects will touch: on Physion v1.5, or on simulated clips for the sandbox.

    Args:
        model (`str`, *optional*, defaults to `"sandbox"`): Repository id or path of a pipeline in diffusers layout.
        adapters (list of `str`, *optional*): What training left: folders with a LoRA adapter or a `transformer`.
        adapter_alpha, adapter_scale: As in [`~video_trl.evaluation.runs.generate.load_generator`].
        block (`int`, *optional*, defaults to `4`): Block whose output is probed, counted from 1.
        noise_levels (list of `float`, *optional*): Noise of the clips, fractions of the schedule; cross-validation
            chooses one.
        teacher (`str`, *optional*): Video encoder, as for `load_teacher`; by default the sandbox's for the sandbox.
        teacher_kwargs (`dict`, *optional*): Further arguments of `load_teacher`, such as `height` and `width`.
        physion (`str`, *optional*): Folder that holds `physion_mp4s`.
        num_frames (`int`), frame_step (`int`): Frames of a clip of Physion, and their distance in the file.
        num_train (`int`), num_test (`int`): Simulated clips to fit the probe on, and to test it on.
        height (`int`, *optional*), width (`int`, *optional*): Size that clips are brought to; by default the file's.
        batch_size (`int`, *optional*, defaults to `16`): Clips in one call.
        cells (`tuple[int, int]` or `"all"`, *optional*): Rows and columns that each token frame is pooled to, or all
            its tokens, which takes as much more memory and time. By default (2, 3) on Physion and (4, 4), which are
            all there are, on simulated clips.

    Returns:
        `dict[str, ProbeResult]`: By name, in the order above; `probe_table` prints it.

    Raises:
        ValueError: If a model other than the sandbox's is given no clips of Physion, or as in `read_physion`.
    """
    if physion is None and model != SANDBOX:
        raise ValueError(
            f"Probing {model!r} needs `physion`, the folder that holds `physion_mp4s`: simulated clips have the size "
            "of the sandbox's model."
        )
    files = _adapter_files(adapters, adapter_alpha, adapter_scale)
    if physion is None:
        train, test = contact_clips(num_train, seed=11), contact_clips(num_test, seed=12)
    else:
        frames: dict[str, Any] = {"num_frames": num_frames, "frame_step": frame_step}
        train, test = (read_physion(physion, split, **frames) for split in ("train", "test"))
    pooling = _pooling(cells, simulated=physion is None)
    common: dict[str, Any] = {"batch_size": batch_size, "height": height, "width": width}
    results = {"pixels": probe_features(PixelFeatures(), train, test, name="pixels", **common)}
    pipeline = _load(model)
    base = pipeline.transformer
    for adapter in ("", *adapters):
        file = files.get(adapter)
        if adapter and file is None:
            whole = type(base).from_pretrained(adapter, subfolder="transformer", **{DTYPE_OPTION: base.dtype})
            pipeline.transformer = whole.to(base.device)
        elif file is not None:
            load_adapter(pipeline, file, model, alpha=adapter_alpha, scale=adapter_scale)
        features = DiffusionFeatures(pipeline, block=block, noise_levels=noise_levels, **pooling)
        results[adapter or model] = probe_features(features, train, test, name=adapter or model, **common)
        pipeline.transformer = base
        if file is not None:
            base.unload_lora()
    if (name := teacher or default_teacher(model)) is not None:
        ceiling = TeacherFeatures(load_teacher(name, **(teacher_kwargs or {})), **pooling)
        results[f"{name} (teacher)"] = probe_features(ceiling, train, test, name=name, **common)
    return results


def _pooling(cells: tuple[int, int] | Literal["all"] | None, *, simulated: bool) -> dict[str, Any]:
    # The sandbox has so few tokens that none need be pooled.
    pooling: dict[str, Any] = {"num_slices": 6, "cells": (4, 4)} if simulated else {"cells": CELLS}
    return pooling if cells is None else pooling | {"cells": None if cells == "all" else cells}


def _adapter_files(adapters: Sequence[str], alpha: Alpha | None, scale: float) -> dict[str, Path | None]:
    """The file of each adapter; `None` for a transformer that was trained whole."""
    whole = [name for name in adapters if (Path(name) / "transformer").is_dir()]
    others = [name for name in adapters if name not in whole]
    return dict.fromkeys(whole) | {name: find_adapter(name, alpha, scale) for name in others or [""]}


def _load(name: str) -> DiffusionPipeline:
    """The pipeline, on the accelerator if there is one and the model is not tiny."""
    if name == SANDBOX:
        return load_pipeline(name)
    return load_pipeline(name, dtype=torch.float32).to(default_device())
