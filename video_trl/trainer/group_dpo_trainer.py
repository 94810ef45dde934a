"""Groupwise preference optimisation of a video transformer (PhyGDPO)."""

from typing import Any

import torch
from torch import Tensor, nn

from ..data import GroupCollator, check_columns
from ..data.columns import MapDataset
from ..losses.preference import (
    group_dgr,
    group_dpo_bound,
    group_dpo_loss,
    group_dpo_sampled_bound,
    implicit_reward,
    physics_weights,
    sft_weights,
)
from .group_dpo_config import VideoGroupDPOConfig, as_sft_weight
from .preference_trainer import PreferenceTrainer
from .publishing.citations import PHYGDPO
from .step.denoising import to_device


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
    `chosen`, `rejected`), raw or encoded. The arguments of the constructor are those of `VideoTrainer`.
    """

    method_name = "GroupDPO"
    tag = "group-dpo"
    summary = "groupwise preference optimisation ([PhyGDPO](https://huggingface.co/papers/2512.24551))"
    citation = PHYGDPO
    config_class = VideoGroupDPOConfig
    row_type = "group"
    collator_class = GroupCollator
    workload_options = ("loss_type",)

    def check_dataset(self, dataset: MapDataset) -> None:
        super().check_dataset(dataset)
        check_columns(dataset, self.row_type, physics_rewarding=self.args.physics_rewarding)

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
        denoising = self.step.prepare(latents, noise, timesteps, conditions)

        reference_error = self.passes.reference(denoising, inputs["index"])
        policy_error = self.passes.policy(model, denoising)

        weighted = policy_error, reference_error
        if self.args.timestep_weighting == "bell":
            weights = self.step.bell_weights(timesteps)  # (B * (1 + k),)
            weighted = weights * policy_error, weights * reference_error
        rewards = implicit_reward(*weighted, self.args.beta).view(batch_size, group_size)
        chosen_rewards, rejected_rewards = rewards[:, 0], rewards[:, 1:]  # (B,), (B, k)
        alpha, gamma = torch.ones_like(rejected_rewards), torch.ones_like(rejected_rewards)
        if self.args.physics_rewarding:
            sa, pc = inputs["sa"][rows, compared], inputs["pc"][rows, compared]  # (B, k)
            alpha, gamma = physics_weights(sa, pc, **self.args.physics_weight_arguments())
        losses, ratio = self._group_loss(chosen_rewards, rejected_rewards, alpha, gamma, sizes)  # (B,) each

        regulariser: dict[str, Tensor] = {}
        sft_weight = as_sft_weight(self.args.sft_weight)
        if sft_weight != 0:
            chosen_error = weighted[0].view(batch_size, group_size)[:, 0]
            weight = sft_weights(sft_weight, ratio)  # (B,)
            regulariser = {"loss/dpo": losses, "loss/sft": chosen_error, "sft_weight": weight}
            regulariser["chosen_weight"] = ratio + weight
            losses = losses + weight * chosen_error
        loss = losses.mean()

        gap = (policy_error - reference_error).view(batch_size, group_size)
        counted: Any = (
            _first(rejected_rewards, sizes) if "num_rejected" in inputs else ...
        )  # all of them, without asking the device
        self.record(
            {
                **({"alpha": alpha[counted], "gamma": gamma[counted]} if self.args.physics_rewarding else {}),
                **regulariser,
                "rewards/chosen": chosen_rewards,
                "rewards/rejected": rejected_rewards[counted],
                "rewards/margins": (chosen_rewards[:, None] - rejected_rewards)[counted],
                "rewards/accuracies": (chosen_rewards[:, None] > rejected_rewards)[counted],
                "win_gap": gap[:, 0],
                "lose_gap": gap[:, 1:][counted],
            }
        )
        outputs = {"losses": losses, "chosen_rewards": chosen_rewards, "rejected_rewards": rejected_rewards}
        return (loss, outputs) if return_outputs else loss

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
