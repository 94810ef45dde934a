"""
The sandbox's datasets: simulated clips, and groups. Of a group the chosen video is a simulated real one, the rejected
ones are what the base model makes of the same sentence, judged. It is the data recipe of PhyGDPO at a size that takes
a minute or two.
"""

from pathlib import Path
from typing import Any

import datasets
import numpy as np
from tqdm.auto import tqdm

from ...data.columns import group_features
from ...data.video_io import write_video
from ...files import atomic_folder, fingerprint, read_json, write_json
from ..weights.pipeline import Sandbox
from ..world.prompts import BASE_MOTIONS
from ..world.simulate import BASE_VIOLATIONS, FPS, Clip, Rendering, simulate
from .generate import generate


DATASET_VERSION = 2
REQUEST_NAME = "request.json"
_FIRST_SEED = 10_000_000  # away from the seeds that the base model and the held-out clips come from
_FIRST_CLIP_SEED = 20_000_000  # away from those, from the teacher's, and from these groups
_FIRST_FOUND_SEED = 60_000_000  # away from all of these, and from those that the experiment was tuned on
_SHARE_VIOLATED = 0.57  # as in the base model's mixture
PASSES = 0.8  # what the judge asks of a clip that is found


def found_clips(number: int, seed: int = 0) -> list[Clip]:
    """
    Clips as a crawl would find them: the base model's motions in turn, and as many of them break their law, in the
    ways of the base model, as in the mixture that it was trained on.
    """
    rng = np.random.default_rng([seed, 2])
    clips = []
    for index in range(number):
        motion = BASE_MOTIONS[index % len(BASE_MOTIONS)]
        broken, violation = rng.random() < _SHARE_VIOLATED, str(rng.choice(BASE_VIOLATIONS[motion]))
        clip_seed = _FIRST_FOUND_SEED + 1_000_000 * seed + index
        clips.append(simulate(clip_seed, motion=motion, violation=violation if broken else None))
    return clips


def build_clip_dataset(
    output_dir: str | Path, *, num_clips: int = 128, rendering: Rendering = "plain", found: bool = False
) -> datasets.Dataset:
    """
    Clips with their sentences: what a model can be fine-tuned on. They obey the laws of motion.

    Args:
        output_dir: receives one mp4 file for each clip.
        num_clips: rows, the base model's motions in turn. Their scenes are those of no other dataset of the sandbox.
        rendering: as in `simulate`.
        found: take the clips of `found_clips` instead, lawful or not, plainly rendered.

    Returns:
        Row type "video": prompt, and the path of the video.

    Raises:
        ValueError: `num_clips` below 1.
    """
    if num_clips < 1:
        raise ValueError(f"Expected num_clips >= 1, got {num_clips}.")
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    numbers = range(num_clips)
    clips = found_clips(num_clips) if found else (_base_clip(_FIRST_CLIP_SEED + i, i, rendering) for i in numbers)
    first = _FIRST_FOUND_SEED if found else _FIRST_CLIP_SEED
    rows = []
    for seed, clip in enumerate(clips, start=first):
        rows.append({"prompt": clip.prompt, "video": str(write_video(folder / f"{seed}.mp4", clip.video, clip.fps))})
    return datasets.Dataset.from_list(rows)


