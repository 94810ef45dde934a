"""
Write and read the files of a checkpoint, and refuse to resume it with another model.

A checkpoint folder is written under a name that nothing looks for, flushed to the disk, and then renamed: a full disk
or a kill at any moment leaves the previous checkpoint untouched.
"""

import hashlib
import json
import logging
import os
import shutil
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
from accelerate import Accelerator
from diffusers import ModelMixin
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from huggingface_hub import save_torch_state_dict
from torch import Tensor, nn
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ... import files
from ...hub import load_lora_state
from ...hub.lora import adapter_weights, write_lora
from ..parallel.engines import assign_weight, full_shape, full_weight
from ..repa.head import HEAD
from ..setup.lora import adapter_configs
from ..setup.quantization import plain


logger = logging.getLogger(__name__)

DESCRIPTION_NAME = "video_trl_run.json"
RUN_KEY = "run"  # in that file: the run that wrote it
TRANSFORMER_FOLDER = "transformer"
HEAD_NAME = "head.safetensors"
# Every process must know the name, so it is no random one; the underscore keeps it from being taken for a checkpoint.
_PARTIAL_PREFIX = "_partial-"
_ADAPTER_FIELDS = ("r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora")


def partial_directory(final: Path) -> Path:
    """Folder in which the checkpoint `final` is written before it is published."""
    return final.with_name(_PARTIAL_PREFIX + final.name)


def remove_leftovers(run_directory: Path) -> None:
    """Delete what an interrupted save left behind in the run's folder, which this process has locked."""
    files.remove_leftovers(run_directory, locked=True)
    for leftover in run_directory.glob(f"{_PARTIAL_PREFIX}*"):
        logger.info("Removing %s, left behind by an interrupted save.", leftover)
        shutil.rmtree(leftover, ignore_errors=True)


@contextmanager
def checkpoint_directory(final: Path, accelerator: Accelerator, *, should_save: bool) -> Iterator[Path]:
    """
    A folder to write the checkpoint `final` into, which gets that name on leaving, once every process is done.

    Args:
        final (`Path`): `<output_dir>/checkpoint-<step>`.
        accelerator (`Accelerator`): Lets the processes wait for each other.
        should_save (`bool`): Whether this process is the one that makes and names folders.

    Yields:
        `Path`: The folder's name until then. If writing fails it is removed, and nothing is published.
    """
    partial = partial_directory(final)
    if should_save:
        remove_leftovers(final.parent)
    accelerator.wait_for_everyone()
    try:
        yield partial
        accelerator.wait_for_everyone()
        if should_save:
            _check_archives(partial)
            files.write_checksums(partial)
            files.publish_folder(partial, final)
    except Exception:
        logger.error("Saving %s failed. It was not published; earlier checkpoints are intact.", final)
        if should_save:  # half a checkpoint is of no use, and the disk may be full
            shutil.rmtree(partial, ignore_errors=True)
        raise
    accelerator.wait_for_everyone()


def _check_archives(folder: Path) -> None:
    """Refuse files of `torch.save` that lost their end: torch 2.6 says nothing when the disk is full, 2.13 does."""
    for path in sorted(folder.rglob("*.pt*")):
        if path.is_file() and not zipfile.is_zipfile(path):
            raise OSError(f"{path} was cut off at {path.stat().st_size} bytes. Is the disk full, or a quota reached?")


def named_checkpoint(value: str | None) -> str | bool | None:
    """
    What `--resume_from_checkpoint` means: a folder; `true` for the last checkpoint in `output_dir`; `auto` for that
    one if there is any, else a new run.
    """
    words: dict[str, str | bool | None] = {"true": True, "false": None, "auto": "auto"}
    return words.get(str(value).lower(), value)


def write_trainer_state(state: TrainerState, exportable: Sequence[Any], partial: Path, final: Path) -> None:
    """
    Write what `transformers.Trainer` resumes from into a checkpoint.

    Args:
        state (`TrainerState`): Gets the states of the callbacks, and the folder of the best checkpoint.
        exportable (`Sequence`): Callbacks and the control; those that have a state are asked for it.
        partial (`Path`): Where the checkpoint is being written.
        final (`Path`): The name that it will get.
    """
    if state.best_global_step:
        best = final.with_name(f"{PREFIX_CHECKPOINT_DIR}-{state.best_global_step}")
        if best == final or best.exists():
            state.best_model_checkpoint = str(best)
    for callback in exportable:
        if isinstance(callback, ExportableState):
            stored = state.stateful_callbacks[type(callback).__name__]
            if isinstance(stored, list):
                stored.append(callback.state())
            else:
                state.stateful_callbacks[type(callback).__name__] = callback.state()
    state.save_to_json(str(partial / TRAINER_STATE_NAME))


