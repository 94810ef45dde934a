"""
The embedded default: simulated physics clips, an exact judge of them and a tiny but real diffusers pipeline.

`simulate` and the judge need numpy and scipy only; `load_sandbox` imports diffusers when it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .benchmark import evaluate
    from .dataset import build_clip_dataset, build_group_dataset
    from .judge import SandboxJudge
    from .pipeline import Sandbox, load_sandbox
    from .world import Clip, simulate

_HOME = {
    "Clip": "world",
    "Sandbox": "pipeline",
    "SandboxJudge": "judge",
    "build_clip_dataset": "dataset",
    "build_group_dataset": "dataset",
    "evaluate": "benchmark",
    "load_sandbox": "pipeline",
    "simulate": "world",
}

__all__ = [
    "Clip",
    "Sandbox",
    "SandboxJudge",
    "build_clip_dataset",
    "build_group_dataset",
    "evaluate",
    "load_sandbox",
    "simulate",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
