"""
The pairs that SimpleTuner's Flow-DPO trains on: two datasets of one dataloader configuration.

The layout (https://github.com/bghira/SimpleTuner, documentation/experimental/FLOW_DPO.md): a JSON list of datasets.
One of type `video` holds the preferred videos and names others in `conditioning_data`; those with the conditioning
type `reference_strict` hold the rejected ones, under equal names.
"""

import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ...files import read_json
from ..folders import caption_at, files_below, stem_below, videos_in
from .imported import Imported, common_names, with_readable_videos


logger = logging.getLogger(__name__)

_REJECTED = "reference_strict"
_STRATEGIES = ("textfile", "filename", "instanceprompt")
# Options that change captions, which an import has no place for.
_CAPTION_OPTIONS = ("caption_shuffle", "caption_filter_list")

Backend = Mapping[str, Any]


def read_simpletuner(config: str | os.PathLike[str]) -> Imported:
    """
    Pairs, or groups where several datasets hold rejected videos, for `VideoDPOTrainer` and `VideoGroupDPOTrainer`.

    Of a text file with several lines, which SimpleTuner draws from, the first is the prompt.

    Args:
        config (`str` or `Path`): The dataloader configuration, such as `multidatabackend.json`. Relative folders in it
            start at its own folder or, where they are not there, at the working directory.

    Returns:
        [`Imported`]: Rows with `prompt`, `chosen`, `rejected` and `provenance`.

    Raises:
        ValueError: If it is no such configuration, has no pair of datasets, one that is not a folder of videos on this
            machine, or captions of another kind than `textfile`, `filename` and `instanceprompt`; or if no row is
            left.
    """
    path = Path(config)
    if not path.is_file():
        raise ValueError(
            f"Expected SimpleTuner's dataloader configuration, such as multidatabackend.json, got {path}, which is no "
            "file."
        )
    backends = _backends(path)
    pairs = [
        (backend, rejected) for backend in backends.values() if (rejected := _rejected_of(backend, backends, path))
    ]
    if not pairs:
        raise ValueError(
            f"{path}: expected a dataset of type 'video' with `conditioning_data` that names one of the type "
            f"'conditioning' and the conditioning type {_REJECTED!r}, found none among {sorted(backends)}."
        )
    if len({len(rejected) for _, rejected in pairs}) > 1:
        raise ValueError(
            f"{path}: expected the same number of rejected datasets for each preferred one, got "
            f"{ {backend['id']: len(rejected) for backend, rejected in pairs} }. Import them one by one."
        )
    imported = Imported()
    sources = [_source(backend, rejected, path) for backend, rejected in pairs]

    def rows() -> Iterator[tuple[str, dict[str, Any]]]:
        for source in sources:
            yield from _rows(*source, imported)

    return with_readable_videos(rows(), imported, sum(len(videos) for _, _, videos, _ in sources))


def _backends(path: Path) -> dict[str, Backend]:
    """Datasets that are not switched off, by their names."""
    content = read_json(path)
    listed = content if isinstance(content, list) else [content]
    entries = [entry for entry in listed if isinstance(entry, Mapping) and isinstance(entry.get("id"), str)]
    if len(entries) < len(listed):
        raise ValueError(f"{path}: expected a list of datasets with an `id` each, as SimpleTuner reads it.")
    used = [entry for entry in entries if not (entry.get("disabled") or entry.get("disable"))]
    twice = sorted({entry["id"] for entry in used if sum(other["id"] == entry["id"] for other in used) > 1})
    if twice:
        raise ValueError(f"{path}: several datasets have the `id` {twice}.")
    return {entry["id"]: entry for entry in used}


def _rejected_of(backend: Backend, backends: Mapping[str, Backend], path: Path) -> list[Backend]:
    named = backend.get("conditioning_data") or []
    if backend.get("dataset_type", "image") == "conditioning" or not named:
        return []
    names = [named] if isinstance(named, str) else named
    unknown = [name for name in names if name not in backends]
    if unknown:
        raise ValueError(
            f"{path}: `conditioning_data` of {backend['id']!r} names {unknown}; there are {sorted(backends)}."
        )
    others = [name for name in names if backends[name].get("conditioning_type") != _REJECTED]
    if others:
        logger.warning("%s: %s are no rejected videos and are left out: no trainer here has masks.", path, others)
    return [backends[name] for name in names if name not in others]


