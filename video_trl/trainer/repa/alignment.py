"""Bring hidden states of a transformer block and tokens of a teacher to one grid, and project the former."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from diffusers import ModelMixin
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from ...models import ModelFamily


TemporalTarget = Literal["teacher", "student"]
Projector = Literal["mlp", "linear", "none"]
SpatialPooling = Literal["area", "conv"]
SpatialTarget = Literal["coarser", "teacher", "student"]


@dataclass(frozen=True)
class TokenGeometry:
    """
    Where tokens lie in their clip.

    Attributes:
        grid (`tuple[int, int, int]`): Token frames, rows and columns `(F, H, W)`; tokens are in this order.
        frame_times (`tuple[float, ...]`): Centre of each token frame, in pixel frames of the clip (the first is 0.0).
    """

    grid: tuple[int, int, int]
    frame_times: tuple[float, ...]

    def __post_init__(self) -> None:
        assert len(self.frame_times) == self.grid[0], (self.grid, self.frame_times)


def student_geometry(
    family: ModelFamily, transformer: nn.Module, latents_shape: Sequence[int], frames_per_latent: int
) -> TokenGeometry:
    """
    Geometry of a transformer's hidden states for latents `(..., C, F, H, W)`.

    Latent frame 0 shows pixel frame 0 alone; latent frame k shows `frames_per_latent` frames, for 4 the frames
    4k - 3 to 4k. Where the transformer joins several latent frames to one token frame, an incomplete group is the
    first one.
    """
    grid = family.token_grid(transformer, latents_shape)
    latent_frames = latents_shape[-3]
    times = [0.0] + [frames_per_latent * k - (frames_per_latent - 1) / 2 for k in range(1, latent_frames)]
    joined = -(-latent_frames // grid[0])
    padded = [0.0] * (joined * grid[0] - latent_frames) + times
    groups = [padded[start : start + joined] for start in range(0, len(padded), joined)]
    return TokenGeometry(grid, tuple(sum(group) / joined for group in groups))


@dataclass(frozen=True)
class AlignmentPlan:
    """
    How the tokens of student and teacher are brought to one grid; what [`plan_alignment`] returns.

    Attributes:
        student (`TokenGeometry`), teacher (`TokenGeometry`): What is brought there.
        height (`int`), width (`int`): Token rows and columns of the common grid.
        student_frames (`torch.Tensor` of shape `(F, student frames)`): Weights of the student's frames, float32.
        teacher_frames (`torch.Tensor` of shape `(F, teacher frames)`): Weights of the teacher's frames, float32.
    """

    student: TokenGeometry
    teacher: TokenGeometry
    height: int
    width: int
    student_frames: Tensor
    teacher_frames: Tensor

    @property
    def stride(self) -> tuple[int, int]:
        """Rows and columns of the student's grid that make one of the common grid; 0 where that is the finer one."""
        return self.student.grid[1] // self.height, self.student.grid[2] // self.width

    def to(self, device: torch.device) -> "AlignmentPlan":
        """The plan for tokens on a device."""
        student_frames, teacher_frames = self.student_frames.to(device), self.teacher_frames.to(device)
        return replace(self, student_frames=student_frames, teacher_frames=teacher_frames)

    def align_teacher(self, tokens: Tensor) -> Tensor:
        """Tokens `(B, F', N', D)` of the teacher on the common grid: `(B, F, N, D)`, float32."""
        tokens = tokens.float().unflatten(2, self.teacher.grid[1:])
        return _mix_frames(to_grid(tokens, self.height, self.width), self.teacher_frames)


def plan_alignment(
    student: TokenGeometry,
    teacher: TokenGeometry,
    *,
    temporal_target: TemporalTarget = "teacher",
    spatial_target: SpatialTarget = "coarser",
) -> AlignmentPlan:
    """
    Decide on a common grid. The first latent frame, which shows pixel frame 0 alone, is left out on both sides.

    In space the finer grid is pooled to the coarser one, or the one that is not the target is pooled or interpolated
    to the other. In time either the student is interpolated linearly to the centres of the teacher's token frames
    (beyond its own first and last centre it is held constant), or the teacher's token frames are averaged over the
    span of each of the student's.

    Args:
        student (`TokenGeometry`): Of the transformer's hidden states.
        teacher (`TokenGeometry`): Of the teacher's tokens for the same clip.
        temporal_target (`"teacher"` or `"student"`, defaults to `"teacher"`): Whose token frames are kept.
        spatial_target (`"coarser"`, `"teacher"` or `"student"`, defaults to `"coarser"`): Whose rows and columns.

    Returns:
        [`AlignmentPlan`]: For all clips of this geometry.

    Raises:
        ValueError: If a side of one grid does not divide that of the other, the student has a single token frame, or
            the teacher has no token frame behind the first pixel frame or, with `"student"`, none in some span.
    """
    height, width = (
        {"coarser": _common_side(name, ours, theirs), "teacher": theirs, "student": ours}[spatial_target]
        for name, ours, theirs in zip(("rows", "columns"), student.grid[1:], teacher.grid[1:], strict=True)
    )
    ours = list(student.frame_times[1:])
    theirs = [time for time in teacher.frame_times if time >= 1.0]  # 1.0: first pixel frame of the second latent
    if not ours or not theirs:
        raise ValueError(
            f"The first latent frame takes no part, and behind it the transformer has {len(ours)} and the teacher "
            f"{len(theirs)} token frames. Use longer videos."
        )
    skipped = len(teacher.frame_times) - len(theirs)
    if temporal_target == "teacher":
        student_frames, teacher_frames = _interpolation(ours, theirs), torch.eye(len(theirs))
    else:
        student_frames, teacher_frames = torch.eye(len(ours)), _averaging(theirs, ours)
    return AlignmentPlan(
        student=student,
        teacher=teacher,
        height=height,
        width=width,
        student_frames=nn.functional.pad(student_frames, (1, 0)),
        teacher_frames=nn.functional.pad(teacher_frames, (skipped, 0)),
    )


