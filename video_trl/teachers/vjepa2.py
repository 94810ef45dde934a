"""V-JEPA 2 as a teacher: tubelets of two frames, rotary positions in time, height and width."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import VJEPA2Model

from .base import ModelTeacher


class VJEPA2Teacher(ModelTeacher):
    """
    The encoder of V-JEPA 2, at any length and size, without its predictor and, as in VideoREPA, its final norm.

    `transformers` counts rows and columns by the square crop that the configuration names, whatever the picture: at
    any other size tokens get the position of other tokens, without an error. Here they are counted by the real grid.

    Load it in float32: the rotary angles are formed in the dtype of the weights, and bfloat16 rounds them.

    Args:
        model (`VJEPA2Model`): Its encoder is taken over and changed in place.
        options: `height`, `width`, `antialias`, `skip_first_frame` of [`ModelTeacher`].
    """

    def __init__(self, model: VJEPA2Model, name: str = "vjepa2", **options: Any) -> None:
        encoder, config = model.encoder, model.config
        super().__init__(
            encoder,
            name,
            patch_size=config.patch_size,
            tubelet_size=config.tubelet_size,
            native_size=(config.crop_size, config.crop_size),
            **options,
        )
        encoder.layernorm = nn.Identity()
        self._grid = (0, 0, 0)
        for layer in encoder.layer:
            layer.attention.get_position_ids = self._position_ids

    def _encode(self, pixels: Tensor, grid: tuple[int, int, int]) -> Tensor:
        self._grid = grid
        hidden: Tensor = self.model(pixels).last_hidden_state
        return hidden

    def _position_ids(self, hidden_states: Tensor, masks: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Frame, row and column of every token, `(N,)` each: in the place of the attention's own method."""
        assert masks is None, "the encoder masks nothing"
        _, height, width = self._grid
        index = torch.arange(hidden_states.shape[1], device=hidden_states.device)
        return index // (height * width), index // width % height, index % width


def load_vjepa2(name_or_path: str, *, dtype: torch.dtype, **options: Any) -> VJEPA2Teacher:
    """A V-JEPA 2 in `transformers` layout."""
    model, info = VJEPA2Model.from_pretrained(name_or_path, dtype=dtype, output_loading_info=True)
    missing = sorted(key for key in info["missing_keys"] if key.startswith("encoder."))
    if missing:
        raise ValueError(f"{name_or_path} lacks weights of V-JEPA 2's encoder: {', '.join(missing[:5])} ...")
    return VJEPA2Teacher(model, Path(name_or_path).name, **options)