def _source(
    backend: Backend, rejected: list[Backend], path: Path
) -> tuple[Backend, Path, list[Path], list[dict[str, Path]]]:
    """A preferred dataset, its folder and videos, and the videos of each rejected one by their names."""
    if backend.get("dataset_type", "image") != "video":
        raise ValueError(f"{path}: {backend['id']!r} has images, and the trainers here take videos.")
    strategy = backend.get("caption_strategy")
    if strategy not in _STRATEGIES:
        raise ValueError(
            f"{path}: `caption_strategy` of {backend['id']!r} is {strategy!r}; expected one of {list(_STRATEGIES)}. "
            "Write NAME.txt beside each video."
        )
    if strategy == "instanceprompt" and not backend.get("instance_prompt"):
        raise ValueError(f"{path}: `caption_strategy` of {backend['id']!r} needs an `instance_prompt`.")
    prompt = backend.get("instance_prompt")
    if prompt is not None and not isinstance(prompt, str):
        raise ValueError(
            f"{path}: `instance_prompt` of {backend['id']!r} is {prompt!r:.80}; expected one text. SimpleTuner draws "
            "from a list anew in every step: choose one in a copy of the file."
        )
    changed = [name for name in _CAPTION_OPTIONS if _is_on(backend.get(name))]
    if changed:
        raise ValueError(f"{path}: {backend['id']!r} has {changed}, which change captions. Take them out.")
    folder = _folder(backend, path)
    videos = videos_in(files_below(folder))
    if not videos:
        raise ValueError(f"{path}: {backend['id']!r} has no video in {folder}.")
    others = [(root := _folder(other, path), videos_in(files_below(root))) for other in rejected]
    return backend, folder, videos, [{stem_below(video, root): video for video in found} for root, found in others]


def _is_on(option: Any) -> bool:
    return bool(option.get("enable", False) if isinstance(option, Mapping) else option)


def _folder(backend: Backend, path: Path) -> Path:
    said = backend.get("instance_data_dir")
    if backend.get("type", "local") != "local" or not isinstance(said, str) or not said:
        raise ValueError(
            f"{path}: {backend['id']!r} is of the type {backend.get('type')!r}; expected 'local' with an "
            "`instance_data_dir`. Copy its videos into a folder."
        )
    places = [path.absolute().parent / said, Path(said).absolute()]
    found = next((place for place in places if place.is_dir()), None)
    if found is None:
        raise ValueError(
            f"{path}: `instance_data_dir` of {backend['id']!r} is {said}, and there is no such folder here "
            f"({common_names([str(place) for place in dict.fromkeys(places)])}). Correct it in a copy of the file."
        )
    return found


def _rows(
    backend: Backend, folder: Path, videos: list[Path], rejected: list[dict[str, Path]], imported: Imported
) -> Iterator[tuple[str, dict[str, Any]]]:
    for video in videos:
        name = stem_below(video, folder)
        place = f"{backend['id']}, {name}"
        others = [found[name] for found in rejected if name in found]
        prompt = _prompt(backend, video, folder)
        if len(others) < len(rejected):
            imported.skip(place, "a rejected video of that name is missing")
        elif not prompt:
            imported.skip(place, f"there is no caption in {video.with_suffix('.txt').name} beside it")
        else:
            paths = [str(other) for other in others]
            yield (
                place,
                {
                    "prompt": prompt,
                    "chosen": str(video),
                    "rejected": paths[0] if len(paths) == 1 else paths,
                    "provenance": f"SimpleTuner, {backend['id']}",
                },
            )


def _prompt(backend: Backend, video: Path, folder: Path) -> str:
    instance = str(backend.get("instance_prompt") or "").strip()
    if backend["caption_strategy"] == "instanceprompt" or backend.get("only_instance_prompt"):
        return instance
    if backend["caption_strategy"] == "filename":
        caption = video.stem.replace("_", " ").strip()
    else:
        file = video.with_suffix(".txt")
        lines = ((caption_at(file, folder) if file.is_file() else None) or "").splitlines()
        caption = " ".join(lines if backend.get("disable_multiline_split") else lines[:1]).strip()
    return f"{instance} {caption}" if backend.get("prepend_instance_prompt") and caption and instance else caption
