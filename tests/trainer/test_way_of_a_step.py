"""How many files a reader passes who follows a training step."""

import sys
from pathlib import Path
from types import FrameType
from typing import Any

from transformers import trainer as transformers_trainer

import video_trl
from tests.support.trainer.runs import config, trainer


PACKAGE = str(Path(video_trl.__file__).parent)


def test_a_step_of_group_dpo_passes_few_files(tmp_path):
    """A crossing: another file answers a call than the one before; of the package, and `training_step` of Trainer."""
    made = trainer(config(tmp_path, max_steps=2, step_mode="concat"))
    step, files = made.training_step, []

    def note(frame: FrameType, event: str, _: Any) -> None:
        name = frame.f_code.co_filename
        of_trainer = name == transformers_trainer.__file__ and frame.f_code.co_name == "training_step"
        named = not frame.f_code.co_name.startswith("<")  # no comprehension
        if event == "call" and named and (of_trainer or name.startswith(PACKAGE)) and name not in files[-1:]:
            files.append(name)

    def followed(*arguments: Any) -> Any:
        files.clear()  # the second step is the one that is like all others
        sys.setprofile(note)
        try:
            return step(*arguments)
        finally:
            sys.setprofile(None)

    made.training_step = followed
    made.train()
    own = {Path(name).relative_to(PACKAGE).as_posix() for name in files if name.startswith(PACKAGE)}
    assert {"trainer/group_dpo_trainer.py", "models/wan.py", "losses/preference.py"} <= own
    assert len(own) <= 11 and len(files) - 1 <= 27, files
