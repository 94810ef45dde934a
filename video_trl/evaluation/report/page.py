"""
Write evaluation results as a table for the terminal and as one self-contained HTML page.

The page holds its videos (base64 mp4) and charts (inline SVG), so it can be mailed or opened from a disk without
network. Every text is escaped: prompts and judges' explanations come from data sets and models.
"""

import base64
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jinja2
from markupsafe import Markup

from video_trl.evaluation.report.charts import interval_chart, line_chart
from video_trl.evaluation.statistics import PairedDifference, verdict
from video_trl.files import check_page, write_atomically


@dataclass(frozen=True)
class Column:
    """A model or data source whose videos stand in one column. `name` is the key of `Sample.videos` and `.scores`."""

    name: str
    description: str = ""


@dataclass(frozen=True)
class Sample:
    """
    One prompt with a video of each column.

    Attributes:
        prompt (`str`): Text the videos were made from.
        videos (`dict[str, path]`): Path of the mp4 file of each column. A column may be missing.
        scores (`dict[str, dict]`): What a judge said about the video of each column: numbers by name (`sa`, `pc`),
            shown as bars where they lie in [0, 1], and texts by name (`explanation`).
        category (`str`, *optional*): Action or law that the prompt is about.
    """

    prompt: str
    videos: Mapping[str, str | os.PathLike[str]]
    scores: Mapping[str, Mapping[str, float | str]] = field(default_factory=dict)
    category: str = ""


@dataclass(frozen=True)
class Curve:
    """One chart: each series has one value for each position of `x`; a value that is not finite leaves a gap."""

    title: str
    x: Sequence[float]
    series: Mapping[str, Sequence[float]]
    x_label: str = "step"
    y_label: str = ""


