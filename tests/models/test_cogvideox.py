"""The CogVideoX adapters against the real pipelines at tiny size: what a pipeline does is what is trained."""

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel, DiffusionPipeline
from torch import Tensor, nn

from tests.support import rounding
from tests.support.models.calls import image, pixels, recorded_calls
from tests.support.tiny import (
    COGVIDEOX_LATENTS_SHAPE,
    MAX_SEQUENCE_LENGTH,
    PROMPTS,
    TEXT_DIM,
    tiny_cogvideox15_i2v_pipeline,
    tiny_cogvideox15_pipeline,
    tiny_cogvideox_i2v_pipeline,
    tiny_cogvideox_pipeline,
    tiny_cogvideox_scheduler,
    tiny_cogvideox_transformer,
    tiny_cogvideox_vae,
)
from video_trl.diffusion import VPrediction
from video_trl.load import DTYPE_OPTION
from video_trl.models import CogVideoXFamily, CogVideoXImageToVideoFamily, ModelFamily, family_for, tap_block


CALL = {
    "height": 32,
    "width": 32,
    "num_frames": 9,
    "num_inference_steps": 3,
    "guidance_scale": 1.0,
    "max_sequence_length": MAX_SEQUENCE_LENGTH,
    "output_type": "latent",
}
ADAPTER = CogVideoXFamily(noise_process=VPrediction())


def pipeline_2b() -> DiffusionPipeline:
    """Fixed positions instead of rotary ones, another shift and another scaling factor."""
    return tiny_cogvideox_pipeline(
        transformer=tiny_cogvideox_transformer(use_rotary_positional_embeddings=False),
        vae=tiny_cogvideox_vae(scaling_factor=1.15258426),
        scheduler=tiny_cogvideox_scheduler(snr_shift_scale=3.0),
    )


def pipeline_5b_i2v() -> DiffusionPipeline:
    """Learned positions, and a VAE whose posterior is narrow, because the pipeline draws from it."""
    return tiny_cogvideox_i2v_pipeline(vae=narrow(tiny_cogvideox_vae()))


def narrow(vae: nn.Module) -> nn.Module:
    """Logarithm of the variance -30 everywhere, the least that diffusers allows."""
    convolution = vae.encoder.conv_out.conv
    half = len(convolution.bias) // 2
    with torch.no_grad():
        convolution.weight[half:] = 0
        convolution.bias[half:] = -30
    return vae


CHECKPOINTS = {"2b": pipeline_2b, "5b": tiny_cogvideox_pipeline, "5b-i2v": pipeline_5b_i2v}


@pytest.fixture(scope="module", params=CHECKPOINTS)
def pipeline(request) -> DiffusionPipeline:
    return CHECKPOINTS[request.param]()


@pytest.fixture(scope="module")
def family(pipeline) -> ModelFamily:
    return family_for(pipeline.transformer, pipeline.scheduler)


def takes_image(pipeline: DiffusionPipeline) -> bool:
    return "ImageToVideo" in type(pipeline).__name__


def conditions_of(family: ModelFamily, pipeline: DiffusionPipeline, prompts: list[str]) -> dict[str, Tensor]:
    encoded = family.encode_prompt(pipeline, prompts, MAX_SEQUENCE_LENGTH)
    images = family.encode_image(pipeline, [image()] * len(prompts), CALL["num_frames"])
    return {**family.pad_prompts(encoded, MAX_SEQUENCE_LENGTH), **images}


# --- family_for ----------------------------------------------------------------------------------------------------


def test_the_adapter_has_the_form_and_the_schedule_of_the_checkpoint(pipeline, family):
    expected = CogVideoXImageToVideoFamily if takes_image(pipeline) else CogVideoXFamily
    assert type(family) is expected and type(pipeline).__name__ in family.pipeline_classes
    assert family.noise_process.snr_shift_scale == pipeline.scheduler.config.snr_shift_scale
    assert family.prompt_length(pipeline.transformer) == MAX_SEQUENCE_LENGTH


