"""Arguments of the supervised fine-tuning trainer."""

from dataclasses import dataclass, field

from .base_config import VideoConfig


@dataclass
class VideoSFTConfig(VideoConfig):
    """
    Arguments of [`VideoSFTTrainer`]; everything else is inherited from `VideoConfig` and
    [`~transformers.TrainingArguments`].
    """

    # Defaults of TrainingArguments that are replaced
    learning_rate: float = field(default=1e-4, metadata={"help": "Initial learning rate of AdamW."})
