import base64
import math
import re
from html.parser import HTMLParser

import av
import numpy as np
import pytest

from video_trl.evaluation import (
    Column,
    Comparison,
    Curve,
    Sample,
    Table,
    paired_bootstrap,
    summary_table,
    write_report,
)
from video_trl.evaluation.report.charts import interval_chart, line_chart, nice_ticks


@pytest.fixture
def clip(tmp_path):
    """A real mp4 of four frames."""
    path = tmp_path / "clip.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        for shade in (0, 80, 160, 240):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), shade, dtype=np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


@pytest.fixture
def comparisons():
    rng = np.random.default_rng(0)
    base = rng.uniform(size=40)
    better = paired_bootstrap(base + 0.2, base + rng.normal(0, 0.01, 40))
    same = paired_bootstrap(base, rng.permutation(base))
    return [Comparison("pc", "PhyGDPO", "base", better, 3), Comparison("sa", "PhyGDPO", "base", same, 3)]


class _Page(HTMLParser):
    """Collects the elements with their attributes and the text; fails on a tag that closes what is not open."""

    VOID = {"meta", "img", "br"}

    def __init__(self, html):
        super().__init__()
        self.elements, self.text, self.open = [], [], []
        self.feed(html)
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data):
        self.text.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def _write(tmp_path, **kwargs):
    path = write_report(tmp_path / "deep" / "report.html", title="Run", **kwargs)
    return path.read_text(encoding="utf-8")


def test_report_holds_everything_and_refers_to_nothing_outside(tmp_path, clip, comparisons):
    html = _write(
        tmp_path,
        columns=[Column("base", "before training"), Column("PhyGDPO", "after training")],
        samples=[
            Sample(
                "A red ball falls.",
                {"base": clip, "PhyGDPO": clip},
                {"base": {"pc": 0.25, "sa": 1.0, "explanation": "The ball hovers."}, "PhyGDPO": {"pc": 0.875}},
                category="free fall",
            )
        ],
        comparisons=comparisons,
        tables=[Table("Share of joint passes", ["model", "share"], [["base", "10/40"]], note="threshold 0.5")],
        curves=[Curve("Rewards", [0, 1, 2], {"chosen": [0.0, 0.5, 0.7], "rejected": [0.0, -0.1, -0.4]})],
        notes=["seed 0"],
    )
    page = _Page(html)
    videos = page.all("video")
    assert len(videos) == 2
    for video in videos:
        assert {"autoplay", "loop", "muted", "playsinline", "controls"} <= set(video)
        encoded = video["src"].removeprefix("data:video/mp4;base64,")
        assert base64.b64decode(encoded) == clip.read_bytes()
    text = " ".join("".join(page.text).split())
    for expected in ("A red ball falls.", "(free fall)", "before training", "The ball hovers.", "0.88", "10/40",
                     "threshold 0.5", "Rewards", "seed 0", "better", "no difference shown"):  # fmt: skip
        assert expected in text
    assert len(page.all("svg")) == 2
    assert not page.all("link") and not [s for s in page.all("script") if "src" in s]
    assert not re.search(r"""(?:src|href)=["'](?!data:)""", html)
    assert "url(" not in html and "@import" not in html


def test_report_escapes_every_text(tmp_path, clip, comparisons):
    evil = "<img src=x onerror=alert(1)>&\"'"
    html = _write(
        tmp_path,
        columns=[Column(evil, evil)],
        samples=[Sample(evil, {evil: clip}, {evil: {evil: 0.5, "explanation": evil}}, category=evil)],
        comparisons=[Comparison(evil, evil, evil, comparisons[0].difference, 3)],
        tables=[Table(evil, [evil], [[evil]], note=evil)],
        curves=[Curve(evil, [0, 1], {evil: [0, 1]}, x_label=evil, y_label=evil)],
        notes=[evil],
    )
    page = _Page(html)
    assert not page.all("img")
    assert "".join(page.text).count(evil) >= 15


def test_report_shows_a_missing_video_and_numbers_outside_the_unit_interval(tmp_path, clip):
    html = _write(
        tmp_path,
        columns=[Column("base"), Column("tuned")],
        samples=[Sample("p", {"base": clip}, {"base": {"pc": 0.5, "residual": 3.25}})],
    )
    page = _Page(html)
    assert len(page.all("video")) == 1 and "no video" in html and "3.25" in html
    assert [s for s in page.all("span") if s.get("style") == "width:50%"]
    assert not [s for s in page.all("span") if s.get("style", "").startswith("width:3")]


