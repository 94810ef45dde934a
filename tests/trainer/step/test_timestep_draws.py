"""Timesteps of a step drawn together: the law of each row is that of an independent draw, whoever draws it."""

from functools import partial
from typing import Any

import pytest
import torch

from tests.support.tiny import tiny_encoded_group
from tests.support.trainer.runs import config, trainer
from video_trl.data.buckets import BucketBatchSampler
from video_trl.trainer.step.denoising import EVALUATION_STEP, draw_noise, sample_generator
from video_trl.trainer.step.timestep_draws import RowsOfStep, draw_together


def drawn(how: Any, step: int, total: int, *, first: int = 0, rows: int | None = None, seed: int = 0) -> torch.Tensor:
    """Of the rows of a step, or some of them; rows have the numbers of their places."""
    indices = range(first, first + (total if rows is None else rows))
    u = draw_noise(seed, [step] * len(indices), indices, (1, 1, 1, 1), num_noises=1, num_choices=1).u
    return draw_together(how, u, RowsOfStep(first, total), step, partial(sample_generator, seed))


@pytest.mark.parametrize("how", ["stratified", "antithetic"])
@pytest.mark.parametrize("total", [1, 3, 8])
def test_each_row_has_the_law_of_an_independent_draw(how, total):
    """Its empirical distribution function over many steps is the uniform one, by Kolmogorov and Smirnov at 0.1 %."""
    count = 2400 // total
    draws = torch.stack([drawn(how, step, total) for step in range(count)])  # (steps, rows)
    assert ((draws >= 0) & (draws < 1)).all()
    grid = (torch.arange(count) + 0.5) / count
    for row in draws.T:
        assert (row.sort().values - grid).abs().max() < 1.95 / count**0.5
    # A row knows nothing of its own later timesteps beyond the steps that share strata.
    assert torch.corrcoef(torch.stack([draws[:-8, 0], draws[8:, 0]]))[0, 1].abs() < 4 / count**0.5


@pytest.mark.parametrize(("total", "steps"), [(8, 1), (20, 1), (4, 2), (3, 3), (1, 8)])
def test_every_stratum_has_one_row(total, steps):
    for start in (0, 5 * steps):
        together = torch.cat([drawn("stratified", start + step, total) for step in range(steps)])
        strata = (together * len(together)).floor().sort().values
        assert torch.equal(strata, torch.arange(len(together), dtype=torch.float64))
    assert not torch.equal(drawn("stratified", 0, total), drawn("stratified", 0, total, seed=1))


@pytest.mark.parametrize(("total", "steps"), [(8, 1), (3, 2), (1, 2)])
def test_two_rows_mirror_each_other(total, steps):
    together = torch.cat([drawn("antithetic", 4 + step, total) for step in range(steps)])
    assert torch.equal(together[0::2] + together[1::2], torch.ones(len(together) // 2, dtype=torch.float64))
    assert len(set(together.tolist())) == len(together)


@pytest.mark.parametrize("how", ["stratified", "antithetic"])
def test_processes_and_micro_batches_draw_what_one_batch_draws(how):
    whole = drawn(how, 7, 6)
    assert torch.equal(torch.cat([drawn(how, 7, 6, first=first, rows=2) for first in (0, 2, 4)]), whole)
    assert not torch.equal(drawn(how, 8, 6), whole)


def test_batches_know_their_place_in_the_step():
    shapes = ["a"] * 11 + ["b"] * 2
    for accumulation, processes in ((1, 4), (2, 2), (4, 1)):
        split = {"batch_size": 1, "accumulation": accumulation, "num_processes": processes, "seed": 0}
        samplers = [BucketBatchSampler(shapes, rank=rank, **split) for rank in range(processes)]
        batches = list(zip(*samplers, strict=True))  # of all processes, at once
        for number, rows in enumerate(samplers[0].steps()):
            of_step = [batch for at_once in batches[number * accumulation :][:accumulation] for batch in at_once]
            for batch in of_step:
                assert batch.step_rows == len(rows)
                if batch.counted:
                    assert tuple(rows[batch.first : batch.first + len(batch.rows)]) == batch.rows
            assert sorted(row for batch in of_step if batch.counted for row in batch.rows) == sorted(rows)


def timesteps(directory: Any, **changes: Any) -> dict[tuple[int, int], float]:
    """What each (step, row) of a run drew in training."""
    rows = tiny_encoded_group(6)
    settings = {"per_device_train_batch_size": 3, "max_steps": 4, "save_steps": 2, "save_strategy": "steps", "seed": 0}
    settings |= changes
    resume = settings.pop("resume", None)
    made = trainer(config(directory, **settings), train_dataset=rows, eval_dataset=rows)
    draw, seen = made.step.draw, {}

    def noting(indices: Any, *args: Any, **kwargs: Any) -> Any:
        found = draw(indices, *args, **kwargs)
        step = made.step.now()
        seen.update({(step, int(index)): float(u) for index, u in zip(indices, found.u, strict=True)})
        return found

    made.step.draw = noting
    made.train(resume_from_checkpoint=resume)
    made.evaluate()
    return seen


def test_a_run_draws_the_same_however_it_is_split_and_resumed(tmp_path):
    whole = timesteps(tmp_path / "whole", timestep_draw="stratified")
    split = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 3}
    assert timesteps(tmp_path / "split", timestep_draw="stratified", **split) == whole
    resumed = timesteps(tmp_path / "whole", timestep_draw="stratified", resume=str(tmp_path / "whole/checkpoint-2"))
    assert resumed == {key: u for key, u in whole.items() if key[0] in (2, 3, EVALUATION_STEP)}
    plain = timesteps(tmp_path / "plain")
    assert {key: u for key, u in plain.items() if key[0] == EVALUATION_STEP} == {
        key: u for key, u in whole.items() if key[0] == EVALUATION_STEP
    }
    trained = [key for key in whole if key[0] != EVALUATION_STEP]
    assert len(trained) == 12 and all(whole[key] != plain[key] for key in trained)
    for step, index in trained:  # without the option, draws are those of the row's own stream
        own = draw_noise(0, [step], [index], (1, 1, 1, 1), num_noises=1, num_choices=1).u
        assert plain[step, index] == float(own)
