"""
Examples:

  video-trl train gdpo --num_groups 64 --max_steps 100 --per_device_train_batch_size 8 --learning_rate 1e-3 \\
      --sft_weight 500 --lora_target_modules all-linear --output_dir out/phygdpo          the sandbox, minutes on a CPU
  video-trl train gdpo --config examples/configs/wan2.1-1.3b-gdpo.yaml --dataset_name my/groups --dry_run
  video-trl train gdpo --config examples/configs/wan2.1-1.3b-gdpo.yaml --dataset_name my/groups --num_processes 8
  video-trl train dpo --dataset_name my/pairs --model_name_or_path Wan-AI/Wan2.1-T2V-1.3B-Diffusers
  video-trl train sft --num_clips 64 --sample_every 50 --eval_strategy steps --eval_steps 50 --save_steps 50 \\
      --evaluator_judge sandbox --metric_for_best_model eval_pc --greater_is_better true \\
      --load_best_model_at_end --early_stopping_patience 3

Every option can stand in the YAML file. Options of `accelerate launch` (--num_processes, --config_file, --gpu_ids and
others; --accelerate_config is --config_file) are passed on to it, and it becomes this process: signals and the exit
code are its own. The adapter, its model card and the log are left in --output_dir.
"""

import logging
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from .methods import DataArguments, check_training, config_of, make_trainer, method_named, parse_training
from .parser import UsageError, check, read_yaml, say
from .sources import read_arguments, read_dataclass


logger = logging.getLogger(__name__)

BOTH = "both"  # of --expert: a run each
_ACCELERATE_CONFIG = re.compile(r"^--accelerate[_-]config(?==|$)")  # as the command of TRL calls it


def run(argv: Sequence[str]) -> int:
    method, rest = method_named("train", argv, __doc__)
    launcher, ours = split_launcher(rest)
    if launcher and not {"-h", "--help", "--help_all", "--dry_run"} & set(ours):
        check((DataArguments, config_of(method)), ours)  # refused here, and not by every process
        command = [sys.executable, "-m", "accelerate.commands.launch", *launcher]
        logger.info("Starting through accelerate: %s", " ".join(launcher))
        sys.stdout.flush()
        os.execv(sys.executable, [*command, "-m", "video_trl", "train", method.name, *ours])
    data, args = parse_training("train", method, ours, __doc__)
    if args.expert == BOTH:
        return _train_both(argv, args)
    check_training(method.load(), data, args)
    if data.dry_run:
        from .dry_run import describe

        processes, engine = launched(launcher)
        say(describe(method.load(), data, args, processes=processes, engine=engine))
        return 0
    from ..trainer.checkpoints.weights import named_checkpoint
    from ..trainer.publishing.progress import ClosingLine

    resume = named_checkpoint(args.resume_from_checkpoint)
    trainer = make_trainer(method.load(), data, args)
    closing_line = trainer.pop_callback(ClosingLine)  # there is more to tell when the weights are saved
    trainer.train(resume_from_checkpoint=resume)
    trainer.create_model_card(dataset_name=data.dataset_name)
    trainer.save_model()  # and uploads, on request; a Hub that is away is a warning
    if trainer.is_world_process_zero():
        say(closing_line(trainer.args, trainer.state))
    return 0


def _train_both(argv: Sequence[str], args: Any) -> int:
    """
    A run for each transformer, one after the other, in folders (and repositories) of their own.

    Raises:
        UsageError: If an option names weights, which are those of one of them.
    """
    for option in ("transformer_file", "init_adapter"):
        if args.__dict__[option] is not None:
            raise UsageError(
                f"--{option} names weights of one transformer, and --expert both trains two. Run each with its own "
                "file: --expert high_noise, then --expert low_noise."
            )
    for name in ("high_noise", "low_noise"):
        own = ["--expert", name, "--output_dir", str(Path(args.output_dir) / name)]
        repository = [] if args.hub_model_id is None else ["--hub_model_id", f"{args.hub_model_id}-{name}"]
        code = run([*argv, *own, *repository])
        if code:
            return code
    return 0


def split_launcher(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """
    Options of `accelerate launch`, and the others. What both know by one name is ours (`--mixed_precision` is not; use
    `--bf16`), and without any of the first kind training starts in this process.
    """
    if not any(word.startswith("--") for word in argv):
        return [], list(argv)
    known = read_arguments("accelerate.commands.launch")
    for name in (*_inherited_options(), "config", "num_frames"):
        known.pop(name, None)
    launcher: list[str] = []
    ours: list[str] = []
    words = [_ACCELERATE_CONFIG.sub("--config_file", word) for word in argv]
    while words:
        word = words.pop(0)
        takes_value = known.get(word[2:].partition("=")[0].replace("-", "_")) if word.startswith("--") else None
        (ours if takes_value is None else launcher).append(word)
        if takes_value and "=" not in word and words:
            launcher.append(words.pop(0))
    return launcher, ours


def _inherited_options() -> list[str]:
    arguments = read_dataclass("transformers.training_args:TrainingArguments")
    if arguments is None:
        from transformers import TrainingArguments

        return [item.name for item in fields(TrainingArguments)]
    return [item.name for item in fields(arguments)]


def launched(launcher: Sequence[str]) -> tuple[int, str]:
    """
    Number of processes and engine of a launch with these options, or of the file of its `--config_file`; else 1 and
    `"ddp"`.

    Raises:
        UsageError: If that file is no YAML mapping.
        OSError: If it cannot be read.
    """
    words = [part for word in launcher for part in word.split("=", 1)]
    options = dict(zip(words, words[1:], strict=False))
    file = read_yaml(options["--config_file"]) if "--config_file" in options else {}
    return int(options.get("--num_processes", file.get("num_processes", 1))), _engine(file)


def _engine(file: Mapping[str, Any]) -> str:
    """The engine of a file of accelerate, by the name that estimates have for it."""
    if file.get("distributed_type") == "FSDP":
        return "fsdp2"
    if file.get("distributed_type") == "DEEPSPEED":
        settings = file.get("deepspeed_config", {})
        on_host = settings.get("offload_param_device", "none") != "none"
        return f"zero{settings.get('zero_stage', 2)}{'-offload' if on_host else ''}"
    return "ddp"
