"""Build preference datasets in stages. A manifest has one row for each clip; a stopped run is resumed."""

import importlib
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .annotated import annotated_pairs, read_votes
    from .clips.measures import measure_clip
    from .engine.manifest import Rule, Shard, Stage, apply_rules, run_stage, summarize
    from .generate import VideoModel
    from .gt_pair.pipeline import GTPairConfig, GTPairResult, run_gt_pair
    from .matched import MatchedLosers, matched_losers
    from .phyaug.pipeline import PhyAugConfig, PhyAugResult, load_groups, push_groups, run_phyaug
    from .phyaug.sampling import allocate
    from .rounds import Round, RoundsConfig, RoundsResult, run_rounds
    from .self_pairs import SelfPairsConfig, SelfPairsResult, run_self_pairs

# The manifest needs pyarrow only, the generator diffusers: a worker loads what it uses.
_HOME = {
    "GTPairConfig": "gt_pair.pipeline",
    "GTPairResult": "gt_pair.pipeline",
    "MatchedLosers": "matched",
    "PhyAugConfig": "phyaug.pipeline",
    "PhyAugResult": "phyaug.pipeline",
    "Round": "rounds",
    "RoundsConfig": "rounds",
    "RoundsResult": "rounds",
    "Rule": "engine.manifest",
    "SelfPairsConfig": "self_pairs",
    "SelfPairsResult": "self_pairs",
    "Shard": "engine.manifest",
    "Stage": "engine.manifest",
    "VideoModel": "generate",
    "allocate": "phyaug.sampling",
    "annotated_pairs": "annotated",
    "apply_rules": "engine.manifest",
    "load_groups": "phyaug.pipeline",
    "matched_losers": "matched",
    "measure_clip": "clips.measures",
    "push_groups": "phyaug.pipeline",
    "read_votes": "annotated",
    "run_gt_pair": "gt_pair.pipeline",
    "run_phyaug": "phyaug.pipeline",
    "run_rounds": "rounds",
    "run_self_pairs": "self_pairs",
    "run_stage": "engine.manifest",
    "summarize": "engine.manifest",
}

__all__ = [
    "GTPairConfig",
    "GTPairResult",
    "MatchedLosers",
    "PhyAugConfig",
    "PhyAugResult",
    "Round",
    "RoundsConfig",
    "RoundsResult",
    "Rule",
    "SelfPairsConfig",
    "SelfPairsResult",
    "Shard",
    "Stage",
    "VideoModel",
    "allocate",
    "annotated_pairs",
    "apply_rules",
    "load_groups",
    "matched_losers",
    "measure_clip",
    "push_groups",
    "read_votes",
    "run_gt_pair",
    "run_phyaug",
    "run_rounds",
    "run_self_pairs",
    "run_stage",
    "summarize",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
