"""`WanImageToVideoFamily` against the real `WanImageToVideoPipeline` at tiny size."""

import pytest
import torch
from diffusers import WanImageToVideoPipeline
from torch import Tensor

from tests.support import rounding
from tests.support.models.calls import image, recorded_calls
from tests.support.tiny import (
    IMAGE_TOKENS,
    LATENTS_SHAPE,
    PROMPTS,
    TEXT_DIM,
    tiny_transformer,
    tiny_wan_i2v_pipeline,
)
from video_trl.models import WanFamily, WanImageToVideoFamily, family_for
from video_trl.models.wan import PROMPT_TOKENS_WITH_IMAGE


CALL = {
    "image": image(),
    "height": 32,
    "width": 32,
    "num_frames": 5,
    "num_inference_steps": 3,
    "guidance_scale": 1.0,
    "max_sequence_length": PROMPT_TOKENS_WITH_IMAGE,
    "output_type": "latent",
}


@pytest.fixture(scope="module", params=[True, False], ids=["image-encoder", "without"])
def pipeline(request) -> WanImageToVideoPipeline:
    return tiny_wan_i2v_pipeline(image_encoder=request.param)


@pytest.fixture(scope="module")
def family(pipeline) -> WanImageToVideoFamily:
    return family_for(pipeline.transformer, pipeline.scheduler)


def conditions_of(family, pipeline, prompts: list[str]) -> dict[str, Tensor]:
    encoded = family.encode_prompt(pipeline, prompts, PROMPT_TOKENS_WITH_IMAGE)
    images = family.encode_image(pipeline, [image()], 5)
    expanded = {name: values.expand(len(prompts), *values.shape[1:]) for name, values in images.items()}
    return {**family.pad_prompts(encoded, PROMPT_TOKENS_WITH_IMAGE), **expanded}


def test_adapter_is_found_by_the_inputs_of_the_transformer(pipeline, family):
    assert type(family) is WanImageToVideoFamily and type(pipeline).__name__ in family.pipeline_classes
    assert ("image_embeds" in family.condition_columns) == (pipeline.image_encoder is not None)
    assert type(family_for(tiny_transformer())) is WanFamily


@pytest.mark.parametrize(
    "config",
    [
        {"in_channels": 8},  # the form of video-to-video and control models
        {"in_channels": 16, "image_dim": 16, "added_kv_proj_dim": 24},  # control beside a first frame
        {"in_channels": 12, "image_dim": 16, "added_kv_proj_dim": 24, "pos_embed_seq_len": 10},  # first and last frame
        {"image_dim": 16, "added_kv_proj_dim": 24},
    ],
)
def test_other_forms_of_wan_are_refused(config):
    with pytest.raises(ValueError, match=r"neither Wan's text-to-video nor its \(first frame\) image-to-video"):
        family_for(tiny_transformer(**config))


def test_predict_is_the_transformer_call_of_the_pipeline(pipeline, family):
    """Bit-equal in every denoising step: mask, first frame, image and prompt embeddings, and the prediction."""
    with recorded_calls(pipeline.transformer) as calls, torch.no_grad():
        pipeline(prompt=list(PROMPTS[:2]), **CALL)
    conditions = conditions_of(family, pipeline, list(PROMPTS[:2]))
    assert len(calls) == 3
    for kwargs, expected in calls:
        noisy = kwargs["hidden_states"][:, :4]
        with recorded_calls(pipeline.transformer) as ours, torch.no_grad():
            velocity = family.predict(pipeline.transformer, noisy, kwargs["timestep"].float(), conditions)
        ((own, _),) = ours
        assert torch.equal(own["hidden_states"], kwargs["hidden_states"])
        assert torch.equal(own["encoder_hidden_states"], kwargs["encoder_hidden_states"])
        if pipeline.image_encoder is None:
            assert own["encoder_hidden_states_image"] is kwargs["encoder_hidden_states_image"] is None
        else:
            assert torch.equal(own["encoder_hidden_states_image"], kwargs["encoder_hidden_states_image"])
        assert torch.equal(velocity, expected)


