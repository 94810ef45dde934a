"""Preference optimisation of a video transformer (Diffusion-DPO, Flow-DPO)."""

from typing import Any

import torch
from torch import Tensor, nn

from ..data import GroupCollator, check_columns
from ..data.columns import MapDataset
from ..losses.preference import dgr, dpo_loss, error_gap, hold_lose_gap, mapo_loss
from .dpo_config import VideoDPOConfig
from .preference_trainer import PreferenceTrainer
from .publishing.citations import DIFFUSION_DPO


class VideoDPOTrainer(PreferenceTrainer):
    """
    Train a video transformer to prefer the chosen video of a pair over the rejected one.

    The objective is that of Diffusion-DPO (https://huggingface.co/papers/2311.12908) and Flow-DPO
    (https://huggingface.co/papers/2501.13918). It fixes the difference of the two errors only and can be met by
    raising both: [`VideoRegDPOTrainer`] is the cure, and [`CollapseMonitor`] tells when it is needed.

    ```python
    from video_trl import VideoDPOConfig, VideoDPOTrainer

    trainer = VideoDPOTrainer("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", VideoDPOConfig(output_dir="wan-dpo"), dataset)
    trainer.train()
    trainer.save_model()  # pipeline.load_lora_weights("wan-dpo") takes it from there
    ```

    The dataset has preference rows (`prompt`, `chosen`, `rejected`), raw or encoded; of group rows, one rejected video
    is drawn in each step. With `pair_weights`, rows have a `weight` as well. The arguments of the constructor
    are those of `VideoTrainer`.
    """

    method_name = "DPO"
    tag = "dpo"
    summary = "preference optimisation ([Diffusion-DPO](https://huggingface.co/papers/2311.12908))"
    citation = DIFFUSION_DPO
    config_class = VideoDPOConfig
    row_type = "preference"
    collator_class = GroupCollator
    workload_options = ("loss_type",)

    @classmethod
    def has_reference(cls, args: Any) -> bool:
        return bool(args.loss_type != "mapo")

    @classmethod
    def check_rows(cls, dataset: MapDataset, args: Any) -> None:
        super().check_rows(dataset, args)
        check_columns(dataset, cls.row_type, pair_weights=args.pair_weights)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, dict[str, Any]]:
        chosen, rejected = inputs["chosen_latents"], inputs["rejected_latents"]  # (B, C, F, H, W), (B, m, C, F, H, W)
        batch_size, num_rejected = rejected.shape[:2]

        # The pair shares one timestep and, by default, one noise: only the videos differ.
        num_noises = 1 if self.args.shared_noise else 2
        choices = inputs.get("num_rejected", num_rejected)  # fewer where the score decides which stay
        draw = self.step.draw(inputs["index"], chosen.shape[1:], num_noises=num_noises, num_choices=choices)
        rejected = rejected[torch.arange(batch_size, device=rejected.device), draw.choice]  # (B, C, F, H, W)

        latents = torch.stack([chosen, rejected], dim=1).flatten(0, 1)  # (2B, C, F, H, W), pairs side by side
        noise = draw.noise.expand(-1, 2, *chosen.shape[1:]).flatten(0, 1)
        timesteps = self.step.timesteps(draw.u).repeat_interleave(2)  # (2B,)
        conditions = self.step.conditions(inputs, repeats=2)
        weights = inputs.get("loss_weights")  # (B, 1, F, H, W), the same for all videos of a row
        denoising = self.step.prepare(latents, noise, timesteps, conditions, group_size=2, weights=weights)

        if self.args.loss_type == "mapo":
            losses, outputs = self._without_reference(self.passes.policy(model, denoising), inputs)
            return (losses.mean(), outputs) if return_outputs else losses.mean()
        reference_error = self.passes.reference(denoising, inputs["index"])
        policy_error = self.passes.policy(model, denoising)

        beta, kind = self.args.beta, self.args.loss_arguments()
        gap = error_gap(policy_error, reference_error, self.args.gap)  # (2B,)
        win_gap, lose_gap = gap.view(batch_size, 2).unbind(dim=1)  # (B,) each
        held_gap = hold_lose_gap(lose_gap, self.args.lose_gap_weight, self.args.lose_gap_clip)
        chosen_rewards, rejected_rewards = -(beta / 2) * win_gap, -(beta / 2) * held_gap
        losses = dpo_loss(chosen_rewards, rejected_rewards, **kind)  # (B,)
        penalised: dict[str, Tensor] = {}
        if self.args.win_gap_penalty > 0:
            penalised["loss/dpo"] = losses
            losses = losses + self.args.win_gap_penalty * win_gap.relu()
        if self.args.pair_weights:
            losses = inputs["weight"] * losses
        loss = losses.mean()

        self.record(
            {
                **penalised,
                "win_gap": win_gap,
                "lose_gap": lose_gap,
                "s_theta": win_gap - held_gap,
                "dgr": dgr(win_gap - held_gap, beta, **kind),
                "rewards/chosen": chosen_rewards,
                "rewards/rejected": rejected_rewards,
                "rewards/margins": chosen_rewards - rejected_rewards,
                "rewards/accuracies": chosen_rewards > rejected_rewards,
            }
        )
        outputs = {"losses": losses, "chosen_rewards": chosen_rewards, "rejected_rewards": rejected_rewards}
        return (loss, outputs) if return_outputs else loss

    def _without_reference(self, policy_error: Tensor, inputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Losses `(B,)` of MaPO, and outputs."""
        chosen_error, rejected_error = policy_error.view(-1, 2).unbind(dim=1)  # (B,) each
        losses, chosen, rejected = mapo_loss(chosen_error, rejected_error, beta=self.args.beta)
        if self.args.pair_weights:
            losses = inputs["weight"] * losses
        self.record(
            {
                "loss/sft": chosen_error,
                "rewards/chosen": chosen,
                "rewards/rejected": rejected,
                "rewards/margins": chosen - rejected,
                "rewards/accuracies": chosen > rejected,
            }
        )
        return losses, {"losses": losses, "chosen_rewards": chosen, "rejected_rewards": rejected}
