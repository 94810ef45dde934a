"""Physics-guided weights against Eq. 10 in plain Python, their ranges, and the check made when a config is built."""

import logging
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from video_trl.losses import check_physics_weights, physics_weights


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def written_out_weights(sa: float, pc: float, shape_function: Callable[[float], float]) -> tuple[float, float]:
    """Eq. 10 with the paper's hyperparameters."""
    violation = 1 - (sa + pc) / 2
    alpha = 0.5 + (1 - 0.5) * shape_function(5 * (violation - 0.5))
    return alpha, (1 + 0.6 * sigmoid(2 * (violation - 0.4))) / 0.5


@pytest.mark.parametrize(("alpha_mode", "shape_function"), [("sigmoid", sigmoid), ("tanh", math.tanh)])
def test_physics_weights_are_equation_10(alpha_mode, shape_function):
    generator = torch.Generator().manual_seed(0)
    sa, pc = torch.rand(2, 4, 3, generator=generator, dtype=torch.float64)
    alpha, gamma = physics_weights(sa, pc, alpha_mode=alpha_mode)
    _, official_gamma = physics_weights(sa, pc, alpha_mode=alpha_mode, gamma_mode="official")
    for row in range(4):
        for j in range(3):
            expected = written_out_weights(sa[row, j].item(), pc[row, j].item(), shape_function)
            assert (alpha[row, j].item(), gamma[row, j].item()) == pytest.approx(expected, rel=1e-12)
            assert official_gamma[row, j].item() == pytest.approx(expected[1] * 0.5 / expected[0], rel=1e-12)


def test_physics_weights_use_every_hyperparameter():
    sa, pc = torch.tensor([0.3]), torch.tensor([0.9])
    violation = 1 - (0.3 + 0.9) / 2
    alpha, gamma = physics_weights(
        sa, pc, alpha_min=0.2, lam=0.9, kappa_gamma=3.0, b_gamma=0.1, kappa_alpha=7.0, b_alpha=0.6
    )
    assert alpha.item() == pytest.approx(0.2 + 0.8 * sigmoid(7 * (violation - 0.6)), rel=1e-6)
    assert gamma.item() == pytest.approx((1 + 0.9 * sigmoid(3 * (violation - 0.1))) / 0.2, rel=1e-6)


def weights_at_the_ends(**hyperparameters: Any) -> tuple[list[float], list[float]]:
    """Weights of a perfect (v = 0) and of a worthless (v = 1) video; both rise with v in between."""
    scores = torch.tensor([1.0, 0.0], dtype=torch.float64)
    alpha, gamma = physics_weights(scores, scores, **hyperparameters)
    return alpha.tolist(), gamma.tolist()


def test_ranges_of_equation_10_with_sigmoid():
    alpha, gamma = weights_at_the_ends()
    assert alpha == pytest.approx([0.538, 0.962], abs=5e-4)
    assert gamma == pytest.approx([2.372, 2.922], abs=5e-4)


def test_ranges_of_equation_10_with_tanh():
    alpha, gamma = weights_at_the_ends(alpha_mode="tanh")
    assert alpha == pytest.approx([0.0067, 0.993], abs=5e-4)
    assert gamma == pytest.approx([2.372, 2.922], abs=5e-4)


def test_official_gamma_times_alpha_is_one_plus_lambda_sigma():
    alpha, gamma = weights_at_the_ends(gamma_mode="official")
    products = [a * g for a, g in zip(alpha, gamma, strict=True)]
    assert products == pytest.approx([1 + 0.6 * sigmoid(-0.8), 1 + 0.6 * sigmoid(1.2)], rel=1e-12)


def test_worse_videos_weigh_more():
    scores = torch.linspace(1, 0, 101)
    alpha, gamma = physics_weights(scores, scores)
    assert (alpha.diff() > 0).all() and (gamma.diff() > 0).all()


