"""`WanFamily` against the real `WanPipeline` at tiny size: what the pipeline does is what is trained."""

import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from peft import LoraConfig
from torch import Tensor, nn

from tests.support import rounding
from tests.support.models.calls import pixels, recorded_calls
from tests.support.tiny import (
    LATENTS_SHAPE,
    MAX_SEQUENCE_LENGTH,
    PROMPTS,
    TEXT_DIM,
    tiny_tokenizer,
    tiny_transformer,
    tiny_vae,
    tiny_wan_pipeline,
)
from video_trl.load import DTYPE_OPTION
from video_trl.models import ModelFamily, WanFamily, family_for, tap_block


ADAPTER = WanFamily()
CALL = {"height": 32, "width": 32, "num_frames": 5, "guidance_scale": 1.0, "max_sequence_length": MAX_SEQUENCE_LENGTH}


@pytest.fixture(scope="module")
def pipeline() -> WanPipeline:
    return tiny_wan_pipeline()


def inputs(batch: int = 2, seed: int = 0) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(batch, *LATENTS_SHAPE, generator=generator),
        1000 * torch.rand(batch, generator=generator),
        {"prompt_embeds": torch.randn(batch, MAX_SEQUENCE_LENGTH, TEXT_DIM, generator=generator)},
    )


# --- family_for ----------------------------------------------------------------------------------------------------


def test_adapter_is_found_by_the_class_of_the_transformer(pipeline):
    family: ModelFamily = family_for(pipeline.transformer)
    assert family == ADAPTER
    assert type(pipeline).__name__ in family.pipeline_classes
    assert family.noise_process.num_train_timesteps == pipeline.scheduler.config.num_train_timesteps


def test_another_class_is_rejected_by_name():
    with pytest.raises(ValueError, match="CogVideoXTransformer3DModel, .*got Linear"):
        family_for(torch.nn.Linear(1, 1))


# --- predict --------------------------------------------------------------------------------------------------------


def test_predict_is_the_transformer_call_of_the_pipeline(pipeline):
    """Bit-equal in every denoising step, from the pipeline's own latents, timesteps and prompts."""
    with recorded_calls(pipeline.transformer) as calls, torch.no_grad():
        pipeline(list(PROMPTS), num_inference_steps=3, output_type="latent", **CALL)
        prompts = ADAPTER.encode_prompt(pipeline, list(PROMPTS), MAX_SEQUENCE_LENGTH)
        conditions = ADAPTER.pad_prompts(prompts, MAX_SEQUENCE_LENGTH)
    assert len(calls) == 3
    for kwargs, expected in calls:
        timesteps = kwargs["timestep"].float()  # UniPC's are integers; training draws floats
        assert torch.equal(conditions["prompt_embeds"], kwargs["encoder_hidden_states"])
        with torch.no_grad():
            velocity = ADAPTER.predict(pipeline.transformer, kwargs["hidden_states"], timesteps, conditions)
        assert torch.equal(velocity, expected)


def test_predict_depends_on_each_sample_s_own_timestep_and_prompt(pipeline):
    latents, timesteps, conditions = inputs()
    with torch.no_grad():
        together = ADAPTER.predict(pipeline.transformer, latents, timesteps, conditions)
        for row in range(2):
            one = slice(row, row + 1)
            alone = ADAPTER.predict(
                pipeline.transformer, latents[one], timesteps[one], {"prompt_embeds": conditions["prompt_embeds"][one]}
            )
            rounding.assert_close(together[one], alone, rounding.SINGLE)
        swapped = ADAPTER.predict(pipeline.transformer, latents, timesteps.flip(0), conditions)
    assert not torch.allclose(together, swapped, atol=1e-4)


def test_padding_length_matters_because_cross_attention_has_no_mask(pipeline):
    latents, timesteps, conditions = inputs()
    prompts = [{"prompt_embeds": embeds} for embeds in conditions["prompt_embeds"][:, :5]]
    with torch.no_grad():
        short, long = (
            ADAPTER.predict(pipeline.transformer, latents, timesteps, ADAPTER.pad_prompts(prompts, length))
            for length in (8, MAX_SEQUENCE_LENGTH)
        )
    assert not torch.allclose(short, long, atol=1e-4)


