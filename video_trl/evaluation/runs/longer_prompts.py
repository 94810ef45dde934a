"""
Give the model a longer sentence than the judge reads: from a table, or written by a chat model.

CogVideoX was trained on long captions, and VideoREPA (https://huggingface.co/papers/2505.23656, appendix D) therefore
has a language model write out the short sentences of VideoPhy. Tables and judges keep the short ones. Numbers of the
two settings do not compare.
"""

import csv
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from pydantic import BaseModel, ConfigDict, field_validator
from tqdm.auto import tqdm

from ...files import read_csv, write_atomically
from ...judges.chat import ChatClient, ChatError, ChatQuestion
from ...judges.frames import quoted
from .prompts import EvaluationPrompt


MAX_WORDS = 150  # what the writer is told; VideoREPA's number
_MOST_WORDS = 200  # what is taken from it
_SHORT = ("prompt", "caption")
_LONG = ("generation_prompt", "upsampled_caption", "detailed_prompt", "refined")
_AT_ONCE = 64  # sentences between two writes of the table

SYSTEM = "You write prompts for a text-to-video model. You answer with JSON only."
QUESTION = """This is a short description of a video: {prompt}

Write it out for somebody who knows nothing about the scene. Say plainly what the short text leaves to be understood:
where it takes place, which things there are and what they are made of, what happens in which order, what causes what,
and what is seen in the end. Keep everything that the short text says. Change nothing, explain nothing, use no
formulas, and leave open nothing that a viewer would have to reason out. One paragraph of plain sentences, fewer than
{words} words."""


class LongPrompt(BaseModel):
    """The answer."""

    model_config = ConfigDict(extra="ignore", strict=True, json_schema_extra={"additionalProperties": False})

    prompt: str

    @field_validator("prompt")
    @classmethod
    def _length(cls, text: str) -> str:
        words = len(text.split())
        if not 1 <= words <= _MOST_WORDS:
            raise ValueError(f"expected fewer than {MAX_WORDS} words, got {words}")
        return " ".join(text.split())


def write_longer_prompts(
    prompts: Sequence[EvaluationPrompt | str], client: ChatClient, path: str | os.PathLike[str]
) -> dict[str, str]:
    """
    Has a chat model write a longer sentence for each prompt, into a CSV file with the columns `prompt` and
    `generation_prompt`. What stands in the file stays; only what it lacks is asked for, and kept as it comes.

    Args:
        prompts (list of [`EvaluationPrompt`] or `str`): The short sentences.
        client ([`~video_trl.judges.ChatClient`]): The writer.
        path (path): The file.

    Returns:
        `dict[str, str]`: Longer sentence for each short one.

    Raises:
        ValueError: If the file holds something else, or the writer gave no valid answer for some: what it gave is in
            the file, and the call can be repeated.
        ChatUnavailableError: If the server cannot be used.
    """
    path = Path(path)
    known = read_longer_prompts(path) if path.exists() else {}
    texts = [(prompt if isinstance(prompt, str) else prompt.text).strip() for prompt in prompts]
    missing = [text for text in dict.fromkeys(texts) if text not in known]
    failed: list[str] = []
    for start in tqdm(range(0, len(missing), _AT_ONCE), desc="Writing prompts", unit="batch", disable=None):
        batch = missing[start : start + _AT_ONCE]
        for text, reply in zip(batch, client.ask_all([partial(_question, text) for text in batch]), strict=True):
            if isinstance(reply, ChatError):
                failed.append(f"{text!r}: {reply}")
            else:
                known[text] = reply.answer.prompt
        _write(path, known)
    if failed:
        raise ValueError(
            f"The writer gave no valid answer for {len(failed)} of {len(missing)} prompts, the first being "
            f"{failed[0]} The others are in {path}; give the command again, or write these by hand."
        )
    return known


def read_longer_prompts(path: str | os.PathLike[str]) -> dict[str, str]:
    """
    Longer sentence for each short one, from a CSV file with a column `prompt` (or `caption`) and a column
    `generation_prompt` (or `upsampled_caption`, `detailed_prompt`, `refined`). Of a sentence that stands there several
    times the first row counts.

    Raises:
        ValueError: If the file is missing, lacks a column, or a longer sentence is blank.
    """
    longer: dict[str, str] = {}
    for row in read_csv(path):
        short, long = (next((name for name in names if name in row), None) for names in (_SHORT, _LONG))
        if short is None or long is None:
            raise ValueError(
                f"{path}: expected a column {' or '.join(_SHORT)} and a column {' or '.join(_LONG)}, got {list(row)}."
            )
        if not row[long].strip():
            raise ValueError(f"{path}: the longer sentence of {row[short]!r} is blank.")
        longer.setdefault(row[short].strip(), row[long].strip())
    return longer


def with_longer_prompts(
    prompts: Sequence[EvaluationPrompt], longer: Mapping[str, str]
) -> tuple[EvaluationPrompt, ...]:
    """
    The prompts with the sentence that the model is given.

    Raises:
        ValueError: If one has none: a table of two settings would count neither.
    """
    missing = [prompt.text for prompt in prompts if prompt.text.strip() not in longer]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(prompts)} prompts have no longer sentence, the first being {missing[0]!r}. Write "
            "them (`--prompt_writer`), or add them to the file."
        )
    return tuple(replace(prompt, generation_text=longer[prompt.text.strip()]) for prompt in prompts)


def _question(text: str) -> ChatQuestion[LongPrompt]:
    return ChatQuestion(QUESTION.format(prompt=quoted(text), words=MAX_WORDS), LongPrompt, system=SYSTEM)


def _write(path: Path, longer: Mapping[str, str]) -> None:
    table = io.StringIO()
    writer = csv.writer(table)
    writer.writerow(["prompt", "generation_prompt"])
    writer.writerows(longer.items())
    write_atomically(path, table.getvalue())