def test_physics_weights_of_half_precision_scores_are_float32():
    alpha, gamma = physics_weights(torch.zeros(2, dtype=torch.bfloat16), torch.ones(2, dtype=torch.bfloat16))
    assert alpha.dtype == gamma.dtype == torch.float32


@pytest.mark.parametrize("score", [-0.01, 1.01, 85.0, float("nan")])
def test_physics_weights_reject_scores_outside_the_unit_interval(score):
    inside, outside = torch.tensor([0.5, 0.5]), torch.tensor([0.5, score])
    with pytest.raises(ValueError, match=r"`pc` must lie in \[0, 1\]"):
        physics_weights(inside, outside)
    with pytest.raises(ValueError, match=r"`sa` must lie in \[0, 1\]"):
        physics_weights(outside, inside)


def test_physics_weights_reject_unknown_modes_and_other_shapes():
    scores = torch.zeros(2)
    with pytest.raises(ValueError, match="'sigmoid', 'tanh', got 'relu'"):
        physics_weights(scores, scores, alpha_mode="relu")
    with pytest.raises(ValueError, match="'paper', 'official', got 'code'"):
        physics_weights(scores, scores, gamma_mode="code")
    with pytest.raises(ValueError, match="same shape"):
        physics_weights(scores, torch.zeros(2, 1))


# --- check_physics_weights ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma_mode", ["paper", "official"])
@pytest.mark.parametrize("alpha_min", [0.01, 0.5, 1.0])
def test_check_accepts_sigmoid_without_a_warning(caplog, gamma_mode, alpha_min):
    check_physics_weights(alpha_min=alpha_min, gamma_mode=gamma_mode)
    assert not caplog.records


def test_check_warns_that_tanh_loses_the_bound_below_0_451(caplog):
    with caplog.at_level(logging.WARNING):
        check_physics_weights(alpha_mode="tanh")
    (record,) = caplog.records
    assert "gamma >= 1/alpha fails" in record.getMessage()
    assert "[0.000, 0.45" in record.getMessage()
    for violation, holds in ((0.450, False), (0.452, True)):
        score = torch.tensor([1 - violation], dtype=torch.float64)
        alpha, gamma = physics_weights(score, score, alpha_mode="tanh")
        assert bool(gamma >= 1 / alpha) is holds


def test_check_with_tanh_and_official_gamma_keeps_the_bound(caplog):
    check_physics_weights(alpha_mode="tanh", gamma_mode="official")
    assert not caplog.records


def test_check_rejects_tanh_below_an_alpha_min_of_0_4967():
    """Below it alpha turns negative for a good video: the loss would push the chosen video down."""
    check_physics_weights(alpha_mode="tanh", alpha_min=0.4967)
    with pytest.raises(ValueError, match=r"alpha must stay in \(0, 1\]"):
        check_physics_weights(alpha_mode="tanh", alpha_min=0.4966)


@pytest.mark.parametrize("alpha_min", [0.0, -0.5, 1.1, float("nan")])
def test_check_rejects_an_alpha_min_outside_its_range(alpha_min):
    with pytest.raises(ValueError, match=r"`alpha_min` must be in \(0, 1\]"):
        check_physics_weights(alpha_min=alpha_min)


@pytest.mark.parametrize("lam", [-3.0, float("inf"), float("nan")])
def test_check_rejects_a_gamma_that_is_not_positive_and_finite(lam):
    with pytest.raises(ValueError, match="gamma must be positive and finite"):
        check_physics_weights(lam=lam)


def test_check_rejects_an_unknown_mode():
    with pytest.raises(ValueError, match="`alpha_mode` must be one of"):
        check_physics_weights(alpha_mode="softmax")


def test_check_warns_where_a_negative_lambda_loses_the_bound(caplog):
    with caplog.at_level(logging.WARNING):
        check_physics_weights(lam=-0.5, gamma_mode="official")
    assert len(caplog.records) == 1
