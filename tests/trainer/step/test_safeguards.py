"""The safeguards of the chosen video, in every preference trainer: first-order change, costs, neutral values."""

import math
from typing import Any

import pytest
import torch

from tests.support.rounding import assert_close_weights
from tests.support.tiny import tiny_encoded_group, tiny_wan_pipeline
from tests.support.trainer.runs import disturb_adapter, double, first_batch, trained_weights
from tests.trainer.step.test_step_modes import make
from video_trl.trainer.step.passes import forward_errors


METHODS: list[tuple[str, dict[str, Any]]] = [
    ("DPO", {}),
    ("DPO", {"gap": "log_ratio", "beta": 10.0, "lose_gap_weight": 1.5}),
    ("RegDPO", {"sft_coefficient": 0.2}),
    ("GroupDPO", {"loss_type": "sum", "sft_weight": "0.1*dgr"}),
    ("GroupDPO", {"loss_type": "plackett_luce", "physics_rewarding": False}),
]
MASKED = ("GroupDPO", {"loss_type": "sum", "physics_rewarding": False, "masked": True})


def near_rows(count: int, masked: bool = False) -> list[dict[str, Any]]:
    """Groups whose rejected videos are near the chosen one, where a preference loss does it the most harm."""
    rows = tiny_encoded_group(count)
    for row in rows:
        noise = row["rejected_latents"]
        row["rejected_latents"] = row["chosen_latents"] + 0.05 * noise
        if masked:
            row["loss_weights"] = (noise[0, 0] > 0).float()  # (F, H, W)
    return rows


def step(directory, name: str, mode: str, **changes: Any) -> tuple[Any, Any, torch.Tensor, dict[str, torch.Tensor]]:
    """Trainer, denoising, coefficients of the errors, and gradients of one step of two groups, in float64."""
    rows = near_rows(2, changes.pop("masked", False))
    made = make(directory, name, mode, model=double(tiny_wan_pipeline()), rows=rows, **changes)
    disturb_adapter(made)
    seen: dict[str, Any] = {}
    prepare, policy = made.step.prepare, made.passes.policy

    def watch_prepare(*args: Any, **kwargs: Any) -> Any:
        seen["denoising"] = prepare(*args, **kwargs)
        return seen["denoising"]

    def leaf(*args: Any) -> torch.Tensor:
        seen["errors"] = policy(*args).detach().requires_grad_()
        return seen["errors"]

    made.step.prepare = watch_prepare
    made.compute_loss(made.model, first_batch(made, 0, 1)).backward()
    made.passes.backward()
    gradients = {name: weight.grad.clone() for name, weight in made.model.named_parameters() if weight.requires_grad}
    made.passes.policy = leaf
    made.compute_loss(made.model, first_batch(made, 0, 1)).backward()
    return made, seen["denoising"], seen["errors"].grad, gradients


def gradients_by_hand(made: Any, denoising: Any) -> torch.Tensor:
    """The gradient of each video's error, flattened: (N, P)."""
    weights = [weight for weight in made.model.parameters() if weight.requires_grad]
    errors = forward_errors(made.family, made.model, denoising)
    rows = [torch.autograd.grad(error, weights, retain_graph=True) for error in errors]
    return torch.stack([torch.cat([each.flatten() for each in row]) for row in rows])


@pytest.mark.parametrize("mu", [0.0, 0.5])
@pytest.mark.parametrize(("name", "changes"), METHODS, ids=str)
def test_by_the_weights_gradients_no_chosen_video_gets_worse(name, changes, mu, tmp_path):
    """Each group's part of the gradient, written out; to first order its chosen error falls by mu of what it would."""
    options = {**changes, "safeguard": "parameter", "safeguard_mu": mu}
    made, denoising, coefficients, gradients = step(tmp_path, name, "sequential", **options)
    weighted = coefficients[:, None] * gradients_by_hand(made, denoising)
    groups = weighted.unflatten(0, (2, -1))  # (B, 1 + k, P)
    total, held = torch.zeros_like(groups[0, 0]), 0
    for group, sizes in zip(groups, coefficients.view(2, -1), strict=True):
        own = group[0] @ group[0]
        change = group[0].clone()
        for place in range(1, len(group)):
            share = sizes[place].abs() / sizes[1:].abs().sum()
            harm, budget = -(group[0] @ group[place]), (1 - mu) * share * own
            held += int(harm > budget)
            change += min(1.0, float(budget / harm) if harm > 0 else 1.0) * group[place]
        assert group[0] @ change >= (mu - 1e-9) * own
        total += change
    assert held > 0 or mu == 0.0  # a regulariser may leave nothing to hold back
    ours = torch.cat([gradient.flatten() for gradient in gradients.values()])
    assert (ours - total).abs().max() < 1e-5 * total.abs().max()


