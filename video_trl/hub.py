"""Adapters on disk and on the Hub: check, save, describe and push LoRA weights that a diffusers pipeline loads."""

import json
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import jinja2
import safetensors.torch
import torch
from diffusers import ModelMixin
from huggingface_hub import CommitInfo, HfApi, ModelCardData
from peft import LoraConfig, PeftConfig, get_peft_model_state_dict
from safetensors import safe_open


LORA_FILE_NAME = "pytorch_lora_weights.safetensors"
_METADATA_KEY = "lora_adapter_metadata"  # where diffusers looks for rank and alpha
_PREFIX = "transformer."  # without it a pipeline loads nothing, and only logs a warning


def check_lora_config(config: PeftConfig) -> None:
    """
    Accept only adapters that leave the base weights alone and that a pipeline reloads to the same numbers.

    Args:
        config (`peft.PeftConfig`): The adapter's configuration.

    Raises:
        ValueError: Not a LoRA configuration; an initialisation that changes the base weights (PiSSA, OLoRA, CorDA,
            LoftQ, ...), so that switching the adapter off would not give the reference back; `modules_to_save`,
            `trainable_token_indices` or `bias != "none"`, which a LoRA file for diffusers cannot hold.
    """
    if not isinstance(config, LoraConfig):
        raise ValueError(
            f"`peft_config` must be a `peft.LoraConfig`, got {type(config).__name__}: diffusers pipelines would not "
            "load the saved file. Use `LoraConfig(r=48, lora_alpha=48, target_modules=[...])`."
        )
    if config.init_lora_weights not in (True, False, "gaussian"):
        raise ValueError(
            f"`init_lora_weights={config.init_lora_weights!r}` may change the base weights, and the base model with "
            "its adapter off is the reference; expected True, False or 'gaussian'."
        )
    if config.modules_to_save:
        raise ValueError(
            f"`modules_to_save` must be empty, got {config.modules_to_save}: a LoRA file cannot hold whole modules. "
            "Name them in `target_modules` instead."
        )
    if config.layer_replication:
        raise ValueError("`layer_replication` must be empty: it changes the base model, and with it the reference.")
    if config.trainable_token_indices:
        raise ValueError("`trainable_token_indices` must be empty: a video transformer has no token embedding.")
    if config.bias != "none":
        raise ValueError(
            f"`bias` must be 'none', got {config.bias!r}: trained base biases are lost when saving a LoRA."
        )


