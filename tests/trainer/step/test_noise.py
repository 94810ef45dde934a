"""Noise streams: a function of (seed, step, sample index), with the right distributions."""

import numpy as np
import pytest
import torch

from tests.support.tiny import tiny_encoded_group
from tests.support.trainer.runs import config, first_batch, trainer
from video_trl.models import WanFamily
from video_trl.trainer.step.denoising import DenoisingStep, draw_noise, sample_generator


SHAPE = (2, 3, 4, 5)


def draw(indices, *, seed=0, step=0, num_noises=1, num_choices=3):
    return draw_noise(seed, [step] * len(indices), indices, SHAPE, num_noises=num_noises, num_choices=num_choices)


def test_shapes_and_ranges():
    drawn = draw(range(50), num_noises=2)
    assert drawn.u.shape == (50,) and drawn.u.dtype == torch.float64
    assert drawn.choice.shape == (50,) and set(drawn.choice.tolist()) == {0, 1, 2}
    assert drawn.noise.shape == (50, 2, *SHAPE) and drawn.noise.dtype == torch.float32
    assert ((drawn.u >= 0) & (drawn.u < 1)).all()


def test_a_sample_draws_the_same_whatever_batch_it_is_in():
    together, alone = draw([5, 7, 9]), draw([7])
    assert torch.equal(together.noise[1], alone.noise[0])
    assert together.u[1] == alone.u[0] and together.choice[1] == alone.choice[0]


def test_the_first_noise_does_not_depend_on_how_many_are_drawn():
    assert torch.equal(draw([3], num_noises=1).noise[:, 0], draw([3], num_noises=4).noise[:, 0])


@pytest.mark.parametrize("change", [{"seed": 1}, {"step": 1}, {"step": -1}])
def test_seed_and_step_change_everything(change):
    assert not torch.equal(draw([3]).noise, draw([3], **change).noise)
    assert draw([3]).u != draw([3], **change).u


def test_the_global_generators_neither_decide_nor_are_touched():
    torch.manual_seed(0)
    before, first = torch.random.get_rng_state(), draw([1, 2])
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(12345)
    assert torch.equal(draw([1, 2]).noise, first.noise)


def test_streams_are_distinct_and_normal():
    """Neighbouring samples and steps share no numbers, and all numbers together look standard normal and uniform."""
    assert (
        len({sample_generator(s, t, i).initial_seed() for s in range(3) for t in range(-1, 9) for i in range(50)})
        == 1500
    )
    many = draw(range(400))
    noise = many.noise.flatten(1)
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
    correlations = np.corrcoef(noise[:60].numpy())[np.triu_indices(60, 1)]
    assert abs(correlations.mean()) < 0.01 and abs(correlations).max() < 0.45
    assert abs(many.u.mean() - 0.5) < 0.05
    assert np.bincount(many.choice.numpy(), minlength=3).min() > 100


def test_the_group_shares_a_timestep_and_noise_only_if_asked_to(tmp_path, monkeypatch):
    """Looks at what the transformer is given: chosen and rejected rows of one group."""
    rows = tiny_encoded_group(1)
    for shared in (True, False):
        made = trainer(config(tmp_path, shared_noise=shared, loss_type="sum"), train_dataset=rows)
        seen = {}

        def keep(module, args, kwargs, seen=seen):
            seen.update(kwargs)

        handle = made.model.register_forward_pre_hook(keep, with_kwargs=True)
        made.compute_loss(made.model, first_batch(made, 0))
        handle.remove()
        assert seen["timestep"].shape == (4,) and len(set(seen["timestep"].tolist())) == 1
        sigma = seen["timestep"][0] / 1000
        clean = torch.cat([rows[0]["chosen_latents"][None], rows[0]["rejected_latents"]])
        noise = (seen["hidden_states"] - (1 - sigma) * clean) / sigma
        same = [torch.allclose(noise[0], noise[j], atol=1e-4) for j in (1, 2, 3)]
        assert same == [shared] * 3


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, lambda u: u),
        ({"timestep_sampling": "shifted"}, lambda u: 3 * u / (1 + 2 * u)),  # the tiny pipeline's flow shift
        ({"timestep_sampling": "shifted", "timestep_shift": 5.0}, lambda u: 5 * u / (1 + 4 * u)),
        (
            {"timestep_sampling": "logit_normal", "timestep_logit_mean": 0.5, "timestep_logit_std": 2.0},
            lambda u: torch.sigmoid(0.5 + 2.0 * torch.special.ndtri(u)),
        ),
        ({"timestep_range": (750, 995)}, lambda u: 0.75 + 0.245 * u),
        (
            {"timestep_sampling": "shifted", "timestep_range": [500.0, 1000.0]},
            lambda u: (lambda v: 3 * v / (1 + 2 * v))(0.25 + 0.75 * u),  # 0.25 is where the shifted level is 0.5
        ),
    ],
)
def test_the_configured_timestep_law_is_used(tmp_path, changes, expected):
    made = trainer(config(tmp_path, **changes))
    u = torch.linspace(0.01, 0.99, 50)
    torch.testing.assert_close(made.step.timesteps(u), 1000 * expected(u), rtol=1e-5, atol=1e-3)


def test_a_range_of_timesteps_leaves_noise_and_choices_as_they_are(tmp_path):
    whole, part = trainer(config(tmp_path)), trainer(config(tmp_path, timestep_range=(750, 995)))
    left, right = (made.step.draw([3, 5], SHAPE, num_choices=3) for made in (whole, part))
    assert all(torch.equal(getattr(left, name), getattr(right, name)) for name in ("u", "choice", "noise"))
    assert (part.step.timesteps(right.u) >= 750).all()


def test_a_sample_chooses_among_its_own_number(tmp_path):
    """Another number of options moves neither timestep nor noise, and one number for all is that number for each."""
    numbers = list(range(200))
    for_all, each = draw(numbers, num_choices=3), draw(numbers, num_choices=[3] * 200)
    assert torch.equal(for_all.choice, each.choice) and torch.equal(for_all.noise, each.noise)
    mixed = draw(numbers, num_choices=[1, 2] * 100)
    assert torch.equal(mixed.noise, for_all.noise) and torch.equal(mixed.u, for_all.u)
    assert not mixed.choice[0::2].any() and 70 < mixed.choice[1::2].sum() * 2 < 130


def test_a_range_that_the_model_does_not_have_is_refused_before_training(tmp_path):
    with pytest.raises(ValueError, match=r"ends beyond the model's last timestep, 1000"):
        trainer(config(tmp_path, timestep_range=(500, 1200)))
    with pytest.raises(ValueError, match="draws no noise level"):
        trainer(
            config(tmp_path, timestep_sampling="logit_normal", timestep_logit_mean=-90.0, timestep_range=(900, 1000))
        )


@pytest.mark.parametrize("timestep_range", [None, (850.0, 1000.0), (0.0, 875.0)])
@pytest.mark.parametrize("sampling", [{"sampling": "uniform"}, {"sampling": "shifted", "shift": 3.0}], ids=str)
def test_bell_weights_have_mean_1_over_the_timesteps_that_are_drawn(sampling, timestep_range):
    options = {"seed": 0, "device": torch.device("cpu"), "now": lambda: 0, "timestep_range": timestep_range}
    step = DenoisingStep(WanFamily(), **options, **sampling)
    timesteps = step.timesteps((torch.arange(2000, dtype=torch.float64) + 0.5) / 2000)
    weights = step.bell_weights(timesteps)
    assert weights.mean().item() == pytest.approx(1, rel=2e-3) and weights.std() > 0.1
