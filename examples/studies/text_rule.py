# /// script
# requires-python = ">=3.10"
# dependencies = ["video-trl"]
# ///
"""
How well GT-Pair's `text` rule tells subtitles from textures: the tables under "Text" of docs/benchmarks/gt_pair.md.

    python examples/studies/text_rule.py --values outputs/text_rule.json --report docs/benchmarks/gt_pair.md

Pictures of fifteen textures, at five resolutions, as JPEG of several qualities, without and with one or two lines of
subtitle. The weights of the rule were fitted on seeds below 1000 of the first eight textures; it has never seen the
others. What was measured is kept in the file of values, so that the study can be interrupted and continued.
"""

import argparse
import io
import json
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage, special

from video_trl.curation import GTPairConfig
from video_trl.curation.clips.text_overlay import TEXT_SHORT_EDGE, LineDetector
from video_trl.evaluation.statistics import wilson_interval
from video_trl.files import write_atomically


Rng = np.random.Generator
HEIGHTS = (320, 360, 480, 720, 1080)
LIMITS = (0.0, 0.002, 0.005, 0.01, 0.02)
MARKS = ("<!-- results of examples/studies/text_rule.py -->", "<!-- end of results -->")
WORDS = (
    "the of and to in a is that it was for on are as with his they be at one have this from had by hot but some what "
    "there we can out other were all your when up use word how said an each she which do their time if will way about"
).split()


def _near(rng: Rng, base: tuple[int, int, int], spread: float) -> tuple[int, ...]:
    """A colour near another."""
    return tuple(int(v) for v in (np.array(base) + rng.normal(0, spread) + rng.normal(0, spread / 3, 3)).clip(0, 255))


def _drawn(size: tuple[int, int], ground: tuple[int, ...], draw: Callable[[ImageDraw.ImageDraw, int, int], None]):
    width, height = size
    image = Image.new("RGB", (2 * width, 2 * height), ground)
    draw(ImageDraw.Draw(image), 2 * width, 2 * height)
    return image.resize(size, Image.Resampling.LANCZOS)


def foliage(rng: Rng, size: tuple[int, int]) -> Image.Image:
    unit = rng.uniform(0.015, 0.05)

    def draw(pen: ImageDraw.ImageDraw, width: int, height: int) -> None:
        around = np.linspace(0, 2 * np.pi, 9)
        for _ in range(int(3 / unit**2)):
            x, y, turn = rng.uniform(0, width), rng.uniform(0, height), rng.uniform(0, np.pi)
            long = unit * height * rng.uniform(0.5, 1.5)
            a, b = long * np.cos(around), long * rng.uniform(0.25, 0.5) * np.sin(around)
            corners = zip(
                x + a * np.cos(turn) - b * np.sin(turn), y + a * np.sin(turn) + b * np.cos(turn), strict=True
            )
            pen.polygon(list(corners), fill=_near(rng, (70, 110, 45), 50))

    return _drawn(size, (20, 35, 15), draw)


def grass(rng: Rng, size: tuple[int, int]) -> Image.Image:
    unit, lean = rng.uniform(0.02, 0.12), rng.uniform(-0.3, 0.3)

    def draw(pen: ImageDraw.ImageDraw, width: int, height: int) -> None:
        for _ in range(int(40 / unit)):
            x, y, turn = rng.uniform(0, width), rng.uniform(0, 1.1 * height), rng.normal(lean, 0.35)
            long = unit * height * rng.uniform(0.5, 1.5)
            thick = int(max(1, rng.uniform(0.001, 0.006) * height))
            tip = (x + long * np.sin(turn), y - long * np.cos(turn))
            pen.line([(x, y), tip], fill=_near(rng, (90, 125, 50), 50), width=thick)

    return _drawn(size, (40, 60, 25), draw)


def brick(rng: Rng, size: tuple[int, int]) -> Image.Image:
    tall, aspect, gap = rng.uniform(0.03, 0.12), rng.uniform(1.8, 3.5), rng.uniform(0.06, 0.2)
    base, spread = (
        (int(rng.uniform(90, 190)), int(rng.uniform(40, 120)), int(rng.uniform(30, 100))),
        rng.uniform(5, 35),
    )

    def draw(pen: ImageDraw.ImageDraw, width: int, height: int) -> None:
        high, long = tall * height, tall * height * aspect
        for row in range(int(height / high) + 2):
            for column in range(-1, int(width / long) + 2):
                x, y = (column + row % 2 / 2) * long, row * high
                pen.rectangle([x, y, x + long - gap * high, y + high - gap * high], fill=_near(rng, base, spread))

    return _drawn(size, _near(rng, (170, 165, 155), 30), draw)


