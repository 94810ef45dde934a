"""
The groups that the authors of PhyGDPO publish: real videos, three generated ones each, and a judge's scores.

The layout (https://github.com/caiyuanhao1998/PhyGDPO, PhyAugPipe):

    .../evaluated_score/train_part_0_14B_seed_0/final.csv   scores of the videos of one model and seed
    .../DPO_data/Wan14B/seed_0/<id>.mp4                     the videos
    .../VIDGEN-1M_unzip/<id>.mp4                            the real videos, which VidGen-1M has
"""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .imported import (
    Imported,
    common_names,
    csv_records,
    existing_folder,
    folders_below,
    with_readable_videos,
)


_TABLE = "final.csv"
_COLUMNS = ("caption", "orig_idx", "sa_score", "pc_score")
_SCORED = re.compile(r"(?:.*_)?(?P<size>\d+(?:\.\d+)?B)_seed_(?P<seed>\d+)")  # folder of a table
_REAL = "VIDGEN-1M_unzip"
_BEST = 5  # the judge's scale ends here; it begins at 0, which the published tables have
_GENERATED = {"1.3B": "Wan1.3B", "14B": "Wan14B"}


@dataclass(frozen=True)
class _Scored:
    """One line of a table."""

    place: str
    caption: str
    sa: float
    pc: float


def read_phygdpo(
    folder: str | os.PathLike[str],
    *,
    real_videos: str | os.PathLike[str] | None = None,
    generator_model: str | None = None,
    seeds: Sequence[int] | None = None,
) -> Imported:
    """
    Groups of one real video and the generated videos of all seeds, for `VideoGroupDPOTrainer`.

    Scores are divided by 5, as in the official code. A group that lacks a video, a score or a caption is left out and
    listed: every row has the same number of rejected videos.

    Args:
        folder (`str` or `Path`): Folder with the tables and the generated videos, anywhere below it.
        real_videos (`str` or `Path`, *optional*): Folder with the videos of VidGen-1M. By default `VIDGEN-1M_unzip`
            below `folder`.
        generator_model (`str`, *optional*): `"Wan1.3B"` or `"Wan14B"`: which model's videos, where there are several.
        seeds (list of `int`, *optional*): Only the videos of these seeds; by default of all that have a table.

    Returns:
        [`Imported`]: Rows with `prompt`, `chosen`, `rejected`, `rejected_scores`, `seeds`, `generator` and
        `provenance`.

    Raises:
        ValueError: If a folder, a table or a column of it is missing, the model or a seed is not clear, or no group is
            left.
    """
    root = existing_folder(folder, "the folder of PhyGDPO's published data")
    tables = _tables(root, generator_model, seeds)
    model, generated = _generated(root, tables)
    real = _real_videos(root, real_videos)
    imported = Imported()
    scored = {seed: _read_tables(paths, imported) for seed, paths in tables.items()}
    identifiers = sorted(set().union(*scored.values()))

    def groups() -> Iterator[tuple[str, dict[str, Any]]]:
        for identifier in identifiers:
            lines = [scored[seed].get(identifier) for seed in tables]
            found = [line for line in lines if line is not None]
            place = f"group {identifier}"
            if len(found) < len(lines):
                lacking = [str(seed) for seed, line in zip(tables, lines, strict=True) if line is None]
                imported.skip(place, f"it has no usable line in the table of seed {', '.join(lacking)}")
            elif len({line.caption for line in found}) > 1:
                imported.skip(place, f"its captions differ, in {found[0].place} and others")
            else:
                yield (
                    place,
                    {
                        "prompt": found[0].caption,
                        "chosen": str(real / f"{identifier}.mp4"),
                        "rejected": [str(generated[seed] / f"{identifier}.mp4") for seed in tables],
                        "rejected_scores": [{"sa": line.sa, "pc": line.pc} for line in found],
                        "seeds": list(tables),
                        "generator": model,
                        "provenance": "PhyGDPO, published groups",
                    },
                )

    return with_readable_videos(groups(), imported, len(identifiers))


