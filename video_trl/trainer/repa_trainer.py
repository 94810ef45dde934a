"""Alignment of a video transformer's hidden states with a teacher's tokens (VideoREPA, and REPA as its baseline)."""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from diffusers import ModelMixin
from torch import Tensor, nn

from ..data import is_encoded
from ..data.columns import MapDataset, undecoded
from ..data.encoding.teacher_tokens import dequantise_tokens, encode_teacher
from ..load import default_teacher, load_teacher
from ..losses.preference import repa_loss, trd_loss
from ..teachers import TeacherTokens, VideoTeacher
from .base_trainer import VideoTrainer
from .planning.estimate import Workload
from .publishing.citations import VIDEOREPA
from .repa.alignment import (
    FRAMES_PER_LATENT,
    AlignmentHead,
    AlignmentPlan,
    TokenGeometry,
    block_index,
    hidden_width,
    plan_alignment,
    student_geometry,
    tap_alignment,
)
from .repa.teacher_rows import (
    TEACHER_COLUMNS,
    PixelRows,
    SelectedRows,
    TeacherRows,
    TeacherVideoCollator,
    check_teacher_rows,
    has_teacher_tokens,
)
from .repa_config import VideoREPAConfig
from .setup.chosen_rows import chosen_as_video
from .setup.rows import IndexedDataset, encoded_cache_dir, prepare_rows


