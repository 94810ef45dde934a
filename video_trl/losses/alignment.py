"""
Token relation distillation (VideoREPA) and the token-wise baseline (REPA), as pure functions of tensors.

A relation is the cosine similarity of two tokens of one video. N tokens have N^2 of them, so that the loss as it is
written needs gigabytes: 15,600 tokens (81 frames at half of 480p) make matrices of 0.9 GiB, and autograd keeps four.
Here value and gradient are formed together, a block of rows at a time, and only the gradient `(N, D)` is kept.
"""

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor


MarginMode = Literal["soft", "hard"]
RelationWeighting = Literal["joint", "paper"]
Relations = Literal["all", "spatial", "temporal"]
RelationNorm = Literal["l1", "l2"]


def trd_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    margin: float = 0.1,
    margin_mode: MarginMode = "soft",
    relation_weighting: RelationWeighting = "joint",
    relations: Relations = "all",
    norm: RelationNorm = "l1",
    row_chunk: int = 1024,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""
    Distance between the token relations of a student and of a frozen teacher.

    With \\( s_{pq} \\) and \\( t_{pq} \\) the cosine similarities of tokens p and q under student and teacher, and
    \\( \rho(e) = \max(|e| - m, 0) \\):

    $$\mathcal{L}_{\mathrm{spatial}} = \frac{1}{F N^2} \sum_{p, q \text{ in one frame}} \rho(s_{pq} - t_{pq}), \qquad
    \mathcal{L}_{\mathrm{temporal}} = \frac{1}{F (F-1) N^2} \sum_{p, q \text{ in two frames}} \rho(s_{pq} - t_{pq})$$

    Source: VideoREPA (https://huggingface.co/papers/2505.23656), Eqs. 3 to 5 and Appendix A. Its text and its official
    code differ in weighting and margin; both are here, and a loss weight found with one does not suit the other.

    Memory grows with `row_chunk * F * N`, never with `(F * N)^2`; samples are taken one after another. Arithmetic is
    in float32 (float64 for float64 inputs), also under autocast. The gradient goes to `student` alone and is formed in
    the forward pass, so it cannot be differentiated again.

    Args:
        student (`torch.Tensor` of shape `(B, F, N, D_student)`):
            Tokens of the trained model on the teacher's grid: F frames of N tokens. Any floating dtype.
        teacher (`torch.Tensor` of shape `(B, F, N, D_teacher)`):
            Tokens of the frozen encoder. The two widths may differ: only relations are compared.
        margin (`float`, *optional*, defaults to `0.1`):
            Differences up to this size cost nothing, in [0, 2). The paper takes 0.1 for VideoMAEv2, 0.05 for V-JEPA, 0
            for VideoMAE. The L2 form has none: it takes `margin=0.0`.
        margin_mode (`str`, *optional*, defaults to `"soft"`):
            `"soft"` (official code) subtracts the margin, as above. `"hard"` (paper) counts differences above the
            margin in full.
        relation_weighting (`str`, *optional*, defaults to `"joint"`):
            `"joint"` (official code): one mean over all relations, which is `spatial / F + temporal * (F - 1) / F`.
            `"paper"` (Eq. 5): `spatial + temporal`.
        relations (`str`, *optional*, defaults to `"all"`):
            `"spatial"` or `"temporal"` trains on that part alone, with weight 1 (the ablation of Table 3).
        norm (`str`, *optional*, defaults to `"l1"`):
            `"l2"` takes \\( \rho(e) = e^2 \\), through the D x D matrices of both widths and no N x N block at all.
        row_chunk (`int`, *optional*, defaults to `1024`):
            Rows of the relation matrix in one block of the L1 form. Changes memory and speed, not the result.

    Returns:
        `tuple[torch.Tensor, torch.Tensor, torch.Tensor]`: `loss`, `spatial` and `temporal`, scalars, means over the
        batch. Only `loss` carries a gradient. Both parts are reported whatever `relations` trains on; `temporal` is 0
        where there is one frame.

    Raises:
        ValueError: If the shapes do not fit, an option is unknown, `margin` or `row_chunk` is out of range, the L2
            form is given a margin, `relations="temporal"` meets one frame, or `teacher` requires a gradient.
    """
    _check_tokens(student, teacher)
    for name, value, choices in (
        ("margin_mode", margin_mode, MarginMode),
        ("relation_weighting", relation_weighting, RelationWeighting),
        ("relations", relations, Relations),
        ("norm", norm, RelationNorm),
    ):
        if value not in get_args(choices):
            raise ValueError(f"`{name}` must be one of {', '.join(map(repr, get_args(choices)))}, got {value!r}.")
    if not 0 <= margin < 2:
        raise ValueError(f"`margin` must be in [0, 2), got {margin}: two cosines differ by 2 at most.")
    if norm == "l2" and margin:
        raise ValueError(f"The L2 form has no margin, got `margin={margin}`. Pass `margin=0.0`, or `norm='l1'`.")
    if row_chunk < 1:
        raise ValueError(f"`row_chunk` must be at least 1, got {row_chunk}.")
    num_frames = student.shape[1]
    if relations == "temporal" and num_frames == 1:
        raise ValueError("`relations='temporal'` needs at least 2 frames, got 1.")
    weights = _part_weights(num_frames, relation_weighting, relations)
    form = _Form(weights, margin, margin_mode == "hard", norm == "l2", row_chunk)
    with_gradient = student.requires_grad and torch.is_grad_enabled()
    loss, spatial, temporal = _RelationDistance.apply(student, teacher, form, with_gradient)
    return loss, spatial, temporal


def repa_loss(student: Tensor, teacher: Tensor) -> Tensor:
    r"""
    Negative cosine similarity of each student token with the teacher token at the same place, averaged.

    $$\mathcal{L} = -\frac{1}{BFN} \sum_n \cos(h_n, y_n)$$

    Source: REPA (https://huggingface.co/papers/2410.06940) as in VideoREPA, Eq. 2: the baseline that [`trd_loss`] is
    compared with.

    Args:
        student (`torch.Tensor` of shape `(B, F, N, D)`):
            Tokens of the trained model, projected to the teacher's width. Any floating dtype.
        teacher (`torch.Tensor` of shape `(B, F, N, D)`):
            Tokens of the frozen encoder.

    Returns:
        `torch.Tensor`: Scalar in [-1, 1], -1 where all tokens point the same way; float32, or float64 for float64
        inputs.

    Raises:
        ValueError: If the shapes differ, or `teacher` requires a gradient.
    """
    _check_tokens(student, teacher)
    if student.shape[-1] != teacher.shape[-1]:
        raise ValueError(
            f"Token-wise alignment needs equal widths, got {student.shape[-1]} and {teacher.shape[-1]}. Project the "
            "student to the teacher's width, or use `trd_loss`."
        )
    dtype = _compute_dtype(student, teacher)
    with torch.autocast(student.device.type, enabled=False):
        return -F.cosine_similarity(student.to(dtype), teacher.to(dtype), dim=-1).mean()


def _part_weights(num_frames: int, relation_weighting: RelationWeighting, relations: Relations) -> tuple[float, float]:
    """Weights of the spatial and the temporal mean in the loss."""
    if relations != "all":
        return (1.0, 0.0) if relations == "spatial" else (0.0, 1.0)
    if relation_weighting == "paper":
        return 1.0, 1.0
    return 1 / num_frames, (num_frames - 1) / num_frames


@dataclass(frozen=True)
class _Form:
    """The options of `trd_loss`, checked."""

    weights: tuple[float, float]  # of the spatial and the temporal mean
    margin: float
    hard: bool
    squared: bool
    row_chunk: int


class _RelationDistance(torch.autograd.Function):
    """Loss, spatial and temporal part; the gradient is formed with them and waits, `(B, F, N, D)`, for backward."""

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, form: _Form, with_gradient: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        dtype = _compute_dtype(student, teacher)
        batch_size, num_frames = student.shape[:2]
        parts_of_sample = _squared_parts if form.squared else _absolute_parts
        gradient = torch.empty(student.shape, dtype=dtype, device=student.device) if with_gradient else None
        parts = []
        with torch.autocast(student.device.type, enabled=False):
            for sample in range(batch_size):
                x, inverse_norms = _unit(student[sample].flatten(0, 1).to(dtype))
                y, _ = _unit(teacher[sample].flatten(0, 1).to(dtype))
                slope = None if gradient is None else gradient[sample].view_as(x)
                parts.append(torch.stack(parts_of_sample(x, y, num_frames, form, slope)))
                if slope is not None:
                    # Through the normalisation: a step along a token changes no relation. The batch is averaged.
                    slope.addcmul_(torch.einsum("nd,nd->n", slope, x)[:, None], x, value=-1)
                    slope.mul_(inverse_norms / batch_size)
        spatial, temporal = torch.stack(parts).mean(0)
        loss = form.weights[0] * spatial + form.weights[1] * temporal
        ctx.save_for_backward(gradient)
        ctx.student_dtype = student.dtype
        ctx.mark_non_differentiable(spatial, temporal)
        return loss, spatial, temporal

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor, None, None, None]:
        if torch.is_grad_enabled():  # with `create_graph=True`
            raise RuntimeError(
                "`trd_loss` cannot be differentiated twice: its gradient is formed in the forward pass. Call backward "
                "without `create_graph=True`."
            )
        (gradient,) = ctx.saved_tensors
        return (grad_loss * gradient).to(ctx.student_dtype), None, None, None


def _absolute_parts(
    x: Tensor, y: Tensor, num_frames: int, form: _Form, gradient: Tensor | None
) -> tuple[Tensor, Tensor]:
    """
    Spatial and temporal mean of the L1 form, for unit tokens `x` (M, D_s) and `y` (M, D_t), M = F * N; the derivative
    by `x` of their weighted sum goes into `gradient`.

    The matrix of differences is symmetric, and so is G, the derivative of the loss by each of its entries: a weight
    times a sign, or 0 within the margin. Hence d loss / d x = 2 G x, formed here for one block of rows of G at a time,
    each from the diagonal on: what is left of it has been seen from the other side.
    """
    size, tokens = len(x), len(x) // num_frames
    num_spatial, num_temporal = _counts(size, tokens)
    slopes = (2 * form.weights[0] / num_spatial, 2 * form.weights[1] / num_temporal)
    spatial, temporal = x.new_zeros(()), x.new_zeros(())
    if gradient is not None:
        gradient.zero_()
    for start in range(0, size, form.row_chunk):
        same, others = _row_block(x, y, start, tokens, form, slopes, gradient)
        spatial += same
        temporal += others
    return spatial / num_spatial, temporal / num_temporal


def _row_block(
    x: Tensor, y: Tensor, start: int, tokens: int, form: _Form, slopes: tuple[float, float], gradient: Tensor | None
) -> tuple[Tensor, Tensor]:
    """
    Sums over the pairs within a frame and across frames, of rows from `start` with themselves, and twice with all
    behind them; what these pairs add to `gradient`.
    """
    end = min(start + form.row_chunk, len(x))
    own = end - start
    shrink = F.hardshrink if form.hard else F.softshrink
    # (rows, M - start): differences of cosines, the margin taken off. One buffer for both products.
    block = shrink((x[start:end] @ x[start:].T).addmm_(y[start:end], y[start:].T, alpha=-1), form.margin)
    spatial, temporal = x.new_zeros(()), x.new_zeros(())
    for frame in range(start // tokens * tokens, end, tokens):  # each that has rows in this block
        first, last = max(frame - start, 0), frame + tokens - start
        rows, edge = block[first:last], max(last, own)
        same = (rows[:, first : min(last, own)], 1), (rows[:, own:edge], 2)
        others = (rows[:, :first], 1), (rows[:, last:own], 1), (rows[:, edge:], 2)
        spatial += sum(times * torch.linalg.vector_norm(part, 1) for part, times in same)
        temporal += sum(times * torch.linalg.vector_norm(part, 1) for part, times in others)
        if gradient is not None:
            for slope, parts in zip(slopes, (same, others), strict=True):
                for part, _ in parts:
                    part.sign_().mul_(slope)
    if gradient is not None:
        gradient[start:end].addmm_(block, x[start:])
        gradient[end:].addmm_(block[:, own:].T, x[start:end])
    return spatial, temporal


def _squared_parts(
    x: Tensor, y: Tensor, num_frames: int, form: _Form, gradient: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`_absolute_parts` of the L2 form: the sum over all pairs and those over the pairs of each frame."""
    size, tokens = len(x), len(x) // num_frames
    num_spatial, num_temporal = _counts(size, tokens)
    spatial_slope, temporal_slope = form.weights[0] / num_spatial, form.weights[1] / num_temporal
    everything = _gram_distance(x, y, None if gradient is None else gradient.zero_(), temporal_slope)
    spatial = x.new_zeros(())
    for start in range(0, size, tokens):
        frame = slice(start, start + tokens)
        frame_gradient = None if gradient is None else gradient[frame]
        spatial += _gram_distance(x[frame], y[frame], frame_gradient, spatial_slope - temporal_slope)
    # A difference of sums: rounding may leave it a little below 0.
    return spatial / num_spatial, ((everything - spatial) / num_temporal).clamp_min(0)


def _gram_distance(x: Tensor, y: Tensor, gradient: Tensor | None, weight: float) -> Tensor:
    """|X X' - Y Y'|^2 = |X' X|^2 + |Y' Y|^2 - 2 |X' Y|^2; `weight` times its derivative by X goes onto `gradient`."""
    xx, yy, xy = x.T @ x, y.T @ y, x.T @ y
    if gradient is not None:
        gradient.addmm_(x, xx, alpha=4 * weight).addmm_(y, xy.T, alpha=-4 * weight)
    return (xx.square().sum() + yy.square().sum() - 2 * xy.square().sum()).clamp_min(0)


def _counts(size: int, tokens: int) -> tuple[int, int]:
    """Ordered pairs of tokens within a frame and across frames; 1 instead of 0, to divide by."""
    return size * tokens, max(size * (size - tokens), 1)


def _unit(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """`(M, D)` -> tokens of length 1 and `(M, 1)` inverse lengths. A zero token stays 0 and gets no gradient."""
    norms = torch.linalg.vector_norm(tokens, dim=-1, keepdim=True)
    inverse = torch.where(norms > 0, norms.reciprocal(), 0)
    return tokens * inverse, inverse


def _compute_dtype(student: Tensor, teacher: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)


def _check_tokens(student: Tensor, teacher: Tensor) -> None:
    if student.ndim != 4 or teacher.ndim != 4 or student.shape[:3] != teacher.shape[:3] or 0 in student.shape:
        raise ValueError(
            "`student` and `teacher` must have shapes (B, F, N, D_student) and (B, F, N, D_teacher), got "
            f"{tuple(student.shape)} and {tuple(teacher.shape)}. Bring the student's tokens to the teacher's grid."
        )
    if not student.is_floating_point() or not teacher.is_floating_point():
        raise ValueError(
            f"Tokens must be floating-point, got {student.dtype} and {teacher.dtype}. Restore tokens from a cache "
            "with `video_trl.data.encoding.teacher_tokens.dequantise_tokens`."
        )
    if teacher.requires_grad:
        raise ValueError("The teacher is frozen, but its tokens require a gradient. Encode under `torch.no_grad()`.")
