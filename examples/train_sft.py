# /// script
# requires-python = ">=3.10"
# dependencies = ["video-trl"]
# ///
"""
Supervised fine-tuning of a text-to-video model: the control that every preference method is held against.

The sandbox model on simulated clips, or another model on rows of the type "video":

    accelerate launch examples/train_sft.py
    accelerate launch examples/train_sft.py --model_name_or_path Wan-AI/Wan2.1-T2V-1.3B-Diffusers \
        --dataset_name my/videos

Every value of a configuration file can be overridden on the command line.
"""

import sys
from pathlib import Path

from trl import TrlParser

from video_trl import VideoSFTConfig, VideoSFTTrainer
from video_trl.load import ScriptArguments, load_training_rows
from video_trl.trainer.checkpoints.weights import named_checkpoint


SANDBOX_CONFIG = Path(__file__).parent / "configs" / "sandbox-sft.yaml"


def main(argv: list[str]) -> None:
    data, args = TrlParser((ScriptArguments, VideoSFTConfig)).parse_args_and_config(args=argv)
    rows = load_training_rows(data, args, VideoSFTTrainer.row_type)
    trainer = VideoSFTTrainer(data.model_name_or_path, args, rows)
    trainer.train(resume_from_checkpoint=named_checkpoint(args.resume_from_checkpoint))
    trainer.save_model()
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=data.dataset_name)


if __name__ == "__main__":
    main(sys.argv[1:] or ["--config", str(SANDBOX_CONFIG)])
