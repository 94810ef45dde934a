"""Ask an OpenAI-compatible server about text and images; the answer is validated against a schema."""

import base64
import email.utils
import io
import logging
import os
import random
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import httpx2
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel

from .answers import AnswerError, read_answer


logger = logging.getLogger(__name__)

Answer = TypeVar("Answer", bound=BaseModel)

API_KEY_VARIABLE = "VIDEO_TRL_API_KEY"
_RETRIED = {408, 409, 425, 429, 500, 502, 503, 504}  # the server may do better in a moment
_HOPELESS = {401, 403, 404, 405}  # every other question would fail in the same way
_LONGEST_WAIT = 60.0  # seconds between two tries, whatever the server asks for
_LARGEST_REPLY = 8 * 2**20  # bytes


class ChatError(RuntimeError):
    """A question got no valid answer; the message says how many tries were made and what the last one gave."""


class InvalidAnswerError(ChatError):
    """The model answered, and never with what was asked for."""


class ChatUnavailableError(ChatError):
    """The server cannot be used at all: not reachable, key refused, or no such model or address."""


class _TryAgain(Exception):
    """A try failed in a way that may pass; `wait` is what the server asked for, in seconds."""

    def __init__(self, reason: str, wait: float | None = None, unreachable: bool = False) -> None:
        super().__init__(reason)
        self.wait, self.unreachable = wait, unreachable


@dataclass(frozen=True)
class ChatQuestion(Generic[Answer]):
    """
    What to ask.

    Attributes:
        text (`str`): The question.
        answer (`type[pydantic.BaseModel]`): What to answer with. Its JSON schema goes to the server, and the reply is
            validated against it here, since servers do not enforce every part of a schema.
        images (`Sequence[numpy.ndarray]`): uint8 `(H, W, 3)` images, shown before the text.
        system (`str`): System message; none if empty.
    """

    text: str
    answer: type[Answer]
    images: Sequence[NDArray[np.uint8]] = ()
    system: str = ""


@dataclass(frozen=True)
class Reply(Generic[Answer]):
    """
    A valid answer and where it comes from.

    Attributes:
        answer (`pydantic.BaseModel`): The validated answer.
        text (`str`): As the model wrote it.
        model (`str`): The model that the server says it used.
        requests (`int`): HTTP requests that it took, retries and repairs included.
    """

    answer: Answer
    text: str
    model: str
    requests: int