def test_2b_and_5b_are_noised_differently():
    two, five = (
        family_for(made.transformer, made.scheduler).noise_process
        for made in (pipeline_2b(), tiny_cogvideox_pipeline())
    )
    zero, one, middle = torch.zeros(1, 1, 1, 1, 1), torch.ones(1, 1, 1, 1, 1), torch.tensor([500])
    assert two.add_noise(zero, one, middle) - five.add_noise(zero, one, middle) > 0.05


@pytest.mark.parametrize(
    ("transformer", "with_scheduler", "message"),
    [
        ({}, False, "Pass the pipeline instead of the bare transformer"),
        ({"in_channels": 5}, True, "takes 5 channels and returns 4"),
    ],
)
def test_transformers_that_cannot_be_trained_are_refused(transformer, with_scheduler, message):
    scheduler = tiny_cogvideox_scheduler() if with_scheduler else None
    with pytest.raises(ValueError, match=message):
        family_for(tiny_cogvideox_transformer(**transformer), scheduler)


# --- predict --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [{}, {"height": 48, "width": 32, "num_frames": 17}])
def test_predict_is_the_transformer_call_of_the_pipeline(pipeline, family, size):
    """Bit-equal in every denoising step, from the pipeline's own latents, timesteps, prompts and first frame."""
    if takes_image(pipeline) and size:
        pytest.skip("learned positions exist for one size")
    call = CALL | size | ({"image": [image()] * 2} if takes_image(pipeline) else {})
    with recorded_calls(pipeline.transformer) as calls, torch.no_grad():
        pipeline(prompt=list(PROMPTS[:2]), generator=torch.Generator().manual_seed(0), **call)
    conditions = conditions_of(family, pipeline, list(PROMPTS[:2]))
    assert len(calls) == 3
    for kwargs, expected in calls:
        channels = expected.shape[2]
        noisy, first = (
            kwargs["hidden_states"].transpose(1, 2).split([channels, kwargs["hidden_states"].shape[2] - 4], 1)
        )
        assert torch.equal(conditions["prompt_embeds"], kwargs["encoder_hidden_states"])
        if takes_image(pipeline):
            assert not first[:, :, 1:].any()
            rounding.assert_close(conditions["first_frame_latents"], first[:, :, :1], rounding.SINGLE)
            conditions["first_frame_latents"] = first[:, :, :1]  # as the pipeline has drawn it
        with recorded_calls(pipeline.transformer) as ours, torch.no_grad():
            velocity = family.predict(pipeline.transformer, noisy, kwargs["timestep"], conditions)
        assert torch.equal(velocity, expected.transpose(1, 2))
        assert torch.equal(ours[0][0]["hidden_states"], kwargs["hidden_states"])
        assert ours[0][0]["timestep"].dtype == kwargs["timestep"].dtype == torch.int64


def test_training_draws_timesteps_of_the_kind_that_the_pipeline_uses(pipeline, family):
    pipeline.scheduler.set_timesteps(1000)
    drawn = family.noise_process.sample_timesteps(torch.linspace(0, 1, 5000))
    assert set(drawn.tolist()) == set(pipeline.scheduler.timesteps.tolist())


def test_predict_depends_on_each_sample_s_own_timestep_and_conditions(pipeline, family):
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, *COGVIDEOX_LATENTS_SHAPE, generator=generator)
    conditions, timesteps = conditions_of(family, pipeline, list(PROMPTS[:2])), torch.tensor([100, 900])
    with torch.no_grad():
        together = family.predict(pipeline.transformer, latents, timesteps, conditions)
        for row in range(2):
            one = slice(row, row + 1)
            own = {name: values[one] for name, values in conditions.items()}
            alone = family.predict(pipeline.transformer, latents[one], timesteps[one], own)
            rounding.assert_close(together[one], alone, rounding.SINGLE)
        swapped = family.predict(pipeline.transformer, latents, timesteps.flip(0), conditions)
        assert not torch.allclose(together, swapped, atol=1e-4)
        for name, values in conditions.items():
            changed = family.predict(pipeline.transformer, latents, timesteps, conditions | {name: values + 1})
            assert not torch.allclose(together, changed, atol=1e-4), name


