"""Aspect buckets, and batches of one shape in which every row counts exactly once."""

import itertools
import math
import random
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler, RandomSampler

from video_trl.data.buckets import AspectBucket, BucketBatchSampler, aspect_buckets, nearest_bucket


PAPER = aspect_buckets(720)


def test_the_buckets_of_the_paper():
    assert list(map(str, PAPER)) == ["1280x720", "960x720", "720x720", "720x1280"]
    assert [AspectBucket.parse(str(bucket)) for bucket in PAPER] == list(PAPER)
    assert all(side % 16 == 0 for bucket in aspect_buckets(500) for side in (bucket.height, bucket.width))


@pytest.mark.parametrize("text", ["480", "480*832", "480x", "0x832", "480x-8", "480 x 832", "480x832x3"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ValueError, match="Expected a size '<height>x<width>'.*got"):
        AspectBucket.parse(text)


def test_the_nearest_bucket_is_the_one_that_crops_least():
    generator = random.Random(0)
    for _ in range(200):
        width, height = generator.randint(64, 4000), generator.randint(64, 4000)
        log_distance = [abs(math.log(width / height) - math.log(b.width / b.height)) for b in PAPER]
        nearest = PAPER[log_distance.index(min(log_distance))]
        assert nearest_bucket(width, height, PAPER) == nearest
        assert nearest.crop_proportion(width, height) == pytest.approx(1 - math.exp(-min(log_distance)))
        scale = max(Fraction(nearest.width, width), Fraction(nearest.height, height))  # to cover
        kept = Fraction(nearest.width * nearest.height) / (width * height * scale**2)
        assert nearest.crop_proportion(width, height) == pytest.approx(float(1 - kept))


def test_too_much_crop_is_refused_and_ties_go_to_the_nearest_area():
    assert nearest_bucket(640, 480, PAPER, max_crop=0.25) == AspectBucket(720, 720)
    assert nearest_bucket(640, 480, PAPER, max_crop=0.24) is None
    sizes = [AspectBucket(720, 1280), AspectBucket(360, 640), AspectBucket(1080, 1920)]
    assert nearest_bucket(700, 400, sizes) == sizes[1]
    assert nearest_bucket(1920, 1080, sizes) == sizes[2]
    for arguments in ((0, 5, PAPER), (5, 5, []), (5, 5, PAPER, 1.5)):
        with pytest.raises(ValueError, match="Expected at least one|at least one pixel"):
            nearest_bucket(*arguments)


def samplers(shapes, batch_size, accumulation, num_processes, seed=3):
    return [
        BucketBatchSampler(
            shapes,
            batch_size=batch_size,
            accumulation=accumulation,
            rank=rank,
            num_processes=num_processes,
            seed=seed,
        )
        for rank in range(num_processes)
    ]


LAYOUTS = list(itertools.product((1, 2, 3), (1, 2, 3), (1, 2, 4)))
DATASETS = [[0] * 7, [0] * 12, [0] * 9 + [1] * 4 + [2], list(range(5)), [number % 3 for number in range(40)], [0]]


@pytest.mark.parametrize("shapes", DATASETS, ids=len)
def test_every_row_counts_once_in_batches_of_one_shape_on_as_many_steps_everywhere(shapes):
    for batch_size, accumulation, num_processes in LAYOUTS:
        made = samplers(shapes, batch_size, accumulation, num_processes)
        batches = [list(sampler) for sampler in made]
        assert {len(own) for own in batches} == {len(made[0])} and len(made[0]) % accumulation == 0
        counted = [row for own in batches for batch in own if batch.counted for row in batch.rows]
        assert Counter(counted) == Counter(range(len(shapes)))
        for start in range(0, len(made[0]), accumulation):
            step = [batch for own in batches for batch in own[start : start + accumulation]]
            assert len({shapes[row] for batch in step for row in batch.rows}) == 1
            assert all(1 <= len(batch.rows) <= batch_size for batch in step)
            rows = sum(len(batch.rows) for batch in step if batch.counted)
            assert {batch.step_rows for batch in step} == {rows}
            # The mean over the rows of the step: every row has the same weight, 1 / rows.
            for batch in step:
                weight = 1 / batch.divisor(num_processes) / num_processes / len(batch.rows)
                assert weight == (pytest.approx(1 / rows) if batch.counted else 0)


@pytest.mark.parametrize("shapes", DATASETS, ids=len)
def test_the_steps_depend_on_the_rows_per_step_alone(shapes):
    by_size = {}
    for batch_size, accumulation, num_processes in LAYOUTS:
        made = samplers(shapes, batch_size, accumulation, num_processes)
        steps = [sorted(rows) for rows in made[-1].steps()]
        assert by_size.setdefault(batch_size * accumulation * num_processes, steps) == steps
        if num_processes * accumulation == 1:
            assert [sorted(batch.rows) for batch in made[0]] == steps


def gathered(shapes, size, seed):
    """The steps of the first epoch, row by row."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    order = range(len(shapes)) if seed is None else torch.randperm(len(shapes), generator=generator).tolist()
    waiting, steps = {}, []
    for row in order:
        waiting.setdefault(shapes[row], []).append(row)
        if len(waiting[shapes[row]]) == size:
            steps.append(waiting[shapes[row]])
            waiting[shapes[row]] = []
    steps += filter(None, waiting.values())
    if seed is None or len(waiting) == 1:
        return steps
    return [steps[number] for number in torch.randperm(len(steps), generator=generator).tolist()]


@pytest.mark.parametrize("seed", [None, 0, 7])
@pytest.mark.parametrize("size", [1, 3, 4, 50])
def test_the_steps_are_those_of_rows_gathered_one_by_one(size, seed):
    for number in (1, 2, 13, 40):
        for kinds in (1, 2, 5):
            shapes = np.random.default_rng(number * kinds).integers(kinds, size=number).tolist()
            assert list(BucketBatchSampler(shapes, batch_size=size, seed=seed).steps()) == gathered(shapes, size, seed)


def test_rows_of_one_shape_are_shuffled_as_torch_does_it():
    sampler = BucketBatchSampler([0] * 11, batch_size=4, seed=5)
    for epoch in range(3):
        sampler.set_epoch(epoch)
        shuffled = RandomSampler(range(11), generator=torch.Generator().manual_seed(5 + epoch))
        assert [list(batch.rows) for batch in sampler] == list(BatchSampler(shuffled, 4, drop_last=False))


def test_the_order_is_a_function_of_seed_and_epoch():
    shapes = [number % 3 for number in range(30)]

    def order(seed, epoch):
        sampler = BucketBatchSampler(shapes, batch_size=4, seed=seed)
        sampler.set_epoch(epoch)
        return [batch.rows for batch in sampler]

    assert order(1, 2) == order(1, 2)
    assert len({str(order(seed, epoch)) for seed in (1, 10) for epoch in range(3)}) == 6
    unshuffled = [batch.rows for batch in BucketBatchSampler(shapes[:7], batch_size=2)]
    assert unshuffled == [(0, 3), (1, 4), (2, 5), (6,)]


def test_the_rarest_shape_is_not_always_last():
    places = []
    for epoch in range(20):
        sampler = BucketBatchSampler([0] * 40 + [1] * 2, batch_size=4, seed=0)
        sampler.set_epoch(epoch)
        places.append([40 in rows or 41 in rows for rows in sampler.steps()].index(True))
    assert min(places) < 3 and max(places) > 7