def fir(rng: Rng, size: tuple[int, int]) -> Image.Image:
    unit = rng.uniform(0.004, 0.015)

    def draw(pen: ImageDraw.ImageDraw, width: int, height: int) -> None:
        for _ in range(350):
            x, y = rng.uniform(0, width), rng.uniform(0, height)
            turn = rng.uniform(-0.6, 0.6) + np.pi * rng.integers(2)
            for step in range(25):
                foot = (x + step * unit * height * np.cos(turn), y + step * unit * height * np.sin(turn))
                for side in (-1, 1):
                    angle, long = turn + side * rng.uniform(0.6, 1.1), unit * height * rng.uniform(3, 5)
                    tip = (foot[0] + long * np.cos(angle), foot[1] + long * np.sin(angle))
                    pen.line([foot, tip], fill=_near(rng, (60, 90, 60), 45), width=2)

    return _drawn(size, (15, 25, 20) if rng.random() < 0.6 else (200, 210, 220), draw)


def shelves(rng: Rng, size: tuple[int, int]) -> Image.Image:
    rows = int(rng.integers(2, 7))

    def draw(pen: ImageDraw.ImageDraw, width: int, height: int) -> None:
        high = height / rows
        for row in range(rows):
            x, foot = 0.0, (row + 0.94) * high
            while x < width:
                wide, tall = high * rng.uniform(0.06, 0.3), high * rng.uniform(0.6, 0.92)
                colour = tuple(int(value) for value in rng.uniform(20, 230, 3))
                pen.rectangle([x, foot - tall, x + wide, foot], fill=colour)
                if rng.random() < 0.5:
                    pen.rectangle([x, foot - 0.8 * tall, x + wide, foot - 0.75 * tall], fill=(200, 180, 90))
                x += wide + high * rng.uniform(0, 0.02)

    return _drawn(size, (60, 40, 25), draw)


def water(rng: Rng, size: tuple[int, int]) -> Image.Image:
    y, x = np.mgrid[: size[1], : size[0]] / size[1]
    waves = np.zeros(x.shape)
    for _ in range(30):
        number, turn = rng.uniform(15, 200), rng.normal(np.pi / 2, 0.35)
        phase = number * (x * np.cos(turn) + y * np.sin(turn)) * (1 + 0.6 * y) + rng.uniform(0, 6.3)
        waves += np.sin(phase) / number**0.4
    waves = (waves - waves.mean()) / waves.std()
    grey = 60 + 45 * waves + 140 * np.clip(waves - 1.1, 0, 2)
    return Image.fromarray(np.stack([0.8 * grey, grey, 1.1 * grey], -1).clip(0, 255).astype(np.uint8))


def windows(rng: Rng, size: tuple[int, int]) -> Image.Image:
    wide = rng.uniform(0.02, 0.08)
    tall = wide * rng.uniform(0.8, 2)

    def draw(pen: ImageDraw.ImageDraw, width: int, height: int) -> None:
        a, b = wide * height, tall * height
        for row in range(int(height / (1.6 * b)) + 1):
            for column in range(int(width / (1.6 * a)) + 1):
                colour = _near(rng, (60, 70, 90) if rng.random() < 0.7 else (220, 200, 130), 25)
                pen.rectangle([column * 1.6 * a, row * 1.6 * b, (column * 1.6 + 1) * a, (row * 1.6 + 1) * b], colour)

    return _drawn(size, _near(rng, (170, 160, 150), 30), draw)


def branches(rng: Rng, size: tuple[int, int]) -> Image.Image:
    def draw(pen: ImageDraw.ImageDraw, width: int, height: int) -> None:
        def grow(x: float, y: float, turn: float, long: float, thick: float) -> None:
            if long >= 0.01 * height:
                tip = (x + long * np.cos(turn), y + long * np.sin(turn))
                pen.line([(x, y), tip], fill=(40, 30, 25), width=max(1, int(thick)))
                for _ in range(int(rng.integers(2, 4))):
                    grow(*tip, turn + rng.normal(0, 0.5), long * rng.uniform(0.55, 0.85), 0.65 * thick)

        for _ in range(4):
            grow(rng.uniform(0, width), height, rng.normal(-np.pi / 2, 0.2), rng.uniform(0.15, 0.3) * height, 9)

    return _drawn(size, (190, 205, 225), draw)


