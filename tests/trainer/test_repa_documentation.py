"""The page of `VideoREPATrainer` names every option with its default and every metric; its quick start runs."""

import dataclasses
import re

from tests.support.paths import DOCS
from tests.support.trainer.repa_runs import aligned_rows, repa_trainer
from video_trl import VideoREPAConfig
from video_trl.trainer.base_config import VideoConfig


PAGE = (DOCS / "trainers" / "repa_trainer.md").read_text()


def table(heading: str) -> list[list[list[str]]]:
    """Rows of the table in a section; of each cell the words in back quotes."""
    section = PAGE.split(f"## {heading}\n")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| `")]
    return [[re.findall(r"`([^`]+)`", cell) for cell in row.strip("|").split("|")] for row in rows]


def test_every_option_is_listed_with_its_default():
    documented = {row[0][0]: row[1][0] for row in table("Options")}
    shared = {field.name: field.default for field in dataclasses.fields(VideoConfig)}
    own = {field.name: field.default for field in dataclasses.fields(VideoREPAConfig) if field.name not in shared}
    assert documented == {name: repr(default) for name, default in own.items()}
    changed = [f for f in dataclasses.fields(VideoREPAConfig) if f.name in shared and f.default != shared[f.name]]
    assert {field.name for field in changed} == {"learning_rate", "lora_rank", "lora_alpha"}
    text = PAGE.split("## Options")[1]
    assert all(f"`{field.name}={field.default:g}`".replace("0.0001", "1e-4") in text for field in changed)


def test_every_metric_is_listed(tmp_path):
    documented = {name for row in table("Logged metrics") for name in row[0]}
    made = repa_trainer(tmp_path, max_steps=1, eval_dataset=aligned_rows(1))
    made.train()
    general = {"epoch", "step", "grad_norm", "learning_rate"}
    assert set(made.state.log_history[0]) - general == documented
    timing = {"eval_runtime", "eval_samples_per_second", "eval_steps_per_second", "eval_model_preparation_time"}
    assert set(made.evaluate()) - timing - {"epoch"} == {f"eval_{name}" for name in documented}


def test_quick_start_runs(tmp_path, monkeypatch):
    block = re.search(r"```python\n(.*?)```", PAGE, re.DOTALL).group(1)
    block = block.replace("max_steps=100", "max_steps=1, use_cpu=True, disable_tqdm=True").replace("064))", "008))")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    exec(compile(block.replace('output_dir="', f'cache_dir="{tmp_path}/cache", output_dir="'), "quick start", "exec"))
    assert (tmp_path / "sandbox-repa" / "pytorch_lora_weights.safetensors").is_file()
