# /// script
# requires-python = ">=3.11"
# dependencies = ["video-trl"]
# ///
"""
Groupwise preference optimisation of a text-to-video model (PhyGDPO, https://huggingface.co/papers/2512.24551).

Without arguments it runs the whole experiment on the sandbox: it builds a group dataset, trains the adapter and an SFT
control, evaluates both and the base model on held-out prompts, and leaves everything in demo/:

    accelerate launch examples/train_gdpo.py

With a model and a dataset of the row type "group" (docs/data/dataset_formats.md) it trains that model:

    accelerate launch examples/train_gdpo.py --config examples/configs/wan2.1-1.3b-gdpo.yaml --dataset_name my/groups

Every value of a configuration file can be overridden on the command line.
"""

import sys
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    import datasets

    from video_trl import VideoGroupDPOConfig


SANDBOX_CONFIG = Path(__file__).parent / "configs" / "sandbox-gdpo.yaml"


@dataclass
class ScriptArguments:
    """What to train on; how to train is said by [`VideoGroupDPOConfig`]."""

    model_name_or_path: str = field(
        default="sandbox",
        metadata={"help": "Repository id or path of a text-to-video pipeline in diffusers layout, or 'sandbox'."},
    )
    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Repository id or path of a group dataset (prompt, chosen, rejected, rejected_scores). Unset: the "
            "sandbox's own, which is built first and makes the run a complete experiment."
        },
    )
    dataset_split: str = field(default="train", metadata={"help": "Split of the dataset to train on."})
    num_groups: int = field(default=256, metadata={"help": "Sandbox experiment: groups of the training set."})
    num_rejected: int = field(default=3, metadata={"help": "Sandbox experiment: generated videos in each group."})
    eval_prompts: int = field(default=84, metadata={"help": "Sandbox experiment: held-out prompts evaluated."})
    eval_seeds: int = field(
        default=2, metadata={"help": "Sandbox experiment: videos of each held-out prompt, each from another noise."}
    )
    sft_control: bool = field(
        default=True,
        metadata={"help": "Sandbox experiment: also train on the chosen videos alone, with the same budget."},
    )
    sft_learning_rate: float | None = field(
        default=None, metadata={"help": "Sandbox experiment: learning rate of the control. Unset: that of the method."}
    )
    seeds: list[int] = field(
        default_factory=lambda: [0],
        metadata={"help": "Sandbox experiment: training seeds. Three or more are needed to call a method better."},
    )


def main(argv: list[str]) -> None:
    from trl import TrlParser

    from video_trl import VideoGroupDPOConfig

    parser = TrlParser((ScriptArguments, VideoGroupDPOConfig))
    script_args, training_args = parser.parse_args_and_config(args=argv)
    if script_args.dataset_name is not None:
        train(script_args, training_args)
    elif script_args.model_name_or_path == "sandbox":
        run_sandbox_experiment(script_args, training_args)
    else:
        raise ValueError(
            f"--model_name_or_path {script_args.model_name_or_path} needs --dataset_name: only the sandbox brings its "
            "own data. Pass a repository id or a folder of the row type 'group' (docs/data/dataset_formats.md)."
        )


def train(script_args: ScriptArguments, training_args: "VideoGroupDPOConfig") -> None:
    """Trains on a dataset from the Hub or the disk, and saves the adapter with its model card."""
    from video_trl import VideoGroupDPOTrainer
    from video_trl.data.tables import load_rows
    from video_trl.trainer.checkpoints.weights import named_checkpoint

    dataset = load_rows(script_args.dataset_name, script_args.dataset_split)
    trainer = VideoGroupDPOTrainer(script_args.model_name_or_path, training_args, dataset)
    trainer.train(resume_from_checkpoint=named_checkpoint(training_args.resume_from_checkpoint))
    trainer.save_model()
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)


