"""
Write an adapter of Wan in the layout of ComfyUI and of the model's original code, or bring one to that of diffusers.

Examples:

  video-trl export out/phygdpo out/phygdpo/comfyui/wan-phygdpo.safetensors
  video-trl export my-name/wan-phygdpo wan-phygdpo.safetensors
  video-trl export somebodys-lora.safetensors out/from-comfyui --to diffusers
  video-trl export step-0001000.safetensors out/from-diffsynth --to diffusers --adapter_alpha rank

For CogVideoX, ComfyUI takes the adapter as it is. The map of names stands in docs/sharing/comfyui.md.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from .options import alpha_value
from .parser import UsageError, parse, say


@dataclass
class ExportArguments:
    """Which way."""

    to: Literal["comfyui", "diffusers"] = field(
        default="comfyui",
        metadata={"help": "Layout to write: a file for 'comfyui', a folder for 'diffusers'."},
    )
    adapter_alpha: str | None = field(
        default=None,
        metadata={"help": "Alpha that the adapter was trained with, for a file that does not say it; or 'rank'."},
    )
    adapter_scale: float = field(
        default=1.0, metadata={"help": "Factor of what the adapter adds to each output, put into the file's alpha."}
    )


def run(argv: Sequence[str]) -> int:
    args, where = parse(
        "export", __doc__, [ExportArguments], argv, positional="from_and_to",
        positional_help="What to read (folder, file or repository id) and what to write.",
    )  # fmt: skip
    if len(where) != 2:
        raise UsageError(f"expected what to read and what to write, got {' '.join(where)}.")
    from ..hub import LORA_FILE_NAME, export_lora, import_lora
    from ..hub.card import is_repo_id

    source, target = where
    alpha = alpha_value(args.adapter_alpha)
    if args.to == "diffusers":
        say(str(import_lora(source, target, alpha=alpha, scale=args.adapter_scale)))
        return 0
    if not Path(source).exists() and is_repo_id(source):
        from huggingface_hub import hf_hub_download

        source = hf_hub_download(source, LORA_FILE_NAME)
    say(str(export_lora(source, target, alpha=alpha, scale=args.adapter_scale)))
    return 0
