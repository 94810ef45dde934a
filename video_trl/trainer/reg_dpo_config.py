"""Arguments of the regularised preference trainer (Reg-DPO)."""

import math
from dataclasses import dataclass, field
from typing import get_args

from ..losses.preference import SFTWeightMode
from .base_config import check_choice, check_positive
from .preference_config import PreferenceConfig


@dataclass
class VideoRegDPOConfig(PreferenceConfig):
    """
    Arguments of [`VideoRegDPOTrainer`]; everything else is inherited from `PreferenceConfig` and
    [`~transformers.TrainingArguments`].

    The defaults are those of Reg-DPO (https://huggingface.co/papers/2511.01450): r = DGR, LoRA of rank 16 with alpha
    32, learning rate 5e-6, beta 500.
    """

    logs_gaps = True
    reference_error_options = (*PreferenceConfig.reference_error_options, "shared_noise")
    regulariser_field = "sft_coefficient"

    # Defaults that are replaced
    learning_rate: float = field(default=5e-6, metadata={"help": "Initial learning rate of AdamW."})
    lora_rank: int = field(default=16, metadata={"help": "Rank of the default LoRA adapter; 16 is Reg-DPO's."})
    lora_alpha: int = field(
        default=32, metadata={"help": "Scale of the default LoRA adapter; its output is multiplied by alpha / rank."}
    )

    # Parameters that control the loss
    beta: float = field(
        default=500.0,
        metadata={
            "help": "Strength of the pull towards the reference: reward = -(beta / 2) * (policy error - reference "
            "error). Errors are averaged, not summed, over a video, hence its size next to the 0.1 of language models."
        },
    )
    sft_weight_mode: SFTWeightMode = field(
        default="dgr",
        metadata={
            "help": "What the error of the chosen video is weighed with (r). 'dgr': `sft_coefficient` times the DPO "
            "gradient ratio of each pair, which starts at beta / 4. 'fixed': `sft_coefficient` itself."
        },
    )
    sft_coefficient: float | None = field(
        default=None,
        metadata={
            "help": "c of r = c * DGR, or r itself when fixed; 0 is plain DPO. Unset: 1 with 'dgr', beta / 4 (where "
            "DGR starts) with 'fixed'."
        },
    )
    shared_noise: bool = field(
        default=True,
        metadata={
            "help": "Give both videos of a pair the same noise, not only the same timestep. On, because the loss "
            "depends on their difference, where what is common partly cancels. The paper does not say."
        },
    )

    def __post_init__(self) -> None:
        check_positive(self, "beta")
        check_choice(self, "sft_weight_mode", get_args(SFTWeightMode))
        if self.sft_coefficient is None:
            self.sft_coefficient = 1.0 if self.sft_weight_mode == "dgr" else self.beta / 4
        if not 0 <= self.sft_coefficient < math.inf:
            raise ValueError(
                f"`sft_coefficient` must not be negative and must be finite, got {self.sft_coefficient}. A negative "
                "weight would train the model away from the chosen videos; 0 is plain DPO."
            )
        super().__post_init__()

    def options_without_effect(self) -> dict[str, str]:
        idle = {} if self.sft_coefficient else {"sft_weight_mode": "`sft_coefficient` is 0"}
        return super().options_without_effect() | idle
