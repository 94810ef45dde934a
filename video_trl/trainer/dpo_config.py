"""Arguments of the pairwise preference trainer (Diffusion-DPO, Flow-DPO)."""

from dataclasses import dataclass, field
from typing import Any

from ..losses.preference import DPOLossType, check_dpo_loss
from .base_config import check_positive
from .preference_config import PreferenceConfig


MAPO_BETA = 0.1  # of the paper


@dataclass
class VideoDPOConfig(PreferenceConfig):
    """
    Arguments of [`VideoDPOTrainer`]; everything else is inherited from `PreferenceConfig` and
    [`~transformers.TrainingArguments`].

    The defaults are those of the DPO baseline of Reg-DPO (https://huggingface.co/papers/2511.01450): LoRA of rank 16
    with alpha 32, learning rate 5e-6, beta 500.
    """

    logs_gaps = True
    reference_error_options = (*PreferenceConfig.reference_error_options, "shared_noise")

    # Defaults that are replaced
    learning_rate: float = field(default=5e-6, metadata={"help": "Initial learning rate of AdamW."})
    lora_rank: int = field(default=16, metadata={"help": "Rank of the default LoRA adapter; 16 is Reg-DPO's."})
    lora_alpha: int = field(
        default=32, metadata={"help": "Scale of the default LoRA adapter; its output is multiplied by alpha / rank."}
    )

    # Parameters that control the loss
    beta: float | None = field(
        default=None,
        metadata={
            "help": "Strength of the pull towards the reference: reward = -(beta / 2) * (policy error - reference "
            "error). Errors are averaged, not summed, over a video, hence its size next to the 0.1 of language "
            "models; unset: 500. With 'mapo' the weight of its margin; unset: 0.1."
        },
    )
    loss_type: DPOLossType = field(
        default="sigmoid",
        metadata={
            "help": "Loss of the margin u = chosen reward - rejected reward, by TRL's names. 'sigmoid': -log "
            "sigmoid(u). 'hinge': max(0, 1 - u). 'ipo': (u - 1/2)^2, which draws a wider margin back. 'mapo': "
            "fine-tuning and a margin of the two errors, without a reference."
        },
    )
    label_smoothing: float = field(
        default=0.0,
        metadata={
            "help": "Proportion of pairs, in [0, 0.5), whose labels may be wrong (conservative DPO): with 'sigmoid' "
            "the margin aims at log(1 / proportion - 1) instead of infinity."
        },
    )
    shared_noise: bool = field(
        default=True,
        metadata={
            "help": "Give both videos of a pair the same noise, not only the same timestep. On, because the loss "
            "depends on their difference, where what is common partly cancels. The paper does not say."
        },
    )

    pair_weights: bool = field(
        default=False,
        metadata={
            "help": "Multiply the loss of each pair by its column 'weight', which `video-trl curate self-pairs` "
            "writes (VideoDPO)."
        },
    )

    def __post_init__(self) -> None:
        check_dpo_loss(self.loss_type, self.label_smoothing)
        if self.beta is None:
            self.beta = MAPO_BETA if self.loss_type == "mapo" else 500.0
        check_positive(self, "beta")
        self.logs_gaps = self.loss_type != "mapo"
        super().__post_init__()
        if self.loss_type == "mapo":
            self._refuse_gaps()

    @property
    def pulls_on_errors(self) -> bool:
        return self.loss_type == "mapo" or super().pulls_on_errors

    def _refuse_gaps(self) -> None:
        """Raise a `ValueError` if an option speaks of gaps, the differences from a reference."""
        neutral = {
            "gap": "raw",
            "win_gap_penalty": 0.0,
            "lose_gap_weight": 1.0,
            "lose_gap_clip": None,
            "precompute_ref_errors": None,
        }
        for name, value in neutral.items():
            if self.__dict__[name] != value:
                raise ValueError(
                    f"`loss_type='mapo'` has no reference, and so no gaps: expected `{name}={value!r}`, got "
                    f"{self.__dict__[name]!r}. Leave it at its default, or use another loss."
                )

    def options_without_effect(self) -> dict[str, str]:
        idle = {"reference_is_base": "`loss_type='mapo'` has no reference"} if self.loss_type == "mapo" else {}
        return super().options_without_effect() | idle

    def loss_arguments(self) -> dict[str, Any]:
        """Keyword arguments of [`~video_trl.losses.preference.dpo_loss`] that stand here."""
        return {"loss_type": self.loss_type, "label_smoothing": self.label_smoothing}
