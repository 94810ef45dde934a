"""Ask an OpenAI-compatible server about text and images; the answer is validated against a schema."""

import asyncio
import base64
import email.utils
import importlib.util
import io
import json
import logging
import os
import random
import re
import time
import zlib
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, NoReturn, TypeVar

import httpx2
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel

from ..files import fingerprint
from .answers import AnswerError, read_answer


if TYPE_CHECKING:
    from openai import AsyncOpenAI

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
Answer = TypeVar("Answer", bound=BaseModel)

API_KEY_VARIABLE = "VIDEO_TRL_API_KEY"
_RETRIED = {408, 409, 425, 429, *range(500, 600)} - {501, 505}  # the server may do better in a moment
_HOPELESS = {401, 403, 404, 405}  # every other question will most likely fail in the same way
_REFUSALS = 5  # of that kind, with no answer before, and the server is not asked on
_LONGEST_WAIT = 60.0  # seconds between two tries, whatever the server asks for
_SENSELESS_WAIT = 86400.0  # a server that asks for more than a day has no clock, or no sense
_LARGEST_REPLY = 8 * 2**20  # bytes, unpacked
# What a server needs. The client would add what it finds in variables for OpenAI's own service (organization, project,
# any header), and describe this machine.
_SENT_HEADERS = {"host", "accept", "content-type", "content-length", "user-agent", "connection"}


class ChatError(RuntimeError):
    """A question got no valid answer; the message says how many tries were made and what the last one gave."""


class InvalidAnswerError(ChatError):
    """The model answered, and never with what was asked for."""


class ChatUnavailableError(ChatError):
    """The server cannot be used at all: not reachable, key refused, or no such model or address."""


class ChatRefusedError(ChatUnavailableError):
    """The server is there and refuses the key, the model or the address."""


class _TryAgain(Exception):
    """A try failed in a way that may pass; `wait` is what the server asked for, in seconds."""

    def __init__(self, reason: str, wait: float | None = None, unreachable: bool = False) -> None:
        super().__init__(reason)
        self.wait, self.unreachable = wait, unreachable


class _UnsupportedError(Exception):
    """The server does not know parameters that can be left out."""

    def __init__(self, names: set[str]) -> None:
        super().__init__(names)
        self.names = names


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


class _BoundedClient(httpx2.AsyncClient):
    """Sends the headers that a server needs and no others, and reads no more than `_LARGEST_REPLY`, packed or not."""

    def __init__(self, own_headers: dict[str, str], **options: Any) -> None:
        super().__init__(**options)
        self._own_headers = own_headers

    async def send(self, request: httpx2.Request, **options: Any) -> httpx2.Response:
        headers = httpx2.Headers({name: request.headers[name] for name in _SENT_HEADERS & set(request.headers)})
        headers |= {"Accept-Encoding": "identity", **self._own_headers}
        asked = httpx2.Request(request.method, request.url, headers=headers, stream=request.stream)
        response = await super().send(asked, **options | {"stream": True})
        content = bytearray()
        try:
            async for chunk in response.aiter_raw():
                content += chunk
                if len(content) > _LARGEST_REPLY:
                    break
        finally:
            await response.aclose()
        headers = httpx2.Headers(response.headers)
        if len(content) <= _LARGEST_REPLY and (packing := headers.pop("Content-Encoding", "identity")) != "identity":
            content = _unpacked(content, packing)
        if len(content) > _LARGEST_REPLY:
            raise _TryAgain(f"a reply of more than {_LARGEST_REPLY >> 20} MB")
        return httpx2.Response(response.status_code, headers=headers, content=bytes(content), request=request)


def _unpacked(content: bytearray, packing: str) -> bytearray:
    """Unpacks what a server packed unasked, up to a byte more than is read."""
    if packing.lower() not in ("gzip", "x-gzip", "deflate"):
        raise _TryAgain(f"a reply packed as {packing[:40]!r}, for which nobody asked")
    unpacker = zlib.decompressobj(zlib.MAX_WBITS | 32)  # gzip or zlib, as its first bytes say
    try:
        return bytearray(unpacker.decompress(content, _LARGEST_REPLY + 1))
    except zlib.error as error:
        raise _TryAgain(f"a reply that cannot be decoded ({error})") from None


