"""What a step does not do to the modules of a model: set the mode that they have, and look for frozen gradients."""

from types import SimpleNamespace

import torch
from torch import nn
from transformers import Trainer, TrainerCallback

from tests.support.trainer.runs import config, trained_weights, trainer
from video_trl.trainer.base_trainer import VideoTrainer
from video_trl.trainer.step.micro_batch import micro_batch
from video_trl.trainer.step.timestep_draws import RowsOfStep


class Evaluating(TrainerCallback):
    """Leaves the model in evaluation mode after the second step."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            kwargs["model"].eval()


def test_modules_are_put_into_training_mode_only_where_they_are_not(tmp_path, monkeypatch):
    made = trainer(config(tmp_path, max_steps=4), callbacks=[Evaluating()])
    plain, calls, seen = nn.Module.train, [], []

    def train(module, mode=True):
        if mode:
            calls.append(made.state.global_step)
        return plain(module, mode)

    def compute_loss(*args, **kwargs):
        seen.append(all(module.training for module in made.model.modules()))
        return type(made).compute_loss(made, *args, **kwargs)

    monkeypatch.setattr(nn.Module, "train", train)
    monkeypatch.setattr(made, "compute_loss", compute_loss)
    made.train()
    assert seen == [True] * 4
    assert calls.count(1) == calls.count(3) == 0 and calls.count(2) == len(list(made.model.modules()))


def test_the_method_of_the_class_is_back_afterwards():
    model = nn.Linear(1, 1)
    wrapper, step, rows = nn.Sequential(model), SimpleNamespace(), RowsOfStep(2, 8)
    with micro_batch(step, rows, wrapper, model):
        assert wrapper.train() is wrapper and step.rows == rows
    wrapper.eval()
    assert not model.training and step.rows is None
    with micro_batch(step, rows, wrapper, model):
        assert wrapper.train().training and model.training


def test_clipping_is_that_of_transformers_to_the_last_bit(tmp_path, monkeypatch):
    weights = []
    for name, clip in (("ours", VideoTrainer._clip_grad_norm), ("theirs", Trainer._clip_grad_norm)):
        monkeypatch.setattr(VideoTrainer, "_clip_grad_norm", clip)
        made = trainer(config(tmp_path / name, max_steps=3, max_grad_norm=1e-3))
        made.train()
        weights.append(trained_weights(made) | {"norm": torch.tensor(made.state.log_history[0]["grad_norm"])})
    assert weights[0]["norm"] > 1e-3  # there was something to clip
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])
