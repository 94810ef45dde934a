# /// script
# requires-python = ">=3.11"
# dependencies = ["video-trl[ray]"]
# ///
"""
What a clip costs in each stage of PhyAugPipe, on the sandbox, and how stages scale over workers on a Ray cluster.

    python examples/benchmarks/phyaug_cost.py --output_dir outputs/phyaug-cost

CPU seconds are those of this process, which other programs on the machine hardly change; wall seconds they do. The
last table is a calculation: measured costs for the stages without a model, costs from the size of the paper's models
for the others (`GPU_SECONDS`), times the number of clips.
"""

import argparse
import os
import shutil
import time
from pathlib import Path
from typing import Any


# Seconds of one H100 for one item, from arithmetic: 2 operations a weight and token, 4 * length^2 * width * layers a
# forward for attention, at 40 % of 990 TFLOP/s. 2,900 tokens of 8 frames at 448 x 448 and the question, 500 tokens of
# answer at 10 % (decoding, batched); Wan2.1 at 480 x 832 x 81 has 32,760 tokens, 50 steps, two forwards a step.
PEAK = 990e12
WAN_14B = 100 * (2 * 14e9 * 32_760 + 4 * 32_760**2 * 5120 * 40) / (0.4 * PEAK)
WAN_1B = 100 * (2 * 1.3e9 * 32_760 + 4 * 32_760**2 * 1536 * 30) / (0.4 * PEAK)
GPU_SECONDS = {
    "annotate, 72B": 2 * 72e9 * 2_900 / (0.4 * PEAK) + 2 * 72e9 * 500 / (0.1 * PEAK),
    "annotate, 7B": 2 * 7e9 * 2_900 / (0.4 * PEAK) + 2 * 7e9 * 500 / (0.1 * PEAK),
    "embed, 110M": 2 * 110e6 * 64 / (0.1 * PEAK),
    "generate, Wan2.1 14B": WAN_14B,
    "generate, Wan2.1 1.3B": WAN_1B,
    "judge, 7B": 2 * (2 * 7e9 * 200 + 2 * 0.33e9 * 32 * 257) / (0.4 * PEAK),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--output_dir", default="outputs/phyaug-cost")
    parser.add_argument("--num_clips", type=int, default=400)
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2])
    args = parser.parse_args()
    root = Path(args.output_dir).absolute()
    costs = measure(root, args.num_clips)
    print("| stage | clips or videos | CPU s each | wall s each |\n|---|---|---|---|")
    for name, (number, cpu, wall) in costs.items():
        print(f"| {name} | {number} | {cpu / number:.4f} | {wall / number:.4f} |")
    if args.workers:
        print("\n| workers | stage | clips | wall s | clips a second | of one worker |\n|---|---|---|---|---|---|")
        scaling(root, args.workers)
    print()
    calculation(costs)


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
    from video_trl.curation.manifest import Shard, Stage, alive
    from video_trl.curation.phyaug import (
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
    from video_trl.sandbox.pool import make_pool

    pool = make_pool(root / "pool", num_clips=num_clips)
    shutil.rmtree(root / "stages", ignore_errors=True)
    shutil.rmtree(root / "generated", ignore_errors=True)
    costs: dict[str, tuple[int, float, float]] = {}

    class Timed(Runner):
        """Notes what each stage takes, loading its model included."""

        def __call__(self, table: Any, stage: Stage, *, gpu: bool = False) -> Any:
            cpu, wall, number = time.process_time(), time.perf_counter(), len(alive(table))
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


def scaling(root: Path, workers: list[int]) -> None:
    """The filter (busy) and a stage that waits 50 ms a clip, with so many workers."""
    import sys

    import pyarrow as pa
    import ray

    from video_trl.curation.manifest import Shard, Stage, alive
    from video_trl.curation.phyaug import PhyAugConfig, Runner, annotate, read_pool
    from video_trl.curation.ray_engine import RayCluster, run_stage_on_ray

    os.environ["RAY_worker_niceness"] = "0"  # Ray's default of 15 measures the other programs of a busy machine
    RayCluster(max_workers=max(workers)).connect()
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    config = PhyAugConfig(**settings(root))
    pool = read_pool(config, [str(root / "pool" / "table")], root, Runner(config, root, Shard()))
    number = len(alive(pool))
    first: dict[str, float] = {}
    for count in workers:
        folder = root / f"ray-{count}"
        shutil.rmtree(folder, ignore_errors=True)
        cluster = RayCluster(max_workers=count, cpus=0.9)

        def run(table: Any, stage: Stage, *, gpu: bool = False, folder: Path = folder, cluster: Any = cluster) -> Any:
            return run_stage_on_ray(table, stage, folder, cluster)

        wait = Stage("wait", Wait(0.05), {"waited": pa.float64()}, "source_id", {}, 16)
        for name in ("annotate (busy)", "wait 50 ms a clip"):
            start = time.perf_counter()
            if name.startswith("annotate"):
                annotate(pool, config, run)
            else:
                run(pool, wait)
            wall = time.perf_counter() - start
            speed = number / wall
            ratio = speed / first.setdefault(name, speed)
            print(f"| {count} | {name} | {number} | {wall:.1f} | {speed:.1f} | {ratio:.2f} |", flush=True)
    ray.shutdown()


def calculation(costs: dict[str, tuple[int, float, float]]) -> None:
    """Hours for a pool, with the paper's shares: 13.5 % pass the filter, 20,000 of every 135,000 are sampled."""
    print(
        "| stage | items for 1M clips | for 100M | seconds each | hours for 1M | for 100M |\n|---|---|---|---|---|---|"
    )
    cpu = {name: spent / number for name, (number, spent, _) in costs.items()}
    rows: list[tuple[str, float, float, float, str]] = [("probe (sandbox files)", 1e6, 1e8, cpu["probe"], "CPU")]
    for name, seconds in GPU_SECONDS.items():
        small, large = {
            "annotate": (1e6, 1e8),
            "embed": (135e3, 135e5),
            "generate": (60e3 + 3200, 60e3 + 3200),
            "judge": (60e3 + 3200, 60e3 + 3200),
        }[name.split(",")[0]]
        rows.append((name, small, large, seconds, "H100"))
    for name, small, large, seconds, unit in rows:
        hours = " | ".join(f"{count * seconds / 3600:,.1f} {unit} h" for count in (small, large))
        print(f"| {name} | {small:,.0f} | {large:,.0f} | {seconds:.3g} | {hours} |")


if __name__ == "__main__":
    main()