def fabric(rng: Rng, size: tuple[int, int]) -> Image.Image:
    """A weave of threads of uneven thickness, in checks of two colours."""
    y, x = np.mgrid[: size[1], : size[0]] / size[1]
    threads, checks = rng.uniform(40, 160), rng.uniform(3, 12)
    warp = np.sin(threads * 6.3 * x + rng.normal(0, 0.4, (1, size[0])))
    weft = np.sin(threads * 6.3 * y + rng.normal(0, 0.4, (size[1], 1)))
    over = np.where((np.floor(threads * x) + np.floor(threads * y)) % 2 == 0, warp, weft)
    plaid = (np.sin(checks * x * 6.3) > rng.uniform(-0.5, 0.5)) * 1.0 + (np.sin(checks * y * 6.3) > 0.2)
    colours = np.array([_near(rng, (120, 110, 100), 50) for _ in range(3)], dtype=float)
    picture = colours[plaid.astype(int)] + rng.uniform(10, 45) * over[..., None]
    return Image.fromarray(picture.clip(0, 255).astype(np.uint8))


def noise(rng: Rng, size: tuple[int, int]) -> Image.Image:
    """Grain of any size, from sand to clouds, in grey or in colour."""
    grain = rng.normal(size=(size[1], size[0], 3 if rng.random() < 0.5 else 1))
    scale = size[1] * 10 ** rng.uniform(-3, -1.3)
    grain = ndimage.gaussian_filter(grain, (scale, scale, 0))
    picture = rng.uniform(60, 190) + rng.uniform(15, 70) * grain / grain.std()
    return Image.fromarray(np.broadcast_to(picture, (*picture.shape[:2], 3)).clip(0, 255).astype(np.uint8))


def stripes(rng: Rng, size: tuple[int, int]) -> Image.Image:
    """Blinds, zebras, ploughed fields: parallel bands that may bend, at any angle."""
    y, x = np.mgrid[: size[1], : size[0]] / size[1]
    turn, number = rng.uniform(0, np.pi), 10 ** rng.uniform(0.5, 2)
    along, across = x * np.cos(turn) + y * np.sin(turn), y * np.cos(turn) - x * np.sin(turn)
    bend = rng.uniform(0, 0.1) * np.sin(rng.uniform(1, 8) * along + rng.uniform(0, 6.3))
    part = np.sin(6.3 * number * (across + bend)) > rng.uniform(-0.7, 0.7)
    dark, bright = (np.array(_near(rng, base, 35), dtype=float) for base in ((50, 50, 55), (200, 195, 185)))
    return Image.fromarray(np.where(part[..., None], bright, dark).clip(0, 255).astype(np.uint8))


def fence(rng: Rng, size: tuple[int, int]) -> Image.Image:
    """Pickets with points on two rails, or a net of wire, before grass or sky."""
    ground = _near(rng, (90, 130, 80) if rng.random() < 0.5 else (170, 195, 225), 25)

    def draw(pen: ImageDraw.ImageDraw, width: int, height: int) -> None:
        colour = _near(rng, (225, 220, 210) if rng.random() < 0.6 else (70, 60, 50), 20)
        wide, gap = rng.uniform(0.008, 0.05) * height, rng.uniform(0.4, 1.6)
        if rng.random() < 0.3:
            for start in np.arange(-height, width, wide * 3):
                pen.line([(start, 0), (start + height, height)], fill=colour, width=max(1, int(wide / 6)))
                pen.line([(start + height, 0), (start, height)], fill=colour, width=max(1, int(wide / 6)))
            return
        top, foot = rng.uniform(0.1, 0.8) * height, rng.uniform(0.85, 1.1) * height
        for x in np.arange(0, width, wide * (1 + gap)):
            tip = top - wide * rng.uniform(0.6, 0.8)
            pen.polygon([(x, foot), (x, top), (x + wide / 2, tip), (x + wide, top), (x + wide, foot)], fill=colour)
        for part in (0.2, 0.75):
            y = top + part * (foot - top)
            pen.rectangle([0, y, width, y + 0.7 * wide], fill=colour)

    return _drawn(size, ground, draw)


