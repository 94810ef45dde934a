"""Find the weights of a judge in a folder or on the Hub, load them safely, and name them in the judge's identity."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ..files import fingerprint, read_json


_WEIGHTS = (  # looked for in this order; a model is one file, or several and an index
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_NEEDED = ("*.json", "*.safetensors", "*.bin", "*.model", "*.txt", "*.jinja")


def resolve_weights(
    name_or_path: str | os.PathLike[str], revision: str | None = None, patterns: Sequence[str] = _NEEDED
) -> Path:
    """
    The folder of a checkpoint, fetched from the Hub where it is no folder on this machine.

    Args:
        name_or_path: folder, or repository id `user/name`.
        revision: branch, tag or commit of the repository; its main branch.
        patterns: of the files to fetch.

    Raises:
        ValueError: neither a folder nor a repository that can be reached.
    """
    folder = Path(name_or_path).expanduser()
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download

    try:
        snapshot = snapshot_download(str(name_or_path), revision=revision, allow_patterns=list(patterns))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"No weights at {name_or_path!s}: expected a folder on this machine (from {Path.cwd()}) "
            f"or a repository on the Hub, which cannot be fetched ({str(error).splitlines()[0]}). Check the spelling, "
            "HF_HUB_OFFLINE, and `hf auth login` where the repository is gated."
        ) from error
    return Path(snapshot)


def weights_identity(folder: Path, patterns: Sequence[str] = _NEEDED) -> str:
    """
    Tells one set of weights from another: the commit of a Hub snapshot, or a hash over every file of a folder.

    Hashing reads the files that match a pattern once, about a second per gigabyte.
    """
    if folder.parent.name == "snapshots" and re.fullmatch(r"[0-9a-f]{40}", folder.name):
        return folder.name
    files = sorted(path for pattern in patterns for path in folder.glob(pattern))
    return fingerprint(*(piece for path in files for piece in (path.name, path)))


def text_hash(*texts: str) -> str:
    """Hash of prompt templates, or of any texts in order: 16 hexadecimal digits."""
    return fingerprint(*texts)[:16]


def read_config(folder: Path) -> dict[str, Any]:
    """
    A checkpoint's `config.json`.

    Raises:
        ValueError: it is missing or no JSON object.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path}: expected the checkpoint's config.json, got {error}. Fetch the whole repository into {folder}."
        ) from error
    if not isinstance(config, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(config).__name__}. Fetch the file again.")
    return config


def read_state_dict(folder: Path) -> dict[str, Tensor]:
    """
    All tensors of a checkpoint on the CPU, in their stored dtypes; `.bin` files are memory-mapped and never unpickle
    anything but tensors.

    Raises:
        ValueError: no weights file, a shard that the index names is missing, or a file that is damaged or unsafe.
    """
    first = next((folder / name for name in _WEIGHTS if (folder / name).is_file()), None)
    if first is None:
        raise ValueError(
            f"No weights in {folder}: expected one of {', '.join(_WEIGHTS)}, got "
            f"{sorted(p.name for p in folder.iterdir()) or 'an empty folder'}. Fetch the whole repository."
        )
    files = [first]
    if first.suffix == ".json":
        files = [folder / name for name in sorted(set(read_json(first)["weight_map"].values()))]
        missing = [path.name for path in files if not path.is_file()]
        if missing:
            raise ValueError(f"{first} names shards that are missing: {', '.join(missing)}. Fetch them into {folder}.")
    state: dict[str, Tensor] = {}
    for path in files:
        state |= read_tensors(path)
    return state


def read_tensors(path: Path) -> dict[str, Tensor]:
    """
    The tensors of one file, as `read_state_dict`.

    Raises:
        ValueError: the file is damaged or unsafe.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return dict(torch.load(path, map_location="cpu", weights_only=True, mmap=True))
    except Exception as error:  # damage shows as any of a dozen classes
        raise ValueError(
            f"{path}: cannot be read as tensors ({str(error).splitlines()[0]}). Fetch it again; a file of PyTorch "
            "before 1.6, or one that holds more than tensors, has to be converted to safetensors first."
        ) from error


def load_exactly(module: nn.Module, state: Mapping[str, Tensor], where: Path) -> None:
    """
    Give `module` the tensors of `state` themselves (no copy): every name and every shape must agree.

    Raises:
        ValueError: missing or unexpected names, or other shapes; the message lists them.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    faults = {
        "missing": sorted(shapes.keys() - state.keys()),
        "unexpected": sorted(state.keys() - shapes.keys()),
        "of another shape": [
            f"{name} {tuple(state[name].shape)} instead of {shape}"
            for name, shape in shapes.items()
            if name in state and tuple(state[name].shape) != shape
        ],
    }
    if any(faults.values()):
        summary = "; ".join(
            f"{kind} ({len(names)}): {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
            for kind, names in faults.items()
            if names
        )
        raise ValueError(
            f"{where}: the checkpoint does not fit the model. Keys {summary}. Is this the right checkpoint?"
        )
    module.load_state_dict(dict(state), assign=True)
