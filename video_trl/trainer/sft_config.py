"""Arguments of the supervised fine-tuning trainer."""

from dataclasses import dataclass, field

from .weighted_config import WeightedErrorConfig


@dataclass
class VideoSFTConfig(WeightedErrorConfig):
    """
    Arguments of [`VideoSFTTrainer`]; everything else is inherited from `VideoConfig` and
    [`~transformers.TrainingArguments`].
    """

    # Defaults of TrainingArguments that are replaced
    learning_rate: float = field(default=1e-4, metadata={"help": "Initial learning rate of AdamW."})
