"""What is proven of which family: the cells of the table in docs/trainers/models.md, and what the tests run on."""

from collections.abc import Iterable
from typing import Any

import pytest

from tests.support.tiny import FAMILIES, TINY_FAMILIES


TRAINERS = ("SFT", "DPO", "GroupDPO", "RegDPO", "REPA")
EVERY = tuple(TINY_FAMILIES)
CONTEXT_PARALLEL = tuple(name for name in EVERY if name.startswith(("wan", "cogvideox")))
"""Families whose transformer has a plan for it in diffusers, or here."""


def later_ones_slow(families: Iterable[str]) -> list[Any]:
    """Parameters of a test that takes seconds: families behind the first four take the same paths in `-m slow`."""
    return [pytest.param(family, marks=[] if family in FAMILIES else [pytest.mark.slow]) for family in families]


CELLS: dict[str, tuple[str, ...]] = {
    "step": EVERY,  # a denoising step is the pipeline's: tests/models/test_every_family.py
    **dict.fromkeys(TRAINERS, EVERY),  # trains, LoRA and all weights, and reloads: tests/trainer/test_families.py
    "one by one": EVERY,  # step_mode "sequential" is "concat": tests/trainer/step/test_step_modes.py
    "checkpointed": EVERY,  # tests/trainer/test_every_family.py, as the next two
    "resumed": EVERY,
    "dry run": EVERY,
    "videos": EVERY,  # from raw videos to sampled ones: tests/trainer/test_families.py
    "GT-Pair": EVERY,  # tests/curation/test_generate.py
    "processes": EVERY,  # two with gloo: tests/distributed/test_engines.py
    "context parallel": CONTEXT_PARALLEL,  # the same
}
