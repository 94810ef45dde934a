"""DINOv2 and DINOv3 as teachers: image encoders applied to single frames."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel, PreTrainedModel

from .base import ModelTeacher


class DINOTeacher(ModelTeacher):
    """
    DINOv2 (with or without registers) or DINOv3 on one frame at a time. It knows no motion: a baseline for teachers
    that do. Its tokens have gone through the final norm, those of class and registers are left out.

    Args:
        model (`Dinov2Model`, `Dinov2WithRegistersModel` or `DINOv3ViTModel`): The encoder.
        frame_stride (`int`, *optional*, defaults to `1`): Takes the middle frame of every so many; 4 is one for each
            latent frame of an autoencoder that halves time twice.
        options: `height`, `width`, `antialias`, `skip_first_frame` of [`ModelTeacher`].
    """

    def __init__(self, model: PreTrainedModel, name: str = "dino", *, frame_stride: int = 1, **options: Any) -> None:
        if frame_stride < 1:
            raise ValueError(f"`frame_stride` must be at least 1, got {frame_stride}.")
        config = model.config.to_dict()
        image = config["image_size"]
        super().__init__(
            model,
            name,
            patch_size=config["patch_size"],
            tubelet_size=frame_stride,
            native_size=(image, image) if isinstance(image, int) else tuple(image),
            **options,
        )
        self._middle = (frame_stride - 1) // 2
        self._num_prefix_tokens = 1 + config.get("num_register_tokens", 0)

    def _encode(self, pixels: Tensor, grid: tuple[int, int, int]) -> Tensor:
        frames = pixels[:, self._middle :: self.tubelet_size].flatten(0, 1)
        hidden: Tensor = self.model(frames).last_hidden_state[:, self._num_prefix_tokens :]
        return hidden.unflatten(0, (len(pixels), grid[0])).flatten(1, 2)

    def _frame_times(self, num_token_frames: int) -> Tensor:
        starts = torch.arange(num_token_frames, dtype=torch.float32) * self.tubelet_size
        return self.first_frame + starts + self._middle

    def _settings(self) -> list[Any]:
        return [*super()._settings(), self.tubelet_size]


def load_dino(name_or_path: str, *, dtype: torch.dtype, **options: Any) -> DINOTeacher:
    """A DINOv2 or DINOv3 ViT in `transformers` layout."""
    model, info = AutoModel.from_pretrained(name_or_path, dtype=dtype, output_loading_info=True)
    if info["missing_keys"]:
        raise ValueError(f"{name_or_path} lacks weights: {', '.join(sorted(info['missing_keys'])[:5])} ...")
    return DINOTeacher(model, Path(name_or_path).name, **options)