def test_predict_in_bfloat16_keeps_float_timesteps(pipeline, tmp_path):
    """Loaded as users load it: a bfloat16 base whose time embedder and norms stay float32."""
    pipeline.transformer.save_pretrained(tmp_path)
    transformer = WanTransformer3DModel.from_pretrained(tmp_path, **{DTYPE_OPTION: torch.bfloat16})
    assert transformer.scale_shift_table.dtype == torch.float32
    latents, _, conditions = inputs()
    with recorded_calls(transformer) as calls, torch.no_grad():
        velocity = ADAPTER.predict(transformer, latents, torch.tensor([500.25, 501.75]), conditions)
    ((kwargs, _),) = calls
    assert velocity.dtype == kwargs["hidden_states"].dtype == torch.bfloat16
    assert kwargs["encoder_hidden_states"].dtype == torch.bfloat16
    assert kwargs["timestep"].tolist() == [500.25, 501.75]


def test_predict_of_a_wan_2_2_pipeline_with_one_timestep_a_token():
    """Wan 2.2 5B expands the timestep over the tokens; in text-to-video all are equal, so one is enough."""
    pipeline = tiny_wan_pipeline()
    pipeline.register_to_config(expand_timesteps=True)
    with recorded_calls(pipeline.transformer) as calls, torch.no_grad():
        pipeline(PROMPTS[0], num_inference_steps=1, output_type="latent", **CALL)
        ((kwargs, expected),) = calls
        assert kwargs["timestep"].shape == (1, 8)
        conditions = {"prompt_embeds": kwargs["encoder_hidden_states"]}
        velocity = ADAPTER.predict(
            pipeline.transformer, kwargs["hidden_states"], kwargs["timestep"][:, 0].float(), conditions
        )
    torch.testing.assert_close(velocity, expected)


def test_predict_runs_the_wrapper_of_distributed_training(pipeline):
    wrapped = nn.DataParallel(pipeline.transformer)
    latents, timesteps, conditions = inputs()
    with torch.no_grad():
        expected = ADAPTER.predict(pipeline.transformer, latents, timesteps, conditions)
        with recorded_calls(wrapped) as calls:
            assert torch.equal(ADAPTER.predict(wrapped, latents, timesteps, conditions), expected)
    assert len(calls) == 1  # through the wrapper, where gradients are reduced
    assert ADAPTER.blocks(wrapped) is pipeline.transformer.blocks
    assert ADAPTER.token_grid(wrapped, LATENTS_SHAPE) == (2, 2, 2)


# --- videos ---------------------------------------------------------------------------------------------------------