def save_lora(
    transformer: ModelMixin,
    directory: str | os.PathLike[str],
    adapter_name: str = "default",
    base_model: str | None = None,
) -> Path:
    """
    Write an adapter as `pytorch_lora_weights.safetensors`, which `pipeline.load_lora_weights(directory)` finds.

    The file carries rank, alpha and targets as metadata (without it diffusers takes alpha = rank). It is written under
    a temporary name and then renamed, so a full disk or a kill leaves an older file whole.

    Args:
        transformer (`ModelMixin`): Model with the adapter, added by `add_adapter`.
        directory (`str` or `Path`): Folder to write into; made where needed.
        adapter_name (`str`, defaults to `"default"`): Which adapter to save.
        base_model (`str`, *optional*): Repository id or path of the base model, recorded in the file.

    Returns:
        `Path`: The file.

    Raises:
        ValueError: No adapter of that name.
        OSError: The file cannot be written, for instance because the disk is full.
    """
    configs: dict[str, LoraConfig] = getattr(
        transformer, "peft_config", {}
    )  # diffusers sets it with the first adapter
    if adapter_name not in configs:
        raise ValueError(
            f"No adapter {adapter_name!r} to save; the model has {sorted(configs)}. Call `add_adapter` first."
        )
    # Only what differs from the defaults: another version of PEFT need not know every option of this one.
    defaults = LoraConfig().to_dict()
    always = ("r", "lora_alpha", "target_modules")
    config = {
        key: value for key, value in configs[adapter_name].to_dict().items() if key in always or value != defaults[key]
    }
    if base_model is not None:
        config["base_model_name_or_path"] = base_model
    weights = get_peft_model_state_dict(transformer, adapter_name=adapter_name)
    tensors = {_PREFIX + name: weight.detach().to("cpu").contiguous() for name, weight in weights.items()}
    described = {_PREFIX + key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    header = {"format": "pt", _METADATA_KEY: json.dumps(described, indent=2, sort_keys=True)}
    path = Path(directory) / LORA_FILE_NAME
    _write_whole(path, safetensors.torch.save(tensors, header))
    return path


def load_lora_state(directory: str | os.PathLike[str]) -> tuple[dict[str, torch.Tensor], LoraConfig]:
    """
    Read what `save_lora` wrote.

    Args:
        directory (`str` or `Path`): Folder with `pytorch_lora_weights.safetensors`, or that file.

    Returns:
        `tuple[dict[str, torch.Tensor], peft.LoraConfig]`: Weights by name without the `transformer.` prefix, on the
        CPU, ready for `peft.set_peft_model_state_dict`, and the adapter's configuration.

    Raises:
        ValueError: No such file, or a file without the prefix or the metadata.
    """
    path = Path(directory)
    path = path / LORA_FILE_NAME if path.is_dir() else path
    if not path.is_file():
        raise ValueError(
            f"No LoRA weights at {path}; expected a folder with {LORA_FILE_NAME} as `save_lora` writes it."
        )
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            header = file.metadata() or {}
            names = list(file.keys())
            tensors = {name.removeprefix(_PREFIX): file.get_tensor(name) for name in names}
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}). Fetch or save it again.") from error
    if _METADATA_KEY not in header or not all(name.startswith(_PREFIX) for name in names):
        raise ValueError(
            f"{path} lacks the metadata '{_METADATA_KEY}' or the key prefix '{_PREFIX}', so its alpha is unknown. "
            "Save it with `video_trl.hub.save_lora`."
        )
    described = json.loads(header[_METADATA_KEY])
    return tensors, LoraConfig(**{key.removeprefix(_PREFIX): value for key, value in described.items()})


def model_card(
    *,
    repo_id: str,
    base_model: str,
    method: str,
    method_name: str,
    prompt: str,
    fps: float,
    pipeline_class: str = "WanPipeline",
    dtype: str = "bfloat16",
    call_kwargs: Mapping[str, Any] | None = None,
    hyperparameters: Mapping[str, Any] | None = None,
    evaluation: Sequence[Mapping[str, Any]] = (),
    dataset: str | None = None,
    citation: str | None = None,
    license: str | None = None,
) -> str:
    """
    The README of an adapter, with YAML front matter that the Hub reads and a snippet that runs as it stands.

    Args:
        repo_id (`str`): Where the adapter will be found: a repository id or a folder.
        base_model (`str`): Repository id or path of the base model, or `"sandbox"`.
        method (`str`): Tag of the method, e.g. `"group-dpo"`.
        method_name (`str`): The method in words, with a link where there is one.
        prompt (`str`): Prompt of the snippet.
        fps (`float`): Frames per second of the snippet's video.
        pipeline_class (`str`, defaults to `"WanPipeline"`): Class in diffusers of the base model's pipeline.
        dtype (`str`, defaults to `"bfloat16"`): Attribute of `torch` to load the base model in.
        call_kwargs (`dict`, *optional*): Further arguments of the pipeline's call in the snippet.
        hyperparameters (`dict`, *optional*): Table of the training's settings.
        evaluation (`list[dict]`, *optional*): Rows of a table; its columns are the keys of the first row.
        dataset (`str`, *optional*): What the adapter was trained on, in words.
        citation (`str`, *optional*): BibTeX.
        license (`str`, *optional*): Licence identifier of the adapter, e.g. `"apache-2.0"`.

    Returns:
        `str`: The README.
    """
    on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", base_model) is not None and not Path(base_model).exists()
    task = "image-to-video" if _takes_image(pipeline_class) else "text-to-video"
    front_matter = ModelCardData(
        base_model=base_model if on_hub else None,
        library_name="diffusers",
        license=license,
        pipeline_tag=task,
        tags=["video-trl", method, task, "diffusers", "lora"],
    )
    template = resources.files("video_trl").joinpath("templates/model_card.md").read_text(encoding="utf-8")
    packages = ("video-trl", "torch", "diffusers", "transformers", "peft", "accelerate")
    return (
        jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
        .from_string(template)
        .render(
            front_matter=f"---\n{front_matter.to_yaml()}\n---",
            title=Path(repo_id).name,
            base_model_link=f"[{base_model}](https://huggingface.co/{base_model})" if on_hub else f"`{base_model}`",
            method_name=method_name,
            dataset=dataset,
            snippet=_snippet(
                repo_id, base_model, pipeline_class, dtype, {"prompt": prompt, **(call_kwargs or {})}, fps
            ),
            evaluation=_table(evaluation),
            hyperparameters=_table(
                [{"setting": name, "value": value} for name, value in (hyperparameters or {}).items()]
            ),
            versions=_table([{"package": name, "version": _version(name)} for name in packages]),
            citation=citation,
        )
    )