class ChatClient:
    """
    Client of an OpenAI-compatible server (vLLM, SGLang, llama.cpp, a commercial one). May be used from many threads.
    It is the package `openai` (extra `remote`), held to a deadline and a size for each request.

    Transport errors, timeouts, unreadable or endless replies and the statuses 408, 409, 425, 429 and 5xx are tried
    again after an exponential back-off with jitter, or after what `Retry-After` says (at most a minute). A reply that
    is no valid answer is shown to the model with what is wrong, for another try. A server that refuses `max_tokens` or
    `temperature`, as OpenAI's reasoning models do, is asked with `max_completion_tokens`, or without a temperature.

    Args:
        base_url: address up to and including the version, such as `"http://localhost:8000/v1"`.
        model: the model's name on the server.
        api_key: sent as bearer token, and removed from every message; the environment variable VIDEO_TRL_API_KEY.
        timeout: seconds that one request may take in all, whatever the server does meanwhile.
        max_retries: further tries of a request that failed.
        max_repairs: further tries for a valid answer.
        backoff: seconds before the first retry, on average; doubled each time.
        concurrency: requests under way at once in `ask_all`.
        max_tokens: longest answer.
        temperature: of the sampling; 0 for the likeliest answer.
        extra_body: further fields of the request, such as `{"chat_template_kwargs": {"enable_thinking": False}}`.

    Raises:
        ValueError: an address that is no http(s) URL or holds a password, a number out of range, a key that no HTTP
            header may hold, or the package `openai` is not installed.
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
        if importlib.util.find_spec("openai") is None:
            raise ValueError("A model behind a server needs the package openai: pip install 'video-trl[remote]'.")
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
        # Parameters that the server has refused, or that somebody has set under their other name.
        self._unsupported = {"max_tokens"} if "max_completion_tokens" in self.extra_body else set()
        self._context = httpx2.create_ssl_context()  # tens of milliseconds

    @property
    def sampling(self) -> str:
        """How answers are drawn, for the identity of what asks: the temperature, and a hash of further fields."""
        further = f",body={fingerprint(self.extra_body)[:16]}" if self.extra_body else ""
        return f"temperature={self.temperature:g}{further}"

    def __repr__(self) -> str:
        return f"ChatClient({self.base_url!r}, {self.model!r})"

    def ask(self, question: ChatQuestion[Answer]) -> Reply[Answer]:
        """
        Ask one question.

        Raises:
            ChatUnavailableError: the server cannot be reached, or refuses the key, the model or the address.
            InvalidAnswerError: no valid answer after all repairs.
            ChatError: no answer after all retries.
        """
        (reply,) = _run(self._ask_all([lambda: question]))
        if isinstance(reply, ChatError):
            raise reply
        return reply

    def ask_all(self, questions: Iterable[Callable[[], ChatQuestion[Answer]]]) -> list[Reply[Answer] | ChatError]:
        """
        Ask many questions, at most `concurrency` at once.

        Args:
            questions: functions that make the questions, called when their turn comes, so that the images of few
                questions are in memory at once.

        Returns:
            For each question, in order, its reply or the `ChatError` that it ended with. After one that could not
            reach the server those not yet begun are not asked and end with the same error.

        Raises:
            ChatUnavailableError: the server cannot be used: no question was answered, and one got this error.
            Exception: what a function that makes a question raises.
        """
        replies = _run(self._ask_all(questions))
        unavailable = [reply for reply in replies if isinstance(reply, ChatUnavailableError)]
        if unavailable and not any(isinstance(reply, Reply) for reply in replies):
            raise unavailable[0]
        return replies

    async def _ask_all(
        self, questions: Iterable[Callable[[], ChatQuestion[Answer]]]
    ) -> list[Reply[Answer] | ChatError]:
        replies: dict[int, Reply[Answer] | ChatError] = {}
        turns = enumerate(questions)
        gone: list[ChatError] = []  # after these it is of no use to ask on
        refused: list[ChatError] = []  # nor after some of these without any answer
        answered = False

        async def one(make: Callable[[], ChatQuestion[Answer]]) -> Reply[Answer] | ChatError:
            if gone or (len(refused) >= _REFUSALS and not answered):
                return (gone or refused)[0]
            try:
                return await self._ask(client, await asyncio.to_thread(make))
            except ChatError as error:
                return error

        async def work() -> None:
            nonlocal answered
            for number, make in turns:
                reply = replies[number] = await one(make)
                if isinstance(reply, ChatUnavailableError):
                    (refused if isinstance(reply, ChatRefusedError) else gone).append(reply)
                answered = answered or isinstance(reply, Reply)

        async with self._client() as client:
            await asyncio.gather(*(work() for _ in range(self.concurrency)))
        return [replies[number] for number in sorted(replies)]

    async def _ask(self, client: "AsyncOpenAI", question: ChatQuestion[Answer]) -> Reply[Answer]:
        content: list[dict[str, Any]] = [
            {"type": "image_url", "image_url": {"url": image_url(image)}} for image in question.images
        ]
        content.append({"type": "text", "text": question.text})
        messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
        if question.system:
            messages.insert(0, {"role": "system", "content": question.system})
        requests, fault = 0, ""
        for _ in range(self.max_repairs + 1):
            body, tries = await self._request(client, messages, question.answer)
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

    def _client(self) -> "AsyncOpenAI":
        """A client for one event loop."""
        from openai import AsyncOpenAI

        headers = {"Authorization": f"Bearer {self._api_key}"} if self._api_key else {}
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=self.concurrency)
        return AsyncOpenAI(
            api_key="none",  # an empty one, and it would look for OpenAI's
            base_url=self.base_url,
            max_retries=0,
            timeout=httpx2.Timeout(None, connect=min(self.timeout, 10.0)),  # the deadline is in `_post`
            http_client=_BoundedClient(headers, verify=self._context, limits=limits),
        )

    async def _request(
        self, client: "AsyncOpenAI", messages: list[dict[str, Any]], answer: type[BaseModel]
    ) -> tuple[dict[str, Any], int]:
        """The server's reply and the number of tries."""
        schema = {"name": answer.__name__, "schema": answer.model_json_schema(), "strict": True}
        fields = {
            "model": self.model,
            "messages": messages,
            "response_format": {"type": "json_schema", "json_schema": schema},
        }
        failed = tries = 0
        while True:
            tries += 1
            limit = "max_completion_tokens" if "max_tokens" in self._unsupported else "max_tokens"
            optional = {limit: self.max_tokens, "temperature": self.temperature}
            optional = {name: value for name, value in optional.items() if name not in self._unsupported}
            try:
                return await self._post(client, fields | optional), tries
            except _UnsupportedError as error:
                self._unsupported |= error.names
                logger.warning("%s refuses %s; asking without.", self, " and ".join(sorted(error.names)))
            except _TryAgain as error:
                reason = self._redact(str(error))
                if failed == self.max_retries:
                    kind = ChatUnavailableError if error.unreachable else ChatError
                    hint = " Is the server running, and is this its address?" if error.unreachable else ""
                    raise kind(
                        f"{self.base_url} ({self.model}): gave up after {tries} {'try' if tries == 1 else 'tries'}; "
                        f"the last: {reason}.{hint}"
                    ) from None
                wait = self.backoff * 2**failed * random.uniform(0.5, 1.5) if error.wait is None else error.wait
                failed += 1
                logger.debug("%s: %s; next try in %.1f s", self, reason, wait)
                await asyncio.sleep(min(wait, _LONGEST_WAIT))

    async def _post(self, client: "AsyncOpenAI", fields: dict[str, Any]) -> dict[str, Any]:
        """One try."""
        import openai

        try:
            # Not the client's own timeout, which starts again with every byte, and with every header of status 1xx.
            request = client.chat.completions.with_raw_response.create(**fields, extra_body=self.extra_body)
            raw = await asyncio.wait_for(request, self.timeout)
        except asyncio.TimeoutError:  # not the built-in one before Python 3.11
            raise _TryAgain(f"no reply within {self.timeout:g} s") from None
        except openai.APIStatusError as error:
            self._raise_for_status(error.response, fields)
        except openai.APIConnectionError as error:  # timeouts too
            cause = error.__cause__
            if isinstance(cause, _TryAgain):  # of the transport below, which older clients take for a connection's
                raise cause from None
            if isinstance(cause, httpx2.ConnectError | httpx2.ConnectTimeout):
                reason = f"cannot connect ({cause or type(cause).__name__})"
                raise _TryAgain(reason, unreachable=True) from None
            raise _TryAgain(f"the connection broke ({cause or type(cause).__name__})") from None
        try:
            reply = _without_surrogates(json.loads(raw.http_response.content))
        except (ValueError, RecursionError):
            raise _TryAgain("status 200 with a body that is no JSON") from None
        if not isinstance(reply, dict):
            raise _TryAgain(f"status 200 with a JSON {type(reply).__name__} instead of an object")
        return reply

    def _raise_for_status(self, response: httpx2.Response, sent: Mapping[str, Any]) -> NoReturn:
        status, body = response.status_code, response.content.decode("utf-8", "replace")
        shown = self._redact(" ".join(body.split()))[:300]
        reason = f"status {status}" + (f" ({shown})" if shown else "")
        if status in _RETRIED:
            raise _TryAgain(reason, wait=_retry_after(response.headers.get("Retry-After")))
        if status in _HOPELESS or 300 <= status < 400:
            way_out = f"Check `base_url`, `model`, and `api_key` or the environment variable {API_KEY_VARIABLE}."
            raise ChatRefusedError(f"{self.base_url} ({self.model}): {reason}. {way_out}")
        refused = {name for name in ("max_tokens", "temperature") if name in sent and f"'{name}'" in body}
        if refused and re.search("unsupported|not support", body, re.IGNORECASE):
            raise _UnsupportedError(refused)
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
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, OverflowError):
            return None
    return max(seconds, 0.0) if seconds < _SENSELESS_WAIT else None  # None for NaN too


def _without_surrogates(value: Any) -> Any:
    """JSON can hold halves of characters, which no file and no request can."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, list):
        return [_without_surrogates(item) for item in value]
    return {key: _without_surrogates(item) for key, item in value.items()} if isinstance(value, dict) else value


def _run(coroutine: Coroutine[Any, Any, Result]) -> Result:
    """Waits for a coroutine, also where an event loop runs already, as in a notebook."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(coroutine)
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, coroutine).result()
