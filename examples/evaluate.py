# /// script
# requires-python = ">=3.11"
# dependencies = ["video-trl"]
# ///
"""
Evaluation of a video model: prompts x seeds -> videos -> scores of a judge -> a table with counts and intervals.

Without arguments it evaluates the sandbox's base model on held-out sentences, at small size:

    accelerate launch examples/evaluate.py

With a model, a file of prompts and a judge it evaluates that model, with or without an adapter:

    accelerate launch examples/evaluate.py --model_name_or_path Wan-AI/Wan2.1-T2V-1.3B-Diffusers --fps 16 \
        --adapter my/adapter --prompts prompts.csv --judge videocon-physics --output_dir runs/adapter

The benchmarks VideoPhy and VideoPhy-2 bring their own prompts (`--benchmark videophy2 --judge videophy2`). Started
again with the same arguments it goes on where it stopped. With runs of the same prompts in `--compare` it also writes
a page that shows them side by side.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path


SMALL = ["--num_prompts", "14", "--batch_size", "7"]


@dataclass
class ScriptArguments:
    """What to evaluate, on what, and where to put it."""

    model_name_or_path: str = field(
        default="sandbox",
        metadata={"help": "Repository id or path of a text-to-video pipeline in diffusers layout, or 'sandbox'."},
    )
    adapter: str | None = field(
        default=None, metadata={"help": "Repository id or folder with pytorch_lora_weights.safetensors."}
    )
    prompts: str | None = field(
        default=None,
        metadata={
            "help": "File of prompts (txt, csv, json, jsonl), or the benchmark's CSV file. Unset: its own ones."
        },
    )
    benchmark: str = field(
        default="custom", metadata={"help": "Rule that scores are counted by: 'custom', 'videophy' or 'videophy2'."}
    )
    judge: str = field(default="sandbox", metadata={"help": "Name for `video_trl.load.load_judge`."})
    output_dir: str = field(default="runs/base", metadata={"help": "Directory of the run."})
    name: str | None = field(
        default=None, metadata={"help": "How tables call the model. Unset: from model or adapter."}
    )
    training_seed: int | None = field(default=None, metadata={"help": "Seed of the training behind the adapter."})
    num_prompts: int | None = field(default=None, metadata={"help": "Evaluate only the first so many prompts."})
    seeds: list[int] = field(
        default_factory=lambda: [0], metadata={"help": "One video of each prompt for each of these noise seeds."}
    )
    batch_size: int = field(default=1, metadata={"help": "Videos generated together."})
    fps: float | None = field(default=None, metadata={"help": "Frames per second that the model generates at."})
    num_frames: int | None = field(
        default=None, metadata={"help": "Frames of a video. Unset: the pipeline's default."}
    )
    height: int | None = field(default=None, metadata={"help": "Pixels. Unset: the pipeline's default."})
    width: int | None = field(default=None, metadata={"help": "Pixels. Unset: the pipeline's default."})
    num_inference_steps: int | None = field(default=None, metadata={"help": "Unset: the pipeline's default."})
    guidance_scale: float | None = field(default=None, metadata={"help": "Unset: the pipeline's default."})
    negative_prompt: str | None = field(default=None, metadata={"help": "Unset: the pipeline's default."})
    compare: list[str] = field(
        default_factory=list,
        metadata={"help": "Runs to compare with, the first being the baseline; writes comparison.html."},
    )


CALL = ("num_frames", "height", "width", "num_inference_steps", "guidance_scale", "negative_prompt")


def main(argv: list[str]) -> None:
    from trl import TrlParser

    from video_trl.evaluation.evaluate import evaluate_model
    from video_trl.evaluation.report.comparison import compare_runs, write_comparison
    from video_trl.evaluation.report.page import summary_table

    (args,) = TrlParser((ScriptArguments,)).parse_args_and_config(args=argv)
    table = evaluate_model(
        args.output_dir,
        model=args.model_name_or_path,
        adapter=args.adapter,
        prompts=args.prompts,
        num_prompts=args.num_prompts,
        seeds=args.seeds,
        judge=args.judge,
        name=args.name,
        training_seed=args.training_seed,
        benchmark=args.benchmark,
        fps=args.fps,
        call_kwargs={key: value for key in CALL if (value := vars(args)[key]) is not None},
        batch_size=args.batch_size,
    )
    if table is None:  # not the first process
        return
    print(table)
    if args.compare:
        runs = [*args.compare, args.output_dir]
        print(summary_table(compare_runs(runs)))
        print(f"\nSide by side: {write_comparison(runs, Path(args.output_dir) / 'comparison.html')}")


if __name__ == "__main__":
    main(sys.argv[1:] or SMALL)