def run_sandbox_experiment(script_args: ScriptArguments, training_args: "VideoGroupDPOConfig") -> None:
    """Base model against SFT control against PhyGDPO on held-out prompts, everything left in `output_dir`."""
    from video_trl.evaluation import summary_table
    from video_trl.sandbox import load_sandbox
    from video_trl.sandbox.benchmark import evaluate
    from video_trl.sandbox.data.datasets import build_group_dataset
    from video_trl.sandbox.data.prompts import balanced_prompts
    from video_trl.sandbox.report import Run, compare_runs, save_results, write_sandbox_report

    folder = Path(training_args.output_dir)
    refuse_what_needs_one_run(training_args)
    sandbox = load_sandbox()
    with training_args.main_process_first():
        groups = build_group_dataset(
            sandbox,
            folder / "dataset",
            num_groups=script_args.num_groups,
            num_rejected=script_args.num_rejected,
        )
    methods = ["PhyGDPO", "SFT"] if script_args.sft_control else ["PhyGDPO"]
    trained = []
    for method in methods:
        for seed in script_args.seeds:
            args = replace(
                training_args, seed=seed, data_seed=seed, output_dir=str(folder / f"{method.lower()}-seed{seed}")
            )
            trained.append((method, seed, args.output_dir, train_method(method, args, groups, script_args)))
    if training_args.process_index != 0:
        return

    # The configuration was chosen on draw 0 of the held-out prompts with noise seed 0: neither is used again.
    prompts = balanced_prompts("heldout", script_args.eval_prompts, seed=1)
    noise_seeds = list(range(1, 1 + script_args.eval_seeds))
    common = {
        "prompts": prompts,
        "seeds": noise_seeds,
        "call_kwargs": dict(sandbox.call_kwargs),
    }
    base = evaluate(sandbox.pipeline, sandbox.judge, output_dir=folder / "videos" / "base", name="base", **common)
    runs = []
    for method, seed, directory, log_history in trained:
        # What is judged is what was saved, loaded the way a user will load it.
        sandbox.pipeline.load_lora_weights(directory, weight_name="pytorch_lora_weights.safetensors")
        name = Path(directory).name
        records = evaluate(sandbox.pipeline, sandbox.judge, output_dir=folder / "videos" / name, name=name, **common)
        sandbox.pipeline.unload_lora_weights()
        runs.append(Run(method, seed, records, log_history))

    comparisons = compare_runs(base, runs)
    settings = experiment_settings(script_args, training_args)
    save_results(folder / "results.json", base, runs, comparisons, settings)
    notes = [f"{key}: {value}" for key, value in settings.items()]
    report = write_sandbox_report(folder / "report.html", base, runs, comparisons, notes=notes)
    print(summary_table(comparisons))
    print(f"\nVideos, curves and scores: {report}\nAdapters: {', '.join(directory for _, _, directory, _ in trained)}")


def refuse_what_needs_one_run(training_args: "VideoGroupDPOConfig") -> None:
    """The experiment trains several adapters: which one would be resumed or pushed is not ours to guess."""
    from video_trl.trainer.checkpoints.weights import named_checkpoint

    given = {
        "--push_to_hub": training_args.push_to_hub,
        "--resume_from_checkpoint": named_checkpoint(training_args.resume_from_checkpoint),
    }
    refused = [option for option, value in given.items() if value]
    if refused:
        raise ValueError(
            f"The sandbox experiment trains several adapters; expected none of the options of a single run, got "
            f"{', '.join(refused)}. For one run on the same data add --dataset_name "
            f"{Path(training_args.output_dir) / 'dataset' / 'table'} (built by the experiment)."
        )


def train_method(
    method: str, args: "VideoGroupDPOConfig", groups: "datasets.Dataset", script_args: ScriptArguments
) -> list[dict[str, Any]]:
    """Trains one adapter, saves it to `args.output_dir` and returns the training log."""
    from video_trl import VideoGroupDPOTrainer, VideoSFTConfig, VideoSFTTrainer

    if method == "PhyGDPO":
        trainer = VideoGroupDPOTrainer("sandbox", args, groups)
    else:
        shared = {field.name for field in fields(VideoSFTConfig) if field.init}
        values = {name: value for name, value in vars(args).items() if name in shared}
        values["learning_rate"] = script_args.sft_learning_rate or args.learning_rate
        trainer = VideoSFTTrainer("sandbox", VideoSFTConfig(**values), groups)
    trainer.train()
    trainer.save_model()
    return trainer.state.log_history


def experiment_settings(script_args: ScriptArguments, training_args: "VideoGroupDPOConfig") -> dict[str, Any]:
    """What has to be known to make the numbers again."""
    import platform

    import torch

    import video_trl

    data = ("max_steps", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps")
    method = ("learning_rate", "beta", "loss_type", "shared_noise", "timestep_sampling", "lora_rank", "lora_alpha")
    return {
        "command": " ".join(["accelerate launch", *sys.argv]),
        "video_trl": video_trl.__version__,
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {training_args.device.type}, {torch.get_num_threads()} threads",
        **vars(script_args),
        **{name: vars(training_args)[name] for name in data + method},
    }


if __name__ == "__main__":
    main(sys.argv[1:] or ["--config", str(SANDBOX_CONFIG)])
