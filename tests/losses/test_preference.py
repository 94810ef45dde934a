"""Every loss against its formula written out in plain Python floats (float64), value and gradient, and its limits."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from video_trl.losses import (
    dpo_loss,
    group_dpo_bound,
    group_dpo_loss,
    group_dpo_sampled_bound,
    implicit_reward,
    mapo_loss,
    physics_weights,
    velocity_error,
)


B, M = 4, 3
LATENTS = (B, 2, 3, 2, 2)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def softplus(x: float) -> float:
    return math.log(1 + math.exp(x))


def draw(*shape: int, seed: int = 0, scale: float = 1.0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)


def draw_weights(*shape: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Valid weights: alpha in (0, 1], gamma between 1/alpha and 2/alpha."""
    generator = torch.Generator().manual_seed(seed)
    alpha = 1 - 0.99 * torch.rand(*shape, generator=generator, dtype=torch.float64)
    return alpha, (1 + torch.rand(*shape, generator=generator, dtype=torch.float64)) / alpha


def gradients(loss: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    return torch.autograd.grad(loss(*leaves).sum(), leaves)


# --- velocity_error -------------------------------------------------------------------------------------------------


def test_velocity_error_is_the_written_out_mean_with_its_gradient():
    prediction, target = draw(*LATENTS), draw(*LATENTS, seed=1)
    size = prediction[0].numel()
    for row, error in enumerate(velocity_error(prediction, target).tolist()):
        pairs = zip(prediction[row].flatten().tolist(), target[row].flatten().tolist(), strict=True)
        assert error == pytest.approx(sum((p - t) ** 2 for p, t in pairs) / size, rel=1e-12)
    (gradient,) = gradients(lambda p: velocity_error(p, target), prediction)
    torch.testing.assert_close(gradient, 2 * (prediction - target) / size)
    assert torch.autograd.gradcheck(lambda p: velocity_error(p, target), prediction.requires_grad_())


def test_velocity_error_of_bfloat16_predictions_keeps_a_gap_of_1e_6():
    """Policy and reference differ by one bfloat16 step in one element of a thousand; beta = 500 multiplies the gap."""
    target = draw(2, 4, 4, 8, 8, dtype=torch.float32)
    reference = target.to(torch.bfloat16)
    policy = reference.clone()
    policy[:, 0, 0, 0, 0] *= 1 + 2**-7

    gap = velocity_error(policy, target) - velocity_error(reference, target)
    expected = (
        ((policy.double() - target.double()).square() - (reference.double() - target.double()).square())
        .flatten(1)
        .mean(dim=1)
    )
    assert gap.dtype == torch.float32
    assert expected.abs().max() < 1e-6
    torch.testing.assert_close(gap.double(), expected, rtol=1e-3, atol=0)
    assert (gap != 0).all()
    # The same in bfloat16 sees nothing: the errors of policy and reference round to the same number.
    low = [(p - (target + 1).to(torch.bfloat16)).square().flatten(1).mean(dim=1) for p in (policy, reference)]
    assert torch.equal(*low)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_velocity_error_is_float32_and_gradient_returns_in_the_prediction_dtype(dtype):
    prediction = draw(*LATENTS, dtype=dtype).requires_grad_()
    error = velocity_error(prediction, draw(*LATENTS, seed=1, dtype=dtype))
    error.sum().backward()
    assert error.dtype == torch.float32
    assert prediction.grad is not None and prediction.grad.dtype == dtype


@pytest.mark.parametrize("shape", [(B, 1, 3, 2, 2), (1, 2, 3, 2, 2), (2, 3, 2, 2)])
def test_velocity_error_rejects_a_shape_that_would_broadcast(shape):
    with pytest.raises(ValueError, match="same shape"):
        velocity_error(torch.zeros(LATENTS), torch.zeros(shape))


def test_velocity_error_needs_a_dimension_to_average():
    with pytest.raises(ValueError, match="same shape"):
        velocity_error(torch.zeros(B), torch.zeros(B))


# --- implicit_reward ------------------------------------------------------------------------------------------------


def test_implicit_reward_is_minus_half_beta_times_the_gap():
    policy, reference = draw(B), draw(B, seed=1)
    for reward, p, r in zip(implicit_reward(policy, reference, 500.0), policy, reference, strict=True):
        assert reward.item() == pytest.approx(-250 * (p.item() - r.item()), rel=1e-12)
    for gradient, expected in zip(
        gradients(lambda p, r: implicit_reward(p, r, 500.0), policy, reference), (-250.0, 250.0), strict=True
    ):
        assert gradient.tolist() == [expected] * B


def test_implicit_reward_rejects_what_would_broadcast_and_what_is_already_rounded():
    with pytest.raises(ValueError, match=r"\(4,\) and \(4, 1\)"):
        implicit_reward(torch.zeros(4), torch.zeros(4, 1), 500.0)
    with pytest.raises(ValueError, match="float32"):
        implicit_reward(torch.zeros(4), torch.zeros(4, dtype=torch.bfloat16), 500.0)


# --- values and gradients of the losses -----------------------------------------------------------------------------


def test_dpo_loss_is_the_written_out_likelihood():
    chosen, rejected = draw(B, scale=3), draw(B, scale=3, seed=1)
    margins = [w - other for w, other in zip(chosen.tolist(), rejected.tolist(), strict=True)]
    assert dpo_loss(chosen, rejected).tolist() == pytest.approx([-math.log(sigmoid(d)) for d in margins], rel=1e-12)
    chosen_gradient, rejected_gradient = gradients(dpo_loss, chosen, rejected)
    assert chosen_gradient.tolist() == pytest.approx([-sigmoid(-d) for d in margins], rel=1e-12)
    assert rejected_gradient.tolist() == pytest.approx([sigmoid(-d) for d in margins], rel=1e-12)


def test_group_dpo_loss_is_the_written_out_likelihood():
    chosen, rejected = draw(B, scale=3), draw(B, M, scale=3, seed=1)
    losses = group_dpo_loss(chosen, rejected).tolist()
    chosen_gradient, rejected_gradient = gradients(group_dpo_loss, chosen, rejected)
    for row, (w, others) in enumerate(zip(chosen.tolist(), rejected.tolist(), strict=True)):
        total = math.exp(w) + sum(math.exp(other) for other in others)
        assert losses[row] == pytest.approx(-math.log(math.exp(w) / total), rel=1e-12)
        assert chosen_gradient[row].item() == pytest.approx(math.exp(w) / total - 1, rel=1e-12)
        assert rejected_gradient[row].tolist() == pytest.approx([math.exp(v) / total for v in others], rel=1e-12)


def test_group_dpo_bound_is_the_written_out_sum():
    chosen, rejected = draw(B, scale=3), draw(B, M, scale=3, seed=1)
    alpha, gamma = draw_weights(B, M)
    losses = group_dpo_bound(chosen, rejected, alpha, gamma).tolist()
    chosen_gradient, rejected_gradient = gradients(lambda w, r: group_dpo_bound(w, r, alpha, gamma), chosen, rejected)
    for row, w in enumerate(chosen.tolist()):
        group = list(zip(rejected[row].tolist(), alpha[row].tolist(), gamma[row].tolist(), strict=True))
        weights = [g * a * sigmoid(-a * (w - other)) for other, a, g in group]
        assert losses[row] == pytest.approx(sum(g * softplus(-a * (w - other)) for other, a, g in group), rel=1e-12)
        assert chosen_gradient[row].item() == pytest.approx(-sum(weights), rel=1e-12)
        assert rejected_gradient[row].tolist() == pytest.approx(weights, rel=1e-12)


def test_group_dpo_sampled_bound_is_the_written_out_term():
    chosen, rejected = draw(B, scale=3), draw(B, scale=3, seed=1)
    alpha, gamma = draw_weights(B)

    def loss(w: Tensor, other: Tensor) -> Tensor:
        return group_dpo_sampled_bound(w, other, alpha, gamma, num_rejected=M)

    losses, (chosen_gradient, rejected_gradient) = loss(chosen, rejected).tolist(), gradients(loss, chosen, rejected)
    for row in range(B):
        w, other, a, g = (tensor[row].item() for tensor in (chosen, rejected, alpha, gamma))
        weight = M * g * a * sigmoid(-a * (w - other))
        assert losses[row] == pytest.approx(M * g * softplus(-a * (w - other)), rel=1e-12)
        assert chosen_gradient[row].item() == pytest.approx(-weight, rel=1e-12)
        assert rejected_gradient[row].item() == pytest.approx(weight, rel=1e-12)


def test_gradcheck_of_every_loss():
    chosen, rejected, group = (draw(*s).requires_grad_() for s in ((B,), (B,), (B, M)))
    alpha, gamma = draw_weights(B, M)
    assert torch.autograd.gradcheck(dpo_loss, (chosen, rejected))
    assert torch.autograd.gradcheck(group_dpo_loss, (chosen, group))
    assert torch.autograd.gradcheck(lambda w, r: group_dpo_bound(w, r, alpha, gamma), (chosen, group))
    assert torch.autograd.gradcheck(
        lambda w, r: group_dpo_sampled_bound(w, r, alpha[:, 0], gamma[:, 0], num_rejected=M), (chosen, rejected)
    )


def test_losses_stay_finite_and_exact_at_large_rewards():
    """Wrong by 1000 nats: loss 1000, gradient 1. Right by 30 nats: loss exp(-30) instead of 0."""
    chosen, rejected = torch.tensor([-500.0, 15.0], requires_grad=True), torch.tensor([500.0, -15.0])
    ones = torch.ones(2)
    losses = [
        dpo_loss(chosen, rejected),
        group_dpo_loss(chosen, rejected[:, None]),
        group_dpo_bound(chosen, rejected[:, None], ones[:, None], ones[:, None]),
        group_dpo_sampled_bound(chosen, rejected, ones, ones, num_rejected=1),
    ]
    for loss in losses:
        assert loss.tolist() == pytest.approx([1000.0, math.exp(-30)], rel=1e-6)
        (gradient,) = torch.autograd.grad(loss.sum(), chosen)
        assert gradient.tolist() == pytest.approx([-1.0, -math.exp(-30)], rel=1e-6)


# --- limits ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("m", [1, 2, 3, 7])
def test_losses_where_policy_and_reference_agree(m):
    errors = draw(B, 1 + m, dtype=torch.float32).square()
    rewards = implicit_reward(errors, errors.clone(), beta=500.0)
    chosen, rejected = rewards[:, 0], rewards[:, 1:]
    alpha, gamma = (weight.float() for weight in draw_weights(B, m))
    torch.testing.assert_close(dpo_loss(chosen, rejected[:, 0]), torch.full((B,), math.log(2)))
    torch.testing.assert_close(group_dpo_loss(chosen, rejected), torch.full((B,), math.log(1 + m)))
    torch.testing.assert_close(group_dpo_bound(chosen, rejected, alpha, gamma), gamma.sum(dim=1) * math.log(2))
    torch.testing.assert_close(
        group_dpo_sampled_bound(chosen, rejected[:, 0], alpha[:, 0], gamma[:, 0], num_rejected=m),
        m * gamma[:, 0] * math.log(2),
    )


def test_one_rejected_video_without_weights_is_diffusion_dpo():
    """Value and gradient, with Diffusion-DPO written out from its own formula on errors."""
    beta, ones = 500.0, torch.ones(B, 1, dtype=torch.float64)
    policy, reference = draw(2, B).square() / 100, draw(2, B, seed=1).square() / 100

    def rewards(policy_error: Tensor) -> tuple[Tensor, Tensor]:
        chosen, rejected = implicit_reward(policy_error, reference, beta)
        return chosen, rejected

    def diffusion_dpo(policy_error: Tensor) -> Tensor:
        inside = -(beta / 2) * ((policy_error[0] - reference[0]) - (policy_error[1] - reference[1]))
        return torch.log(1 + torch.exp(-inside))

    def exact(policy_error: Tensor) -> Tensor:
        chosen, rejected = rewards(policy_error)
        return group_dpo_loss(chosen, rejected[:, None])

    def summed(policy_error: Tensor) -> Tensor:
        chosen, rejected = rewards(policy_error)
        return group_dpo_bound(chosen, rejected[:, None], ones, ones)

    def sampled(policy_error: Tensor) -> Tensor:
        return group_dpo_sampled_bound(*rewards(policy_error), ones[:, 0], ones[:, 0], num_rejected=1)

    def pairwise(policy_error: Tensor) -> Tensor:
        return dpo_loss(*rewards(policy_error))

    for loss in (exact, summed, sampled, pairwise):
        torch.testing.assert_close(loss(policy), diffusion_dpo(policy))
        torch.testing.assert_close(gradients(loss, policy), gradients(diffusion_dpo, policy))
    assert torch.equal(exact(policy), pairwise(policy))
    assert torch.equal(summed(policy), pairwise(policy))
    assert torch.equal(sampled(policy), pairwise(policy))


def test_bound_is_never_below_the_exact_group_loss():
    for m in (1, 2, 3, 8):
        for scale in (0.01, 1.0, 10.0, 100.0):
            chosen, rejected = draw(2000, scale=scale), draw(2000, m, scale=scale, seed=1)
            alpha, gamma = draw_weights(2000, m, seed=m)
            slack = group_dpo_bound(chosen, rejected, alpha, gamma) - group_dpo_loss(chosen, rejected)
            assert (slack >= 0).all()
            # Tight where it must be: one rejected video and the smallest valid weights at alpha = 1.
            ones = torch.ones_like(rejected)
            slack = group_dpo_bound(chosen, rejected, ones, ones) - group_dpo_loss(chosen, rejected)
            assert (slack >= -1e-12 * scale).all()


def test_bound_with_the_weights_of_random_scores_is_never_below_the_exact_group_loss():
    generator = torch.Generator().manual_seed(0)
    chosen, rejected = draw(5000, scale=5), draw(5000, M, scale=5, seed=1)
    for gamma_mode in ("paper", "official"):
        sa, pc = torch.rand(2, 5000, M, generator=generator, dtype=torch.float64)
        alpha, gamma = physics_weights(sa, pc, gamma_mode=gamma_mode)
        assert (group_dpo_bound(chosen, rejected, alpha, gamma) >= group_dpo_loss(chosen, rejected)).all()


def test_invalid_weights_break_the_bound():
    """The two tests above would not see a bound that always holds."""
    chosen, rejected = torch.zeros(1), torch.full((1, 1), 5.0)
    alpha, gamma = torch.full((1, 1), 0.5), torch.ones(1, 1)
    assert (group_dpo_bound(chosen, rejected, alpha, gamma) < group_dpo_loss(chosen, rejected)).all()


def test_mean_of_the_sampled_bound_over_the_draws_is_the_summed_bound():
    chosen, rejected = draw(B), draw(B, M, seed=1)
    alpha, gamma = draw_weights(B, M)

    def mean_of_draws(w: Tensor, r: Tensor) -> Tensor:
        draws = [group_dpo_sampled_bound(w, r[:, j], alpha[:, j], gamma[:, j], num_rejected=M) for j in range(M)]
        return torch.stack(draws).mean(dim=0)

    def summed(w: Tensor, r: Tensor) -> Tensor:
        return group_dpo_bound(w, r, alpha, gamma)

    torch.testing.assert_close(mean_of_draws(chosen, rejected), summed(chosen, rejected))
    torch.testing.assert_close(gradients(mean_of_draws, chosen, rejected), gradients(summed, chosen, rejected))


def test_gradient_weight_at_the_start_is_gamma_alpha_beta_over_four():
    """What multiplies the gradient of the error of the chosen (+) and of each rejected (-) video in the first step."""
    beta, reference = 500.0, draw(B, 1 + M).square()
    alpha, gamma = draw_weights(B, M)

    def loss(policy: Tensor) -> Tensor:
        rewards = implicit_reward(policy, reference, beta)
        return group_dpo_bound(rewards[:, 0], rewards[:, 1:], alpha, gamma)

    (gradient,) = gradients(loss, reference)
    torch.testing.assert_close(gradient[:, 1:], -gamma * alpha * beta / 4)
    torch.testing.assert_close(gradient[:, 0], (gamma * alpha * beta / 4).sum(dim=1))


def test_losses_fall_when_the_chosen_error_falls():
    """The sign that is wrong in the second line of Eq. 9 as first printed."""
    alpha, gamma = draw_weights(B, M)
    for loss in (
        lambda w, r: group_dpo_bound(w, r, alpha, gamma),
        lambda w, r: group_dpo_sampled_bound(w, r[:, 0], alpha[:, 0], gamma[:, 0], num_rejected=M),
        lambda w, r: dpo_loss(w, r[:, 0]),
        group_dpo_loss,
    ):
        policy = draw(B, 1 + M).square()

        def value(policy_error: Tensor, loss: Callable[..., Tensor] = loss) -> Tensor:
            rewards = implicit_reward(policy_error, torch.ones(B, 1 + M, dtype=torch.float64), 5.0)
            return loss(rewards[:, 0], rewards[:, 1:])

        (gradient,) = gradients(value, policy)
        assert (gradient[:, 0] > 0).all()
        assert (gradient[:, 1:] <= 0).all() and (gradient[:, 1] < 0).all()


# --- shapes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shapes", [((3,), (3, 1)), ((3, 1), (3,)), ((3,), (1,)), ((3, 1), (3, 1)), ((), ())])
def test_pair_losses_reject_shapes_that_would_broadcast(shapes):
    """(3,) against (3, 1) broadcasts to nine losses and trains on six wrong pairs at a plausible value."""
    chosen, rejected = map(torch.zeros, shapes)
    with pytest.raises(ValueError, match=r"same shape \(B,\)"):
        dpo_loss(chosen, rejected)
    with pytest.raises(ValueError, match=r"same shape \(B,\)"):
        group_dpo_sampled_bound(chosen, rejected, rejected, rejected, num_rejected=1)


@pytest.mark.parametrize("shapes", [((3,), (3,)), ((3, 1), (3, 2)), ((3,), (1, 2)), ((3,), (2, 3)), ((3,), (3, 0))])
def test_group_losses_reject_shapes_that_would_broadcast(shapes):
    chosen, rejected = map(torch.zeros, shapes)
    with pytest.raises(ValueError, match=r"\(B, m\) with m >= 1"):
        group_dpo_loss(chosen, rejected)
    with pytest.raises(ValueError, match=r"\(B, m\) with m >= 1"):
        group_dpo_bound(chosen, rejected, torch.ones_like(rejected), torch.ones_like(rejected))


@pytest.mark.parametrize("shape", [(M,), (B, 1), (1, M), (M, B)])
def test_summed_bound_rejects_weights_that_would_broadcast(shape):
    chosen, rejected, ones, wrong = torch.zeros(B), torch.zeros(B, M), torch.ones(B, M), torch.ones(shape)
    for alpha, gamma in ((wrong, ones), (ones, wrong)):
        with pytest.raises(ValueError, match="shape of `rejected_rewards`"):
            group_dpo_bound(chosen, rejected, alpha, gamma)


@pytest.mark.parametrize("shape", [(), (1,), (B, 1), (B, M)])
def test_sampled_bound_rejects_weights_that_would_broadcast(shape):
    chosen, rejected, ones, wrong = torch.zeros(B), torch.zeros(B), torch.ones(B), torch.ones(shape)
    for alpha, gamma in ((wrong, ones), (ones, wrong)):
        with pytest.raises(ValueError, match="shape of `rejected_rewards`"):
            group_dpo_sampled_bound(chosen, rejected, alpha, gamma, num_rejected=M)


def test_sampled_bound_rejects_an_empty_group():
    with pytest.raises(ValueError, match="num_rejected"):
        group_dpo_sampled_bound(*torch.zeros(4, B), num_rejected=0)


def test_mapo_loss_is_the_written_out_formula_with_its_gradient():
    chosen = torch.tensor([0.2, 1.3, 0.9, 0.0], dtype=torch.float64, requires_grad=True)
    rejected = torch.tensor([0.25, 1.2, 0.9, 0.3], dtype=torch.float64, requires_grad=True)
    losses, ours, theirs = mapo_loss(chosen, rejected, beta=0.1)
    for number, (e_w, e_l) in enumerate(zip(chosen.tolist(), rejected.tolist(), strict=True)):
        phi = [1.0 if error == 0 else (error / 2) / (math.exp(error / 2) - 1) for error in (e_w, e_l)]
        margin = 1000 * (phi[0] - phi[1])
        assert (ours - theirs)[number].item() == pytest.approx(margin, rel=1e-5, abs=1e-12)
        assert losses[number].item() == pytest.approx(e_w + 0.1 * softplus(-margin), rel=1e-5)
    losses.sum().backward()
    assert (chosen.grad >= 1).all() and (rejected.grad <= 0).all()  # fine-tuning, and a push on top of it
    assert chosen.grad[2].item() == pytest.approx(1 + 0.1 * 0.5 * 1000 * 0.5 * 0.4251, rel=1e-3)  # phi'(0.9 / 2)


def test_mapo_loss_refuses_what_would_broadcast_and_what_is_rounded():
    with pytest.raises(ValueError, match="must have the same shape"):
        mapo_loss(torch.ones(3), torch.ones(3, 1), beta=0.1)
    with pytest.raises(ValueError, match="must be float32 or float64"):
        mapo_loss(torch.ones(3, dtype=torch.bfloat16), torch.ones(3, dtype=torch.bfloat16), beta=0.1)