def test_predict_in_bfloat16(pipeline, family, tmp_path):
    pipeline.transformer.save_pretrained(tmp_path)
    transformer = CogVideoXTransformer3DModel.from_pretrained(tmp_path, **{DTYPE_OPTION: torch.bfloat16})
    with recorded_calls(transformer) as calls, torch.no_grad():
        velocity = family.predict(
            transformer,
            torch.zeros(1, *COGVIDEOX_LATENTS_SHAPE),
            torch.tensor([501]),
            conditions_of(family, pipeline, [PROMPTS[0]]),
        )
    ((kwargs, _),) = calls
    assert velocity.dtype == kwargs["hidden_states"].dtype == kwargs["encoder_hidden_states"].dtype == torch.bfloat16
    assert kwargs["timestep"].tolist() == [501]


def test_predict_runs_the_wrapper_of_distributed_training(pipeline, family):
    wrapped = nn.DataParallel(pipeline.transformer)
    arguments = (
        torch.ones(1, *COGVIDEOX_LATENTS_SHAPE),
        torch.tensor([5]),
        conditions_of(family, pipeline, ["a ball"]),
    )
    with torch.no_grad(), recorded_calls(wrapped) as calls:
        found = family.predict(wrapped, *arguments)
        assert torch.equal(found, family.predict(pipeline.transformer, *arguments))
    assert len(calls) == 1
    assert family.blocks(wrapped) is pipeline.transformer.transformer_blocks
    assert family.token_grid(wrapped, COGVIDEOX_LATENTS_SHAPE) == (3, 2, 2)


# --- videos, images and prompts -------------------------------------------------------------------------------------


def test_decode_latents_is_the_decoding_of_the_pipeline(pipeline, family):
    call = CALL | ({"image": image()} if takes_image(pipeline) else {})
    videos = {}
    for output_type in ("latent", "pt"):
        arguments = call | {"output_type": output_type, "generator": torch.Generator().manual_seed(0)}
        videos[output_type] = pipeline(prompt=PROMPTS[0], **arguments).frames
    video = family.decode_latents(pipeline.vae, videos["latent"].transpose(1, 2))
    assert video.shape == (1, 3, 9, 32, 32) and video.dtype == torch.float32
    assert torch.equal((video * 0.5 + 0.5).clamp(0, 1).transpose(1, 2), videos["pt"])


def test_encode_video_is_the_scaled_mode_of_the_posterior(pipeline, family):
    video, vae = pixels(num_frames=9), pipeline.vae
    latents = family.encode_video(vae, video)
    with torch.no_grad():
        mode = vae.encode(video).latent_dist.mean
    torch.testing.assert_close(latents, vae.config.scaling_factor * mode)
    assert latents.shape == (2, *COGVIDEOX_LATENTS_SHAPE) and latents.dtype == torch.float32
    assert torch.equal(latents, family.encode_video(vae, video)) and not latents.requires_grad
    with torch.no_grad():
        rounding.assert_close(family.decode_latents(vae, latents), vae.decode(mode).sample, rounding.SINGLE)


@pytest.mark.parametrize("inverted", [False, True])
def test_first_frame_latents_are_scaled_as_the_checkpoint_says(inverted):
    pipeline = tiny_cogvideox_i2v_pipeline(vae=narrow(tiny_cogvideox_vae(invert_scale_latents=inverted)))
    family = family_for(pipeline.transformer, pipeline.scheduler)
    with recorded_calls(pipeline.transformer) as calls, torch.no_grad():
        pipeline(image(), PROMPTS[0], **(CALL | {"num_inference_steps": 1}))
    ((kwargs, _),) = calls
    found = family.encode_image(pipeline, [image()], 9)["first_frame_latents"]
    rounding.assert_close(found, kwargs["hidden_states"].transpose(1, 2)[:, 4:, :1], rounding.SINGLE)
    alone = family.encode_video(pipeline.vae, pixels(1, num_frames=1))  # of a video that is this image
    assert torch.allclose(found, alone, atol=1e-5) != inverted  # scaled as videos are, or inversely
    # In a longer video the frames share their group normalisation, and the first one's latents are others.
    assert not torch.allclose(alone, family.encode_video(pipeline.vae, pixels(1, num_frames=9))[:, :, :1], atol=1e-3)