class ChatClient:
    """
    Client of an OpenAI-compatible server (vLLM, SGLang, llama.cpp, a commercial one). May be used from many threads.

    Transport errors, timeouts and the statuses 408, 409, 425, 429 and 500 to 504 are tried again after an exponential
    back-off with jitter, or after what `Retry-After` says (at most a minute). A reply that is no valid answer is shown
    to the model with what is wrong, for another try.

    Args:
        base_url: address up to and including the version, such as `"http://localhost:8000/v1"`.
        model: the model's name on the server.
        api_key: sent as bearer token, and removed from every message; the environment variable VIDEO_TRL_API_KEY.
        timeout: seconds that one request may take in all.
        max_retries: further tries of a request that failed.
        max_repairs: further tries for a valid answer.
        backoff: seconds before the first retry, on average; doubled each time.
        concurrency: requests under way at once in `ask_all`.
        max_tokens: longest answer.
        temperature: of the sampling; 0 for the likeliest answer.
        extra_body: further fields of the request, such as `{"chat_template_kwargs": {"enable_thinking": False}}`.

    Raises:
        ValueError: an address that is no http(s) URL or holds a password, a number out of range, or a key that no HTTP
            header may hold.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        api_key: str | None = None,
        timeout: float = 120.0,
        max_retries: int = 5,
        max_repairs: int = 1,
        backoff: float = 1.0,
        concurrency: int = 8,
        max_tokens: int = 1024,
        temperature: float = 0.0,
        extra_body: dict[str, Any] | None = None,
    ) -> None:
        url = httpx2.URL(base_url)
        if url.scheme not in ("http", "https") or not url.host or url.userinfo:
            public_url = url.copy_with(username="", password="") if url.userinfo else base_url
            raise ValueError(
                f"Expected `base_url` like 'http://localhost:8000/v1', without user and password, got "
                f"{str(public_url)!r}. A key goes into `api_key` or the environment variable {API_KEY_VARIABLE}."
            )
        if not (timeout > 0 and backoff > 0 and concurrency >= 1 and max_tokens >= 1):
            raise ValueError(
                f"`timeout`, `backoff`, `concurrency` and `max_tokens` must be positive, got {timeout}, {backoff}, "
                f"{concurrency} and {max_tokens}."
            )
        if max_retries < 0 or max_repairs < 0:
            raise ValueError(f"`max_retries` and `max_repairs` must be >= 0, got {max_retries} and {max_repairs}.")
        self.base_url, self.model = base_url.rstrip("/"), model
        self.timeout, self.max_retries, self.max_repairs, self.backoff = timeout, max_retries, max_repairs, backoff
        self.concurrency, self.max_tokens, self.temperature = concurrency, max_tokens, temperature
        self.extra_body = dict(extra_body or {})
        self._api_key = (api_key or os.environ.get(API_KEY_VARIABLE, "")).strip()
        if not (self._api_key.isascii() and self._api_key.isprintable()):
            raise ValueError(
                f"The API key (`api_key` or {API_KEY_VARIABLE}) has characters that no HTTP header may hold."
            )
        headers = {"Authorization": f"Bearer {self._api_key}"} if self._api_key else {}
        limits = httpx2.Limits(max_connections=concurrency, max_keepalive_connections=concurrency)
        patience = httpx2.Timeout(timeout, connect=min(timeout, 10.0))
        self._http = httpx2.Client(headers=headers, timeout=patience, limits=limits)  # follows no redirect

    def __repr__(self) -> str:
        return f"ChatClient({self.base_url!r}, {self.model!r})"

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def ask(self, question: ChatQuestion[Answer]) -> Reply[Answer]:
        """
        Ask one question.

        Raises:
            ChatUnavailableError: the server cannot be reached, or refuses the key, the model or the address.
            InvalidAnswerError: no valid answer after all repairs.
            ChatError: no answer after all retries.
        """
        content: list[dict[str, Any]] = [
            {"type": "image_url", "image_url": {"url": image_url(image)}} for image in question.images
        ]
        content.append({"type": "text", "text": question.text})
        messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
        if question.system:
            messages.insert(0, {"role": "system", "content": question.system})
        requests, fault = 0, ""
        for _ in range(self.max_repairs + 1):
            body, tries = self._request(messages, question.answer)
            requests += tries
            text, fault = _text_of(body)
            if not fault:
                try:
                    answer = read_answer(text, question.answer)
                    return Reply(answer, text, str(body.get("model") or self.model), requests)
                except AnswerError as error:
                    fault = str(error)
            fault = self._redact(fault)
            logger.debug("%s: invalid answer (%s)", self, fault)
            complaint = f"That was no valid answer ({fault}). Answer with JSON of the schema only."
            reply_text = text or "(no answer)"  # some servers refuse an empty message
            messages = [
                *messages,
                {"role": "assistant", "content": reply_text},
                {"role": "user", "content": complaint},
            ]
        raise InvalidAnswerError(
            f"{self.base_url} ({self.model}): no valid answer in {requests} requests; the last: {fault}."
        )

    def ask_all(self, questions: Iterable[Callable[[], ChatQuestion[Answer]]]) -> list[Reply[Answer] | ChatError]:
        """
        Ask many questions, at most `concurrency` at once.

        Args:
            questions: functions that make the questions, called when their turn comes, so that the images of few
                questions are in memory at once.

        Returns:
            For each question, in order, its reply or the `ChatError` that it ended with.

        Raises:
            ChatUnavailableError: from any question; those not yet begun are not asked.
            Exception: what a function that makes a question raises.
        """

        def one(make: Callable[[], ChatQuestion[Answer]]) -> Reply[Answer] | ChatError:
            try:
                return self.ask(make())
            except ChatUnavailableError:
                raise
            except ChatError as error:
                return error

        pool = ThreadPoolExecutor(self.concurrency)
        try:
            return list(pool.map(one, questions))
        finally:
            pool.shutdown(cancel_futures=True)

    def _request(self, messages: list[dict[str, Any]], answer: type[BaseModel]) -> tuple[dict[str, Any], int]:
        """The server's reply and the number of tries."""
        schema = {"name": answer.__name__, "schema": answer.model_json_schema(), "strict": True}
        body = {
            "model": self.model,
            "messages": messages,
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
            "response_format": {"type": "json_schema", "json_schema": schema},
        } | self.extra_body
        for attempt in range(self.max_retries + 1):
            try:
                return self._post(body), attempt + 1
            except _TryAgain as error:
                reason = self._redact(str(error))
                if attempt == self.max_retries:
                    kind = ChatUnavailableError if error.unreachable else ChatError
                    hint = " Is the server running, and is this its address?" if error.unreachable else ""
                    tries = f"{attempt + 1} {'try' if attempt == 0 else 'tries'}"
                    raise kind(
                        f"{self.base_url} ({self.model}): gave up after {tries}; the last: {reason}.{hint}"
                    ) from None
                wait = self.backoff * 2**attempt * random.uniform(0.5, 1.5) if error.wait is None else error.wait
                logger.debug("%s: %s; next try in %.1f s", self, reason, wait)
                time.sleep(min(wait, _LONGEST_WAIT))
        raise AssertionError("unreachable")

    def _post(self, body: dict[str, Any]) -> dict[str, Any]:
        """One try."""
        deadline = time.monotonic() + self.timeout
        data = bytearray()
        try:
            with self._http.stream("POST", f"{self.base_url}/chat/completions", json=body) as response:
                for chunk in response.iter_bytes():
                    data += chunk
                    if time.monotonic() > deadline:  # the client's own timeout restarts with every byte
                        raise _TryAgain(f"no complete reply within {self.timeout:g} s")
                    if len(data) > _LARGEST_REPLY:
                        raise ChatError(f"{self.base_url}: a reply of more than {_LARGEST_REPLY >> 20} MB.")
        except httpx2.ConnectError as error:
            raise _TryAgain(f"cannot connect ({error})", unreachable=True) from None
        except httpx2.TimeoutException as error:
            unreachable = isinstance(error, httpx2.ConnectTimeout)
            raise _TryAgain(f"no reply within {self.timeout:g} s", unreachable=unreachable) from None
        except httpx2.TransportError as error:
            raise _TryAgain(f"the connection broke ({error or type(error).__name__})") from None
        except httpx2.DecodingError as error:
            raise _TryAgain(f"a reply that cannot be decoded ({error})") from None
        if response.status_code != 200:
            self._raise_for_status(response, bytes(data))
        try:
            reply = httpx2.Response(200, content=bytes(data)).json()
        except ValueError:
            raise _TryAgain("status 200 with a body that is no JSON") from None
        if not isinstance(reply, dict):
            raise _TryAgain(f"status 200 with a JSON {type(reply).__name__} instead of an object")
        return reply

    def _raise_for_status(self, response: httpx2.Response, data: bytes) -> None:
        status = response.status_code
        body = self._redact(" ".join(data.decode("utf-8", "replace").split()))[:300]
        reason = f"status {status}" + (f" ({body})" if body else "")
        if status in _RETRIED:
            raise _TryAgain(reason, wait=_retry_after(response.headers.get("Retry-After")))
        if status in _HOPELESS or 300 <= status < 400:
            way_out = f"Check `base_url`, `model`, and `api_key` or the environment variable {API_KEY_VARIABLE}."
            raise ChatUnavailableError(f"{self.base_url} ({self.model}): {reason}. {way_out}")
        raise ChatError(
            f"{self.base_url} ({self.model}): {reason}. The server refuses this request: fewer or smaller images, a "
            "larger context, or a server with `response_format` of type `json_schema` may help."
        )

    def _redact(self, text: str) -> str:
        """Servers repeat a wrong key in their error messages."""
        return text.replace(self._api_key, "***") if self._api_key else text


