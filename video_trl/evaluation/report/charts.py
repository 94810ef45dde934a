"""
Draw charts of reports as inline SVG: curves over steps, and differences with intervals. No plotting library.

Colours come from the page (`--series-0` ... and `currentColor`), so a chart follows its light or dark theme.
"""

import math
from collections.abc import Mapping, Sequence

from markupsafe import Markup, escape


NUM_COLOURS = 6
_WIDTH, _HEIGHT = 640, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 12, 12, 44


def line_chart(x: Sequence[float], series: Mapping[str, Sequence[float]], *, x_label: str, y_label: str) -> Markup:
    """
    Line chart of one or several series over a common x. A value that is not finite breaks its line.

    Args:
        x (sequence of length `n`): Positions, finite.
        series (`dict[str, sequence]`): Values of each series, each of length `n`; at least one value is finite.
        x_label (`str`), y_label (`str`): Names of the axes, with their unit.

    Returns:
        `Markup`: An `<svg>` element followed by its legend.

    Raises:
        ValueError: If a length differs from that of `x`, or there is no finite value to draw.
    """
    for name, values in series.items():
        if len(values) != len(x):
            raise ValueError(f"Series {name!r} has {len(values)} values for {len(x)} positions on the x axis.")
    finite = [value for values in series.values() for value in values if math.isfinite(value)]
    if not finite:
        raise ValueError(f"There is no finite value to draw in {sorted(series)}.")
    x_ticks, y_ticks = nice_ticks(min(x), max(x)), nice_ticks(min(finite), max(finite))
    x_low, x_high = min(x), max(max(x), min(x) + 1e-12)
    y_low, y_high = min(y_ticks[0], min(finite)), max(y_ticks[-1], max(finite))

    def to_x(value: float) -> float:
        return _LEFT + (value - x_low) / (x_high - x_low) * (_WIDTH - _LEFT - _RIGHT)

    def to_y(value: float) -> float:
        return _HEIGHT - _BOTTOM - (value - y_low) / (y_high - y_low) * (_HEIGHT - _TOP - _BOTTOM)

    parts = [_open_svg(_HEIGHT, f"{y_label} over {x_label}")]
    for tick in y_ticks:
        parts.append(_line(_LEFT, to_y(tick), _WIDTH - _RIGHT, to_y(tick), "grid"))
        parts.append(_text(_LEFT - 6, to_y(tick) + 4, f"{tick:g}", "end"))
    for tick in x_ticks:
        if x_low <= tick <= x_high:
            parts.append(_text(to_x(tick), _HEIGHT - _BOTTOM + 16, f"{tick:g}", "middle"))
    parts.append(_text((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 6, x_label, "middle"))
    middle = (_HEIGHT - _BOTTOM + _TOP) / 2
    parts.append(_text(14, middle, y_label, "middle", f' transform="rotate(-90 14 {middle:.1f})"'))
    for number, values in enumerate(series.values()):
        path = _path([(to_x(a), to_y(b)) for a, b in zip(x, values, strict=True)])
        parts.append(
            Markup('<path class="line" style="stroke:var(--series-{})" d="{}"/>').format(_colour(number), path)
        )
    parts.append(Markup("</svg>"))
    return Markup("\n").join([*parts, _legend(series)])


def interval_chart(rows: Sequence[tuple[str, float, float, float]], *, x_label: str) -> Markup:
    """
    Differences with their intervals against a line at zero.

    Args:
        rows (sequence of `(label, estimate, low, high)`): One line of the chart each, all finite; at least one.
        x_label (`str`): What the differences measure.

    Returns:
        `Markup`: An `<svg>` element.
    """
    assert rows, "an interval chart needs a row"
    low, high = min(0.0, *(row[2] for row in rows)), max(0.0, *(row[3] for row in rows))
    ticks = nice_ticks(low, high)
    low, high = min(low, ticks[0]), max(high, ticks[-1])
    left, row_height = 240, 30
    bottom = _TOP + row_height * len(rows)

    def to_x(value: float) -> float:
        return left + (value - low) / (high - low) * (_WIDTH - left - _RIGHT - 8)

    parts = [_open_svg(bottom + _BOTTOM, x_label)]
    for tick in ticks:
        parts.append(_line(to_x(tick), _TOP, to_x(tick), bottom, "zero" if tick == 0 else "grid"))
        parts.append(_text(to_x(tick), bottom + 16, f"{tick:g}", "middle"))
    for number, (label, estimate, row_low, row_high) in enumerate(rows):
        y = _TOP + row_height * (number + 0.5)
        parts.append(_text(left - 10, y + 4, label, "end"))
        parts.append(_line(to_x(row_low), y, to_x(row_high), y, "interval"))
        parts.append(Markup('<circle class="estimate" cx="{:.1f}" cy="{:.1f}" r="4.5"/>').format(to_x(estimate), y))
    parts.append(_text((left + _WIDTH - _RIGHT) / 2, bottom + 36, x_label, "middle"))
    parts.append(Markup("</svg>"))
    return Markup("\n").join(parts)


def nice_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten that cover [low, high]: about `most` of them, ascending."""
    if high - low < 1e-12 * max(abs(low), abs(high), 1e-300):
        # A flat line: give it a band to lie in.
        low, high = low - max(abs(low) * 0.1, 1e-3), high + max(abs(high) * 0.1, 1e-3)
    rough = (high - low) / (most - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{number * step:.12g}") for number in range(first, last + 1)]


def _colour(number: int) -> int:
    return number % NUM_COLOURS


def _open_svg(height: float, label: str) -> Markup:
    opening = '<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}" xmlns="http://www.w3.org/2000/svg">'
    return Markup(opening).format(_WIDTH, height, label)


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> Markup:
    return Markup('<line class="{}" x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}"/>').format(kind, x1, y1, x2, y2)


def _text(x: float, y: float, text: str, anchor: str, attributes: str = "") -> Markup:
    return Markup('<text x="{:.1f}" y="{:.1f}" text-anchor="{}"{}>{}</text>').format(
        x, y, anchor, Markup(attributes), text
    )


def _path(points: Sequence[tuple[float, float]]) -> str:
    """SVG path data; a point that is not finite ends a piece, and the next finite one starts another."""
    pieces, move = [], True
    for x, y in points:
        if not math.isfinite(y):
            move = True
            continue
        pieces.append(f"{'M' if move else 'L'}{x:.1f} {y:.1f}")
        move = False
    return " ".join(pieces)


def _legend(names: Sequence[str] | Mapping[str, object]) -> Markup:
    entry = Markup('<li><span class="swatch" style="background:var(--series-{})"></span>{}</li>')
    entries = [entry.format(_colour(number), escape(name)) for number, name in enumerate(names)]
    return Markup('<ul class="legend">{}</ul>').format(Markup("").join(entries))
