"""
How far apart two computations of one number may lie when they only add it up in another order: bounds for tests.

Another batch shape, number of processes, layout in memory or instruction set of the processor is another order of the
same sums. Every operation rounds, `fl(a op b) = (a op b)(1 + d)` with `|d| <= u`, where u is half the `eps` of the
type: 2^-24 or, in float64, 2^-53. A sum of n terms then misses by at most (n - 1) u times the sum of their sizes. Its
roundings have no common sign, and what remains of n of them is about sqrt(n) u: above `8 sqrt(n) u` in less than one
of 10^13 sums (Higham and Mary, "A New Approach to Probabilistic Rounding Error Analysis", 2019, Theorem 2.4 with
lambda = 8). Two computations lie at most twice that apart.

Bounds follow from this and from what is computed, never from what one machine printed. They are relative to the
largest entry of what is compared: a small entry is a difference of large ones, and keeps their rounding.

Where equality is the claim, compare in float64: its rounding is 10^9 times smaller, and no fault hides in it.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor


LOGGED = 16 * 2.0**-24
"""
Relative, of what a trainer logs: it adds float32 losses of a step up and divides, a handful of roundings at each end.
"""


def sums(terms: int) -> float:
    """Of two orders of float32 sums that have `terms` terms in all, one sum after the other or at once."""
    return 2 * 8 * math.sqrt(terms) * 2.0**-24


SINGLE = sums(160 * 64)
"""
Of outputs and gradients of the tiny networks of these tests, in float32: 1e-4.

Two or three blocks forward and backward are at most 160 sums on one path (projections, attention, norms), of at most
64 terms each (widths, tokens, videos); an autoencoder's 25 convolutions of 27 x 16 terms are as many. Roundings along
a path add up like those of one long sum.
"""


DOUBLE = 2.0**-24
"""
Of gradients, and of updates that are sums of gradients, where weights are float64.

The same roundings are 2e-13 then. But diffusers forms norms and timestep embeddings in float32 also then: of numbers
that agree to 1e-13, one in a million is rounded to the other neighbour, and that one differs by 2^-24. No more is
allowed. Where the weights of such a norm are trained, their gradients are float32 `sums` over tokens.
"""


def by_hand(beta: float) -> float:
    """
    Relative, of a preference loss of about log 2 or more, of a network in float64, next to the formula written out.

    Noise levels, noise and latents are float32 and mixed by other operations: four roundings of 2^-24, in errors of
    about 2, of which a reward is `beta / 2` times the difference.
    """
    return beta / 2 * 2 * 4 * 2.0**-24


def adam(gradient: float, *, learning_rate: float, steps: int, epsilon: float) -> float:
    """
    Absolute, of weights after `steps` steps of Adam whose gradients differ by `gradient`.

    A step is `lr m / (sqrt(v) + epsilon)`. Numerator and denominator move by at most `gradient`, the quotient by twice
    that over `epsilon`: where a gradient is little but rounding, as with the usual 1e-8, by everything. Runs that are
    compared take an epsilon that lies far above it.
    """
    return 2 * learning_rate * steps * gradient / epsilon


def assert_close(found: Tensor, expected: Tensor, bound: float) -> None:
    """Equal up to `bound` relative to the largest entry of `expected`; shapes and types are the same."""
    torch.testing.assert_close(found, expected, rtol=0, atol=bound * float(expected.detach().abs().max()))


def assert_close_weights(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], bound: float) -> None:
    """Equal up to `bound` relative to the largest entry of all tensors."""
    assert found.keys() == expected.keys() and found
    scale = max(weight.abs().max() for weight in expected.values())
    difference = max((weight - expected[name]).abs().max() for name, weight in found.items())
    assert difference <= bound * scale, f"{difference / scale:.3g} > {bound:.3g}"
