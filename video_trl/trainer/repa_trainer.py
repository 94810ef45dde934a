"""Alignment of a video transformer's hidden states with a teacher's tokens (VideoREPA, and REPA as its baseline)."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from diffusers import ModelMixin
from torch import Tensor, nn

from ..data.columns import MapDataset, undecoded
from ..load import default_teacher
from ..teachers import VideoTeacher
from .base_trainer import VideoTrainer
from .planning.estimate import Workload
from .publishing.citations import VIDEOREPA
from .repa.teacher_alignment import TeacherAlignment
from .repa.teacher_rows import TeacherVideoCollator
from .repa_config import VideoREPAConfig
from .setup.chosen_rows import chosen_as_video
from .setup.idle_options import Passed
from .setup.rows import IndexedDataset


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
    printed_metrics = ("loss/diffusion", "loss/alignment", "trd/raw")

    args: VideoREPAConfig

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
        self._teacher, self._default_teacher = teacher, default_teacher(model)
        super().__init__(model, args, train_dataset, eval_dataset, **arguments)

    # ---- Preparation ----

    @cached_property
    def alignment(self) -> TeacherAlignment:
        """Teacher, grids, head and loss."""
        return TeacherAlignment(self.args, self.args, teacher=self._teacher, default_teacher=self._default_teacher)

    @classmethod
    def check_rows(cls, dataset: MapDataset, args: Any) -> None:
        super().check_rows(chosen_as_video(dataset), args)

    def check_dataset(self, dataset: MapDataset) -> None:
        super().check_dataset(dataset)
        self.alignment.check(chosen_as_video(dataset), type(self).__name__)

    def idle_options(self, datasets: Sequence[MapDataset], passed: Passed) -> dict[str, str]:
        videos = [chosen_as_video(dataset) for dataset in datasets]
        return super().idle_options(videos, passed) | self.alignment.idle_options(videos)

    def prepare_dataset(self, dataset: MapDataset, transformer: ModelMixin) -> IndexedDataset:
        videos = undecoded(chosen_as_video(dataset))
        return self.alignment.prepare(
            videos,
            lambda show: self.encode(videos, transformer, show),
            transformer=transformer,
            family=self.family,
            pipeline=self.pipeline,
        )

    def make_head(self, transformer: ModelMixin) -> nn.Module | None:
        return self.alignment.make_head(transformer)

    def head_learning_rate(self) -> float | None:
        return self.args.head_learning_rate

    def workload(self) -> Workload:
        """With the relation loss, on the grid with the most tokens."""
        return replace(super().workload(), alignment=self.alignment.largest_relations())

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

        seen = self.alignment.look(inputs)  # by the teacher
        with self.alignment.tap(model, latents.shape, seen) as tap:
            error = self.passes.policy(model, denoising)  # (B,)

        assert tap.tokens is not None
        alignment, metrics = self.alignment.losses(tap.tokens, seen)  # (B,)
        coefficient = self.args.coefficient_at(self.state.global_step, self.state.max_steps)
        weighted = error
        if self.args.loss_weighting != "none":
            weighted = error * self.step.loss_weights(timesteps, self.args.loss_weighting, self.args.min_snr_gamma)
        losses = weighted + coefficient * alignment  # (B,)
        loss = losses.mean()

        coefficients = torch.full_like(error, coefficient)
        self.record({"loss/diffusion": error, **metrics, "trd/coefficient": coefficients})
        outputs = {"losses": losses, "errors": error, "alignment": alignment}
        return (loss, outputs) if return_outputs else loss