@dataclass(frozen=True)
class Table:
    """A table of ready-made cells. Every row is as long as the header."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.header):
                raise ValueError(
                    f"Table {self.title!r} has {len(self.header)} columns; a row has {len(row)}: {list(row)}."
                )


@dataclass(frozen=True)
class Comparison:
    """
    Method `a` against method `b` in one metric, larger being better.

    Attributes:
        metric (`str`): Name of the metric, such as `pc`.
        a (`str`), b (`str`): Names of the methods.
        difference ([`PairedDifference`]): Paired difference a - b, from [`paired_bootstrap`].
        num_seeds (`int`): Training runs with different seeds behind it.
        p_adjusted (`float`, *optional*): p-value after Holm's correction, where the comparison is one of several.
    """

    metric: str
    a: str
    b: str
    difference: PairedDifference
    num_seeds: int
    p_adjusted: float | None = None

    @property
    def verdict(self) -> str:
        return verdict(self.difference, num_seeds=self.num_seeds, p_adjusted=self.p_adjusted)

    def cells(self) -> tuple[str, ...]:
        """The comparison as cells under [`comparison_header`]."""
        d = self.difference
        adjusted = () if self.p_adjusted is None else (f"{self.p_adjusted:.3g}",)
        return (
            self.metric,
            f"{self.a} vs {self.b}",
            f"{d.mean_a:.3f}",
            f"{d.mean_b:.3f}",
            f"{d.difference:+.3f}",
            f"[{d.low:+.3f}, {d.high:+.3f}]",
            f"{d.num_items} / {d.num_clusters} / {self.num_seeds}",
            *adjusted,
            self.verdict,
        )


def comparison_header(comparisons: Sequence[Comparison]) -> tuple[str, ...]:
    """
    Header of the table of `comparisons`; it names the confidence level of their intervals.

    Raises:
        ValueError: If the intervals have different levels, or only some comparisons have a p-value: they cannot stand
            under one header.
    """
    levels = {comparison.difference.level for comparison in comparisons}
    if len(levels) != 1:
        raise ValueError(f"Comparisons of one table need intervals of one confidence level, got {sorted(levels)}.")
    tested = {comparison.p_adjusted is not None for comparison in comparisons}
    if len(tested) != 1:
        raise ValueError("Either all comparisons of one table have an adjusted p-value or none has.")
    interval = f"{100 * levels.pop():g} % interval"
    p_value = ("p (Holm)",) if tested.pop() else ()
    counts = "videos / prompts / seeds"
    return ("metric", "comparison", "mean A", "mean B", "A - B", interval, counts, *p_value, "verdict")


def summary_table(comparisons: Sequence[Comparison]) -> str:
    """
    The comparisons as an aligned text table for the terminal. A verdict says "better" only where the interval excludes
    zero and three seeds stand behind it.

    Raises:
        ValueError: If there is no comparison, or their intervals have different levels.
    """
    rows = [comparison_header(comparisons), *(comparison.cells() for comparison in comparisons)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * (sum(widths) + 2 * (len(widths) - 1)), *lines[1:]])


def write_report(
    path: str | os.PathLike[str],
    *,
    title: str,
    columns: Sequence[Column],
    samples: Sequence[Sample],
    comparisons: Sequence[Comparison] = (),
    tables: Sequence[Table] = (),
    curves: Sequence[Curve] = (),
    notes: Sequence[str] = (),
    disagreement: str | None = None,
    lead: str = "",
    explanations: Mapping[str, str] | None = None,
) -> Path:
    """
    Writes one HTML file that needs no other file and no network. The file appears whole or not at all.

    Args:
        path (path): File to write; its folder is made when missing.
        title (`str`): Heading of the page.
        columns (list of [`Column`]): Models in the order of their columns, with distinct names.
        samples (list of [`Sample`]): Prompts with their videos.
        comparisons (list of [`Comparison`], *optional*): Shown first: a chart of intervals and a table with verdicts.
        tables (list of [`Table`], *optional*): Further tables.
        curves (list of [`Curve`], *optional*): Training curves.
        notes (list of `str`, *optional*): How the numbers were made: command, seeds, machine, limits.
        lead (`str`, *optional*): What came out, in a sentence. With one the page opens with it and the videos, and the
            numbers come after them.
        explanations (`dict[str, str]`, *optional*): What the scores and the curves mean, by the headings "Scores" and
            "Training curves".
        disagreement (`str`, *optional*): Name of a score; samples can then be filtered by how far it differs between
            the columns. Where samples have different categories they can always be filtered by category.

    Returns:
        `Path`: The file written.

    Raises:
        ValueError: If column names repeat, a sample names a column that is not there, a video is not an mp4 file, a
            curve has nothing to draw, or `path` is a file that is no such page.
        FileNotFoundError: If a video does not exist.
    """
    check_page(path)
    names = [column.name for column in columns]
    if len(set(names)) != len(names):
        raise ValueError(f"Columns need distinct names, got {names}.")
    for sample in samples:
        unknown = (set(sample.videos) | set(sample.scores)) - set(names)
        if unknown:
            raise ValueError(
                f"The sample {sample.prompt!r} names columns {sorted(unknown)} that are not among {names}. "
                "Add a `Column` for each or drop them from the sample."
            )
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("video_trl", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    html = environment.get_template("report.html").render(
        title=title,
        columns=columns,
        samples=[_sample_view(sample, names, disagreement) for sample in samples],
        categories=_categories(samples),
        disagreement=disagreement,
        comparisons=_comparison_view(comparisons),
        tables=tables,
        curves=[
            (curve.title, line_chart(curve.x, curve.series, x_label=curve.x_label, y_label=curve.y_label))
            for curve in curves
        ],
        notes=notes,
        lead=lead,
        explanations=explanations or {},
    )
    return write_atomically(path, html)


def _comparison_view(comparisons: Sequence[Comparison]) -> dict[str, object] | None:
    """Chart and table of the comparisons, or None when there are none."""
    if not comparisons:
        return None
    rows = [
        (f"{c.metric}: {c.a} vs {c.b}", c.difference.difference, c.difference.low, c.difference.high)
        for c in comparisons
    ]
    return {
        "chart": interval_chart(rows, x_label="A - B, to the right of zero: A is higher"),
        "header": comparison_header(comparisons),
        "rows": [comparison.cells() for comparison in comparisons],
    }


def _categories(samples: Sequence[Sample]) -> list[str]:
    """Categories to filter by, in the order in which they appear; none where all samples have the same one."""
    categories = list(dict.fromkeys(sample.category for sample in samples if sample.category))
    return categories if len(categories) > 1 else []


def _sample_view(sample: Sample, names: Sequence[str], disagreement: str | None) -> dict[str, object]:
    """One sample as the template wants it: a cell for each column, in the order of the columns."""
    cells = []
    for name in names:
        scores = sample.scores.get(name, {})
        numbers = {key: float(value) for key, value in scores.items() if not isinstance(value, str)}
        cells.append(
            {
                "name": name,
                "video": _data_uri(Path(sample.videos[name])) if name in sample.videos else None,
                # Only a proportion has a bar; any other number is shown as it is.
                "numbers": [(key, value, 0 <= value <= 1) for key, value in numbers.items()],
                "texts": [(key, value) for key, value in scores.items() if isinstance(value, str) and value],
            }
        )
    compared = [
        float(value) for scores in sample.scores.values() for key, value in scores.items() if key == disagreement
    ]
    spread = max(compared) - min(compared) if compared else 0.0
    return {"prompt": sample.prompt, "category": sample.category, "spread": f"{spread:.4f}", "cells": cells}


def _data_uri(video: Path) -> Markup:
    if video.suffix.lower() != ".mp4":
        raise ValueError(
            f"A report embeds mp4 videos, which every browser plays; got {video}. Write it as .mp4 first."
        )
    return Markup("data:video/mp4;base64," + base64.b64encode(video.read_bytes()).decode("ascii"))
