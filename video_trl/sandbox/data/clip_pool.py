"""
A pool of captioned clips as a crawl would give it, with a label for each: what PhyAugPipe has to sort out.

Half of the clips show nothing that physics could be learned from, common motions outnumber rare ones six to one, some
captions promise what the clip does not show, and some rows are broken. The labels lie in a file of their own.
"""

import logging
from dataclasses import asdict, dataclass
from pathlib import Path

import datasets
import numpy as np
from tqdm.auto import tqdm

from ...data.video_io import write_video
from ...files import read_json, write_atomically, write_json
from ..world.prompts import MOTIONS, STILL_SCENES, describe, templates
from ..world.simulate import FPS, simulate


logger = logging.getLogger(__name__)

POOL_VERSION = 1
_FIRST_SEED = 20_000_000  # away from the seeds of the base model's corpus, the benchmark and `build_group_dataset`

#: Share of all rows by what they show; the remaining rows show a motion, in the proportions of `MOTION_SHARES`.
POOR_SHARES = {"static": 0.24, "fade": 0.10, "pan": 0.10, "false_caption": 0.07}
FAULT_SHARES = {"missing": 0.005, "broken": 0.005, "repeated": 0.01, "long_caption": 0.005, "other_script": 0.005}
FAULT_SHARES |= {"no_caption": 0.005}
MOTION_SHARES = {
    "rolling": 0.30,
    "incline": 0.22,
    "buoyancy": 0.16,
    "free_fall": 0.12,
    "collision": 0.09,
    "projectile": 0.06,
    "pendulum": 0.05,
}
_LABELS, _TABLE = "labels.json", "table"
_OTHER_SCRIPT = "Красный мяч катится вправо и замедляется."


@dataclass(frozen=True)
class Label:
    """
    The truth about one row.

    Attributes:
        kind: one of `MOTIONS`, `POOR_SHARES` or `FAULT_SHARES`.
        rich: a lawful motion, described by its caption, in a file that is whole: what the filter should keep.
    """

    kind: str
    rich: bool


def make_pool(folder: str | Path, *, num_clips: int = 2400, seed: int = 0) -> Path:
    """
    Draws a pool, or finds the same one drawn before. A run that was stopped goes on where it was.

    Args:
        folder: receives `videos/*.mp4`, `table` (columns `video`, `prompt`) and `labels.json`.
        num_clips: rows.
        seed: of the kinds and the clips.

    Returns:
        The folder of the table, a source for `run_phyaug`.

    Raises:
        ValueError: `num_clips` below 1, or `folder` holds another pool.
    """
    if num_clips < 1:
        raise ValueError(f"Expected `num_clips` >= 1, got {num_clips}.")
    folder = Path(folder).absolute()
    request = {"version": POOL_VERSION, "num_clips": num_clips, "seed": seed}
    listing = folder / _LABELS
    if listing.is_file():
        found = read_json(listing)["request"]
        if found != request:
            raise ValueError(f"{folder} holds another pool, {found}, expected {request}. Pass another folder.")
        return folder / _TABLE
    rows: list[dict[str, str]] = []
    labels: list[Label] = []
    original = -1  # the last row that shows a motion
    for index, kind in enumerate(tqdm(_kinds(num_clips, seed), desc="Drawing the pool", unit="clip")):
        path = folder / "videos" / f"{index:06d}.mp4"
        if kind == "repeated":
            rows.append(rows[original] | {"video": str(path)})
            write_atomically(path, Path(rows[original]["video"]).read_bytes())
        else:
            rows.append(_write_row(path, kind, index, _FIRST_SEED + 1_000_000 * seed + index))
        labels.append(Label(kind, kind in MOTIONS))
        original = index if kind in MOTIONS else original
    datasets.Dataset.from_list(rows).save_to_disk(str(folder / _TABLE))
    # It comes last: without it, the pool is not whole.
    write_json(listing, {"request": request, "labels": [asdict(label) for label in labels]})
    return folder / _TABLE


def pool_labels(folder: str | Path) -> list[Label]:
    """
    The labels of a pool, in the order of its rows.

    Raises:
        ValueError: No whole pool in `folder`.
    """
    listing = Path(folder) / _LABELS
    if not listing.is_file():
        raise ValueError(f"{folder} holds no whole pool: no {_LABELS}. Run `make_pool` again.")
    return [Label(**label) for label in read_json(listing)["labels"]]


def _kinds(number: int, seed: int) -> list[str]:
    shares = POOR_SHARES | FAULT_SHARES
    rest = 1 - sum(shares.values())
    shares |= {motion: rest * share for motion, share in MOTION_SHARES.items()}
    rng = np.random.default_rng([seed, 0x9001])
    kinds = [str(kind) for kind in rng.choice(list(shares), size=number, p=np.array(list(shares.values())))]
    # A copy needs something before it that it can be a copy of.
    first = next((index for index, kind in enumerate(kinds) if kind in MOTIONS), number)
    return ["rolling" if kind == "repeated" and index < first else kind for index, kind in enumerate(kinds)]


def _write_row(path: Path, kind: str, index: int, seed: int) -> dict[str, str]:
    """The row of one clip; its file is written where it is not there yet."""
    if kind == "broken":
        write_atomically(path, b"<html>404</html>" * 50)
        return {"video": str(path), "prompt": "A red ball rolls to the right and slows down."}
    motion = {"false_caption": STILL_SCENES[index % len(STILL_SCENES)]}.get(kind, kind)
    clip = simulate(seed, motion="rolling" if kind in FAULT_SHARES else motion)
    prompt = clip.prompt
    if kind == "false_caption":
        promised = simulate(seed, motion=MOTIONS[index % len(MOTIONS)]).spec
        prompt = describe(promised, templates(promised.motion, "train")[0])
    elif kind == "long_caption":
        prompt = " ".join([prompt] * 220)
    elif kind in ("other_script", "no_caption"):
        prompt = _OTHER_SCRIPT if kind == "other_script" else ""
    if kind != "missing" and not path.is_file():
        write_video(path, clip.video, FPS)
    return {"video": str(path), "prompt": prompt}
