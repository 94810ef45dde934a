"""Rejected videos that were made elsewhere, by a service or another program: brought to the format of the pairs."""

import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ...data.buckets import AspectBucket
from ...data.folders import VIDEO_SUFFIXES
from ...data.video_io import VideoDecodeError, probe_video, video_hash
from ...files import read_csv, read_json_lines
from ..clips.normalise import normalise_video
from ..engine.manifest import Batch, Shard, Stage, digest, new_manifest, run_stage, with_columns
from ..generate import GENERATED, JOB, VideoModel


ELSEWHERE_VERSION = 2
_MAX_ENLARGED = 1.1  # more is seen as blur, by which chosen and rejected would be told apart
_TABLES = (".csv", ".jsonl", ".parquet")


def find_videos(source: str | os.PathLike[str]) -> dict[str, Path]:
    """
    Videos of a generator, by the clip that each belongs to.

    Args:
        source (`str` or `Path`): A folder, whose videos are named as the clips are (`clip7.mp4` for
            `my/clips/clip7.webm`, or the content hash that the manifest has); or a table (.csv, .jsonl, .parquet) with
            the columns `source` (path, name or content hash of a clip) and `video` (a path, relative to the table).

    Returns:
        `dict[str, Path]`: Name of a clip without folders and ending, or its content hash, to the file.

    Raises:
        ValueError: Neither, no video in it, a table that cannot be read or lacks a column, or two videos for one clip.
    """
    place = Path(source)
    if place.is_dir():
        files = sorted(path for path in place.rglob("*") if path.suffix.lower() in VIDEO_SUFFIXES)
        named = [(path.stem, path) for path in files]
    elif place.suffix in _TABLES and place.is_file():
        named = []
        for number, row in enumerate(_rows(place)):
            if not isinstance(row, Mapping) or not row.get("source") or not row.get("video"):
                raise ValueError(f"{place}, row {number}: expected 'source' and 'video', got {row}.")
            named.append((_without_ending(str(row["source"])), place.parent / str(row["video"])))
    else:
        raise ValueError(f"{place}: expected a folder with videos, or a table ({', '.join(_TABLES)}).")
    if not named:
        raise ValueError(f"{place}: no video in it. Expected files named as the clips are.")
    found: dict[str, Path] = {}
    for name, path in named:
        if name in found:
            raise ValueError(f"{place}: two videos for the clip {name!r}, {found[name]} and {path}. Keep one.")
        found[name] = path
    return found


def _rows(table: Path) -> list[Any]:
    """Rows of a table; all cells of a CSV are texts, since "0007" is a name and no number."""
    try:
        if table.suffix == ".csv":
            return read_csv(table)
        if table.suffix == ".jsonl":
            return [row for _, row in read_json_lines(table)]
        return pq.read_table(table).to_pylist()
    except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors
        raise ValueError(f"{table}: cannot be read as a table ({error}).") from error


def _without_ending(name: str) -> str:
    """Name of a clip or video without folders and ending; a dot in it is no ending."""
    path = Path(name)
    return path.stem if path.suffix.lower() in VIDEO_SUFFIXES else path.name


def clip_name(clip: Mapping[str, Any]) -> str:
    """What a clip is called, without folders and ending: of one in a tar, its name there."""
    return _without_ending(clip["path"] if clip.get("offset") is None else clip["source_id"])


def jobs_elsewhere(clips: Batch, generator: str, videos: Mapping[str, Path], shared: Collection[str] = ()) -> pa.Table:
    """
    A row for each clip that the generator has a video of, as [`~video_trl.curation.generate.job_table`] makes them.

    Args:
        clips (`dict`): Columns `source_id`, `path`, `content`, `prompt`, `reference_image`, `bucket`, and `offset`
            where clips may lie in tars.
        generator (`str`): Its name, such as "kling-2.1".
        videos (`dict[str, Path]`): From [`find_videos`].
        shared (`Collection[str]`, *optional*): Names that several clips have, which say nothing.

    Raises:
        ValueError: If no video belongs to any clip, or one to several by its name.
    """
    columns: Batch = {name: [] for name in (*JOB, "made")}
    for row in zip(*clips.values(), strict=True):
        clip = dict(zip(clips, row, strict=True))
        name = clip_name(clip)
        made = videos.get(clip["content"]) or videos.get(name)
        if made is None:
            continue
        if name in shared and clip["content"] not in videos:
            raise ValueError(
                f"{generator}: {made} may belong to {clip['source_id']} or to another clip of that name. Name it "
                f"{clip['content']}{made.suffix}, by the content of the clip (`content` in the manifest), or list it "
                "so in a table."
            )
        try:
            content = video_hash(made)
        except VideoDecodeError:
            content = "unreadable"  # the stage drops it, by name
        clip |= {"model": generator, "revision": None, "seed": None, "made": os.fspath(made.absolute())}
        clip["job"] = digest("\0".join([generator, clip["content"], clip["bucket"], content, str(made)]))
        clip["source_id"] = f"{clip['source_id']} x {generator}"
        for name, values in columns.items():
            values.append(clip[name])
    if not columns["job"]:
        names = sorted(videos)[:3]
        raise ValueError(
            f"{generator}: none of its {len(videos)} videos ({', '.join(names)}, ...) is named as a clip that is "
            "left. Name them as the clips, or list them in a table with the columns source and video."
        )
    files = columns.pop("made")
    return with_columns(new_manifest(columns, JOB), {"made": files}, {"made": pa.string()})


def bring_to_format(jobs: pa.Table, root: Path, *, fps: float, num_frames: int, shard: Shard | None) -> pa.Table:
    """
    Writes the videos of [`jobs_elsewhere`] in the format of the pairs; what cannot be used is dropped by name.

    Returns:
        `pyarrow.Table`: Columns as of [`~video_trl.curation.generate.run_jobs`].
    """

    def convert(batch: Batch) -> Batch:
        added: Batch = {name: [] for name in (*GENERATED, "dropped_by", "detail")}
        names = ("made", "job", "model", "bucket")
        for made, job, generator, bucket in zip(*(batch[name] for name in names), strict=True):
            size = AspectBucket.parse(bucket)
            file = Path("generated") / VideoModel(generator).slug / f"{job}.mp4"
            row: dict[str, Any] = dict.fromkeys(added)
            try:
                info = probe_video(made)
                if max(size.height / info.height, size.width / info.width) > _MAX_ENLARGED:
                    raise VideoDecodeError(
                        f"{made} is {info.width}x{info.height}, pairs are {size.width}x{size.height}: enlarged, it "
                        "would differ by its blur. Make it larger, or lower `short_edge`.",
                        kind="too_small",
                    )
                frames = normalise_video(
                    made, root / file, height=size.height, width=size.width, fps=fps, num_frames=num_frames
                )
            except VideoDecodeError as error:
                row |= {"dropped_by": error.kind, "detail": str(error)}
            else:
                if frames < num_frames - 1:
                    words = f"{made} has {frames} frames at {fps:g} fps, pairs have {num_frames}"
                    row |= {"dropped_by": "too_short", "detail": words}
                else:
                    row |= {"rejected": file.as_posix(), "generation": json.dumps({"model": generator, "made": made})}
            for name, values in added.items():
                values.append(row[name])
        return added

    settings = {"version": ELSEWHERE_VERSION, "fps": fps, "num_frames": num_frames}
    stage = Stage("elsewhere", convert, GENERATED, "job", settings, 8, trial=convert)
    return run_stage(jobs, stage, root / "stages", shard).drop_columns("made")
