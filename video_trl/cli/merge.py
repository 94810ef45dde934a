"""
Merge an adapter into its base model: a pipeline in diffusers layout, for tools that take no adapters.

Examples:

  video-trl merge out/phygdpo out/merged                                     the sandbox's
  video-trl merge out/wan-dpo out/wan-merged --model_name_or_path Wan-AI/Wan2.1-T2V-1.3B-Diffusers --dtype bfloat16
  video-trl merge out/wan-dpo/ema out/wan-ema --model_name_or_path Wan-AI/Wan2.1-T2V-1.3B-Diffusers

A preference trainer cannot compare with a base that an adapter has been merged into: keep the adapter.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from ..load import SANDBOX
from .options import alpha_value
from .parser import UsageError, parse, say


@dataclass
class MergeArguments:
    """Into what, and how strongly."""

    model_name_or_path: str = field(
        default=SANDBOX,
        metadata={"help": "Repository id or path of the base pipeline in diffusers layout, or 'sandbox'."},
    )
    adapter_alpha: str | None = field(
        default=None,
        metadata={"help": "Alpha that it was trained with, where the file does not say it: a number, or 'rank'."},
    )
    scale: float = field(default=1.0, metadata={"help": "Factor of the adapter's effect."})
    dtype: Literal["float32", "bfloat16", "float16"] | None = field(
        default=None,
        metadata={"help": "Precision of what is written. Unset: float32, also of a base whose files are in bfloat16."},
    )


def run(argv: Sequence[str]) -> int:
    args, where = parse(
        "merge", __doc__, [MergeArguments], argv, positional="adapter_and_target",
        positional_help="Folder or file of the adapter, and the folder to write.",
    )  # fmt: skip
    if len(where) != 2:
        raise UsageError(f"expected an adapter and a folder to write, got {' '.join(where)}.")
    import torch

    from ..hub import merge_adapter

    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    adapter, target = where
    dtype = None if args.dtype is None else dtypes[args.dtype]
    alpha = alpha_value(args.adapter_alpha)
    folder = merge_adapter(args.model_name_or_path, adapter, target, alpha=alpha, scale=args.scale, dtype=dtype)
    say(f"{folder}: DiffusionPipeline.from_pretrained({str(folder)!r})")
    return 0
