"""
Draw the timesteps of a step together, so that its rows cover the scale more evenly than by chance.

The law of each row's timestep is that of an independent draw, exactly, and so is the mean of its gradient; only the
rows of a step no longer know nothing of each other, and the gradient of a step varies less. What a row gets is a
function of the seed, the step and its place among the rows of the step, whatever process or micro-batch it is in.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


TimestepDraw = Literal["independent", "stratified", "antithetic"]

_LEAST_STRATA = 8  # steps of fewer rows share strata with the steps after them
_BELOW_ONE = 1 - 2**-53  # the largest number that a uniform draw gives
_OF_STEP = -1  # index under which a step draws, which no sample has; pairs draw under the indices below it


@dataclass(frozen=True)
class RowsOfStep:
    """
    Which of a step's rows a batch has, counted over all processes and micro-batches.

    Attributes:
        first (`int`): Place of the first one.
        total (`int`): Rows of the step.
    """

    first: int
    total: int


def draw_together(
    how: Literal["stratified", "antithetic"],
    u: Tensor,
    rows: RowsOfStep,
    step: int,
    generator: Callable[[int, int], torch.Generator],
) -> Tensor:
    """
    Uniform numbers of the rows of a batch that depend on those of the other rows of the step.

    Args:
        how (`str`): `"stratified"`: each row in another n-th of (0, 1), in an order
            drawn anew; a step of fewer than 8 rows has some of at least 8 parts, the steps after it have the others.
            `"antithetic"`: one number for two rows, for the second its complement; the odd row of a step is paired
            with that of the next step.
        u (`torch.Tensor` of shape `(B,)`): Uniform on (0, 1), float64, independent of each other.
        rows ([`RowsOfStep`]): Which rows of the step these are.
        step (`int`): Optimizer steps done so far.
        generator (`Callable`): Step and index to a generator: [`~video_trl.trainer.step.denoising.sample_generator`].

    Returns:
        `torch.Tensor` of shape `(B,)`: Uniform on (0, 1), float64.
    """
    num_steps = math.ceil(_LEAST_STRATA / rows.total) if how == "stratified" else 1 + rows.total % 2
    places = (step % num_steps) * rows.total + rows.first + torch.arange(len(u))
    window = step // num_steps
    if how == "stratified":
        number = rows.total * num_steps
        strata = torch.randperm(number, generator=generator(window, _OF_STEP))[places]
        return ((strata + u) / number).clamp(max=_BELOW_ONE)
    streams = [generator(window, _OF_STEP - int(place) // 2) for place in places]
    shared = torch.stack([torch.rand((), generator=stream, dtype=u.dtype) for stream in streams])
    return torch.where(places % 2 == 0, shared, 1 - shared).clamp(max=_BELOW_ONE)
