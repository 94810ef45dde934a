"""Settings that must not change what is computed: each class of runs agrees, bit for bit or to rounding."""

import random

import datasets
import numpy as np
import pytest
import torch

from tests.support import rounding
from tests.support.tiny import tiny_encoded_group, tiny_wan_pipeline
from tests.support.trainer.runs import (
    SMOOTH_ADAM,
    RecordGradients,
    assert_equal_weights,
    config,
    double,
    losses,
    trained_weights,
    trainer,
)


ROWS = 8


def run(tmp_path, rows=ROWS, model=None, **changes):
    evaluation = {"eval_dataset": tiny_encoded_group(2, seed=3)} if "eval_strategy" in changes else {}
    recorder = RecordGradients()
    made = trainer(
        config(tmp_path, **({"max_grad_norm": 0.0, "max_steps": 3} | changes)),
        rows=rows,
        model=model or tiny_wan_pipeline(),
        callbacks=[recorder],
        **evaluation,
    )
    made.train()
    return made, recorder.steps


@pytest.mark.parametrize("loss_type", ["sampled", "sum", "plackett_luce"])
@pytest.mark.parametrize("shared_noise", [True, False])
def test_the_split_of_a_batch_does_not_matter(tmp_path, loss_type, shared_noise):
    """4, 2 x 2 and 1 x 4 samples an optimizer step: the same samples, noise, losses and gradients."""
    settings = {"loss_type": loss_type, "shared_noise": shared_noise, **SMOOTH_ADAM}
    whole, gradients = run(tmp_path, model=double(tiny_wan_pipeline()), per_device_train_batch_size=4, **settings)
    for batch, accumulation in ((2, 2), (1, 4)):
        division = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        split, split_gradients = run(tmp_path, model=double(tiny_wan_pipeline()), **division, **settings)
        assert losses(split)[0] == pytest.approx(losses(whole)[0], rel=rounding.LOGGED)
        rounding.assert_close_weights(split_gradients[0], gradients[0], rounding.DOUBLE)
        assert losses(split) == pytest.approx(losses(whole), rel=1e-4)


def test_activation_checkpointing_does_not_change_a_bit(tmp_path):
    plain, gradients = run(tmp_path)
    checkpointed, checkpointed_gradients = run(tmp_path, activation_checkpointing=True)
    assert checkpointed.model.is_gradient_checkpointing and not plain.model.is_gradient_checkpointing
    assert_equal_weights(checkpointed_gradients[0], gradients[0])
    assert_equal_weights(trained_weights(checkpointed), trained_weights(plain))


def test_activation_checkpointing_recomputes_the_policy_only(tmp_path):
    """Forward calls of a block in one step: one of the reference, one of the policy, one recomputed."""
    for checkpointing, expected in ((False, 2), (True, 3)):
        made = trainer(config(tmp_path, max_steps=1, activation_checkpointing=checkpointing))
        calls = []
        made.model.blocks[0].attn1.to_v.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        made.train()
        assert len(calls) == expected


@pytest.mark.parametrize(
    "changes",
    [
        {"dataloader_num_workers": 2},
        {"eval_strategy": "steps", "eval_steps": 1},
        {"logging_steps": 3},
        {"save_strategy": "steps", "save_steps": 1},
        {"per_device_eval_batch_size": 1, "eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_only_watches_does_not_change_a_bit(tmp_path, changes):
    plain, _ = run(tmp_path)
    watched, _ = run(tmp_path, **changes)
    assert_equal_weights(trained_weights(watched), trained_weights(plain))


def test_the_callers_random_state_decides_nothing(tmp_path):
    runs = []
    for seed in (0, 1):
        random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
        made = trainer(config(tmp_path, max_steps=3), rows=ROWS)
        random.seed(seed + 5), np.random.seed(seed + 5), torch.manual_seed(seed + 5)  # after the trainer has seeded
        made.train()
        runs.append(made)
    assert_equal_weights(trained_weights(runs[0]), trained_weights(runs[1]))
    other, _ = run(tmp_path, seed=1)
    assert losses(other) != losses(runs[0])


def test_encoded_rows_may_come_in_any_container(tmp_path):
    rows = tiny_encoded_group(ROWS)
    table = datasets.Dataset.from_list(
        [{k: v if isinstance(v, str) else v.tolist() for k, v in row.items()} for row in rows]
    )
    made = [trainer(config(tmp_path, max_steps=2), train_dataset=container) for container in (rows, table)]
    for one in made:
        one.train()
    assert_equal_weights(trained_weights(made[0]), trained_weights(made[1]))
