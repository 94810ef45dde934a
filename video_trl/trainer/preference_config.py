"""The arguments of every trainer whose loss compares videos."""

import copy
import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal, get_args

from transformers.trainer_utils import IntervalStrategy
from typing_extensions import Self

from ..losses.preference import Gap
from .base_config import _FLAG, VideoConfig, check_choice, check_positive
from .parallel.engines import SHARDED, Engine


StepModeOption = Literal["auto", "concat", "singles", "sequential"]
Safeguard = Literal["none", "output", "parameter"]


@dataclass
class PreferenceConfig(VideoConfig):
    """Arguments that all preference trainers share; everything else is inherited from `VideoConfig`."""

    # Options on which the errors of the reference depend: which noise a row sees, and how numbers are computed. Cached
    # errors are those of a run in which all of them are the same. A method adds its own; which videos are compared,
    # its trainer says with `workload_options`.
    reference_error_options: ClassVar[tuple[str, ...]] = (
        "seed",
        "precompute_ref_errors",
        "reference_is_base",
        "timestep_sampling",
        "timestep_logit_mean",
        "timestep_logit_std",
        "timestep_range",
        "rejected_score_below",
        "per_device_train_batch_size",
        "bf16",
        "fp16",
        "quantization",
        "attention_backend",
        "compile_blocks",
        "context_parallel_size",
        "context_parallel_method",
        "group_parallel_size",
    )

    step_mode: StepModeOption = field(
        default="auto",
        metadata={
            "help": "How the videos of a pair or group go through the transformer. 'concat': all in one forward. "
            "'singles': a forward a video, which needs less memory with activation checkpointing. 'sequential': one "
            "video's graph alive at a time, for the memory of fine-tuning and about a fifth more time. Loss and "
            "gradient are the same. 'auto': the fastest that should fit into the memory of the accelerator."
        },
    )

    reference_is_base: bool = field(
        default=False,
        metadata={
            "help": "Where training continues an adapter: the reference is the base model without it, at no memory, "
            "instead of a frozen copy of the adapter.",
            **_FLAG,
        },
    )

    precompute_ref_errors: int | None = field(
        default=None,
        metadata={
            "help": "Draw K fixed noises per row instead of new ones in every step, and compute the reference's "
            "errors on them once, before training; kept in `cache_dir` for later runs. Pays with more than K epochs. "
            "Unset: off."
        },
    )

    rejected_score_below: float | None = field(
        default=None,
        metadata={
            "help": "Compare only with rejected videos whose judged physics, `pc` of their `rejected_scores`, is "
            "below this; rows without one are left out. A generated video that obeys the law like the chosen one "
            "teaches nothing about it. Unset: all."
        },
    )

    heldout_evaluations: int = field(
        default=10,
        metadata={
            "help": "Evaluations in a run where there is an `eval_dataset` and `eval_strategy` is 'no', for the gaps "
            "on held-out rows: those on training rows flatter a model that remembers them. 0: none."
        },
    )

    group_parallel_size: int = field(
        default=1,
        metadata={
            "help": "Processes that share the videos of each pair or group, and exchange their errors only. Must "
            "divide the number of videos (2 for a pair, 1 + m for a group) and of processes. Each of them may be "
            "`context_parallel_size` processes."
        },
    )

    # Parameters that keep a preference from being paid for with the chosen video
    safeguard: Safeguard = field(
        default="none",
        metadata={
            "help": "Hold the gradient of each rejected video back where it would make the chosen one worse. "
            "'output': by the errors of the predictions (Diffusion-SDPO), at no cost. 'parameter': by the gradients "
            "of the weights themselves, exact for a step of plain gradient descent; videos go through one by one, two "
            "more gradients of the trained weights are held, one process."
        },
    )
    safeguard_mu: float = field(
        default=0.0,
        metadata={
            "help": "Proportion of the chosen video's own improvement that rejected videos must leave, in [0, 1]. 0: "
            "it gets no worse; 1: nothing that acts against it is left."
        },
    )
    win_gap_penalty: float = field(
        default=0.0,
        metadata={
            "help": "Weight of max(0, win_gap) beside the loss: a pull on the chosen video, outside of the sigmoid, "
            "while the policy is worse at it than the reference. About beta / 4 with gap 'raw', 1 with 'log_ratio'."
        },
    )
    gap: Gap = field(
        default="raw",
        metadata={
            "help": "What rewards are made of. 'raw': policy error - reference error. 'log_ratio': the logarithm of "
            "their quotient, which one `beta`, of about 10, fits at all noise levels."
        },
    )
    lose_gap_weight: float = field(
        default=1.0, metadata={"help": "Weight of the rejected videos' gaps in the margin; less pushes them less."}
    )
    lose_gap_clip: float | None = field(
        default=None,
        metadata={
            "help": "Largest gap of a rejected video that the loss sees: beyond it, it is pushed no further. Unset: "
            "none; 1 goes with gap 'log_ratio'."
        },
    )

    @property
    def largest_batch(self) -> int:
        """Rows of a batch, of training or evaluation."""
        return max(self.per_device_train_batch_size, self.per_device_eval_batch_size)

    @property
    def processes_per_row(self) -> int:
        return self.context_parallel_size * self.group_parallel_size

    def describe_processes_per_row(self) -> str:
        return f"{super().describe_processes_per_row()}, `group_parallel_size={self.group_parallel_size}`"

    def with_evaluations(self, *, due: bool) -> Self:
        """This configuration, or where `heldout_evaluations` are made a copy that says so."""
        if not due or self.eval_strategy != IntervalStrategy.NO or self.heldout_evaluations == 0:
            return self
        args = copy.copy(self)
        args.eval_strategy, args.eval_steps = IntervalStrategy.STEPS, 1 / self.heldout_evaluations
        return args

    @property
    def pulls_on_errors(self) -> bool:
        """Whether the loss has a term that lowers an error, or divides by one: more than differences of errors."""
        weight = 0.0 if self.regulariser_field is None else self.__dict__[self.regulariser_field]
        return self.gap != "raw" or self.win_gap_penalty > 0 or weight != 0

    def options_without_effect(self) -> dict[str, str]:
        due = self.heldout_evaluations > 0 and self.eval_steps == 1 / self.heldout_evaluations
        why = "there is no `eval_dataset`" if self.eval_strategy == IntervalStrategy.NO else "`eval_strategy` is given"
        causes = (
            (self.safeguard == "none", "safeguard_mu", "`safeguard` is 'none'"),
            (self.lose_gap_weight == 0, "lose_gap_clip", "`lose_gap_weight` is 0"),
            (self.heldout_evaluations > 0 and not due, "heldout_evaluations", why),
        )
        return super().options_without_effect() | {name: why for holds, name, why in causes if holds}

    def check_engine(self, engine: Engine) -> None:
        super().check_engine(engine)
        if self.safeguard == "parameter" and (engine != "ddp" or self.world_size > 1):
            raise ValueError(
                f"`safeguard='parameter'` compares gradients that one process has whole, got {self.world_size} "
                f"processes and the engine '{engine}'. Use one process, or `safeguard='output'`."
            )
        # Passes are joint, and batches at the end of an epoch may differ by a row between processes.
        if self.step_mode == "sequential" and engine in SHARDED and self.largest_batch > 1:
            raise ValueError(
                f"`step_mode='sequential'` under the engine '{engine}' needs batches of one row, got "
                f"{self.largest_batch}. Set `per_device_train_batch_size` and `per_device_eval_batch_size` to 1 and "
                "raise `gradient_accumulation_steps`: the steps are the same."
            )
        if self.step_mode == "singles" and engine != "ddp":
            raise ValueError(
                f"`step_mode='singles'` keeps the graphs of several forwards, with which the engine '{engine}' has "
                "not been tried. Use 'concat', or 'sequential' for less memory."
            )

    def _check_base_values(self) -> None:
        super()._check_base_values()
        check_positive(self, "group_parallel_size")
        check_choice(self, "step_mode", get_args(StepModeOption))
        if self.rejected_score_below is not None and not 0 < self.rejected_score_below <= 1:
            raise ValueError(
                f"`rejected_score_below` must be in (0, 1], where scores lie, got {self.rejected_score_below}. Leave "
                "it unset to compare with every rejected video."
            )
        if self.heldout_evaluations < 0 or self.heldout_evaluations == 1:
            raise ValueError(
                f"`heldout_evaluations` must be 0 or at least 2, got {self.heldout_evaluations}. For a single "
                "evaluation call `trainer.evaluate()`."
            )
        self._check_safeguards()
        if self.precompute_ref_errors is not None and self.precompute_ref_errors < 1:
            raise ValueError(
                f"`precompute_ref_errors` must be at least 1, got {self.precompute_ref_errors}. Leave it unset for "
                "new noise in every step."
            )
        if self.precompute_ref_errors is not None and self.timestep_draw != "independent":
            raise ValueError(
                f"`timestep_draw={self.timestep_draw!r}` draws timesteps anew in every step, and with "
                "`precompute_ref_errors` each row has a few that are known before. Leave one of them out."
            )

    def _check_safeguards(self) -> None:
        check_choice(self, "safeguard", get_args(Safeguard))
        check_choice(self, "gap", get_args(Gap))
        if not 0 <= self.safeguard_mu <= 1:
            raise ValueError(f"`safeguard_mu` must be in [0, 1], got {self.safeguard_mu}.")
        if self.safeguard == "parameter" and self.step_mode in ("concat", "singles"):
            raise ValueError(
                f"`safeguard='parameter'` needs each video's own gradient, which `step_mode='{self.step_mode}'` does "
                "not have. "
                "Leave `step_mode` at 'auto', or use `safeguard='output'`."
            )
        for name in ("win_gap_penalty", "lose_gap_weight"):
            if not 0 <= self.__dict__[name] < math.inf:
                raise ValueError(f"`{name}` must be finite and not negative, got {self.__dict__[name]}.")
        if self.lose_gap_clip is not None and not 0 < self.lose_gap_clip < math.inf:
            raise ValueError(
                f"`lose_gap_clip` must be positive and finite, got {self.lose_gap_clip}: gaps start at 0, and what is "
                "clipped has no gradient. Leave it unset for none."
            )
