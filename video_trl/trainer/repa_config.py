"""Arguments of the representation alignment trainer (VideoREPA)."""

from dataclasses import dataclass, field

from .repa.options import AlignmentOptions
from .weighted_config import WeightedErrorConfig


@dataclass
class VideoREPAConfig(AlignmentOptions, WeightedErrorConfig):
    """
    Arguments of [`VideoREPATrainer`]; everything else is inherited from `VideoConfig` and
    [`~transformers.TrainingArguments`].

    The defaults are those of VideoREPA (https://huggingface.co/papers/2505.23656) where its paper and its official
    code agree, and the code's where they differ: soft margin, one mean over all relations, alignment at the teacher's
    token frames. Its learned convolution is replaced by area pooling (`spatial_pooling="conv"` brings it back).
    """

    # Defaults of TrainingArguments that are replaced
    learning_rate: float = field(
        default=1e-4,
        metadata={"help": "Initial learning rate of AdamW; 1e-4 is VideoREPA's for LoRA, 2e-6 for all weights."},
    )
    lora_rank: int = field(default=128, metadata={"help": "Rank of the default LoRA adapter; 128 is VideoREPA's."})
    lora_alpha: int = field(
        default=64, metadata={"help": "Scale of the default LoRA adapter; its output is multiplied by alpha / rank."}
    )

    _VALID_DICT_FIELDS = WeightedErrorConfig._VALID_DICT_FIELDS + ["teacher_kwargs"]

    def __post_init__(self) -> None:
        if self.compile_blocks:
            raise ValueError(
                "`compile_blocks` does not go with this trainer: it looks into a block, which would be compiled anew "
                "in every step. Leave it off."
            )
        self.check()
        if self.resolution_buckets:
            raise ValueError(
                "`resolution_buckets` crops videos one by one, and the teacher would not see the same crop. Set "
                "`height` and `width`, or pass videos that have the sizes of the buckets already."
            )
        super().__post_init__()

    def options_without_effect(self) -> dict[str, str]:
        return super().options_without_effect() | self.idle()
