"""Check every row of an encoded dataset before the first step: what is there, of which shape, and finite."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from diffusers import ModelMixin
from torch import Tensor
from tqdm.auto import tqdm

from ...data import EncodedDataset
from ...data.columns import MapDataset, as_tensor, fingerprint_of
from ...data.encoding.processes import first_on_each_machine
from ...files import fingerprint, read_json, write_json
from ...models import ModelFamily
from ...models.base import FRAME_RATE


logger = logging.getLogger(__name__)

_VERSION = 2  # of what is looked at
_LATENTS = {"video": ("latents",), "preference": ("chosen_latents", "rejected_latents")}
_LATENTS["group"] = _LATENTS["preference"]

Shape = tuple[int, ...]


@dataclass(frozen=True)
class RowForms:
    """
    The shapes of all rows of a dataset.

    Attributes:
        forms (`list[dict]`): Each distinct one: under `"latents"` the shapes of the row's videos, the only or chosen
            one first; under the other columns that of their tensor.
        form_of (`list[int]`): Which of them each row has.
        twins (`list[int]`): Rows in which a rejected video is the chosen one.
    """

    forms: list[dict[str, Any]]
    form_of: list[int]
    twins: list[int]


def check_encoded_rows(
    dataset: MapDataset,
    row_type: str,
    transformer: ModelMixin,
    family: ModelFamily,
    *,
    max_sequence_length: int,
    cache_dir: Path,
) -> list[Shape]:
    """
    Check all rows of an encoded dataset against each other and against the transformer.

    Args:
        dataset (`MapDataset`): The rows. Of an `EncodedDataset` the index is read; all
            others are read once, and what was found is kept under the dataset's fingerprint, where it has one.
        row_type (`str`): `"video"`, `"preference"` or `"group"`.
        transformer (`ModelMixin`): The policy.
        family ([`ModelFamily`]): Of the transformer.
        max_sequence_length (`int`): Tokens to which prompts will be padded.
        cache_dir (`Path`): Where it is kept.

    Returns:
        `list[tuple[int, ...]]`: Shape `(C, F, H, W)` of the latents in each row.

    Raises:
        ValueError: Names the row, its column, what was expected and what is there.
    """
    columns = [name for name in family.row_columns if name != FRAME_RATE or not isinstance(dataset, EncodedDataset)]
    found = _known_forms(dataset, row_type, columns, cache_dir)
    number_of: dict[int, int] = {}  # the first row of each form
    for number, form in enumerate(found.form_of):
        number_of.setdefault(form, number)
    first = found.forms[found.form_of[0]]
    beside: dict[Shape, dict[str, Any]] = {}
    for form, number in sorted(number_of.items(), key=lambda pair: pair[1]):
        shapes = found.forms[form]
        try:
            _check_form(shapes, first, transformer, family, max_sequence_length)
            same = beside.setdefault(tuple(shapes["latents"][0]), shapes)
            for name in family.image_columns:
                if same[name] != shapes[name]:
                    raise ValueError(
                        f"expected '{name}' of shape {tuple(same[name])} as in rows with the same latents, got "
                        f"{tuple(shapes[name])}. Encode all rows with one pipeline."
                    )
        except ValueError as error:
            raise ValueError(f"Row {number}: {error}") from error
    if found.twins:
        logger.warning(
            "In %d rows a rejected video is the chosen one (the first is row %d). Nothing is learned from such a "
            "pair; drop them with `dataset.filter`.",
            len(found.twins),
            found.twins[0],
        )
    of_forms = [tuple(form["latents"][0]) for form in found.forms]  # one object a form, however many rows have it
    return [of_forms[form] for form in found.form_of]


def _check_form(
    shapes: Mapping[str, Any],
    first: Mapping[str, Any],
    transformer: ModelMixin,
    family: ModelFamily,
    max_sequence_length: int,
) -> None:
    latents = [tuple(shape) for shape in shapes["latents"]]
    if len(set(latents)) > 1:
        raise ValueError(f"expected latents of one shape (C, F, H, W), got {sorted(set(latents))}.")
    if len(latents) != len(first["latents"]):
        raise ValueError(f"expected {len(first['latents']) - 1} rejected videos as in row 0, got {len(latents) - 1}.")
    family.check_latents(transformer, latents[0])
    prompt_tokens = shapes["prompt_embeds"][0]
    if prompt_tokens > max_sequence_length:
        raise ValueError(
            f"prompt embeddings of {prompt_tokens} tokens, expected at most {max_sequence_length} "
            "(`max_sequence_length`). Raise it or encode the prompts again."
        )
    expected = family.condition_shapes(transformer, latents[0], prompt_tokens)
    for name in shapes.keys() & expected.keys():
        ours, theirs = expected[name], tuple(shapes[name])
        # The number of tokens is a matter of the prompt or of the image encoder; their width is the transformer's.
        whole = name in family.image_columns and name.endswith("latents")
        if len(ours) != len(theirs) or ours[-1:] != theirs[-1:] or (whole and ours != theirs):
            raise ValueError(
                f"expected '{name}' of shape {ours if whole else ('...', ours[-1])} for this transformer, got "
                f"{theirs}. Encode the rows with the pipeline that is trained."
            )
    # What padding would refuse, which for some families is every length but one.
    prompt = {name: torch.empty(shapes[name], device="meta") for name in family.prompt_columns}
    family.pad_prompts([prompt], max_sequence_length)


# ---- Shapes of rows ----


def _known_forms(dataset: MapDataset, row_type: str, columns: Sequence[str], cache_dir: Path) -> RowForms:
    if isinstance(dataset, EncodedDataset):  # its writer has looked whether all numbers are finite
        forms = [
            {"latents": [form["video"]] if row_type == "video" else [form["chosen"], *form["rejected"]]}
            | {name: form[name] for name in columns}
            for form in dataset.forms
        ]
        return RowForms(forms, dataset.index.form_of(), dataset.index.twins())
    identity = fingerprint_of(dataset)
    if identity is None:
        return _read_all(dataset, row_type, columns)
    path = cache_dir / "checked" / f"{fingerprint(_VERSION, identity, row_type, list(columns), len(dataset))}.json"

    def look() -> str:
        if not path.is_file():
            found = _read_all(dataset, row_type, columns)
            write_json(path, {"forms": found.forms, "form_of": found.form_of, "twins": found.twins})
        return path.name

    first_on_each_machine(look)
    return RowForms(**read_json(path))


def _read_all(dataset: MapDataset, row_type: str, columns: Sequence[str]) -> RowForms:
    if isinstance(dataset, datasets.Dataset) and dataset.format["type"] is None:
        names = {*_LATENTS[row_type], *columns} & {*dataset.column_names}
        dataset = dataset.select_columns(sorted(names)).with_format("numpy")  # many times as fast as lists
    twins: list[int] = []
    shapes = []
    for number in tqdm(range(len(dataset)), desc="Checking encoded rows", delay=2):
        row = dataset[number]
        videos = _videos(row, row_type, number)
        shapes.append(
            {"latents": [list(video.shape) for video in videos]}
            | {name: list(_tensor(row, name, number).shape) for name in columns}
        )
        if any(torch.equal(videos[0], rejected) for rejected in videos[1:]):
            twins.append(number)
    return _gather(shapes, len(dataset), twins)


def _videos(row: Mapping[str, Any], row_type: str, number: int) -> list[Tensor]:
    """Latents of the row's videos, the only or chosen one first."""
    names = _LATENTS[row_type]
    chosen = _tensor(row, names[0], number)
    if row_type == "video":
        return [chosen]
    rejected = _tensor(row, names[1], number)
    if rejected.ndim != chosen.ndim + 1:
        raise ValueError(
            f"Row {number}: expected '{names[1]}' of shape (m, C, F, H, W) beside '{names[0]}' of shape "
            f"{tuple(chosen.shape)}, got {tuple(rejected.shape)}."
        )
    return [chosen, *rejected.unbind()]


def _tensor(row: Mapping[str, Any], name: str, number: int) -> Tensor:
    value = row.get(name)
    if value is None:
        raise ValueError(f"Row {number}: expected a value in column '{name}', got none. Encode the row, or drop it.")
    try:
        tensor = as_tensor(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"Row {number}: expected numbers of one shape in column '{name}': {error}") from error
    if not torch.isfinite(tensor).all():
        raise ValueError(
            f"Row {number}: column '{name}' holds numbers that are not finite. Encode the row again, in float32, or "
            "drop it."
        )
    if name == FRAME_RATE and not (tensor > 0).all():
        raise ValueError(f"Row {number}: expected a positive number in column '{name}', got {tensor.tolist()}.")
    return tensor


def _gather(shapes: Sequence[dict[str, Any]], number: int, twins: list[int]) -> RowForms:
    assert len(shapes) == number, (len(shapes), number)
    forms: dict[str, int] = {}
    distinct: list[dict[str, Any]] = []
    form_of = []
    for each in shapes:
        key = repr(each)
        if key not in forms:
            forms[key] = len(forms)
            distinct.append(each)
        form_of.append(forms[key])
    return RowForms(distinct, form_of, twins)
