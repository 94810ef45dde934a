"""The shift at which a scheduler samples, as the families read it from its configuration."""

import math

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from tests.support.tiny import tiny_wan_pipeline
from video_trl import VideoSFTConfig
from video_trl.diffusion import noise_levels
from video_trl.models import WanFamily
from video_trl.trainer.setup.rows import shift_for_sizes


FAMILY = WanFamily()  # as every family reads it, by default


def test_a_static_shift_is_the_schedulers():
    flow_unipc = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    assert FAMILY.flow_shift(flow_unipc.config, 100) == 3.0
    assert FAMILY.flow_shift(FlowMatchEulerDiscreteScheduler(shift=7.0).config, 100) == 7.0
    assert FAMILY.flow_shift({}, 100) is None


@pytest.mark.parametrize("tokens", [256, 1024, 3000, 8000])
@pytest.mark.parametrize("kind", ["exponential", "linear"])
def test_a_dynamic_shift_gives_the_levels_that_the_scheduler_samples_at(tokens, kind):
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, base_image_seq_len=1024, time_shift_type=kind
    )
    mu = 0.95 + (2.05 - 0.95) * (tokens - 1024) / (4096 - 1024)  # as LTXPipeline computes it
    sigmas = np.linspace(1.0, 0.1, 10)
    scheduler.set_timesteps(sigmas=sigmas, mu=mu)
    shift = FAMILY.flow_shift(scheduler.config, tokens)
    ours = noise_levels(torch.from_numpy(sigmas), scheme="shifted", shift=shift)
    torch.testing.assert_close(ours, scheduler.sigmas[:-1], rtol=1e-6, atol=1e-7)
    assert kind == "linear" or shift == pytest.approx(math.exp(mu))


def test_a_dynamic_shift_of_several_sizes_is_refused(tmp_path, tiny_dynamic_pipeline):
    args = VideoSFTConfig(output_dir=str(tmp_path), timestep_sampling="shifted", use_cpu=True)
    large, small = (4, 4, 64, 64), (4, 1, 32, 32)  # 4096 and 256 tokens
    models = (tiny_dynamic_pipeline, FAMILY, tiny_dynamic_pipeline.transformer)
    assert shift_for_sizes(args, *models, {large}) == pytest.approx(math.exp(1.15))
    with pytest.raises(ValueError, match=r"the videos have \[256, 4096\].*Set `timestep_shift`"):
        shift_for_sizes(args, *models, {large, small})


@pytest.fixture
def tiny_dynamic_pipeline():
    pipeline = tiny_wan_pipeline()
    pipeline.register_modules(scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True))
    return pipeline
