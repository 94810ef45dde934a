"""The trainer's page names every option with its true default, and every metric that is logged."""

import dataclasses
import re

from transformers import TrainingArguments

from tests.support.paths import DOCS
from tests.support.tiny import tiny_encoded_group
from tests.support.trainer.runs import config, trainer
from video_trl import VideoGroupDPOConfig


PAGE = (DOCS / "trainers" / "group_dpo_trainer.md").read_text()


def table(heading: str) -> list[list[list[str]]]:
    """Rows of the table in a section; of each cell the words in back quotes."""
    section = PAGE.split(f"## {heading}\n")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| `")]
    return [[re.findall(r"`([^`]+)`", cell) for cell in row.strip("|").split("|")] for row in rows]


def test_every_option_is_listed_with_its_default():
    documented = {name: default for row in table("Options") for name, default in zip(row[0], row[1], strict=True)}
    inherited = {field.name for field in dataclasses.fields(TrainingArguments)}
    inherited |= {"activation_checkpointing", "activation_checkpointing_kwargs"}  # of newer versions of it
    own = {f.name: repr(f.default) for f in dataclasses.fields(VideoGroupDPOConfig) if f.name not in inherited}
    assert documented == own


def test_every_metric_is_listed(tmp_path):
    documented = {name for row in table("Logged metrics") for name in row[0]}
    made = trainer(config(tmp_path, max_steps=1), eval_dataset=tiny_encoded_group(1))
    made.train()
    general = {"epoch", "step", "grad_norm", "learning_rate"}
    assert set(made.state.log_history[0]) - general == documented
    timing = {"eval_runtime", "eval_samples_per_second", "eval_steps_per_second", "eval_model_preparation_time"}
    assert set(made.evaluate()) - timing - {"epoch"} == {f"eval_{name}" for name in documented}
