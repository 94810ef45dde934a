# /// script
# requires-python = ">=3.11"
# dependencies = ["video-trl"]
# ///
"""
Preference optimisation of a text-to-video model (Diffusion-DPO, https://huggingface.co/papers/2311.12908).

Without arguments it trains the sandbox model on simulated clips against clips that the model itself makes:

    accelerate launch examples/train_dpo.py

With a model and a dataset of the row type "preference" or "group" (docs/data/dataset_formats.md) it trains that model:

    accelerate launch examples/train_dpo.py --config examples/configs/wan2.1-14b-dpo.yaml --dataset_name my/pairs

Every value of a configuration file can be overridden on the command line.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal


if TYPE_CHECKING:
    import datasets

    from video_trl import VideoDPOConfig


SANDBOX_CONFIG = Path(__file__).parent / "configs" / "sandbox-dpo.yaml"


@dataclass
class ScriptArguments:
    """What to train on; how to train is said by [`VideoDPOConfig`]."""

    model_name_or_path: str = field(
        default="sandbox",
        metadata={"help": "Repository id or path of a text-to-video pipeline in diffusers layout, or 'sandbox'."},
    )
    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Repository id or path of a preference or group dataset (prompt, chosen, rejected). Unset: the "
            "sandbox's own, which is built first."
        },
    )
    dataset_split: str = field(default="train", metadata={"help": "Split of the dataset to train on."})
    num_groups: int = field(default=256, metadata={"help": "Rows of the sandbox's dataset, where none is named."})
    num_rejected: int = field(default=3, metadata={"help": "Rejected videos in each of them; one is drawn a step."})
    on_collapse: Literal["warn", "stop"] = field(
        default="warn",
        metadata={"help": "What to do when the model gets worse at both videos of a pair (CollapseMonitor)."},
    )


def main(argv: list[str]) -> None:
    from trl import TrlParser

    from video_trl import VideoDPOConfig, VideoDPOTrainer
    from video_trl.data.tables import load_rows
    from video_trl.trainer import CollapseMonitor
    from video_trl.trainer.checkpoints.weights import named_checkpoint

    script_args, training_args = TrlParser((ScriptArguments, VideoDPOConfig)).parse_args_and_config(args=argv)
    if script_args.dataset_name is not None:
        dataset = load_rows(script_args.dataset_name, script_args.dataset_split)
    elif script_args.model_name_or_path == "sandbox":
        dataset = sandbox_groups(script_args, training_args)
    else:
        raise ValueError(
            f"--model_name_or_path {script_args.model_name_or_path} needs --dataset_name: the sandbox's dataset is "
            "made of its own model's videos. Pass a repository id or a folder with the columns prompt, chosen and "
            "rejected."
        )
    monitor = CollapseMonitor(script_args.on_collapse)
    trainer = VideoDPOTrainer(script_args.model_name_or_path, training_args, dataset, callbacks=[monitor])
    trainer.train(resume_from_checkpoint=named_checkpoint(training_args.resume_from_checkpoint))
    trainer.save_model()
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)


def sandbox_groups(script_args: ScriptArguments, training_args: "VideoDPOConfig") -> "datasets.Dataset":
    """Simulated clips, each against unguided videos of the sandbox model for the same sentence."""
    from video_trl.sandbox import build_group_dataset, load_sandbox

    with training_args.main_process_first():
        return build_group_dataset(
            load_sandbox(),
            Path(training_args.output_dir) / "dataset",
            num_groups=script_args.num_groups,
            num_rejected=script_args.num_rejected,
        )


if __name__ == "__main__":
    main(sys.argv[1:] or ["--config", str(SANDBOX_CONFIG)])
