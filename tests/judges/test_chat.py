"""Structured questions over real HTTP, to a server that answers well and to one that does not."""

import base64
import email.utils
import io
import json
import logging
import time
from typing import Literal

import numpy as np
import pytest
from PIL import Image
from pydantic import BaseModel, ConfigDict

from tests.support.judges.server import Step, free_port, serving
from tests.support.tiny import tiny_video
from video_trl.judges.chat import ChatClient, ChatError, ChatQuestion, ChatUnavailableError


KEY = "sk-very-secret-0123456789"
IMAGE = tiny_video(0)[0]


class Colour(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    colour: Literal["red", "blue"]
    share: int


RED = {"colour": "red", "share": 3}
ASK = ChatQuestion("Which colour?", Colour, [IMAGE, IMAGE], "Look closely.")


def _client(server, **options):
    return ChatClient(server.url, "tiny-vlm", **({"backoff": 0.01, "timeout": 5.0} | options))


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


def test_the_request_is_what_every_server_understands():
    with serving(Step(RED)) as server:
        reply = _client(server, max_tokens=77, extra_body={"seed": 1}).ask(ASK)
        body = server.requests[0]
    assert reply.answer == Colour(**RED) and (reply.requests, reply.model) == (1, "tiny-vlm-0123")
    assert json.loads(reply.text) == RED
    assert server.paths == ["/v1/chat/completions"]
    assert (body["model"], body["temperature"], body["max_tokens"], body["seed"]) == ("tiny-vlm", 0.0, 77, 1)
    schema = body["response_format"]["json_schema"]
    assert body["response_format"]["type"] == "json_schema" and schema["strict"] is True
    assert schema["schema"]["properties"]["colour"]["enum"] == ["red", "blue"]
    assert schema["schema"]["additionalProperties"] is False
    system, user = body["messages"]
    assert system == {"role": "system", "content": "Look closely."}
    assert [part["type"] for part in user["content"]] == ["image_url", "image_url", "text"]
    head, data = user["content"][0]["image_url"]["url"].split(",")
    assert head == "data:image/jpeg;base64"
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
    assert shown.shape == IMAGE.shape and np.abs(shown.astype(int) - IMAGE).mean() < 8


@pytest.mark.parametrize(
    "fault",
    [
        Step(status=500, body=b"oops"),
        Step(status=503, body=b""),
        Step(status=429, body=b"slow down"),
        Step(fault="disconnect"),
        Step(RED, fault="cut"),
        Step(body=b"<html>bad gateway</html>"),
        Step(body=b"[1, 2]"),
        Step(status=200, body=b"\xff\xfe"),
        Step(RED, headers={"Content-Encoding": "gzip"}),
    ],
    ids=["500", "503", "429", "disconnect", "cut", "html", "list", "bytes", "not gzip"],
)
def test_passing_faults_are_tried_again(fault):
    with serving(fault, fault, Step(RED)) as server:
        assert _client(server).ask(ASK).requests == 3


def test_a_slow_server_is_given_up_and_tried_again():
    with serving(Step(RED, delay=20.0), Step(RED)) as server:
        start = time.monotonic()
        assert _client(server, timeout=0.5).ask(ASK).requests >= 2
        assert time.monotonic() - start < 15


def test_a_server_that_drips_bytes_is_given_up():
    """Each byte comes in time, the reply never would."""
    with serving(Step(RED, fault="drip"), Step(RED)) as server:
        start = time.monotonic()
        assert _client(server, timeout=0.5).ask(ASK).requests >= 2
        assert time.monotonic() - start < 8  # of the twelve that the whole reply takes


def test_back_off_grows_and_varies():
    with serving(Step(status=500)) as server:
        with pytest.raises(ChatError, match="gave up after 4 tries; the last: status 500"):
            _client(server, max_retries=3, backoff=0.1).ask(ASK)
        waits = np.diff(server.times)
    assert len(waits) == 3
    for wait, mean in zip(waits, (0.1, 0.2, 0.4), strict=True):
        assert 0.5 * mean <= wait < 1.5 * mean + 1


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_retry_after_is_honoured(form):
    # A date has whole seconds: two ahead is between one and two from now.
    value = "0.4" if form == "seconds" else email.utils.formatdate(time.time() + 2, usegmt=True)
    with serving(Step(status=429, headers={"Retry-After": value}), Step(RED)) as server:
        _client(server, backoff=30.0).ask(ASK)
        wait = np.diff(server.times)[0]
    assert 0.39 <= wait < 3


def test_a_senseless_retry_after_is_ignored():
    with serving(Step(status=429, headers={"Retry-After": "soon"}), Step(RED)) as server:
        assert _client(server).ask(ASK).requests == 2


@pytest.mark.parametrize(
    ("bad", "complaint"),
    [
        (Step("the ball is red"), "Invalid JSON"),
        (Step('{"colour": "red", "sha'), "Invalid JSON"),
        (Step({"colour": "green", "share": 3}), "colour: Input should be 'red' or 'blue'"),
        (Step({"colour": "red"}), "share: Field required"),
        (Step({"colour": "red", "share": 3, "extra": 1}), "extra: Extra inputs"),
        (Step({"colour": "red", "share": "3"}), "share: Input should be a valid integer"),
        (Step(""), "an empty answer"),
        (Step(RED, finish="length"), "cut off at `max_tokens`"),
        (Step(refusal="I cannot judge people."), "refused: I cannot judge people."),
        (Step(body=b'{"error": "x"}'), "without `choices"),
    ],
)
def test_an_invalid_answer_is_shown_to_the_model_once_and_then_recorded(bad, complaint):
    with serving(bad, Step(RED)) as server:
        reply = _client(server).ask(ASK)
        assert reply.answer == Colour(**RED) and reply.requests == 2
        *_, said, asked = server.requests[1]["messages"]
        assert said["role"] == "assistant" and complaint in asked["content"]
    with serving(bad) as server:
        with pytest.raises(ChatError, match="no valid answer in 2 requests") as caught:
            _client(server).ask(ASK)
        assert complaint in str(caught.value) and not isinstance(caught.value, ChatUnavailableError)


@pytest.mark.parametrize("fence", ["```json\n{}\n```", "```\n{}\n```", "\n {} \n"])
def test_json_in_a_code_block_counts(fence):
    with serving(Step(fence.replace("{}", json.dumps(RED)))) as server:
        assert _client(server).ask(ASK).answer == Colour(**RED)


@pytest.mark.parametrize("status", [401, 403, 404, 302])
def test_a_server_that_refuses_everything_is_not_asked_again(status):
    step = Step(status=status, body=b"no", headers={"Location": "http://127.0.0.1:1/"})
    with serving(step) as server:
        with pytest.raises(ChatUnavailableError, match=rf"status {status} \(no\).*`base_url`"):
            _client(server).ask(ASK)
        assert len(server.requests) == 1


def test_a_refused_request_is_an_error_of_that_question():
    with serving(Step(status=400, body=b"At most 4 images")) as server:
        with pytest.raises(ChatError, match="status 400 .At most 4 images.*fewer or smaller images") as caught:
            _client(server).ask(ASK)
        assert not isinstance(caught.value, ChatUnavailableError) and len(server.requests) == 1


def test_an_unreachable_server_is_named_after_all_tries():
    client = ChatClient(f"http://127.0.0.1:{free_port()}/v1", "m", max_retries=2, backoff=0.01)
    with pytest.raises(ChatUnavailableError, match=r"127\.0\.0\.1.*gave up after 3 tries.*cannot connect.*running"):
        client.ask(ASK)


def test_an_endless_reply_is_refused():
    with serving(Step(body=b" " * (9 << 20))) as server, pytest.raises(ChatError, match="more than 8 MB"):
        _client(server).ask(ASK)


def test_the_key_is_sent_and_never_shown(caplog, monkeypatch):
    echo = json.dumps({"error": f"Incorrect API key provided: {KEY}"}).encode()
    with caplog.at_level(logging.DEBUG), serving(Step(status=500, body=echo), Step(status=401, body=echo)) as server:
        client = _client(server, api_key=KEY)
        with pytest.raises(ChatUnavailableError, match=r"Incorrect API key provided: \*\*\*") as caught:
            client.ask(ASK)
        assert server.headers_seen[0]["Authorization"] == f"Bearer {KEY}"
    with caplog.at_level(logging.DEBUG), serving(Step(refusal=f"your key is {KEY}")) as server:
        with pytest.raises(ChatError) as other:
            _client(server, api_key=KEY).ask(ASK)
    assert len(caplog.records) > 2
    for text in (caplog.text, str(caught.value), str(other.value), repr(client), str(vars(client.__class__))):
        assert KEY not in text
    monkeypatch.setenv("VIDEO_TRL_API_KEY", "from-environment")
    with serving(Step(RED)) as server:
        _client(server).ask(ASK)
        assert server.headers_seen[0]["Authorization"] == "Bearer from-environment"


def test_a_key_from_a_file_may_end_in_a_newline_but_not_hold_one():
    with serving(Step(RED)) as server:
        _client(server, api_key=f"{KEY}\n").ask(ASK)
        assert server.headers_seen[0]["Authorization"] == f"Bearer {KEY}"
        for key in (f"{KEY}\nX-Other: 1", f"{KEY}\u00e9"):
            with pytest.raises(ValueError, match="no HTTP header may hold") as caught:
                _client(server, api_key=key)
            assert KEY not in str(caught.value)


# ---- many questions -------------------------------------------------------------------------------------------------


def test_many_questions_keep_their_order_and_the_limit():
    with serving(Step(RED, delay=0.15)) as server:
        client = _client(server, concurrency=3)
        made = []

        def make(index):
            made.append((index, len(server.requests)))
            return ChatQuestion(f"Question {index}", Colour, [IMAGE])

        replies = client.ask_all([lambda i=i: make(i) for i in range(12)])
        asked = [request["messages"][0]["content"][-1]["text"] for request in server.requests]
    assert all(reply.answer == Colour(**RED) for reply in replies)
    assert server.busiest == 3 and sorted(asked) == sorted(f"Question {i}" for i in range(12))
    assert max(index - answered for index, answered in made) <= 3  # questions are made when their turn comes


def test_one_bad_question_leaves_the_others_alone():
    with serving(Step(RED), Step(status=400, body=b"too large"), Step(RED)) as server:
        replies = _client(server, concurrency=1).ask_all([lambda: ASK] * 3)
    assert [isinstance(reply, ChatError) for reply in replies] == [False, True, False]


def test_a_dead_server_stops_everything():
    with serving(Step(status=401, body=b"no")) as server:
        with pytest.raises(ChatUnavailableError):
            _client(server, concurrency=2).ask_all([lambda: ASK] * 50)
        assert len(server.requests) < 10


@pytest.mark.parametrize(
    ("url", "options", "message"),
    [
        ("localhost:8000/v1", {}, "like 'http://localhost:8000/v1'"),
        ("ftp://host/v1", {}, "like 'http://localhost:8000/v1'"),
        ("http://user:sekret@host/v1", {}, "without user and password"),
        ("http://host/v1", {"timeout": 0}, "must be positive"),
        ("http://host/v1", {"concurrency": 0}, "must be positive"),
        ("http://host/v1", {"max_retries": -1}, ">= 0"),
    ],
)
def test_settings_out_of_range(url, options, message):
    with pytest.raises(ValueError, match=message) as caught:
        ChatClient(url, "m", **options)
    assert "sekret" not in str(caught.value)
