"""Supervised fine-tuning of a video transformer, the control that every preference method is compared with."""

from collections.abc import Mapping
from typing import Any

import datasets
from diffusers import ModelMixin
from torch import Tensor, nn

from ..data import VideoCollator, column_names
from ..data.columns import MapDataset
from ..losses import velocity_error
from .base_trainer import _BaseVideoTrainer
from .rows import IndexedDataset
from .sft_config import VideoSFTConfig


class VideoSFTTrainer(_BaseVideoTrainer):
    """
    Train a video transformer on videos, by the objective that it was pre-trained with.

    ```python
    trainer = VideoSFTTrainer("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", VideoSFTConfig(output_dir="wan-sft"), dataset)
    trainer.train()
    ```

    The dataset has video rows (`prompt`, `video`), raw or encoded; of group and preference rows, the chosen video is
    taken, so that a preference method and its control can be trained on one dataset. The arguments of the constructor
    are those of `_BaseVideoTrainer`; there is no reference.
    """

    _name = "SFT"
    _tag = "sft"
    _method = "supervised fine-tuning"
    config_class = VideoSFTConfig
    row_type = "video"
    collator_class = VideoCollator
    uses_reference = False

    def check_dataset(self, dataset: MapDataset) -> None:
        super().check_dataset(_chosen_as_video(dataset))

    def prepare_dataset(self, dataset: MapDataset, batch_size: int, transformer: ModelMixin) -> IndexedDataset:
        return super().prepare_dataset(_chosen_as_video(dataset), batch_size, transformer)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, dict[str, Any]]:
        latents = inputs["latents"]  # (B, C, F, H, W)
        draw = self.draw(inputs["index"], latents.shape[1:])
        timesteps, noise = self.sample_timesteps(draw.u), draw.noise[:, 0]
        noisy_latents = self.adapter.noise_process.add_noise(latents, noise, timesteps)
        target = self.adapter.noise_process.velocity(latents, noise, timesteps)

        prediction = self.adapter.predict(model, noisy_latents, timesteps, self.conditions(inputs))
        error = velocity_error(prediction, target)  # (B,)
        loss = error.mean()
        return (loss, {"losses": error}) if return_outputs else loss


class _ChosenRows:
    """Rows of a group or preference dataset that is not a `datasets.Dataset`, as video rows."""

    def __init__(self, rows: MapDataset) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        row = self._rows[index]
        names = {"prompt": "prompt", "prompt_embeds": "prompt_embeds", "chosen": "video", "chosen_latents": "latents"}
        return {ours: row[theirs] for theirs, ours in names.items() if theirs in row}


def _chosen_as_video(dataset: MapDataset) -> MapDataset:
    if isinstance(dataset, datasets.IterableDataset):  # refused by the check of columns, which says why
        return dataset
    columns = set(column_names(dataset))
    if columns & {"video", "latents"} or not columns & {"chosen", "chosen_latents"}:
        return dataset
    if isinstance(dataset, datasets.Dataset):
        names = {"chosen": "video", "chosen_latents": "latents"}
        kept = [name for name in ("prompt", "prompt_embeds", *names) if name in columns]
        return dataset.select_columns(kept).rename_columns({n: names[n] for n in kept if n in names})
    return _ChosenRows(dataset)
