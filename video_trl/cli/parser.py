"""Parse the options of a command from dataclasses, a YAML file and the command line, and print help."""

import argparse
import difflib
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import Field, fields
from typing import Any

import yaml


class UsageError(ValueError):
    """The command line is wrong; the exit code says so."""


class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Examples stand as they are written; an option has one spelling here, and its default where it has one."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=118)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or action.nargs == 0:
            return ", ".join(action.option_strings[:2]) or super()._format_action_invocation(action)
        return f"{action.option_strings[0]} {self._format_args(action, action.dest.upper())}"

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.option_strings[:1] and action.option_strings[0].startswith("--no_"):
            return f"The opposite of --{action.dest}."
        return action.help if action.default in (None, []) else super()._get_help_string(action)


def say(text: str) -> None:
    """A result of the command; what happens on the way is logged."""
    sys.stdout.write(f"{text.rstrip()}\n")
    sys.stdout.flush()


# Options of other trainers (TRL, diffusers' scripts, kohya's) -> how they are called here, where that is not alike.
_ELSEWHERE = {
    "lr": "learning_rate", "unet_lr": "learning_rate", "learning_rate_type": "lr_scheduler_type",
    "model": "model_name_or_path", "pretrained_model_name_or_path": "model_name_or_path", "base_model":
    "model_name_or_path", "model_id": "model_name_or_path",
    "dataset": "dataset_name", "train_data_dir": "dataset_name", "instance_data_dir": "dataset_name",
    "data_root": "dataset_name", "dataset_config": "dataset_name", "dataset_path": "dataset_name",
    "batch_size": "per_device_train_batch_size", "train_batch_size": "per_device_train_batch_size",
    "eval_batch_size": "per_device_eval_batch_size",
    "max_train_steps": "max_steps", "train_steps": "max_steps", "steps": "max_steps",
    "epochs": "num_train_epochs", "max_train_epochs": "num_train_epochs",
    "lr_scheduler": "lr_scheduler_type", "lr_scheduler_args": "lr_scheduler_kwargs", "lr_warmup_steps": "warmup_steps",
    "rank": "lora_rank", "lora_r": "lora_rank", "network_dim": "lora_rank", "lora_dim": "lora_rank",
    "network_alpha": "lora_alpha", "target_modules": "lora_target_modules", "lora_layers": "lora_target_modules",
    "network_weights": "init_adapter", "init_lora": "init_adapter", "lora_path": "init_adapter",
    "adapter": "init_adapter", "network_dropout": "lora_dropout",
    "optimizer": "optim", "optimizer_type": "optim", "optimizer_args": "optim_args",
    "adam_weight_decay": "weight_decay", "max_gradient_norm": "max_grad_norm",
    "discrete_flow_shift": "timestep_shift", "flow_shift": "timestep_shift", "flow_weighting_scheme":
    "timestep_sampling", "logit_mean": "timestep_logit_mean", "logit_std": "timestep_logit_std",
    "min_timestep": "timestep_range", "max_timestep": "timestep_range",
    "checkpointing_steps": "save_steps", "save_every_n_steps": "save_steps",
    "checkpoints_total_limit": "save_total_limit", "resume": "resume_from_checkpoint",
    "tracker_name": "report_to", "log_with": "report_to", "tracker": "report_to",
    "validation_prompt": "sample_prompts", "validation_prompts": "sample_prompts",
    "validation_steps": "sample_every", "validation_epochs": "sample_every", "sample_every_n_steps": "sample_every",
    "snr_gamma": "loss_weighting", "weighting_scheme": "loss_weighting",
    "use_ema": "ema_decay", "attn_implementation": "attention_backend", "attn_mode": "attention_backend",
    "load_in_4bit": "quantization", "fp8_base": "quantization", "output_name": "output_dir",
    "max_prompt_length": "max_sequence_length", "tokenizer_max_length": "max_sequence_length",
    "dpo_beta": "beta", "beta_dpo": "beta", "beta_dpo_loss": "beta",
    "mixed_precision": "bf16", "torch_dtype": "bf16", "dtype": "bf16", "precision": "bf16",
    "blocks_to_swap": "offload_weights", "block_swap": "offload_weights", "cpu_offload": "offload_weights",
    "group_offload": "offload_weights", "enable_group_offload": "offload_weights",
    "dit": "transformer_file", "unet": "transformer_file", "gguf": "transformer_file", "transformer_path":
    "transformer_file", "lora_weights": "init_adapter", "training_type": "use_peft",
    "load_in_8bit": "quantization", "layerwise_upcasting_modules": "quantization", "use_8bit_adam": "optim",
    "cp_degree": "context_parallel_size", "xformers": "attention_backend", "sdpa": "attention_backend",
    "compile": "compile_blocks", "revision": "model_init_kwargs", "variant": "model_init_kwargs",
    "num_workers": "dataloader_num_workers", "max_data_loader_n_workers": "dataloader_num_workers",
    "gradient_accumulation": "gradient_accumulation_steps", "grad_accum": "gradient_accumulation_steps",
    "accumulate_grad_batches": "gradient_accumulation_steps", "clip_grad": "max_grad_norm", "warmup": "warmup_steps",
    "ema": "ema_decay", "batch": "per_device_train_batch_size", "flow_schedule_shift": "timestep_shift",
    "video_length": "num_frames", "max_num_frames": "num_frames", "frames": "num_frames",
    "resolution": "resolution_buckets", "enable_bucket": "resolution_buckets", "height_buckets": "resolution_buckets",
    "caption_column": "column", "video_column": "column", "image_column": "column",
    "save_every_n_epochs": "save_strategy", "allow_tf32": "tf32", "seed_everything": "seed",
    "enable_xformers_memory_efficient_attention": "attention_backend", "guidance_scale": "embedded_guidance",
}  # fmt: skip
# Options that are missing for a reason, or from some methods.
_WITHOUT = {
    "streaming": "videos are encoded once, before training; --dataset_name takes tars and repositories",
    **dict.fromkeys(
        ("cache_latents", "enable_precomputation"), "videos and prompts are always encoded once, into --cache_dir"
    ),
    **dict.fromkeys(
        ("num_gpus", "n_gpus", "gpus", "devices", "dp_degree"), "--num_processes N starts a process on each of N GPUs"
    ),
    **dict.fromkeys(("text_encoder_lr", "train_text_encoder"), "text encoders are not trained"),
    "network_module": "adapters are LoRA, in the layout of diffusers",
    **dict.fromkeys(
        ("ref_model", "reference_model", "ref_adapter_name"),
        "the reference is the model with its adapter switched off; in Python a trainer takes another as `ref_model`",
    ),
    **dict.fromkeys(
        ("snr_gamma", "weighting_scheme"), "a preference weighs all noise levels alike; sft has loss_weighting"
    ),
}