def build_group_dataset(
    sandbox: Sandbox,
    output_dir: str | Path,
    *,
    num_groups: int = 128,
    num_rejected: int = 3,
    seed: int = 0,
    guidance_scale: float = 1.0,
    rendering: Rendering = "plain",
    found: bool = False,
    judged: bool = True,
    batch_size: int = 16,
) -> datasets.Dataset:
    """
    Builds (or loads, when `output_dir` holds the same request) a group dataset of real mp4 files.

    Args:
        sandbox: pipeline and judge.
        output_dir: receives `videos/*.mp4` and the table; written whole or not at all.
        num_groups: rows. Sentences come from the training paraphrases, the base model's motions in turn.
        num_rejected: generated videos a row (the m of PhyGDPO).
        seed: another one gives other scenes and other noise.
        guidance_scale: of the rejected videos. Without guidance (1) they are samples of the reference policy, as the
            objective assumes; guided ones teach the model to undo guidance (docs/extend/decisions.md).
        rendering: of the chosen videos, as in `simulate`: "wild" ones look like nothing that the base model has seen.
        found: take the chosen videos from `num_groups` clips of `found_clips`: those that the judge passes, by a `pc`
            of at least 0.8. There are fewer rows than clips then.
        judged: off: take all of those clips, lawful or not.
        batch_size: videos generated together.

    Returns:
        Row type "group": prompt, chosen, rejected, rejected_scores, category, seeds, generator, provenance.

    Raises:
        ValueError: `num_groups` or `num_rejected` below 1, or `output_dir` holds something else.
    """
    if num_groups < 1 or num_rejected < 1:
        raise ValueError(f"Expected num_groups >= 1 and num_rejected >= 1, got {num_groups} and {num_rejected}.")
    folder = Path(output_dir).absolute()
    request: dict[str, Any] = {
        "version": DATASET_VERSION,
        "generator": str(sandbox.pipeline.config._name_or_path).rsplit("/", 1)[-1],
        "weights": fingerprint(sandbox.pipeline.transformer),  # other weights make other rejected videos
        "num_groups": num_groups,
        "num_rejected": num_rejected,
        "seed": seed,
        "rendering": rendering,
        **({"found": True} if found else {}),
        **({} if judged else {"judged": False}),
        "call_kwargs": {**sandbox.call_kwargs, "guidance_scale": guidance_scale},
    }
    stamp = folder / REQUEST_NAME
    if stamp.is_file() and read_json(stamp) == request:
        return datasets.load_from_disk(str(folder / "table"))
    if folder.exists() and not stamp.is_file() and any(folder.iterdir()):
        raise ValueError(
            f"{folder} holds files that are not a sandbox dataset (no {REQUEST_NAME}). Pass an empty or a new folder: "
            f"building replaces what is in it."
        )

    clips, clip_seeds = _chosen_clips(sandbox, num_groups, seed, rendering, found, judged)
    noise_seeds = np.random.default_rng([seed, 1]).integers(2**31, size=(len(clips), num_rejected)).tolist()
    rejected, scores = _rejected_videos(sandbox, clips, noise_seeds, request["call_kwargs"], batch_size)
    with atomic_folder(folder) as partial:
        rows = []
        for index, clip in enumerate(tqdm(clips, desc="Writing videos", unit="group")):
            rows.append(
                {
                    "prompt": clip.prompt,
                    **_write_videos(partial / "videos", index, clip.video, rejected[index]),
                    "rejected_scores": scores[index],
                    "category": clip.action,
                    "seeds": noise_seeds[index],
                    "generator": request["generator"],
                    "provenance": f"sandbox simulation, seed {clip_seeds[index]}",
                }
            )
        features = group_features("category", "seeds", "generator", "provenance")
        table = datasets.Dataset.from_list(rows, features=features)
        table.save_to_disk(str(partial / "table"))  # takes the files' bytes along, so the folder can be moved
        write_json(partial / REQUEST_NAME, request)
    return datasets.load_from_disk(str(folder / "table"))


def _chosen_clips(
    sandbox: Sandbox, number: int, seed: int, rendering: Rendering, found: bool, judged: bool
) -> tuple[list[Clip], list[int]]:
    """The chosen clips of groups, and the seeds of their simulations."""
    seeds = [(_FIRST_FOUND_SEED if found else _FIRST_SEED) + 1_000_000 * seed + index for index in range(number)]
    if not found:
        return [_base_clip(clip_seed, index, rendering) for index, clip_seed in enumerate(seeds)], seeds
    clips = found_clips(number, seed)
    if not judged:
        return clips, seeds
    scores = sandbox.judge.score([clip.video for clip in clips], [clip.prompt for clip in clips])
    passed = [index for index, score in enumerate(scores) if float(score["pc"]) >= PASSES]
    return [clips[index] for index in passed], [seeds[index] for index in passed]


def _base_clip(seed: int, index: int, rendering: Rendering) -> Clip:
    """A lawful clip of a motion that the base model can draw, the motions in turn."""
    return simulate(seed, motion=BASE_MOTIONS[index % len(BASE_MOTIONS)], rendering=rendering)


def _rejected_videos(
    sandbox: Sandbox,
    clips: list[Clip],
    noise_seeds: list[list[int]],
    call_kwargs: dict[str, Any],
    batch_size: int,
) -> tuple[np.ndarray, list[list[dict[str, float]]]]:
    """Videos `(N, m, T, H, W, 3)` and their scores, one list of m for each clip."""
    num_rejected = len(noise_seeds[0])
    prompts = [clip.prompt for clip in clips for _ in range(num_rejected)]
    videos = generate(
        sandbox.pipeline,
        prompts,
        [seed for row in noise_seeds for seed in row],
        call_kwargs,
        batch_size=batch_size,
        description="Generating rejected videos",
    )
    judged = sandbox.judge.score(list(videos), prompts)
    scores = [{"sa": float(score["sa"]), "pc": float(score["pc"])} for score in judged]
    grouped = [scores[start : start + num_rejected] for start in range(0, len(scores), num_rejected)]
    return videos.reshape(len(clips), num_rejected, *videos.shape[1:]), grouped


def _write_videos(folder: Path, index: int, chosen: np.ndarray, rejected: np.ndarray) -> dict[str, Any]:
    """The video columns of row `index`, as paths of the files it writes."""
    losers = [
        str(write_video(folder / f"{index:05d}_rejected_{loser}.mp4", video, FPS))
        for loser, video in enumerate(rejected)
    ]
    return {"chosen": str(write_video(folder / f"{index:05d}_chosen.mp4", chosen, FPS)), "rejected": losers}
