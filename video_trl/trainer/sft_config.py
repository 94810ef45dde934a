"""Arguments of the supervised fine-tuning trainer."""

from dataclasses import dataclass, field

from .base_config import _BaseVideoConfig


@dataclass
class VideoSFTConfig(_BaseVideoConfig):
    """
    Arguments of [`VideoSFTTrainer`]; everything else is inherited from `_BaseVideoConfig` and
    [`~transformers.TrainingArguments`].
    """

    # Defaults of TrainingArguments that are replaced
    learning_rate: float = field(default=1e-4, metadata={"help": "Initial learning rate of AdamW."})
