"""Small runs of PhyAugPipe on real clips of the sandbox; videos of two denoising steps, good for nothing but speed."""

from pathlib import Path
from typing import Any

from datasets import Dataset

from video_trl.curation.phyaug.pipeline import PhyAugConfig
from video_trl.data import write_video
from video_trl.sandbox import simulate


# What each row of `small_pool` shows; "twice" repeats the first.
KINDS = (
    "rolling",
    "static",
    "incline",
    "rolling",
    "pan",
    "rolling",
    "incline",
    "fade",
    "buoyancy",
    "rolling",
    "twice",
)


def settings(output_dir: Path, **changes: Any) -> dict[str, Any]:
    call = {"num_inference_steps": 2, "guidance_scale": 1.0}
    values = {
        "output_dir": str(output_dir),
        "annotator": "sandbox",
        "actions": "sandbox",
        "embedder": "sandbox",
        "representatives": 1,
        "budget": 4,
        "redistribute": True,
        "model": "sandbox",
        "model_options": {"dtype": "float32", "batch_size": 4, "call_kwargs": call},
        "seeds": [0, 1],
        "height": 64,
        "width": 64,
        "fps": 8.0,
        "num_frames": 13,
        "judge": "sandbox",
        "batch_size": 4,
    }
    return values | changes


def config(output_dir: Path, **changes: Any) -> PhyAugConfig:
    return PhyAugConfig(**settings(output_dir, **changes))


def small_pool(folder: Path, kinds: tuple[str, ...] = KINDS) -> Dataset:
    rows: list[dict[str, str]] = []
    for index, kind in enumerate(kinds):
        path = folder / f"{index:02d}.mp4"
        if kind == "twice":
            path.write_bytes(Path(rows[0]["video"]).read_bytes())
            rows.append(rows[0] | {"video": str(path)})
        else:
            clip = simulate(40_000_000 + index, motion=kind)
            rows.append({"video": str(write_video(path, clip.video, clip.fps)), "prompt": clip.prompt})
    return Dataset.from_list(rows)
