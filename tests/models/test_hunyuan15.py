"""What is special to HunyuanVideo-1.5: quoted words, prompts that are cut, and checkpoints of few steps."""

import pytest
import torch

from tests.models.test_every_family import call_of, compare_step, conditions_of
from tests.support.models.calls import recorded_calls
from tests.support.tiny import PROMPTS, tiny_hunyuan15_pipeline, tiny_latents_shape
from video_trl.models import family_of


QUOTING = 'a red ball with the word "left" on it'


@pytest.fixture(scope="module")
def pipeline():
    return tiny_hunyuan15_pipeline()


def test_quoted_words_reach_the_transformer_as_in_the_pipeline(pipeline):
    family = family_of(pipeline)
    conditions = conditions_of("hunyuan1.5-t2v", family, pipeline, [QUOTING])
    assert 0 < conditions["prompt_mask_2"].sum() < 20
    with recorded_calls(pipeline.transformer) as calls, torch.no_grad():
        call = call_of("hunyuan1.5-t2v", family, pipeline)
        pipeline(prompt=QUOTING, num_inference_steps=1, generator=torch.Generator().manual_seed(0), **call)
    ((kwargs, expected),) = calls
    # Embeddings of the padding, which the pipeline hands on and the transformer replaces, are not stored.
    kwargs["encoder_hidden_states_2"] = (
        kwargs["encoder_hidden_states_2"] * kwargs["encoder_attention_mask_2"][..., None]
    )
    compare_step(family, pipeline.transformer, kwargs["hidden_states"][:, :4], conditions, kwargs, expected)


def test_prompts_with_and_without_quoted_words_share_a_batch(pipeline):
    family = family_of(pipeline)
    encoded = family.encode_prompt(pipeline, [QUOTING, PROMPTS[0]], 16)
    assert [len(row["prompt_embeds_2"]) > 0 for row in encoded] == [True, False]
    batch = family.pad_prompts(encoded, 16)
    latents = torch.randn(2, *tiny_latents_shape("hunyuan1.5-t2v"), generator=torch.Generator().manual_seed(0))
    timesteps = torch.tensor([300.0, 700.0])
    with torch.no_grad():
        together = family.predict(pipeline.transformer, latents, timesteps, batch)
        for row in range(2):
            one = {name: values[row : row + 1] for name, values in batch.items()}
            alone = family.predict(pipeline.transformer, latents[row : row + 1], timesteps[row : row + 1], one)
            torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-4, atol=1e-5)


def test_a_longer_prompt_is_cut_to_what_a_shorter_one_would_be(pipeline):
    family = family_of(pipeline)
    (whole,), (cut,) = (family.encode_prompt(pipeline, [PROMPTS[3]], length) for length in (16, 4))
    assert len(cut["prompt_embeds"]) == 4 < len(whole["prompt_embeds"])
    assert torch.equal(cut["prompt_embeds"], whole["prompt_embeds"][:4])


def test_a_transformer_of_few_steps_is_refused():
    pipeline = tiny_hunyuan15_pipeline()
    pipeline.transformer.register_to_config(use_meanflow=True)
    with pytest.raises(ValueError, match="distilled to few steps.*Use the checkpoint that is not distilled"):
        family_of(pipeline)
