"""Report of a PhyAugPipe run: an HTML page with funnel and histograms, and the dataset card."""

from collections.abc import Mapping, Sequence
from importlib import metadata, resources
from pathlib import Path
from typing import Any, Protocol

import jinja2
import yaml
from markupsafe import Markup, escape

from ...files import unmarked, write_atomically


class CategoryRow(Protocol):
    """See [`~video_trl.curation.phyaug.pipeline.Category`]."""

    @property
    def name(self) -> str: ...
    @property
    def available(self) -> int: ...
    @property
    def representatives(self) -> int: ...
    @property
    def score(self) -> float | None: ...
    @property
    def difficulty(self) -> float | None: ...
    @property
    def sampled(self) -> int: ...


_ROW, _LABEL, _BAR = 24, 250, 420  # pixels: height of a row, width of the names, width of the longest bar


def bar_chart(rows: Sequence[tuple[str, Sequence[float]]], names: Sequence[str], *, label: str) -> Markup:
    """
    Horizontal bars, several for each row, each series with a scale of its own and its values in words.

    Args:
        rows: name and values, one for each series.
        names: of the series.
        label: what the chart shows, for those who do not see it.
    """
    most = [max((values[i] for _, values in rows), default=0) or 1 for i in range(len(names))]
    height = _ROW * len(rows) * len(names) + 8 * len(rows) + 8
    parts = [
        f'<svg class="chart" role="img" aria-label="{escape(label)}" viewBox="0 0 {_LABEL + _BAR + 90} {height}">'
    ]
    y = 4
    for name, values in rows:
        middle = y + _ROW * len(names) / 2 + 4
        parts.append(f'<text x="{_LABEL - 8}" y="{middle:.0f}" text-anchor="end">{escape(name)}</text>')
        for series, value in enumerate(values):
            width = _BAR * value / most[series]
            parts.append(
                f'<rect x="{_LABEL}" y="{y + 3}" width="{max(width, 1):.1f}" height="{_ROW - 6}" '
                f'style="fill: var(--series-{series})"/>'
                f'<text x="{_LABEL + width + 6:.0f}" y="{y + _ROW / 2 + 4:.0f}">{_shown(value)}</text>'
            )
            y += _ROW
        y += 8
    parts.append("</svg>")
    items = "".join(
        f'<li><span class="swatch" style="background: var(--series-{i})"></span>{escape(name)}</li>'
        for i, name in enumerate(names)
    )
    legend = f'<ul class="legend">{items}</ul>' if len(names) > 1 else ""
    return Markup("".join(parts) + legend)


def write_funnel(
    path: Path,
    funnel: Mapping[str, int],
    fates: Mapping[str, int],
    categories: Sequence[CategoryRow],
    provenance: Mapping[str, str],
) -> None:
    """A self-contained page: what came through each stage, why the rest did not, and the histograms of Section 2.1."""
    counts = [(row.name, (float(row.available), float(row.sampled))) for row in categories]
    hard = [(row.name, (row.difficulty or 0.0,)) for row in categories]
    page = _render(
        "phyaug_funnel.html",
        funnel=bar_chart([(name, (float(count),)) for name, count in funnel.items()], ["clips"], label="Funnel"),
        fates=sorted(fates.items(), key=lambda item: -item[1]),
        categories=categories,
        counts=bar_chart(counts, ["in the pool after the filter (H_f)", "sampled (H_r)"], label="Clips by category"),
        hard=bar_chart(hard, ["difficulty (1 - S_f)"], label="Difficulty by category"),
        provenance=provenance,
    )
    write_atomically(path, page)


def write_dataset_card(
    path: Path,
    funnel: Mapping[str, int],
    fates: Mapping[str, int],
    categories: Sequence[CategoryRow],
    provenance: Mapping[str, str],
    settings: Mapping[str, Any],
    *,
    num_rejected: int,
    license: str | None,
    license_notes: str,
) -> None:
    """The README of the dataset, with front matter that the Hub reads."""
    front: dict[str, Any] = {
        "task_categories": ["text-to-video"],
        "tags": ["video", "preference", "dpo", "physics", "video-trl"],
        "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": "**/*.parquet"}]}],
    }
    if license is not None:
        front["license"] = license
    card = _render(
        "phyaug_card.md",
        front_matter=f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        groups=funnel["groups"],
        num_rejected=num_rejected,
        funnel=funnel,
        fates=sorted(fates.items(), key=lambda item: -item[1]),
        categories=categories,
        provenance=provenance,
        settings={name: value for name, value in settings.items() if value not in (None, "", {})},
        license=license,
        license_notes=license_notes,
        version=_version(),
    )
    write_atomically(path, card)


def _render(template: str, **values: Any) -> str:
    text = resources.files("video_trl").joinpath(f"templates/{template}").read_text(encoding="utf-8")
    page = template.endswith(".html")
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, autoescape=page, keep_trailing_newline=True)
    environment.filters["cell"] = _cell
    return environment.from_string(text).render(**values)


def _shown(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) else f"{value:.3f}"


def _cell(value: Any) -> str:
    """A value in a Markdown table."""
    return unmarked("" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value))


def _version() -> str:
    try:
        return metadata.version("video-trl")
    except metadata.PackageNotFoundError:  # run from a checkout
        return "unknown"
