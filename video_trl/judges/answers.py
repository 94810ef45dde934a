"""
Read the answer out of what a language model wrote: JSON of a schema, with whatever models put around it.

What stands in a reply may cost that reply, never another one: every fault is an [`AnswerError`].
"""

import ast
import json
import re
from collections.abc import Iterator
from typing import Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ValidationError


Answer = TypeVar("Answer", bound=BaseModel)

# Models that think aloud put the passage between marks; drafts of the answer may stand in it.
_THOUGHT = r"(?:seed:)?(?:think|thinking|thought|reasoning)"
_THOUGHT_BEGIN = re.compile(rf"<{_THOUGHT}>|\[THINK\]|◁think▷|<\|begin_of_thought\|>", re.IGNORECASE)
_THOUGHT_END = re.compile(rf"</{_THOUGHT}>|\[/THINK\]|◁/think▷|<\|end_of_thought\|>", re.IGNORECASE)
_SURROGATE = re.compile("[\ud800-\udfff]")
_MOST_TRIES = 64  # places in a text at which an object may begin
_OBJECT_BEGIN = re.compile(r"""\{\s*["'}]""")  # other brackets are prose
_BRACKETS = re.compile(r'"(?:\\.|[^"\\])*"|[{}]')  # and texts, in which brackets do not count
_LAST_COMMA = re.compile(r",(\s*[}\]])")
_LONGEST_LITERAL = 50_000  # characters


def _as_number(value: Any) -> Any:
    """Numbers in quotes as numbers, and whole ones as integers: 4.0, "4" and "4/5" are the rating 4; true is not 1."""
    if isinstance(value, bool):
        return str(value)
    text = value.strip() if isinstance(value, str) else value
    if isinstance(text, str):
        rating = re.fullmatch(r"([1-5])\s*(?:/|out of)\s*5", text)
        try:
            value = float(rating[1] if rating else text)
        except ValueError:
            return value
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _as_word(value: Any) -> Any:
    return value.strip().casefold() if isinstance(value, str) else value


def as_truth(value: Any) -> Any:
    """What models write in place of a truth value, as one; anything else as it is."""
    return {"true": True, "yes": True, "false": False, "no": False}.get(_as_word(value), value)


def with_texts(value: Any, *names: str) -> Any:
    """An answer with an empty text for each of these that it does not give as one; what is no object as it is."""
    if not isinstance(value, dict):
        return value
    return value | {name: value[name] if isinstance(value.get(name), str) else "" for name in names}


# What a schema can take before it looks: what models write in place of a number, a lower-case word, a truth value.
AsNumber, AsWord, AsTruth = BeforeValidator(_as_number), BeforeValidator(_as_word), BeforeValidator(as_truth)


class AnswerError(ValueError):
    """A text holds no valid answer; the message says what is wrong with it, for the model that gave it."""


def read_answer(text: str, schema: type[Answer]) -> Answer:
    """
    The answer in a model's reply.

    Read are: JSON alone; in a Markdown block; behind prose or a `<think>` passage; under one key of its own, such as
    "answer"; with a comma too many, or as Python writes it. Where there are several objects, the last valid one
    counts: models correct themselves. What stands within an object that is cut off, or within thoughts that have no
    end, is no answer.

    Args:
        text (`str`): What the model wrote.
        schema (`type[pydantic.BaseModel]`): What it was asked for.

    Raises:
        AnswerError: No such JSON is in the text.
    """
    text = _SURROGATE.sub("\ufffd", text)  # halves of characters, which no file and no server takes
    thoughts = list(_THOUGHT_END.finditer(text))
    text = text[thoughts[-1].end() :] if thoughts else text
    if endless := _THOUGHT_BEGIN.search(text):
        text = text[: endless.start()]
    fault: AnswerError | None = None
    for found in reversed(list(_objects(text))):
        inner = list(found.values()) if len(found) == 1 else []
        for candidate in (found, *(value for value in inner if isinstance(value, dict))):
            try:
                return _validated(candidate, schema)
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
            end = _end(text, place) if _OBJECT_BEGIN.match(text, place) else place + 1
            if end is None:
                return
            found = _literal(text[place:end])
            place = end
        if isinstance(found, dict):
            yield found


def _end(text: str, place: int) -> int | None:
    """Where the bracket at `place` is closed; `None` where the text ends before."""
    depth = 0
    for found in _BRACKETS.finditer(text, place):
        depth += {"{": 1, "}": -1}.get(found[0], 0)
        if depth == 0 and found[0] == "}":
            return found.end()
    return None


def _literal(text: str) -> Any:
    """What is JSON but for a comma too many, or an object of Python; `None` where it is neither."""
    text = text[:_LONGEST_LITERAL]
    try:
        return json.loads(_LAST_COMMA.sub(r"\1", text))
    except (ValueError, RecursionError):
        pass
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None


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