def describe_run(
    transformer: ModelMixin, adapter_name: str | None, seed: int, reference: nn.Module | None = None
) -> dict[str, Any]:
    """
    What a checkpoint must agree on with the trainer that resumes it. To be called before the first update.

    Args:
        transformer (`ModelMixin`): The policy, in the form in which it is trained.
        adapter_name (`str`, *optional*): Adapter that is trained; none when all weights are.
        seed (`int`): Seed of the run.
        reference (`torch.nn.Module`, *optional*): Reference that is a module of its own.

    Returns:
        `dict`: `transformer` (class), `config`, `adapter` (rank, scale, targets; `None` when all weights are trained),
        `base_weights` (a hash over a sample of every tensor that training starts from: the frozen ones under an
        adapter, else all), `reference_weights` (the same of `reference`; `None` if there is none) and `seed`.
    """
    adapter = None
    if adapter_name is not None:
        config = adapter_configs(transformer)[adapter_name].to_dict()
        adapter = {name: config[name] for name in _ADAPTER_FIELDS}
        if not isinstance(adapter["target_modules"], str):
            adapter["target_modules"] = sorted(adapter["target_modules"])
    description = {
        "transformer": type(transformer).__name__,
        "config": {name: value for name, value in transformer.config.items() if not name.startswith("_")},
        "adapter": adapter,
        "base_weights": _fingerprint(transformer, only_frozen=adapter_name is not None),
        "reference_weights": None if reference is None else _fingerprint(reference),
        "seed": seed,
    }
    return json.loads(json.dumps(description, default=str))  # tuples become lists, as they do in the file


def write_description(directory: Path, description: dict[str, Any]) -> None:
    """Write what `describe_run` returned into a checkpoint."""
    files.write_atomically(directory / DESCRIPTION_NAME, json.dumps(description, indent=2))


def check_description(directory: Path, ours: dict[str, Any]) -> None:
    """
    Compare a checkpoint with the trainer that is about to load it.

    Args:
        directory (`Path`): Checkpoint folder.
        ours (`dict`): What `describe_run` returned for the trainer.

    Raises:
        ValueError: If the folder is no checkpoint of this package, or of another model, base or adapter; names both.
    """
    path = directory / DESCRIPTION_NAME
    if not path.is_file():
        content = sorted(os.listdir(directory))[:10] if directory.is_dir() else "no such folder"
        raise ValueError(
            f"Expected a checkpoint with {DESCRIPTION_NAME} in {directory}, got {content}. Pass a `checkpoint-<step>` "
            "folder that a trainer of this package wrote, or `True` for the last one in `output_dir`."
        )
    theirs = json.loads(path.read_text())
    for key in ("transformer", "config", "adapter", HEAD):
        if theirs.get(key) != ours.get(key):
            difference = _difference(theirs.get(key), ours.get(key))
            raise ValueError(
                f"{directory} cannot be resumed by this trainer, their {key} differs (checkpoint / trainer): "
                f"{difference}. Build the trainer as it was built for that run, or start a new run."
            )
    _check_fingerprints(directory, theirs, ours)
    if theirs.get("order") != ours["order"]:
        logger.warning(
            "Resuming with another order of the rows (checkpoint / trainer): %s. The run goes on at the same step, "
            "but in the present epoch some rows will be seen twice and others not at all.",
            _difference(theirs.get("order"), ours["order"]),
        )
    if theirs["seed"] != ours["seed"]:
        logger.warning(
            "Resuming a run of seed %s with seed %s: samples and noise will not continue the same sequence.",
            theirs["seed"],
            ours["seed"],
        )


def trained_weights(transformer: ModelMixin, adapter_name: str | None) -> dict[str, Tensor]:
    """The weights of the adapter, or all weights, under the names that they have in files, whole or sharded."""
    weights = transformer.state_dict(keep_vars=True)
    return weights if adapter_name is None else adapter_weights(transformer, adapter_name, weights)


