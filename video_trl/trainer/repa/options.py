"""Options of an alignment with a teacher: of VideoREPA, and beside another objective."""

import math
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from ...load import SANDBOX
from ...losses.alignment import MarginMode, RelationNorm, Relations, RelationWeighting
from ..base_config import check_choice
from .alignment import Projector, SpatialPooling, SpatialTarget, TemporalTarget


AlignmentLoss = Literal["trd", "repa"]
CoefficientDecay = Literal["constant", "linear", "cosine"]

# VideoREPA, appendix A: the margin that was found to suit each teacher. First match of the teacher's name wins.
_MARGINS = (("videomaev2", 0.1), ("vjepa", 0.05), ("videomae", 0.0), ("omnimae", 0.0), (SANDBOX, 0.0))
DEFAULT_MARGIN = 0.1


@dataclass
class AlignmentOptions:
    """
    What is aligned with which teacher, how, and how strongly.

    The defaults are those of VideoREPA (https://huggingface.co/papers/2505.23656) where its paper and its official
    code agree, and the code's where they differ: soft margin, one mean over all relations, alignment at the teacher's
    token frames. Its learned convolution is replaced by area pooling (`spatial_pooling="conv"` brings it back).
    """

    # Parameters that control the teacher
    teacher: str | None = field(
        default=None,
        metadata={
            "help": "Teacher to load: 'sandbox', a path or repository id of VideoMAE, VideoMAEv2, V-JEPA 2 or DINO, "
            "or a published file of VideoMAEv2, V-JEPA or OmniMAE. Unset: the sandbox's for model 'sandbox'; "
            "otherwise pass one here, or an object to the trainer."
        },
    )
    teacher_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Options of `video_trl.load.load_teacher`, such as the size that the teacher sees."},
    )
    precompute_teacher: bool = field(
        default=True,
        metadata={
            "help": "Encode every video by the teacher once, before training, and keep 8 bit tokens on the disk. Off: "
            "the teacher sees the pixels in every step; exact, slower, and nothing to store."
        },
    )
    teacher_batch_size: int = field(default=4, metadata={"help": "Videos encoded by the teacher at once, ahead."})

    # Parameters that control the loss
    alignment_loss: AlignmentLoss = field(
        default="trd",
        metadata={
            "help": "'trd': token relation distillation, VideoREPA's Eq. 5. 'repa': token-wise negative cosine, the "
            "baseline that VideoREPA is compared with (Eq. 2)."
        },
    )
    coefficient: float = field(
        default=0.5, metadata={"help": "Weight of the alignment loss beside the diffusion loss; lambda of VideoREPA."}
    )
    coefficient_warmup_steps: int = field(
        default=0, metadata={"help": "Steps over which the coefficient rises linearly to its value."}
    )
    coefficient_decay: CoefficientDecay = field(
        default="constant",
        metadata={
            "help": "How the coefficient falls to 0 between warm-up and cut-off: 'constant' (not at all before the "
            "cut-off), 'linear' or 'cosine'."
        },
    )
    coefficient_cutoff: float | None = field(
        default=None,
        metadata={
            "help": "Step from which on the coefficient is 0; a number in (0, 1) is a proportion of all steps. Unset: "
            "the end of training."
        },
    )
    margin: float | None = field(
        default=None,
        metadata={
            "help": "Differences of relations up to this value cost nothing. Unset: VideoREPA's value for the teacher "
            "(VideoMAEv2 0.1, V-JEPA 0.05, VideoMAE and OmniMAE 0), else 0.1."
        },
    )
    margin_mode: MarginMode = field(
        default="soft",
        metadata={
            "help": "'soft': relu(|difference| - margin), as the official code. 'hard': |difference| where it exceeds "
            "the margin, else 0, as the paper."
        },
    )
    relation_weighting: RelationWeighting = field(
        default="joint",
        metadata={
            "help": "'joint': one mean over all pairs of tokens, as the official code; with f frames the spatial part "
            "has weight 1/f. 'paper': spatial mean plus temporal mean, Eq. 5; about twice as large."
        },
    )
    relations: Relations = field(
        default="all", metadata={"help": "Pairs of tokens compared: 'all', 'spatial' (same frame) or 'temporal'."}
    )
    norm: RelationNorm = field(
        default="l1",
        metadata={"help": "'l1': absolute differences with a margin, Eq. 5. 'l2': squared ones; needs margin 0."},
    )
    row_chunk: int = field(
        default=1024, metadata={"help": "Rows of the relation matrix in memory at a time; no effect on the value."}
    )

    # Parameters that control the alignment head
    align_layer: float = field(
        default=0.6,
        metadata={
            "help": "Block whose output is aligned: its number counted from 1, or a fraction of the depth in (0, 1). "
            "0.6 is block 18 of the 30 of CogVideoX-2B, VideoREPA's best."
        },
    )
    projector: Projector = field(
        default="mlp",
        metadata={
            "help": "From hidden states to the teacher's width: 'mlp' (two hidden layers, SiLU; official), 'linear', "
            "or 'none', which needs no weights ('trd' compares relations, whose size does not depend on the width)."
        },
    )
    projector_width: int = field(default=2048, metadata={"help": "Width of the hidden layers of the 'mlp' projector."})
    spatial_pooling: SpatialPooling = field(
        default="area",
        metadata={
            "help": "From the transformer's token grid to the teacher's: 'area' means before the projector, or "
            "'conv', a learned strided convolution behind it, as in the official code."
        },
    )
    spatial_target: SpatialTarget = field(
        default="coarser",
        metadata={
            "help": "Whose rows and columns of tokens are compared. 'coarser': those of the coarser grid, to which "
            "the other is pooled; the teacher's in VideoREPA. 'teacher' or 'student': always that one's, to which a "
            "coarser grid is interpolated (VideoREPA's Table 5)."
        },
    )
    temporal_target: TemporalTarget = field(
        default="teacher",
        metadata={
            "help": "'teacher': the transformer's token frames are interpolated to the teacher's times (official). "
            "'student': the teacher's are averaged over each latent frame; 4 times fewer relations for two to one."
        },
    )
    head_learning_rate: float = field(
        default=1e-4,
        metadata={"help": "Initial learning rate of the alignment head, which follows the same schedule."},
    )

    def check(self) -> None:
        """
        Settle what depends on other options.

        Raises:
            ValueError: If an option is out of range, or two do not go together.
        """
        if self.margin is None and self.norm == "l2":
            self.margin = 0.0
        for name, choices in (
            ("alignment_loss", AlignmentLoss),
            ("coefficient_decay", CoefficientDecay),
            ("margin_mode", MarginMode),
            ("relation_weighting", RelationWeighting),
            ("relations", Relations),
            ("norm", RelationNorm),
            ("projector", Projector),
            ("spatial_pooling", SpatialPooling),
            ("spatial_target", SpatialTarget),
            ("temporal_target", TemporalTarget),
        ):
            check_choice(self, name, get_args(choices))
        self._check_numbers()
        if self.spatial_pooling == "conv" and self.projector == "none":
            raise ValueError(
                "`spatial_pooling='conv'` works on projected tokens, but `projector='none'`. Change one of the two."
            )

    def _check_numbers(self) -> None:
        for name in ("teacher_batch_size", "row_chunk", "projector_width"):
            if self.__dict__[name] < 1:
                raise ValueError(f"`{name}` must be at least 1, got {self.__dict__[name]}.")
        for name in ("coefficient", "head_learning_rate"):
            if not 0 <= self.__dict__[name] < math.inf:
                raise ValueError(f"`{name}` must be finite and not negative, got {self.__dict__[name]}.")
        if self.margin is not None and not 0 <= self.margin < 2:
            raise ValueError(f"`margin` must be in [0, 2), differences of cosines are at most 2; got {self.margin}.")
        if self.norm == "l2" and self.margin:
            raise ValueError(f"`norm='l2'` has no margin, got margin={self.margin}. Set `margin` to 0, or use 'l1'.")
        if not 0 < self.align_layer or (self.align_layer >= 1 and self.align_layer != int(self.align_layer)):
            raise ValueError(
                f"`align_layer` must be a block counted from 1, or a fraction of the depth in (0, 1), got "
                f"{self.align_layer}."
            )
        if self.coefficient_warmup_steps < 0:
            raise ValueError(f"`coefficient_warmup_steps` must not be negative, got {self.coefficient_warmup_steps}.")
        if self.coefficient_cutoff is not None and not 0 < self.coefficient_cutoff < math.inf:
            raise ValueError(f"`coefficient_cutoff` must be positive and finite, got {self.coefficient_cutoff}.")

    def idle(self) -> dict[str, str]:
        """Options that change nothing beside the values of others, and why."""
        relations = ("margin", "margin_mode", "relation_weighting", "relations", "norm")
        causes = (
            (self.alignment_loss != "trd", relations, "`alignment_loss='repa'` compares tokens, not relations"),
            (self.relations != "all", ("relation_weighting",), "`relations` are of one kind"),
            (self.projector != "mlp", ("projector_width",), "`projector` is not 'mlp'"),
            (self.projector == "none", ("head_learning_rate",), "`projector='none'` has no weights"),
            (not self.precompute_teacher, ("teacher_batch_size",), "`precompute_teacher` is off"),
            (
                self.coefficient == 0,
                ("coefficient_warmup_steps", "coefficient_decay", "coefficient_cutoff"),
                "`coefficient` is 0",
            ),
        )
        return {name: why for holds, names, why in causes if holds for name in names}

    def coefficient_at(self, step: int, max_steps: int) -> float:
        """
        Weight of the alignment loss in a step.

        Args:
            step (`int`): Optimizer steps done before it; the first step is 0.
            max_steps (`int`): Optimizer steps of the whole run.

        Returns:
            `float`: In [0, `coefficient`]; with a warm-up of W steps the first one has `coefficient / W`.
        """
        end: float = max_steps
        if self.coefficient_cutoff is not None:
            end = self.coefficient_cutoff * (max_steps if self.coefficient_cutoff < 1 else 1)
            if step >= end:
                return 0.0
        warmup = self.coefficient_warmup_steps
        if step < warmup:
            return self.coefficient * (step + 1) / warmup
        progress = min((step - warmup) / max(end - warmup, 1), 1.0)
        if self.coefficient_decay == "linear":
            return self.coefficient * (1 - progress)
        if self.coefficient_decay == "cosine":
            return self.coefficient * (1 + math.cos(math.pi * progress)) / 2
        return self.coefficient

    def margin_for(self, teacher_name: str | None) -> float:
        """The configured margin, or the one that suits a teacher of this name (`None`: unknown)."""
        if self.margin is not None:
            return self.margin
        name = (teacher_name or "").lower()
        return next((margin for known, margin in _MARGINS if known in name), DEFAULT_MARGIN)

    def relation_arguments(self) -> dict[str, Any]:
        """Keyword arguments of [`~video_trl.losses.alignment.trd_loss`] that stand here, except the margin."""
        names = ("margin_mode", "relation_weighting", "relations", "norm", "row_chunk")
        return {name: self.__dict__[name] for name in names}
