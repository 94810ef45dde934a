"""
The pairs that VideoDPO publishes and its code writes.

The layout (https://github.com/CIntellifusion/VideoDPO, OmniScore):

    metadata.json    a list of videos: {"basic": {"clip_path": ...}, "misc": {"frame_caption": [...]}}
    pair.json        a list of pairs: {"video1": place of the better one in the first list, "video2": of the worse one,
                     "frame_caption": ..., and in some datasets "score": how common the pair is}
"""

import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ...files import read_json
from .imported import Imported, existing_folder, with_readable_videos


_VIDEOS, _PAIRS = "metadata.json", "pair.json"
_TYPICAL_SCORE = 0.72  # by which the official code divides scores


def read_videodpo(folder: str | os.PathLike[str]) -> Imported:
    """
    Pairs of a better and a worse video, for `VideoDPOTrainer`.

    The first video of a pair is the better one; `label` is not looked at, as in VideoDPO's own code. Where pairs have
    a `score`, the column `weight` is what that code multiplies losses by with `dupbeta: 1`: 0.72 / score, a pair
    without one having 1; `VideoDPOConfig(pair_weights=True)` reads it. Videos are looked
    for in the folder: at the path that the list says or, where the data have been moved, at its last two parts
    (`winvideos/000001.mp4`).

    Args:
        folder (`str` or `Path`): Folder with `metadata.json`, `pair.json` and the videos.

    Returns:
        [`Imported`]: Rows with `prompt`, `chosen`, `rejected`, `provenance` and, with scores, `weight`.

    Raises:
        ValueError: If the folder or one of the two files is missing or is another file, or no pair is left.
    """
    root = existing_folder(folder, "the folder of a dataset of VideoDPO")
    videos, pairs = (_list_in(root / name) for name in (_VIDEOS, _PAIRS))
    imported = Imported()
    scored = any(isinstance(pair, Mapping) and "score" in pair for pair in pairs)

    def rows() -> Iterator[tuple[str, dict[str, Any]]]:
        for number, pair in enumerate(pairs):
            place = f"{_PAIRS}, pair {number}"
            try:
                row = _row(root, videos, pair)
                yield place, row | ({"weight": _weight(pair)} if scored else {})
            except ValueError as error:
                imported.skip(place, str(error))

    return with_readable_videos(rows(), imported, len(pairs))


def _list_in(path: Path) -> list[Any]:
    if not path.is_file():
        raise ValueError(
            f"{path.parent}: expected {_VIDEOS} and {_PAIRS}, found no {path.name}. Name the folder of one dataset, "
            "such as vidpro10k-vc2-dataset; VideoDPO's select_pairs.py writes both."
        )
    content = read_json(path)
    if not isinstance(content, list) or not content:
        raise ValueError(f"{path}: expected a list with at least one entry, got {type(content).__name__}.")
    return content


def _row(root: Path, videos: list[Any], pair: Any) -> dict[str, Any]:
    """
    Raises:
        ValueError: If the pair is none.
    """
    if not isinstance(pair, Mapping):
        raise ValueError(f"expected a pair, got {pair!r:.60}")
    chosen, rejected = (_video(videos, pair, name) for name in ("video1", "video2"))
    captions = [pair.get("frame_caption"), _inner(chosen, "misc", "frame_caption")]
    texts = [caption[0] if isinstance(caption, list) and caption else caption for caption in captions]
    prompt = next((text.strip() for text in texts if isinstance(text, str) and text.strip()), None)
    if prompt is None:
        raise ValueError("there is no 'frame_caption'")
    return {
        "prompt": prompt,
        "chosen": _path(root, chosen),
        "rejected": _path(root, rejected),
        "provenance": "VideoDPO",
    }


def _weight(pair: Mapping[str, Any]) -> float:
    score = pair.get("score", 1)
    if not isinstance(score, (int, float)) or isinstance(score, bool) or not 0 < score < math.inf:
        raise ValueError(f"expected a positive, finite number in 'score', got {score!r:.60}")
    return _TYPICAL_SCORE / score


def _video(videos: list[Any], pair: Mapping[str, Any], name: str) -> Any:
    place = pair.get(name)
    if not isinstance(place, int) or isinstance(place, bool) or not 0 <= place < len(videos):
        raise ValueError(f"expected in {name!r} a place in a list of {len(videos)} videos, got {place!r:.60}")
    return videos[place]


def _inner(video: Any, group: str, name: str) -> Any:
    inner = video.get(group) if isinstance(video, Mapping) else None
    return inner.get(name) if isinstance(inner, Mapping) else None


def _path(root: Path, video: Any) -> str:
    """Absolute path of a video: one inside the folder, for what is imported may be published."""
    said = _inner(video, "basic", "clip_path")
    if not isinstance(said, str) or not said:
        raise ValueError(f"expected a 'clip_path' in {_VIDEOS}, got {said!r:.60}")
    parts = [part for part in Path(said).parts if part not in ("..", Path(said).anchor)]
    places = [Path(os.path.normpath(root / said)), root.joinpath(*parts[-2:])]
    inside = [place for place in places if place.is_relative_to(root)]
    return str(next((place for place in inside if place.is_file()), inside[-1]))
