"""Groupwise preference optimisation of a video transformer (PhyGDPO)."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from diffusers import ModelMixin
from torch import Tensor, nn

from ..data import check_columns
from ..data.columns import MapDataset, undecoded
from ..load import default_teacher
from ..losses.preference import (
    SFTWeight,
    error_gap,
    gap_slope,
    group_dgr,
    group_dpo_bound,
    group_dpo_loss,
    group_dpo_sampled_bound,
    hold_lose_gap,
    physics_weights,
    sft_weights,
)
from ..teachers import VideoTeacher
from .group_dpo_config import VideoGroupDPOConfig, as_sft_weight
from .planning.estimate import Workload
from .preference_trainer import PreferenceTrainer
from .publishing.citations import PHYGDPO
from .repa.teacher_alignment import GroupAlignment, TeacherAlignment
from .repa.teacher_rows import TeacherGroupCollator
from .setup.chosen_rows import chosen_as_video
from .setup.idle_options import Passed
from .setup.rows import IndexedDataset
from .step.denoising import to_device
from .step.passes import StepMode


class VideoGroupDPOTrainer(PreferenceTrainer):
    """
    Train a video transformer to prefer one video, usually a real one, over m generated ones for the same prompt.

    The objective is PhyGDPO's (https://huggingface.co/papers/2512.24551): a Plackett-Luce likelihood that the chosen
    video ranks first in its group, or an upper bound of it whose terms are weighed by the physics scores of the
    rejected videos. The reference is the same network with the adapter switched off.

    ```python
    from video_trl import VideoGroupDPOConfig, VideoGroupDPOTrainer

    args = VideoGroupDPOConfig(output_dir="wan-phygdpo", max_steps=10_000)
    trainer = VideoGroupDPOTrainer("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", args, dataset)
    trainer.train()
    trainer.save_model()  # pipeline.load_lora_weights("wan-phygdpo") takes it from there
    ```

    The dataset has group rows (`prompt`, `chosen`, `rejected`, `rejected_scores`) or preference rows (`prompt`,
    `chosen`, `rejected`), raw or encoded. The arguments of the constructor are those of `VideoTrainer`, and:

    Args:
        teacher ([`~video_trl.teachers.VideoTeacher`], *optional*):
            With `repa_coeff`: teacher to use instead of the one that `repa_options` names.
    """

    args: VideoGroupDPOConfig

    method_name = "GroupDPO"
    tag = "group-dpo"
    summary = "groupwise preference optimisation ([PhyGDPO](https://huggingface.co/papers/2512.24551))"
    citation = PHYGDPO
    config_class = VideoGroupDPOConfig
    row_type = "group"
    collator_class = TeacherGroupCollator
    workload_options = ("loss_type",)

    def __init__(
        self,
        model: Any,
        args: VideoGroupDPOConfig | None = None,
        train_dataset: MapDataset | None = None,
        eval_dataset: MapDataset | dict[str, MapDataset] | None = None,
        *,
        teacher: VideoTeacher | None = None,
        **arguments: Any,
    ) -> None:
        if teacher is not None and (args is None or args.repa_coeff == 0):
            raise ValueError(
                "`teacher` is for `repa_coeff`, which is 0. Set it in the configuration, or drop `teacher`."
            )
        self._teacher, self._default_teacher = teacher, default_teacher(model)
        super().__init__(model, args, train_dataset, eval_dataset, **arguments)
        self._physics = self.args.physics_weight_arguments()

    # ---- The alignment of the chosen video, where there is one ----

    @cached_property
    def alignment(self) -> TeacherAlignment | None:
        """Teacher, grids, head and loss; none without `repa_coeff`."""
        options = self.args.alignment_options()
        if options is None:
            return None
        return TeacherAlignment(options, self.args, teacher=self._teacher, default_teacher=self._default_teacher)

    @cached_property
    def step_mode(self) -> StepMode:
        # Sharded weights of the head take part in every pass or in none; not every video's uses it.
        return "concat" if self.args.repa_coeff and self.engine != "ddp" else super().step_mode

    @cached_property
    def sft_weight(self) -> SFTWeight:
        """The option, read."""
        return as_sft_weight(self.args.sft_weight)

    def check_dataset(self, dataset: MapDataset) -> None:
        super().check_dataset(dataset)
        if self.alignment is not None:
            self.alignment.check(chosen_as_video(dataset), type(self).__name__)

    def idle_options(self, datasets: Sequence[MapDataset], passed: Passed) -> dict[str, str]:
        idle = super().idle_options(datasets, passed)
        if self.alignment is None:
            return idle
        videos = [chosen_as_video(dataset) for dataset in datasets]
        own = self.alignment.options.idle() | self.alignment.idle_options(videos)
        return idle | self.args.idle_repa_options(own)

    def prepare_dataset(self, dataset: MapDataset, transformer: ModelMixin) -> IndexedDataset:
        if self.alignment is None:
            return super().prepare_dataset(dataset, transformer)
        rows = self.alignment.prepare(
            undecoded(chosen_as_video(dataset)),
            lambda show: self.encode(dataset, transformer, show),
            transformer=transformer,
            family=self.family,
            pipeline=self.pipeline,
        )
        return self.keep_compared(rows)

    @classmethod
    def has_head(cls, args: Any) -> bool:
        return bool(args.repa_coeff)

    def make_head(self, transformer: ModelMixin) -> nn.Module | None:
        return None if self.alignment is None else self.alignment.make_head(transformer)

    def head_learning_rate(self) -> float | None:
        return None if self.alignment is None else self.alignment.options.head_learning_rate

    def workload(self) -> Workload:
        """With the relation loss, where there is one."""
        relations = None if self.alignment is None else self.alignment.largest_relations()
        return replace(super().workload(), alignment=relations)

    # ---- The loss ----

    @classmethod
    def check_rows(cls, dataset: MapDataset, args: Any) -> None:
        super().check_rows(dataset, args)
        check_columns(dataset, cls.row_type, physics_rewarding=args.physics_rewarding)

    @classmethod
    def videos_per_row(cls, args: Any, num_rejected: int) -> int:
        return 2 if args.loss_type == "sampled" else 1 + num_rejected

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, dict[str, Any]]:
        chosen, rejected = inputs["chosen_latents"], inputs["rejected_latents"]  # (B, C, F, H, W), (B, m, C, F, H, W)
        batch_size, num_rejected = rejected.shape[:2]
        num_compared = 1 if self.args.loss_type == "sampled" else num_rejected  # k

        # The whole group shares one timestep and, by default, one noise: only the videos differ.
        num_noises = 1 if self.args.shared_noise else 1 + num_compared
        counts = inputs.get("num_rejected", [num_rejected] * batch_size)  # fewer where the score decides which stay
        draw = self.step.draw(inputs["index"], chosen.shape[1:], num_noises=num_noises, num_choices=counts)
        compared = torch.arange(num_rejected, device=rejected.device).expand(batch_size, -1)  # (B, m)
        if self.args.loss_type == "sampled":
            compared = draw.choice[:, None]
        rows = torch.arange(batch_size, device=rejected.device)[:, None]
        rejected = rejected[rows, compared]  # (B, k, C, F, H, W)
        (sizes,) = to_device(rejected.device, torch.as_tensor(counts))  # (B,)

        group_size = 1 + num_compared
        latents = torch.cat([chosen[:, None], rejected], dim=1).flatten(0, 1)  # (B * (1 + k), C, F, H, W)
        noise = draw.noise.expand(-1, group_size, *chosen.shape[1:]).flatten(0, 1)
        timesteps = self.step.timesteps(draw.u).repeat_interleave(group_size)  # (B * (1 + k),)
        conditions = self.step.conditions(inputs, repeats=group_size)
        weights = inputs.get("loss_weights")  # (B, 1, F, H, W), the same for all videos of a row
        denoising = self.step.prepare(latents, noise, timesteps, conditions, group_size=group_size, weights=weights)

        reference_error = self.passes.reference(denoising, inputs["index"])
        aligned = None if self.alignment is None else self.alignment.of_groups(denoising, inputs)
        policy_error = self.passes.policy(model, denoising, None if aligned is None else aligned.beside)

        # What is recorded is never weighted: its scale would be another.
        recorded_gap = error_gap(policy_error, reference_error, self.args.gap).view(batch_size, group_size)
        weighted = policy_error, reference_error
        if self.args.timestep_weighting == "bell":
            weights = self.step.bell_weights(timesteps)  # (B * (1 + k),)
            weighted = weights * policy_error, weights * reference_error
        beta, gap = self.args.beta, error_gap(*weighted, self.args.gap).view(batch_size, group_size)
        held_gap = hold_lose_gap(gap[:, 1:], self.args.lose_gap_weight, self.args.lose_gap_clip)
        chosen_rewards, rejected_rewards = -(beta / 2) * gap[:, 0], -(beta / 2) * held_gap  # (B,), (B, k)
        alpha, gamma = torch.ones_like(rejected_rewards), torch.ones_like(rejected_rewards)
        if self.args.physics_rewarding:
            sa, pc = inputs["sa"][rows, compared], inputs["pc"][rows, compared]  # (B, k)
            alpha, gamma = physics_weights(sa, pc, **self._physics)
        losses, ratio = self._group_loss(chosen_rewards, rejected_rewards, alpha, gamma, sizes)  # (B,) each

        chosen_error = weighted[0].view(batch_size, group_size)[:, 0]
        losses, beside = self._regularised(losses, ratio, chosen_error, gap[:, 0], aligned)
        loss = losses.mean()

        counted: Any = (
            _first(rejected_rewards, sizes) if "num_rejected" in inputs else ...
        )  # all of them, without asking the device
        self.record(
            {
                **({"alpha": alpha[counted], "gamma": gamma[counted]} if self.args.physics_rewarding else {}),
                **beside,
                **({} if aligned is None else aligned.metrics),
                "rewards/chosen": chosen_rewards,
                "rewards/rejected": rejected_rewards[counted],
                "rewards/margins": (chosen_rewards[:, None] - rejected_rewards)[counted],
                "rewards/accuracies": (chosen_rewards[:, None] > rejected_rewards)[counted],
                "win_gap": recorded_gap[:, 0],
                "lose_gap": recorded_gap[:, 1:][counted],
            }
        )
        outputs = {"losses": losses, "chosen_rewards": chosen_rewards, "rejected_rewards": rejected_rewards}
        return (loss, outputs) if return_outputs else loss

    def _regularised(
        self, losses: Tensor, ratio: Tensor, chosen_error: Tensor, win_gap: Tensor, aligned: GroupAlignment | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Losses `(B,)` of groups with what is added beside the preference, and its metrics."""
        preference, metrics = losses, dict[str, Tensor]()
        if self.sft_weight != 0:
            pull = ratio * gap_slope(chosen_error, self.args.gap)  # (B,), on the chosen error
            weight = sft_weights(self.sft_weight, pull)  # (B,)
            metrics |= {"loss/sft": chosen_error, "sft_weight": weight, "chosen_weight": pull + weight}
            losses = losses + weight * chosen_error
        if self.args.win_gap_penalty > 0:
            losses = losses + self.args.win_gap_penalty * win_gap.relu()
        if self.alignment is not None and aligned is not None and aligned.losses is not None:
            coefficient = self.alignment.options.coefficient_at(self.state.global_step, self.state.max_steps)
            metrics["trd/coefficient"] = torch.full_like(losses, coefficient)
            losses = losses + coefficient * aligned.losses
        return losses, metrics if losses is preference else {"loss/dpo": preference, **metrics}

    def _group_loss(
        self, chosen_rewards: Tensor, rejected_rewards: Tensor, alpha: Tensor, gamma: Tensor, sizes: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Loss `(B,)` of groups, and what it multiplies the gradient of the chosen video's error by `(B,)`."""
        beta, stays = self.args.beta, _first(rejected_rewards, sizes)
        if self.args.loss_type == "plackett_luce":
            ranked = rejected_rewards.where(stays, -torch.inf)
            return group_dpo_loss(chosen_rewards, ranked), group_dgr(chosen_rewards, ranked, beta)
        if self.args.loss_type == "sum":
            losses = group_dpo_bound(chosen_rewards, rejected_rewards, alpha, gamma * stays)
            return losses, group_dgr(chosen_rewards, rejected_rewards, beta, alpha, gamma * stays)
        times = sizes if self.args.scale_by_group else torch.ones_like(sizes)
        losses = group_dpo_sampled_bound(
            chosen_rewards, rejected_rewards[:, 0], alpha[:, 0], gamma[:, 0], num_rejected=times
        )
        return losses, group_dgr(chosen_rewards, rejected_rewards, beta, alpha, gamma * times[:, None])


def _first(values: Tensor, sizes: Tensor) -> Tensor:
    """Mask `(B, k)` of the first `sizes` `(B,)` of each row: the rejected videos that a group compares with."""
    return torch.arange(values.shape[1], device=values.device) < sizes[:, None]