def test_decode_latents_is_the_decoding_of_the_pipeline(pipeline):
    latents = torch.randn(2, *LATENTS_SHAPE, generator=torch.Generator().manual_seed(0))
    embeds = torch.randn(2, MAX_SEQUENCE_LENGTH, TEXT_DIM, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        arguments = CALL | {"latents": latents, "prompt_embeds": embeds, "num_inference_steps": 2}
        final = pipeline(output_type="latent", **arguments).frames
        expected = pipeline(output_type="pt", **arguments).frames  # (B, T, 3, H, W) in [0, 1]
    video = ADAPTER.decode_latents(pipeline.vae, final)
    assert video.shape == (2, 3, 5, 32, 32) and video.dtype == torch.float32
    assert video.min() >= -1 and video.max() <= 1
    assert torch.equal((video * 0.5 + 0.5).clamp(0, 1).transpose(1, 2), expected)


def test_encode_video_is_the_normalised_mode_of_the_posterior(pipeline):
    video, vae = pixels(), pipeline.vae
    latents = ADAPTER.encode_video(vae, video)
    with torch.no_grad():
        mode = vae.encode(video).latent_dist.mean
    for channel, (mean, std) in enumerate(zip(vae.config.latents_mean, vae.config.latents_std, strict=True)):
        torch.testing.assert_close(latents[:, channel], (mode[:, channel] - mean) / std)
    assert latents.shape == (2, *LATENTS_SHAPE) and latents.dtype == torch.float32
    assert torch.equal(latents, ADAPTER.encode_video(vae, video))
    with torch.no_grad():
        rounding.assert_close(ADAPTER.decode_latents(vae, latents), vae.decode(mode).sample, rounding.SINGLE)


def test_a_bfloat16_vae_gives_float32_latents_and_videos():
    vae = tiny_vae().to(torch.bfloat16)
    latents = ADAPTER.encode_video(vae, pixels())
    assert latents.dtype == ADAPTER.decode_latents(vae, latents).dtype == torch.float32


def test_encoding_and_decoding_leave_no_graph(pipeline):
    latents = ADAPTER.encode_video(pipeline.vae, pixels())
    video = ADAPTER.decode_latents(pipeline.vae, latents.requires_grad_())
    (prompt,) = ADAPTER.encode_prompt(pipeline, [PROMPTS[0]], MAX_SEQUENCE_LENGTH)
    assert not video.requires_grad and not prompt["prompt_embeds"].requires_grad


@pytest.mark.parametrize("frames", [0, 2, 4, 6, 8])
def test_frame_counts_that_the_vae_would_cut_are_rejected(pipeline, frames):
    with pytest.raises(ValueError, match=rf"4 \* k \+ 1 frames for this VAE, got {frames}"):
        ADAPTER.check_video(pipeline.vae, (frames, 32, 32))


def test_the_way_out_of_a_wrong_video_is_a_right_one(pipeline):
    with pytest.raises(ValueError, match="Set `num_frames` to 5 or 9"):
        ADAPTER.check_video(pipeline.vae, (7, 32, 32))
    with pytest.raises(ValueError, match="Set `height` to 32 and `width` to 48"):
        ADAPTER.check_video(pipeline.vae, (5, 36, 50))
    for frames in (1, 5, 9, 81):
        ADAPTER.check_video(pipeline.vae, (frames, 32, 48))


def test_a_vae_with_milder_temporal_compression_still_reads_frames_by_four():
    """At a temporal factor of 2, three frames are one plus a chunk that is never read: the VAE drops two of them."""
    vae = tiny_vae(temperal_downsample=[False, True, False], scale_factor_temporal=2)
    with torch.no_grad():
        assert vae.encode(pixels(num_frames=3)).latent_dist.mean.shape[2] == 1
    with pytest.raises(ValueError, match=r"4 \* k \+ 1 frames"):
        ADAPTER.check_video(vae, (3, 32, 32))
    latents = ADAPTER.encode_video(vae, pixels(num_frames=5))
    assert latents.shape[2] == 3
    assert ADAPTER.decode_latents(vae, latents).shape[2] == 5


def test_a_vae_that_patchifies_as_wan_2_2_does():
    """Wan 2.2's residual VAE folds 2 x 2 pixels into channels first: 16 times in space, read from its config."""
    vae = tiny_vae(
        base_dim=8,
        is_residual=True,
        patch_size=2,
        in_channels=12,
        out_channels=12,
        scale_factor_spatial=16,
    )
    latents = ADAPTER.encode_video(vae, pixels(height=64, width=32))
    assert latents.shape == (2, 4, 2, 4, 2)
    assert ADAPTER.decode_latents(vae, latents).shape == (2, 3, 5, 64, 32)
    with pytest.raises(ValueError, match="divisible by 16 for this VAE, got 40x32"):
        ADAPTER.encode_video(vae, pixels(height=40, width=32))


@pytest.mark.parametrize("shape", [(3, 5, 32, 32), (1, 5, 3, 32, 32), (1, 4, 5, 32, 32)])
def test_videos_of_another_layout_are_rejected(pipeline, shape):
    with pytest.raises(ValueError, match=r"shape \(B, 3, T, H, W\)"):
        ADAPTER.encode_video(pipeline.vae, torch.zeros(shape))


# --- prompts --------------------------------------------------------------------------------------------------------


def test_padded_prompts_are_the_embeddings_of_the_pipeline(pipeline):
    """Whitespace and HTML entities are cleaned, a long prompt is cut, an empty one is its end-of-sequence token."""
    prompts = [*PROMPTS, "  a  red &amp;  ball ", "a ball " * 20, ""]
    encoded = ADAPTER.encode_prompt(pipeline, prompts, MAX_SEQUENCE_LENGTH)
    embeds = [prompt["prompt_embeds"] for prompt in encoded]
    with torch.no_grad():
        expected, _ = pipeline.encode_prompt(
            prompts, do_classifier_free_guidance=False, max_sequence_length=MAX_SEQUENCE_LENGTH
        )
    assert torch.equal(ADAPTER.pad_prompts(encoded, MAX_SEQUENCE_LENGTH)["prompt_embeds"], expected)
    assert [len(embed) for embed in embeds] == [8, 8, 5, 13, 5, MAX_SEQUENCE_LENGTH, 1]
    assert all(embed.abs().sum(dim=1).min() > 0 for embed in embeds)  # nothing of the padding is kept
    assert all(embed.untyped_storage().nbytes() == embed.nbytes for embed in embeds)


def test_the_tiny_tokenizer_pads_as_that_of_umt5():
    encoded = tiny_tokenizer()(PROMPTS[2], padding="max_length", max_length=8)
    assert encoded.input_ids[-4:] == [1, 0, 0, 0] and encoded.attention_mask == [1] * 5 + [0] * 3


def test_padding_rejects_embeddings_that_do_not_fit():
    with pytest.raises(ValueError, match=r"Embedding 1 must have shape \(L, D\) with L <= `max_sequence_length=4`"):
        ADAPTER.pad_prompts([{"prompt_embeds": torch.zeros(length, 2)} for length in (4, 5)], 4)
    with pytest.raises(ValueError, match="Embedding 0 "):
        ADAPTER.pad_prompts([{"prompt_embeds": torch.zeros(1, 3, 2)}], 4)
    with pytest.raises(ValueError, match="empty list"):
        ADAPTER.pad_prompts([], 4)


# --- transformer ----------------------------------------------------------------------------------------------------


def test_lora_targets_are_the_projections_of_every_self_attention_and_nothing_else():
    transformer = tiny_transformer()
    transformer.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=ADAPTER.lora_target_modules))
    adapted = {name.removesuffix(".lora_A.default") for name, _ in transformer.named_modules() if "lora_A." in name}
    assert adapted == {f"blocks.{i}.attn1.{name}" for i in range(2) for name in ("to_q", "to_k", "to_v", "to_out.0")}


