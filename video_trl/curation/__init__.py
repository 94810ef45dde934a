"""Curation of preference data: stages as batch functions, a manifest that accounts for every clip, resumable runs."""

import importlib
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .annotated import annotated_pairs, read_votes
    from .generate import VideoModel
    from .gt_pair import GTPairConfig, GTPairResult, run_gt_pair
    from .manifest import Rule, Shard, Stage, account, apply_rules, run_stage
    from .measures import measure_clip
    from .phyaug import PhyAugConfig, PhyAugResult, allocate, load_groups, push_groups, run_phyaug

# The manifest needs pyarrow only, the generator diffusers: a worker loads what it uses.
_HOME = {
    "GTPairConfig": "gt_pair",
    "GTPairResult": "gt_pair",
    "PhyAugConfig": "phyaug",
    "PhyAugResult": "phyaug",
    "Rule": "manifest",
    "Shard": "manifest",
    "Stage": "manifest",
    "VideoModel": "generate",
    "account": "manifest",
    "allocate": "phyaug",
    "annotated_pairs": "annotated",
    "apply_rules": "manifest",
    "load_groups": "phyaug",
    "measure_clip": "measures",
    "push_groups": "phyaug",
    "read_votes": "annotated",
    "run_gt_pair": "gt_pair",
    "run_phyaug": "phyaug",
    "run_stage": "manifest",
}

__all__ = [
    "GTPairConfig",
    "GTPairResult",
    "PhyAugConfig",
    "PhyAugResult",
    "Rule",
    "Shard",
    "Stage",
    "VideoModel",
    "account",
    "allocate",
    "annotated_pairs",
    "apply_rules",
    "load_groups",
    "measure_clip",
    "push_groups",
    "read_votes",
    "run_gt_pair",
    "run_phyaug",
    "run_stage",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