def test_a_bfloat16_vae_gives_float32_latents_and_videos():
    pipeline = tiny_cogvideox_i2v_pipeline()
    pipeline.vae.to(torch.bfloat16)
    family = family_for(pipeline.transformer, pipeline.scheduler)
    latents = family.encode_video(pipeline.vae, pixels(1, num_frames=1))
    first = family.encode_image(pipeline, [image()], 9)["first_frame_latents"]
    assert latents.dtype == first.dtype == family.decode_latents(pipeline.vae, latents).dtype == torch.float32


def test_embeddings_are_whole_because_the_padding_is_attended_to(pipeline, family):
    prompts = ["a red ball", PROMPTS[3], "ball " * 40]
    with torch.no_grad():
        expected, _ = pipeline.encode_prompt(
            prompts, do_classifier_free_guidance=False, max_sequence_length=MAX_SEQUENCE_LENGTH
        )
    encoded = family.encode_prompt(pipeline, prompts, MAX_SEQUENCE_LENGTH)
    embeds = [prompt["prompt_embeds"] for prompt in encoded]
    assert torch.equal(family.pad_prompts(encoded, MAX_SEQUENCE_LENGTH)["prompt_embeds"], expected)
    assert all(embed.untyped_storage().nbytes() <= expected.nbytes for embed in embeds)
    with pytest.raises(ValueError, match="attends to the padding"):
        family.pad_prompts([{"prompt_embeds": embeds[0][:4]}], MAX_SEQUENCE_LENGTH)
    with pytest.raises(ValueError, match="at least one"):
        family.pad_prompts([], MAX_SEQUENCE_LENGTH)


# --- sizes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frames", [1, 9, 25])
def test_videos_of_8k_plus_1_frames_survive_the_vae(frames):
    vae, video = tiny_cogvideox_vae(), pixels(1, num_frames=frames, height=8, width=8)
    ADAPTER.check_video(vae, (frames, 8, 8))
    latents = ADAPTER.encode_video(vae, video)
    assert latents.shape[2] == (frames - 1) // 4 + 1
    assert ADAPTER.decode_latents(vae, latents).shape == video.shape


def test_other_numbers_of_frames_come_back_as_more():
    vae = tiny_cogvideox_vae()
    with torch.no_grad():
        mode = vae.encode(pixels(1, num_frames=13, height=8, width=8)).latent_dist.mean
        assert vae.decode(mode).sample.shape[2] == 16


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((13, 32, 32), r"8 \* k \+ 1 frames for this VAE, got 13. Set `num_frames` to 9 or 17"),
        ((0, 32, 32), "got 0"),
        ((9, 36, 32), "divisible by 8 for this VAE, got 36x32. Set `height` to 32 and `width` to 32"),
        ((9, 0, 32), "divisible by 8"),
    ],
)
def test_videos_that_the_vae_would_not_keep_are_rejected(shape, message):
    vae = tiny_cogvideox_vae()
    with pytest.raises(ValueError, match=message):
        ADAPTER.check_video(vae, shape)
    with pytest.raises(ValueError, match=r"shape \(B, 3, T, H, W\)"):
        ADAPTER.encode_video(vae, torch.zeros(1, 1, 9, 32, 32))


def test_the_published_sizes_are_accepted():
    """49 frames of 480 x 720 pixels: 13 x 60 x 90 latents in 16 channels, 17550 tokens."""
    transformer = tiny_cogvideox_transformer(
        in_channels=32,
        out_channels=16,
        sample_height=60,
        sample_width=90,
        sample_frames=49,
        use_learned_positional_embeddings=True,
    )
    ADAPTER.check_video(tiny_cogvideox_vae(), (49, 480, 720))
    assert ADAPTER.token_grid(transformer, (16, 13, 60, 90)) == (13, 30, 45)
    with pytest.raises(ValueError, match=r"\(13, 60, 90\) only, got \(11, 60, 90\). Set `num_frames=49`"):
        ADAPTER.check_latents(transformer, (16, 11, 60, 90))
    with pytest.raises(ValueError, match=r"\(13, 60, 90\) only, got \(13, 60, 60\)"):
        ADAPTER.check_latents(transformer, (1, 16, 13, 60, 60))