# Optimizers that are named elsewhere by a word, and by their class here.
_OPTIMIZERS = {"prodigy": "prodigyopt.Prodigy", "came": "came_pytorch.CAME", "muon": "torch.optim.Muon"}


def unknown_option(name: str, known: Iterable[str]) -> str:
    """What to say of an option that does not exist: what it is called here, what is like it, or why it is missing."""
    options = list(known)
    if _ELSEWHERE.get(name) in options:
        return f" (here it is {_ELSEWHERE[name]!r})"
    return f": {_WITHOUT[name]}" if name in _WITHOUT else nearest(name, options)


def nearest(name: str, known: Iterable[str]) -> str:
    """`" (did you mean 'x'?)"`, or nothing where no known name is like it."""
    matches = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {matches[0]!r}?)" if matches else ""


def parse(
    verb: str,
    text: str,
    kinds: Sequence[type],
    argv: Sequence[str],
    *,
    positional: str | None = None,
    positional_help: str = "",
    brief: Sequence[str] | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> tuple[Any, ...]:
    """
    Reads the options of a verb.

    Args:
        verb (`str`): As typed, after the program's name.
        text (`str`): What it does, with examples; the docstring of its module.
        kinds (list of dataclasses): Their fields are the options, here and in a YAML file after `--config`.
        argv (list of `str`): What followed the verb.
        positional (`str`, *optional*), positional_help (`str`): Name of values without an option, at least one.
        defaults (`Mapping`, *optional*): Values that stand in for the defaults; a file and options win over them.
        brief (list of `str`, *optional*): Options that `--help` lists; `--help_all` lists the others too.

    Returns:
        `tuple`: An object of each kind and, where there are positional values, their list.

    Raises:
        UsageError: If an option or a key of the file does not exist, or the file is no YAML mapping.
        OSError: If the file cannot be read.
    """
    argv = check(kinds, argv)
    options = [field.name for kind in kinds for field in fields(kind) if field.init]
    from trl import TrlParser  # seconds: after the cheap checks

    values = f"{positional.upper()} [{positional.upper()} ...] " if positional else ""
    parser = TrlParser(
        kinds,
        prog=f"video-trl {verb}",
        usage=f"video-trl {verb} {values}[options]",
        description=text.strip(),
        formatter_class=Formatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", default=argparse.SUPPRESS, help="YAML file with options.")
    if positional is not None:
        parser.add_argument(positional, nargs="+", help=positional_help)
    if brief is not None and "--help_all" not in argv:
        _hide(parser, [name for name in options if name not in brief])
    if {"-h", "--help", "--help_all"} & set(argv):
        parser.print_help()
        raise SystemExit(0)
    parser.set_defaults_with_config(**(defaults or {}))
    parsed = parser.parse_args_and_config(args=argv)
    if positional is None:
        return tuple(parsed)
    *objects, others = parsed
    return (*objects, vars(others)[positional])


def check(kinds: Sequence[type], argv: Sequence[str]) -> list[str]:
    """
    Refuses an option, or a key of a file, that does not exist; values are not looked at, and nothing slow is imported.

    Args:
        kinds (list of dataclasses): Their fields are the options.
        argv (list of `str`): What followed the verb.

    Returns:
        `list[str]`: The same, with `--config=FILE` as two words.

    Raises:
        UsageError: If an option or a key of the file does not exist, or the file is no YAML mapping.
        OSError: If the file cannot be read.
    """
    words = _separated(argv)
    options = {field.name: field for kind in kinds for field in fields(kind) if field.init}
    _check_config(words, options)
    _check_options(words, options)
    return words


def _separated(argv: Sequence[str]) -> list[str]:
    """`--config=FILE` as two words, which is the only form that the parser below takes."""
    words: list[str] = []
    for word in argv:
        words += word.split("=", 1) if word.startswith("--config=") else [word]
    if words[-1:] == ["--config"]:
        raise UsageError("--config needs a file.")
    return words


def _check_config(argv: Sequence[str], options: dict[str, Field[Any]]) -> None:
    if "--config" not in argv:
        return
    path = argv[list(argv).index("--config") + 1]
    content = read_yaml(path)
    for key in content:
        if key not in options and key != "env":
            raise UsageError(f"{path}: there is no option {key!r}{unknown_option(str(key), options)}.")


def read_yaml(path: str) -> dict[str, Any]:
    """
    Raises:
        UsageError: If the file is no YAML mapping.
        OSError: If it cannot be read.
    """
    with open(path, encoding="utf-8") as file:
        try:
            content = yaml.safe_load(file)
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UsageError(f"{path} is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path}: expected options as 'name: value', one a line, got {type(content).__name__}.")
    return content


def _check_options(argv: Sequence[str], options: dict[str, Field[Any]]) -> None:
    """Every word after two dashes must be an option: checked before anything slow is imported."""
    known = {"config", "help", "help_all", *options}
    known |= {f"no_{name}" for name, field in options.items() if field.default is True}
    known |= {alias.lstrip("-") for field in options.values() for alias in field.metadata.get("aliases", ())}
    for word, following in zip(argv, [*argv, ""][1:], strict=True):
        name, _, value = word[2:].partition("=")
        name = name.replace("-", "_")
        if word.startswith("--") and name not in known:
            raise UsageError(f"there is no option --{name}{unknown_option(name, known)}. --help lists the options.")
        if name == "optim" and (path := _OPTIMIZERS.get((value or following).lower())):
            raise UsageError(f"--optim names optimizers of transformers; this one is --optim_class {path}.")


def _hide(parser: argparse.ArgumentParser, names: Sequence[str]) -> None:
    hidden = [name for name in names if name != "help"]
    for action in parser._actions:
        if action.dest in hidden:
            action.help = argparse.SUPPRESS
    parser.epilog = f"{len(hidden)} more options, those of transformers.TrainingArguments: --help_all lists them."


def required(name: str, value: Any, example: str) -> Any:
    """
    Raises:
        UsageError: If an option without a default was not given.
    """
    if value is None or value == []:
        raise UsageError(f"--{name} is needed, for example --{name} {example}.")
    return value
