"""Preference optimisation of a video transformer, regularised by the error of the chosen video (Reg-DPO)."""

from typing import Any

import torch
from torch import Tensor, nn

from ..data import GroupCollator
from ..losses.preference import error_gap, reg_dpo_loss
from .preference_trainer import PreferenceTrainer
from .publishing.citations import REG_DPO
from .reg_dpo_config import VideoRegDPOConfig


class VideoRegDPOTrainer(PreferenceTrainer):
    """
    Train a video transformer to prefer the chosen video of a pair, without losing the ability to make it.

    The objective is Reg-DPO's (https://huggingface.co/papers/2511.01450): the DPO loss plus r times the error of the
    chosen video, where r is fixed or follows the DPO gradient ratio of each pair.

    ```python
    from video_trl import VideoRegDPOConfig, VideoRegDPOTrainer

    args = VideoRegDPOConfig(output_dir="wan-reg-dpo")
    trainer = VideoRegDPOTrainer("Wan-AI/Wan2.1-T2V-14B-Diffusers", args, dataset)
    trainer.train()
    trainer.save_model()  # pipeline.load_lora_weights("wan-reg-dpo") takes it from there
    ```

    The dataset has preference rows (`prompt`, `chosen`, `rejected`), raw or encoded; of group rows, one rejected video
    is drawn in each step. The arguments of the constructor are those of `VideoTrainer`.
    """

    method_name = "RegDPO"
    tag = "reg-dpo"
    summary = "SFT-regularised preference optimisation ([Reg-DPO](https://huggingface.co/papers/2511.01450))"
    citation = REG_DPO
    config_class = VideoRegDPOConfig
    row_type = "preference"
    collator_class = GroupCollator

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

        reference_error = self.passes.reference(denoising, inputs["index"]).view(batch_size, 2)
        policy_error = self.passes.policy(model, denoising).view(batch_size, 2)

        coefficient = self.args.sft_coefficient
        losses, metrics = reg_dpo_loss(
            policy_error[:, 0],
            reference_error[:, 0],
            policy_error[:, 1],
            reference_error[:, 1],
            beta=self.args.beta,
            sft_weight=("dgr", coefficient) if self.args.sft_weight_mode == "dgr" else coefficient,
            gap=self.args.gap,
            lose_gap_weight=self.args.lose_gap_weight,
            lose_gap_clip=self.args.lose_gap_clip,
        )
        if self.args.win_gap_penalty > 0:
            win_gap = error_gap(policy_error[:, 0], reference_error[:, 0], self.args.gap)
            losses = losses + self.args.win_gap_penalty * win_gap.relu()
        loss = losses.mean()

        self.record(metrics)
        outputs = {
            "losses": losses,
            "chosen_rewards": metrics["rewards/chosen"],
            "rejected_rewards": metrics["rewards/rejected"],
        }
        return (loss, outputs) if return_outputs else loss
