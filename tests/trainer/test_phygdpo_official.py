"""The preset `phygdpo-official` against the formula of its authors' code, written out here in its own terms."""

import pytest
import torch
import torch.nn.functional as F

from tests.support.tiny import tiny_encoded_group, tiny_wan_pipeline
from tests.support.trainer.runs import disturb_adapter, double, first_batch
from video_trl import VideoGroupDPOConfig, VideoGroupDPOTrainer
from video_trl.diffusion import bell_weights
from video_trl.presets import load_preset


class Schedule:
    """Sigmas, timesteps and training weights of a shifted flow schedule of 1000 steps."""

    def __init__(self, shift: float = 5.0) -> None:
        sigmas = torch.linspace(1.0, 0.0, 1001, dtype=torch.float64)[:-1]
        self.sigmas = shift * sigmas / (1 + (shift - 1) * sigmas)
        x = self.sigmas * 1000
        y = torch.exp(-2 * ((x - 1000 / 2) / 1000) ** 2)
        y = y - y.min()
        self.weights = y * (1000 / y.sum())


def official_loss(win, lose, ref_win, ref_lose, sa_score, pc_score, beta):
    """Scalars of one pair; scores are whole numbers from 1 to 5."""
    advantage = (win - ref_win) - (lose - ref_lose)
    v = 1.0 - (sa_score / 5.0 + pc_score / 5.0) / 2.0
    alpha = 0.5 + (1.0 - 0.5) * torch.sigmoid(5.0 * (v - 0.5))
    gamma = (1.0 / alpha) * (1.0 + 0.5 * torch.sigmoid(3.0 * (v - 0.5)))
    return gamma * -F.logsigmoid(-beta * alpha * advantage)


@pytest.fixture
def official(tmp_path):
    values = load_preset("phygdpo-official")
    del values["model_name_or_path"]
    small = {"bf16": False, "height": None, "width": None, "use_cpu": True, "dataloader_num_workers": 0}
    args = VideoGroupDPOConfig(**(values | small), output_dir=str(tmp_path), report_to="none")
    rows = tiny_encoded_group(2)
    for row, scores in zip(rows, ([(1, 4), (5, 5), (2, 3)], [(4, 4), (1, 1), (3, 5)]), strict=True):
        row["rejected_scores"] = torch.tensor(scores) / 5
    # In float64: beta multiplies differences of errors, and with them the rounding that the two orders differ by.
    return VideoGroupDPOTrainer(double(tiny_wan_pipeline()), args, rows)


def test_loss_and_gradient_are_those_of_the_authors_code(official, monkeypatch):
    made, schedule = official, Schedule()
    disturb_adapter(made, 0.05)
    draw, places = made.step.draw, torch.tensor([137, 862])  # `timestep_id` of each row, as if drawn

    def drawn(*args, **kwargs):
        numbers = draw(*args, **kwargs)
        return type(numbers)((1000 - places).double() / 1000, numbers.choice, numbers.noise)

    monkeypatch.setattr(made.step, "draw", drawn)
    seen = {}
    policy = made.passes.policy

    def spied(model, denoising, _=None):
        if not torch.is_grad_enabled():  # the reference goes the same way
            return policy(model, denoising)
        seen["denoising"], seen["policy"] = denoising, policy(model, denoising)
        seen["policy"].retain_grad()
        return seen["policy"]

    monkeypatch.setattr(made.passes, "policy", spied)
    batch = first_batch(made, 0, 1)
    loss = made.compute_loss(made.model, batch)
    loss.backward()

    denoising = seen["denoising"]
    reference = made.passes.reference(denoising, batch["index"])
    choices = draw(batch["index"], (4, 2, 4, 4), num_noises=2, num_choices=3).choice
    losses, errors = [], seen["policy"].detach().requires_grad_()
    for row, place in enumerate(places):
        weight = schedule.weights[place]
        assert denoising.timesteps[2 * row] == denoising.timesteps[2 * row + 1]
        assert denoising.timesteps[2 * row].item() == pytest.approx(1000 * schedule.sigmas[place].item(), rel=1e-6)
        win, lose = (weight * errors[2 * row + place] for place in (0, 1))
        ref_win, ref_lose = (weight * reference[2 * row + place] for place in (0, 1))
        sa, pc = (5 * batch["sa"][row, choices[row]]).round(), (5 * batch["pc"][row, choices[row]]).round()
        losses.append(official_loss(win, lose, ref_win, ref_lose, sa, pc, beta=1000))
    expected = torch.stack(losses).mean()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)  # timesteps are float32, and so are the weights
    torch.testing.assert_close(seen["policy"].grad, errors.grad, rtol=2e-5, atol=1e-6 * errors.grad.abs().max().item())
    assert (errors.grad != 0).all() and (seen["policy"] != reference).any()
    # Independent noise: the noisy latents minus the videos differ within a pair.
    noises = denoising.target + torch.cat(
        [batch["chosen_latents"][:, None], batch["rejected_latents"][torch.arange(2), choices][:, None]], 1
    ).flatten(0, 1)
    assert not torch.allclose(noises[0], noises[1])


def test_weights_are_those_of_the_schedule():
    schedule = Schedule()
    torch.testing.assert_close(bell_weights(schedule.sigmas, shift=5.0), schedule.weights, rtol=1e-6, atol=1e-9)
    assert bell_weights(schedule.sigmas, shift=5.0).mean() == pytest.approx(1.0, abs=1e-6)
    assert (bell_weights(torch.rand(100), shift=3.0) >= 0).all()


def test_optimizer_and_schedule_are_the_authors(official):
    made = official
    made.create_optimizer_and_scheduler(1000)
    assert type(made.optimizer) is torch.optim.AdamW
    assert {(group["betas"], group["lr"]) for group in made.optimizer.param_groups} == {((0.9, 0.999), 1e-5)}
    assert {group["weight_decay"] for group in made.optimizer.param_groups if group["params"]} <= {0.01, 0.0}
    assert made.args.max_grad_norm == 0 and made.lr_scheduler.get_last_lr()[0] == 1e-5
    for _ in range(999):
        made.lr_scheduler.step()
    assert made.lr_scheduler.get_last_lr()[0] == 1e-5


def test_the_adapter_is_on_the_authors_layers(official):
    """`q,k,v,o,ffn.0,ffn.2` of their transformer: both attentions, and the feed-forward network."""
    names = [name for name, _ in official.model.named_parameters() if "lora_A" in name]
    projections = ("to_q", "to_k", "to_v", "to_out.0")
    attentions = {f"{attention}.{name}" for attention in ("attn1", "attn2") for name in projections}
    assert {name.split(".lora_A")[0].split(".", 2)[2] for name in names} == attentions | {
        "ffn.net.0.proj",
        "ffn.net.2",
    }
