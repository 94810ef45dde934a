"""
Videos of prompts x seeds, in a run directory: resumable, and ready for `score`, `vote` and `report`.

Examples:

  video-trl generate --num_prompts 7 --output_dir runs/base
  video-trl generate --adapter out/phygdpo --num_prompts 7 --output_dir runs/phygdpo
  video-trl generate --adapter out/phygdpo --adapter_scale 0.5 --num_prompts 7 --output_dir runs/half
  video-trl generate --model_name_or_path Wan-AI/Wan2.1-T2V-1.3B-Diffusers --fps 16 \\
      --num_frames 81 --height 480 --width 832 --prompts prompts.txt --seeds 0 1 --output_dir runs/wan

  video-trl generate --from chosen --dataset_name my/pairs --kind repaint --output_dir matched

With `--from chosen` no prompt is the start but the chosen video of each row: the model noises it in part and denoises
it again, or paints a region of it anew, and `pairs.parquet` in the output directory is a dataset of such pairs.

Under `accelerate launch -m video_trl generate ...` the videos are shared among the processes.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal

from ..load import SANDBOX
from .options import RunArguments
from .parser import UsageError, parse, required, say


_OF_PROMPTS = (
    "prompts", "num_prompts", "longer_prompts", "prompt_writer", "prompt_writer_options", "name", "training_seed",
    "batch_size",
)  # fmt: skip


@dataclass
class SourceArguments:
    """What videos are made of: prompts, or the chosen videos of a dataset."""

    source: Literal["prompts", "chosen"] = field(
        default="prompts",
        metadata={"help": "'prompts' or 'chosen'.", "aliases": ["--from"]},
    )
    dataset_name: str | None = field(
        default=None, metadata={"help": "Rows with chosen videos, as `train` takes them."}
    )
    dataset_split: str = field(default="train", metadata={"help": "Its split."})
    column: list[str] = field(
        default_factory=list,
        metadata={"help": "Columns that have another name there: chosen=winner.", "action": "extend"},
    )
    kind: Literal["partial", "repaint"] = field(
        default="partial",
        metadata={
            "help": "'partial': noise the whole video in part. 'repaint': paint a moving region anew.",
        },
    )
    eta: list[float] = field(
        default_factory=lambda: [0.65, 0.8],
        metadata={"help": "Lowest and highest noise level to begin at, in (0, 1)."},
    )
    round_trip: bool = field(
        default=True, metadata={"help": "Write the chosen video as the VAE decodes it, as the rejected one is."}
    )


def run(argv: Sequence[str]) -> int:
    args, source = parse("generate", __doc__, [RunArguments, SourceArguments], argv)
    _refuse_idle(args, source)
    if source.source == "chosen":
        return _from_chosen(args, source)
    if args.model_name_or_path != SANDBOX:
        required("prompts", args.prompts, "prompts.txt")
    from ..evaluation.evaluate import evaluation_prompts

    args.write_longer_prompts()
    result = args.generate(evaluation_prompts(args.prompts, args.num_prompts, longer=args.longer_prompts))
    say(f"{len(result.cases) - len(result.missing())} of {len(result.cases)} videos in {result.folder}")
    return 0


def _refuse_idle(args: RunArguments, source: SourceArguments) -> None:
    """Nobody who names a dataset wants videos of prompts, nor the other way round."""
    is_chosen = source.source == "chosen"
    given, usual = map(asdict, (args, RunArguments()) if is_chosen else (source, SourceArguments()))
    if idle := [f"--{name}" for name in (_OF_PROMPTS if is_chosen else given) if given[name] != usual[name]]:
        other = "prompts" if is_chosen else "chosen"
        raise UsageError(f"{', '.join(idle)}: read with --from {other}, got --from {source.source}.")


def _from_chosen(args: RunArguments, source: SourceArguments) -> int:
    required("dataset_name", source.dataset_name, "my/pairs")
    assert source.dataset_name is not None
    import pyarrow.parquet as pq

    from ..curation.matched import MatchedLosers, matched_losers
    from ..data.tables import load_rows
    from ..evaluation.runs.generate import load_generator

    rows = load_rows(source.dataset_name, source.dataset_split, source.column)
    generator = load_generator(
        args.model_name_or_path,
        **args.adapter_kwargs(),
        revision=args.revision,
        fps=args.fps,
        call_kwargs=args.call_kwargs(),
        dtype=args.dtype,
        device=args.device,
    )
    asked = ("num_frames", "height", "width", "num_inference_steps", "guidance_scale", "negative_prompt")
    call = {name: generator.call_kwargs[name] for name in asked if name in generator.call_kwargs}
    how = MatchedLosers(
        kind=source.kind,
        eta=source.eta,
        seeds=args.seeds,
        round_trip=source.round_trip,
        fps=generator.fps,
        **call,
    )
    acts = "" if args.adapter_alpha is None and args.adapter_scale == 1 else f" {args.adapter_alpha} x "
    acts += f"{args.adapter_scale:g}" if acts else ""
    weights = f"{generator.revision} {generator.adapter_hash}{acts}"
    table = matched_losers(rows, generator.pipeline, args.output_dir, how, weights=weights)
    number = pq.read_metadata(table).num_rows
    say(f"{number} of {len(rows)} chosen videos with {len(how.seeds)} rejected ones each: {table}")
    return 0
