"""What holds for every family: each test runs on every entry of `TINY_FAMILIES`."""

import inspect
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders import vae
from torch import Tensor, nn

from tests.support.models.calls import image, pixels, recorded_calls
from tests.support.tiny import MAX_SEQUENCE_LENGTH, PROMPTS, TINY_FAMILIES, tiny_latents_shape, tiny_pipeline
from video_trl.cli.dry_run import latents_shape
from video_trl.models import (
    ModelFamily,
    experts_of,
    family_of,
    lora_targets,
    pipeline_index,
    supported_pipelines,
    tap_block,
)
from video_trl.models.base import FRAME_RATE, weights_dtype


@pytest.fixture(scope="module", params=TINY_FAMILIES)
def name(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def pipeline(name) -> Any:
    return tiny_pipeline(name)


@pytest.fixture(scope="module")
def family(pipeline) -> ModelFamily:
    return family_of(pipeline)


def prompt_length(family: ModelFamily, pipeline: Any) -> int:
    return family.prompt_length(pipeline.transformer) or MAX_SEQUENCE_LENGTH


def call_of(name: str, family: ModelFamily, pipeline: Any) -> dict[str, Any]:
    tiny = TINY_FAMILIES[name]
    call = {"num_frames": tiny.frames, "height": tiny.side, "width": tiny.side, "output_type": "latent"}
    call |= {"max_sequence_length": prompt_length(family, pipeline), **tiny.call}
    takes = inspect.signature(pipeline.__call__).parameters
    call = {name: value for name, value in call.items() if name in takes}
    return call | ({"image": image(height=tiny.side, width=tiny.side)} if family.image_columns else {})


def conditions_of(name: str, family: ModelFamily, pipeline: Any, prompts: list[str]) -> dict[str, Tensor]:
    tiny, length = TINY_FAMILIES[name], prompt_length(family, pipeline)
    first = image(height=tiny.side, width=tiny.side)
    encoded = family.encode_prompt_with_image(pipeline, prompts, [first] * len(prompts), length)
    conditions = family.pad_prompts(encoded, length)
    images = family.encode_image(pipeline, [first], tiny.frames)
    assert set(images) == set(family.image_columns)
    conditions |= {column: values.expand(len(prompts), *values.shape[1:]) for column, values in images.items()}
    if FRAME_RATE in family.condition_columns:
        conditions[FRAME_RATE] = torch.full((len(prompts),), 8.0)
    assert set(conditions) == set(family.condition_columns)
    return conditions


def test_the_family_knows_its_pipeline(name, pipeline, family):
    assert type(pipeline).__name__ in family.pipeline_classes
    assert set(family.pipeline_classes) <= set(supported_pipelines())
    assert bool(family.image_columns) == name.endswith("i2v")
    tiny = TINY_FAMILIES[name]
    family.check_video(pipeline.vae, (tiny.frames, tiny.side, tiny.side))
    assert family.frames_per_latent == family.compression(pipeline.vae)[0]
    rules = family.generation_rules(pipeline_index(pipeline), pipeline.transformer.config)
    assert tiny.side % rules.side_multiple == 0


def test_the_dtype_is_the_transformers_own(pipeline):
    made = type(pipeline.transformer).from_config(pipeline.transformer.config)
    made.to(torch.bfloat16)
    for kept in made._keep_in_fp32_modules or ():
        for name, weight in made.named_parameters():
            weight.data = weight.data.float() if kept in name else weight.data
    assert weights_dtype(made) == made.dtype == torch.bfloat16
    assert weights_dtype(nn.DataParallel(pipeline.transformer)) == pipeline.transformer.dtype


def test_the_shape_of_latents_is_known_without_the_video(name, pipeline, family):
    tiny, vae = TINY_FAMILIES[name], pipeline.vae
    size = (2 * tiny.frames - 1, tiny.side, 2 * tiny.side)
    with torch.device("meta"):
        empty, video = type(vae).from_config(vae.config), torch.empty(1, 3, *size)
    assert latents_shape(family, empty, size) == tuple(family.encode_video(empty, video).shape[1:])


def test_predict_is_the_transformer_call_of_the_pipeline(name, pipeline, family, monkeypatch):
    """Every tensor that reaches the transformer in a denoising step, and what it predicts, bit for bit."""
    # Where a pipeline draws the first frame from the posterior of the VAE, training takes its mode.
    mode = vae.DiagonalGaussianDistribution.mode
    monkeypatch.setattr(vae.DiagonalGaussianDistribution, "sample", lambda posterior, generator=None: mode(posterior))
    experts = experts_of(pipeline_index(pipeline))
    transformers = [pipeline.components[expert.component] for expert in experts] or [pipeline.transformer]
    conditions = conditions_of(name, family, pipeline, [PROMPTS[0]])
    generator = torch.Generator().manual_seed(0)
    with ExitStack() as stack, torch.no_grad():
        recorded = [stack.enter_context(recorded_calls(transformer)) for transformer in transformers]
        pipeline(prompt=PROMPTS[0], num_inference_steps=2, generator=generator, **call_of(name, family, pipeline))
    tiny = TINY_FAMILIES[name]
    recorded = [[call for call in calls if tiny.is_ours(call[0])] for calls in recorded]
    assert sum(map(len, recorded)) == 2 and all(recorded)
    for number, (transformer, calls) in enumerate(zip(transformers, recorded, strict=True)):
        for kwargs, expected in calls:
            noisy = tiny.noisy(kwargs)
            compare_step(family, transformer, noisy, conditions, kwargs, expected, tiny.of_others)
            if experts:  # each within its own timesteps
                assert experts[number].low <= kwargs["timestep"] <= experts[number].high


def compare_step(family, transformer, noisy, conditions, kwargs, expected, of_others=()) -> None:
    timesteps = kwargs["timestep"]
    timesteps = (timesteps if timesteps.ndim == 1 else timesteps.amax(dim=1)).to(family_dtype(family))
    with recorded_calls(transformer) as ours, torch.no_grad():
        family.predict(transformer, noisy, timesteps, conditions)
    ((own, velocity),) = ours
    assert set(own) - {"return_dict"} <= set(kwargs)
    for argument, value in own.items():
        theirs = kwargs[argument]
        if argument in of_others:
            continue
        if argument == "timestep" and value.shape != theirs.shape:  # one a video where all tokens have the same
            theirs = theirs[:, 0] if theirs.ndim == 2 and (theirs == theirs[:, :1]).all() else theirs
        if argument == "encoder_hidden_states" and "prompt_mask" in conditions:  # what is masked may be anything
            value, theirs = (each[own["encoder_attention_mask"].bool()] for each in (value, theirs))
        assert_same(value, theirs, argument)
    if kwargs["timestep"].ndim == own["timestep"].ndim:
        assert torch.equal(velocity, expected)
    else:  # the same numbers, rounded otherwise, for one timestep a token
        torch.testing.assert_close(velocity, expected, rtol=1e-5, atol=2e-6)


def family_dtype(family: ModelFamily) -> torch.dtype:
    """Of timesteps in training."""
    return family.noise_process.sample_timesteps(torch.tensor([0.5])).dtype


def assert_same(ours: Any, theirs: Any, argument: str) -> None:
    if isinstance(ours, tuple):
        assert len(ours) == len(theirs), argument
        for a, b in zip(ours, theirs, strict=True):
            assert_same(a, b, argument)
    elif isinstance(ours, Tensor):
        theirs = torch.as_tensor(theirs).to(ours.dtype)
        assert torch.equal(ours.squeeze() if theirs.ndim == 0 else ours, theirs), argument
    else:
        assert ours == theirs or argument == "return_dict", argument


def test_predict_gives_a_velocity_of_the_shape_of_the_latents_that_depends_on_each_condition(name, pipeline, family):
    shape = tiny_latents_shape(name)
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, *shape, generator=generator)
    timesteps = family.noise_process.sample_timesteps(torch.tensor([0.4, 0.7]))
    conditions = conditions_of(name, family, pipeline, list(PROMPTS[:2]))
    with torch.no_grad():
        together = family.predict(pipeline.transformer, latents, timesteps, conditions)
        assert together.shape == latents.shape
        for row in range(2):
            one = slice(row, row + 1)
            alone = family.predict(
                pipeline.transformer,
                latents[one],
                timesteps[one],
                {key: values[one] for key, values in conditions.items()},
            )
            torch.testing.assert_close(together[one], alone, rtol=1e-4, atol=1e-5)
        swapped = conditions | {key: conditions[key].flip(0) for key in conditions if "prompt" in key}
        assert not torch.allclose(
            together, family.predict(pipeline.transformer, latents, timesteps, swapped), atol=1e-6
        )