def crowd(rng: Rng, size: tuple[int, int]) -> Image.Image:
    """Heads and shoulders in rows, smaller towards the back."""
    near, rows = rng.uniform(0.05, 0.2), int(rng.integers(4, 12))

    def draw(pen: ImageDraw.ImageDraw, width: int, height: int) -> None:
        for row in range(rows):
            head = near * height * (0.25 + 0.75 * row / rows)
            foot, x = height * (0.15 + 0.9 * row / rows), -head
            while x < width:
                y = foot + rng.normal(0, 0.15) * head
                coat, skin = tuple(int(v) for v in rng.uniform(15, 220, 3)), _near(rng, (170, 130, 105), 45)
                pen.ellipse([x - 0.9 * head, y + 0.9 * head, x + 1.9 * head, y + 4 * head], fill=coat)
                pen.ellipse([x, y, x + head, y + 1.25 * head], fill=skin)
                pen.pieslice([x, y, x + head, y + head], 180, 360, fill=_near(rng, (45, 35, 30), 30))
                x += head * rng.uniform(1.2, 2.4)

    return _drawn(size, _near(rng, (120, 120, 125), 40), draw)


def gradients(rng: Rng, size: tuple[int, int]) -> Image.Image:
    """Sky, walls and lamps out of focus: soft light, with discs in it."""
    y, x = np.mgrid[: size[1], : size[0]] / size[1]
    turn = rng.uniform(0, np.pi)
    slope = (x * np.cos(turn) + y * np.sin(turn))[..., None]
    picture = np.array(_near(rng, (70, 90, 130), 50)) + slope * rng.uniform(-90, 120, 3)
    for _ in range(int(rng.integers(0, 60))):
        place, wide = rng.uniform(0, 1, 2) * (1, 1.8), 10 ** rng.uniform(-2, -0.8)
        disc = special.expit((wide - np.hypot(y - place[0], x - place[1])) / (0.05 * wide))
        picture += disc[..., None] * rng.uniform(0, 140, 3)
    return Image.fromarray(picture.clip(0, 255).astype(np.uint8))


def pebbles(rng: Rng, size: tuple[int, int]) -> Image.Image:
    """Stones, beans, leaves on the ground: closed shapes side by side, each with a bright side."""
    unit = rng.uniform(0.01, 0.06)

    def draw(pen: ImageDraw.ImageDraw, width: int, height: int) -> None:
        for _ in range(int(2 / unit**2)):
            x, y, wide = rng.uniform(0, width), rng.uniform(0, height), unit * height * rng.uniform(0.5, 1.3)
            tall, colour = wide * rng.uniform(0.5, 1), np.array(_near(rng, (135, 125, 115), 40))
            pen.ellipse([x, y, x + wide, y + tall], fill=tuple((0.5 * colour).astype(int)))
            pen.ellipse([x, y, x + 0.9 * wide, y + 0.9 * tall], fill=tuple(colour))
            bright = tuple((1.25 * colour).clip(0, 255).astype(int))
            pen.ellipse([x + 0.2 * wide, y + 0.15 * tall, x + 0.5 * wide, y + 0.4 * tall], fill=bright)

    return _drawn(size, (40, 38, 35), draw)


FITTED = (foliage, grass, brick, fir, shelves, water, windows, branches)
TEXTURES = (*FITTED, fabric, noise, stripes, fence, crowd, gradients, pebbles)


def subtitle(rng: Rng, image: Image.Image, size: float) -> Image.Image:
    """One or two lines of `size` of the height: white or yellow, outlined, with a shadow, or on a dark box."""
    width, height = image.size
    font, letter, style = ImageFont.load_default(size * height), size * height, int(rng.integers(4))
    pen, lines = ImageDraw.Draw(image, "RGBA"), int(rng.integers(1, 3))
    for line in range(lines):
        text = " ".join(rng.choice(WORDS, int(rng.integers(4, 8)))).capitalize()
        long = pen.textlength(text, font=font)
        x, y = (width - long) / 2, 0.86 * height + (line - lines + 1) * 1.2 * letter
        fill = (250, 220, 60) if style == 2 else (250, 250, 250)
        if style == 1:
            pen.text((x + 0.05 * letter, y + 0.05 * letter), text, font=font, fill=(0, 0, 0))
        if style == 3:
            pen.rectangle([x - 5, y, x + long + 5, y + 1.2 * letter], fill=(0, 0, 0, int(rng.integers(120, 230))))
        outline = max(1, round(0.06 * letter)) if style in (0, 2) else 0
        pen.text((x, y), text, font=font, fill=fill, stroke_width=outline, stroke_fill=(0, 0, 0))
    return image


