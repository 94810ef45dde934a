# /// script
# requires-python = ">=3.10"
# dependencies = ["video-trl"]
# ///
"""
Preference optimisation of a text-to-video model (Diffusion-DPO, https://huggingface.co/papers/2311.12908).

The sandbox model on simulated clips against its own, or another model on rows of the type "preference" or "group":

    accelerate launch examples/train_dpo.py
    accelerate launch examples/train_dpo.py --config examples/configs/wan2.1-14b-dpo.yaml --dataset_name my/pairs

Every value of a configuration file can be overridden on the command line.
"""

import sys
from pathlib import Path

from trl import TrlParser

from video_trl import VideoDPOConfig, VideoDPOTrainer
from video_trl.load import ScriptArguments, load_training_rows
from video_trl.trainer import CollapseMonitor
from video_trl.trainer.checkpoints.weights import named_checkpoint


SANDBOX_CONFIG = Path(__file__).parent / "configs" / "sandbox-dpo.yaml"


def main(argv: list[str]) -> None:
    data, args = TrlParser((ScriptArguments, VideoDPOConfig)).parse_args_and_config(args=argv)
    rows = load_training_rows(data, args, VideoDPOTrainer.row_type)
    trainer = VideoDPOTrainer(data.model_name_or_path, args, rows, callbacks=[CollapseMonitor(data.on_collapse)])
    trainer.train(resume_from_checkpoint=named_checkpoint(args.resume_from_checkpoint))
    trainer.save_model()
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=data.dataset_name)


if __name__ == "__main__":
    main(sys.argv[1:] or ["--config", str(SANDBOX_CONFIG)])