def _tables(root: Path, model: str | None, seeds: Sequence[int] | None) -> dict[int, list[Path]]:
    """Seed -> its tables, one of each part of the prompts, of one model."""
    found: dict[str, dict[int, list[Path]]] = {}
    for place in folders_below(root):
        named = _SCORED.fullmatch(place.name)
        if named is not None and (place / _TABLE).is_file():
            of_model = found.setdefault(_GENERATED.get(named["size"], named["size"]), {})
            of_model.setdefault(int(named["seed"]), []).append(place / _TABLE)
    if not found:
        raise ValueError(
            f"{root}: expected tables such as train_part_0_14B_seed_0/{_TABLE}, found none. They are in PhyGDPO's "
            "repository, in PhyAugPipe/videophy/evaluated_score: put that folder here."
        )
    if model is None and len(found) > 1:
        raise ValueError(f"{root} has videos of {sorted(found)}. Choose one with `--generator_model`.")
    model = next(iter(found)) if model is None else model
    if model not in found:
        raise ValueError(f"`--generator_model`: expected one of {sorted(found)}, got {model!r}.")
    tables = dict(sorted(found[model].items()))
    unknown = sorted(set(seeds or ()) - set(tables))
    if unknown:
        raise ValueError(f"`--seeds`: there is no table of {model} with seed {unknown}; there are {list(tables)}.")
    return {seed: paths for seed, paths in tables.items() if not seeds or seed in seeds}


def _generated(root: Path, tables: dict[int, list[Path]]) -> tuple[str, dict[int, Path]]:
    """Name of the model, and seed -> folder of its videos."""
    size = next(iter(tables.values()))[0].parent.name.rpartition("_seed_")[0].rpartition("_")[2]
    model = _GENERATED.get(size, size)
    folders = [place for place in folders_below(root) if place.name in (model, size) and any(place.glob("seed_*"))]
    if len(folders) != 1:
        raise ValueError(
            f"{root}: expected one folder DPO_data/{model} with seed_0/<id>.mp4 and so on, found {len(folders)} "
            f"({common_names([str(place) for place in folders]) or 'none'}). Unzip the published videos here."
        )
    missing = [seed for seed in tables if not (folders[0] / f"seed_{seed}").is_dir()]
    if missing:
        others = " ".join(str(seed) for seed in tables if seed not in missing)
        raise ValueError(
            f"{folders[0]}: expected a folder seed_K for every table, found none for seed {missing}. Unzip its "
            f"videos, or take the others with `--seeds {others}`."
        )
    return model, {seed: folders[0] / f"seed_{seed}" for seed in tables}


def _real_videos(root: Path, given: str | os.PathLike[str] | None) -> Path:
    if given is not None:
        return existing_folder(given, "`--real_videos` to be the folder with the videos of VidGen-1M")
    found = next((place for place in folders_below(root) if place.name == _REAL), None)
    if found is None:
        raise ValueError(
            f"{root}: expected the real videos in a folder {_REAL}, found none. They are those of VidGen-1M "
            "(https://huggingface.co/datasets/Fudan-FUXI/VIDGEN-1M): name their folder with `--real_videos`."
        )
    return found


def _read_tables(paths: Sequence[Path], imported: Imported) -> dict[str, _Scored]:
    """Identifier of a video -> its caption and scores, in [0, 1]."""
    scored: dict[str, _Scored] = {}
    for path in paths:
        for place, record in csv_records(path, _COLUMNS, imported):
            identifier, line = _line(record, place, imported)
            if line is not None and identifier in scored:
                imported.skip(place, f"{identifier} stands in {scored[identifier].place} already")
            elif line is not None:
                scored[identifier] = line
    return scored


def _line(record: dict[str | Any, str | Any], place: str, imported: Imported) -> tuple[str, _Scored | None]:
    identifier, caption = ((record[name] or "").strip() for name in ("orig_idx", "caption"))
    if None in record or not identifier or Path(identifier).name != identifier:
        imported.skip(place, f"expected the name of a video in 'orig_idx', got {identifier!r}")
        return identifier, None
    if not caption:
        imported.skip(place, "there is no caption")
        return identifier, None
    scores = []
    for name in ("sa_score", "pc_score"):
        try:
            score = float(record[name])
        except (TypeError, ValueError):
            score = -1.0
        if not 0 <= score <= _BEST:
            imported.skip(place, f"expected a number from 0 to {_BEST} in {name!r}, got {record[name]!r}")
            return identifier, None
        scores.append(score / _BEST)
    return identifier, _Scored(place, caption, *scores)