def _common_side(name: str, student: int, teacher: int) -> int:
    small, large = sorted((student, teacher))
    if large % small:
        raise ValueError(
            f"The transformer has {student} token {name} and the teacher {teacher}: one must divide the other. Choose "
            "the size that the teacher sees accordingly (`teacher_kwargs`, or the options of `load_teacher`); its "
            "tokens are that size divided by its patch."
        )
    return small


def _interpolation(source: list[float], target: list[float]) -> Tensor:
    """Weights `(target, source)` of linear interpolation between increasing times; constant beyond the ends."""
    weights = torch.zeros(len(target), len(source))
    for row, time in enumerate(target):
        time = min(max(time, source[0]), source[-1])
        right = next(index for index, other in enumerate(source) if other >= time)
        left = max(right - 1, 0)
        proportion = 1.0 if right == left else (time - source[left]) / (source[right] - source[left])
        weights[row, left] += 1 - proportion
        weights[row, right] += proportion
    return weights


def _averaging(source: list[float], target: list[float]) -> Tensor:
    """Weights `(target, source)` of the mean over the source times in the span of each target time."""
    half_span = (target[1] - target[0]) / 2 if len(target) > 1 else float("inf")
    inside = (torch.tensor(source)[None] - torch.tensor(target)[:, None]).abs() <= half_span
    counts = inside.sum(dim=1, keepdim=True)
    if not counts.all():
        empty = target[int(counts.argmin())]
        raise ValueError(
            f"`temporal_target='student'` averages the teacher's token frames over each latent frame, but none of "
            f"them (centres {source}, in pixel frames) lies within {half_span:g} of {empty:g}. Let the teacher see "
            "more frames, or use `temporal_target='teacher'`."
        )
    return inside / counts


def pool_area(tokens: Tensor, height: int, width: int) -> Tensor:
    """Means over areas: `(B, F, H, W, D)` to `(B, F, height, width, D)`; `height` divides H, `width` divides W."""
    tokens = tokens.unflatten(3, (width, -1)).unflatten(2, (height, -1))  # (B, F, height, rows, width, columns, D)
    return tokens.mean(dim=(3, 5))


def to_grid(tokens: Tensor, height: int, width: int) -> Tensor:
    """
    `(B, F, H, W, D)` to `(B, F, height, width, D)`: means over areas where the grid gets coarser, bilinear
    interpolation where it gets finer. One of a side and its new length divides the other.
    """
    tokens = pool_area(tokens, min(height, tokens.shape[2]), min(width, tokens.shape[3]))
    if tokens.shape[2:4] == (height, width):
        return tokens
    images = tokens.flatten(0, 1).permute(0, 3, 1, 2)  # (B * F, D, H, W)
    images = nn.functional.interpolate(images, (height, width), mode="bilinear", align_corners=False)
    return images.permute(0, 2, 3, 1).unflatten(0, tokens.shape[:2])


def _mix_frames(tokens: Tensor, weights: Tensor) -> Tensor:
    """`(B, F', H, W, D)` and weights `(F, F')` to `(B, F, H * W, D)`."""
    return torch.einsum("of,bfhwd->bohwd", weights.to(tokens), tokens).flatten(2, 3)


@dataclass(frozen=True)
class AlignedTokens:
    """
    Hidden states of a block on the common grid.

    Attributes:
        projected (`torch.Tensor` of shape `(B, F, N, D)`): Through the projector, float32, part of the graph.
        hidden (`torch.Tensor` of shape `(B, F, N, d)`): Pooled and resampled only, float32, no gradient.
        plan ([`AlignmentPlan`]): How they got there.
    """

    projected: Tensor
    hidden: Tensor
    plan: AlignmentPlan


