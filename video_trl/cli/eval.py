"""
From a model to a table: prompts x seeds -> videos -> scores -> counts with intervals.

Examples:

  video-trl eval --num_prompts 7 --output_dir runs/base              the sandbox: no download, exact judge
  video-trl eval --num_prompts 7 --adapter out/phygdpo --output_dir runs/phygdpo
  video-trl eval --model_name_or_path Wan-AI/Wan2.1-T2V-1.3B-Diffusers --fps 16 \\
      --benchmark videophy2 --judge videophy2 --output_dir runs/wan  the benchmark's own prompts
  video-trl eval --model_name_or_path zai-org/CogVideoX-2b --benchmark videophy --judge videocon-physics \\
      --longer_prompts longer.csv --prompt_writer http://localhost:8000/v1 \\
      --prompt_writer_options '{"model": "Qwen/Qwen3-32B"}' --output_dir runs/cog    long prompts, as VideoREPA has
  video-trl eval --model_name_or_path Wan-AI/Wan2.1-I2V-14B-480P-Diffusers --fps 16 --benchmark phyground \\
      --judge phyground:http://localhost:8000/v1 --judge_options '{"model": "m", "prompts": "phyground"}' \\
      --prompts phyground --output_dir runs/i2v                      and mean ratings of 13 laws of physics
  video-trl eval --benchmark physics-iq --physics_iq physics-IQ-benchmark --results base=runs/base dpo=videos
  video-trl eval --benchmark phygenbench --results result.json       counts results of PhyGenBench's program
  video-trl eval --benchmark vbench --results base=a.json dpo=b.json the same for VBench; the first is the baseline
  video-trl eval --benchmark vbench --results base=runs/base dpo=runs/dpo    two of its dimensions, computed here
  video-trl eval --benchmark physion --adapter out/repa              linear probe of hidden states, on simulated clips
  video-trl eval --benchmark physion --physion data/physion --model_name_or_path zai-org/CogVideoX-2b \\
      --probe_block 18 --height 480 --width 720 --adapter out/repa   the same on Physion v1.5

Stopped at any moment it goes on when started again with the same options. Another judge: `video-trl score`;
side by side: `video-trl report`; people: `video-trl vote`.
"""

import itertools
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..load import SANDBOX
from .options import JudgeArguments, RunArguments, alpha_value
from .parser import UsageError, nearest, parse, required, say


logger = logging.getLogger(__name__)

_READ = ("phygenbench", "vbench")
_COUNTED = ("custom", "videophy", "videophy2", "phyground")  # `BENCHMARKS`, whose import takes seconds


@dataclass
class EvalArguments:
    """How scores are counted."""

    benchmark: str = field(
        default="custom",
        metadata={
            "help": "Rule to count scores by: 'custom', 'videophy', 'videophy2', 'phyground' (--prompts is their "
            "file, unset the Hub's); or 'phygenbench', 'vbench', which read --results; or 'physics-iq', which "
            "compares with real videos and needs no judge; or 'physion', a probe of the model."
        },
    )
    results: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Files that the benchmark's own program wrote; VBench's as NAME=FILE, or as NAME=RUN to compute "
            "the consistency of a run's videos here; Physics-IQ's as NAME=RUN or NAME=FOLDER of videos."
        },
    )
    physics_iq: str | None = field(
        default=None, metadata={"help": "physics-iq: the benchmark's folder, with split-videos and switch-frames."}
    )
    dino: str | None = field(default=None, metadata={"help": "vbench on runs: DINO encoder. Unset: VBench's."})
    clip: str | None = field(default=None, metadata={"help": "vbench on runs: CLIP encoder. Unset: VBench's."})
    physion: str | None = field(
        default=None, metadata={"help": "physion: folder with physion_mp4s. Unset: simulated clips, for the sandbox."}
    )
    probe_block: int = field(default=4, metadata={"help": "physion: block that is probed, counted from 1."})
    probe_clips: int = field(default=480, metadata={"help": "physion, simulated: clips to fit on, and to test on."})
    probe_cells: str | None = field(
        default=None,
        metadata={
            "help": "physion: rows x columns that the tokens of a frame are pooled to, or 'all' for every token. "
            "Unset: 2x3, and 4x4 on simulated clips."
        },
    )
    teacher: str | None = field(default=None, metadata={"help": "physion: video encoder to probe as well."})


