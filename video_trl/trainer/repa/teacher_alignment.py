"""Alignment of hidden states with a teacher, as a part of a trainer: teacher, grids, head and loss."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, ModelMixin
from torch import Tensor, nn

from ...data import is_encoded
from ...data.columns import MapDataset
from ...data.encoding.teacher_tokens import dequantise_tokens, encode_teacher
from ...load import load_teacher
from ...losses.alignment import repa_loss, trd_loss
from ...models import ModelFamily
from ...teachers import TeacherTokens, VideoTeacher
from ..base_config import VideoConfig
from ..setup.rows import IndexedDataset, encoded_cache_dir
from ..step.denoising import Denoising
from ..step.passes import Beside
from .alignment import (
    AlignedTokens,
    AlignmentHead,
    AlignmentPlan,
    AlignmentTap,
    TokenGeometry,
    block_index,
    hidden_width,
    plan_alignment,
    student_geometry,
    tap_alignment,
)
from .options import AlignmentOptions
from .teacher_rows import (
    TEACHER_COLUMNS,
    PixelRows,
    SelectedRows,
    TeacherRows,
    check_teacher_rows,
    has_teacher_tokens,
)


class TeacherAlignment:
    """
    What a trainer needs to draw hidden states towards a teacher's tokens.

    Args:
        options ([`AlignmentOptions`]): What is aligned, and how.
        args (`VideoConfig`): Of the trainer: sizes of videos, device, cache.
        teacher ([`~video_trl.teachers.VideoTeacher`], *optional*): An object, instead of the name in `options`.
        default_teacher (`str`, *optional*): Name of the teacher where neither is given.

    Attributes:
        head ([`AlignmentHead`]): From hidden states to the teacher's grid and width, once it is made.

    Raises:
        ValueError: If there are two teachers.
    """

    def __init__(
        self,
        options: AlignmentOptions,
        args: VideoConfig,
        *,
        teacher: VideoTeacher | None = None,
        default_teacher: str | None = None,
    ) -> None:
        if teacher is not None and options.teacher is not None:
            raise ValueError(
                f"Got a teacher twice: `teacher` and `args.teacher={options.teacher!r}`. Drop one of them."
            )
        self.options, self._args = options, args
        self._given, self._name = teacher, options.teacher or default_teacher
        self._plans: dict[Any, AlignmentPlan] = {}
        self._width = 0
        self._shown: set[tuple[int, ...]] = set()  # sizes of videos that the teacher has seen one of

    @cached_property
    def teacher(self) -> VideoTeacher:
        """The teacher, loaded when it is first needed: never, where the rows carry its tokens."""
        if self._given is not None:
            return self._given.to(self._args.device)
        assert self._name is not None, "refused by `check`"
        assert not isinstance(self.options.teacher_kwargs, str), "TrainingArguments parses JSON strings"
        return load_teacher(self._name, device=self._args.device, **(self.options.teacher_kwargs or {}))

    @cached_property
    def margin(self) -> float:
        """Margin of the relations: as configured, or the one that suits the teacher."""
        known = self._given if "teacher" not in self.__dict__ else self.teacher  # loads nothing for its name
        return self.options.margin_for((None if known is None else known.name) or self._name)

    # ---- Preparation ----

    def check(self, videos: MapDataset, trainer: str) -> None:
        """Raise a `ValueError` if nothing can give the teacher's tokens of these video rows."""
        if has_teacher_tokens(videos):
            return
        if is_encoded(videos, "video"):
            raise ValueError(
                f"The dataset is encoded already, without the teacher's columns {list(TEACHER_COLUMNS)}. Pass the raw "
                "videos (what is cached is found again), or join it with its tokens: `TeacherRows(encoded, "
                "encode_teacher(raw, teacher, ...))`."
            )
        if self._given is None and self._name is None:
            raise ValueError(
                "Expected a teacher, got none. Set `teacher` in the configuration to a path or repository id (such as "
                f"'facebook/vjepa2-vitl-fpc64-256'), or pass an object: `{trainer}(..., teacher=teacher)`."
            )

    def idle_options(self, videos: Sequence[MapDataset]) -> dict[str, str]:
        """Options that the teacher, or what the rows carry, leaves without effect, and why."""
        idle = {} if self._given is None else {"teacher_kwargs": "the teacher was passed as an object"}
        if all(map(has_teacher_tokens, videos)):
            names = ("teacher_kwargs", "teacher_batch_size", "precompute_teacher")
            idle |= dict.fromkeys(names, "the rows carry the teacher's tokens")
        return idle

    def prepare(
        self,
        videos: MapDataset,
        encode: Callable[[Callable[[np.ndarray], None]], IndexedDataset],
        *,
        transformer: ModelMixin,
        family: ModelFamily,
        pipeline: DiffusionPipeline | None,
    ) -> IndexedDataset:
        """
        Encoded rows with the teacher's tokens, or the pixels that it will look at, beside them; plans the grids.

        Args:
            videos (`MapDataset`): The rows as video rows, raw or encoded.
            encode (`Callable`): Encodes and checks the rows; shows a video of every size to its argument before.
            transformer (`ModelMixin`): The model.
            family ([`ModelFamily`]): Of the transformer.
            pipeline (`DiffusionPipeline`, *optional*): The transformer's.

        Raises:
            ValueError: If there is no such block, tokens cannot be compared with the transformer's, or a row that
                brings its own is unlike the others.
        """
        self._family, self._pipeline = family, pipeline
        self._block = block_index(self.options.align_layer, len(family.blocks(transformer)))
        prepared = encode(partial(self._show_teacher, transformer))
        if has_teacher_tokens(videos):
            check_teacher_rows(videos, prepared.shapes)
        else:
            prepared = IndexedDataset(self._with_teacher(prepared.rows, videos), prepared.shapes)
        for shape in dict.fromkeys(prepared.shapes):
            row = prepared.rows[prepared.shapes.index(shape)]
            if "teacher_tokens" not in row:  # what is cached, or another process has encoded, was not shown
                self._show_teacher(transformer, row["video"].numpy())
            else:
                self._width = torch.as_tensor(row["teacher_tokens"]).shape[-1]
                grid, frame_times = (torch.as_tensor(row[name]).tolist() for name in TEACHER_COLUMNS[2:])
                self._plan(transformer, shape, grid, frame_times)
        return prepared

    def _pixels(self) -> dict[str, Any]:
        return {name: self._args.__dict__[name] for name in ("num_frames", "fps", "height", "width")}

    def _with_teacher(self, rows: Any, videos: MapDataset) -> MapDataset:
        skipped = {row.row for row in rows.skipped}
        if skipped:
            videos = SelectedRows(videos, [number for number in range(len(videos)) if number not in skipped])
        if not self.options.precompute_teacher:
            return PixelRows(rows, videos, self._pixels())
        tokens = encode_teacher(
            videos,
            self.teacher,
            cache_dir=encoded_cache_dir(self._args),
            batch_size=self.options.teacher_batch_size,
            device=self._args.device,
            **self._pixels(),
        )
        return TeacherRows(rows, tokens)

    def _show_teacher(self, transformer: ModelMixin, video: np.ndarray) -> None:
        """Whether the teacher's tokens of a video, uint8 `(T, H, W, 3)`, can be compared with the transformer's."""
        assert self._pipeline is not None
        if video.shape in self._shown:
            return
        self._shown.add(video.shape)
        output = self._look(torch.from_numpy(video)[None])
        channels = transformer.config.out_channels or transformer.config.in_channels
        frames_per_latent, side = self._family.compression(self._pipeline.vae)
        frames = (video.shape[0] - 1) // frames_per_latent + 1
        height, width = (pixels // side for pixels in video.shape[1:3])
        self._width = output.tokens.shape[-1]
        self._plan(transformer, (channels, frames, height, width), output.grid, output.frame_times.tolist())

    def _plan(
        self, transformer: nn.Module, latents_shape: Any, grid: Sequence[int], frame_times: Sequence[float]
    ) -> AlignmentPlan:
        """How the tokens of videos of this shape are aligned; a `ValueError` if they cannot be."""
        frames, height, width = grid
        teacher = TokenGeometry((frames, height, width), tuple(frame_times))
        key = (tuple(latents_shape[-3:]), teacher)
        if key not in self._plans:
            vae = self._pipeline.components.get("vae") if self._pipeline else None
            frames_per_latent = self._family.frames_per_latent if vae is None else self._family.compression(vae)[0]
            student = student_geometry(self._family, transformer, latents_shape, frames_per_latent)
            plan = plan_alignment(
                student,
                teacher,
                temporal_target=self.options.temporal_target,
                spatial_target=self.options.spatial_target,
            )
            self._check_plan(plan)
            self._plans[key] = plan.to(self._args.device)
        return self._plans[key]

    def _check_plan(self, plan: AlignmentPlan) -> None:
        options = self.options
        if options.alignment_loss == "trd" and options.relations != "spatial" and len(plan.student_frames) < 2:
            raise ValueError(
                "Relations over time need two token frames behind the first latent frame, got one. Use longer videos, "
                "`temporal_target='teacher'`, or `relations='spatial'`."
            )
        if options.spatial_pooling == "conv":
            if 0 in plan.stride:
                raise ValueError(
                    f"`spatial_pooling='conv'` makes the transformer's grid coarser, but `spatial_target="
                    f"'{options.spatial_target}'` makes it {plan.height} x {plan.width}. Use 'area'."
                )
            strides = {other.stride for other in self._plans.values()} | {plan.stride}
            if len(strides) > 1:
                raise ValueError(
                    f"`spatial_pooling='conv'` has one stride, but the videos need {sorted(strides)}. Use "
                    "`spatial_pooling='area'`, or videos of one size."
                )

    def make_head(self, transformer: ModelMixin) -> AlignmentHead | None:
        """The head, where it has weights to train; to be called once the rows are prepared."""
        options, width = self.options, hidden_width(transformer)
        if options.alignment_loss == "repa" and options.projector == "none" and width != self._width:
            raise ValueError(
                f"`alignment_loss='repa'` compares token by token: with `projector='none'` the width of the "
                f"transformer ({width}) must be the teacher's ({self._width}). Use 'mlp' or 'linear'."
            )
        self.head = AlignmentHead(
            width,
            self._width,
            projector=options.projector,
            projector_width=options.projector_width,
            stride=next(iter(self._plans.values())).stride if options.spatial_pooling == "conv" else None,
        )
        return self.head if any(True for _ in self.head.parameters()) else None

    def largest_relations(self) -> tuple[int, int, int] | None:
        """Token frames, tokens of a frame and width of the teacher, on the grid with the most; none without TRD."""
        if self.options.alignment_loss != "trd":
            return None
        grids = [(len(plan.student_frames), plan.height * plan.width) for plan in self._plans.values()]
        return (*max(grids, key=math.prod), self._width)

    # ---- In a step ----

    def look(self, inputs: dict[str, Tensor]) -> TeacherTokens:
        """What the teacher saw in the videos of a batch, from the cache or by looking at them now."""
        if "video" in inputs:
            return self._look(inputs["video"])
        tokens = dequantise_tokens(inputs["teacher_tokens"], inputs["teacher_scale"])
        # These two stay on the host, which decides by them; a collator makes tensors of them, the loader lists.
        grid, frame_times = (torch.as_tensor(inputs[name]) for name in TEACHER_COLUMNS[2:])
        return TeacherTokens(tokens, tuple(grid.tolist()), frame_times)

    def _look(self, video: Tensor) -> TeacherTokens:
        """The teacher's tokens of videos, uint8 `(B, T, H, W, 3)`."""
        with torch.no_grad():
            return self.teacher(video.to(self._args.device).permute(0, 1, 4, 2, 3).float() / 255)

    def of_groups(self, denoising: Denoising, inputs: dict[str, Tensor]) -> "GroupAlignment":
        """What aligns the first video of each group of a batch in the forwards that give its error."""
        return GroupAlignment(self, self.look(inputs), denoising)

    @contextmanager
    def tap(
        self, model: nn.Module, latents_shape: Sequence[int], seen: TeacherTokens, *, every: int = 1
    ) -> Iterator[AlignmentTap]:
        """
        A context in which the head runs on the hidden states of a forward.

        Args:
            model (`torch.nn.Module`): The policy, as it is wrapped for training.
            latents_shape (`Sequence[int]`): Shape `(..., C, F, H, W)` of the latents.
            seen (`TeacherTokens`): What the teacher saw in the same videos.
            every (`int`, defaults to `1`): Which videos of the forward are aligned: the first of each so many.
        """
        plan = self._plan(model, latents_shape, seen.grid, seen.frame_times.tolist())
        with tap_alignment(self._family, model, self._block, self.head, plan, every=every) as tap:
            yield tap

    def losses(
        self, tokens: AlignedTokens, seen: TeacherTokens, *, raw: bool = True
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """
        Alignment loss of each video, and metrics.

        Args:
            tokens (`AlignedTokens`): What the head made of the hidden states of B videos.
            seen (`TeacherTokens`): What the teacher saw in them.
            raw (`bool`, defaults to `True`): Whether `trd/raw` is wanted, which takes as long as the loss.

        Returns:
            `tuple[torch.Tensor, dict[str, torch.Tensor]]`: `(B,)`, and by name `(B,)`: `loss/alignment`, the parts of
            TRD, and `trd/raw`, what the transformer itself has learned (a projector can absorb the loss).
        """
        teacher = tokens.plan.align_teacher(seen.tokens)  # (B, F, N, D)
        relations = {"margin": self.margin, **self.options.relation_arguments()}
        parts: dict[str, Tensor] = {}
        if self.options.alignment_loss == "repa":
            losses = torch.stack([repa_loss(*pair) for pair in _one_by_one(tokens.projected, teacher)])  # (B,)
        else:
            trd = [torch.stack(trd_loss(*pair, **relations)) for pair in _one_by_one(tokens.projected, teacher)]
            losses, parts["trd/spatial"], parts["trd/temporal"] = torch.stack(trd, dim=1)  # (B,) each
        if raw:
            with torch.no_grad():
                chunk, pairs = self.options.row_chunk, _one_by_one(tokens.hidden, teacher)
                parts["trd/raw"] = torch.stack([trd_loss(*pair, margin=0.0, row_chunk=chunk)[0] for pair in pairs])
        return losses, {**parts, "loss/alignment": losses}


class GroupAlignment:
    """
    The alignment of the first video of each group, from the very forwards that give their errors.

    Args:
        alignment ([`TeacherAlignment`]): Of the trainer.
        seen (`TeacherTokens`): What the teacher saw in the first videos.
        denoising ([`~video_trl.trainer.step.denoising.Denoising`]): All videos of the groups.

    Attributes:
        beside ([`~video_trl.trainer.step.passes.Beside`]): For the passes of the policy.
    """

    def __init__(self, alignment: TeacherAlignment, seen: TeacherTokens, denoising: Denoising) -> None:
        self.beside = Beside(self._around)
        self._alignment, self._seen, self._denoising = alignment, seen, denoising
        self._metrics: dict[int, dict[str, Tensor]] = {}  # of groups, by the first one

    @contextmanager
    def _around(self, model: nn.Module, groups: slice) -> Iterator[Callable[[], Tensor]]:
        part, first = replace(self._seen, tokens=self._seen.tokens[groups]), groups.start or 0

        def losses() -> Tensor:
            assert tap.tokens is not None
            is_first_pass = first not in self._metrics
            values, found = self._alignment.losses(tap.tokens, part, raw=is_first_pass)
            if is_first_pass:
                self._metrics[first] = found
            return values

        shape, every = self._denoising.target.shape, self._denoising.group_size
        with self._alignment.tap(model, shape, part, every=every) as tap:
            yield losses

    @property
    def losses(self) -> Tensor | None:
        """Alignment losses `(B,)`, once the policy has run; none where the reference alone is wanted."""
        return self.beside.values

    @property
    def metrics(self) -> dict[str, Tensor]:
        """By name, `(B,)`; see [`TeacherAlignment.losses`]."""
        found = [self._metrics[first] for first in sorted(self._metrics)]
        return {name: torch.cat([each[name] for each in found]) for name in found[0]} if found else {}


def _one_by_one(student: Tensor, teacher: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Batches of one, because evaluation and metrics need the loss of each sample."""
    return list(zip(student.split(1), teacher.split(1), strict=True))
