"""`FlowMatching` and `VPrediction` against diffusers' schedulers, and the timestep laws against their formulas."""

import math
from statistics import NormalDist

import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

from video_trl.diffusion import FlowMatching, NoiseProcess, VPrediction, bell_weights, loss_weights


SHAPE = (5, 2, 3, 4, 4)
FLOW = FlowMatching()
PUBLISHED = {  # scheduler/scheduler_config.json of CogVideoX-2b; the 5B checkpoints have `snr_shift_scale` 1.0
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "set_alpha_to_one": True,
    "snr_shift_scale": 3.0,
    "timestep_spacing": "trailing",
    "trained_betas": None,
}


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
def test_add_noise_is_the_scale_noise_of_the_scheduler(shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(50)
    timesteps = scheduler.timesteps[[0, 7, 20, 33, 49]]
    latents, noise = draw(*SHAPE), draw(*SHAPE, seed=1)
    expected = scheduler.scale_noise(latents, timesteps, noise)
    torch.testing.assert_close(FLOW.add_noise(latents, noise, timesteps), expected, rtol=0, atol=2e-6)


def test_velocity_takes_a_scheduler_step_from_the_noisy_to_the_clean_latents():
    """One Euler step over the whole noise level along the target recovers the video: it is the field to regress."""
    latents, noise = draw(1, 2, 3, 4, 4), draw(1, 2, 3, 4, 4, seed=1)
    scheduler = FlowMatchEulerDiscreteScheduler()
    for level in (1.0, 0.7, 0.1):
        scheduler.set_timesteps(sigmas=[level])
        timesteps = scheduler.timesteps
        noisy = FLOW.add_noise(latents, noise, timesteps)
        clean = scheduler.step(FLOW.velocity(latents, noise, timesteps), timesteps[0], noisy).prev_sample
        torch.testing.assert_close(clean, latents, rtol=0, atol=1e-6)


def test_add_noise_and_velocity_are_their_formulas_at_each_sample_s_own_timestep():
    latents, noise = draw(*SHAPE), draw(*SHAPE, seed=1)
    timesteps = torch.tensor([0.0, 1.0, 250.5, 999.0, 1000.0])
    noisy = FLOW.add_noise(latents, noise, timesteps)
    for row, timestep in enumerate(timesteps.tolist()):
        sigma = timestep / 1000
        torch.testing.assert_close(noisy[row], (1 - sigma) * latents[row] + sigma * noise[row])
    assert torch.equal(noisy[0], latents[0]) and torch.equal(noisy[4], noise[4])
    assert torch.equal(FLOW.velocity(latents, noise, timesteps), noise - latents)
    torch.testing.assert_close(FlowMatching(500).add_noise(latents, noise, timesteps / 2), noisy)


def test_half_precision_latents_are_noised_in_float32():
    """A timestep of 0.5 in 1000 still adds noise, and 999.5 still leaves signal; both vanish in bfloat16."""
    latents, noise = draw(*SHAPE, dtype=torch.bfloat16), draw(*SHAPE, seed=1, dtype=torch.bfloat16)
    timesteps = torch.tensor([0.5, 999.5, 100.0, 200.0, 300.0])
    noisy, target = FLOW.add_noise(latents, noise, timesteps), FLOW.velocity(latents, noise, timesteps)
    assert noisy.dtype == target.dtype == torch.float32
    assert torch.equal(noisy, FLOW.add_noise(latents.float(), noise.float(), timesteps))
    assert torch.equal(target, noise.float() - latents.float())
    assert (noisy[1] != noise[1].float()).any()
    assert FLOW.add_noise(latents.double(), noise.double(), timesteps).dtype == torch.float64


@pytest.mark.parametrize(
    ("noise", "timesteps"),
    [((5, 1, 3, 4, 4), (5,)), ((1, 2, 3, 4, 4), (5,)), (SHAPE, (1,)), (SHAPE, ()), (SHAPE, (5, 1))],
)
def test_shapes_that_would_broadcast_are_rejected(noise, timesteps):
    for method in (FLOW.add_noise, FLOW.velocity):
        with pytest.raises(ValueError, match="`timesteps` shape"):
            method(torch.zeros(SHAPE), torch.zeros(noise), torch.zeros(timesteps))


# --- sample_timesteps -----------------------------------------------------------------------------------------------


def grid(size: int) -> Tensor:
    """Midpoints of `size` equal parts of [0, 1]: what a uniform law looks like without chance."""
    return (torch.arange(size, dtype=torch.float64) + 0.5) / size


def test_uniform_timesteps_are_u_on_the_scale_of_the_model():
    u = torch.tensor([0.0, 0.25, 0.9, 1.0])
    assert FLOW.sample_timesteps(u).tolist() == pytest.approx([0, 250, 900, 1000])
    assert FlowMatching(500).sample_timesteps(u).tolist() == pytest.approx([0, 125, 450, 500])


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0, 5.0])
def test_shifted_timesteps_are_those_that_the_scheduler_samples_with(shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    sigmas = torch.linspace(1, 0.001, 40, dtype=torch.float64)
    scheduler.set_timesteps(sigmas=sigmas.tolist())
    timesteps = FLOW.sample_timesteps(sigmas, scheme="shifted", shift=shift)
    torch.testing.assert_close(timesteps, scheduler.timesteps, rtol=1e-5, atol=1e-4)
    assert shift == 1 or not torch.allclose(timesteps, FLOW.sample_timesteps(sigmas), rtol=1e-2)


def test_shifted_timesteps_follow_the_sampler_that_wan_ships():
    """UniPC rounds its timesteps down to integers."""
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    scheduler.set_timesteps(40)
    levels = scheduler.sigmas[:-1].double()
    u = levels / (3.0 - 2.0 * levels)  # the uniform numbers behind the shifted levels
    timesteps = FLOW.sample_timesteps(u, scheme="shifted", shift=3.0)
    assert ((timesteps - scheduler.timesteps).abs() <= 1).all()
    assert u.diff().std() < 1e-4  # evenly spaced: the levels are indeed shifted by 3


def test_logit_normal_timesteps_are_the_quantiles_of_the_law():
    u = grid(200)
    timesteps = FLOW.sample_timesteps(u, scheme="logit_normal", logit_mean=0.5, logit_std=1.5)
    law = NormalDist(0.5, 1.5)
    expected = [1000 / (1 + math.exp(-law.inv_cdf(value))) for value in u.tolist()]
    assert timesteps.tolist() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("scheme", ["uniform", "logit_normal", "shifted"])
def test_timesteps_are_a_pure_increasing_float32_function_onto_the_whole_scale(scheme):
    u = torch.cat([torch.zeros(1), grid(1000).float(), torch.ones(1)])
    state = torch.get_rng_state()
    timesteps = FLOW.sample_timesteps(u, scheme=scheme, shift=3.0)
    assert torch.equal(timesteps, FLOW.sample_timesteps(u, scheme=scheme, shift=3.0))
    assert torch.equal(state, torch.get_rng_state())
    assert timesteps.dtype == torch.float32 and timesteps.shape == u.shape
    assert (timesteps.diff() > 0).all()
    assert timesteps[0] == 0 and timesteps[-1] == 1000


def test_an_unknown_scheme_is_an_error_and_not_uniform():
    with pytest.raises(ValueError, match="'uniform', 'logit_normal', 'shifted', got 'mode'"):
        FLOW.sample_timesteps(torch.rand(2), scheme="mode")


@pytest.mark.parametrize("u", [[-0.1], [1.1], [float("nan")], [[0.5]]])
def test_numbers_that_are_not_uniform_are_rejected(u):
    with pytest.raises(ValueError, match=r"values in \[0, 1\]"):
        FLOW.sample_timesteps(torch.tensor(u))


@pytest.mark.parametrize("arguments", [{"shift": 0.0}, {"shift": -1.0}, {"logit_std": 0.0}, {"shift": float("nan")}])
def test_parameters_of_the_laws_must_be_positive(arguments):
    with pytest.raises(ValueError, match="must be positive"):
        FLOW.sample_timesteps(torch.rand(2), **arguments)


# --- a part of the timesteps ---

SCHEMES = [
    {"scheme": "uniform"},
    {"scheme": "shifted", "shift": 3.0},
    {"scheme": "shifted", "shift": 0.5},
    {"scheme": "logit_normal", "logit_mean": 0.5, "logit_std": 1.5},
]


@pytest.mark.parametrize("options", SCHEMES, ids=str)
@pytest.mark.parametrize("timestep_range", [(750.0, 995.0), (0.0, 300.0), (400.0, 1000.0)])
def test_a_range_restricts_the_distribution_and_keeps_its_shape(options, timestep_range):
    """What is drawn in the range is distributed as what the whole distribution draws there."""
    low, high = timestep_range
    whole = FLOW.sample_timesteps(grid(400_000), **options).double()
    inside = whole[(whole >= low) & (whole <= high)]
    part = FLOW.sample_timesteps(grid(1000), timestep_range=timestep_range, **options).double()
    assert part.min() >= low and part.max() <= high and (part.diff() >= 0).all()
    levels = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    torch.testing.assert_close(
        part.quantile(levels), inside[:: len(inside) // 20_000].quantile(levels), rtol=0, atol=1
    )


@pytest.mark.parametrize(
    ("mean", "std", "low", "high"), [(-3, 1, 900, 1000), (0, 1, 999, 1000), (0, 0.3, 900, 1000), (2, 1, 0, 300)]
)
def test_a_range_in_a_tail_has_its_own_distribution(mean, std, low, high):
    """By the logarithm of the tail's probability, which holds where probabilities round to 0 or 1."""
    u = grid(1000)
    options = {"scheme": "logit_normal", "logit_mean": mean, "logit_std": std, "timestep_range": (low, high)}
    levels = FLOW.sample_timesteps(u, **options).double() / 1000
    side = -1 if low > 0 else 1  # of the tail

    def log_probability(level):
        return torch.special.log_ndtr(side * (torch.logit(torch.as_tensor(level)) - mean) / std)

    inner, outer = (low, high) if side < 0 else (high, low)
    whole = torch.as_tensor(log_probability(torch.tensor(inner / 1000, dtype=torch.float64)))
    assert outer in (0, 1000) and levels.min() >= low / 1000 - 1e-6 and levels.max() <= high / 1000 + 1e-6
    inside = torch.exp(log_probability(levels) - whole)  # 1 at the inner end, 0 at the outer one
    torch.testing.assert_close(inside, 1 - u.double() if side < 0 else u.double(), rtol=0, atol=2e-3)


@pytest.mark.parametrize("options", SCHEMES, ids=str)
def test_the_whole_range_is_no_range(options):
    u = torch.rand(500, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for process in (FLOW, VPrediction()):
        expected = process.sample_timesteps(u, **options)
        assert torch.equal(process.sample_timesteps(u, timestep_range=None, **options), expected)
        assert torch.equal(process.sample_timesteps(u, timestep_range=(0, 1000), **options), expected)


def test_integer_timesteps_are_drawn_from_a_range_too():
    timesteps = VPrediction().sample_timesteps(grid(2450), timestep_range=(750, 995))
    assert timesteps.dtype == torch.int64 and torch.bincount(timesteps).tolist() == [0] * 750 + [10] * 245


@pytest.mark.parametrize("timestep_range", [(500.0, 500.0), (800.0, 700.0), (-1.0, 500.0), (0.0, 1001.0)])
def test_an_impossible_range_is_refused(timestep_range):
    with pytest.raises(ValueError, match="0 <= low < high <= 1"):
        FLOW.sample_timesteps(torch.rand(2), timestep_range=timestep_range)


def test_a_range_without_any_probability_is_refused():
    with pytest.raises(ValueError, match=r"draws no noise level in \[0.9, 1.0\]: `logit_mean=-50"):
        FLOW.sample_timesteps(
            torch.rand(2), scheme="logit_normal", logit_mean=-50.0, logit_std=0.1, timestep_range=(900.0, 1000.0)
        )


# --- VPrediction ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheduler_class", [CogVideoXDDIMScheduler, CogVideoXDPMScheduler])
@pytest.mark.parametrize("changes", [{}, {"snr_shift_scale": 1.0}, {"rescale_betas_zero_snr": False}])
def test_v_prediction_is_the_add_noise_and_get_velocity_of_the_scheduler(scheduler_class, changes):
    """In float64 to the last digits but two, at all 1000 timesteps; in float32 to rounding."""
    scheduler = scheduler_class(**(PUBLISHED | changes))
    process = VPrediction.from_config(scheduler.config)
    timesteps = torch.arange(1000)
    for dtype, tolerance in ((torch.float64, 1e-14), (torch.float32, 1e-6)):
        latents, noise = draw(1000, 1, 1, 2, 2, dtype=dtype), draw(1000, 1, 1, 2, 2, seed=1, dtype=dtype)
        for ours, theirs in ((process.add_noise, scheduler.add_noise), (process.velocity, scheduler.get_velocity)):
            found, expected = ours(latents, noise, timesteps), theirs(latents, noise, timesteps)
            assert found.dtype == dtype
            torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_the_schedule_is_its_formula(scale):
    """One number after another, by the definition: betas, their product, the shift, the rescaling."""
    process = VPrediction(snr_shift_scale=scale)
    steps = [math.sqrt(0.00085) + t * (math.sqrt(0.012) - math.sqrt(0.00085)) / 999 for t in range(1000)]
    alphas_bar, product = [], 1.0
    for step in steps:
        product *= 1 - step**2
        snr = product / (1 - product) / scale
        alphas_bar.append(snr / (1 + snr))
    roots = [math.sqrt(value) for value in alphas_bar]
    signal = [(root - roots[-1]) * roots[0] / (roots[0] - roots[-1]) for root in roots]
    zero, one = torch.zeros(1000, 1, 1, 1, 1, dtype=torch.float64), torch.ones(1000, 1, 1, 1, 1, dtype=torch.float64)
    found_signal, found_noise = (
        process.add_noise(one, zero, torch.arange(1000)),
        process.add_noise(zero, one, torch.arange(1000)),
    )
    assert found_signal.flatten().tolist() == pytest.approx(signal, abs=1e-12)
    assert found_noise.flatten().tolist() == pytest.approx([math.sqrt(1 - value**2) for value in signal], abs=1e-12)


def test_the_last_timestep_is_noise_alone_and_its_velocity_the_negative_video():
    latents, noise = draw(1, 2, 3, 4, 4), draw(1, 2, 3, 4, 4, seed=1)
    last = torch.tensor([999])
    assert torch.equal(VPrediction().add_noise(latents, noise, last), noise)
    assert torch.equal(VPrediction().velocity(latents, noise, last), -latents)
    kept = VPrediction(rescale_betas_zero_snr=False)
    assert not torch.equal(kept.add_noise(latents, noise, last), noise)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_velocity_error_is_the_weighted_video_error_that_cogvideox_trains_with(scale):
    """Values and gradients, at all timesteps, the video recovered by the scheduler as CogVideoX does."""
    scheduler = CogVideoXDDIMScheduler(**(PUBLISHED | {"snr_shift_scale": scale}))
    process, timesteps = VPrediction.from_config(scheduler.config), torch.arange(1000)
    latents, noise, guess = (draw(1000, 1, 1, 2, 2, seed=seed, dtype=torch.float64) for seed in range(3))
    noisy, target = process.add_noise(latents, noise, timesteps), process.velocity(latents, noise, timesteps)
    results = []
    for of_video in (False, True):
        prediction = guess.clone().requires_grad_()
        error = (prediction - target).square()
        if of_video:
            recovered = scheduler.get_velocity(prediction, noisy, timesteps)
            weight = 1 / (1 - scheduler.alphas_cumprod)
            error = weight.view(-1, 1, 1, 1, 1) * (recovered - latents).square()
        error.mean().backward()
        results.append((error.detach(), prediction.grad))
    torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-12)


def test_a_scheduler_step_with_the_velocity_recovers_the_video():
    scheduler = CogVideoXDDIMScheduler(**PUBLISHED)
    scheduler.set_timesteps(50)
    process = VPrediction.from_config(scheduler.config)
    latents, noise = draw(1, 2, 3, 4, 4), draw(1, 2, 3, 4, 4, seed=1)
    for timestep in scheduler.timesteps[[0, 10, 49]]:
        noisy = process.add_noise(latents, noise, timestep[None])
        velocity = process.velocity(latents, noise, timestep[None])
        found = scheduler.step(velocity, int(timestep), noisy).pred_original_sample
        torch.testing.assert_close(found, latents, rtol=0, atol=1e-5)


def test_bfloat16_latents_get_their_noise_at_every_timestep():
    """In bfloat16 the schedule itself has timesteps without any: rounding makes alpha-bar 1."""
    process, timesteps = VPrediction(), torch.arange(1000)
    latents, noise = torch.zeros(1000, 1, 1, 1, 1).bfloat16(), torch.ones(1000, 1, 1, 1, 1).bfloat16()
    noisy = process.add_noise(latents, noise, timesteps)
    assert noisy.dtype == torch.float32 and (noisy > 0.02).all() and (noisy.diff(dim=0) > 0).all()
    scheduler = CogVideoXDDIMScheduler(**(PUBLISHED | {"snr_shift_scale": 1.0}))
    assert (scheduler.add_noise(latents, noise, timesteps) == 0).sum() == 2


def test_timesteps_of_v_prediction_are_integers_that_u_falls_into():
    process = VPrediction()
    timesteps = process.sample_timesteps(torch.tensor([0.0, 0.0005, 0.001, 0.5, 0.9995, 1.0]))
    assert timesteps.tolist() == [0, 0, 1, 500, 999, 999] and timesteps.dtype == torch.int64
    counts = torch.bincount(process.sample_timesteps(grid(4000)), minlength=1000)
    assert (counts - 4).abs().max() <= 1  # float32 rounds a few numbers over an edge
    for scheme in ("logit_normal", "shifted"):
        options = {"scheme": scheme, "shift": 3.0}
        found = process.sample_timesteps(grid(200), **options)
        assert torch.equal(found, FLOW.sample_timesteps(grid(200), **options).floor().long())


def test_timesteps_that_are_no_integers_are_rejected():
    latents = torch.zeros(SHAPE)
    for method in (VPrediction().add_noise, VPrediction().velocity):
        with pytest.raises(ValueError, match="must be integers"):
            method(latents, latents, torch.full((5,), 500.0))
        with pytest.raises(ValueError, match="`timesteps` shape"):
            method(latents, latents, torch.tensor([500]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prediction_type": "epsilon"}, "'prediction_type': 'epsilon'"),
        ({"beta_schedule": "linear"}, "'beta_schedule': 'linear'"),
        ({"trained_betas": [0.1]}, "'trained_betas'"),
        ({"snr_shift_scale": ...}, r"lacks \['snr_shift_scale'\]"),
    ],
)
def test_schedulers_of_another_kind_are_refused(changes, message):
    config = {name: value for name, value in (PUBLISHED | changes).items() if value is not ...}
    with pytest.raises(ValueError, match=message):
        VPrediction.from_config(config)


def test_both_processes_answer_alike():
    """`NoiseProcess` is all that trainers know."""
    processes: list[NoiseProcess] = [FlowMatching(), VPrediction()]
    latents, noise = draw(*SHAPE), draw(*SHAPE, seed=1)
    for process in processes:
        timesteps = process.sample_timesteps(torch.rand(5, generator=torch.Generator().manual_seed(0)))
        noisy, velocity = process.add_noise(latents, noise, timesteps), process.velocity(latents, noise, timesteps)
        assert noisy.dtype == velocity.dtype == torch.float32 and noisy.shape == velocity.shape == SHAPE


@pytest.mark.parametrize("process", [FLOW, VPrediction()], ids=["flow", "v"])
def test_latents_and_noise_come_back_from_noisy_latents_and_velocity(process: NoiseProcess):
    latents, noise = draw(*SHAPE, dtype=torch.float64), draw(*SHAPE, seed=1, dtype=torch.float64)
    timesteps = process.sample_timesteps(torch.linspace(0.05, 0.95, 5, dtype=torch.float64))
    noisy, velocity = process.add_noise(latents, noise, timesteps), process.velocity(latents, noise, timesteps)
    for got, expected in zip(process.separate(noisy, velocity, timesteps), (latents, noise), strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)


def test_weights_by_noise_level_are_their_formulas():
    timesteps = torch.tensor([0, 250, 500, 999])
    for weight, timestep in zip(loss_weights(FLOW, timesteps, "cosmap").tolist(), timesteps.tolist(), strict=True):
        level = timestep / 1000
        assert weight == pytest.approx(2 / (math.pi * (1 - 2 * level + 2 * level**2)), rel=1e-6)
    process = VPrediction()
    ones = torch.ones(4, 1, 1, 1, 1, dtype=torch.float64)
    signal, noise = (process.add_noise(a * ones, b * ones, timesteps).flatten() for a, b in ((1, 0), (0, 1)))
    expected = [
        min((s / n) ** 2, 5) / ((s / n) ** 2 + 1) for s, n in zip(signal.tolist(), noise.tolist(), strict=True)
    ]
    assert loss_weights(process, timesteps, "min_snr").tolist() == pytest.approx(expected, rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_bell_weights_are_their_formula_with_mean_1_over_the_levels_that_are_drawn(shift: float):
    def bell(level: float) -> float:
        return math.exp(-2 * (level - 0.5) ** 2) - math.exp(-0.5)

    drawn = [shift * u / (1 + (shift - 1) * u) for u in (k / 1000 for k in range(1, 1001))]
    levels = torch.tensor([0.0, 0.1, 0.5, 0.8, 1.0], dtype=torch.float64)
    mean = sum(map(bell, drawn)) / 1000
    assert bell_weights(levels, shift=shift).tolist() == pytest.approx([bell(v) / mean for v in levels.tolist()], 1e-6)