def test_given_frames_are_not_looked_at(name, pipeline, family):
    shape, given = tiny_latents_shape(name), family.given_frames
    generator = torch.Generator().manual_seed(2)
    latents = torch.randn(1, *shape, generator=generator)
    timesteps = family.noise_process.sample_timesteps(torch.tensor([0.4]))
    conditions = conditions_of(name, family, pipeline, [PROMPTS[0]])
    other = latents.clone()
    other[:, :, : given or 1] += 1
    with torch.no_grad():
        one, two = (
            family.predict(pipeline.transformer, each, timesteps, conditions)[:, :, given:]
            for each in (latents, other)
        )
    assert torch.equal(one, two) == bool(given)


def test_conditions_have_the_shapes_that_plans_are_made_with(name, pipeline, family):
    conditions = conditions_of(name, family, pipeline, [PROMPTS[0]])
    length = prompt_length(family, pipeline)
    shapes = family.condition_shapes(pipeline.transformer, tiny_latents_shape(name), length)
    assert set(shapes) == set(family.condition_columns)
    for column, shape in shapes.items():
        if column != "image_embeds":  # as many tokens as the published encoder makes
            assert tuple(conditions[column].shape[1:]) == tuple(shape), column


def test_decoding_is_the_inverse_of_encoding_up_to_the_vae(name, pipeline, family):
    """Latents of the size that the family says, and the pipeline's decoding of them."""
    tiny = TINY_FAMILIES[name]
    latents = family.encode_video(pipeline.vae, pixels(1, num_frames=tiny.frames, height=tiny.side, width=tiny.side))
    assert latents.shape[1:] == tiny_latents_shape(name) and latents.dtype == torch.float32
    video = family.decode_latents(pipeline.vae, latents)
    assert video.shape == (1, 3, tiny.frames, tiny.side, tiny.side) and video.dtype == torch.float32
    assert torch.equal(
        latents,
        family.encode_video(pipeline.vae, pixels(1, num_frames=tiny.frames, height=tiny.side, width=tiny.side)),
    )


