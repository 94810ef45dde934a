"""What is special to HunyuanVideo from an image: prompts that are encoded with a first frame, and cut behind it."""

import pytest
import torch

from tests.models.test_every_family import call_of, compare_step
from tests.support.models.calls import image, recorded_calls
from tests.support.tiny import MAX_SEQUENCE_LENGTH, PROMPTS, tiny_hunyuan_i2v_pipeline, tiny_hunyuan_pipeline
from video_trl.models import family_of


LONG = " ".join(PROMPTS)  # of 32 tokens, where 16 are read


@pytest.fixture(scope="module")
def pipeline():
    return tiny_hunyuan_i2v_pipeline()


def encoded(pipeline, prompts, images):
    return family_of(pipeline).encode_prompt_with_image(pipeline, prompts, images, MAX_SEQUENCE_LENGTH)


def test_a_prompt_is_another_one_before_another_image(pipeline):
    one, two, other = encoded(pipeline, [PROMPTS[0], PROMPTS[0], PROMPTS[1]], [image(0), image(1), image(0)])
    assert len(one["prompt_embeds"]) == len(PROMPTS[0].split()) + 1  # and the line break behind the template
    assert not torch.allclose(one["prompt_embeds"], two["prompt_embeds"], atol=1e-4)
    assert not torch.allclose(one["image_embeds"], two["image_embeds"], atol=1e-4)
    assert torch.equal(one["pooled_prompt_embeds"], two["pooled_prompt_embeds"])
    assert torch.equal(one["image_embeds"], other["image_embeds"])  # which stands before the words


def test_prompts_that_are_too_long_are_cut_as_the_pipeline_cuts_one(pipeline):
    """Of several together it takes another part of the template for the end."""
    family = family_of(pipeline)
    together = encoded(pipeline, [LONG, LONG + PROMPTS[0]], [image(0), image(0)])
    assert [len(row["prompt_embeds"]) for row in together] == [MAX_SEQUENCE_LENGTH - 4] * 2
    conditions = family.pad_prompts(together[:1], MAX_SEQUENCE_LENGTH) | family.encode_image(pipeline, [image(0)], 5)
    with recorded_calls(pipeline.transformer) as calls, torch.no_grad():
        call = call_of("hunyuan-i2v", family, pipeline)
        pipeline(prompt=LONG, num_inference_steps=1, generator=torch.Generator().manual_seed(0), **call)
    ((kwargs, expected),) = calls
    compare_step(family, pipeline.transformer, kwargs["hidden_states"], conditions, kwargs, expected)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"image_condition_type": "latent_concat", "in_channels": 9},
            "throws the first four frames.*HunyuanVideo-I2V`",
        ),
        ({"in_channels": 8}, "takes 8 channels and returns 4.*control models are not supported"),
    ],
)
def test_other_inputs_of_a_transformer_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        family_of(tiny_hunyuan_pipeline(**config))


def test_a_transformer_that_is_told_no_guidance_is_not_told_one():
    family = family_of(tiny_hunyuan_pipeline(image_condition_type="token_replace", guidance_embeds=False))
    assert (family.name, family.guidance) == ("hunyuan-i2v", None)
