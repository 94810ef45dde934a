"""Options that were given and have no effect in a run: they are told, for someone expects one."""

import logging
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any


logger = logging.getLogger(__name__)

_OF_ENCODING = (
    "num_frames", "fps", "height", "width", "resolution_buckets", "resolution_max_crop", "encode_batch_size",
    "on_bad_video", "latents_dtype",
)  # fmt: skip
_OF_ADAPTER = ("lora_rank", "lora_alpha", "lora_target_modules", "use_rslora", "use_dora")
_OF_OPTIMIZER = (
    "learning_rate", "optim", "optim_class", "optim_args", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon",
)  # fmt: skip
_OF_SCHEDULE = ("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps")


@dataclass(frozen=True)
class Passed:
    """
    What stands beside a configuration.

    Attributes:
        continues (`bool`): Whether the transformer has an adapter already.
        peft_config, ref_model, optimizer, schedule: As passed to a trainer, `None` where they are not.
    """

    continues: bool = False
    peft_config: Any = None
    ref_model: Any = None
    optimizer: Any = None
    schedule: Any = None


def idle_in_run(passed: Passed, *, encoded: bool) -> dict[str, str]:
    """
    Options of every configuration that what is passed beside it leaves without effect, and why.

    Args:
        passed (`Passed`): What is passed.
        encoded (`bool`): Whether all rows are encoded already.
    """
    causes = (
        (encoded, _OF_ENCODING, "the rows are encoded already, and stay as they are"),
        (
            passed.continues or passed.peft_config is not None,
            _OF_ADAPTER,
            "the adapter is that of `peft_config`, or the one that the transformer has",
        ),
        (passed.peft_config is not None, ("lora_dropout",), "that of `peft_config` counts"),
        (passed.optimizer is not None, _OF_OPTIMIZER, "the optimizer is that of `optimizers`"),
        (passed.schedule is not None, _OF_SCHEDULE, "the schedule is that of `optimizers`"),
        (not passed.continues, ("reference_is_base",), "no adapter is continued, so that the base is the reference"),
        (passed.ref_model is not None, ("reference_is_base",), "the reference is `ref_model`"),
    )
    return {name: why for holds, names, why in causes if holds for name in names}


def tell_idle_options(args: Any, idle: Mapping[str, str]) -> None:
    """
    Warn, once, of the options that are given and have no effect.

    Args:
        args (dataclass): Options; those that differ from their default count as given.
        idle (`Mapping[str, str]`): Options without effect in this run, and why.
    """
    given = {
        item.name
        for item in fields(args)
        if args.__dict__[item.name] != (item.default if item.default_factory is MISSING else item.default_factory())
    }
    found = {name: why for name, why in idle.items() if name in given}
    if found:
        listed = "; ".join(f"`{name}={args.__dict__[name]!r}`: {why}" for name, why in sorted(found.items()))
        logger.warning(
            "Options without effect in this run: %s. Leave them out, or change what is in their way.", listed
        )
