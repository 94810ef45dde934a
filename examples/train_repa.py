# /// script
# requires-python = ">=3.10"
# dependencies = ["video-trl"]
# ///
"""
Alignment of a text-to-video model with a video encoder (VideoREPA, https://huggingface.co/papers/2505.23656).

The sandbox model with the sandbox teacher on simulated clips, or another model on rows of the type "video":

    accelerate launch examples/train_repa.py
    accelerate launch examples/train_repa.py --config examples/configs/wan2.1-1.3b-repa.yaml --dataset_name my/videos

`examples/studies/repa.py` compares the method with its baselines, `examples/probe_physion.py` probes a model.

Every value of a configuration file can be overridden on the command line.
"""

import sys
from pathlib import Path

from trl import TrlParser

from video_trl import VideoREPAConfig, VideoREPATrainer
from video_trl.load import ScriptArguments, load_training_rows
from video_trl.trainer.checkpoints.weights import named_checkpoint


SANDBOX_CONFIG = Path(__file__).parent / "configs" / "sandbox-repa.yaml"


def main(argv: list[str]) -> None:
    data, args = TrlParser((ScriptArguments, VideoREPAConfig)).parse_args_and_config(args=argv)
    rows = load_training_rows(data, args, VideoREPATrainer.row_type)
    trainer = VideoREPATrainer(data.model_name_or_path, args, rows)
    trainer.train(resume_from_checkpoint=named_checkpoint(args.resume_from_checkpoint))
    trainer.save_model()
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=data.dataset_name)


if __name__ == "__main__":
    main(sys.argv[1:] or ["--config", str(SANDBOX_CONFIG)])
