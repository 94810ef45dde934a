"""Registry of methods: names and trainer classes, of this package and of installed distributions."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from .trainer.base_trainer import VideoTrainer

ENTRY_POINTS = "video_trl.methods"
"""Group of entry points under which another distribution names its methods: `name = "module:Class"`."""

# Name on the command line -> (where the trainer class is, what lists of methods say of it).
# This is all that registers a method; everything else is asked of the class, which is imported only when it is used.
_METHODS = {
    "sft": ("video_trl.trainer.sft_trainer:VideoSFTTrainer", "supervised fine-tuning"),
    "dpo": ("video_trl.trainer.dpo_trainer:VideoDPOTrainer", "preference pairs (Diffusion-DPO, Flow-DPO)"),
    "gdpo": ("video_trl.trainer.group_dpo_trainer:VideoGroupDPOTrainer", "groups and physics scores (PhyGDPO)"),
    "regdpo": (
        "video_trl.trainer.reg_dpo_trainer:VideoRegDPOTrainer",
        "pairs with an SFT term against collapse (Reg-DPO)",
    ),
    "repa": ("video_trl.trainer.repa_trainer:VideoREPATrainer", "alignment with a video encoder (VideoREPA)"),
}


@dataclass(frozen=True)
class Method:
    """
    A method that can be named; its class is imported by `load` only.

    Attributes:
        name (`str`): Name on the command line.
        path (`str`): `module:Class` of its trainer.
        summary (`str`): A few words for a list of methods.
    """

    name: str
    path: str
    summary: str = ""

    @property
    def class_name(self) -> str:
        return self.path.rpartition(":")[2]

    def load(self) -> "type[VideoTrainer]":
        """
        The trainer class.

        Raises:
            ValueError: If the module cannot be imported, has no such class, or the class is no video trainer.
        """
        what = f"The method {self.name!r}" + (f" is {self.path!r}" if self.path != self.name else "")
        try:
            with _imported_at_once():
                trainer_class = EntryPoint(self.name, self.path, ENTRY_POINTS).load()
        except ModuleNotFoundError as error:
            raise ValueError(
                f"{what}, but there is no module {error.name!r}. Install it, or start in its folder."
            ) from error
        except AttributeError as error:
            raise ValueError(f"{what}: {error}. Expected a trainer class, as in 'my_module:MyTrainer'.") from error
        from .trainer.base_trainer import VideoTrainer

        if not (isinstance(trainer_class, type) and issubclass(trainer_class, VideoTrainer)):
            raise ValueError(
                f"{what}: expected a class that extends `VideoTrainer` or `PreferenceTrainer`, got {trainer_class!r}."
            )
        return trainer_class


@contextmanager
def _imported_at_once() -> Iterator[None]:
    """
    Import without looking for garbage among the million objects that torch and its libraries make, which all stay: the
    looks are a fifth of the time. The first import leaves these objects to no later look either: `Trainer.train` asks
    for one.
    """
    was_enabled, is_first = gc.isenabled(), "torch" not in sys.modules
    gc.disable()
    try:
        yield
    finally:
        if is_first:
            gc.freeze()
        if was_enabled:
            gc.enable()


def own_methods() -> list[Method]:
    """The methods of this package."""
    return [Method(name, path, summary) for name, (path, summary) in _METHODS.items()]


def known_methods() -> list[Method]:
    """
    All methods that have a name: those of this package, then those of installed distributions.

    The latter are entry points of the group `video_trl.methods`, shown with the summary of their distribution.
    """
    others = [
        Method(point.name, point.value, (point.dist.metadata["Summary"] or "") if point.dist else "")
        for point in entry_points(group=ENTRY_POINTS)
    ]
    return own_methods() + sorted(others, key=lambda method: method.name)
