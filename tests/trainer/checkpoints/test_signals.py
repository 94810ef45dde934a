"""SIGTERM and SIGUSR1 end a run with a checkpoint and an exit code of their own."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest
from transformers import TrainerCallback

from tests.support import forks
from tests.support.tiny import tiny_encoded_group
from tests.support.trainer.runs import assert_equal_weights, config, losses, trained_weights, trainer
from video_trl.trainer.checkpoints.signals import EXIT_CODE, TrainingInterrupted


class SendSignal(TrainerCallback):
    """Sends this process a signal within a step."""

    def __init__(self, number: int, step: int, event: str = "on_step_begin") -> None:
        self.number, self.step = number, step
        self.__dict__[event] = self.send

    def send(self, args, state, control, **kwargs) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_the_step_at_hand_and_ends_with_its_code(tmp_path, number, caplog):
    settings = {"save_strategy": "no", "save_only_model": True, "eval_strategy": "steps", "eval_steps": 1}
    handler = signal.getsignal(number)
    rows = {"eval_dataset": tiny_encoded_group(1, seed=9)}
    made = trainer(config(tmp_path, **settings), callbacks=[SendSignal(number, 2)], **rows)
    with pytest.raises(SystemExit) as ended:
        made.train()
    assert isinstance(ended.value, TrainingInterrupted) and ended.value.code == EXIT_CODE == 75
    assert f"Ended by {signal.Signals(number).name} after step 3" in caplog.text
    assert signal.getsignal(number) == handler
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]
    assert [entry["step"] for entry in made.state.log_history if "eval_loss" in entry] == [1, 2]  # saving comes first
    resumed, straight = trainer(config(tmp_path)), trainer(config(tmp_path / "straight"))
    resumed.train(resume_from_checkpoint=True)
    straight.train()
    assert_equal_weights(trained_weights(resumed), trained_weights(straight))
    assert losses(resumed) == losses(straight)


def test_a_signal_in_the_last_step_or_while_saving_loses_nothing(tmp_path):
    last = trainer(config(tmp_path / "last", save_strategy="steps"), callbacks=[SendSignal(signal.SIGTERM, 5)])
    assert last.train().global_step == 6  # all is done: no reason to start again
    saving = {"save_strategy": "steps", "save_steps": 2}
    made = trainer(config(tmp_path / "run", **saving), callbacks=[SendSignal(signal.SIGTERM, 2, "on_save")])
    with pytest.raises(TrainingInterrupted):
        made.train()
    assert {path.name for path in (tmp_path / "run").glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-3"}


def test_training_in_a_thread_leaves_the_signals_alone(tmp_path):
    made = trainer(config(tmp_path, max_steps=1))
    thread = threading.Thread(target=made.train)
    thread.start()
    thread.join()
    assert made.state.global_step == 1


PROGRAM = """
import sys
from pathlib import Path
from tests.support.trainer.runs import config, trainer
sys.stdout.reconfigure(line_buffering=True)
made = trainer(config(Path(sys.argv[1]), max_steps=10_000, save_strategy="steps", save_steps=1000, logging_steps=1))
made.train(resume_from_checkpoint="auto")
"""


def test_the_program_ends_with_the_code(tmp_path):
    process = forks.start("-c", PROGRAM, str(tmp_path))
    while "  loss " not in process.output:
        assert not process.ended(), process.errors
        time.sleep(0.01)
    process.kill(signal.SIGTERM)
    assert process.wait(60) == [75], process.errors
    assert "Ended by SIGTERM after step" in process.errors and len(list(Path(tmp_path).glob("checkpoint-*"))) == 1
