"""
What could go wrong with preference data, measured before money is spent on training.

A preference is learned by whatever tells chosen from rejected videos most easily. If that is their blur, brightness or
length, or the traces of a generator, the loss falls and the videos get no better. So every measure here is asked one
question: how well does it tell the two apart? The answer is an AUC: how often a random chosen video has the higher
value than a random rejected one, ties counted half; 0.5 is not at all, 0 and 1 are always.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline

from ..data.columns import MapDataset, as_scores, as_videos, check_columns, is_encoded, undecoded
from ..data.video_io import read_video
from ..judges import VideoJudge
from ..judges.base import score_each
from ..models import family_of


CONFOUND = 0.75  # a measure of style with such an AUC, or 1 minus it, is named
SHORTCUT = 0.95  # a probe with such an AUC can tell the videos apart by style alone
_EQUAL = 0.5  # mean difference of pixels, of 255, below which two videos show the same
_CONSTANT = 0.02  # standard deviation of scores, of 1, below which they say nothing
_RESAMPLES, _FOLDS = 1000, 5

Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Separation:
    """
    How well a measure tells chosen from rejected videos.

    Attributes:
        name (`str`): Of the measure.
        auc (`float`): Area under the ROC curve, in [0, 1].
        low (`float`): Lower end of the 95 % interval, whole rows resampled; see [`separation`] for several measures.
        high (`float`): Its upper end.
    """

    name: str
    auc: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.name}: AUC {self.auc:.2f} [{self.low:.2f}, {self.high:.2f}]"

    @property
    def strength(self) -> float:
        """The AUC of the measure or of its opposite."""
        return max(self.auc, 1 - self.auc)

    @property
    def is_sure(self) -> bool:
        """Whether the interval leaves 0.5 out."""
        return not self.low <= 0.5 <= self.high


@dataclass
class Diagnosis:
    """
    What was found.

    Attributes:
        rows (`int`): Rows that were looked at.
        videos (`int`): Their videos.
        judge ([`Separation`], *optional*): Of the judge's scores.
        probe ([`Separation`], *optional*): Of a linear probe on latents.
        style (`list[Separation]`): Of measures that have nothing to do with what a video shows.
        problems (`list[str]`): What to mend, with the way out.
    """

    rows: int
    videos: int
    judge: Separation | None = None
    probe: Separation | None = None
    style: list[Separation] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """The same as text."""
        known = [each for each in (self.judge, self.probe) if each is not None]
        lines = [f"{self.rows} rows, {self.videos} videos; AUC: chosen above rejected, 0.5 is not told apart"]
        return lines + [str(each) for each in [*known, *self.style]] + [f"problem: {each}" for each in self.problems]


def diagnose(
    dataset: MapDataset,
    *,
    judge: VideoJudge | None = None,
    pipeline: DiffusionPipeline | None = None,
    max_rows: int = 200,
    pixels: Mapping[str, Any] | None = None,
) -> Diagnosis:
    """
    Look for what training would learn instead of the preference.

    Args:
        dataset (`MapDataset`): Raw preference or group rows.
        judge ([`~video_trl.judges.VideoJudge`], *optional*): Scores all videos; does it tell them apart?
        pipeline (`DiffusionPipeline`, *optional*): Its VAE encodes them for the probe.
        max_rows (`int`, defaults to `200`): At most so many rows, evenly spread over the dataset. At least 2.
        pixels (`Mapping`, *optional*): Keyword arguments of `read_video`: what training brings videos to. What it
            makes equal is no confound.

    Returns:
        [`Diagnosis`]: The measures, and the problems. A row with a video that cannot be read, or that the VAE does not
            take, is one of them, and is left out of the measures.

    Raises:
        ValueError: If the dataset has other columns, or fewer than two rows can be looked at.
    """
    check_columns(dataset, "group")
    if is_encoded(dataset, "group"):
        raise ValueError("The doctor looks at videos, and the rows hold latents. Pass the dataset as it was before.")
    if min(len(dataset), max_rows) < 2:
        raise ValueError(f"Expected at least two rows to compare, got {min(len(dataset), max_rows)}.")
    numbers = sorted({int(number) for number in np.linspace(0, len(dataset) - 1, min(max_rows, len(dataset)))})
    rows, table, scores = undecoded(dataset), _Table(), _Table()
    encode = None if pipeline is None else _encoder(pipeline)
    equal: list[int] = []
    problems: list[str] = []
    for number in numbers:
        row = rows[number]
        try:
            videos = [read_video(source, **(pixels or {})) for source in (row["chosen"], *as_videos(row["rejected"]))]
            measures = [style_of(video) | ({} if encode is None else encode(video)) for video in videos]
        except ValueError as error:  # no readable video, or of a size that the VAE does not take
            problems.append(f"row {number} is left out: {error}")
            continue
        if any(_difference(videos[0], other) < _EQUAL for other in videos[1:]):
            equal.append(number)
        table.add(measures)
        if judge is not None:
            judged = score_each(judge, videos, [row["prompt"]] * len(videos))
            unscored = next((score for score in judged if score["sa"] is None or score["pc"] is None), None)
            if unscored is None:
                scores.add([{name: float(score[name]) for name in ("sa", "pc")} for score in judged])
            else:
                problems.append(f"row {number} has no scores of the judge: {unscored.get('error')}")
    if min(len(each.groups) for each in (table, *([] if judge is None else [scores]))) < 2:
        raise ValueError(f"Fewer than two rows can be looked at; {'; '.join(problems)}")
    found = Diagnosis(len(table.groups), sum(len(group) for group in table.groups), problems=problems)
    names = list(style_of(videos[0]))
    found.style += [separation(name, table.column(name), comparisons=len(names)) for name in names]
    _name_problems_of_style(found, equal, pixels is not None)
    if encode is not None:
        _look_at_probe(found, table)
    if judge is not None:
        _look_at_scores(found, scores)
    _look_at_stored_scores(found, [rows[number].get("rejected_scores") for number in numbers])
    return found


@dataclass
class _Table:
    """Measures of the videos of each row, the chosen one first."""

    groups: list[list[dict[str, float]]] = field(default_factory=list)

    def add(self, measures: list[dict[str, float]]) -> None:
        self.groups.append(measures)

    def column(self, name: str) -> list[Array]:
        return [np.array([measures[name] for measures in group]) for group in self.groups]


# ---- Measures ----


def style_of(video: np.ndarray) -> dict[str, float]:
    """
    Measures of a video that do not depend on what happens in it.

    Args:
        video (`numpy.ndarray` of shape `(T, H, W, 3)`): uint8.

    Returns:
        `dict[str, float]`: `frames`; `pixels`, of a frame; `brightness` and `contrast`, mean and standard deviation of
        the grey level, of 255; `saturation`, mean distance between the colours; `sharpness`, mean magnitude of the
        Laplacian of the grey level over its standard deviation; `motion`, mean difference between frames.
    """
    grey = video.astype(np.float32).mean(axis=3)  # (T, H, W)
    laplacian = (
        4 * grey[:, 1:-1, 1:-1] - grey[:, :-2, 1:-1] - grey[:, 2:, 1:-1] - grey[:, 1:-1, :-2] - grey[:, 1:-1, 2:]
    )
    deviation = float(grey.std())
    return {
        "frames": float(len(video)),
        "pixels": float(video.shape[1] * video.shape[2]),
        "brightness": float(grey.mean()),
        "contrast": deviation,
        "saturation": float((video.max(axis=3).astype(np.float32) - video.min(axis=3)).mean()),
        "sharpness": float(np.abs(laplacian).mean()) / max(deviation, 1e-6) if laplacian.size else 0.0,
        "motion": float(np.abs(np.diff(grey, axis=0)).mean()) if len(grey) > 1 else 0.0,
    }


def _difference(left: np.ndarray, right: np.ndarray) -> float:
    if left.shape != right.shape:
        return math.inf
    return float(np.abs(left.astype(np.float32) - right).mean())


def _encoder(pipeline: DiffusionPipeline) -> Callable[[np.ndarray], dict[str, float]]:
    """To statistics of latents: of each channel its mean, its deviation, and that of neighbours' differences."""
    family = family_of(pipeline)

    def encode(video: np.ndarray) -> dict[str, float]:
        family.check_video(pipeline.vae, video.shape[:3])
        pixels = torch.from_numpy(video).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
        latents = family.encode_video(pipeline.vae, pixels.to(pipeline.vae.device))[0].double().cpu()  # (C, F, H, W)
        parts = [latents.mean(dim=(1, 2, 3)), latents.flatten(1).std(dim=1)]
        parts += [latents.diff(dim=axis).flatten(1).std(dim=1) for axis in (2, 3) if latents.shape[axis] > 2]
        return {f"latent {number}": value for number, value in enumerate(torch.cat(parts).tolist())}

    return encode


