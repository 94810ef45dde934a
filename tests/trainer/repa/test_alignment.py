"""Where tokens lie in time and space, how two grids become one, and the head inside the transformer's forward."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel
from torch.utils.checkpoint import set_checkpoint_early_stop

from tests.support.tiny import TEXT_DIM, tiny_pipeline, tiny_transformer
from video_trl import VideoREPAConfig
from video_trl.diffusion import VPrediction
from video_trl.models import CogVideoXFamily, WanFamily, family_of
from video_trl.trainer.repa.alignment import (
    AlignmentHead,
    TokenGeometry,
    block_index,
    hidden_width,
    plan_alignment,
    pool_area,
    student_geometry,
    tap_alignment,
)
from video_trl.trainer.repa.teacher_alignment import TeacherAlignment


WAN = WanFamily()
COGVIDEOX = CogVideoXFamily(noise_process=VPrediction())


def tiny_cogvideox() -> CogVideoXTransformer3DModel:
    """CogVideoX-2B's transformer, two narrow layers, at its own latent size."""
    torch.manual_seed(0)
    return CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        time_embed_dim=16,
        text_embed_dim=16,
        sample_height=60,
        sample_width=90,
    )


def geometry(frames: int, rows: int, columns: int, first: float, step: float) -> TokenGeometry:
    return TokenGeometry((frames, rows, columns), tuple(first + step * k for k in range(frames)))


@pytest.mark.parametrize(
    ("adapter", "transformer", "latents_shape", "grid"),
    [
        (COGVIDEOX, tiny_cogvideox, (16, 13, 60, 90), (13, 30, 45)),  # 49 x 480 x 720
        (
            WAN,
            lambda: tiny_transformer(in_channels=16, out_channels=16, rope_max_seq_len=52),
            (16, 21, 60, 104),
            (21, 30, 52),
        ),  # 81 frames
    ],
    ids=["cogvideox", "wan"],
)
def test_grid_and_times_of_the_published_sizes(adapter, transformer, latents_shape, grid):
    student = student_geometry(adapter, transformer(), latents_shape, 4)
    assert student.grid == grid
    # Latent 0 shows frame 0; latent 1 frames 1 to 4, latent 2 frames 5 to 8, latent 12 frames 45 to 48.
    assert student.frame_times[:3] == (0.0, 2.5, 6.5) and student.frame_times[12] == 46.5
    for k, time in enumerate(student.frame_times[1:], start=1):
        assert time == sum(range(4 * k - 3, 4 * k + 1)) / 4


def test_times_of_the_official_setting_written_out():
    """49 frames: 12 latents behind the first against the 24 pairs of frames (1, 2), (3, 4), ... of the teacher."""
    student = TokenGeometry((13, 3, 3), (0.0, *(4 * k - 1.5 for k in range(1, 13))))
    teacher = geometry(24, 1, 1, 1.5, 2.0)
    plan = plan_alignment(student, teacher)
    assert plan.student_frames.shape == (24, 13) and plan.stride == (3, 3)
    assert not plan.student_frames[:, 0].any()  # latent 0 takes no part
    resampled = plan.student_frames @ torch.tensor(student.frame_times)
    # At every pair's own centre, except that there is nothing to interpolate before 2.5 and behind 46.5.
    assert resampled.tolist() == pytest.approx([2.5, *(1.5 + 2 * k for k in range(1, 23)), 46.5])
    # torch's linear interpolation with doubled length, which the official code uses, has the same weights.
    signal = torch.randn(1, 1, 12)
    official = torch.nn.functional.interpolate(signal, scale_factor=2, mode="linear", align_corners=False)
    torch.testing.assert_close(plan.student_frames[:, 1:] @ signal[0, 0], official[0, 0])

    pooled = plan_alignment(student, teacher, temporal_target="student")
    assert torch.equal(pooled.student_frames[:, 1:], torch.eye(12))
    expected = torch.zeros(12, 24)
    for k in range(12):
        expected[k, 2 * k : 2 * k + 2] = 0.5
    assert torch.equal(pooled.teacher_frames, expected)