@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((16, 3, 4, 4), "must have 4 channels for this transformer, got 16"),
        ((4, 3, 3, 4), "divisible by 2"),
        ((1, 4, 3, 4, 5), "divisible by 2"),
        ((4, 2, 4, 4), "odd number of frames"),
        ((4, 3, 0, 4), "divisible by 2"),
        ((4, 4, 4), r"shape \(C, F, H, W\) or \(B, C, F, H, W\), got \(4, 4, 4\)"),
    ],
)
def test_latents_that_the_transformer_would_not_take_are_rejected(rotary, shape, message):
    transformer = tiny_cogvideox_transformer(use_rotary_positional_embeddings=rotary)
    ADAPTER.check_latents(transformer, (4, 5, 8, 6))
    with pytest.raises(ValueError, match=message):
        ADAPTER.check_latents(transformer, shape)
    with pytest.raises(ValueError, match=message):
        ADAPTER.token_grid(transformer, shape)


# --- blocks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
def test_tap_reads_the_video_tokens_of_a_block_and_changes_nothing(pipeline, family, checkpointing):
    latents, timesteps = torch.ones(1, *COGVIDEOX_LATENTS_SHAPE), torch.tensor([400])
    conditions, transformer = conditions_of(family, pipeline, ["a ball"]), pipeline.transformer
    if checkpointing:
        transformer.enable_gradient_checkpointing()
    grads = []
    for tapped in (False, True):
        transformer.zero_grad()
        if tapped:
            with tap_block(family, transformer, 1) as tap:
                prediction = family.predict(transformer, latents, timesteps, conditions)
                (prediction.square().mean() + 0 * tap.tokens.mean()).backward()
                assert tap.tokens.shape == (1, 3 * 2 * 2, 32)
        else:
            family.predict(transformer, latents, timesteps, conditions).square().mean().backward()
        grads.append([weight.grad for weight in transformer.parameters()])
    transformer.disable_gradient_checkpointing()
    for left, right in zip(*grads, strict=True):
        assert torch.equal(left, right)


def test_lora_targets_are_the_projections_of_every_block():
    names = [name for name, module in tiny_cogvideox_transformer().named_modules() if isinstance(module, nn.Linear)]
    found = [name for name in names if any(name.endswith(f".{target}") for target in ADAPTER.lora_target_modules)]
    assert len(found) == 2 * 4 and all(".attn1." in name for name in found)


# --- CogVideoX 1.5 --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [tiny_cogvideox15_pipeline, tiny_cogvideox15_i2v_pipeline])
def test_an_odd_number_of_latent_frames_is_made_even_in_front(make):
    """The pipeline puts a frame of noise there; here it is a copy of the first one, and the image is where it was."""
    pipeline = make()
    family = family_for(pipeline.transformer, pipeline.scheduler)
    latents, timesteps = torch.randn(1, 4, 3, 4, 4), torch.tensor([400])
    embeds = torch.ones(1, MAX_SEQUENCE_LENGTH, TEXT_DIM)
    conditions = {"prompt_embeds": embeds, "first_frame_latents": latents[:, :, :1]}
    with recorded_calls(pipeline.transformer) as calls, torch.no_grad():
        velocity = family.predict(pipeline.transformer, latents, timesteps, conditions)
        padded = torch.cat([latents[:, :, :1], latents], dim=2)
        even = family.predict(pipeline.transformer, padded, timesteps, conditions)
    assert torch.equal(velocity, even[:, :, 1:]) and velocity.shape == latents.shape
    assert all(torch.equal(calls[0][0]["hidden_states"], kwargs["hidden_states"]) for kwargs, _ in calls)
    assert family.token_grid(pipeline.transformer, latents.shape) == (2, 2, 2)
    with pytest.raises(ValueError, match="no larger than 4x4"):
        family.check_latents(pipeline.transformer, (4, 3, 6, 4))
