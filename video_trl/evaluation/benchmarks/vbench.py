"""
VBench (https://huggingface.co/papers/2311.17982): read its result files and average them as Reg-DPO does.

VBench pins libraries of 2023 and weights with non-commercial licences, so it is no dependency: run it in an
environment of its own and read its `*_eval_results.json` here (docs/results/evaluation.md has the command). Two
dimensions need nothing but stock transformers; they are computed here under names of their own: resizing
differs from VBench's.
"""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import CLIPVisionModelWithProjection, PreTrainedModel, ViTModel

from ...data.video_io import read_video
from ...files import read_json
from ..report.page import Table
from ..statistics import rank_points


DIMENSIONS = (
    "subject_consistency",
    "background_consistency",
    "motion_smoothness",
    "dynamic_degree",
    "aesthetic_quality",
    "imaging_quality",
)
# What the ends of the pixel range are mapped to by each encoder's training.
_NORMALISATION = {
    "dino": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
}
_ENCODERS = {"dino": "facebook/dino-vitb16", "clip": "openai/clip-vit-base-patch32"}
_FRAMES_AT_ONCE = 32


@dataclass(frozen=True)
class VBenchResults:
    """
    What VBench said about one model.

    Attributes:
        values (`dict[str, float]`): Score of each dimension, larger is better.
        videos (`dict[str, dict[str, float]]`): For each dimension the score of each video, by file name.
    """

    values: Mapping[str, float]
    videos: Mapping[str, Mapping[str, float]]


def load_vbench(
    path: str | os.PathLike[str], dimensions: Sequence[str] = DIMENSIONS, *, num_videos: int | None = None
) -> VBenchResults:
    """
    Reads a `*_eval_results.json` of VBench.

    Args:
        path (path): The file.
        dimensions (list of `str`, *optional*): Dimensions to read; by default the six for custom videos.
        num_videos (`int`, *optional*): Videos that were evaluated; refused if a dimension has another number.

    Returns:
        [`VBenchResults`]

    Raises:
        ValueError: If the file is missing or of another form, lacks a dimension, or has a value that is not finite, a
            video twice, or another number of videos than expected.
    """
    content = read_json(path)
    missing = [name for name in dimensions if not isinstance(content, dict) or name not in content]
    if missing:
        raise ValueError(f"{path} has no results of {', '.join(missing)}. Run VBench on these dimensions too.")
    values, videos = {}, {}
    for name in dimensions:
        try:
            score, rows = content[name]
            values[name] = float(score)
            # dynamic_degree has booleans, imaging_quality percentages: kept as they are.
            scores = [(Path(row["video_path"]).name, float(row["video_results"])) for row in rows]
        except (TypeError, ValueError, KeyError) as error:
            raise ValueError(f"{path}: {name} is not in VBench's form [score, [rows]] ({error!r}).") from error
        videos[name] = dict(scores)
        if not all(math.isfinite(value) for value in [values[name], *videos[name].values()]):
            raise ValueError(f"{path}: {name} has a value that is not finite. Evaluate these videos again.")
        if len(videos[name]) != len(scores):
            raise ValueError(f"{path}: {name} has a video of the same name twice.")
        if num_videos is not None and len(scores) != num_videos:
            raise ValueError(f"{path}: {name} has {len(scores)} videos, expected {num_videos}.")
    return VBenchResults(values, videos)


def _load_encoder(kind: str, model: str | os.PathLike[str] | None) -> PreTrainedModel:
    name = model or _ENCODERS[kind]
    if kind == "dino":
        return ViTModel.from_pretrained(name, add_pooling_layer=False)
    return CLIPVisionModelWithProjection.from_pretrained(name)


def direction(value: float, baseline: float, decimals: int = 5) -> Literal["↑", "↓", "-"]:
    """Arrow of a value against the baseline, both rounded first: up, down or unchanged, as in Reg-DPO's tables."""
    difference = round(value, decimals) - round(baseline, decimals)
    return "-" if difference == 0 else "↑" if difference > 0 else "↓"


def vbench_table(
    values: Mapping[str, Mapping[str, float]], *, baseline: str, title: str = "VBench", decimals: int = 5
) -> Table:
    """
    Methods x dimensions as in Reg-DPO (https://huggingface.co/papers/2511.01450): value, arrow against the baseline,
    rank points in brackets, and their sum `Total_Score`.

    Args:
        values (`dict[method, dict[dimension, float]]`): Larger is better; each method has the same dimensions.
        baseline (`str`): Method that the arrows compare with.
        title (`str`, *optional*), decimals (`int`, *optional*, defaults to `5`): Heading, and places shown and ranked.

    Returns:
        [`Table`]

    Raises:
        ValueError: If the baseline is not among the methods, or as in [`rank_points`].
    """
    if baseline not in values:
        raise ValueError(f"The baseline {baseline!r} is not among the methods {sorted(values)}.")
    points = rank_points(values, decimals)
    dimensions, base = list(values[baseline]), values[baseline]
    rows = []
    for method, row in values.items():
        cells = [
            f"{row[name]:.{decimals}f} {direction(row[name], base[name], decimals)} [{points[method][name]}]"
            for name in dimensions
        ]
        rows.append([method, *cells, str(sum(points[method].values()))])
    note = (
        f"Arrows against {baseline}. In brackets: rank points, {len(values)} for the best. Total_Score is their sum; "
        "it depends on the methods compared and ignores how far apart they are."
    )
    return Table(title, ["method", *dimensions, "Total_Score"], rows, note)


