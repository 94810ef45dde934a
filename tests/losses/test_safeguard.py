"""How far rejected videos are held back, against vectors written out; gaps, and losses of the margin."""

import math

import pytest
import torch

from video_trl.losses import dgr, dpo_loss, error_gap, hold_lose_gap, implicit_reward, reg_dpo_loss
from video_trl.losses.safeguard import residual_products, safeguard_scales, safeguard_shares


def scales_by_hand(coefficients: torch.Tensor, gradients: torch.Tensor, mu: float) -> list[float]:
    """One group: coefficients (1 + k,) and gradients (1 + k, P)."""
    weighted = coefficients[:, None] * gradients
    scales = []
    for j in range(1, len(coefficients)):
        product = float(weighted[0] @ weighted[j])
        share = abs(float(coefficients[j])) / sum(abs(float(each)) for each in coefficients[1:])
        allowed = (1 - mu) * share * float(weighted[0] @ weighted[0])
        scales.append(allowed / -product if coefficients[0] > 0 and -product > allowed else 1.0)
    return scales


def scales_of(coefficients: torch.Tensor, gradients: torch.Tensor, mu: float) -> torch.Tensor:
    weighted = coefficients[..., None] * gradients  # (B, 1 + k, P)
    inner = (weighted[:, :1] * weighted).sum(dim=2)
    return safeguard_scales(inner[:, :1], inner[:, 1:], safeguard_shares(coefficients), mu)


@pytest.mark.parametrize("mu", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("k", [1, 3])
def test_a_scaled_step_leaves_the_chosen_video_its_part(k, mu):
    generator = torch.Generator().manual_seed(k)
    chosen = torch.randn(50, 1, 6, generator=generator, dtype=torch.float64)
    others = torch.randn(50, k, 6, generator=generator, dtype=torch.float64)
    gradients = torch.cat([chosen, chosen + 0.7 * others], dim=1)  # near the chosen video: most of them act against it
    coefficients = torch.rand(50, 1 + k, generator=generator, dtype=torch.float64)
    coefficients[:, 1:] *= -1
    scales = scales_of(coefficients, gradients, mu)
    for row in range(50):
        expected = scales_by_hand(coefficients[row], gradients[row], mu)
        assert scales[row].tolist() == pytest.approx(expected, rel=1e-12)
    assert ((scales < 1).any(dim=1)).sum() > 25
    weighted = coefficients[..., None] * gradients
    step = weighted[:, 0] + (scales[..., None] * weighted[:, 1:]).sum(dim=1)
    own = weighted[:, 0].square().sum(dim=1)
    assert ((weighted[:, 0] * step).sum(dim=1) >= mu * own - 1e-12 * own).all()
    plain = (weighted[:, 0] * weighted.sum(dim=1)).sum(dim=1)
    assert (plain < mu * own).any()  # the test can fail


def test_of_a_pair_it_is_the_published_formula():
    generator = torch.Generator().manual_seed(0)
    chosen, rejected = torch.randn(2, 40, 8, generator=generator, dtype=torch.float64)
    gradients = torch.stack([chosen, chosen + 0.5 * rejected], dim=1)
    coefficients = torch.tensor([[3.0, -3.0]], dtype=torch.float64).expand(40, 2)
    product = (gradients[:, 0] * gradients[:, 1]).sum(dim=1)
    ratio = (1 - 0.6) * gradients[:, 0].square().sum(dim=1) / product
    expected = torch.where(product > 0, ratio.clamp(0, 1), 1.0)
    torch.testing.assert_close(scales_of(coefficients, gradients, 0.6)[:, 0], expected)


def test_nothing_is_held_back_where_the_loss_draws_the_chosen_video_back_or_sees_no_rejected_one():
    same = torch.ones(1, 2, 4)
    assert scales_of(torch.tensor([[-1.0, 1.0]]), same, 0.5).item() == 1.0
    assert scales_of(torch.tensor([[1.0, 0.0]]), same, 0.5).item() == 1.0
    assert scales_of(torch.tensor([[1.0, -1.0]]), same, 0.25).item() == 0.75


def test_products_of_residuals_are_means_over_elements():
    residuals = torch.randn(6, 2, 1, 3, 3, generator=torch.Generator().manual_seed(1))
    products = residual_products(residuals, 3)
    for row in range(2):
        for place in range(3):
            expected = (residuals[3 * row] * residuals[3 * row + place]).mean()
            assert products[row, place].item() == pytest.approx(expected.item(), rel=1e-5)


def test_gaps_have_their_formulas():
    policy, reference = torch.tensor([0.2, 0.4, 0.3]), torch.tensor([0.2, 0.3, 0.6])
    assert torch.equal(error_gap(policy, reference), policy - reference)
    ratios = error_gap(policy, reference, "log_ratio")
    assert ratios[0].item() == 0.0
    expected = [math.log((p + 1e-6) / (r + 1e-6)) for p, r in zip(policy.tolist(), reference.tolist(), strict=True)]
    assert ratios.tolist() == pytest.approx(expected, abs=1e-6)
    assert error_gap(torch.zeros(1), torch.ones(1), "log_ratio").isfinite().all()
    with pytest.raises(ValueError, match="`gap` must be one of 'raw', 'log_ratio', got 'ratio'"):
        error_gap(policy, reference, "ratio")


def test_a_held_lose_gap_has_no_gradient_beyond_its_clip():
    gap = torch.tensor([-2.0, 0.5, 3.0], requires_grad=True)
    held = hold_lose_gap(gap, 0.25, 1.0)
    assert held.tolist() == [-0.5, 0.125, 0.25]
    held.sum().backward()
    assert gap.grad.tolist() == [0.25, 0.25, 0.0]
    assert torch.equal(hold_lose_gap(gap), gap)


U = torch.tensor([-3.0, -0.2, 0.0, 0.4, 0.5, 1.5, 6.0], dtype=torch.float64)


@pytest.mark.parametrize(
    ("loss_type", "smoothing", "formula", "first"),
    [
        ("sigmoid", 0.0, lambda u: math.log1p(math.exp(-u)), math.log(2)),
        ("sigmoid", 0.1, lambda u: 0.9 * math.log1p(math.exp(-u)) + 0.1 * math.log1p(math.exp(u)), math.log(2)),
        ("hinge", 0.0, lambda u: max(0.0, 1 - u), 1.0),
        ("ipo", 0.0, lambda u: (u - 0.5) ** 2, 0.25),
    ],
)
def test_losses_of_the_margin_and_their_ratios(loss_type, smoothing, formula, first):
    """`dgr` is what the loss multiplies the gradient of a gap by: reward = -(beta / 2) * gap."""
    chosen = U.clone().requires_grad_()
    kind = {"loss_type": loss_type, "label_smoothing": smoothing}
    losses = dpo_loss(chosen, torch.zeros_like(U), **kind)
    assert losses.tolist() == pytest.approx([formula(u) for u in U.tolist()], rel=1e-12)
    assert losses[2].item() == pytest.approx(first, rel=1e-15)
    losses.sum().backward()
    beta = 50.0
    torch.testing.assert_close(dgr(-U / (beta / 2), beta, **kind), -(beta / 2) * chosen.grad)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss_type": "robust"}, "`loss_type` must be one of 'sigmoid', 'hinge', 'ipo', 'mapo', got 'robust'"),
        ({"loss_type": "mapo"}, "call `mapo_loss`"),
        ({"label_smoothing": 0.5}, r"`label_smoothing` must be in \[0, 0.5\), got 0.5"),
        ({"label_smoothing": 0.1, "loss_type": "ipo"}, "belongs to `loss_type='sigmoid'`"),
    ],
)
def test_losses_that_do_not_exist_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dpo_loss(U, U, **changes)


