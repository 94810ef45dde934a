"""
Settings of published runs, by name: `video-trl train gdpo --preset phygdpo-paper --dataset_name my/groups`.

A preset is a YAML file of this folder, with a comment for each value that says where it stands. What a source does not
give is left at the default, or chosen, and the comment says so. Options and `--config` win over a preset.
"""

from functools import cache
from importlib import resources
from typing import Any

import yaml


# Name -> the method that it is for, as `video-trl train` calls it.
PRESETS = {
    "phygdpo-paper": "gdpo",
    "phygdpo-official": "gdpo",
    "regdpo-paper-t2v": "regdpo",
    "regdpo-paper-i2v": "regdpo",
    "videorepa-2b-paper": "repa",
    "videorepa-2b-official": "repa",
    "videorepa-5b-paper": "repa",
    "videorepa-5b-official": "repa",
}


def load_preset(name: str) -> dict[str, Any]:
    """
    The values of a preset.

    ```python
    from video_trl import VideoGroupDPOConfig
    from video_trl.presets import load_preset

    values = load_preset("phygdpo-paper")
    model = values.pop("model_name_or_path")
    args = VideoGroupDPOConfig(**values, output_dir="out")
    ```

    Args:
        name (`str`): One of `PRESETS`.

    Returns:
        `dict[str, Any]`: `model_name_or_path`, and fields of the configuration of its method.

    Raises:
        ValueError: If there is no such preset.
    """
    return yaml.safe_load(preset_text(name))


def preset_for(name: str, method: str) -> dict[str, Any]:
    """
    The values of a preset, for a run of a method.

    Raises:
        ValueError: If there is no such preset, or it is for another method.
    """
    values = load_preset(name)
    if PRESETS[name] != method:
        others = [preset for preset, of in PRESETS.items() if of == method]
        raise ValueError(
            f"The preset {name!r} is for the method {PRESETS[name]!r}, not {method!r}. "
            + (f"Those of {method!r}: {', '.join(others)}." if others else f"There is none for {method!r}.")
        )
    return values


@cache
def preset_text(name: str) -> str:
    """
    The file of a preset, with its comments.

    Raises:
        ValueError: If there is no such preset.
    """
    if name not in PRESETS:
        raise ValueError(f"There is no preset {name!r}; expected one of {', '.join(PRESETS)}.")
    return (resources.files(__package__) / f"{name}.yaml").read_text(encoding="utf-8")
