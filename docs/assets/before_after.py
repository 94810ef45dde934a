"""
Draw the picture of the README, an animation, from the results of the sandbox experiment.

    make bench-sandbox
    python docs/assets/before_after.py outputs/bench/results.json docs/assets/before_after.webp

Its videos are the first ones of the report: of each motion that of median gain under PhyGDPO, among those in which the
base model breaks the law in a way with a name; of the first training seed.
"""

import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from video_trl.data.video_io import read_video


ARMS = {"base": "before", "SFT as found": "trained on\nclips as found", "PhyGDPO": "trained by\nPhyGDPO"}
SIZE, MARGIN, LABEL = 144, 6, 132  # pixels
MILLISECONDS = 160


def main(results_file: str, picture: str) -> None:
    results = json.loads(Path(results_file).read_text())
    runs = {run["method"]: run["records"] for run in reversed(results["runs"])} | {"base": results["base"]}
    motions: dict[str, int] = {}
    for case in results["shown"]["cases"]:  # those chosen by gain come first, one of each motion
        motions.setdefault(results["base"][case]["category"], case)
    videos = [[read_video(runs[arm][case]["video"]) for case in motions.values()] for arm in ARMS]
    frames = [_frame(videos, list(motions), number) for number in range(len(videos[0][0]))]
    still = [MILLISECONDS] * (len(frames) - 1) + [6 * MILLISECONDS]
    frames[0].save(picture, save_all=True, append_images=frames[1:], duration=still, loop=0, quality=80, method=6)


def _frame(videos: list[list[np.ndarray]], motions: list[str], number: int) -> Image.Image:
    step, font = SIZE + MARGIN, ImageFont.load_default(15)
    page = Image.new("RGB", (LABEL + step * len(motions), 28 + step * len(videos)), "white")
    draw = ImageDraw.Draw(page)
    for column, motion in enumerate(motions):
        middle = LABEL + step * column + SIZE // 2
        draw.text((middle, 14), motion.replace("_", " "), "black", font, anchor="mm")
    for row, (label, clips) in enumerate(zip(ARMS.values(), videos, strict=True)):
        top = 28 + step * row
        draw.multiline_text((LABEL - 10, top + SIZE // 2), label, "black", font, anchor="rm", align="right")
        for column, clip in enumerate(clips):
            picture = Image.fromarray(clip[number]).resize((SIZE, SIZE), Image.Resampling.LANCZOS)
            page.paste(picture, (LABEL + step * column, top))
    return page


if __name__ == "__main__":
    main(*sys.argv[1:])
