"""`reg_dpo_loss` and `dgr` against formulas written out number by number, in values and gradients."""

import math

import pytest
import torch

from video_trl.losses import dgr, dpo_loss, implicit_reward, reg_dpo_loss


BETA = 500.0
WEIGHTS = [0.0, 25.0, 125.0, ("dgr", 0.0), ("dgr", 0.2), ("dgr", 1.0), ("dgr", 2.0)]


def errors(n=7, seed=0, gap=0.01):
    """Chosen, its reference, rejected, its reference: `(n,)` float64 each, the first and third with gradients."""
    generator = torch.Generator().manual_seed(seed)
    references = torch.rand(2, n, generator=generator, dtype=torch.float64) + 0.1
    gaps = gap * torch.randn(2, n, generator=generator, dtype=torch.float64)
    chosen, rejected = (references + gaps).unbind()
    return chosen.requires_grad_(), references[0], rejected.requires_grad_(), references[1]


def loss_by_hand(chosen, chosen_reference, rejected, rejected_reference, beta, weight):
    """One pair in Python floats: (loss, r, DGR), Eqs. 2, 4 and 6 with the factor 1/2 on beta."""
    s = (chosen - chosen_reference) - (rejected - rejected_reference)
    preference = 1 / (1 + math.exp(beta / 2 * s))  # sigma(-beta/2 s)
    ratio = beta / 2 * (1 - preference)
    r = weight[1] * ratio if isinstance(weight, tuple) else weight
    return -math.log(preference) + r * chosen, r, ratio


@pytest.mark.parametrize("weight", WEIGHTS, ids=str)
def test_values_equal_the_formula(weight):
    values = errors()
    losses, metrics = reg_dpo_loss(*values, beta=BETA, sft_weight=weight)
    for index, row in enumerate(zip(*(value.tolist() for value in values), strict=True)):
        loss, r, ratio = loss_by_hand(*row, BETA, weight)
        chosen, chosen_reference, rejected, rejected_reference = row
        expected = {
            "loss/dpo": loss - r * chosen,
            "loss/sft": chosen,
            "win_gap": chosen - chosen_reference,
            "lose_gap": rejected - rejected_reference,
            "s_theta": (chosen - chosen_reference) - (rejected - rejected_reference),
            "dgr": ratio,
            "sft_weight": r,
            "chosen_weight": ratio + r,
            "rewards/chosen": -250 * (chosen - chosen_reference),
            "rewards/rejected": -250 * (rejected - rejected_reference),
            "rewards/margins": 250 * (rejected - rejected_reference - chosen + chosen_reference),
            "rewards/accuracies": float(chosen - chosen_reference < rejected - rejected_reference),
        }
        assert losses[index].item() == pytest.approx(loss, rel=1e-12)
        assert metrics.keys() == expected.keys()
        for name, value in expected.items():
            assert metrics[name][index].item() == pytest.approx(value, rel=1e-9), name
            assert metrics[name].shape == (7,) and not metrics[name].requires_grad


@pytest.mark.parametrize("weight", WEIGHTS, ids=str)
def test_gradients_are_those_of_eq_5(weight):
    """(DGR + r) on the chosen error, -DGR on the rejected one, and nothing through r."""
    values = errors()
    losses, metrics = reg_dpo_loss(*values, beta=BETA, sft_weight=weight)
    chosen, rejected = torch.autograd.grad(losses.sum(), [values[0], values[2]])
    torch.testing.assert_close(chosen, metrics["dgr"] + metrics["sft_weight"], rtol=1e-10, atol=0)
    torch.testing.assert_close(rejected, -metrics["dgr"], rtol=1e-10, atol=0)