def run(argv: Sequence[str]) -> int:
    _check_benchmark(argv)
    args, run_args, judge_args = parse("eval", __doc__, [EvalArguments, RunArguments, JudgeArguments], argv)
    if args.benchmark in _READ:
        files = required("results", args.results, "result.json" if args.benchmark == "phygenbench" else "base=a.json")
        say(_phygenbench(files) if args.benchmark == "phygenbench" else _vbench(files, args))
        return 0
    if args.benchmark == "physion":
        say(_physion(args, run_args))
        return 0
    if args.benchmark == "physics-iq":
        say(_physics_iq(args, run_args))
        return 0
    _check_benchmark(["--benchmark", args.benchmark])  # it may stand in a file
    if args.results:
        raise UsageError(f"--results are read for {', '.join(_READ)} and physics-iq, not for {args.benchmark!r}.")
    from ..evaluation.evaluate import evaluate_model

    if run_args.model_name_or_path != SANDBOX and judge_args.judge == SANDBOX:
        raise UsageError("--judge is needed: the sandbox's judges nothing but the sandbox's own sentences.")
    run_args.write_longer_prompts(args.benchmark)
    table = evaluate_model(
        run_args.output_dir,
        model=run_args.model_name_or_path,
        **run_args.adapter_kwargs(),
        prompts=run_args.prompts,
        num_prompts=run_args.num_prompts,
        longer_prompts=run_args.longer_prompts,
        seeds=run_args.seeds,
        judge=judge_args.load(),
        name=run_args.name,
        training_seed=run_args.training_seed,
        benchmark=args.benchmark,
        revision=run_args.revision,
        fps=run_args.fps,
        call_kwargs=run_args.call_kwargs(),
        dtype=run_args.dtype,
        device=run_args.device,
        batch_size=run_args.batch_size,
    )
    if table is not None:  # the first process of several
        say(str(table))
        if judge_args.judge.startswith("phyground:"):
            from ..evaluation.benchmarks.phyground import law_table
            from ..evaluation.runs.tables import text_table

            say(f"\n{text_table(law_table(table))}")
        where = run_args.output_dir
        logger.info("Videos and scores: %s. To compare with another run: video-trl report %s OTHER", where, where)
    return 0


def _check_benchmark(argv: Sequence[str]) -> None:
    """Refuse a misspelt benchmark before anything slow is imported."""
    known = [*_COUNTED, *_READ, "physion", "physics-iq"]
    words = [part for word in argv for part in (word.split("=", 1) if word.startswith("--benchmark=") else [word])]
    for option, name in itertools.pairwise(words):
        if option == "--benchmark" and name not in known:
            raise UsageError(f"unknown benchmark {name!r}{nearest(name, known)}; expected one of {', '.join(known)}.")


def _phygenbench(files: Sequence[str]) -> str:
    from ..evaluation.benchmarks.phygenbench import CATEGORIES, load_phygenbench_items, phygenbench_aggregate
    from ..evaluation.report.page import Table
    from ..evaluation.runs.tables import text_table

    names, rows = list(dict.fromkeys(CATEGORIES.values())), []
    for file in files:
        items = load_phygenbench_items(file)
        for mode in ("published", "exact"):
            score = phygenbench_aggregate(items, mode)
            cells = [f"{score.by_category[name]:.3f}" if name in score.by_category else "" for name in names]
            rows.append([file, mode, str(len(items)), *cells, f"{score.average:.3f}"])
    header = ["file", "rounding", "prompts", *names, "average"]
    return text_table(Table("PhyGenBench", header, rows, "Proportion of the points; a prompt has three."))