def push(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    commit_message: str = "Upload a video_trl adapter",
    token: str | None = None,
) -> CommitInfo:
    """
    Upload a folder with an adapter to the Hub; the repository is made where needed. Checkpoints stay at home.

    Args:
        folder (`str` or `Path`): Folder with `pytorch_lora_weights.safetensors` and, as a rule, a `README.md`.
        repo_id (`str`): Repository, `"user/name"`.
        private (`bool`, *optional*): Visibility of a new repository; the account's default.
        commit_message (`str`, *optional*): Message of the commit.
        token (`str`, *optional*): Access token; the one logged in with.

    Returns:
        `huggingface_hub.CommitInfo`: The commit, with its URL.

    Raises:
        ValueError: There is no adapter in the folder. Raised before anything is sent.
        huggingface_hub.errors.HfHubHTTPError: The Hub refused, for instance because the token may not write.
    """
    if not (Path(folder) / LORA_FILE_NAME).is_file():
        raise ValueError(
            f"Nothing to push: {folder} has no {LORA_FILE_NAME}. Save the adapter with `save_lora` first."
        )
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    return api.upload_folder(
        repo_id=repo_id,
        folder_path=Path(folder),
        commit_message=commit_message,
        ignore_patterns=["checkpoint-*", "*.pt", "*.bin", "*.pth", ".*"],
    )


def _snippet(
    repo_id: str, base_model: str, pipeline_class: str, dtype: str, call: Mapping[str, Any], fps: float
) -> str:
    if base_model == "sandbox":
        imports, load = "from video_trl.sandbox import load_sandbox", "load_sandbox().pipeline"
    else:
        imports = f"import torch\nfrom diffusers import {pipeline_class}"
        load = f"{pipeline_class}.from_pretrained({base_model!r}, dtype=torch.{dtype})"
    arguments = ", ".join(f"{name}={value!r}" for name, value in call.items())
    if _takes_image(pipeline_class):
        imports += "\nfrom diffusers.utils import load_image"
        arguments = f"image=load_image('first_frame.png'), {arguments}"
    return "\n".join(
        [
            imports,
            "from video_trl.data import write_video",
            "",
            f"pipeline = {load}",
            f"pipeline.load_lora_weights({repo_id!r}, weight_name={LORA_FILE_NAME!r}, adapter_name='default')",
            f"frames = pipeline({arguments}).frames[0]  # (T, H, W, 3) in [0, 1]",
            f"write_video('video.mp4', (frames * 255).round().astype('uint8'), fps={fps:g})",
        ]
    )


def _takes_image(pipeline_class: str) -> bool:
    return "ImageToVideo" in pipeline_class


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table; empty for no rows."""
    if not rows:
        return ""
    header = list(rows[0])
    lines = [header, ["---"] * len(header), *([_table_cell(row[name]) for name in header] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _table_cell(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # run from a checkout
        return "not installed as a package"


def _write_whole(path: Path, data: bytes) -> None:
    """All of the file or none of it: a temporary name beside it, then a rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # a full disk may show only here
        os.chmod(partial, 0o644)  # mkstemp gives 0600
        os.replace(partial, path)
    except BaseException:
        os.unlink(partial)
        raise
