"""Speed, memory, remaining time and the last line of a training."""

import re

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import TrainerCallback

from tests.support.tiny import tiny_encoded_group
from tests.support.trainer.runs import config, trainer
from video_trl.trainer.publishing import progress


NAMES = ("samples_per_second", "proportion_outside_steps", "peak_memory_gib", "minutes_left")


class Seen(TrainerCallback):
    """Keeps what callbacks are shown of each log, and is the clock: a step takes time, and so does what follows it."""

    def __init__(self, in_step=0.0, outside=0.0):
        self.logs, self.in_step, self.outside, self.now = [], in_step, outside, 100.0

    def perf_counter(self):
        return self.now

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.now += self.in_step

    def on_step_end(self, args, state, control, **kwargs):
        self.now += self.outside

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


def test_trackers_see_speed_and_the_history_stays_a_function_of_the_seed(tmp_path):
    made = trainer(config(tmp_path, max_steps=3, report_to="tensorboard"))
    made.train()
    (events,) = list(tmp_path.rglob("events.out.tfevents*"))
    accumulator = EventAccumulator(str(events.parent))
    accumulator.Reload()
    for name in NAMES:
        assert [event.step for event in accumulator.Scalars(f"train/{name}")] == [1, 2, 3]
    assert not {name for entry in made.state.log_history for name in NAMES if name in entry}
    again = trainer(config(tmp_path / "again", max_steps=3))
    again.train()
    assert again.state.log_history[:3] == made.state.log_history[:3]


def test_time_of_steps_is_told_from_time_around_them(tmp_path, monkeypatch, capsys):
    clock = Seen(in_step=30.0, outside=90.0)
    monkeypatch.setattr(progress, "time", clock)
    trainer(config(tmp_path, max_steps=4, logging_steps=2), callbacks=[clock]).train()
    known, first, second, _ = clock.logs
    assert known["minutes_left"] == pytest.approx(6.0)  # of the first step
    for logs, left in ((first, 4.0), (second, 0.0)):  # two rows in 30 s, a minute and a half of other things
        assert logs["samples_per_second"] == pytest.approx(2 / 30)
        assert logs["proportion_outside_steps"] == pytest.approx(0.75)
        assert logs["minutes_left"] == pytest.approx(left)
        assert 0.1 < logs["peak_memory_gib"] < 64
    assert "4 steps in 8 min, 0.0667 rows a second" in capsys.readouterr().err
    assert [progress.duration(seconds) for seconds in (0.2, 59, 130, 7200)] == ["0 s", "59 s", "2 min", "2.0 h"]


def test_evaluations_carry_no_speed_of_training(tmp_path):
    seen = Seen()
    args = config(tmp_path, max_steps=2, eval_strategy="steps", eval_steps=1)
    trainer(args, callbacks=[seen], eval_dataset=tiny_encoded_group(1)).train()
    evaluations = [logs for logs in seen.logs if "eval_loss" in logs]
    assert len(evaluations) == 2 and not any(name in logs for logs in evaluations for name in NAMES)


def test_the_last_line_says_where_everything_is(tmp_path, capsys):
    saving = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_win_gap"}
    made = trainer(config(tmp_path, max_steps=4, **saving, **best), eval_dataset=tiny_encoded_group(1))
    made.train()
    line = capsys.readouterr().err.splitlines()[-1]
    assert re.match(r"4 steps in \d+ s, [\d.e+]+ rows a second, peak memory [\d.]+ GiB\. In ", line)
    chosen = made.state.best_model_checkpoint.rpartition("/")[2]
    for part in (str(tmp_path), "checkpoint-4 (last checkpoint)", f"{chosen} (best checkpoint: ", "save_model()"):
        assert part in line
    made.save_model()
    resumed = trainer(config(tmp_path, max_steps=6, **saving), eval_dataset=tiny_encoded_group(1))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("2 steps in ") and "save_model" not in line
    assert "pytorch_lora_weights.safetensors (adapter), README.md (model card)" in line


@pytest.mark.parametrize("weights", ["lora", "full"])
def test_before_anything_is_saved_the_line_names_the_next_step(tmp_path, capsys, weights):
    trainer(config(tmp_path, max_steps=1, use_peft=weights == "lora")).train()
    assert f"In {tmp_path}: the trained weights after trainer.save_model()." in capsys.readouterr().err


def test_the_first_step_is_logged_by_itself_unless_nothing_is(tmp_path):
    """The loss that is known in advance, and a line in runs that end before `logging_steps`."""
    made = trainer(config(tmp_path / "a", max_steps=3, logging_steps=2))
    made.train()
    assert [entry["step"] for entry in made.state.log_history if "loss" in entry] == [1, 2]
    assert made.state.log_history[0]["win_gap"] == 0.0
    for changes in ({"logging_strategy": "no"}, {"logging_first_step": False, "logging_steps": 9}):
        silent = trainer(config(tmp_path / "b", max_steps=2, overwrite_output_dir=True, **changes))
        silent.train()
        assert not [entry for entry in silent.state.log_history if "loss" in entry]
