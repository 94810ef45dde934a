"""The arguments of the trainers whose loss is a mean of velocity errors, which may be weighed by noise level."""

from dataclasses import dataclass, field
from typing import get_args

from ..diffusion import LossWeighting, NoiseProcess, check_loss_weighting
from .base_config import VideoConfig, check_choice, check_positive


@dataclass
class WeightedErrorConfig(VideoConfig):
    """Arguments of `VideoSFTTrainer` and `VideoREPATrainer`; everything else is inherited from `VideoConfig`."""

    loss_weighting: LossWeighting = field(
        default="none",
        metadata={
            "help": "Weight of a velocity error by its noise level. 'none': all alike. 'cosmap': for flow matching, "
            "most in the middle (Stable Diffusion 3). 'min_snr': for models that predict v on a noise schedule "
            "(CogVideoX), less where there is little noise."
        },
    )
    min_snr_gamma: float = field(
        default=5.0, metadata={"help": "Of 'min_snr': signal-to-noise ratio above which weights fall."}
    )

    def _check_base_values(self) -> None:
        super()._check_base_values()
        check_choice(self, "loss_weighting", get_args(LossWeighting))
        check_positive(self, "min_snr_gamma")

    def check_noise_process(self, process: NoiseProcess) -> None:
        super().check_noise_process(process)
        check_loss_weighting(process, self.loss_weighting)

    def options_without_effect(self) -> dict[str, str]:
        own = {"min_snr_gamma": "`loss_weighting` is not 'min_snr'"} if self.loss_weighting != "min_snr" else {}
        return super().options_without_effect() | own