@pytest.mark.parametrize(("name", "changes"), [*METHODS[1:4], MASKED], ids=str)
def test_by_outputs_the_gradients_are_those_of_scaled_errors(name, changes, tmp_path):
    """In both step modes; the scales from the residuals of one forward."""
    options = {**changes, "safeguard": "output", "safeguard_mu": 0.5}
    made, denoising, coefficients, gradients = step(tmp_path / "concat", name, "concat", **options)
    with torch.no_grad():
        prediction = made.family.predict(
            made.model, denoising.noisy_latents, denoising.timesteps, denoising.conditions
        )
    residuals = (
        prediction - denoising.target
        if denoising.weights is None
        else (denoising.weights * (prediction - denoising.target))
    )
    residuals = residuals.flatten(1).unflatten(0, (2, -1))  # (B, 1 + k, elements)
    scaled, held = coefficients.view(2, -1).clone(), 0
    for group, plain, sizes in zip(residuals, coefficients.view(2, -1), scaled, strict=True):
        for place in range(1, len(group)):
            share = plain[place].abs() / plain[1:].abs().sum()
            harm = -plain[0] * plain[place] * (group[0] @ group[place])
            budget = 0.5 * share * plain[0] ** 2 * (group[0] @ group[0])
            if harm > budget:
                held += 1
                sizes[place] *= float(budget / harm)
    assert held > 0
    total = (scaled.view(-1, 1) * gradients_by_hand(made, denoising)).sum(dim=0)
    ours = torch.cat([gradient.flatten() for gradient in gradients.values()])
    assert (ours - total).abs().max() < 1e-5 * total.abs().max()
    _, _, _, sequential = step(tmp_path / "sequential", name, "sequential", **options)
    assert_close_weights(sequential, gradients, 1e-6)


@pytest.mark.parametrize(
    ("mode", "safeguard"),
    [("concat", "output"), ("singles", "output"), ("sequential", "output"), ("sequential", "parameter")],
)
def test_a_safeguard_costs_no_forward_and_does_not_change_the_loss(mode, safeguard, tmp_path):
    counts, values = [], []
    for kind in ("none", safeguard):
        made = make(tmp_path / kind, "GroupDPO", mode, loss_type="sum", safeguard=kind, rows=near_rows(1))
        disturb_adapter(made)
        forwards: list[int] = []
        made.model.register_forward_hook(lambda *_, forwards=forwards: forwards.append(1))
        loss = made.compute_loss(made.model, first_batch(made, 0))
        loss.backward()
        made.passes.backward()
        counts.append(len(forwards))
        values.append(loss.item())
    assert counts[0] == counts[1] == {"concat": 2, "singles": 4 + 4, "sequential": 4 + 4 + 3}[mode]
    assert values[0] == values[1]


@pytest.mark.parametrize("safeguard", ["output", "parameter"])
def test_scales_are_logged_and_a_run_starts_at_log_2(safeguard, tmp_path):
    """Accumulated micro-batches and groups of which the score leaves some out included."""
    options = {"safeguard": safeguard, "max_steps": 3, "gradient_accumulation_steps": 2, "rows": near_rows(8)}
    made = make(tmp_path, "DPO", "auto", **options)
    assert made.step_mode == ("sequential" if safeguard == "parameter" else "concat")
    made.train()
    first, *_, last = (entry for entry in made.state.log_history if "loss" in entry)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert 0 < last["safeguard/scale"] < 1 and 0 < last["safeguard/held_back"] <= 1
    assert all(weight.isfinite().all() for weight in trained_weights(made).values())


@pytest.mark.parametrize("safeguard", ["output", "parameter"])
def test_videos_that_are_not_compared_are_none_that_were_let_through(safeguard, tmp_path):
    """A group of four of which the score leaves out two has the metrics of a pair, and its gradient."""
    rows, found = near_rows(2), []
    for row in rows:
        row["rejected_scores"] = torch.tensor([[1.0, 0.1], [1.0, 0.9], [1.0, 0.8]])
    pairs = [{**row, **{key: row[key][:1] for key in ("rejected_latents", "rejected_scores")}} for row in rows]
    for given, below in ((rows, 0.5), (pairs, None)):
        made = make(
            tmp_path / f"{below}", "GroupDPO", "sequential", rows=given, model=double(tiny_wan_pipeline()),
            loss_type="sum", safeguard=safeguard, safeguard_mu=0.9, rejected_score_below=below,
        )  # fmt: skip
        disturb_adapter(made)
        recorded: list[dict[str, torch.Tensor]] = []
        made.record = recorded.append
        made.passes = made.make_passes()  # they record
        made.compute_loss(made.model, first_batch(made, 0, 1)).backward()
        made.passes.backward()
        gradients = [weight.grad.clone() for weight in made.model.parameters() if weight.requires_grad]
        scales = [metrics for metrics in recorded if "safeguard/scale" in metrics]
        names = ("safeguard/scale", "safeguard/held_back")
        found.append(([torch.cat([each[name].flatten() for each in scales]).mean() for name in names], gradients))
    (scale, held), gradients = found[0]
    assert 0 < scale < 1 and held == 1
    torch.testing.assert_close([scale, held], found[1][0])
    torch.testing.assert_close(gradients, found[1][1])


