"""Supervised fine-tuning of a video transformer: the control for every preference method."""

from typing import Any

from diffusers import ModelMixin
from torch import Tensor, nn

from ..data import VideoCollator
from ..data.columns import MapDataset
from .base_trainer import VideoTrainer
from .setup.chosen_rows import chosen_as_video
from .setup.rows import IndexedDataset
from .sft_config import VideoSFTConfig


class VideoSFTTrainer(VideoTrainer):
    """
    Train a video transformer on videos, by the objective that it was pre-trained with.

    ```python
    trainer = VideoSFTTrainer("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", VideoSFTConfig(output_dir="wan-sft"), dataset)
    trainer.train()
    ```

    The dataset has video rows (`prompt`, `video`), raw or encoded; of group and preference rows, the chosen video is
    taken, so that a preference method and its control can be trained on one dataset. The arguments of the constructor
    are those of `VideoTrainer`; there is no reference.
    """

    method_name = "SFT"
    tag = "sft"
    summary = "supervised fine-tuning"
    config_class = VideoSFTConfig
    row_type = "video"
    collator_class = VideoCollator
    uses_reference = False

    @classmethod
    def check_rows(cls, dataset: MapDataset, args: Any) -> None:
        super().check_rows(chosen_as_video(dataset), args)

    def prepare_dataset(self, dataset: MapDataset, transformer: ModelMixin) -> IndexedDataset:
        return super().prepare_dataset(chosen_as_video(dataset), transformer)

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

        error = self.passes.policy(model, denoising)  # (B,)
        if self.args.loss_weighting != "none":
            error = error * self.step.loss_weights(timesteps, self.args.loss_weighting, self.args.min_snr_gamma)
        loss = error.mean()
        return (loss, {"losses": error}) if return_outputs else loss
