"""
Videos of prompts x seeds, in a run directory: resumable, and ready for `score`, `vote` and `report`.

Examples:

  video-trl generate --num_prompts 7 --output_dir runs/base
  video-trl generate --adapter out/phygdpo --num_prompts 7 --output_dir runs/phygdpo
  video-trl generate --adapter out/phygdpo --adapter_scale 0.5 --num_prompts 7 --output_dir runs/half
  video-trl generate --model_name_or_path Wan-AI/Wan2.1-T2V-1.3B-Diffusers --fps 16 \\
      --num_frames 81 --height 480 --width 832 --prompts prompts.txt --seeds 0 1 --output_dir runs/wan

Under `accelerate launch -m video_trl generate ...` the videos are shared among the processes.
"""

from collections.abc import Sequence

from ..load import SANDBOX
from .options import RunArguments
from .parser import parse, required, say


def run(argv: Sequence[str]) -> int:
    (args,) = parse("generate", __doc__, [RunArguments], argv)
    if args.model_name_or_path != SANDBOX:
        required("prompts", args.prompts, "prompts.txt")
    from ..evaluation.evaluate import evaluation_prompts
    from ..evaluation.runs.generate import generate_run, load_generator

    prompts = evaluation_prompts(args.prompts, args.num_prompts)
    generator = load_generator(
        args.model_name_or_path,
        **args.adapter_kwargs(),
        revision=args.revision,
        fps=args.fps,
        call_kwargs=args.call_kwargs(),
        dtype=args.dtype,
        device=args.device,
    )
    result = generate_run(
        args.output_dir,
        generator,
        prompts,
        seeds=args.seeds,
        name=args.shown_name(),
        training_seed=args.training_seed,
        batch_size=args.batch_size,
    )
    say(f"{len(result.cases) - len(result.missing())} of {len(result.cases)} videos in {result.folder}")
    return 0
