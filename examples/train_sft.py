# /// script
# requires-python = ">=3.11"
# dependencies = ["video-trl"]
# ///
"""
Supervised fine-tuning of a text-to-video model with a LoRA adapter: the control that every preference method is held
against.

Without arguments it trains the sandbox model on simulated clips:

    accelerate launch examples/train_sft.py

With a model and a dataset of the row type "video" (docs/data/dataset_formats.md) it trains that model:

    accelerate launch examples/train_sft.py --model_name_or_path Wan-AI/Wan2.1-T2V-1.3B-Diffusers \
        --dataset_name my/videos --output_dir wan-sft
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path


SANDBOX_CONFIG = Path(__file__).parent / "configs" / "sandbox-sft.yaml"


@dataclass
class ScriptArguments:
    """What to train on; how to train is said by [`VideoSFTConfig`]."""

    model_name_or_path: str = field(
        default="sandbox",
        metadata={"help": "Repository id or path of a text-to-video pipeline in diffusers layout, or 'sandbox'."},
    )
    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Repository id or path of a dataset with the columns prompt and video. Unset: simulated clips of "
            "the sandbox."
        },
    )
    dataset_split: str = field(default="train", metadata={"help": "Split of the dataset to train on."})
    num_clips: int = field(default=128, metadata={"help": "Simulated clips, where no dataset is named."})


def main(argv: list[str]) -> None:
    from trl import TrlParser

    from video_trl import VideoSFTConfig, VideoSFTTrainer
    from video_trl.data.tables import load_rows
    from video_trl.sandbox import build_clip_dataset
    from video_trl.trainer.checkpoints.weights import named_checkpoint

    script_args, training_args = TrlParser((ScriptArguments, VideoSFTConfig)).parse_args_and_config(args=argv)
    if script_args.dataset_name is not None:
        dataset = load_rows(script_args.dataset_name, script_args.dataset_split)
    elif script_args.model_name_or_path == "sandbox":
        with training_args.main_process_first():
            folder = Path(training_args.output_dir) / "clips"
            dataset = build_clip_dataset(folder, num_clips=script_args.num_clips)
    else:
        raise ValueError(
            f"--model_name_or_path {script_args.model_name_or_path} needs --dataset_name: simulated clips have the "
            "sandbox's size. Pass a repository id or a folder with the columns prompt and video."
        )
    trainer = VideoSFTTrainer(script_args.model_name_or_path, training_args, dataset)
    trainer.train(resume_from_checkpoint=named_checkpoint(training_args.resume_from_checkpoint))
    trainer.save_model()
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)


if __name__ == "__main__":
    main(sys.argv[1:] or ["--config", str(SANDBOX_CONFIG)])