def test_gradients_equal_finite_differences_of_the_formula_with_r_held():
    values = errors(n=1)
    numbers = [value.item() for value in values]
    losses, metrics = reg_dpo_loss(*values, beta=BETA, sft_weight=("dgr", 1.0))
    gradients = torch.autograd.grad(losses.sum(), [values[0], values[2]])
    held = metrics["sft_weight"].item()
    for position, gradient in zip((0, 2), gradients, strict=True):
        ends = []
        for step in (1e-7, -1e-7):
            moved = numbers.copy()
            moved[position] += step
            ends.append(loss_by_hand(*moved, BETA, held)[0])
        assert gradient.item() == pytest.approx((ends[0] - ends[1]) / 2e-7, rel=1e-5)


@pytest.mark.parametrize("weight", [0.0, 0, ("dgr", 0.0)], ids=str)
def test_weight_zero_is_dpo_to_the_last_bit(weight):
    values = [value.detach().float() for value in errors(64, gap=0.05)]
    losses, _ = reg_dpo_loss(*values, beta=BETA, sft_weight=weight)
    rewards = (implicit_reward(*values[:2], BETA), implicit_reward(*values[2:], BETA))
    assert torch.equal(losses, dpo_loss(*rewards))


@pytest.mark.parametrize("weight", WEIGHTS, ids=str)
def test_at_the_reference_the_loss_is_log_2_and_the_weighted_error(weight):
    chosen, rejected = torch.rand(5, dtype=torch.float64), torch.rand(5, dtype=torch.float64)
    losses, metrics = reg_dpo_loss(chosen, chosen, rejected, rejected, beta=BETA, sft_weight=weight)
    assert torch.equal(metrics["dgr"], torch.full((5,), 125.0, dtype=torch.float64))
    r = weight[1] * 125 if isinstance(weight, tuple) else weight
    torch.testing.assert_close(losses, math.log(2) + r * chosen, rtol=1e-12, atol=0)
    assert not metrics["rewards/accuracies"].any()


def test_dgr_of_the_published_curves():
    """beta 500 starts at 125 (Fig. 2), lies in (0, beta / 2) and falls with s."""
    s = torch.linspace(-0.05, 0.05, 101, dtype=torch.float64)
    ratio = dgr(s, 500.0)
    assert ratio[50].item() == pytest.approx(125.0, rel=1e-12)
    assert (ratio.diff() > 0).all() and ratio.min() > 0 and ratio.max() < 250
    assert dgr(torch.zeros(()), 1000.0).item() == 250.0
    assert not dgr(torch.zeros(2, requires_grad=True), 500.0).requires_grad


def test_extremes_stay_finite():
    """s so large that a naive log or exp overflows in float32."""
    one, huge = torch.ones(2), torch.tensor([100.0, 0.0])
    losses, metrics = reg_dpo_loss(huge, one, one, one, beta=5000.0, sft_weight=("dgr", 1.0))
    assert torch.isfinite(losses).all() and all(torch.isfinite(values).all() for values in metrics.values())
    assert metrics["dgr"][0].item() == 2500.0 and metrics["dgr"][1].item() == 0.0


@pytest.mark.parametrize(
    ("weight", "match"),
    [
        (-1.0, "must not be negative"),
        (("dgr", -0.5), "must not be negative"),
        (math.inf, "finite"),
        (math.nan, "finite"),
        (("sft", 1.0), "one of 'dgr', 'fixed'"),
    ],
)
def test_bad_weights_are_refused(weight, match):
    with pytest.raises(ValueError, match=match):
        reg_dpo_loss(*errors(), beta=BETA, sft_weight=weight)


def test_shapes_that_would_broadcast_are_refused():
    three, column = torch.ones(3), torch.ones(3, 1)
    with pytest.raises(ValueError, match="same shape"):
        reg_dpo_loss(three, three, column, column, beta=BETA, sft_weight=1.0)
    with pytest.raises(ValueError, match="same shape"):
        reg_dpo_loss(three, column, three, three, beta=BETA, sft_weight=1.0)
    with pytest.raises(ValueError, match="half precision"):
        reg_dpo_loss(*(torch.ones(3, dtype=torch.bfloat16),) * 4, beta=BETA, sft_weight=1.0)
