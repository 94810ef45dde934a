"""What a training prints: logs that fit a line, while trackers, files and `log_history` keep every value."""

import re

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import PrinterCallback, TrainerState

from tests.support.tiny import tiny_encoded_group
from tests.support.trainer.runs import config, trainer
from video_trl.methods import known_methods
from video_trl.trainer.publishing.printed_log import WIDTH, LogLine
from video_trl.trainer.step.metrics import Metrics


EVERY = {"eval_strategy": "steps", "eval_steps": 1}
LINE = re.compile(r"step (\d)/2  loss [\d.e-]+  lr [\d.e-]+  win_gap [\d.e-]+  accuracy [\d.e-]+  \d+ s left")


def judged(pipeline, *, output_dir, step):
    return {"pc": 0.5, "sa": 0.25}


@pytest.mark.parametrize("bar", [False, True])
def test_a_line_has_the_loss_the_rate_the_state_of_the_method_and_the_time_left(tmp_path, capsys, bar):
    args = config(tmp_path, max_steps=2, disable_tqdm=not bar, report_to="tensorboard", **EVERY)
    made = trainer(args, eval_dataset=tiny_encoded_group(1), evaluator=judged)
    made.train()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step")]
    steps, evaluations = lines[::2], lines[1::2]
    assert [LINE.fullmatch(line)[1] for line in steps] == ["1", "2"]
    for line in evaluations:
        assert re.search(r"  eval_loss \S+  eval_pc 0.5  eval_sa 0.25  eval_win_gap \S+  eval_accuracy \S+$", line)

    history = made.state.log_history
    assert len(history) == 5  # the last is the summary of transformers, which the closing line replaces
    (events,) = tmp_path.rglob("events.out.tfevents*")
    curves = EventAccumulator(str(events.parent))
    curves.Reload()
    for name in ("grad_norm", "alpha", "gamma", "rewards/margins", "lose_gap"):  # of those that are not printed
        assert name in history[0]
        assert [event.value for event in curves.Scalars(f"train/{name}")] == [
            pytest.approx(entry[name]) for entry in history if name in entry
        ]
    assert "train_loss" in history[-1] and len(history[0]) > 12


def test_what_others_log_is_printed_as_it_is(tmp_path, capsys):
    made = trainer(config(tmp_path))
    made.log({"judge/agreement": 0.123456, "note": "half"})
    assert capsys.readouterr().out == "step 0/6  judge/agreement 0.123  note half\n".replace(
        "0/6", f"0/{made.state.max_steps}"
    )


def test_lines_of_the_users_printer_stay_the_users(tmp_path, capsys):
    class Printer(PrinterCallback):
        pass

    trainer(config(tmp_path, max_steps=1), callbacks=[Printer]).train()
    assert "{'loss': '" in capsys.readouterr().out


@pytest.mark.parametrize("method", known_methods(), ids=lambda method: method.name)
def test_no_line_is_wider_than_a_terminal(method):
    """With numbers as wide as they get, and more of them than have a place."""
    metrics, state = Metrics(), TrainerState(global_step=123456, max_steps=1234567)
    names = method.load().printed_metrics
    line = LogLine(metrics, names)
    logs = {
        "loss": -1.23e-100,
        "learning_rate": 1.23e-06,
        "minutes_left": 123456.0,
        **dict.fromkeys(names, -1.23e-06),
    }
    long, full = line(logs, state), line({**logs, **{f"score_of_a_judge_{k}": 0.5 for k in range(20)}}, state)
    assert max(len(long), len(full)) <= WIDTH
    assert "loss -1.23e-100  lr 1.23e-06" in long and long.endswith("  2057.6 h left")
    assert full.endswith("  ...  2057.6 h left")


def test_what_transformers_counts_is_not_printed():
    timing = {"eval_runtime": 1.0, "eval_samples_per_second": 2.0, "eval_model_preparation_time": 0.1, "epoch": 1.0}
    summary = {"train_runtime": 1.0, "train_steps_per_second": 1.0, "total_flos": 1.0, "train_loss": 0.7, "epoch": 1.0}
    line = LogLine(Metrics(), ())
    assert line(timing, TrainerState()) is None and line(summary, TrainerState()) is None
