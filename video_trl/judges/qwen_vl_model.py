"""Load Qwen2.5-VL or Qwen3-VL with transformers, and prepare a chat about one video without torchvision."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .mplug_owl_model import IMAGE_MEAN, IMAGE_STD
from .weights import read_config, resolve_weights


# Mean and standard deviation of the pixels, and the system message, that each family was trained with.
FAMILIES = {
    "qwen2_vl": (IMAGE_MEAN, IMAGE_STD, "You are a helpful assistant."),
    "qwen2_5_vl": (IMAGE_MEAN, IMAGE_STD, "You are a helpful assistant."),
    "qwen3_vl": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), ""),
}


def patchify(
    frames: NDArray[np.uint8],
    *,
    patch: int,
    temporal_patch: int,
    merge: int,
    mean: Sequence[float],
    std: Sequence[float],
) -> tuple[Tensor, tuple[int, int, int]]:
    """
    Frames -> the rows that Qwen's vision encoders take, in the order in which they merge neighbours.

    Args:
        frames: uint8 `(T, H, W, 3)`; H and W multiples of `patch * merge`. The last frame is repeated until T is a
            multiple of `temporal_patch`.
        patch, temporal_patch: size of a patch in pixels and frames.
        merge: side of a square of patches that become one token.
        mean, std: of the three channels, for pixels in [0, 1].

    Returns:
        float32 `(t * h * w, 3 * temporal_patch * patch * patch)` and the grid `(t, h, w)` in patches.
    """
    missing = -len(frames) % temporal_patch
    video = torch.from_numpy(np.concatenate([frames, np.repeat(frames[-1:], missing, axis=0)])).float().div(255)
    video = (video - video.new_tensor(mean)) / video.new_tensor(std)
    t, h, w = len(video) // temporal_patch, video.shape[1] // patch, video.shape[2] // patch
    grid = video.view(t, temporal_patch, h // merge, merge, patch, w // merge, merge, patch, 3)
    # Where the patch is (t, row, column, both within the square), then what is in it (channel, frame, row, column).
    rows = grid.permute(0, 2, 5, 3, 6, 8, 1, 4, 7)
    return rows.reshape(t * h * w, -1), (t, h, w)


def best_device(device: str | torch.device | None) -> torch.device:
    """The device named, or a GPU if there is one."""
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


@dataclass(frozen=True)
class Patches:
    """
    One video as the model takes it.

    Attributes:
        pixels: float32, from `patchify`.
        grid: (t, h, w) in patches.
        times: `(T,)` seconds of the frames.
    """

    pixels: Tensor
    grid: tuple[int, int, int]
    times: NDArray[np.float64]


@dataclass
class QwenVL:
    """
    A Qwen-VL model with its tokenizer.

    Attributes:
        folder: where it came from.
        family: key of `FAMILIES`.
        tokenizer, model: of transformers; the model has a `config` of its family.
        device, dtype: of the model.
    """

    folder: Path
    family: str
    tokenizer: Any
    model: Any
    device: torch.device
    dtype: torch.dtype

    @classmethod
    def load(
        cls,
        model: str | os.PathLike[str],
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.bfloat16,
        revision: str | None = None,
    ) -> "QwenVL":
        """
        Loads Qwen2.5-VL or Qwen3-VL.

        Args:
            model: folder or repository id, weights as safetensors.
            device: where to run; a GPU if there is one.
            dtype: of the weights.
            revision: of the repository.

        Raises:
            ValueError: weights that are missing or of another model.
        """
        from transformers import AutoModelForImageTextToText, AutoTokenizer

        folder = resolve_weights(model, revision)
        family = read_config(folder).get("model_type")
        if family not in ("qwen2_5_vl", "qwen3_vl"):
            raise ValueError(
                f"{model!s}: expected model_type 'qwen2_5_vl' or 'qwen3_vl' in config.json, got {family!r}."
            )
        place = best_device(device)
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder)
            loaded = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype, use_safetensors=True)
        except (OSError, ValueError) as error:
            raise ValueError(f"{model!s}: cannot be loaded ({error}). Fetch the whole repository.") from error
        return cls(folder, family, tokenizer, loaded.to(place).eval().requires_grad_(False), place, dtype)

    @property
    def multiple(self) -> int:
        """Sides of a frame must be multiples of this."""
        vision = self.model.config.vision_config
        return int(vision.patch_size * vision.spatial_merge_size)

    def patches(self, frames: NDArray[np.uint8], times: NDArray[np.float64]) -> Patches:
        """uint8 `(T, H, W, 3)` frames at `times` (seconds), sides multiples of `multiple`."""
        mean, std, _ = FAMILIES[self.family]
        vision = self.model.config.vision_config
        pixels, grid = patchify(
            frames,
            patch=vision.patch_size,
            temporal_patch=vision.temporal_patch_size,
            merge=vision.spatial_merge_size,
            mean=mean,
            std=std,
        )
        return Patches(pixels, grid, times)

    def inputs(self, video: Patches | None, *turns: str, system: str | None = None, begun: str = "") -> dict[str, Any]:
        """
        What the model takes for a chat that it has to answer.

        Args:
            video: shown before the first turn; None for a chat about nothing but text.
            turns: of the user and the assistant, in turn, the last one the user's.
            system: the system message; the one that the family was trained with.
            begun: what the answer begins with.
        """
        ids = torch.tensor([self.chat_ids(video, turns, system, begun)], device=self.device)
        config = self.model.config
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if video is None:
            return inputs
        inputs |= {
            "mm_token_type_ids": (ids == config.video_token_id).int() * 2,
            "pixel_values_videos": video.pixels.to(self.device, self.dtype),
            "video_grid_thw": torch.tensor([video.grid], device=self.device),
        }
        if self.family == "qwen2_5_vl":  # Qwen3-VL reads the times in the text
            step = (video.times[-1] - video.times[0]) / max(len(video.times) - 1, 1)
            seconds = config.vision_config.temporal_patch_size * step
            inputs["second_per_grid_ts"] = torch.tensor([seconds], device=self.device, dtype=torch.float32)
        return inputs

    @torch.inference_mode()
    def answer(self, video: Patches | None, *turns: str, system: str | None = None, max_new_tokens: int = 1024) -> str:
        """The likeliest text, word by word, that goes on a chat; see `inputs`."""
        inputs = self.inputs(video, *turns, system=system)
        end = self.tokenizer.convert_tokens_to_ids("<|im_end|>")
        ids = self.model.generate(
            **inputs, max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=end, pad_token_id=end
        )
        new = ids[0, inputs["input_ids"].shape[1] :]
        return str(self.tokenizer.decode(new, skip_special_tokens=True))

    @torch.inference_mode()
    def next_logprobs(self, inputs: dict[str, Any], token_ids: Sequence[int]) -> Tensor:
        """`(K,)` float32 log-probabilities of some tokens as the next one, over the whole vocabulary."""
        hidden = self.model.model(**inputs, use_cache=False).last_hidden_state[0, -1]
        everything = self.model.lm_head(hidden).float().logsumexp(dim=-1)
        return torch.mv(self.model.lm_head.weight[list(token_ids)].float(), hidden.float()) - everything

    def single_token(self, text: str) -> int:
        """
        The token that a text is.

        Raises:
            ValueError: the tokenizer cuts it into several.
        """
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        if len(ids) != 1:
            raise ValueError(
                f"{self.folder}: expected a tokenizer that has {text!r} as one token, got {len(ids)}. Is this a "
                "Qwen-VL model?"
            )
        return int(ids[0])

    def chat_ids(
        self, video: Patches | None, turns: Sequence[str], system: str | None = None, begun: str = ""
    ) -> list[int]:
        """The chat up to the answer, with as many places for the video as it has tokens."""
        shown = "" if video is None else self._places(video)
        system = FAMILIES[self.family][2] if system is None else system
        chat = f"<|im_start|>system\n{system}<|im_end|>\n" if system else ""
        for number, turn in enumerate(turns):
            speaker, content = ("assistant", turn) if number % 2 else ("user", turn if number else shown + turn)
            chat += f"<|im_start|>{speaker}\n{content}<|im_end|>\n"
        return list(self.tokenizer.encode(f"{chat}<|im_start|>assistant\n{begun}", add_special_tokens=False))

    def _places(self, video: Patches) -> str:
        """What stands in the text for the video's tokens."""
        vision = self.model.config.vision_config
        tokens = video.grid[1] * video.grid[2] // vision.spatial_merge_size**2  # of one temporal patch
        if self.family != "qwen3_vl":
            return f"<|vision_start|>{'<|video_pad|>' * (video.grid[0] * tokens)}<|vision_end|>"
        padded = np.concatenate(
            [video.times, np.repeat(video.times[-1:], -len(video.times) % vision.temporal_patch_size)]
        )
        return "".join(
            f"<{(group[0] + group[-1]) / 2:.1f} seconds><|vision_start|>{'<|video_pad|>' * tokens}<|vision_end|>"
            for group in padded.reshape(video.grid[0], -1)
        )
