"""
The embedded default: simulated physics clips, an exact judge of them and a tiny but real diffusers pipeline.

`simulate` and the judge need numpy and scipy only; `load_sandbox` imports diffusers when it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .data.datasets import build_clip_dataset, build_group_dataset
    from .judge.judge import SandboxJudge
    from .judge.modes import find_mode, mode_shares
    from .weights.pipeline import Sandbox, load_sandbox
    from .world.simulate import Clip, simulate

_HOME = {
    "Clip": "world.simulate",
    "Sandbox": "weights.pipeline",
    "SandboxJudge": "judge.judge",
    "build_clip_dataset": "data.datasets",
    "build_group_dataset": "data.datasets",
    "find_mode": "judge.modes",
    "load_sandbox": "weights.pipeline",
    "mode_shares": "judge.modes",
    "simulate": "world.simulate",
}

__all__ = [
    "Clip",
    "Sandbox",
    "SandboxJudge",
    "build_clip_dataset",
    "build_group_dataset",
    "find_mode",
    "load_sandbox",
    "mode_shares",
    "simulate",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