def image_url(image: NDArray[np.uint8]) -> str:
    """uint8 `(H, W, 3)` -> a `data:` URL with a JPEG of quality 90."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, format="JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode("ascii")


def _text_of(reply: dict[str, Any]) -> tuple[str, str]:
    """The text of a reply and what is wrong with it (empty if nothing)."""
    try:
        choice = reply["choices"][0]
        message = choice["message"]
        text, refusal, end = message.get("content"), message.get("refusal"), choice.get("finish_reason")
    except (KeyError, IndexError, TypeError, AttributeError):
        return "", "a reply without `choices[0].message`"
    if refusal:
        return "", f"the model refused: {refusal}"
    if isinstance(text, list):  # parts, of which some servers make even a text
        parts = (part.get("text") for part in text if isinstance(part, dict))
        text = "".join(part for part in parts if isinstance(part, str))
    if not isinstance(text, str) or not text.strip():
        return "", "an empty answer"
    if end == "length":
        return text, "the answer was cut off at `max_tokens`"
    return text, ""


def _retry_after(value: str | None) -> float | None:
    """Seconds, from seconds or a date; None where the header is absent or makes no sense."""
    if value is None:
        return None
    try:
        return max(float(value), 0.0)
    except ValueError:
        pass
    try:
        return max(email.utils.parsedate_to_datetime(value).timestamp() - time.time(), 0.0)
    except ValueError:
        return None
