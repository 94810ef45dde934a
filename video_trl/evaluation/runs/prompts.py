"""Read the prompts of an evaluation: text for the model, text for the judge, and groups for the table."""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...files import fingerprint, read_csv, read_json, read_json_lines


ALL = "all"  # the group of all prompts
_TEXT_COLUMNS = ("prompt", "caption")
_OPTIONAL_COLUMNS = ("generation_prompt", "category", "groups", "image")


@dataclass(frozen=True)
class EvaluationPrompt:
    """
    One sentence of a benchmark.

    Attributes:
        text (`str`): What the judge reads and tables show. Distinct within an evaluation.
        generation_text (`str`, *optional*): What the model is given instead, such as a longer version of the sentence.
        category (`str`, *optional*): What the report can be filtered by: an action, a law, a state of matter.
        groups (`tuple[str, ...]`, *optional*): Subsets that the prompt counts in; they may overlap, none is `all`.
        image (`str`, *optional*): Path of the first frame, for image-to-video models.
    """

    text: str
    generation_text: str | None = None
    category: str = ""
    groups: tuple[str, ...] = ()
    image: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if value not in (None, "", ())}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "EvaluationPrompt":
        return cls(**{**values, "groups": tuple(values.get("groups", ()))})


def check_prompts(prompts: Sequence[EvaluationPrompt | str]) -> tuple[EvaluationPrompt, ...]:
    """
    Prompts as [`EvaluationPrompt`], in the order given.

    Raises:
        ValueError: If there is none, one is blank or stands there twice (its videos would count twice), or a group is
            called `all`.
    """
    checked = tuple(EvaluationPrompt(prompt) if isinstance(prompt, str) else prompt for prompt in prompts)
    if not checked:
        raise ValueError("An evaluation needs at least one prompt, got none.")
    blank = [number for number, prompt in enumerate(checked) if not prompt.text.strip()]
    if blank:
        raise ValueError(f"Prompts must not be blank, but number {blank[0]} (from 0) of {len(checked)} is.")
    repeated = [text for text, count in Counter(prompt.text for prompt in checked).items() if count > 1]
    if repeated:
        raise ValueError(
            f"{len(repeated)} prompts stand there more than once and would count more than once, the first being "
            f"{repeated[0]!r}. Remove the copies; for several videos of a prompt pass several seeds."
        )
    if any(ALL in prompt.groups for prompt in checked):
        raise ValueError(f"The group {ALL!r} holds every prompt by itself; give a group of yours another name.")
    return checked


def prompts_hash(prompts: Sequence[EvaluationPrompt]) -> str:
    """Hash of the prompts with all that belongs to them, and of their order: 32 hexadecimal digits."""
    return fingerprint([prompt.to_dict() for prompt in prompts])


def load_prompts(path: str | os.PathLike[str]) -> tuple[EvaluationPrompt, ...]:
    """
    Reads a file of prompts by its ending.

    - `.txt`: a prompt on each line; blank lines are left out.
    - `.csv`: a column `prompt` (or `caption`); quoted cells may hold commas, quotes and newlines. Optional columns:
      `generation_prompt`, `category`, `groups` (separated by semicolons), `image`.
    - `.json`, `.jsonl`: a list of strings or of objects with these keys, or one of them on each line; `groups` may be
      a list.

    Blanks around a prompt are no part of it. A relative path of an image starts at the folder of the file.

    Args:
        path (path): The file, in UTF-8.

    Returns:
        `tuple[EvaluationPrompt, ...]`: The prompts in the order of the file.

    Raises:
        ValueError: If the file is missing, has another ending, cannot be read, or its prompts are blank or repeated.
    """
    path = Path(path)
    readers = {".txt": _read_lines, ".csv": _read_csv, ".json": _read_json, ".jsonl": _read_json_lines}
    if path.suffix.lower() not in readers:
        raise ValueError(f"Expected a file of prompts ending in {', '.join(readers)}; got {path}.")
    rows = readers[path.suffix.lower()](path)
    try:
        return check_prompts([_prompt(row, path.absolute().parent) for row in rows])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _read_lines(path: Path) -> list[Any]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # a prompt may hold other line separators
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as a text file in UTF-8 ({error}).") from error
    return [line.strip() for line in lines if line.strip()]


def _read_json(path: Path) -> list[Any]:
    content = read_json(path)
    if not isinstance(content, list):
        raise ValueError(f"{path}: expected a list of prompts, got {type(content).__name__}.")
    return content


def _read_json_lines(path: Path) -> list[Any]:
    return [value for _, value in read_json_lines(path)]


def _read_csv(path: Path) -> list[Any]:
    return [{**row, "groups": row.get("groups", "").split(";")} for row in read_csv(path)]


def _prompt(row: Any, folder: Path) -> EvaluationPrompt:
    if isinstance(row, str):
        return EvaluationPrompt(row.strip())
    text = next((row[name] for name in _TEXT_COLUMNS if name in row), None) if isinstance(row, dict) else None
    if not isinstance(text, str):
        entry = sorted(row) if isinstance(row, dict) else type(row).__name__
        raise ValueError(
            f"Expected a text, or an entry 'prompt' (or 'caption') with a text, beside {', '.join(_OPTIONAL_COLUMNS)}"
            f"; got {entry}."
        )
    groups = row.get("groups") or ()
    groups = groups.split(";") if isinstance(groups, str) else groups
    if not isinstance(groups, list | tuple) or not all(isinstance(group, str) for group in groups):
        raise ValueError(
            f"Expected the groups of {text!r} as a list of texts, or one with semicolons; got {groups!r}."
        )
    return EvaluationPrompt(
        text=text.strip(),
        generation_text=str(row.get("generation_prompt") or "").strip() or None,
        category=row.get("category") or "",
        groups=tuple(group.strip() for group in groups if group.strip()),
        image=str(folder / row["image"]) if row.get("image") else None,
    )
