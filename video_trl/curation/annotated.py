"""
Build preference pairs from generated videos with human scores; keep pairs whose scores differ clearly.

Each vote is one rater's marks, 1 to 5, for one video of a pair in five dimensions. A pair's better video is the one
with the higher mean; it is a useful pair when the means differ much and the better video is good.
"""

import itertools
import json
import os
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from ..files import read_csv, read_json_lines, write_atomically
from .engine.manifest import Rule, apply_rules_to_table, kept_rows, new_manifest


#: The five dimensions of Reg-DPO, appendix A.1.
DIMENSIONS = (
    "image_quality",
    "motion_quality",
    "reference_consistency",
    "instruction_adherence",
    "overall_quality",
)
_PAIR: dict[str, pa.DataType] = {
    "source_id": pa.string(),
    "prompt": pa.string(),
    "chosen": pa.string(),
    "rejected": pa.string(),
    "videos": pa.int64(),
    "raters": pa.int64(),  # those who marked both videos: only their marks count
    "chosen_mean": pa.float64(),
    "rejected_mean": pa.float64(),
    "difference": pa.float64(),
}
_ROUNDING = 1e-9  # means are quotients of small integers: 4.0 must count as 4

Vote = dict[str, Any]


def read_votes(path: str | os.PathLike[str], dimensions: Sequence[str] = DIMENSIONS) -> list[Vote]:
    """
    Reads votes from a `.csv` or `.jsonl` file.

    Columns: `pair_id`, `video` (path or name), `annotator`, `prompt`, and one for each dimension with a whole number
    from 1 to 5. A line with `"correction": true`, as the marking page writes it, replaces what the rater said before.

    Raises:
        ValueError: Another kind of file, a missing column or value, a mark outside 1 to 5, or a rater who marks a
            video of a pair twice. Names the line.
    """
    path = Path(path)
    votes: dict[tuple[str, str, str], Vote] = {}
    for line, record in _records(path):
        missing = [name for name in ("pair_id", "video", "annotator", "prompt", *dimensions) if _blank(record, name)]
        if missing:
            raise ValueError(
                f"{path}, line {line}: expected values for {missing}, got {record!r:.200}. Fill them in, or name the "
                "dimensions that were asked for as `dimensions`."
            )
        marks = {}
        for name in dimensions:
            text = str(record[name]).strip()
            if text not in {"1", "2", "3", "4", "5"}:
                raise ValueError(f"{path}, line {line}: expected a whole number from 1 to 5 in {name}, got {text!r}.")
            marks[name] = int(text)
        pair_id, video, annotator = who = (str(record["pair_id"]), str(record["video"]), str(record["annotator"]))
        if who in votes and record.get("correction") is not True:
            raise ValueError(
                f"{path}, line {line}: {annotator} has marked {video} of pair {pair_id} before. Keep one."
            )
        votes[who] = {
            "pair_id": pair_id, "video": video, "annotator": annotator, "prompt": str(record["prompt"]), **marks
        }  # fmt: skip
    return list(votes.values())


def pairs_to_mark(generations: pa.Table, root: str | os.PathLike[str] = "") -> list[dict[str, str]]:
    """
    All pairs of videos of one clip, for people to mark: Reg-DPO's second strategy.

    Args:
        generations (`pyarrow.Table`): Of a run of GT-Pair, its `generations.parquet`: columns `content`, `prompt` and
            `rejected`.
        root (`str` or `Path`): The run's folder, which the files are relative to.

    Returns:
        `list[dict]`: `pair_id`, `prompt`, `video_a`, `video_b`. A clip with five videos has ten pairs. The id of a
            pair names its two files: it stays the same when more videos are generated.
    """
    of_clip: dict[str, list[dict[str, Any]]] = {}
    for job in kept_rows(generations).to_pylist():
        of_clip.setdefault(job["content"], []).append(job)
    return [
        {
            "pair_id": "-".join([content, *sorted(Path(job["rejected"]).stem for job in (first, second))]),
            "prompt": first["prompt"],
            "video_a": os.fspath(Path(root) / first["rejected"]),
            "video_b": os.fspath(Path(root) / second["rejected"]),
        }
        for content, jobs in of_clip.items()
        for first, second in itertools.combinations(jobs, 2)
    ]


def write_pairs_to_mark(run_dir: str | os.PathLike[str]) -> Path:
    """
    Writes `pairs_to_mark.jsonl` into the folder of a run of GT-Pair, for the marking page.

    Raises:
        ValueError: If the folder holds no finished run, or no clip with two generated videos.
    """
    run = Path(run_dir)
    if not (run / "generations.parquet").is_file():
        raise ValueError(f"{run}: expected the folder of a finished run of GT-Pair, with its generations.parquet.")
    pairs = pairs_to_mark(pq.read_table(run / "generations.parquet"), run.absolute())
    if not pairs:
        raise ValueError(f"{run}: no clip has two generated videos. Generate with several models or seeds.")
    return write_atomically(run / "pairs_to_mark.jsonl", "".join(f"{json.dumps(pair)}\n" for pair in pairs))


