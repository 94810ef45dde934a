# /// script
# requires-python = ">=3.10"
# dependencies = ["video-trl"]
# ///
"""
Preference pairs of real and generated videos (GT-Pair of Reg-DPO, https://huggingface.co/papers/2511.01450).

Without arguments it makes labelled sandbox footage, good and bad, in several formats, runs all five stages on it, and
says how well the pipeline told the clips apart:

    accelerate launch examples/curate_gt_pairs.py

With sources it curates them; docs/data/gt_pair.md explains every stage:

    accelerate launch examples/curate_gt_pairs.py --config examples/configs/gt-pair.yaml --sources my/clips

A run that was stopped goes on where it was when the same command is given again.
"""

import json
import logging
import shutil
import sys
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    import numpy as np

    from video_trl.curation import GTPairConfig, GTPairResult


SANDBOX_CONFIG = Path(__file__).parent / "configs" / "sandbox-gt-pair.yaml"
SIDE = 144  # pixels of the sandbox's footage
# suffix, codec, pixel format, options of the encoder
FORMATS: tuple[tuple[str, str, str, dict[str, str]], ...] = (
    (".mp4", "libx264", "yuv420p", {"preset": "veryfast"}),
    (".mkv", "libx264", "yuv420p10le", {"preset": "veryfast"}),
    (".mov", "mjpeg", "yuvj420p", {}),
    (".webm", "libvpx", "yuv420p", {"deadline": "realtime", "cpu-used": "8", "crf": "10", "b": "2M"}),
)


@dataclass
class ScriptArguments:
    """What the sandbox demonstration is made of; what is curated and how is said by [`GTPairConfig`]."""

    clips_per_kind: int = field(
        default=3, metadata={"help": "Sandbox demonstration: clips of each kind of good and bad footage."}
    )


def main(argv: list[str]) -> None:
    from trl import TrlParser

    from video_trl.curation import GTPairConfig, Shard, run_gt_pair

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    script_args, config = TrlParser((ScriptArguments, GTPairConfig)).parse_args_and_config(args=argv)
    first = Shard.from_environment().index == 0
    if config.sources:
        result = run_gt_pair(config)
        if first:
            print(described(result, config))
        return
    if config.models != ["sandbox"]:
        raise ValueError(
            f"--models {' '.join(config.models)} needs --sources: only the sandbox brings its own clips. Pass "
            "folders, tars or datasets with captions (docs/data/gt_pair.md)."
        )
    if Shard.from_environment().count > 1:
        raise ValueError("The sandbox demonstration draws its footage in one process: use --num_processes 1.")
    footage = Path(config.output_dir) / "footage"
    labels = make_folder(footage, script_args.clips_per_kind)
    result = run_gt_pair(replace(config, sources=[str(footage)]))
    print(compared(result, footage, labels))
    print(described(result, config))


def make_folder(root: Path, clips_per_kind: int) -> dict[str, str | None]:
    """Draws the footage, or takes what an earlier run drew. Returns for each file the defect it has, or None."""
    from tqdm.auto import tqdm

    from video_trl.sandbox.data.labelled_clips import KINDS, make_footage

    listing = root / "labels.json"
    if listing.is_file():
        return json.loads(listing.read_text())
    if root.exists():
        shutil.rmtree(root)  # an earlier run was stopped before the list, which comes last
    labels: dict[str, str | None] = {}
    for index in tqdm(range(clips_per_kind * len(KINDS)), desc="Drawing footage", unit="clip"):
        seed, kind = divmod(index, len(KINDS))
        name = list(KINDS)[kind]
        suffix, codec, pixels, options = FORMATS[index % len(FORMATS)]
        clip = make_footage(name, seed, height=SIDE, width=SIDE, fps=(24.0, 30.0, 25.0)[seed % 3])
        path = root / name / f"clip{seed}{suffix}"  # the same file names in every folder
        write_clip(path, clip.video, clip.fps, codec, pixels, options)
        path.with_suffix(".txt").write_text(clip.prompt)
        labels[str(path.relative_to(root))] = KINDS[name]
    labels |= add_broken_files(root, next(name for name, defect in labels.items() if defect is None))
    listing.write_text(json.dumps(labels, indent=1))
    return labels


def write_clip(path: Path, video: "np.ndarray", fps: float, codec: str, pixels: str, options: dict[str, str]) -> None:
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=Fraction(fps), options=options)
        stream.height, stream.width, stream.pix_fmt = video.shape[1], video.shape[2], pixels
        for frame in video:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))


def add_broken_files(root: Path, good: str) -> dict[str, str]:
    """What every download has: an empty file, an error page under a video's name, a copy."""
    data = (root / good).read_bytes()
    broken = {
        "broken/empty.mp4": (b"", "empty"),
        "broken/page.mp4": (b"<html>404</html>" * 99, "unreadable"),
        "broken/copy.mp4": (data, "repeated"),
    }
    for name, (content, _) in broken.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return {name: defect for name, (_, defect) in broken.items()}


def compared(result: "GTPairResult", footage: Path, labels: dict[str, str | None]) -> str:
    """Precision and recall against the labels, and each clip that was judged otherwise."""
    fates = {
        str(Path(row["path"]).relative_to(footage.absolute())): row["dropped_by"]
        for row in result.manifest.select(["path", "dropped_by"]).to_pylist()
    }
    accepted = {name for name, fate in fates.items() if fate is None}
    good = {name for name, defect in labels.items() if defect is None}
    by_rule = sum(fates[name] == defect for name, defect in labels.items() if defect is not None)
    lines = [
        f"precision {proportion(len(accepted & good), len(accepted))}: clips kept that are good",
        f"recall    {proportion(len(accepted & good), len(good))}: good clips that are kept",
        f"named     {proportion(by_rule, len(labels) - len(good))}: bad clips dropped by the rule meant for them",
    ]
    otherwise = [name for name in labels if fates[name] != labels[name]]
    lines += [f"  {name}: {labels[name] or 'good'}, judged {fates[name] or 'good'}" for name in sorted(otherwise)]
    return "\n".join(lines)


def proportion(count: int, total: int) -> str:
    from video_trl.evaluation import wilson_interval

    low, high = wilson_interval(count, total)
    return f"{count}/{total} [{low:.2f}, {high:.2f}]"


def described(result: "GTPairResult", config: "GTPairConfig") -> str:
    """The funnel and where everything is; the last line accounts for every clip."""
    funnel: dict[str, Any] = result.funnel
    lines = [f"{stage:>12} {count:6d}" for stage, count in funnel.items()]
    folder = Path(config.output_dir)
    lines.append(f"dataset for --dataset_name: {folder / 'pairs'}; every clip: {folder / 'manifest.parquet'}")
    return "\n".join([*lines, result.summary])


if __name__ == "__main__":
    main(sys.argv[1:] or ["--config", str(SANDBOX_CONFIG)])
