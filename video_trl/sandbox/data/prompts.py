"""Sentences for training and evaluation, the base model's laws of motion in turn."""

import itertools

import numpy as np

from ..world.prompts import BASE_MOTIONS, Split, all_prompts


def balanced_prompts(split: Split, number: int, seed: int = 0) -> list[str]:
    """
    `number` different sentences of a split, drawn by `seed`, the motions of the base model in turn.

    Raises:
        ValueError: the split has fewer sentences than asked for.
    """
    rng = np.random.default_rng(seed)
    pools = [list(rng.permutation(all_prompts(split, (motion,)))) for motion in BASE_MOTIONS]
    available = sum(len(pool) for pool in pools)
    if not 1 <= number <= available:
        raise ValueError(f"Expected between 1 and {available} prompts of the {split!r} split, got {number}.")
    turns = itertools.chain.from_iterable(itertools.zip_longest(*pools))
    return [str(prompt) for prompt in turns if prompt is not None][:number]
