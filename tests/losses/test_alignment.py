"""Token relation distillation against the formulas as they are written, in value and gradient."""

import pytest
import torch
import torch.nn.functional as F

from tests.support import rounding
from video_trl.losses import alignment as trd
from video_trl.losses import repa_loss, trd_loss


SHAPE = (2, 3, 5)  # B, F, N


def tokens(width, seed, shape=SHAPE, dtype=torch.float64):
    return torch.randn(*shape, width, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def distance(difference, margin, margin_mode, norm):
    if norm == "l2":
        return difference.square()
    if margin_mode == "hard":
        return torch.where(difference.abs() < margin, 0.0, difference.abs())
    return (difference.abs() - margin).clamp_min(0)


def written_out(student, teacher, margin=0.1, margin_mode="soft", norm="l1"):
    """Joint mean (official code), spatial and temporal mean (the two terms of Eq. 5), a pair of frames at a time."""
    student, teacher = F.normalize(student, dim=-1), F.normalize(teacher, dim=-1)
    batch_size, num_frames, num_tokens = student.shape[:3]
    spatial, temporal = [], []
    for d in range(num_frames):
        for e in range(num_frames):
            h = student[:, d] @ student[:, e].mT  # (B, N, N): cosine of token i of frame d and j of frame e
            y = teacher[:, d] @ teacher[:, e].mT
            (spatial if d == e else temporal).append(distance(h - y, margin, margin_mode, norm))
    joint = torch.stack(spatial + temporal).mean()
    none = student.new_zeros(())
    return joint, torch.stack(spatial).mean(), torch.stack(temporal).mean() if temporal else none


def written_out_loss(student, teacher, relation_weighting="joint", relations="all", **options):
    joint, spatial, temporal = written_out(student, teacher, **options)
    if relations != "all":
        return spatial if relations == "spatial" else temporal
    return joint if relation_weighting == "joint" else spatial + temporal


FORMS = [{"margin_mode": "soft"}, {"margin_mode": "hard"}, {"margin": 0.0}, {"margin": 0.0, "norm": "l2"}]
TARGETS = [{}, {"relation_weighting": "paper"}, {"relations": "spatial"}, {"relations": "temporal"}]


@pytest.mark.parametrize("row_chunk", [1, 4, 1024])
@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_value_and_gradient_are_those_of_the_formula(form, target, row_chunk):
    student, teacher = tokens(7, 0).requires_grad_(), tokens(4, 1)
    loss, spatial, temporal = trd_loss(student, teacher, row_chunk=row_chunk, **form, **target)
    expected = written_out_loss(student, teacher, **form, **target)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close((spatial, temporal), written_out(student.detach(), teacher, **form)[1:])
    (gradient,) = torch.autograd.grad(loss, student)
    (expected_gradient,) = torch.autograd.grad(expected, student)
    assert expected_gradient.abs().max() > 1e-3
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-11, atol=1e-15)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_joint_weighting_is_a_fixed_mixture_of_both_parts(form):
    """The official mean over all pairs gives the spatial part 1 / F only: 0.042 with the paper's 24 frames."""
    student, teacher = tokens(6, 2), tokens(6, 3)
    joint, spatial, temporal = trd_loss(student, teacher, **form)
    paper, *_ = trd_loss(student, teacher, relation_weighting="paper", **form)
    torch.testing.assert_close(joint, spatial / 3 + temporal * 2 / 3)
    torch.testing.assert_close(paper, spatial + temporal)


@pytest.mark.parametrize("options", [*FORMS[:2], FORMS[3]], ids=str)
def test_gradcheck(options):
    student, teacher = tokens(3, 4, (1, 2, 3)).requires_grad_(), tokens(5, 5, (1, 2, 3))
    assert torch.autograd.gradcheck(lambda x: trd_loss(x, teacher, row_chunk=2, **options)[0], (student,))


def test_one_frame_has_no_temporal_part():
    student, teacher = tokens(4, 6, (2, 1, 5)).requires_grad_(), tokens(4, 7, (2, 1, 5))
    for weighting in ("joint", "paper"):
        loss, spatial, temporal = trd_loss(student, teacher, relation_weighting=weighting)
        assert temporal == 0 and loss == spatial > 0
        (gradient,) = torch.autograd.grad(loss, student)
        (expected,) = torch.autograd.grad(written_out(student, teacher)[1], student)
        torch.testing.assert_close(gradient, expected)


def test_agreeing_relations_cost_nothing():
    """Rotated tokens of any length have the same relations, also in another width."""
    teacher = tokens(6, 8)
    rotation = torch.linalg.qr(tokens(9, 9, (9,)))[0][:6]  # (6, 9), orthonormal rows
    student = (3.0 * teacher @ rotation).requires_grad_()
    loss, *_ = trd_loss(student, teacher)
    assert loss == 0 and not torch.autograd.grad(loss, student)[0].any()
    loss, *_ = trd_loss(student, teacher, norm="l2", margin=0.0)
    assert loss < 1e-15 and torch.autograd.grad(loss, student)[0].abs().max() < 1e-15


def test_a_step_along_a_token_changes_nothing():
    student, teacher = tokens(6, 10).requires_grad_(), tokens(6, 11)
    (gradient,) = torch.autograd.grad(trd_loss(student, teacher)[0], student)
    torch.testing.assert_close(
        (gradient * student).sum(-1), torch.zeros(SHAPE, dtype=torch.float64), atol=1e-15, rtol=0
    )


