"""Arguments of the groupwise preference trainer (PhyGDPO)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal, get_args

from ..losses.preference import AlphaMode, GammaMode, SFTWeight, check_physics_weights
from .base_config import _FLAG, check_choice
from .parallel.engines import Engine
from .preference_config import PreferenceConfig
from .repa.options import AlignmentOptions


LossType = Literal["sampled", "sum", "plackett_luce"]
TimestepWeighting = Literal["none", "bell"]

# A number or a text in Python; on the command line and in files a text, which is made a number where it is one.
if TYPE_CHECKING:
    SFTWeightOption = float | str
else:
    SFTWeightOption = str


@dataclass
class VideoGroupDPOConfig(PreferenceConfig):
    """
    Arguments of [`VideoGroupDPOTrainer`]; everything else is inherited from `PreferenceConfig` and
    [`~transformers.TrainingArguments`].

    The defaults are those of PhyGDPO (https://huggingface.co/papers/2512.24551): its Eq. 10 hyperparameters, one
    sampled rejected video a step (Eq. 14), learning rate 1e-5 decaying to 1e-6 along a cosine, weight decay 0.01.
    """

    logs_gaps = True
    regulariser_field = "sft_weight"
    reference_error_options = (*PreferenceConfig.reference_error_options, "shared_noise")
    _VALID_DICT_FIELDS = PreferenceConfig._VALID_DICT_FIELDS + ["repa_options"]

    # Defaults of TrainingArguments that are replaced
    learning_rate: float = field(default=1e-5, metadata={"help": "Initial learning rate of AdamW."})
    lr_scheduler_type: str = field(
        default="cosine_with_min_lr", metadata={"help": "Learning rate schedule, one of transformers' names."}
    )
    lr_scheduler_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Arguments of the schedule. Unset, with 'cosine_with_min_lr': down to a tenth of the initial rate."
        },
    )
    weight_decay: float = field(default=0.01, metadata={"help": "Weight decay of AdamW."})

    # Parameters that control the loss
    beta: float = field(
        default=500.0,
        metadata={
            "help": "Strength of the pull towards the reference: reward = -(beta / 2) * (policy error - reference "
            "error). Errors are averaged, not summed, over a video, hence its size next to the 0.1 of language models."
        },
    )
    loss_type: LossType = field(
        default="sampled",
        metadata={
            "help": "'sampled': upper bound of the group loss, one rejected video drawn a step (PhyGDPO Eq. "
            "14; 2 videos a step). 'sum': the same bound over all m rejected videos (1 + m videos). "
            "'plackett_luce': the exact group loss.",
        },
    )
    shared_noise: bool = field(
        default=True,
        metadata={
            "help": "Give all videos of a group the same noise, not only the same timestep. On, because the loss "
            "depends on differences inside the group, where what is common partly cancels (a tenth less gradient "
            "variance, measured on a small model), and one noise is cheaper to draw than 1 + m. The official PhyGDPO "
            "code draws independent noise (off)."
        },
    )

    sft_weight: SFTWeightOption = field(
        default=0.0,
        metadata={
            "help": "Weight r of the chosen video's error beside the loss, as in Reg-DPO: a number; 'dgr', the ratio "
            "by which the loss itself weighs the gradient of that error; or a multiple of it, such as '0.4*dgr'. "
            "Without it (0) the loss can be met by making the rejected videos worse alone."
        },
    )
    repa_coeff: float = field(
        default=0.0,
        metadata={
            "help": "Weight of VideoREPA's alignment of the chosen video's hidden states with a teacher's tokens, in "
            "the same forward as the preference. 0: none, and no teacher."
        },
    )
    repa_options: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Options of that alignment, by the names of `VideoREPAConfig`: teacher, align_layer, ..."},
    )
    scale_by_group: bool = field(
        default=True,
        metadata={
            "help": "Multiply the loss of 'sampled' by m, so that its mean over draws is that of 'sum'. The official "
            "PhyGDPO code does not (off)."
        },
    )
    timestep_weighting: TimestepWeighting = field(
        default="none",
        metadata={
            "help": "Weight of all errors of a group, by their timestep. 'bell': least at both ends, 1 in the mean of "
            "those that are drawn; the training weight of DiffSynth-Studio, and of the official PhyGDPO code. It acts "
            "like a `beta` of each timestep."
        },
    )

    # Parameters that control physics-guided rewarding (PhyGDPO Eq. 10)
    physics_rewarding: bool | None = field(
        default=None,
        metadata={
            "help": "Weigh each rejected video by its judge scores: the worse its physics, the larger the weight. "
            "Needs `rejected_scores` in the dataset. Unset: on, except with 'plackett_luce', which has no weights.",
            **_FLAG,
        },
    )
    alpha_min: float = field(
        default=0.5, metadata={"help": "Smallest sharpness alpha of a comparison, in (0, 1]; alpha_min of Eq. 10."}
    )
    lam: float = field(
        default=0.6, metadata={"help": "How far the weight gamma rises with the violation; lambda of Eq. 10."}
    )
    kappa_gamma: float = field(default=2.0, metadata={"help": "Steepness of gamma in the violation; Eq. 10."})
    b_gamma: float = field(default=0.4, metadata={"help": "Violation at which gamma is half way up; Eq. 10."})
    kappa_alpha: float = field(default=5.0, metadata={"help": "Steepness of alpha in the violation; Eq. 10."})
    b_alpha: float = field(default=0.5, metadata={"help": "Violation at which alpha is half way up; Eq. 10."})
    alpha_mode: AlphaMode = field(
        default="sigmoid",
        metadata={
            "help": "Squashing function of alpha. 'sigmoid' keeps alpha in (alpha_min, 1). 'tanh' is Eq. 10 as first "
            "printed: alpha falls to 0.007 with the default values, the bound fails for small violations, and with "
            "alpha_min < 0.497 alpha turns negative, which reverses the preference (refused).",
        },
    )
    gamma_mode: GammaMode = field(
        default="paper",
        metadata={
            "help": "'paper': gamma = (1 + lam * sigmoid(...)) / alpha_min. 'official': divided by the "
            "rejected video's own alpha instead, as the official code does.",
        },
    )

    def __post_init__(self) -> None:
        if not 0 < self.beta < math.inf:
            raise ValueError(
                f"`beta` must be positive and finite, got {self.beta}. Zero would remove the preference, a "
                "negative value would reverse it; published values are 500 to 5000."
            )
        weight = as_sft_weight(self.sft_weight)
        self.sft_weight = weight if isinstance(weight, float) else self.sft_weight
        check_choice(self, "loss_type", get_args(LossType))
        check_choice(self, "alpha_mode", get_args(AlphaMode))
        check_choice(self, "gamma_mode", get_args(GammaMode))
        check_choice(self, "timestep_weighting", get_args(TimestepWeighting))
        if self.timestep_weighting == "bell" and self.timestep_sampling == "logit_normal":
            raise ValueError(
                "`timestep_weighting='bell'` has mean 1 over timesteps that are 'uniform' or 'shifted', got "
                "`timestep_sampling='logit_normal'`, which prefers the middle already. Change one of the two."
            )
        if self.physics_rewarding is None:
            self.physics_rewarding = self.loss_type != "plackett_luce"
        if self.physics_rewarding and self.loss_type == "plackett_luce":
            raise ValueError(
                "`physics_rewarding=True` weighs the terms of the bound, which `loss_type='plackett_luce'` does not "
                "have. Use `loss_type='sampled'` or `'sum'`, or `physics_rewarding=False`."
            )
        check_physics_weights(**self.physics_weight_arguments())
        if self.lr_scheduler_type == "cosine_with_min_lr" and self.lr_scheduler_kwargs is None:
            self.lr_scheduler_kwargs = {"min_lr_rate": 0.1}
        super().__post_init__()
        self.alignment_options()

    def options_without_effect(self) -> dict[str, str]:
        why = "`physics_rewarding` is off"
        idle = {} if self.physics_rewarding else dict.fromkeys(self.physics_weight_arguments(), why)
        idle |= {} if self.repa_coeff else {"repa_options": "`repa_coeff` is 0"}
        idle |= {} if self.loss_type == "sampled" else {"scale_by_group": "`loss_type` is not 'sampled'"}
        sft_weight = as_sft_weight(self.sft_weight)
        if self.gap == "log_ratio" and (sft_weight == 0 or isinstance(sft_weight, tuple)):
            idle["timestep_weighting"] = "both errors of a ratio (`gap='log_ratio'`) have the same weight"
        alignment = self.alignment_options()
        idle |= {} if alignment is None else self.idle_repa_options(alignment.idle())
        return super().options_without_effect() | idle

    def idle_repa_options(self, idle: Mapping[str, str]) -> dict[str, str]:
        """Of options of the alignment without effect, and why, those that `repa_options` gives."""
        given = sorted(f"`{name}`: {why}" for name, why in idle.items() if name in (self.repa_options or {}))
        return {"repa_options": f"in it, {', '.join(given)}"} if given else {}

    def alignment_options(self) -> AlignmentOptions | None:
        """
        What the chosen video's hidden states are aligned with, and how; none where they are not.

        Raises:
            ValueError: If `repa_coeff` is out of range, an option of it is unknown or out of range, or another option
                does not go with it.
        """
        if not 0 <= self.repa_coeff < math.inf:
            raise ValueError(f"`repa_coeff` must be finite and not negative, got {self.repa_coeff}. 0 is none.")
        if self.repa_coeff == 0:
            return None
        assert not isinstance(self.repa_options, str), "TrainingArguments parses JSON strings"
        given = self.repa_options or {}
        known = {item.name for item in fields(AlignmentOptions)} - {"coefficient"}
        if unknown := sorted(set(given) - known):
            raise ValueError(
                f"`repa_options` has no {', '.join(unknown)}. It takes {', '.join(sorted(known))}; the coefficient is "
                "`repa_coeff`."
            )
        options = AlignmentOptions(coefficient=self.repa_coeff, **given)
        options.check()
        refused = {
            "safeguard": self.safeguard == "parameter",
            "group_parallel_size": self.group_parallel_size > 1,
            "context_parallel_size": self.context_parallel_size > 1,
            "compile_blocks": self.compile_blocks,
            "resolution_buckets": bool(self.resolution_buckets),
        }
        for name in (name for name, is_set in refused.items() if is_set):
            raise ValueError(
                f"`{name}={self.__dict__[name]!r}` does not go with `repa_coeff`, which looks into a block while the "
                "chosen video, whole and as it is, goes through it. Leave it at its default."
            )
        return options

    def check_engine(self, engine: Engine) -> None:
        super().check_engine(engine)
        if self.repa_coeff and self.step_mode == "sequential" and engine != "ddp":
            raise ValueError(
                f"`step_mode='sequential'` with `repa_coeff` is for DDP and for one process, got the engine "
                f"'{engine}': its head is used in the passes of chosen videos alone. Leave `step_mode` at 'auto'."
            )

    def physics_weight_arguments(self) -> dict[str, Any]:
        """Keyword arguments of [`~video_trl.losses.preference.physics_weights`] that stand here."""
        names = ("alpha_min", "lam", "kappa_gamma", "b_gamma", "kappa_alpha", "b_alpha", "alpha_mode", "gamma_mode")
        return {name: self.__dict__[name] for name in names}


def as_sft_weight(value: float | str) -> SFTWeight:
    """
    What `sft_weight` means to the losses: `0.5` and `"0.5"` are 0.5, `"dgr"` and `"0.4*dgr"` are ("dgr", 1) and
    ("dgr", 0.4).

    Raises:
        ValueError: If it is none of these, or negative.
    """
    number, star, rest = str(value).rpartition("*")
    try:
        weight = float((number if star else "1") if rest.strip() == "dgr" else value)
    except ValueError:
        weight = math.nan
    if not 0 <= weight < math.inf:
        raise ValueError(
            f"`sft_weight` must be a number that is not negative, 'dgr', or a multiple of it such as '0.4*dgr', got "
            f"{value!r}. A negative weight would train the model away from the chosen videos; 0 is off."
        )
    return ("dgr", weight) if rest.strip() == "dgr" and weight > 0 else weight
