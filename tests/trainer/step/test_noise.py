"""Noise streams: a function of (seed, step, sample index), with the right distributions."""

import numpy as np
import pytest
import torch

from tests.support.tiny import tiny_encoded_group
from tests.support.trainer.runs import config, first_batch, trainer
from video_trl.trainer.step.denoising import draw_noise, sample_generator


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
    ],
)
def test_the_configured_timestep_law_is_used(tmp_path, changes, expected):
    made = trainer(config(tmp_path, **changes))
    u = torch.linspace(0.01, 0.99, 50)
    torch.testing.assert_close(made.step.timesteps(u), 1000 * expected(u), rtol=1e-5, atol=1e-3)