class AlignmentHead(nn.Module):
    """
    Brings hidden states to the teacher's grid and width. It is trained with the transformer and not needed afterwards.

    With `spatial_pooling="area"` the hidden states are pooled first, so that the projector sees few tokens. With
    `"conv"` the projector sees every token and a learned strided convolution does the rest, as in the official code;
    the paper does not mention it. Everything is float32, inside and outside of automatic mixed precision.

    Args:
        width (`int`): Width d of the hidden states.
        teacher_width (`int`): Width D of the teacher's tokens.
        projector (`"mlp"`, `"linear"` or `"none"`, defaults to `"mlp"`): d -> P -> P -> D with SiLU, d -> D, or
            nothing: relations need no equal widths.
        projector_width (`int`, defaults to `2048`): P.
        stride (`tuple[int, int]`, *optional*): Stride and size of the learned convolution; area pooling without it.

    Raises:
        ValueError: If a convolution is to follow no projector: its width would not be the teacher's.
    """

    def __init__(
        self,
        width: int,
        teacher_width: int,
        *,
        projector: Projector = "mlp",
        projector_width: int = 2048,
        stride: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        if stride is not None and projector == "none":
            raise ValueError("`spatial_pooling='conv'` works on projected tokens. Use a projector, or 'area' pooling.")
        self.projector: nn.Module = nn.Identity()
        if projector == "linear":
            self.projector = nn.Linear(width, teacher_width)
        elif projector == "mlp":
            self.projector = nn.Sequential(
                nn.Linear(width, projector_width),
                nn.SiLU(),
                nn.Linear(projector_width, projector_width),
                nn.SiLU(),
                nn.Linear(projector_width, teacher_width),
            )
        self.downsample = None if stride is None else nn.Conv2d(teacher_width, teacher_width, stride, stride)

    def forward(self, tokens: Tensor, plan: AlignmentPlan) -> AlignedTokens:
        """
        Align the hidden states `(B, N', d)` of a block, N' tokens in the order of `plan.student.grid`.

        Raises:
            ValueError: If there are not as many tokens as the grid has.
        """
        frames, rows, columns = plan.student.grid
        if tokens.shape[1] != frames * rows * columns:
            raise ValueError(
                f"The block returned {tokens.shape[1]} tokens, the latents have a grid of {frames} x {rows} x "
                f"{columns}. The adapter's `blocks` or `token_grid` does not describe this transformer."
            )
        with torch.autocast(tokens.device.type, enabled=False):
            tokens = tokens.float().unflatten(1, plan.student.grid)
            pooled = to_grid(tokens, plan.height, plan.width)
            if self.downsample is None:
                projected = self.projector(pooled)
            else:
                images = self.projector(tokens).flatten(0, 1).permute(0, 3, 1, 2)  # (B * F', D, H', W')
                projected = self.downsample(images).permute(0, 2, 3, 1).unflatten(0, (len(tokens), frames))
            projected = _mix_frames(projected, plan.student_frames)
            return AlignedTokens(projected, _mix_frames(pooled.detach(), plan.student_frames), plan)


@dataclass
class AlignmentTap:
    """What the head made of a block's output."""

    tokens: AlignedTokens | None = None
    """Of the first forward since the tap was set; `None` before it."""


@contextmanager
def tap_alignment(
    family: ModelFamily,
    transformer: nn.Module,
    index: int,
    head: AlignmentHead,
    plan: AlignmentPlan,
    *,
    every: int = 1,
) -> Iterator[AlignmentTap]:
    """
    Run a head on the hidden states behind block `index` (counted from 0) while the transformer runs as usual; on the
    first of each `every` videos.

    The head runs inside the transformer's forward, where wrappers for distributed training expect the use of its
    weights. Under activation checkpointing the block runs again in the backward pass; the head does not.

    ```python
    with tap_alignment(adapter, transformer, 17, head, plan) as tap:
        prediction = adapter.predict(transformer, noisy_latents, timesteps, conditions)
    student = tap.tokens.projected  # (B, F, N, D)
    ```
    """
    tap = AlignmentTap()

    def run_head(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if tap.tokens is None:  # a checkpointed block that runs again fires its hooks again
            # Checkpointing discards what is saved for the backward pass inside a block and makes it again by running
            # the block without this hook: what the head saves must be kept instead.
            with saved_tensors_hooks(_keep, _keep):
                hidden = output[0] if isinstance(output, tuple) else output
                tap.tokens = head(hidden if every == 1 else hidden[::every], plan)

    handle = family.blocks(transformer)[index].register_forward_hook(run_head)
    try:
        yield tap
    finally:
        handle.remove()


def _keep(tensor: Tensor) -> Tensor:
    return tensor


def block_index(align_layer: float, num_blocks: int) -> int:
    """
    Index from 0 of the block that is aligned.

    Args:
        align_layer (`float`): Number of the block counted from 1, or a fraction of the depth in (0, 1).
        num_blocks (`int`): Blocks of the transformer.

    Raises:
        ValueError: If there is no such block.
    """
    if 0 < align_layer < 1:
        return max(round(align_layer * num_blocks), 1) - 1
    if align_layer != int(align_layer) or not 1 <= align_layer <= num_blocks:
        raise ValueError(
            f"`align_layer` must be a block from 1 to {num_blocks} or a fraction of the depth between 0 and 1, got "
            f"{align_layer}."
        )
    return int(align_layer) - 1


def hidden_width(transformer: ModelMixin) -> int:
    """Width of the hidden states behind every block."""
    return transformer.config.num_attention_heads * transformer.config.attention_head_dim
