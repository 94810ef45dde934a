"""Every configuration of docs/extend/paper_index.md can be made, and holds the values that its papers print."""

import re

import pytest
from transformers import TrainingArguments

from tests.support.paths import DOCS
from video_trl import VideoGroupDPOConfig
from video_trl.curation import GTPairConfig, PhyAugConfig
from video_trl.losses import check_physics_weights


PAGE = (DOCS / "extend" / "paper_index.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)


@pytest.mark.parametrize("index", range(len(BLOCKS)))
def test_code_block_runs(index, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(BLOCKS[index], names)
    assert any(isinstance(value, (TrainingArguments, GTPairConfig, PhyAugConfig)) for value in names.values())


def test_values_of_phygdpo(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, VideoGroupDPOConfig] = {}
    exec(BLOCKS[0], names)
    config = names["training_args"]
    weights = config.physics_weight_arguments()
    assert weights == {
        "alpha_min": 0.5,
        "lam": 0.6,
        "kappa_gamma": 2.0,
        "b_gamma": 0.4,
        "kappa_alpha": 5.0,
        "b_alpha": 0.5,
        "alpha_mode": "sigmoid",
        "gamma_mode": "paper",
    }
    check_physics_weights(**weights)
    assert (config.learning_rate, config.weight_decay, config.max_steps) == (1e-5, 0.01, 10_000)
    assert (config.lora_rank, config.lora_alpha) == (48, 48)
    # What the page calls a default is one.
    default = VideoGroupDPOConfig()
    assert (config.beta, config.timestep_sampling) == (default.beta, default.timestep_sampling) == (500.0, "uniform")
