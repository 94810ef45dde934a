"""
Read the answer out of what a language model wrote: JSON of a schema, with whatever models put around it.

What stands in a reply may cost that reply, never another one: every fault is an [`AnswerError`].
"""

import json
import re
from collections.abc import Iterator
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError


Answer = TypeVar("Answer", bound=BaseModel)

# Models that think aloud close the passage with one of these; drafts of the answer may stand before it.
_THOUGHT_END = re.compile(r"</(?:think|thinking|thought|reasoning)>|\[/THINK\]", re.IGNORECASE)
_SURROGATE = re.compile("[\ud800-\udfff]")
_MOST_TRIES = 64  # places in a text at which an object may begin


class AnswerError(ValueError):
    """A text holds no valid answer; the message says what is wrong with it, for the model that gave it."""


def read_answer(text: str, schema: type[Answer]) -> Answer:
    """
    The answer in a model's reply.

    Read are: JSON alone; in a Markdown block; behind prose or a `<think>` passage. Where there are several objects,
    the last valid one counts: models correct themselves.

    Args:
        text (`str`): What the model wrote.
        schema (`type[pydantic.BaseModel]`): What it was asked for.

    Raises:
        AnswerError: No such JSON is in the text.
    """
    text = _SURROGATE.sub("\ufffd", text)  # halves of characters, which no file and no server takes
    thoughts = list(_THOUGHT_END.finditer(text))
    text = text[thoughts[-1].end() :] if thoughts else text
    fault: AnswerError | None = None
    for found in reversed(list(_objects(text))):
        try:
            return _validated(found, schema)
        except AnswerError as error:
            fault = fault or error
    raise fault or AnswerError("answer: Invalid JSON: expected an object, got none that is whole")


def _objects(text: str) -> Iterator[dict[str, Any]]:
    """JSON objects in a text, outermost ones only, in order."""
    decoder = json.JSONDecoder()
    place = 0
    for _ in range(_MOST_TRIES):
        place = text.find("{", place)
        if place < 0:
            return
        try:
            found, place = decoder.raw_decode(text, place)
        except RecursionError:  # thousands of brackets: nothing behind them is worth looking at
            return
        except ValueError:
            place += 1
        else:
            yield found


def _validated(found: dict[str, Any], schema: type[Answer]) -> Answer:
    try:
        return schema.model_validate_json(_SURROGATE.sub("\ufffd", json.dumps(found, ensure_ascii=False)))
    except ValidationError as error:
        raise AnswerError(
            "; ".join(
                f"{'.'.join(map(str, fault['loc'])) or 'answer'}: {fault['msg']}"
                for fault in error.errors(include_url=False)[:5]
            )
        ) from None
    except RecursionError:
        raise AnswerError("answer: Invalid JSON: nested too deeply") from None