def test_neutral_gap_options_leave_reg_dpo_as_it_is_to_the_last_bit():
    generator = torch.Generator().manual_seed(3)
    errors = torch.rand(4, 5, generator=generator)
    plain, metrics = reg_dpo_loss(*errors, beta=500.0, sft_weight=("dgr", 1.0))
    rewards = [implicit_reward(errors[i], errors[i + 1], 500.0) for i in (0, 2)]
    s = (errors[0] - errors[1]) - (errors[2] - errors[3])
    assert torch.equal(metrics["rewards/rejected"], rewards[1]) and torch.equal(metrics["dgr"], dgr(s, 500.0))
    assert torch.equal(plain, dpo_loss(*rewards) + dgr(s, 500.0) * errors[0])


def test_with_log_ratios_the_weight_of_reg_dpo_is_the_ratio_of_the_error_itself():
    """r = DGR means: as much again as the loss itself pulls at the chosen error, whatever the rewards are made of."""
    errors = [torch.tensor([value], dtype=torch.float64) for value in (0.2, 0.25, 0.5, 0.4)]
    errors[0].requires_grad_()
    options = {"beta": 10.0, "gap": "log_ratio", "lose_gap_weight": 0.25, "lose_gap_clip": 1.0}
    plain, _ = reg_dpo_loss(*errors, sft_weight=0.0, **options)
    (pull,) = torch.autograd.grad(plain.sum(), errors[0])
    both, metrics = reg_dpo_loss(*errors, sft_weight=("dgr", 1.0), **options)
    (twice,) = torch.autograd.grad(both.sum(), errors[0])
    torch.testing.assert_close(twice, 2 * pull)
    torch.testing.assert_close(metrics["sft_weight"], pull)
    torch.testing.assert_close(metrics["chosen_weight"], twice)