@pytest.mark.parametrize("name", ["DPO", "RegDPO", "GroupDPO"])
def test_a_penalty_and_log_ratios_start_where_the_method_does(name, tmp_path):
    """Gaps are 0 in the first step, so that neither changes the loss there; afterwards both do."""
    options = {"physics_rewarding": False, "scale_by_group": False} if name == "GroupDPO" else {}
    options |= {"sft_coefficient": 0.0} if name == "RegDPO" else {}
    runs = []
    for changes in ({}, {"win_gap_penalty": 200.0}, {"gap": "log_ratio", "beta": 10.0, "lose_gap_clip": 0.01}):
        made = make(tmp_path, name, "concat", rows=near_rows(2), **options, **changes)
        first = made.compute_loss(made.model, first_batch(made, 0, 1)).item()
        assert first == pytest.approx(math.log(2), abs=1e-7)
        disturb_adapter(made)
        runs.append(made.compute_loss(made.model, first_batch(made, 0, 1)).item())
    assert runs[0] != runs[1] and runs[0] != runs[2]


def test_the_penalty_is_the_positive_part_of_the_win_gap(tmp_path):
    rows, values = near_rows(4), []
    for weight in (0.0, 30.0):
        made = make(tmp_path, "DPO", "concat", rows=rows, win_gap_penalty=weight)
        disturb_adapter(made)
        recorded: dict[str, torch.Tensor] = {}
        made.record = recorded.update
        values.append(made.compute_loss(made.model, first_batch(made, 0, 1, 2, 3)).item())
    penalty = 30.0 * recorded["win_gap"].clamp(min=0).mean().item()
    assert penalty > 0 and values[1] == pytest.approx(values[0] + penalty, rel=1e-5)
    assert recorded["loss/dpo"].mean().item() == pytest.approx(values[0], rel=1e-6)


def test_label_smoothing_and_types_reach_the_trainer(tmp_path):
    kinds = ({"loss_type": "hinge"}, 1.0, 25.0), ({"loss_type": "ipo"}, 0.25, 25.0)  # dgr is beta / 2 at a margin of 0
    for changes, value, ratio in (*kinds, ({"label_smoothing": 0.1}, math.log(2), 25.0 * (0.5 - 0.1))):
        made = make(tmp_path, "DPO", "concat", **changes)
        recorded: dict[str, torch.Tensor] = {}
        made.record = recorded.update
        assert made.compute_loss(made.model, first_batch(made, 0)).item() == pytest.approx(value, rel=1e-6)
        assert recorded["dgr"].item() == pytest.approx(ratio, rel=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"safeguard": "both"}, "`safeguard` must be one of 'none', 'output', 'parameter', got 'both'"),
        ({"safeguard": "output", "safeguard_mu": 1.5}, r"`safeguard_mu` must be in \[0, 1\], got 1.5"),
        ({"safeguard": "parameter", "step_mode": "concat"}, "which `step_mode='concat'` does not have"),
        ({"win_gap_penalty": -1.0}, "`win_gap_penalty` must be finite and not negative"),
        ({"lose_gap_weight": math.inf}, "`lose_gap_weight` must be finite and not negative"),
        ({"lose_gap_clip": 0.0}, "`lose_gap_clip` must be positive and finite, got 0.0"),
        ({"gap": "ratio"}, "`gap` must be one of 'raw', 'log_ratio', got 'ratio'"),
        ({"label_smoothing": 0.7}, r"`label_smoothing` must be in \[0, 0.5\)"),
    ],
)
def test_bad_values_are_refused(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make(tmp_path, "DPO", changes.pop("step_mode", "auto"), **changes)


def test_a_trainer_that_does_not_say_what_belongs_together_is_refused(tmp_path):
    made = make(tmp_path, "DPO", "concat", safeguard="output")
    prepare = made.step.prepare
    made.step.prepare = lambda *args, group_size, **rest: prepare(*args, **rest)
    with pytest.raises(ValueError, match="pass `group_size` to `self.step.prepare`"):
        made.compute_loss(made.model, first_batch(made, 0))