@pytest.mark.parametrize(("patch", "frames", "height", "width"), [((1, 2, 2), 2, 4, 6), ((2, 1, 2), 4, 3, 4)])
def test_token_grid_is_what_a_block_sees(patch, frames, height, width):
    transformer = tiny_transformer(patch_size=patch)
    latents = torch.randn(1, 4, frames, height, width)
    grid = ADAPTER.token_grid(transformer, latents.shape)
    assert grid == ADAPTER.token_grid(transformer, latents.shape[1:])
    assert grid == (frames // patch[0], height // patch[1], width // patch[2])
    _, timesteps, conditions = inputs(1)
    with tap_block(ADAPTER, transformer, 0) as tap, torch.no_grad():
        ADAPTER.predict(transformer, latents, timesteps, conditions)
    assert tap.tokens.shape == (1, grid[0] * grid[1] * grid[2], 24)


def test_tokens_are_ordered_as_the_grid():
    """A change of one latent patch moves the token at its place in (F', H', W') and no other, before any attention."""
    transformer = tiny_transformer(num_layers=1)
    for name, parameter in transformer.named_parameters():
        if "attn" in name and "to_out" in name:
            nn.init.zeros_(parameter)
    latents, timesteps, conditions = inputs(1)
    moved = latents.clone()
    moved[0, :, 1, 2:4, 0:2] += 1
    tokens = []
    for sample in (latents, moved):
        with tap_block(ADAPTER, transformer, 0) as tap, torch.no_grad():
            ADAPTER.predict(transformer, sample, timesteps, conditions)
        tokens.append(tap.tokens.unflatten(1, ADAPTER.token_grid(transformer, sample.shape)))
    changed = (tokens[0] != tokens[1]).any(dim=-1)[0]
    assert changed.nonzero().tolist() == [[1, 1, 0]]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_tap_reads_the_block_and_its_gradients_reach_earlier_ones_only(checkpointing):
    transformer = tiny_transformer()
    if checkpointing:
        transformer.enable_gradient_checkpointing()
    latents, timesteps, conditions = inputs()
    with tap_block(ADAPTER, transformer, 0) as tap:
        assert tap.tokens is None
        prediction = ADAPTER.predict(transformer, latents, timesteps, conditions)
        first = tap.tokens
        ADAPTER.predict(transformer, latents + 1, timesteps, conditions)
    assert not torch.equal(tap.tokens, first)  # the last forward's
    assert not transformer.blocks[0]._forward_hooks
    first.square().mean().backward()
    touched = [any(p.grad is not None for p in block.parameters()) for block in transformer.blocks]
    assert touched == [True, False]

    plain = tiny_transformer()
    assert torch.equal(ADAPTER.predict(plain, latents, timesteps, conditions), prediction)
    with tap_block(ADAPTER, plain, 0) as reference:
        ADAPTER.predict(plain, latents, timesteps, conditions)
    reference.tokens.square().mean().backward()
    assert torch.equal(reference.tokens, first)
    for left, right in zip(plain.parameters(), transformer.parameters(), strict=True):
        assert (left.grad is None) == (right.grad is None)
        assert left.grad is None or torch.equal(left.grad, right.grad)


@pytest.mark.parametrize("index", [0, 1])
def test_tap_reads_the_output_of_the_block_that_was_asked_for(index):
    transformer = tiny_transformer()
    outputs: list[Tensor] = []
    transformer.blocks[index].register_forward_hook(lambda module, args, output: outputs.append(output))
    with tap_block(ADAPTER, transformer, index) as tap, torch.no_grad():
        ADAPTER.predict(transformer, *inputs())
    assert tap.tokens is outputs[0]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_tap_does_not_change_a_training_step(checkpointing):
    """Loss on the prediction and on the tokens in one backward, inside the context, as checkpointing recomputes."""
    latents, timesteps, conditions = inputs()
    grads = []
    for tapped in (False, True):
        transformer = tiny_transformer()
        if checkpointing:
            transformer.enable_gradient_checkpointing()
        if tapped:
            with tap_block(ADAPTER, transformer, 1) as tap:
                prediction = ADAPTER.predict(transformer, latents, timesteps, conditions)
                (prediction.square().mean() + 0 * tap.tokens.mean()).backward()
        else:
            ADAPTER.predict(transformer, latents, timesteps, conditions).square().mean().backward()
        grads.append([p.grad for p in transformer.parameters()])
    for left, right in zip(*grads, strict=True):
        assert torch.equal(left, right)


def test_tap_is_removed_after_an_error_and_rejects_a_block_that_is_not_there():
    transformer = tiny_transformer()
    with pytest.raises(RuntimeError, match="in the context"), tap_block(ADAPTER, transformer, 0):
        raise RuntimeError("in the context")
    assert not transformer.blocks[0]._forward_hooks
    for index in (-1, 2):
        with (
            pytest.raises(ValueError, match=rf"\[0, 1\] for 2 blocks, got {index}"),
            tap_block(ADAPTER, transformer, index),
        ):
            pass


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((16, 2, 4, 4), "must have 4 channels for this transformer, got 16"),
        ((4, 2, 3, 4), r"divisible by the patch \(1, 2, 2\)"),
        ((1, 4, 2, 4, 5), r"divisible by the patch \(1, 2, 2\)"),
        ((4, 0, 4, 4), "divisible by the patch"),
        ((4, 2, 4, 66), r"knows 32 positions along a side, got 33 for latents of shape \(4, 2, 4, 66\)"),
        ((4, 4, 4), r"shape \(C, F, H, W\) or \(B, C, F, H, W\), got \(4, 4, 4\)"),
    ],
)
def test_latents_that_the_transformer_would_not_take_are_rejected(pipeline, shape, message):
    ADAPTER.check_latents(pipeline.transformer, LATENTS_SHAPE)
    with pytest.raises(ValueError, match=message):
        ADAPTER.check_latents(pipeline.transformer, shape)
    with pytest.raises(ValueError, match=message):
        ADAPTER.token_grid(pipeline.transformer, shape)
