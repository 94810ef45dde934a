"""Judge videos with a vision-language model on an OpenAI-compatible server."""

from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, model_validator

from .answers import AsNumber, with_texts
from .base import Video
from .chat import ChatClient, ChatError, ChatQuestion
from .frames import check_request, evenly_spaced, frame_rate, quoted, sample_frames, size_within
from .weights import text_hash


class Verdict(BaseModel):
    """What the model has to answer; reasons come first, so that the ratings follow from them."""

    # The schema asks for these keys and no others; others in an answer change no rating.
    model_config = ConfigDict(extra="ignore", strict=True, json_schema_extra={"additionalProperties": False})

    description_of_video: str
    sa_reason: str
    sa: Annotated[Literal[1, 2, 3, 4, 5], AsNumber]
    pc_reason: str
    pc: Annotated[Literal[1, 2, 3, 4, 5], AsNumber]

    @model_validator(mode="before")
    @classmethod
    def _ratings_alone(cls, value: Any) -> Any:
        """An answer that gives ratings without reasons is one."""
        return with_texts(value, "description_of_video", "sa_reason", "pc_reason")


SYSTEM = (
    "You judge videos made by generative models. You look closely, frame by frame, and you are strict: most generated "
    "videos have faults. Answer with JSON only."
)
QUESTION = """These are {count} frames of one video, in order, at these seconds: {seconds}.

First describe what is to be seen, in one or two sentences. Then rate two things from 1 to 5.

sa (semantic adherence): does the video show what this caption says, with all its objects, attributes and actions?
Caption: {caption}
1 = nothing of it, 3 = about half, 5 = all of it.

pc (physical commonsense): do the things in the video move, change and touch as they would in the real world? Think of
gravity, inertia, collisions, solidity, fluids, conservation of mass, of things that appear, vanish or change shape.
Judge what is shown, whether or not it fits the caption.
1 = severe violations, 3 = clear but minor ones, 5 = none."""


class RemoteJudge:
    """
    Asks a vision-language model on a server for both ratings, in one structured request for each video.

    A rating r from 1 to 5 becomes the score (r - 1) / 4. A video for which the server gives no valid answer gets `sa`
    and `pc` of None and an `error`: never a made-up number. A server that cannot be used at all raises.

    Args:
        base_url: address up to and including the version, such as `"http://localhost:8000/v1"`.
        model: the model's name on the server.
        num_frames: frames shown, evenly spaced; the server must allow as many images for each prompt.
        max_pixels: of each frame; larger ones are made smaller.
        fps: frames per second of clips given as arrays; files know their own.
        options: of `ChatClient`: `api_key`, `timeout`, `max_retries`, `concurrency`, ...

    Raises:
        ValueError: a setting out of range.
    """

    version = 1  # goes up when equal settings would score differently

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        num_frames: int = 16,
        max_pixels: int = 448 * 448,
        fps: float = 16.0,
        **options: Any,
    ) -> None:
        if num_frames < 2 or max_pixels < 64 * 64 or not fps > 0:
            raise ValueError(
                f"Expected `num_frames` >= 2, `max_pixels` >= 4096 and `fps` > 0, got {num_frames}, {max_pixels} and "
                f"{fps}."
            )
        self.client = ChatClient(base_url, model, **options)
        self.name = f"remote-{model.rsplit('/', 1)[-1]}"
        self.num_frames, self.max_pixels, self.fps = num_frames, max_pixels, fps

    @property
    def identity(self) -> str:
        """
        The model's name, prompts and settings. The server's address is no part of it, and neither are weights that
        the server may have changed under the same name: give them another name when you do that.
        """
        prompts = text_hash(SYSTEM, QUESTION, str(Verdict.model_json_schema()), repr(self.client.extra_body))
        return (
            f"remote:v{self.version}:model={self.client.model}:prompts={prompts}:frames={self.num_frames},"
            f"pixels={self.max_pixels},fps={self.fps:g},temperature={self.client.temperature:g}"
        )

    def score(self, videos: Sequence[Video], prompts: Sequence[str]) -> list[dict[str, Any]]:
        """
        Scores each video; see `VideoJudge.score`.

        Returns:
            For each video `sa` and `pc` in [0, 1] and `raw`: the model's answer, its name and the number of requests.
            Where there is no valid answer: `sa` and `pc` None, `error` a sentence, and `raw` empty.

        Raises:
            ValueError: a request that cannot be answered, or a file that is no readable video.
            ChatUnavailableError: the server cannot be reached (after all retries), or refuses the key or the model,
                and none of these videos got an answer.
        """
        check_request(videos, prompts)
        pairs = zip(videos, prompts, strict=True)
        replies = self.client.ask_all([partial(self._question, video, prompt) for video, prompt in pairs])
        scores: list[dict[str, Any]] = []
        for reply in replies:
            if isinstance(reply, ChatError):
                scores.append({"sa": None, "pc": None, "error": str(reply), "raw": {}})
                continue
            raw = reply.answer.model_dump() | {"model": reply.model, "requests": reply.requests}
            scores.append({"sa": (reply.answer.sa - 1) / 4, "pc": (reply.answer.pc - 1) / 4, "raw": raw})
        return scores

    def _question(self, video: Video, prompt: str) -> ChatQuestion[Verdict]:
        frames, indices = sample_frames(
            video, self.num_frames, evenly_spaced, lambda h, w: size_within(h, w, self.max_pixels, multiple=2)
        )
        fps = frame_rate(video, self.fps)
        seconds = ", ".join(f"{index / fps:.2f}" for index in indices)
        text = QUESTION.format(count=len(frames), seconds=seconds, caption=quoted(prompt))
        return ChatQuestion(text, Verdict, list(frames), SYSTEM)
