# /// script
# requires-python = ">=3.10"
# dependencies = ["video-trl"]
# ///
"""
Groupwise preference optimisation of a text-to-video model (PhyGDPO, https://huggingface.co/papers/2512.24551).

The whole experiment on the sandbox (dataset, adapter, SFT control, evaluation, report: all of it in demo/), or another
model on rows of the type "group":

    accelerate launch examples/train_gdpo.py
    accelerate launch examples/train_gdpo.py --config examples/configs/wan2.1-1.3b-gdpo.yaml --dataset_name my/groups

Every value of a configuration file can be overridden on the command line.
"""

import sys
from pathlib import Path

from trl import TrlParser

from video_trl import VideoGroupDPOConfig, VideoGroupDPOTrainer
from video_trl.experiment import ExperimentArguments, run_sandbox_experiment
from video_trl.load import SANDBOX, ScriptArguments, load_training_rows
from video_trl.trainer.checkpoints.weights import named_checkpoint


SANDBOX_CONFIG = Path(__file__).parent / "configs" / "sandbox-gdpo.yaml"


def main(argv: list[str]) -> None:
    parser = TrlParser((ScriptArguments, ExperimentArguments, VideoGroupDPOConfig))
    data, experiment, args = parser.parse_args_and_config(args=argv)
    if data.model_name_or_path == SANDBOX and data.dataset_name is None:
        summary = run_sandbox_experiment(data, experiment, args)
        if summary is not None:  # the first process
            print(summary)
        return
    rows = load_training_rows(data, args, VideoGroupDPOTrainer.row_type)
    trainer = VideoGroupDPOTrainer(data.model_name_or_path, args, rows)
    trainer.train(resume_from_checkpoint=named_checkpoint(args.resume_from_checkpoint))
    trainer.save_model()
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=data.dataset_name)


if __name__ == "__main__":
    main(sys.argv[1:] or ["--config", str(SANDBOX_CONFIG)])