def test_a_zero_token_gets_no_gradient_and_spoils_no_other():
    student = tokens(6, 12)
    student[0, 1, 2] = 0
    student.requires_grad_()
    (gradient,) = torch.autograd.grad(trd_loss(student, tokens(6, 13))[0], student)
    assert gradient.isfinite().all() and not gradient[0, 1, 2].any() and gradient[0, 1, 1].any()


def test_upstream_gradient_scales_and_parts_carry_none():
    student, teacher = tokens(6, 14).requires_grad_(), tokens(6, 15)
    loss, spatial, temporal = trd_loss(student, teacher)
    (once,) = torch.autograd.grad(loss, student)
    (half,) = torch.autograd.grad(0.5 * trd_loss(student, teacher)[0], student)
    torch.testing.assert_close(half, 0.5 * once)
    assert not spatial.requires_grad and not temporal.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    student, teacher = tokens(6, 16, dtype=dtype).requires_grad_(), tokens(8, 17, dtype=torch.float32)
    exact = student.detach().double().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, *_ = trd_loss(student, teacher)
        similarity = repa_loss(student, tokens(6, 18, dtype=dtype))
    expected, *_ = trd_loss(exact, teacher.double())
    assert loss.dtype == similarity.dtype == torch.float32
    rounding.assert_close(loss.double(), expected, rounding.SINGLE)
    (gradient,), (expected_gradient,) = torch.autograd.grad(loss, student), torch.autograd.grad(expected, exact)
    assert gradient.dtype == dtype
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-2, atol=1e-5)


def test_no_gradient_is_formed_where_none_is_wanted(monkeypatch):
    asked = []
    parts = trd._absolute_parts
    monkeypatch.setattr(trd, "_absolute_parts", lambda *args: asked.append(args[-1] is not None) or parts(*args))
    student, teacher = tokens(6, 19), tokens(6, 20)
    value = trd_loss(student, teacher)[0]
    with torch.no_grad():
        assert trd_loss(student.requires_grad_(), teacher)[0] == value
    assert asked == [False] * 4  # two samples each


def test_never_holds_all_relations(monkeypatch):
    """The largest tensor of the L1 form is a block of rows, that of the L2 form a D x D matrix."""
    shape, largest = (1, 4, 50), []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            largest.append(
                max((t.numel() for t in torch.utils._pytree.tree_leaves(result) if torch.is_tensor(t)), default=0)
            )
            return result

    student, teacher = tokens(8, 21, shape).requires_grad_(), tokens(8, 22, shape)
    with Watch():
        trd_loss(student, teacher, row_chunk=16)[0].backward()
    assert max(largest) == 16 * 200
    largest.clear()
    with Watch():
        trd_loss(student, teacher, norm="l2", margin=0.0)[0].backward()
    assert max(largest) == 200 * 8


def test_second_derivative_is_refused():
    student = tokens(6, 23).requires_grad_()
    loss, *_ = trd_loss(student, tokens(6, 24))
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(loss, student, create_graph=True)


def test_repa_is_the_mean_negative_cosine():
    student, teacher = tokens(6, 25).requires_grad_(), tokens(6, 26)
    cosines = [
        torch.dot(student[b, f, n], teacher[b, f, n]) / (student[b, f, n].norm() * teacher[b, f, n].norm())
        for b in range(2)
        for f in range(3)
        for n in range(5)
    ]
    expected = -torch.stack(cosines).mean()
    torch.testing.assert_close(repa_loss(student, teacher), expected)
    gradients = [torch.autograd.grad(loss, student)[0] for loss in (repa_loss(student, teacher), expected)]
    torch.testing.assert_close(*gradients)
    torch.testing.assert_close(repa_loss(2 * teacher, teacher), torch.tensor(-1.0, dtype=torch.float64))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"margin": -0.1}, "margin"),
        ({"margin": 2.0}, "margin"),
        ({"margin": float("nan")}, "margin"),
        ({"margin_mode": "firm"}, "'soft', 'hard'"),
        ({"relation_weighting": "equal"}, "'joint', 'paper'"),
        ({"relations": "both"}, "'all', 'spatial', 'temporal'"),
        ({"norm": "l3"}, "'l1', 'l2'"),
        ({"norm": "l2"}, "no margin"),
        ({"row_chunk": 0}, "row_chunk"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        trd_loss(tokens(4, 27), tokens(4, 28), **options)


@pytest.mark.parametrize("loss", [trd_loss, repa_loss])
def test_bad_tokens_are_refused(loss):
    good = tokens(4, 29)
    with pytest.raises(ValueError, match=r"\(2, 3, 5, 4\) and \(2, 3, 4, 4\)"):
        loss(good, good[:, :, :4])
    with pytest.raises(ValueError, match="shapes"):
        loss(good[0], good[0])
    with pytest.raises(ValueError, match="shapes"):
        loss(good[:0], good[:0])
    with pytest.raises(ValueError, match="frozen"):
        loss(good, good.clone().requires_grad_())
    with pytest.raises(ValueError, match="dequantise"):
        loss(good, (100 * good).to(torch.int8))


def test_widths_and_frames_that_do_not_suit():
    with pytest.raises(ValueError, match="equal widths, got 4 and 5"):
        repa_loss(tokens(4, 30), tokens(5, 31))
    with pytest.raises(ValueError, match="at least 2 frames"):
        trd_loss(tokens(4, 32, (1, 1, 5)), tokens(4, 33, (1, 1, 5)), relations="temporal")