@pytest.mark.parametrize(
    ("columns", "videos", "error", "message"),
    [
        (["a", "a"], {}, ValueError, "distinct"),
        (["a"], {"b": "clip.mp4"}, ValueError, "not among"),
        (["a"], {"a": "clip.gif"}, ValueError, "mp4"),
        (["a"], {"a": "gone.mp4"}, FileNotFoundError, "gone.mp4"),
    ],
)
def test_report_rejects(tmp_path, columns, videos, error, message):
    with pytest.raises(error, match=message):
        _write(tmp_path, columns=[Column(name) for name in columns], samples=[Sample("p", videos)])
    assert not list(tmp_path.rglob("*.html")) and not list(tmp_path.rglob("*.tmp"))


def test_a_failed_write_leaves_the_previous_report(tmp_path):
    path = write_report(tmp_path / "report.html", title="first", columns=[], samples=[])
    before = path.read_text()
    with pytest.raises(UnicodeEncodeError):
        write_report(path, title="a lone surrogate \ud800", columns=[], samples=[])
    assert path.read_text() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_is_no_report_is_not_replaced(tmp_path):
    path = tmp_path / "mine.html"
    path.write_text("<html>years of work</html>")
    with pytest.raises(ValueError, match=r"mine\.html is no page of video_trl and stays"):
        write_report(path, title="t", columns=[], samples=[])
    assert path.read_text() == "<html>years of work</html>"


def test_table_and_curve_reject_ragged_input():
    with pytest.raises(ValueError, match="2 columns"):
        Table("t", ["a", "b"], [["1", "2"], ["3"]])
    with pytest.raises(ValueError, match="'s' has 1 values for 2"):
        line_chart([0, 1], {"s": [1.0]}, x_label="", y_label="")
    with pytest.raises(ValueError, match="no finite value"):
        line_chart([0, 1], {"s": [math.nan, math.inf]}, x_label="", y_label="")


def test_summary_table_is_aligned_and_carries_the_verdicts(comparisons):
    lines = summary_table(comparisons).splitlines()
    assert len(lines) == 4
    assert lines[0].index("verdict") == lines[2].index("better") == lines[3].index("no difference shown")
    assert "95 % interval" in lines[0]
    assert "40 / 40 / 3" in lines[2]
    d = comparisons[0].difference
    assert f"[{d.low:+.3f}, {d.high:+.3f}]" in lines[2]


def test_summary_table_rejects_mixed_levels_and_nothing(comparisons):
    other = paired_bootstrap([0.0, 1.0, 2.0], [0.0, 0.0, 0.0], level=0.9)
    with pytest.raises(ValueError, match="one confidence level"):
        summary_table([*comparisons, Comparison("pc", "a", "b", other, 1)])
    with pytest.raises(ValueError, match="one confidence level"):
        summary_table([])


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (-0.03, 0.21, [-0.05, 0, 0.05, 0.1, 0.15, 0.2, 0.25]),
        (0, 600, [0, 200, 400, 600]),
    ],
)
def test_nice_ticks(low, high, expected):
    assert nice_ticks(low, high) == pytest.approx(expected)


@pytest.mark.parametrize("value", [0.0, 1.0, -3.5, 1e-9, 1e12])
def test_nice_ticks_of_a_flat_line_bracket_it(value):
    ticks = nice_ticks(value, value)
    assert ticks[0] < value < ticks[-1] and len(ticks) < 12


def test_line_chart_puts_large_values_higher_and_breaks_at_nan():
    svg = line_chart([0, 1, 2, 3], {"s": [0.0, 1.0, math.nan, 0.5]}, x_label="step", y_label="loss")
    path = re.search(r' d="([^"]*)"', svg).group(1)
    points = [(float(x), float(y)) for x, y in re.findall(r"([\d.]+) ([\d.]+)", path)]
    assert path.count("M") == 2 and len(points) == 3
    assert points[1][1] < points[2][1] < points[0][1]
    assert points[0][0] < points[1][0] < points[2][0]


def test_line_chart_of_one_point_and_of_a_constant_is_finite():
    for x, y in ([5], [1.0]), ([0, 1], [2.0, 2.0]):
        svg = line_chart(x, {"s": y}, x_label="", y_label="")
        assert "nan" not in svg and "inf" not in svg


def test_interval_chart_draws_the_interval_and_zero():
    svg = interval_chart([("pc", 0.2, 0.1, 0.3), ("sa", -0.05, -0.1, 0.02)], x_label="difference")
    intervals = re.findall(r'class="interval" x1="([\d.]+)" y1="[\d.]+" x2="([\d.]+)"', svg)
    zero = float(re.search(r'class="zero" x1="([\d.]+)"', svg).group(1))
    (low, high), (other_low, other_high) = [(float(a), float(b)) for a, b in intervals]
    assert zero < low < high
    assert other_low < zero < other_high
