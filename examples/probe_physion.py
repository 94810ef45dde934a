# /// script
# requires-python = ">=3.10"
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
        --block 18 --height 480 --width 720 --adapters outputs/videorepa-2b \
        --teacher checkpoints/vit_b_k710_dl_from_giant.pth --teacher_height 160 --teacher_width 240
"""

import json
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path


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
        metadata={"help": "Noise of the clips, as proportions of the schedule; cross-validation chooses one."},
    )
    num_train: int = field(default=480, metadata={"help": "Sandbox: clips that the probe is fitted on."})
    num_test: int = field(default=480, metadata={"help": "Sandbox: clips that it is tested on."})
    batch_size: int = field(default=16, metadata={"help": "Clips in one call."})
    output: str | None = field(default=None, metadata={"help": "JSON file for every answer and probability."})


def main(argv: list[str]) -> None:
    from trl import TrlParser

    from video_trl.evaluation.probes.compare import probe_models
    from video_trl.evaluation.probes.physion import probe_table

    (args,) = TrlParser((ProbeArguments,)).parse_args_and_config(args=argv)
    options = asdict(args)
    output, height, width = (options.pop(name) for name in ("output", "teacher_height", "teacher_width"))
    size = {"height": height, "width": width} if height else {}
    results = probe_models(options.pop("model_name_or_path"), teacher_kwargs=size, **options)
    print(probe_table(results))
    if output:
        content = {"arguments": asdict(args), "results": {name: asdict(result) for name, result in results.items()}}
        Path(output).write_text(json.dumps(content, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