class VideoREPATrainer(VideoTrainer):
    """
    Train a video transformer on videos while the relations between its hidden states are drawn towards those between
    the tokens of a frozen video encoder, the teacher.

    The objective is VideoREPA's (https://huggingface.co/papers/2505.23656): the diffusion loss plus `coefficient`
    times token relation distillation (TRD); with `alignment_loss="repa"` it is its baseline, token-wise cosine.

    ```python
    from video_trl import VideoREPAConfig, VideoREPATrainer

    args = VideoREPAConfig(output_dir="cogvideox-repa", max_steps=2000, teacher="facebook/vjepa2-vitl-fpc64-256")
    trainer = VideoREPATrainer("zai-org/CogVideoX-5b", args, dataset)
    trainer.train()
    trainer.save_model()  # pipeline.load_lora_weights("cogvideox-repa"); teacher and head are not needed any more
    ```

    The dataset has video rows (`prompt`, `video`); of group and preference rows, the chosen video is taken. Encoded
    rows need the teacher's columns beside latents and prompt embeddings: see `TeacherRows`. The arguments of the
    constructor are those of `VideoTrainer`, and:

    Args:
        teacher ([`~video_trl.teachers.VideoTeacher`], *optional*):
            Teacher to use instead of the one that `args.teacher` names.
    """

    method_name = "REPA"
    tag = "repa"
    summary = "representation alignment ([VideoREPA](https://huggingface.co/papers/2505.23656))"
    citation = VIDEOREPA
    config_class = VideoREPAConfig
    row_type = "video"
    collator_class = TeacherVideoCollator
    uses_reference = False
    aligns_with_teacher = True

    def __init__(
        self,
        model: Any,
        args: VideoREPAConfig | None = None,
        train_dataset: MapDataset | None = None,
        eval_dataset: MapDataset | dict[str, MapDataset] | None = None,
        *,
        teacher: VideoTeacher | None = None,
        **arguments: Any,
    ) -> None:
        if teacher is not None and args is not None and args.teacher is not None:
            raise ValueError(f"Got a teacher twice: `teacher` and `args.teacher={args.teacher!r}`. Drop one of them.")
        self._given_teacher = teacher
        self._default_teacher = default_teacher(model)
        self._plans: dict[Any, AlignmentPlan] = {}
        self._teacher_width = 0
        self._shown: set[tuple[int, ...]] = set()  # sizes of videos that the teacher has seen one of
        super().__init__(model, args, train_dataset, eval_dataset, **arguments)

    # ---- Preparation ----

    @cached_property
    def teacher(self) -> VideoTeacher:
        """The teacher, loaded when it is first needed: never, where the rows carry its tokens."""
        if self._given_teacher is not None:
            return self._given_teacher.to(self.args.device)
        name = self.args.teacher or self._default_teacher
        assert name is not None, "refused by `check_dataset`"
        assert not isinstance(self.args.teacher_kwargs, str), "TrainingArguments parses JSON strings"
        return load_teacher(name, device=self.args.device, **(self.args.teacher_kwargs or {}))

    @classmethod
    def check_rows(cls, dataset: MapDataset, args: Any) -> None:
        super().check_rows(chosen_as_video(dataset), args)

    def check_dataset(self, dataset: MapDataset) -> None:
        super().check_dataset(dataset)
        videos = chosen_as_video(dataset)
        if has_teacher_tokens(videos):
            return
        if is_encoded(videos, self.row_type):
            raise ValueError(
                f"The dataset is encoded already, without the teacher's columns {list(TEACHER_COLUMNS)}. Pass the raw "
                "videos (what is cached is found again), or join it with its tokens: `TeacherRows(encoded, "
                "encode_teacher(raw, teacher, ...))`."
            )
        if self._given_teacher is None and self.args.teacher is None and self._default_teacher is None:
            raise ValueError(
                "Expected a teacher, got none. Set `teacher` in the configuration to a path or repository id (such as "
                "'facebook/vjepa2-vitl-fpc64-256'), or pass an object: `VideoREPATrainer(..., teacher=teacher)`."
            )

    def idle_options(self, datasets: Sequence[MapDataset], has_adapter: bool, has_optimizer: bool) -> dict[str, str]:
        videos = [chosen_as_video(dataset) for dataset in datasets]
        idle = super().idle_options(videos, has_adapter, has_optimizer)
        if self._given_teacher is not None:
            idle["teacher_kwargs"] = "the teacher was passed as an object"
        if all(map(has_teacher_tokens, videos)):
            names = ("teacher_kwargs", "teacher_batch_size", "precompute_teacher")
            idle |= dict.fromkeys(names, "the rows carry the teacher's tokens")
        return idle

    def prepare_dataset(self, dataset: MapDataset, transformer: ModelMixin) -> IndexedDataset:
        videos = undecoded(chosen_as_video(dataset))
        prepared = prepare_rows(
            videos,
            self.row_type,
            self.args,
            pipeline=self.pipeline,
            transformer=transformer,
            family=self.family,
            max_sequence_length=self.max_sequence_length,
            before_encoding=partial(self._show_teacher, transformer),
        )
        if has_teacher_tokens(videos):
            check_teacher_rows(videos, prepared.shapes)
        else:
            prepared = IndexedDataset(self._with_teacher(prepared.rows, videos), prepared.shapes)
        for shape in dict.fromkeys(prepared.shapes):
            row = prepared.rows[prepared.shapes.index(shape)]
            if "teacher_tokens" not in row:  # what is cached, or another process has encoded, was not shown
                self._show_teacher(transformer, row["video"].numpy())
            else:
                self._teacher_width = torch.as_tensor(row["teacher_tokens"]).shape[-1]
                grid, frame_times = (torch.as_tensor(row[name]).tolist() for name in TEACHER_COLUMNS[2:])
                self._plan(transformer, shape, grid, frame_times)
        return prepared

    def _pixels(self) -> dict[str, Any]:
        return {name: self.args.__dict__[name] for name in ("num_frames", "fps", "height", "width")}

    def _with_teacher(self, rows: Any, videos: MapDataset) -> MapDataset:
        """Encoded rows with the teacher's tokens, or with the pixels that it will look at."""
        skipped = {row.row for row in rows.skipped}
        if skipped:
            videos = SelectedRows(videos, [number for number in range(len(videos)) if number not in skipped])
        if not self.args.precompute_teacher:
            return PixelRows(rows, videos, self._pixels())
        tokens = encode_teacher(
            videos,
            self.teacher,
            cache_dir=encoded_cache_dir(self.args),
            batch_size=self.args.teacher_batch_size,
            device=self.args.device,
            **self._pixels(),
        )
        return TeacherRows(rows, tokens)

    def _show_teacher(self, transformer: ModelMixin, video: np.ndarray) -> None:
        """Whether the teacher's tokens of a video, uint8 `(T, H, W, 3)`, can be compared with the transformer's."""
        assert self.pipeline is not None
        if video.shape in self._shown:
            return
        self._shown.add(video.shape)
        output = self._look(torch.from_numpy(video)[None])
        channels = transformer.config.out_channels or transformer.config.in_channels
        frames_per_latent, side = self.family.compression(self.pipeline.vae)
        frames = (video.shape[0] - 1) // frames_per_latent + 1
        height, width = (pixels // side for pixels in video.shape[1:3])
        self._teacher_width = output.tokens.shape[-1]
        self._plan(transformer, (channels, frames, height, width), output.grid, output.frame_times.tolist())

    def _plan(
        self, transformer: nn.Module, latents_shape: Any, grid: Sequence[int], frame_times: Sequence[float]
    ) -> AlignmentPlan:
        """How the tokens of videos of this shape are aligned; a `ValueError` if they cannot be."""
        frames, height, width = grid
        teacher = TokenGeometry((frames, height, width), tuple(frame_times))
        key = (tuple(latents_shape[-3:]), teacher)
        if key not in self._plans:
            vae = self.pipeline.components.get("vae") if self.pipeline else None
            frames_per_latent = FRAMES_PER_LATENT if vae is None else self.family.compression(vae)[0]
            student = student_geometry(self.family, transformer, latents_shape, frames_per_latent)
            plan = plan_alignment(
                student,
                teacher,
                temporal_target=self.args.temporal_target,
                spatial_target=self.args.spatial_target,
            )
            self._check_plan(plan)
            self._plans[key] = plan.to(self.args.device)
        return self._plans[key]

    def _check_plan(self, plan: AlignmentPlan) -> None:
        if self.args.alignment_loss == "trd" and self.args.relations != "spatial" and len(plan.student_frames) < 2:
            raise ValueError(
                "Relations over time need two token frames behind the first latent frame, got one. Use longer videos, "
                "`temporal_target='teacher'`, or `relations='spatial'`."
            )
        if self.args.spatial_pooling == "conv":
            if 0 in plan.stride:
                raise ValueError(
                    f"`spatial_pooling='conv'` makes the transformer's grid coarser, but `spatial_target="
                    f"'{self.args.spatial_target}'` makes it {plan.height} x {plan.width}. Use 'area'."
                )
            strides = {other.stride for other in self._plans.values()} | {plan.stride}
            if len(strides) > 1:
                raise ValueError(
                    f"`spatial_pooling='conv'` has one stride, but the videos need {sorted(strides)}. Use "
                    "`spatial_pooling='area'`, or videos of one size."
                )

    def make_head(self, transformer: ModelMixin) -> nn.Module | None:
        blocks = self.family.blocks(transformer)
        self._block = block_index(self.args.align_layer, len(blocks))
        width = hidden_width(transformer)
        if self.args.alignment_loss == "repa" and self.args.projector == "none" and width != self._teacher_width:
            raise ValueError(
                f"`alignment_loss='repa'` compares token by token: with `projector='none'` the width of the "
                f"transformer ({width}) must be the teacher's ({self._teacher_width}). Use 'mlp' or 'linear'."
            )
        self.head = AlignmentHead(
            width,
            self._teacher_width,
            projector=self.args.projector,
            projector_width=self.args.projector_width,
            stride=next(iter(self._plans.values())).stride if self.args.spatial_pooling == "conv" else None,
        )
        return self.head if any(True for _ in self.head.parameters()) else None

    def head_learning_rate(self) -> float | None:
        return self.args.head_learning_rate

    def workload(self) -> Workload:
        """With the relation loss, on the grid with the most tokens."""
        if self.args.alignment_loss != "trd":
            return super().workload()
        grids = [(len(plan.student_frames), plan.height * plan.width) for plan in self._plans.values()]
        return replace(super().workload(), alignment=(*max(grids, key=math.prod), self._teacher_width))

    # ---- The loss ----

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, dict[str, Any]]:
        latents = inputs["latents"]  # (B, C, F, H, W)
        draw = self.step.draw(inputs["index"], latents.shape[1:])
        timesteps = self.step.timesteps(draw.u)  # (B,)
        denoising = self.step.prepare(latents, draw.noise[:, 0], timesteps, self.step.conditions(inputs))

        output = self.teacher_tokens(inputs)
        plan = self._plan(self.model, latents.shape, output.grid, output.frame_times.tolist())
        with tap_alignment(self.family, model, self._block, self.head, plan) as tap:
            error = self.passes.policy(model, denoising)  # (B,)

        assert tap.tokens is not None
        student, hidden = tap.tokens.projected, tap.tokens.hidden  # (B, F, N, D), (B, F, N, d)
        teacher = plan.align_teacher(output.tokens)  # (B, F, N, D)
        relations = {"margin": self.margin, **self.args.relation_arguments()}
        parts: dict[str, Tensor] = {}
        if self.args.alignment_loss == "repa":
            alignment = torch.stack([repa_loss(*pair) for pair in _one_by_one(student, teacher)])  # (B,)
        else:
            trd = [torch.stack(trd_loss(*pair, **relations)) for pair in _one_by_one(student, teacher)]
            alignment, parts["trd/spatial"], parts["trd/temporal"] = torch.stack(trd, dim=1)  # (B,) each
        coefficient = self.args.coefficient_at(self.state.global_step, self.state.max_steps)
        weighted = error
        if self.args.loss_weighting != "none":
            weighted = error * self.step.loss_weights(timesteps, self.args.loss_weighting, self.args.min_snr_gamma)
        losses = weighted + coefficient * alignment  # (B,)
        loss = losses.mean()

        with torch.no_grad():  # what the transformer itself has learned: a projector can absorb the loss above
            chunk = self.args.row_chunk
            raw = [trd_loss(*pair, margin=0.0, row_chunk=chunk)[0] for pair in _one_by_one(hidden, teacher)]
        self.record(
            {
                **parts,
                "loss/diffusion": error,
                "loss/alignment": alignment,
                "trd/raw": torch.stack(raw),
                "trd/coefficient": torch.full_like(error, coefficient),
            }
        )
        outputs = {"losses": losses, "errors": error, "alignment": alignment}
        return (loss, outputs) if return_outputs else loss

    def teacher_tokens(self, inputs: dict[str, Tensor]) -> TeacherTokens:
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
            return self.teacher(video.to(self.args.device).permute(0, 1, 4, 2, 3).float() / 255)

    @cached_property
    def margin(self) -> float:
        """Margin of the relations: as configured, or the one that suits the teacher."""
        known = self._given_teacher if "teacher" not in self.__dict__ else self.teacher  # loads nothing for its name
        name = None if known is None else known.name
        return self.args.margin_for(name or self.args.teacher or self._default_teacher)


def _one_by_one(student: Tensor, teacher: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Batches of one, because evaluation and metrics need the loss of each sample."""
    return list(zip(student.split(1), teacher.split(1), strict=True))