def test_the_mask_marks_all_pixel_frames_of_the_first_latent_frame(pipeline, family):
    noisy = torch.randn(1, *LATENTS_SHAPE, generator=torch.Generator().manual_seed(0))
    with recorded_calls(pipeline.transformer) as calls, torch.no_grad():
        family.predict(pipeline.transformer, noisy, torch.tensor([3.0]), conditions_of(family, pipeline, ["a ball"]))
    mask = calls[0][0]["hidden_states"][:, 4:8]
    assert mask.shape == (1, 4, 2, 4, 4) and (mask[:, :, 0] == 1).all() and not mask[:, :, 1:].any()


def test_predict_depends_on_each_sample_s_own_conditions(pipeline, family):
    latents = torch.randn(2, *LATENTS_SHAPE, generator=torch.Generator().manual_seed(0))
    timesteps, conditions = torch.tensor([100.0, 900.0]), conditions_of(family, pipeline, list(PROMPTS[:2]))
    generator = torch.Generator().manual_seed(1)
    conditions = {name: values + torch.randn(values.shape, generator=generator) for name, values in conditions.items()}
    with torch.no_grad():
        together = family.predict(pipeline.transformer, latents, timesteps, conditions)
        for row in range(2):
            one = slice(row, row + 1)
            own = {name: values[one] for name, values in conditions.items()}
            alone = family.predict(pipeline.transformer, latents[one], timesteps[one], own)
            rounding.assert_close(together[one], alone, rounding.SINGLE)
        for name, values in conditions.items():
            changed = family.predict(pipeline.transformer, latents, timesteps, conditions | {name: values.flip(0)})
            assert not torch.allclose(together, changed, atol=1e-4), name


def test_prompts_are_512_tokens_beside_image_embeddings(pipeline, family):
    """With 16, the transformer would take the image's tokens for words and leave its projections for images unused."""
    noisy, conditions = torch.zeros(1, *LATENTS_SHAPE), conditions_of(family, pipeline, ["a ball"])
    if pipeline.image_encoder is None:
        assert family.prompt_length(pipeline.transformer) is None
        return
    assert family.prompt_length(pipeline.transformer) == 512
    family.predict(pipeline.transformer, noisy, torch.tensor([3.0]), conditions).sum().backward()
    assert pipeline.transformer.blocks[0].attn2.add_k_proj.weight.grad.any()
    pipeline.transformer.zero_grad()
    short = conditions | {"prompt_embeds": conditions["prompt_embeds"][:, :16]}
    with pytest.raises(ValueError, match="padded to 512 tokens beside image embeddings, got 16"):
        family.predict(pipeline.transformer, noisy, torch.tensor([3.0]), short)


def test_conditions_of_a_batch_are_those_of_each_image(pipeline, family):
    images = [image(0), image(1)]
    together = family.encode_image(pipeline, images, 5)
    assert together["first_frame_latents"].shape == (2, *LATENTS_SHAPE)
    assert not any(values.requires_grad for values in together.values())
    if pipeline.image_encoder is not None:
        assert together["image_embeds"].shape == (2, IMAGE_TOKENS, TEXT_DIM)
    for row, one in enumerate(images):
        for name, values in family.encode_image(pipeline, [one], 5).items():
            rounding.assert_close(together[name][row], values[0], rounding.SINGLE)


def test_the_image_shows_in_the_later_latent_frames(pipeline, family):
    """That is why all of them are stored: the VAE is causal, and grey frames follow the image."""
    first, second = family.encode_image(pipeline, [image(0), image(1)], 5)["first_frame_latents"]
    assert not torch.allclose(first[:, 1], second[:, 1], atol=1e-3)


def test_latents_have_the_channels_of_the_output(pipeline, family):
    family.check_latents(pipeline.transformer, LATENTS_SHAPE)
    assert family.token_grid(pipeline.transformer, LATENTS_SHAPE) == (2, 2, 2)
    with pytest.raises(ValueError, match="must have 4 channels for this transformer, got 12"):
        family.check_latents(pipeline.transformer, (12, 2, 4, 4))