def test_joined_latent_frames_and_the_teachers_first_frame():
    """Pairs of latents, the first one alone; a teacher that also saw frame 0 loses what contains it."""
    transformer = tiny_transformer(patch_size=(1, 2, 2))

    class Pairs(WanFamily):
        def token_grid(self, transformer, latents_shape):
            return -(-latents_shape[-3] // 2), 2, 2

    student = student_geometry(Pairs(), transformer, (4, 5, 4, 4), 4)
    assert student == TokenGeometry((3, 2, 2), (0.0, 4.5, 12.5))
    plan = plan_alignment(student, geometry(8, 2, 2, 0.5, 2.0))
    assert plan.teacher_frames.shape == (7, 8) and not plan.teacher_frames[:, 0].any()


def test_interpolation_is_exact_on_signals_that_are_linear_in_time_and_space():
    student, teacher = geometry(5, 6, 4, 0.0, 4.0), geometry(7, 3, 2, 4.0, 2.0)
    rows, columns = torch.arange(6.0)[:, None].expand(6, 4), torch.arange(4.0).expand(6, 4)
    times = torch.tensor(student.frame_times)
    signal = 0.5 * times[:, None, None] + 3 * rows - 2 * columns  # (F, H, W)
    plan = plan_alignment(student, teacher)
    aligned = AlignmentHead(1, 1, projector="none")(signal.reshape(1, -1, 1), plan)
    row_centres, column_centres = torch.tensor([0.5, 2.5, 4.5]), torch.tensor([0.5, 2.5])
    expected = 0.5 * torch.tensor(teacher.frame_times)[:, None, None] + 3 * row_centres[:, None] - 2 * column_centres
    torch.testing.assert_close(aligned.hidden[0, ..., 0], expected.flatten(1))
    assert torch.equal(aligned.hidden, aligned.projected)


def test_a_finer_teacher_is_pooled_and_both_sides_keep_their_places():
    plan = plan_alignment(geometry(3, 2, 4, 0.0, 4.0), geometry(2, 4, 4, 4.0, 4.0))
    assert (plan.height, plan.width, plan.stride) == (2, 4, (1, 1))
    tokens = torch.arange(2 * 16.0).view(1, 2, 16, 1)
    expected = tokens.view(2, 2, 2, 4).mean(2).view(1, 2, 8, 1)
    torch.testing.assert_close(plan.align_teacher(tokens), expected)
    assert torch.equal(pool_area(tokens.view(1, 2, 4, 4, 1), 4, 4).flatten(), tokens.flatten())


@pytest.mark.parametrize(
    ("student", "teacher", "target", "message"),
    [
        (geometry(3, 4, 4, 0.0, 4.0), geometry(4, 3, 4, 1.5, 2.0), "teacher", "4 token rows and the teacher 3"),
        (geometry(3, 4, 4, 0.0, 4.0), geometry(4, 4, 6, 1.5, 2.0), "teacher", "4 token columns and the teacher 6"),
        (geometry(1, 4, 4, 0.0, 4.0), geometry(1, 4, 4, 0.0, 2.0), "teacher", "Use longer videos"),
        (geometry(5, 4, 4, 0.0, 4.0), geometry(1, 4, 4, 4.0, 2.0), "student", "none of them .* within 2 of 8"),
    ],
)
def test_grids_that_do_not_fit_are_refused(student, teacher, target, message):
    with pytest.raises(ValueError, match=message):
        plan_alignment(student, teacher, temporal_target=target)


def test_head_has_the_official_size():
    """9.70 M weights for CogVideoX-2B, 12.06 M for 5B, and 5.31 M in the learned convolution."""
    for width, millions in ((1920, 9.70), (3072, 12.06)):
        head = AlignmentHead(width, 768, projector_width=2048)
        assert sum(weight.numel() for weight in head.parameters()) / 1e6 == pytest.approx(millions, abs=0.005)
        assert [type(layer).__name__ for layer in head.projector] == ["Linear", "SiLU", "Linear", "SiLU", "Linear"]
    head = AlignmentHead(8, 768, projector="linear", stride=(3, 3))
    assert sum(weight.numel() for weight in head.downsample.parameters()) / 1e6 == pytest.approx(5.31, abs=0.005)
    assert not list(AlignmentHead(8, 16, projector="none").parameters())
    with pytest.raises(ValueError, match="works on projected tokens"):
        AlignmentHead(8, 16, projector="none", stride=(2, 2))


def test_learned_pooling_is_the_official_order_of_operations():
    """Projector on every token, frames resampled, then a strided convolution in each frame."""
    student, teacher = geometry(3, 4, 6, 0.0, 4.0), geometry(3, 2, 3, 4.0, 2.0)
    head = AlignmentHead(5, 7, projector_width=9, stride=(2, 2))
    tokens = torch.randn(2, 72, 5)
    plan = plan_alignment(student, teacher)
    projected = head.projector(tokens).view(2, 3, 24, 7)
    frames = torch.einsum("of,bfnd->bond", plan.student_frames, projected)
    images = frames.unflatten(2, (4, 6)).flatten(0, 1).permute(0, 3, 1, 2)
    expected = head.downsample(images).flatten(2).transpose(1, 2).unflatten(0, (2, 3))
    aligned = head(tokens, plan)
    torch.testing.assert_close(aligned.projected, expected)
    assert aligned.projected.shape == (2, 3, 6, 7) and aligned.hidden.shape == (2, 3, 6, 5)
    with pytest.raises(ValueError, match="returned 71 tokens"):
        head(tokens[:, 1:], plan)


def run(adapter, transformer, latents, prompt_embeds, timesteps, checkpointing, early_stop=True):
    """Loss and gradients of transformer and head, through a tap behind the first block."""
    torch.manual_seed(0)
    head = AlignmentHead(hidden_width(transformer), 6, projector_width=8)
    student = student_geometry(adapter, transformer, latents.shape, 4)
    plan = plan_alignment(student, geometry(4, 1, 1, 1.5, 2.0))
    calls = []
    head.register_forward_hook(lambda *_: calls.append(1))
    if checkpointing:
        transformer.enable_gradient_checkpointing()
    transformer.train()
    with set_checkpoint_early_stop(early_stop), tap_alignment(adapter, transformer, 0, head, plan) as tap:
        prediction = adapter.predict(transformer, latents, timesteps, {"prompt_embeds": prompt_embeds})
        assert not tap.tokens.hidden.requires_grad
        (prediction.square().mean() + tap.tokens.projected.square().mean()).backward()  # while the hook still stands
    assert calls == [1]
    named = [*transformer.named_parameters(), *head.named_parameters()]
    return [(name, weight.grad) for name, weight in named if weight.grad is not None]


@pytest.mark.parametrize("early_stop", [True, False])  # off: the block is run again to its end, hooks included
@pytest.mark.parametrize("family", ["wan", "cogvideox"])
def test_activation_checkpointing_changes_no_bit_and_does_not_run_the_head_again(family, early_stop):
    torch.manual_seed(1)
    if family == "wan":
        adapter, make = WAN, tiny_transformer
        latents, embeds, timesteps = torch.randn(2, 4, 3, 4, 4), torch.randn(2, 8, TEXT_DIM), torch.tensor([1.0, 900])
    else:
        adapter, make = COGVIDEOX, tiny_cogvideox
        latents, embeds, timesteps = torch.randn(2, 16, 3, 4, 4), torch.randn(2, 226, 16), torch.tensor([1, 900])
    plain, checkpointed = (run(adapter, make(), latents, embeds, timesteps, on, early_stop) for on in (False, True))
    assert [name for name, _ in plain] == [name for name, _ in checkpointed]
    assert sum("projector" in name or name[0].isdigit() for name, _ in plain) and len(plain) > 20
    for (name, gradient), (_, other) in zip(plain, checkpointed, strict=True):
        assert torch.equal(gradient, other), name


@pytest.mark.parametrize(
    ("layer", "index"), [(1, 0), (18, 17), (30, 29), (0.6, 17), (0.01, 0), (0.999, 29), (18.0, 17)]
)
def test_block_is_a_number_or_a_share_of_the_depth(layer, index):
    assert block_index(layer, 30) == index


@pytest.mark.parametrize("layer", [0, -1, 31, 1.5, 30.5, -0.5])
def test_block_that_does_not_exist_is_refused(layer):
    with pytest.raises(ValueError, match="a block from 1 to 30 or a fraction"):
        block_index(layer, 30)


def test_without_a_vae_the_family_says_how_many_frames_a_latent_has(tmp_path):
    """Rows that carry latents and tokens need none; LTX-Video's latent frames are of eight."""
    pipeline = tiny_pipeline("ltx-t2v")
    config = VideoREPAConfig(str(tmp_path), use_cpu=True)
    for bare in (None, SimpleNamespace(components={"vae": None}), pipeline):
        alignment = TeacherAlignment(config, config)
        alignment._family, alignment._pipeline = family_of(pipeline), bare
        plan = alignment._plan(pipeline.transformer, (8, 3, 2, 2), (8, 2, 2), [1.5 + 2 * k for k in range(8)])
        assert plan.student.frame_times == (0.0, 4.5, 12.5)
