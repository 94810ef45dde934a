"""
A testbed for methods: any trainer on five fixed regimes of the sandbox, against fine-tuning on the same clips.

The regimes differ in the clips. Each is run with three training seeds; the method is compared with fine-tuning of as
many updates, and with fine-tuning of as much processor time. What is whole in a folder is not made again.
"""

from .game import GAME, REGIMES, SEEDS, TRIAL, Entry, Game, Testbed, sft_entry
from .results import RESULTS, check_others, differences, page, play, rules_of


__all__ = [
    "GAME",
    "REGIMES",
    "RESULTS",
    "SEEDS",
    "TRIAL",
    "Entry",
    "Game",
    "Testbed",
    "check_others",
    "differences",
    "page",
    "play",
    "rules_of",
    "sft_entry",
]
