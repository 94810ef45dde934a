"""
Physics-IQ (https://huggingface.co/papers/2501.09038): does a generated video move where the real one does?

From the first frame of a filmed experiment and a sentence a model makes the next five seconds. Masks of motion and
pixels are compared with those of the real outcome, and with how far two takes of the same experiment agree. There is
no judge. Videos and sentences are the user's copy (CC-BY-4.0; https://github.com/google-deepmind/physics-IQ-benchmark,
code Apache-2.0); nothing of them is shipped. This is the original score, as `code/` of that repository has it.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage

from ...data.video_io import iterate_video, probe_video
from ...files import read_csv
from ..report.page import Table
from ..runs.prompts import EvaluationPrompt, check_prompts
from ..runs.run import load_run


SECONDS = 5
_THRESHOLD = 10  # grey levels between a frame and the running mean
_MEMORY = 0.3  # of the running mean: the weight of the newest frame
_BLUR = np.array([1, 4, 6, 4, 1])  # sixteenths
_GREY = np.array([9798, 19235, 3735])  # of red, green and blue, in units of 2**-15
_SHRINK = 4  # frames are compared at a quarter of the real video's size
_CASE = re.compile(r"(?P<id>\d{4})_(?P<view>perspective-\w+)_take-1_(?P<scenario>[^_]+?)(?:\.mp4)?")


@dataclass(frozen=True)
class PhysicsIQCase:
    """
    One view of one experiment.

    Attributes:
        key (`str`): Number and name, by which generated files are found: "0001_perspective-left_trimmed-ball-falls".
        take_1, take_2 (`Path`): The real outcome, twice.
    """

    key: str
    take_1: Path
    take_2: Path


@dataclass(frozen=True)
class PhysicsIQScore:
    """
    Attributes:
        score (`float`): In [0, 100]; 100 is a model that differs from a take as the takes differ from each other.
        metrics (`dict[str, float]`): Means of the videos: "spatiotemporal_iou", "spatial_iou",
            "weighted_spatial_iou", "mse".
        variance (`dict[str, float]`): The same between the two takes.
        num_videos (`int`): Videos that were compared, of 198.
    """

    score: float
    metrics: Mapping[str, float]
    variance: Mapping[str, float]
    num_videos: int


METRICS = ("spatiotemporal_iou", "spatial_iou", "weighted_spatial_iou", "mse")


def load_physics_iq(
    folder: str | os.PathLike[str], descriptions: str | os.PathLike[str] | None = None
) -> tuple[EvaluationPrompt, ...]:
    """
    The prompts: a sentence and the frame before the outcome, for each view of each experiment.

    Args:
        folder (path): The benchmark's folder, with `switch-frames`.
        descriptions (path, *optional*): CSV file with `scenario` and `description`; by default the first of
            `descriptions.csv` and `descriptions/descriptions_original.csv` in the folder.

    Returns:
        `tuple[EvaluationPrompt, ...]`: The name of the view is the text, the sentence what the model is given. Group
        and category are the table's category, where it has one.

    Raises:
        ValueError: If the table or a frame is missing, or the table has other columns or no first takes.
    """
    root = Path(folder)
    tables = [root / "descriptions.csv", root / "descriptions" / "descriptions_original.csv"]
    table = Path(descriptions) if descriptions is not None else next((p for p in tables if p.is_file()), tables[0])
    try:
        rows = read_csv(table)
    except ValueError as error:
        raise ValueError(f"{table}: expected Physics-IQ's table of descriptions ({error}).") from error
    prompts = []
    for row in rows:
        match = _CASE.fullmatch((row.get("scenario") or "").strip())
        if match is None:  # second takes, whose outcome is the yardstick
            continue
        key, category = _key(match), (row.get("category") or "").strip()
        frame = root / "switch-frames" / "{id}_switch-frames_anyFPS_{view}_{scenario}.jpg".format(**match.groupdict())
        if not frame.is_file() or not (row.get("description") or "").strip():
            raise ValueError(f"{table}: {key} has no description, or no frame {frame}. Fetch the whole benchmark.")
        groups = (category,) if category else ()
        prompts.append(EvaluationPrompt(key, row["description"].strip(), category, groups, str(frame)))
    if not prompts:
        raise ValueError(f"{table}: expected rows with `scenario` such as 0001_perspective-left_take-1_NAME.mp4.")
    return check_prompts(prompts)


def find_cases(folder: str | os.PathLike[str], fps: float) -> list[PhysicsIQCase]:
    """
    The real outcomes, of that frame rate where they are there, else of 30 frames a second.

    Raises:
        ValueError: If there are none, one has another kind of name, or a first take has no second one.
    """
    split = Path(folder) / "split-videos"
    homes = [split / name / f"{rate:g}FPS" for rate in (fps, 30) for name in ("testing", "testing-videos")]
    home = next((home for home in homes if any(home.glob("*.mp4"))), None)
    if home is None:
        raise ValueError(f"{folder}: expected the real videos in {homes[-2]}. Fetch Physics-IQ's split-videos.")
    takes: dict[tuple[str, str, str], tuple[str, Path]] = {}
    for path in sorted(home.glob("*.mp4")):
        parts = path.stem.split("_")
        if len(parts) != 6:
            raise ValueError(
                f"{path}: expected a name such as 0001_testing-videos_30FPS_VIEW_take-1_SCENARIO.mp4. Move it away."
            )
        takes[parts[3], parts[5], parts[4]] = parts[0], path
    cases = []
    for (view, scenario, take), (number, path) in takes.items():
        if take != "take-1":
            continue
        if (view, scenario, "take-2") not in takes:
            raise ValueError(f"{home}: {path.name} has no second take. Fetch all of split-videos.")
        cases.append(PhysicsIQCase(f"{number}_{view}_{scenario}", path, takes[view, scenario, "take-2"][1]))
    return cases


def generated_videos(source: str | os.PathLike[str]) -> dict[str, list[Path]]:
    """
    The generated videos of each view, by its number: of an evaluation run of `load_physics_iq`'s prompts (several
    seeds are several videos), or of a folder of files that begin with the number, as the benchmark wants them.

    Raises:
        ValueError: If there is none, or the run is unfinished.
    """
    root = Path(source)
    found: dict[str, list[Path]] = {}
    if (root / "run.json").is_file():
        run = load_run(root)
        run.check_videos()
        for case in run.cases:
            found.setdefault(case.prompt.text[:4], []).append(run.video(case))
    else:
        for path in sorted(root.glob("[0-9][0-9][0-9][0-9]_*.mp4")):
            found.setdefault(path.name[:4], []).append(path)
    if not found:
        raise ValueError(f"{root}: expected a run, or files such as 0001_perspective-left_NAME.mp4, found none.")
    return found


def physics_iq(videos: Mapping[str, Sequence[Path]], folder: str | os.PathLike[str]) -> PhysicsIQScore:
    """
    Compares generated videos with the real ones.

    Args:
        videos (`dict[str, list[Path]]`): From `generated_videos`. They have five seconds or more; what comes later
            does not count.
        folder (path): The benchmark's folder, with `split-videos`.

    Returns:
        [`PhysicsIQScore`]: Over the views that are there. Only a whole set compares with published scores.

    Raises:
        ValueError: If a real video is missing, no view is known, or a video is too short.
    """
    fps = round(probe_video(next(iter(videos.values()))[0]).fps)
    cases = {case.key[:4]: case for case in find_cases(folder, fps)}
    unknown = sorted(set(videos) - set(cases))
    if unknown:
        raise ValueError(f"Expected videos of the numbers {', '.join(sorted(cases)[:5])}, ..., got {unknown[:5]}.")
    made: dict[str, list[float]] = {name: [] for name in METRICS}
    natural: dict[str, list[float]] = {name: [] for name in METRICS}
    for number, paths in videos.items():
        case = cases[number]
        first, second = (_Seen.read(path, fps) for path in (case.take_1, case.take_2))
        for values, others in ((natural, [second]), (made, [_Seen.read(p, fps, first.size) for p in paths])):
            for other in others:
                for name, value in compare(first, other).items():
                    values[name].append(value)
    metrics, variance = ({name: float(np.mean(values[name])) for name in METRICS} for values in (made, natural))
    return PhysicsIQScore(score_of(metrics, variance), metrics, variance, len(made["mse"]))


def score_of(metrics: Mapping[str, float], variance: Mapping[str, float]) -> float:
    """The score of mean metrics beside those of the two takes: overlaps as proportions, the error as a difference."""
    overlaps = [metrics[name] / variance[name] for name in METRICS[:3]]
    score = sum(overlaps) / 3 - (metrics["mse"] - variance["mse"])
    return round(min(max(100 * score, 0.0), 100.0), 2)


def score_table(scores: Mapping[str, PhysicsIQScore]) -> Table:
    """One row for each model."""
    rows = [
        [name, str(score.num_videos), f"{score.score:.2f}", *(f"{score.metrics[metric]:.4f}" for metric in METRICS)]
        for name, score in scores.items()
    ]
    note = "100 is as far from a take as two takes are from each other. The published set has 198 videos a model."
    return Table("Physics-IQ", ["model", "videos", "score", *METRICS], rows, note)


@dataclass(frozen=True)
class _Seen:
    """A video as it is compared: frames `(T, h, w, 3)` uint8 and where something moves, `(T, h, w)` bool."""

    frames: NDArray[np.uint8]
    moving: NDArray[np.bool_]

    @property
    def size(self) -> tuple[int, int]:
        return self.frames.shape[1], self.frames.shape[2]

    @classmethod
    def read(cls, path: Path, fps: int, size: tuple[int, int] | None = None) -> "_Seen":
        """
        Raises:
            ValueError: If the video is shorter than five seconds.
        """
        frames, moving = [], []
        for frame, mask in _with_masks(islice(iterate_video(path, fps=fps), SECONDS * fps)):
            size = size or (frame.shape[0] // _SHRINK, frame.shape[1] // _SHRINK)
            frames.append(np.round(_resized(frame, size)).astype(np.uint8))
            moving.append(_resized(mask[..., None] * np.float32(255), size)[..., 0] > 127)
        if len(frames) < SECONDS * fps:
            raise ValueError(f"{path}: expected {SECONDS} seconds, {SECONDS * fps} frames, got {len(frames)}.")
        return cls(np.stack(frames), np.stack(moving))


def _with_masks(frames: Iterator[NDArray[np.uint8]]) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.bool_]]]:
    """Each frame with where it differs from the running mean of those before; small specks and holes are closed."""
    mean: NDArray[np.float64] | None = None
    for frame in frames:
        grey = _blurred((frame.astype(np.int64) @ _GREY + (1 << 14)) >> 15)
        mean = grey.astype(np.float64) if mean is None else (1 - _MEMORY) * mean + _MEMORY * grey
        mask = np.abs(grey - np.rint(mean.astype(np.float32))) > _THRESHOLD
        for operation in ("opening", "closing"):
            mask = _morphed(mask, operation)
        yield frame, mask


def _blurred(grey: NDArray[np.int64]) -> NDArray[np.int64]:
    padded = np.pad(grey, 2, mode="reflect")
    rows = sum(weight * padded[:, place : place + grey.shape[1]] for place, weight in enumerate(_BLUR))
    both: NDArray[np.int64] = sum(weight * rows[place : place + grey.shape[0]] for place, weight in enumerate(_BLUR))
    return (both + 128) >> 8


def _morphed(mask: NDArray[np.bool_], operation: str) -> NDArray[np.bool_]:
    """Opening or closing by a square of 5 x 5; beyond the border there is nothing to erode or to grow from."""

    def eroded(image: NDArray[np.bool_]) -> NDArray[np.bool_]:
        return np.asarray(ndimage.minimum_filter(image, 5, mode="constant", cval=1))

    def grown(image: NDArray[np.bool_]) -> NDArray[np.bool_]:
        return np.asarray(ndimage.maximum_filter(image, 5, mode="constant", cval=0))

    return grown(eroded(mask)) if operation == "opening" else eroded(grown(mask))


def _resized(image: NDArray[np.uint8] | NDArray[np.float32], size: tuple[int, int]) -> NDArray[np.float32]:
    """`(H, W, C)` to another height and width, linear between the nearest pixels, without a filter."""
    pixels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None].float()
    resized = torch.nn.functional.interpolate(pixels, size, mode="bilinear", align_corners=False)
    return resized[0].permute(1, 2, 0).numpy()


def compare(first: _Seen, second: _Seen) -> dict[str, float]:
    """The four metrics of two videos of one size and length; values of frames are rounded as the published tables."""
    overlap, union = (
        (operation(first.moving, second.moving)).sum(axis=(1, 2)) for operation in (np.logical_and, np.logical_or)
    )
    by_frame = np.where(union == 0, 1.0, overlap / np.maximum(union, 1))
    ever, ever_too = np.any(first.moving, axis=0), np.any(second.moving, axis=0)
    weights, other_weights = np.mean(first.moving, axis=0), np.mean(second.moving, axis=0)
    errors = [
        float(np.mean((a.astype(np.float32) / 255 - b.astype(np.float32) / 255) ** 2))
        for a, b in zip(first.frames, second.frames, strict=True)
    ]
    return {
        "spatiotemporal_iou": float(np.mean(np.round(by_frame, 4))),
        "spatial_iou": _ratio((ever & ever_too).sum(), (ever | ever_too).sum()),
        "weighted_spatial_iou": _ratio(
            np.minimum(weights, other_weights).sum(), np.maximum(weights, other_weights).sum()
        ),
        "mse": float(np.mean(np.round(errors, 4))),
    }


def _ratio(part: float, whole: float) -> float:
    return 1.0 if whole == 0 else float(part / whole)


def _key(match: re.Match[str]) -> str:
    return f"{match['id']}_{match['view']}_{match['scenario']}"
