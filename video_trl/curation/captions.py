"""Captions for clips that have none: by a Qwen-VL model in this process, or by a server (Reg-DPO, appendix A.1)."""

from collections.abc import Sequence
from functools import cached_property, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from ..data.video_io import VideoDecodeError
from ..judges.chat import ChatClient, ChatError, ChatQuestion
from ..judges.frames import Frames, evenly_spaced, frame_rate, sample_frames, size_within
from ..judges.weights import resolve_weights, text_hash


CAPTION_VERSION = 1

SYSTEM = "You describe videos for people who will never see them. You report what the frames show and guess nothing."
QUESTION = """These are {count} frames of one video, in order, at these seconds: {seconds}.

Describe the video in two or three sentences of plain English, as one would ask for it: who or what is to be seen, what
it does from the beginning to the end, where, and what the camera does. Do not speak of frames, and begin with the
subject."""


class Caption(BaseModel):
    """What a server has to answer with."""

    model_config = ConfigDict(extra="ignore", strict=True)

    caption: str


class ServerCaptioner:
    """
    A vision-language model on an OpenAI-compatible server.

    Args:
        client (`ChatClient`): The server and its model.
        num_frames (`int`), max_pixels (`int`): Frames shown, evenly spaced, and pixels of each.
    """

    def __init__(self, client: ChatClient, *, num_frames: int = 8, max_pixels: int = 448 * 448) -> None:
        self.client, self.num_frames, self.max_pixels = client, num_frames, max_pixels

    @property
    def name(self) -> str:
        return (
            f"server:v{CAPTION_VERSION}:{self.client.model}:prompt={text_hash(SYSTEM, QUESTION)}:"
            f"frames={self.num_frames},pixels={self.max_pixels}"
        )

    def __call__(self, videos: Sequence[str]) -> list[str]:
        """
        One caption for each file; an empty one where the model gives none.

        Raises:
            ChatUnavailableError: The server cannot be used at all.
        """
        replies = self.client.ask_all([partial(self._question, video) for video in videos])
        return ["" if isinstance(reply, ChatError) else reply.answer.caption for reply in replies]

    def _question(self, video: str) -> ChatQuestion[Caption]:
        frames, seconds = _frames(video, self.num_frames, self.max_pixels, 2)
        return ChatQuestion(_question(seconds), Caption, list(frames), SYSTEM)


class QwenCaptioner:
    """
    Qwen2.5-VL or Qwen3-VL in this process, without sampling.

    Args:
        model (`str`): Folder or repository id.
        num_frames (`int`), max_pixels (`int`): As of [`ServerCaptioner`].
        max_tokens (`int`): Longest caption.
        options: Of `QwenVL`: `device`, `dtype`, `revision`.
    """

    def __init__(
        self, model: str, *, num_frames: int = 8, max_pixels: int = 448 * 448, max_tokens: int = 200, **options: Any
    ) -> None:
        from ..judges.qwen_vl_model import QwenVL

        self.vlm = QwenVL.load(model, **options)
        self.num_frames, self.max_pixels, self.max_tokens = num_frames, max_pixels, max_tokens

    @cached_property
    def name(self) -> str:
        from ..judges.weights import weights_identity

        return (
            f"qwen-vl:v{CAPTION_VERSION}:weights={weights_identity(self.vlm.folder)}:"
            f"prompt={text_hash(SYSTEM, QUESTION)}:frames={self.num_frames},pixels={self.max_pixels}"
        )

    def __call__(self, videos: Sequence[str]) -> list[str]:
        return [self._caption(video) for video in videos]

    def _caption(self, video: str) -> str:
        try:
            frames, seconds = _frames(video, self.num_frames, self.max_pixels, self.vlm.multiple)
        except VideoDecodeError:
            return ""
        patches = self.vlm.patches(frames, seconds)
        return self.vlm.answer(patches, _question(seconds), system=SYSTEM, max_new_tokens=self.max_tokens)


def _frames(video: str, num_frames: int, max_pixels: int, multiple: int) -> tuple[Frames, NDArray[np.float64]]:
    """Frames to show, uint8 `(T, H, W, 3)`, and their times in seconds, `(T,)`."""
    frames, indices = sample_frames(
        video, num_frames, evenly_spaced, lambda h, w: size_within(h, w, max_pixels, multiple)
    )
    return frames, indices / frame_rate(video, 16.0)


def _question(seconds: NDArray[np.float64]) -> str:
    return QUESTION.format(count=len(seconds), seconds=", ".join(f"{time:.2f}" for time in seconds))


def load_captioner(name: str, options: dict[str, Any]) -> ServerCaptioner | QwenCaptioner:
    """
    Makes a captioner.

    Args:
        name (`str`): `"http://host:8000/v1"` (needs the option `model`), or a folder or repository id of a Qwen-VL.
        options (`dict`): Of its class; those of `ChatClient` for a server.

    Raises:
        ValueError: No such model, or an option missing or unknown.
    """
    try:
        if name.startswith(("http://", "https://")):
            shown = {key: options[key] for key in ("num_frames", "max_pixels") if key in options}
            rest = {key: value for key, value in options.items() if key not in shown}
            return ServerCaptioner(ChatClient(name, **rest), **shown)
        return QwenCaptioner(name, **options)
    except TypeError as error:
        raise ValueError(f"captioner {name!r}: {error}. Check `captioner_options`.") from error


def check_captioner(name: str, options: dict[str, Any]) -> None:
    """
    Finds what `load_captioner` would stumble over, without reading weights or asking a server.

    Raises:
        ValueError: As `load_captioner`.
    """
    if name.startswith(("http://", "https://")):
        load_captioner(name, options)
    else:
        resolve_weights(name, options.get("revision"), ["config.json"])