def annotated_pairs(
    votes: Sequence[Vote],
    *,
    dimensions: Sequence[str] = DIMENSIONS,
    min_raters: int = 3,
    min_difference: float = 2.0,
    min_positive: float | None = 4.0,
    fill_to: int | None = None,
    fill_difference: float = 1.0,
    seed: int = 0,
) -> tuple[datasets.Dataset, pa.Table]:
    """
    Preference pairs from votes.

    Args:
        votes (`list[dict]`): From [`read_votes`].
        dimensions (`list[str]`): Dimensions that the mean is taken over.
        min_raters (`int`, defaults to `3`): People who must have marked both videos.
        min_difference (`float`, defaults to `2.0`): Of the means.
        min_positive (`float`, *optional*, defaults to `4.0`): Mean of the better video. With `min_difference=2` this
            is its "ideal" subset, 10.9 % of its pairs. None: not asked for.
        fill_to (`int`, *optional*): Reg-DPO's training set: all pairs that keep the rules above, and further ones with
            a difference of at least `fill_difference`, drawn at random, until there are so many.
        fill_difference (`float`, defaults to `1.0`): Of these.
        seed (`int`, defaults to `0`): Which of them are drawn.

    Returns:
        `tuple[datasets.Dataset, pyarrow.Table]`: Rows of the type "preference" with `provenance`, and the manifest of
            all pairs: which rule dropped a pair, with its value. Of equal means, neither video is better.
    """
    pairs: dict[str, list[Vote]] = {}
    for vote in votes:
        pairs.setdefault(vote["pair_id"], []).append(vote)
    rows = [_compare(name, pair, dimensions) for name, pair in pairs.items()]
    table = new_manifest({name: [row[name] for row in rows] for name in _PAIR} if rows else _no_rows(), _PAIR)
    smallest = max(min_difference, 0.0)
    rules = [
        Rule("not_two_videos", "videos", 2, 2),
        Rule("raters", "raters", min_raters),
        Rule("difference", "difference", smallest - _ROUNDING if smallest > 0 else _ROUNDING),
    ]
    if min_positive is not None:
        rules.append(Rule("positive_quality", "chosen_mean", min_positive - _ROUNDING))
    filled = apply_rules_to_table(table, rules)
    if fill_to is not None:
        wider = [
            replace(rule, minimum=fill_difference - _ROUNDING) if rule.name == "difference" else rule for rule in rules
        ]
        filled = _fill_up(filled, apply_rules_to_table(table, wider), fill_to, seed)
    return _preference_rows(filled), filled


def _fill_up(strict: pa.Table, wide: pa.Table, number: int, seed: int) -> pa.Table:
    """The strict table, with pairs of the wide one taken back in until so many are kept."""
    verdicts = list(zip(strict["dropped_by"].to_pylist(), wide["dropped_by"].to_pylist(), strict=True))
    further = [row for row, (narrow, broad) in enumerate(verdicts) if narrow is not None and broad is None]
    missing = max(number - sum(narrow is None for narrow, _ in verdicts), 0)
    drawn = set(random.Random(seed).sample(further, min(missing, len(further))))
    return (
        pa.concat_tables([(wide if row in drawn else strict).slice(row, 1) for row in range(len(strict))])
        if drawn
        else strict
    )


def _no_rows() -> dict[str, list[Any]]:
    return {name: [] for name in _PAIR}


def _records(path: Path) -> Iterable[tuple[int, Mapping[str, Any]]]:
    if path.suffix == ".csv":
        return enumerate(read_csv(path), start=2)
    if path.suffix == ".jsonl":
        return read_json_lines(path)
    raise ValueError(f"{path}: expected votes in a .csv or .jsonl file, got {path.suffix or 'no suffix'}.")


def _blank(record: Any, name: str) -> bool:
    return not isinstance(record, Mapping) or record.get(name) is None or not str(record[name]).strip()


def _compare(name: str, votes: Sequence[Vote], dimensions: Sequence[str]) -> dict[str, Any]:
    """One pair as a row: which video is better, and by how much."""
    marks: dict[str, dict[str, list[int]]] = {}
    for vote in votes:
        marks.setdefault(vote["video"], {})[vote["annotator"]] = [vote[dimension] for dimension in dimensions]
    row = dict.fromkeys(_PAIR) | {"source_id": name, "prompt": votes[0]["prompt"], "videos": len(marks), "raters": 0}
    if len(marks) != 2:
        return row
    both = set.intersection(*(set(by_rater) for by_rater in marks.values()))
    row["raters"] = len(both)
    if not both:
        return row
    sums = {video: sum(sum(by_rater[who]) for who in both) for video, by_rater in marks.items()}
    better, worse = sorted(sums, key=lambda video: -sums[video])  # stable: of equal sums the first one named
    count = len(both) * len(dimensions)
    return row | {
        "chosen": better,
        "rejected": worse,
        "chosen_mean": sums[better] / count,
        "rejected_mean": sums[worse] / count,
        "difference": (sums[better] - sums[worse]) / count,
    }


def _preference_rows(table: pa.Table) -> datasets.Dataset:
    features = datasets.Features(
        {
            "prompt": datasets.Value("string"),
            "chosen": datasets.Video(decode=False),
            "rejected": datasets.Video(decode=False),
            "provenance": datasets.Value("string"),
        }
    )
    rows = [row for row in table.to_pylist() if row["dropped_by"] is None]
    names = ("source_id", "raters", "chosen_mean", "rejected_mean")
    columns: dict[str, list[Any]] = {name: [row[name] for row in rows] for name in ("prompt", "chosen", "rejected")}
    columns["provenance"] = [json.dumps({"route": "annotated"} | {name: row[name] for name in names}) for row in rows]
    return datasets.Dataset.from_dict(columns, features=features)
