# /// script
# requires-python = ">=3.11"
# dependencies = ["video-trl[evaluation]"]
# ///
"""
How much physics does a model understand? The right half of VideoREPA's Figure 1 as one command: a linear probe on the
hidden states of a generator, before and after alignment, and on the tokens of a video encoder.

Without arguments it probes the sandbox's model and teacher with "will the two balls touch?":

    accelerate launch examples/probe_physion.py
    accelerate launch examples/probe_physion.py --adapters outputs/sandbox-repa

With a copy of Physion v1.5 (the folder that holds `physion_mp4s`) and a model it is object contact prediction:

    accelerate launch examples/probe_physion.py --physion data/physion --model_name_or_path zai-org/CogVideoX-2b \
        --block 18 --height 480 --width 720 --adapters outputs/cogvideox-2b-repa \
        --teacher checkpoints/vit_b_k710_dl_from_giant.pth --teacher_height 160 --teacher_width 240
"""

import json
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from video_trl.evaluation.physion import ProbeClip


@dataclass
class ProbeArguments:
    """What is probed, and with which clips."""

    model_name_or_path: str = field(
        default="sandbox", metadata={"help": "Repository id or path of a pipeline in diffusers layout, or 'sandbox'."}
    )
    adapters: list[str] = field(
        default_factory=list,
        metadata={"help": "What training left: folders with a LoRA adapter or a `transformer`, each probed."},
    )
    teacher: str | None = field(
        default=None, metadata={"help": "Video encoder to probe as the ceiling. Unset: the sandbox's for the sandbox."}
    )
    teacher_height: int | None = field(default=None, metadata={"help": "Height that the encoder sees, in pixels."})
    teacher_width: int | None = field(default=None, metadata={"help": "Width that the encoder sees, in pixels."})
    physion: str | None = field(
        default=None, metadata={"help": "Folder with `physion_mp4s`. Unset: simulated clips, for the sandbox model."}
    )
    num_frames: int = field(default=49, metadata={"help": "Physion: frames of a clip."})
    frame_step: int = field(default=1, metadata={"help": "Physion: distance of these frames in the file."})
    height: int | None = field(default=None, metadata={"help": "Height that clips are brought to. Unset: the file's."})
    width: int | None = field(default=None, metadata={"help": "Width that clips are brought to. Unset: the file's."})
    block: int = field(default=4, metadata={"help": "Block whose output is probed, counted from 1."})
    noise_levels: list[float] = field(
        default_factory=lambda: [0.1, 0.3, 0.5],
        metadata={"help": "Noise of the clips, shares of the schedule; cross-validation chooses one."},
    )
    num_train: int = field(default=480, metadata={"help": "Sandbox: clips that the probe is fitted on."})
    num_test: int = field(default=480, metadata={"help": "Sandbox: clips that it is tested on."})
    batch_size: int = field(default=16, metadata={"help": "Clips in one call."})
    output: str | None = field(default=None, metadata={"help": "JSON file for every answer and probability."})


def main(argv: list[str]) -> None:
    from trl import TrlParser

    from video_trl.evaluation.physion import DiffusionFeatures, PixelFeatures, TeacherFeatures, probe, probe_table
    from video_trl.teachers import load_teacher

    (args,) = TrlParser((ProbeArguments,)).parse_args_and_config(args=argv)
    train, test = clips_of(args)
    # The sandbox has so few tokens that none need be pooled.
    pooling: dict[str, Any] = {"num_slices": 6, "cells": (4, 4)} if args.physion is None else {}
    common: dict[str, Any] = {"batch_size": args.batch_size, "height": args.height, "width": args.width}
    results = {"pixels": probe(PixelFeatures(), train, test, name="pixels", **common)}
    pipeline = load(args.model_name_or_path)
    base = pipeline.transformer
    for adapter in ("", *args.adapters):
        if adapter and (Path(adapter) / "transformer").is_dir():
            whole = type(base).from_pretrained(adapter, subfolder="transformer", dtype=base.dtype)
            pipeline.transformer = whole.to(base.device)
        elif adapter:
            pipeline.load_lora_weights(adapter, weight_name="pytorch_lora_weights.safetensors")
        features = DiffusionFeatures(pipeline, block=args.block, noise_levels=args.noise_levels, **pooling)
        name = adapter or args.model_name_or_path
        results[name] = probe(features, train, test, name=name, **common)
        if pipeline.transformer is not base:
            pipeline.transformer = base
        elif adapter:
            pipeline.unload_lora_weights()
    teacher = args.teacher or ("sandbox" if args.model_name_or_path == "sandbox" else None)
    if teacher is not None:
        size = {"height": args.teacher_height, "width": args.teacher_width} if args.teacher_height else {}
        ceiling = TeacherFeatures(load_teacher(teacher, **size), **pooling)
        results[f"{teacher} (teacher)"] = probe(ceiling, train, test, name=teacher, **common)
    print(probe_table(results))
    if args.output:
        content = {"arguments": asdict(args), "results": {name: asdict(result) for name, result in results.items()}}
        Path(args.output).write_text(json.dumps(content, indent=1))


def clips_of(args: ProbeArguments) -> tuple[list["ProbeClip"], list["ProbeClip"]]:
    """Clips to fit the probe on, and to test it on."""
    if args.physion is not None:
        from video_trl.evaluation.physion import read_physion

        frames: dict[str, Any] = {"num_frames": args.num_frames, "frame_step": args.frame_step}
        return read_physion(args.physion, "train", **frames), read_physion(args.physion, "test", **frames)
    if args.model_name_or_path != "sandbox":
        raise ValueError(
            f"--model_name_or_path {args.model_name_or_path} needs --physion: simulated clips have the sandbox's "
            "size. Pass the folder that holds `physion_mp4s`."
        )
    from video_trl.sandbox.probe import contact_clips

    return contact_clips(args.num_train, seed=11), contact_clips(args.num_test, seed=12)


def load(name: str) -> "DiffusionPipeline":
    """The pipeline, on the accelerator if there is one."""
    import torch
    from diffusers import DiffusionPipeline

    if name == "sandbox":
        from video_trl.sandbox import load_sandbox

        return load_sandbox().pipeline
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    return DiffusionPipeline.from_pretrained(name, dtype=torch.float32).to(device)


if __name__ == "__main__":
    main(sys.argv[1:])
