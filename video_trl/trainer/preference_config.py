"""Arguments shared by the trainers whose loss compares videos."""

from dataclasses import dataclass, field
from typing import Literal, get_args

from .base_config import _BaseVideoConfig, _check_choice


StepMode = Literal["auto", "concat", "sequential"]


@dataclass
class _PreferenceConfig(_BaseVideoConfig):
    """Arguments that all preference trainers share; everything else is inherited from `_BaseVideoConfig`."""

    step_mode: StepMode = field(
        default="auto",
        metadata={
            "help": "How the videos of a pair or group go through the transformer. 'concat': all in one forward. "
            "'sequential': one video's graph alive at a time, for the memory of fine-tuning and about a fifth more "
            "time; same loss, same gradient. 'auto': 'concat' where it should fit into the memory of the accelerator, "
            "and on a CPU."
        },
    )

    def _check_base_values(self) -> None:
        super()._check_base_values()
        _check_choice(self, "step_mode", get_args(StepMode))
