"""
Configurations of the checkpoints that docs/trainers/models.md lists, so that a run can be counted without the Hub.

`checkpoints.json` holds what decides sizes, of the JSON files of each repository; no weights, and nothing that only
sampling reads (such as the flow shift of Wan's schedulers).
"""

import json
from collections.abc import Mapping
from functools import lru_cache
from importlib import resources
from typing import Any


def known_checkpoint(name: str) -> dict[str, Mapping[str, Any]] | None:
    """
    Configurations of the parts of a listed repository.

    Args:
        name (`str`): Repository id.

    Returns:
        `dict[str, Mapping]` or `None`: Of `"transformer"`, `"vae"`, `"scheduler"` and the encoders (`"text_encoder"`,
        `"text_encoder_2"`, `"image_encoder"`, ...), the class as `_class_name`, its library as `_library` where that
        is not transformers or diffusers, and the arguments; `None` for a repository that is not listed.
    """
    table = _table()
    if name not in table["checkpoints"]:
        return None
    parts = table["checkpoints"][name].items()
    return {kind: table["parts"][part] if isinstance(part, str) else part for kind, part in parts}


def known_checkpoints() -> tuple[str, ...]:
    """The listed repositories."""
    return tuple(_table()["checkpoints"])


@lru_cache(maxsize=1)
def _table() -> dict[str, Any]:
    return json.loads((resources.files(__package__) / "checkpoints.json").read_text(encoding="utf-8"))