def _physics_iq(args: EvalArguments, run_args: RunArguments) -> str:
    from ..evaluation.benchmarks.physics_iq import generated_videos, load_physics_iq, physics_iq, score_table
    from ..evaluation.runs.run import shard
    from ..evaluation.runs.tables import text_table

    folder = required("physics_iq", args.physics_iq, "physics-IQ-benchmark")
    sources = dict(file.partition("=")[::2] for file in args.results)
    if not all(sources.values()) or len(sources) < len(args.results):
        raise UsageError(f"--results of Physics-IQ are NAME=RUN with distinct names, got {' '.join(args.results)}.")
    if not sources:
        prompts = load_physics_iq(folder, run_args.prompts)[: run_args.num_prompts]
        done = run_args.generate(prompts)
        if shard()[1] > 1:
            return f"The videos of this process are in {done.folder}. Compare them with --results NAME={done.folder}."
        sources = {run_args.shown_name(): str(done.folder)}
    videos = {name: generated_videos(source) for name, source in sources.items()}  # all of them, before one is read
    return text_table(score_table({name: physics_iq(found, folder) for name, found in videos.items()}))


def _physion(args: EvalArguments, run_args: RunArguments) -> str:
    from ..evaluation.probes.compare import probe_models
    from ..evaluation.probes.physion import probe_table

    cells: Any = args.probe_cells
    if cells not in (None, "all"):
        shape = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", cells)
        if shape is None:
            raise UsageError(f"--probe_cells: expected rows x columns such as 2x3, or 'all', got {cells!r}.")
        cells = int(shape[1]), int(shape[2])
    frames: dict[str, Any] = {} if run_args.num_frames is None else {"num_frames": run_args.num_frames}
    results = probe_models(
        run_args.model_name_or_path,
        [run_args.adapter] if run_args.adapter else [],
        adapter_alpha=alpha_value(run_args.adapter_alpha),
        adapter_scale=run_args.adapter_scale,
        block=args.probe_block,
        teacher=args.teacher,
        physion=args.physion,
        num_train=args.probe_clips,
        num_test=args.probe_clips,
        height=run_args.height,
        width=run_args.width,
        cells=cells,
        **frames,
    )
    return probe_table(results)


def _vbench(files: Sequence[str], args: EvalArguments) -> str:
    from ..evaluation.benchmarks.vbench import load_vbench, vbench_table
    from ..evaluation.runs.tables import text_table

    sources = dict(file.partition("=")[::2] for file in files)
    if not all(sources.values()) or len(sources) < len(files):
        raise UsageError(f"--results of VBench are NAME=FILE with distinct names, got {' '.join(files)}.")
    folders = [Path(path).is_dir() for path in sources.values()]
    if any(folders) and not all(folders):
        raise UsageError("--results of VBench are all files or all runs: the two hold different dimensions.")
    if all(folders):
        values = _consistency(sources, args)
    else:
        read = {key: load_vbench(path) for key, path in sources.items()}
        numbers = {key: sorted({len(videos) for videos in found.videos.values()}) for key, found in read.items()}
        if len({number for of_method in numbers.values() for number in of_method}) > 1:
            raise ValueError(f"Methods are compared on as many videos in every dimension, got {numbers}.")
        values = {key: dict(found.values) for key, found in read.items()}
    return text_table(vbench_table(values, baseline=next(iter(sources))))


def _consistency(runs: Mapping[str, str], args: EvalArguments) -> dict[str, dict[str, float]]:
    """Mean `dino_consistency` and `clip_consistency` of the videos of each run."""
    from statistics import fmean

    from ..evaluation.benchmarks.vbench import FrameConsistency
    from ..evaluation.runs.run import load_run

    loaded = {name: load_run(folder) for name, folder in runs.items()}  # all of them, before an encoder is loaded
    for name, run in loaded.items():
        if run.missing():
            raise ValueError(f"{name}: {len(run.missing())} of {len(run.cases)} videos are missing in {run.folder}.")
    measures = [FrameConsistency("dino", args.dino), FrameConsistency("clip", args.clip)]
    return {
        name: {measure.name: fmean(measure([run.video(case) for case in run.cases])) for measure in measures}
        for name, run in loaded.items()
    }
