"""
Preference optimisation for video diffusion models.

The trainers and configurations of `video_trl.methods` are imported from here on first use, so that `import video_trl`
stays light (it loads neither torch nor transformers). Submodules are public by name: `video_trl.losses`,
`video_trl.data`, `video_trl.sandbox`, ...
"""

import logging
import os
from functools import partial
from typing import TYPE_CHECKING

from .methods import own_methods


# Reports of use that the libraries underneath would send unasked. Whoever wants them sets the variables.
for _name, _off in {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_UPDATE_DOWNLOAD_COUNTS": "0",
    "GRADIO_ANALYTICS_ENABLED": "False",
    "RAY_USAGE_STATS_ENABLED": "0",
    "WANDB_ERROR_REPORTING": "false",
}.items():
    os.environ.setdefault(_name, _off)


def _unlike(starts: tuple[str, ...], record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(starts)


# What libraries say when they are imported with a torch of another build, which nobody can do anything about: kernels
# of torchao for GPUs that are not there, and what follows. Where they are asked for, loading fails with a reason.
for _name, _said in {
    "torchao": ("Failed to load ", "Skipping import of cpp extensions"),
    "torchao.kernel.intmm": ("Warning: Detected no triton",),
    "torch.utils._pytree": ("%s is an Enum subclass",),
    "diffusers.quantizers.torchao.torchao_quantizer": ("Unable to import `torchao`",),
}.items():
    logging.getLogger(_name).addFilter(partial(_unlike, _said))


if TYPE_CHECKING:  # for editors and type checkers alone: what is there at run time, the registry says
    from .trainer.dpo_config import VideoDPOConfig as VideoDPOConfig
    from .trainer.dpo_trainer import VideoDPOTrainer as VideoDPOTrainer
    from .trainer.group_dpo_config import VideoGroupDPOConfig as VideoGroupDPOConfig
    from .trainer.group_dpo_trainer import VideoGroupDPOTrainer as VideoGroupDPOTrainer
    from .trainer.reg_dpo_config import VideoRegDPOConfig as VideoRegDPOConfig
    from .trainer.reg_dpo_trainer import VideoRegDPOTrainer as VideoRegDPOTrainer
    from .trainer.repa_config import VideoREPAConfig as VideoREPAConfig
    from .trainer.repa_trainer import VideoREPATrainer as VideoREPATrainer
    from .trainer.sft_config import VideoSFTConfig as VideoSFTConfig
    from .trainer.sft_trainer import VideoSFTTrainer as VideoSFTTrainer

__version__ = "0.1.0.dev0"

_TRAINERS = {method.class_name: method for method in own_methods()}
_CONFIGS = {f"{name.removesuffix('Trainer')}Config": method for name, method in _TRAINERS.items()}

__all__ = ["__version__", *sorted([*_TRAINERS, *_CONFIGS])]


def __getattr__(name: str) -> object:
    value: object
    if name in _TRAINERS:
        value = _TRAINERS[name].load()
    elif name in _CONFIGS:
        value = _CONFIGS[name].load().config_class
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it offers {', '.join(__all__)}.")
    globals()[name] = value  # the next access is a plain lookup
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