def frame_consistency(features: Tensor) -> float:
    """
    How alike the frames of a video are: mean over frames 2 to T of half the cosine with the frame before plus half the
    cosine with the first frame, each at least 0.

    Args:
        features (`Tensor` of shape `(T, D)`): One vector for each frame, T at least 2.

    Raises:
        ValueError: If there are fewer than two frames.
    """
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"Consistency compares frames; expected features (T >= 2, D), got {tuple(features.shape)}.")
    unit = functional.normalize(features.double(), dim=1)
    previous = (unit[1:] * unit[:-1]).sum(dim=1).clamp(min=0)
    first = (unit[1:] * unit[:1]).sum(dim=1).clamp(min=0)
    return float((previous + first).mean() / 2)


class FrameConsistency:
    """
    `dino_consistency` or `clip_consistency` of videos: [`frame_consistency`] of an image encoder's features. They
    measure what VBench's `subject_consistency` and `background_consistency` measure, with the same encoders.

    A frozen picture is perfectly consistent: read these values beside one that rewards motion.

    Args:
        kind (`str`): `"dino"` (class token of a ViT) or `"clip"` (image embedding).
        model (`str` or `PreTrainedModel`, *optional*): Repository id, path, or a loaded `ViTModel` or
            `CLIPVisionModelWithProjection`. By default the encoder that VBench uses.
        size (`int`, *optional*, defaults to `224`): Shorter side, pixels. DINO sees whole frames, CLIP their centre.
        device (`str`, *optional*, defaults to `"cpu"`): Where the encoder runs.

    Raises:
        ValueError: If the kind is unknown.
    """

    def __init__(
        self,
        kind: Literal["dino", "clip"],
        model: str | os.PathLike[str] | PreTrainedModel | None = None,
        *,
        size: int = 224,
        device: str = "cpu",
    ) -> None:
        if kind not in _ENCODERS:
            raise ValueError(f"`kind` must be 'dino' or 'clip', got {kind!r}.")
        self.kind, self.size, self.name = kind, size, f"{kind}_consistency"
        encoder = model if isinstance(model, PreTrainedModel) else _load_encoder(kind, model)
        self._model = encoder.eval().to(device)
        self._device = torch.device(device)

    def __call__(self, videos: Sequence[str | os.PathLike[str] | np.ndarray]) -> list[float]:
        """
        Consistency of each video, in [0, 1].

        Args:
            videos (list of path or `numpy.ndarray`): Files, or uint8 frames `(T, H, W, 3)`; at least two frames each.

        Raises:
            VideoDecodeError: If a file cannot be read.
            ValueError: If a video has a single frame.
        """
        return [frame_consistency(self._features(read_video(video))) for video in videos]

    @torch.no_grad()
    def _features(self, video: np.ndarray) -> Tensor:
        """uint8 `(T, H, W, 3)` -> `(T, D)` float32 on the CPU."""
        features = []
        for start in range(0, len(video), _FRAMES_AT_ONCE):
            pixels = self._prepare(torch.from_numpy(video[start : start + _FRAMES_AT_ONCE].copy()))
            if self.kind == "dino":
                output = self._model(pixels, interpolate_pos_encoding=True).last_hidden_state[:, 0]
            else:
                output = self._model(pixels).image_embeds
            features.append(output.float().cpu())
        return torch.cat(features)

    def _prepare(self, frames: Tensor) -> Tensor:
        """uint8 `(T, H, W, 3)` -> normalised float32 `(T, 3, h, w)`, shorter side `size`."""
        pixels = frames.to(self._device).permute(0, 3, 1, 2).float() / 255
        height, width = pixels.shape[2:]
        patch = int(self._model.config.patch_size)
        scale = self.size / min(height, width)
        # Sides of whole patches; the shorter one is `size`, which is a multiple of the patch.
        target = [max(self.size, round(side * scale / patch) * patch) for side in (height, width)]
        pixels = functional.interpolate(pixels, target, mode="bicubic", antialias=True).clamp(0, 1)
        if self.kind == "clip":
            top, left = ((side - self.size) // 2 for side in target)
            pixels = pixels[:, :, top : top + self.size, left : left + self.size]
        mean, std = (
            torch.tensor(values, device=self._device).view(1, 3, 1, 1) for values in _NORMALISATION[self.kind]
        )
        return (pixels - mean) / std
