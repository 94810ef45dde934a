"""Structured questions over real HTTP, to a server that answers well and to one that does not."""

import asyncio
import base64
import email.utils
import gzip
import io
import json
import logging
import random
import resource
import time
from dataclasses import replace
from typing import Literal

import numpy as np
import pytest
from PIL import Image
from pydantic import BaseModel, ConfigDict

from tests.support.judges.server import FAULTS, GOOD, GZIP, Step, free_port, serving
from tests.support.tiny import tiny_video
from video_trl.judges.chat import ChatClient, ChatError, ChatQuestion, ChatUnavailableError, Reply


logger = logging.getLogger(__name__)

KEY = "sk-very-secret-0123456789"
IMAGE = tiny_video(0)[0]


class Colour(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    colour: Literal["red", "blue"]
    share: int


RED = {"colour": "red", "share": 3}
ASK = ChatQuestion("Which colour?", Colour, [IMAGE, IMAGE], "Look closely.")


def peak_memory():
    """Bytes that this process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


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


# The model is not asked to repair what no model wrote; what it did write counts as one request of a repair.
@pytest.mark.parametrize("name", FAULTS)
def test_passing_faults_are_tried_again(name):
    step = replace(FAULTS[name], answer=RED) if FAULTS[name].answer is GOOD else FAULTS[name]
    with serving(step, step, Step(RED)) as server:
        assert _client(server, timeout=1.0, max_repairs=2).ask(ASK) == Reply(
            Colour(**RED), json.dumps(RED), "tiny-vlm-0123", 3
        )


@pytest.mark.parametrize("name", ["drip", "drip headers", "1xx", "dripped gzip", "endless", "gzip bomb"])
def test_no_reply_outlasts_its_deadline_or_its_size(name):
    """
    A byte, or a header, now and then: a timeout that each of them starts anew never ends. However busy the machine is,
    it is over before the server is, which goes on for a minute.
    """
    with serving(FAULTS[name]) as server:
        memory = peak_memory()
        with pytest.raises(ChatError, match="gave up after 1 try; the last: (no reply within 0.5 s|a reply of more)"):
            _client(server, timeout=0.5, max_retries=0).ask(ASK)
        assert name == "gzip bomb" or FAULTS[name] not in server.whole
        assert peak_memory() - memory < 200 * 2**20


def test_an_honest_packed_reply_counts():
    with serving(Step(body=gzip.compress(Step(RED).payload()), headers=GZIP)) as server:
        assert _client(server, max_retries=0).ask(ASK).answer == Colour(**RED)
        assert server.headers_seen[0]["Accept-Encoding"] == "identity"


def test_a_slow_server_is_given_up_and_tried_again():
    slow = Step(RED, delay=60.0)
    with serving(slow, Step(RED)) as server:
        assert _client(server, timeout=0.5).ask(ASK).requests >= 2
        assert slow not in server.whole


def test_a_server_that_drips_bytes_is_given_up():
    """Each byte comes in time, the reply never would."""
    with serving(Step(RED, fault="drip"), Step(RED)) as server:
        assert _client(server, timeout=0.5).ask(ASK).requests >= 2
        assert Step(RED, fault="drip") not in server.whole


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


def test_parameters_that_a_model_refuses_are_left_out_from_then_on():
    """The replies are those of OpenAI's reasoning models."""
    refusals = {
        "max_tokens": "Unsupported parameter: 'max_tokens' is not supported with this model. Use "
        "'max_completion_tokens' instead.",
        "temperature": "Unsupported value: 'temperature' does not support 0.0 with this model. Only the default (1) "
        "value is supported.",
    }

    def answer(body):
        for name, text in refusals.items():
            if name in body:
                error = {"message": text, "type": "invalid_request_error", "param": name, "code": "unsupported_value"}
                return Step(status=400, body=json.dumps({"error": error}).encode())
        return Step(RED)

    with serving(answer) as server:
        client = _client(server, max_tokens=77, max_retries=0, concurrency=2)
        assert all(isinstance(reply, Reply) for reply in client.ask_all([lambda: ASK] * 6))
        assert client.ask(ASK).requests == 1
    assert server.requests[-1]["max_completion_tokens"] == 77 and not refusals.keys() & server.requests[-1].keys()
    with serving(answer) as server:
        own = _client(server, extra_body={"max_completion_tokens": 5})
        assert own.ask(ASK).requests == 2 and server.requests[-1]["max_completion_tokens"] == 5


def test_other_refusals_that_name_a_parameter_stand():
    text = b"'max_tokens' is too large: 4096. This model's maximum context length is 2048 tokens."
    with serving(Step(status=400, body=text)) as server, pytest.raises(ChatError, match="maximum context length"):
        _client(server).ask(ASK)
    assert len(server.requests) == 1


def test_what_is_meant_for_openai_does_not_go_to_another_server(monkeypatch):
    for name in ("API_KEY", "ADMIN_KEY", "ORG_ID", "PROJECT_ID", "CUSTOM_HEADERS", "BASE_URL"):
        monkeypatch.setenv(f"OPENAI_{name}", f"Authorization: Bearer {KEY}\nX-Gateway: {KEY}" if "H" in name else KEY)
    with serving(Step(RED)) as server:
        _client(server).ask(ASK)
        headers = {name.lower(): value for name, value in server.headers_seen[0].items()}
    assert KEY not in str(headers)
    known = {"host", "accept", "accept-encoding", "content-type", "content-length", "user-agent", "connection"}
    assert headers.keys() <= known  # nothing about this machine either


def test_it_can_be_asked_where_an_event_loop_runs():
    async def cell():
        return _client(server).ask(ASK)

    with serving(Step(RED)) as server:
        assert asyncio.run(cell()).answer == Colour(**RED)


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'video-trl\[remote\]'"):
        ChatClient("http://localhost:1/v1", "m")


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


@pytest.mark.parametrize("status", [401, 403, 404, 405, 307])
def test_a_refusal_among_answers_costs_its_own_question(status):
    no = Step(status=status, body=b"not for this one", headers={"Location": "/"})
    with serving(Step(RED), no, no, no, Step(RED), no) as server:
        replies = _client(server, concurrency=1).ask_all([lambda: ASK] * 5)
    assert [isinstance(reply, Reply) for reply in replies] == [True, False, False, False, True]


def test_answers_of_a_server_that_goes_away_are_kept():
    def dies(body):
        if len(server.requests) == 2:
            server.shutdown()  # first: a socket that the server still waits on goes on listening for a moment
            server.server_close()
        return Step(RED) if len(server.requests) < 2 else Step(fault="disconnect")

    with serving(dies) as server:
        replies = _client(server, concurrency=1, max_retries=1).ask_all([lambda: ASK] * 50)
    assert [isinstance(reply, Reply) for reply in replies[:3]] == [True, True, False]
    assert all(isinstance(reply, ChatUnavailableError) for reply in replies[2:]) and len(replies) == 50


@pytest.mark.parametrize("number", [150, pytest.param(10_000, marks=pytest.mark.slow)])
def test_a_fifth_of_faulty_replies_costs_no_answer(number):
    """Faults of every kind, in any order; each question has an answer of its own."""
    dice = random.Random(0)

    def answer(body):
        if dice.random() < 0.2:
            return FAULTS[dice.choice(list(FAULTS))]
        text = next(message for message in body["messages"] if message["role"] == "user")["content"][-1]["text"]
        return Step({"colour": "blue", "share": int(text)})

    with serving(answer) as server:
        client = _client(server, timeout=1.0, max_retries=9, max_repairs=6, backoff=0.005, concurrency=24)
        start = time.monotonic()
        replies = client.ask_all([lambda i=i: ChatQuestion(str(i), Colour) for i in range(number)])
    wrong = [reply for i, reply in enumerate(replies) if not isinstance(reply, Reply) or reply.answer.share != i]
    logger.info(
        "%d questions, %d requests, %.1f s, %d wrong, peak memory %d MiB",
        number, len(server.requests), time.monotonic() - start, len(wrong), peak_memory() >> 20,
    )  # fmt: skip
    assert not wrong and len(replies) == number < len(server.requests)


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