# ---- How well they tell the videos apart ----


def separation(name: str, groups: Sequence[Array], *, comparisons: int = 1, seed: int = 0) -> Separation:
    """
    AUC of a measure, with a bootstrap interval over rows.

    Args:
        name (`str`): Of the measure.
        groups (`Sequence` of arrays): Of each row, the chosen video's value and then the rejected ones'.
        comparisons (`int`, defaults to `1`): How many measures are asked the same; the interval covers all of them
            in 95 % of the cases (Bonferroni): of seven measures of good data, one would often seem to tell.
        seed (`int`, defaults to `0`): Of the bootstrap.

    Returns:
        [`Separation`]: Between all chosen and all rejected videos.
    """
    generator, rows = np.random.default_rng(seed), len(groups)
    chosen, rejected = np.array([group[0] for group in groups]), [group[1:] for group in groups]
    # How the chosen video of each row does against the rejected ones of each row: (rows, rows), and their numbers.
    wins = np.array(
        [[(value > others).sum() + 0.5 * (value == others).sum() for others in rejected] for value in chosen]
    )
    counts = np.array([len(others) for others in rejected], dtype=np.float64)
    drawn = [np.bincount(generator.integers(rows, size=rows), minlength=rows) for _ in range(_RESAMPLES)]
    values = [(weights @ wins @ weights) / (weights.sum() * (weights @ counts)) for weights in map(np.asarray, drawn)]
    low, high = np.quantile(values, [0.025 / comparisons, 1 - 0.025 / comparisons])
    return Separation(name, float(wins.sum() / (rows * counts.sum())), float(low), float(high))


