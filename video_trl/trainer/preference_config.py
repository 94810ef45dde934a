"""The arguments of every trainer whose loss compares videos."""

import copy
from dataclasses import dataclass, field
from typing import ClassVar, Literal, Self, get_args

from transformers.trainer_utils import IntervalStrategy

from .base_config import VideoConfig, check_choice, check_positive
from .parallel.engines import SHARDED, Engine


StepMode = Literal["auto", "concat", "sequential"]


@dataclass
class PreferenceConfig(VideoConfig):
    """Arguments that all preference trainers share; everything else is inherited from `VideoConfig`."""

    # Options on which the errors of the reference depend: which noise a row sees, and how numbers are computed. Cached
    # errors are those of a run in which all of them are the same. A method adds its own; which videos are compared,
    # its trainer says with `workload_options`.
    reference_error_options: ClassVar[tuple[str, ...]] = (
        "seed",
        "precompute_ref_errors",
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

    step_mode: StepMode = field(
        default="auto",
        metadata={
            "help": "How the videos of a pair or group go through the transformer. 'concat': all in one forward. "
            "'sequential': one video's graph alive at a time, for the memory of fine-tuning and about a fifth more "
            "time; same loss, same gradient. 'auto': 'concat' where it should fit into the memory of the accelerator, "
            "and on a CPU."
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

    def check_engine(self, engine: Engine) -> None:
        super().check_engine(engine)
        # Passes are joint, and batches at the end of an epoch may differ by a row between processes.
        if self.step_mode == "sequential" and engine in SHARDED and self.largest_batch > 1:
            raise ValueError(
                f"`step_mode='sequential'` under the engine '{engine}' needs batches of one row, got "
                f"{self.largest_batch}. Set `per_device_train_batch_size` and `per_device_eval_batch_size` to 1 and "
                "raise `gradient_accumulation_steps`: the steps are the same."
            )

    def _check_base_values(self) -> None:
        super()._check_base_values()
        check_positive(self, "group_parallel_size")
        check_choice(self, "step_mode", get_args(StepMode))
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
        if self.precompute_ref_errors is not None and self.precompute_ref_errors < 1:
            raise ValueError(
                f"`precompute_ref_errors` must be at least 1, got {self.precompute_ref_errors}. Leave it unset for "
                "new noise in every step."
            )