def gather(weights: Mapping[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """
    Weights, whole or sharded, as whole tensors on the CPU. Every process must call this.

    Args:
        weights (`Mapping[str, torch.Tensor]`): By name.
        keep (`bool`): Whether this process wants them; the others get an empty dict.
    """
    gathered = {}
    for name, weight in weights.items():
        whole = full_weight(weight)
        if keep:
            whole = whole.detach().cpu().contiguous()
            # Parts are padded to equal size, and a file refuses a tensor that does not fill its memory.
            has_padding = whole.untyped_storage().nbytes() > whole.nbytes
            gathered[name] = whole.clone() if has_padding else whole
    return gathered


def save_weights(
    transformer: ModelMixin,
    directory: Path,
    adapter_name: str | None,
    base_model: str | None,
    weights: dict[str, Tensor] | None = None,
    expert: str | None = None,
) -> None:
    """
    Write the trained weights into a folder.

    An adapter becomes `pytorch_lora_weights.safetensors`, for `pipeline.load_lora_weights(directory)`; all weights
    become a `transformer` folder, for `from_pretrained(directory, subfolder="transformer")`.

    Args:
        transformer (`ModelMixin`): The policy.
        directory (`Path`): The folder.
        adapter_name (`str`, *optional*): Adapter that is trained; none when all weights are.
        base_model (`str`, *optional*): Where the base weights are from.
        weights (`dict[str, torch.Tensor]`, *optional*): The gathered `trained_weights`; read from the transformer if
            not given.
        expert (`str`, *optional*): Which of a pipeline's several transformers this is, for the adapter's file.
    """
    if weights is None:
        weights = gather(trained_weights(transformer, adapter_name), keep=True)
    if adapter_name is not None:
        write_lora(directory, weights, adapter_configs(transformer)[adapter_name], base_model, expert)
        return
    name, extension = os.path.splitext(SAFETENSORS_WEIGHTS_NAME)
    with files.atomic_folder(directory / TRANSFORMER_FOLDER) as folder:
        transformer.save_config(folder)
        save_torch_state_dict(weights, folder, filename_pattern=f"{name}{{suffix}}{extension}", max_shard_size="10GB")


def load_weights(transformer: ModelMixin, directory: Path, adapter_name: str | None) -> None:
    """
    Read what `save_weights` wrote, into a transformer of the same form, whole or sharded.

    Raises:
        ValueError: If weights are missing, superfluous or of another shape.
    """
    if adapter_name is not None:
        state, _ = load_lora_state(directory)
    else:
        state = {}
        for path in sorted((directory / TRANSFORMER_FOLDER).glob("*.safetensors")):
            state.update(safetensors.torch.load_file(path))
    _assign(state, trained_weights(transformer, adapter_name), directory)


def save_head(weights: dict[str, Tensor], directory: Path) -> None:
    """Write the gathered weights of the head into a checkpoint, as `head.safetensors`."""
    safetensors.torch.save_file(weights, directory / HEAD_NAME)


def load_head(module: nn.Module, directory: Path) -> None:
    """Read what `save_head` wrote; a `ValueError` if it is not there, or weights do not fit."""
    path = directory / HEAD_NAME
    if not path.is_file():
        raise ValueError(
            f"Expected {HEAD_NAME} in {directory}, for the {type(module).__name__} that is trained with the "
            f"transformer, got {sorted(os.listdir(directory))}. Pass a `checkpoint-<step>` folder, not a saved model."
        )
    _assign(safetensors.torch.load_file(path), module.state_dict(keep_vars=True), directory)


def _assign(state: dict[str, Tensor], weights: dict[str, Tensor], directory: Path) -> None:
    found_shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    expected_shapes = {name: full_shape(weight) for name, weight in weights.items()}
    if found_shapes != expected_shapes:
        difference = _difference(found_shapes, expected_shapes)
        raise ValueError(f"The weights in {directory} do not fit the model (checkpoint / model): {difference}.")
    for name, weight in weights.items():
        assign_weight(weight, state[name])


def _check_fingerprints(directory: Path, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    for key, what in (("base_weights", "base"), ("reference_weights", "reference")):
        if theirs[key] != ours[key]:
            raise ValueError(
                f"{directory} was trained with other {what} weights than this trainer's (checkpoint / trainer: hash "
                f"{theirs[key]} / {ours[key]}): another {what} model, or the same one in another precision. Build the "
                "trainer from the models of that run as they were before it, or start a new run."
            )


def _fingerprint(module: nn.Module, *, only_frozen: bool = False, sample: int = 16) -> str:
    """Hash of some entries of every tensor: cheap at any size, and no two base models agree on all of them."""
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in module.named_parameters():
        if only_frozen and tensor.requires_grad:
            continue
        flat = plain(tensor).flatten()
        values = flat[:: max(flat.numel() // sample, 1)][:sample].float().cpu()
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()


def _difference(theirs: Any, ours: Any) -> str:
    """The entries in which two dicts differ, or the two values themselves."""
    if not isinstance(theirs, dict) or not isinstance(ours, dict):
        return f"{theirs} / {ours}"
    names = [name for name in sorted(theirs.keys() | ours.keys()) if theirs.get(name) != ours.get(name)]
    shown = ", ".join(f"{name}: {theirs.get(name)} / {ours.get(name)}" for name in names[:5])
    return shown + (f", and {len(names) - 5} more" if len(names) > 5 else "")
