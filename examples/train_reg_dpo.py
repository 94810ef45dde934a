# /// script
# requires-python = ">=3.10"
# dependencies = ["video-trl"]
# ///
"""
SFT-regularised preference optimisation of a video model (Reg-DPO, https://huggingface.co/papers/2511.01450).

The sandbox model on simulated clips against its own, or another model on rows of the type "preference" or "group":

    accelerate launch examples/train_reg_dpo.py
    accelerate launch examples/train_reg_dpo.py --config video_trl/presets/regdpo-paper-t2v.yaml \
        --dataset_name my/pairs

Every value of a configuration file can be overridden on the command line.
"""

import sys
from pathlib import Path

from trl import TrlParser

from video_trl import VideoRegDPOConfig, VideoRegDPOTrainer
from video_trl.load import ScriptArguments, load_training_rows
from video_trl.trainer import CollapseMonitor
from video_trl.trainer.checkpoints.weights import named_checkpoint


SANDBOX_CONFIG = Path(__file__).parent / "configs" / "sandbox-reg-dpo.yaml"


def main(argv: list[str]) -> None:
    data, args = TrlParser((ScriptArguments, VideoRegDPOConfig)).parse_args_and_config(args=argv)
    rows = load_training_rows(data, args, VideoRegDPOTrainer.row_type)
    trainer = VideoRegDPOTrainer(data.model_name_or_path, args, rows, callbacks=[CollapseMonitor(data.on_collapse)])
    trainer.train(resume_from_checkpoint=named_checkpoint(args.resume_from_checkpoint))
    trainer.save_model()
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=data.dataset_name)


if __name__ == "__main__":
    main(sys.argv[1:] or ["--config", str(SANDBOX_CONFIG)])