def test_tokens_are_those_of_every_block(name, pipeline, family):
    shape = tiny_latents_shape(name)
    conditions = conditions_of(name, family, pipeline, [PROMPTS[0]])
    frames, height, width = family.token_grid(pipeline.transformer, shape)
    timesteps = family.noise_process.sample_timesteps(torch.tensor([0.4]))
    for index in range(len(family.blocks(pipeline.transformer))):
        with tap_block(family, pipeline.transformer, index) as tap, torch.no_grad():
            family.predict(pipeline.transformer, torch.ones(1, *shape), timesteps, conditions)
        assert tap.tokens.shape[:2] == (1, frames * height * width)


def test_idle_weights_are_those_without_a_gradient(name, pipeline, family):
    """Of a random output, with which no weight has a gradient of zeros by chance."""
    transformer, shape = pipeline.transformer, tiny_latents_shape(name)
    conditions = conditions_of(name, family, pipeline, ['a ball with the word "red" on it'])
    timesteps = family.noise_process.sample_timesteps(torch.tensor([0.4]))
    generator = torch.Generator().manual_seed(3)
    latents, weights = (torch.randn(1, *shape, generator=generator) for _ in range(2))
    transformer.zero_grad()
    (family.predict(transformer, latents, timesteps, conditions) * weights).sum().backward()
    idle = {each for each, weight in transformer.named_parameters() if weight.grad is None or not weight.grad.any()}
    transformer.zero_grad()
    assert family.idle_weights(transformer) == idle


def test_adapters_of_all_linear_layers_are_within_the_blocks_and_none_is_idle(name, pipeline, family):
    transformer = pipeline.transformer
    targets = lora_targets(family, transformer, "all-linear")
    linear = [(each, layer) for each, layer in transformer.named_modules() if isinstance(layer, nn.Linear)]
    adapted = {each for each, _ in linear if any(f".{each}".endswith(f".{target}") for target in targets)}
    inside = {layer for block in family.blocks(transformer) for layer in block.modules()}
    idle = {weight.rpartition(".")[0] for weight in family.idle_weights(transformer)}
    assert adapted == {each for each, layer in linear if layer in inside} - idle