def cover(detector: LineDetector, texture: Callable, seed: int, height: int, size: float | None) -> float:
    """What the rule measures on a picture of a seed, without a subtitle where `size` is None."""
    rng = np.random.default_rng([zlib.crc32(texture.__name__.encode()), seed])
    image = texture(rng, (round(height * 16 / 9), height))
    if rng.random() < 0.5:
        blurred = ndimage.gaussian_filter(np.asarray(image), (height * rng.uniform(0, 0.002),) * 2 + (0,))
        image = Image.fromarray(blurred)
    if size is not None:
        image = subtitle(rng, image, size)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=int(rng.integers(55, 92)))
    scale = TEXT_SHORT_EDGE / height
    small = Image.open(file).resize((round(image.width * scale), TEXT_SHORT_EDGE), Image.Resampling.BICUBIC)
    return detector.cover(np.asarray(small))


def measure(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Cover of every picture, by texture, seed and "plain" or "subtitled"; what the file has is not measured again."""
    values: dict[str, dict[str, float]] = json.loads(options.values.read_text()) if options.values.is_file() else {}
    detector = LineDetector()
    for texture in TEXTURES:
        found = values.setdefault(texture.__name__, {})
        for seed in range(options.first, options.first + options.count):
            for kind, size in (("plain", None), ("subtitled", options.size)):
                key = f"{seed} {kind}"
                if key not in found:
                    found[key] = cover(detector, texture, seed, HEIGHTS[seed % len(HEIGHTS)], size)
        write_atomically(options.values, json.dumps(values))
    return values


def _rate(hits: int, number: int) -> str:
    low, high = wilson_interval(hits, number)
    return f"{hits}/{number} [{low:.3f}, {high:.3f}]"


def report(values: dict[str, dict[str, float]]) -> str:
    """Tables: what is dropped by each texture at the rule's limit, and over all of them at every limit."""
    limit = GTPairConfig(sources=["x"]).max_text
    covers = {
        (texture, kind): np.array([value for key, value in found.items() if key.endswith(kind)])
        for texture, found in values.items()
        for kind in ("plain", "subtitled")
    }
    lines = [
        f"At `max_text: {limit}`:",
        "",
        "| texture | dropped without text | dropped with subtitles |",
        "|---|---|---|",
    ]
    for texture in values:
        drops = (f"{(covers[texture, k] > limit).sum()}/{len(covers[texture, k])}" for k in ("plain", "subtitled"))
        lines.append(f"| {texture} | {' | '.join(drops)} |")
    plain, subtitled = (
        np.concatenate([v for (_, k), v in covers.items() if k == kind]) for kind in ("plain", "subtitled")
    )
    lines += ["", "Over all of them:", "", "| `max_text` | false drops | recall |", "|---|---|---|"]
    for level in sorted({*LIMITS, limit}):
        rates = (_rate(int((found > level).sum()), len(found)) for found in (plain, subtitled))
        lines.append(f"| {level:g} | {' | '.join(rates)} |")
    area = (subtitled[:, None] > plain).mean() + (subtitled[:, None] == plain).mean() / 2
    return "\n".join([*lines, "", f"Area under the curve: {area:.4f}."])


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the text rule of GT-Pair on rendered subtitles.")
    parser.add_argument("--first", type=int, default=1000, help="first seed; those below 1000 fitted the rule")
    parser.add_argument("--count", type=int, default=11, help="pictures of each texture")
    parser.add_argument("--size", type=float, default=0.05, help="height of the letters, as a proportion")
    parser.add_argument(
        "--values", type=Path, default=Path("outputs/text_rule.json"), help="file of what was measured"
    )
    parser.add_argument("--report", type=Path, help="page to put the tables into, between its two marks")
    options = parser.parse_args()
    tables = report(measure(options))
    if options.report is None:
        print(tables)
        return
    before, after = (options.report.read_text().split(mark)[part] for part, mark in zip((0, 1), MARKS, strict=True))
    write_atomically(options.report, f"{before}{MARKS[0]}\n\n{tables}\n\n{MARKS[1]}{after}")


if __name__ == "__main__":
    main()
