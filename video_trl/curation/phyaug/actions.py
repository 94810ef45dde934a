"""Assign each clip to the action whose wording is nearest to its caption in an embedding space (PhyAugPipe)."""

import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import yaml
from numpy.typing import NDArray

from ...load import SANDBOX, action_wordings, load_pipeline
from ..engine.manifest import Batch


CLUSTER_VERSION = 1
REAL_WORLD = "real-world"  # the list that ships, actions.yaml, which says by which rule it was made

_NO_PACKAGE = "A sentence transformer needs the package sentence-transformers: pip install 'video-trl[curation]'."

#: Columns that clustering adds: the nearest category and its cosine, the next one, and by how much it is further away.
CLUSTERED: dict[str, pa.DataType] = {
    "category": pa.string(),
    "similarity": pa.float64(),
    "second_category": pa.string(),
    "margin": pa.float64(),
    "embedder": pa.string(),
}

Actions = dict[str, tuple[str, ...]]  # category -> its wordings


class Embedder(Protocol):
    """
    Turns sentences into vectors.

    Attributes:
        identity: everything that vectors depend on besides the sentence.
    """

    @property
    def identity(self) -> str: ...

    def __call__(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """`(N, D)`, each of length 1."""


def read_actions(source: str | os.PathLike[str] | Sequence[str] | Mapping[str, Sequence[str]]) -> Actions:
    """
    A list of action categories.

    Args:
        source: "real-world", the 200 actions that ship with the package; "sandbox"; a `.txt` file with one action a
            line; a `.yaml` file with a list of actions, or with wordings for each action (`juggling: [a person juggles
            balls, ...]`); or such a list or mapping itself. A caption is compared with every wording, and the nearest
            one counts.

    Raises:
        ValueError: no such file, fewer than two actions, an empty one, or one that stands there twice.
    """
    if source == SANDBOX:
        return dict(action_wordings())
    name = "the list of actions"
    listed: Any = source
    if source == REAL_WORLD:
        listed = yaml.safe_load((resources.files(__package__) / "actions.yaml").read_text(encoding="utf-8"))
    elif isinstance(source, str | os.PathLike):
        name = os.fspath(source)
        try:
            text = Path(source).read_text(encoding="utf-8-sig")
            listed = yaml.safe_load(text) if name.endswith((".yaml", ".yml")) else text.splitlines()
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ValueError(
                f"{name}: expected a .txt file with an action a line, or a .yaml file ({error})."
            ) from error
        if not name.endswith((".yaml", ".yml")):
            listed = [line for line in listed if line.strip()]
    if not isinstance(listed, list | tuple | Mapping):
        raise ValueError(f"{name}: expected a list of actions or a mapping to wordings, got {type(listed).__name__}.")
    names = [str(action).strip() for action in listed]
    if len(names) < 2 or len(set(names)) < len(names) or not all(names):
        raise ValueError(f"{name}: expected two or more different actions, none empty, got {names[:20]}.")
    if not isinstance(listed, Mapping):
        return {action: (action,) for action in names}
    wordings = [
        tuple(str(text).strip() for text in ([value] if isinstance(value, str) else value or ()))
        for value in listed.values()
    ]
    if not all(texts and all(texts) for texts in wordings):
        raise ValueError(f"{name}: expected at least one wording for each action, none empty.")
    return dict(zip(names, wordings, strict=True))


class SentenceTransformerEmbedder:
    """
    Any model of sentence-transformers.

    Args:
        model: repository id or folder, such as "sentence-transformers/all-mpnet-base-v2".

    Raises:
        ValueError: the model, or the package (extra `curation`), is not there.
    """

    def __init__(self, model: str) -> None:
        from ...judges.weights import resolve_weights

        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise ValueError(_NO_PACKAGE) from error
        self.folder = resolve_weights(model, patterns=("*.json", "*.safetensors", "*.txt", "*.model"))
        try:
            self.model = SentenceTransformer(str(self.folder), local_files_only=True)
        except (OSError, ValueError) as error:
            raise ValueError(f"{model}: no model of sentence-transformers that can be loaded ({error}).") from error

    @cached_property
    def identity(self) -> str:
        from ...judges.weights import weights_identity

        return f"sentence-transformers:weights={weights_identity(self.folder)}"

    def __call__(self, texts: Sequence[str]) -> NDArray[np.float32]:
        vectors = self.model.encode(list(texts), normalize_embeddings=True, show_progress_bar=False)
        return np.asarray(vectors, dtype=np.float32)


class SandboxEmbedder:
    """Mean hidden state of the sandbox's own text encoder: knows the sandbox's language only, downloads nothing."""

    def __init__(self) -> None:
        pipeline = load_pipeline(SANDBOX)
        self.tokenizer, self.encoder = pipeline.tokenizer, pipeline.text_encoder

    identity = "sandbox-text-encoder:v1"

    def __call__(self, texts: Sequence[str]) -> NDArray[np.float32]:
        import torch

        tokens = self.tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
        with torch.inference_mode():
            hidden = self.encoder(tokens["input_ids"], tokens["attention_mask"]).last_hidden_state
        mask = tokens["attention_mask"][..., None].float()
        mean = (hidden * mask).sum(dim=1) / mask.sum(dim=1)
        return np.asarray(torch.nn.functional.normalize(mean, dim=-1).numpy(), dtype=np.float32)


def load_embedder(name: str) -> Embedder:
    """ "sandbox", or a repository id or folder of a sentence transformer."""
    return SandboxEmbedder() if name == SANDBOX else SentenceTransformerEmbedder(name)


def check_embedder(name: str) -> None:
    """
    Finds what `load_embedder` would stumble over, without reading weights.

    Raises:
        ValueError: as `load_embedder`.
    """
    if name == SANDBOX:
        return
    from ...judges.weights import resolve_weights

    if importlib.util.find_spec("sentence_transformers") is None:
        raise ValueError(_NO_PACKAGE)
    resolve_weights(name, patterns=["modules.json", "config.json"])


@dataclass
class ClusterBatch:
    """
    Stage "cluster" as a batch function. It travels to other processes without the model, which loads at first use.

    Args:
        make: makes the embedder.
        actions: from `read_actions`.
    """

    make: Callable[[], Embedder]
    actions: Actions
    _loaded: tuple[Embedder, NDArray[np.float32]] | None = field(default=None, init=False, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {"make": self.make, "actions": self.actions, "_loaded": None}

    def __call__(self, batch: Batch) -> Batch:
        """Column `prompt` -> the columns `CLUSTERED`."""
        if self._loaded is None:
            embedder = self.make()
            self._loaded = embedder, embedder([wording for texts in self.actions.values() for wording in texts])
        embedder, wordings = self._loaded
        owners = np.repeat(np.arange(len(self.actions)), [len(texts) for texts in self.actions.values()])
        cosines = embedder(batch["prompt"]) @ wordings.T  # (N, all wordings)
        per_action = np.full((len(cosines), len(self.actions)), -np.inf, dtype=np.float32)
        for column, owner in enumerate(owners):
            per_action[:, owner] = np.maximum(per_action[:, owner], cosines[:, column])
        # Of equal cosines the first action of the list wins.
        order = np.argsort(-per_action, axis=1, kind="stable")[:, :2]
        best, second = np.take_along_axis(per_action, order, axis=1).astype(np.float64).T
        names = list(self.actions)
        return {
            "category": [names[index] for index in order[:, 0]],
            "similarity": best.tolist(),
            "second_category": [names[index] for index in order[:, 1]],
            "margin": (best - second).tolist(),
            "embedder": [embedder.identity] * len(best),
        }