def probe(groups: Sequence[Array], ridge: float = 1.0) -> list[Array]:
    """
    Values of a linear classifier, chosen against rejected, each row's by one that was fitted without it.

    Args:
        groups (`Sequence` of arrays `(1 + m, D)`): Features of each row's videos, the chosen one first.
        ridge (`float`, defaults to `1.0`): Penalty of the weights, of standardised features.

    Returns:
        `list` of arrays `(1 + m,)`: Higher where a video looks like a chosen one.
    """
    values: list[Array] = [np.zeros(len(group)) for group in groups]
    folds = min(_FOLDS, len(groups))
    for fold in range(folds):
        train = [group for number, group in enumerate(groups) if number % folds != fold]
        features = np.concatenate(train)
        labels = np.concatenate(
            [np.where(np.arange(len(group)) == 0, 1.0, -1.0 / (len(group) - 1)) for group in train]
        )
        mean, scale = features.mean(axis=0), features.std(axis=0) + 1e-9
        features = (features - mean) / scale
        weights = np.linalg.solve(features.T @ features + ridge * np.eye(features.shape[1]), features.T @ labels)
        for number in range(fold, len(groups), folds):
            values[number] = (groups[number] - mean) / scale @ weights
    return values


# ---- What it means ----


def _name_problems_of_style(found: Diagnosis, equal: list[int], as_trained: bool) -> None:
    if equal:
        shown = ", ".join(map(str, equal[:20]))
        found.problems.append(
            f"a rejected video shows what the chosen one does (rows {shown}): nothing is learned from it. "
            "Drop the rows."
        )
    cures = {
        "frames": "set --num_frames",
        "pixels": "set --height and --width",
        "sharpness": "write both kinds by one encoder, at one size, and look at the rejected ones' sampler",
        "motion": "a still video is told by that alone; make losers of the chosen videos (generate --from chosen)",
    }
    for each in found.style:
        if each.strength >= CONFOUND and each.is_sure:
            cure = cures.get(each.name, "make losers of the chosen videos (generate --from chosen), or balance them")
            where = "" if as_trained else ", unless training brings videos to one"
            where = where if each.name in ("frames", "pixels") else ""
            found.problems.append(
                f"{each.name} tells chosen from rejected in {each.strength:.0%} of the comparisons{where}: {cure}."
            )


def _look_at_probe(found: Diagnosis, table: _Table) -> None:
    names = [name for name in table.groups[0][0] if name.startswith("latent ")]
    groups = [np.stack([table.column(name)[row] for name in names], axis=1) for row in range(found.rows)]
    found.probe = separation("linear probe on statistics of latents", probe(groups))
    if found.probe.auc >= SHORTCUT and found.probe.is_sure:
        found.problems.append(
            f"a linear probe tells chosen from rejected by statistics of their latents (AUC {found.probe.auc:.2f}): a "
            "shortcut that a preference is learned by instead of its content. Bring both through the same VAE and "
            "file (generate --from chosen), or compare videos of one kind."
        )


def _look_at_scores(found: Diagnosis, scores: _Table) -> None:
    groups = [(sa + pc) / 2 for sa, pc in zip(scores.column("sa"), scores.column("pc"), strict=True)]
    found.judge = separation("judge, (sa + pc) / 2", groups)
    if found.judge.high < 0.5:
        found.problems.append("the judge prefers the rejected videos: chosen and rejected may be exchanged.")
    elif not found.judge.is_sure:
        found.problems.append(
            "the judge does not tell chosen from rejected videos: what it cannot see, training will not be measured "
            "by. Use another judge, or look at the pairs (data check --html)."
        )
    _check_spread(found, np.concatenate(groups), "the judge's scores")


def _look_at_stored_scores(found: Diagnosis, cells: Sequence[Any]) -> None:
    stored = [as_scores(cell) for cell in cells if cell is not None]
    for place, name in enumerate(("sa", "pc")):
        if stored:
            _check_spread(found, np.concatenate(stored)[:, place], f"'{name}' of `rejected_scores`")


def _check_spread(found: Diagnosis, values: np.ndarray, what: str) -> None:
    if len(values) > 1 and float(np.std(values)) < _CONSTANT:
        found.problems.append(
            f"{what} hardly differ (standard deviation {np.std(values):.3f}): weights made of them weigh nothing. "
            "Look at the judge's answers, or leave them out."
        )
