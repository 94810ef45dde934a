"""Qwen2.5-VL and Qwen3-VL as judges, in this process: log-probabilities of "Yes" and "No", or of 1 to 5."""

import os
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from . import Video
from .frames import check_request, evenly_spaced, frame_rate, sample_frames, size_within
from .mplug_owl_model import IMAGE_MEAN, IMAGE_STD
from .weights import read_config, resolve_weights, text_hash, weights_identity


YES_NO = ("Yes", "No")
RATINGS = ("1", "2", "3", "4", "5")
QUESTIONS = {
    "yes_no": {
        "sa": 'Does this video show what this caption says, with all its objects and actions: "{caption}"? '
        "Answer with Yes or No only.",
        "pc": "Do all things in this video move, change and touch as the laws of physics demand? Think of gravity, "
        "inertia, collisions, solidity, fluids, and of things that appear, vanish or change shape. "
        "Answer with Yes or No only.",
    },
    "rating": {
        "sa": 'How well does this video show what this caption says: "{caption}"? Answer with one digit only, from 1 '
        "(nothing of it) to 5 (all objects, attributes and actions).",
        "pc": "How well do the things in this video obey the laws of physics? Think of gravity, inertia, collisions, "
        "solidity, fluids, and of things that appear, vanish or change shape. Answer with one digit only, from 1 "
        "(severe violations) to 5 (none).",
    },
}
# Mean and standard deviation of the pixels, and the system message, that each family was trained with.
_FAMILIES = {
    "qwen2_5_vl": (IMAGE_MEAN, IMAGE_STD, "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"),
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


class QwenVLJudge:
    """
    Asks a Qwen2.5-VL or Qwen3-VL model about both scores and reads the log-probabilities of the possible answers.

    `answers="yes_no"` gives p(Yes) / (p(Yes) + p(No)). `answers="rating"` gives (e - 1) / 4 with e the expectation
    over 1 to 5. `pc` is asked without the caption. Zero-shot: check it against people's votes, or against the sandbox,
    before you build on it.

    Args:
        model: folder or repository id, weights as safetensors.
        answers: `"yes_no"` or `"rating"`.
        num_frames: frames shown, evenly spaced.
        max_pixels: of each frame; larger ones are made smaller.
        fps: frames per second of clips given as arrays; files know their own.
        device: where to run; a GPU if there is one.
        dtype: of the weights. The logits of the answers are computed in float32.
        revision: of the repository.

    Raises:
        ValueError: a setting out of range, weights that are missing or of another model, or a tokenizer that does not
            know the answers as single tokens.
    """

    name = "qwen-vl"
    version = 1  # goes up when equal weights and prompts would score differently

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        answers: Literal["yes_no", "rating"] = "yes_no",
        num_frames: int = 16,
        max_pixels: int = 448 * 448,
        fps: float = 16.0,
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.bfloat16,
        revision: str | None = None,
    ) -> None:
        from transformers import AutoModelForImageTextToText, AutoTokenizer

        if answers not in QUESTIONS or num_frames < 2 or max_pixels < 64 * 64 or not fps > 0:
            raise ValueError(
                f"Expected `answers` 'yes_no' or 'rating', `num_frames` >= 2, `max_pixels` >= 4096 and `fps` > 0, got "
                f"{answers!r}, {num_frames}, {max_pixels} and {fps}."
            )
        self._folder = resolve_weights(model, revision)
        family = read_config(self._folder).get("model_type")
        if family not in _FAMILIES:
            raise ValueError(
                f"{model!s}: expected model_type 'qwen2_5_vl' or 'qwen3_vl' in config.json, got {family!r}."
            )
        self.family: str = family
        self.answers, self.num_frames, self.max_pixels, self.fps = answers, num_frames, max_pixels, fps
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.dtype = dtype
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(self._folder)
            loaded = AutoModelForImageTextToText.from_pretrained(self._folder, dtype=dtype, use_safetensors=True)
        except (OSError, ValueError) as error:
            raise ValueError(f"{model!s}: cannot be loaded ({error}). Fetch the whole repository.") from error
        self.model = loaded.to(self.device).eval().requires_grad_(False)
        self._answer_ids = [self._single_token(text) for text in (YES_NO if answers == "yes_no" else RATINGS)]

    @cached_property
    def identity(self) -> str:
        """Name, version, weights, prompts and settings: equal identities give equal scores."""
        prompts = text_hash(*QUESTIONS[self.answers].values(), _FAMILIES[self.family][2])
        return (
            f"{self.name}:v{self.version}:weights={weights_identity(self._folder)}:prompts={prompts}:{self.answers},"
            f"{str(self.dtype).removeprefix('torch.')},frames={self.num_frames},pixels={self.max_pixels},"
            f"fps={self.fps:g}"
        )

    def score(self, videos: Sequence[Video], prompts: Sequence[str]) -> list[dict[str, Any]]:
        """
        Scores each video; see `VideoJudge.score`.

        Returns:
            For each video `sa` and `pc` in [0, 1], and `raw`: for both the log-probability of each answer over the
            whole vocabulary, and their sum as `coverage`, in which a model that wants to say something else shows.

        Raises:
            ValueError: a request that cannot be answered, a caption with the model's control tokens.
        """
        check_request(videos, prompts)
        unsafe = [prompt for prompt in prompts if "<|" in prompt]
        if unsafe:
            raise ValueError(f"Captions may not contain '<|', which starts the model's control tokens: {unsafe[:3]}.")
        return [self._score_one(video, prompt) for video, prompt in zip(videos, prompts, strict=True)]

    def _score_one(self, video: Video, prompt: str) -> dict[str, Any]:
        vision = self.model.config.vision_config
        frames, indices = sample_frames(
            video,
            self.num_frames,
            evenly_spaced,
            lambda h, w: size_within(h, w, self.max_pixels, vision.patch_size * vision.spatial_merge_size),
        )
        mean, std, _ = _FAMILIES[self.family]
        pixels, grid = patchify(
            frames,
            patch=vision.patch_size,
            temporal_patch=vision.temporal_patch_size,
            merge=vision.spatial_merge_size,
            mean=mean,
            std=std,
        )
        times = indices / frame_rate(video, self.fps)
        scores: dict[str, float] = {}
        raw: dict[str, Any] = {}
        for question, text in QUESTIONS[self.answers].items():
            logprobs = self._answer_logprobs(pixels, grid, times, text.format(caption=prompt))
            shares = logprobs.softmax(dim=-1).tolist()
            answers = YES_NO if self.answers == "yes_no" else RATINGS
            if self.answers == "yes_no":
                scores[question] = shares[0]
            else:
                scores[question] = sum(share * rating for rating, share in enumerate(shares)) / 4
            raw[question] = {
                "logprobs": dict(zip(answers, logprobs.tolist(), strict=True)),
                "coverage": float(logprobs.exp().sum()),
            }
        return scores | {"raw": raw}

    @torch.inference_mode()
    def _answer_logprobs(
        self, pixels: Tensor, grid: tuple[int, int, int], times: NDArray[np.float64], question: str
    ) -> Tensor:
        """`(K,)` float32 log-probabilities of the answers as the next token."""
        ids = torch.tensor([self._prompt_ids(grid, times, question)], device=self.device)
        config = self.model.config
        inputs: dict[str, Any] = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "mm_token_type_ids": (ids == config.video_token_id).int() * 2,
            "pixel_values_videos": pixels.to(self.device, self.dtype),
            "video_grid_thw": torch.tensor([grid], device=self.device),
        }
        if self.family == "qwen2_5_vl":  # Qwen3-VL reads the times in the text
            step = (times[-1] - times[0]) / max(len(times) - 1, 1)
            seconds = config.vision_config.temporal_patch_size * step
            inputs["second_per_grid_ts"] = torch.tensor([seconds], device=self.device, dtype=torch.float32)
        hidden = self.model.model(**inputs, use_cache=False).last_hidden_state[0, -1]
        everything = self.model.lm_head(hidden).float().logsumexp(dim=-1)
        return torch.mv(self.model.lm_head.weight[self._answer_ids].float(), hidden.float()) - everything

    def _prompt_ids(self, grid: tuple[int, int, int], times: NDArray[np.float64], question: str) -> list[int]:
        """The chat up to the answer, with as many places for the video as it has tokens."""
        vision = self.model.config.vision_config
        tokens = grid[1] * grid[2] // vision.spatial_merge_size**2  # of one temporal patch
        if self.family == "qwen2_5_vl":
            video = f"<|vision_start|>{'<|video_pad|>' * (grid[0] * tokens)}<|vision_end|>"
        else:
            padded = np.concatenate([times, np.repeat(times[-1:], -len(times) % vision.temporal_patch_size)])
            groups = padded.reshape(grid[0], -1)
            video = "".join(
                f"<{(group[0] + group[-1]) / 2:.1f} seconds><|vision_start|>{'<|video_pad|>' * tokens}<|vision_end|>"
                for group in groups
            )
        system = _FAMILIES[self.family][2]
        chat = f"{system}<|im_start|>user\n{video}{question}<|im_end|>\n<|im_start|>assistant\n"
        return list(self.tokenizer.encode(chat, add_special_tokens=False))

    def _single_token(self, text: str) -> int:
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        if len(ids) != 1:
            raise ValueError(
                f"{self._folder}: expected a tokenizer that has {text!r} as one token, got {len(ids)}. Is this a "
                "Qwen-VL model?"
            )
        return int(ids[0])
