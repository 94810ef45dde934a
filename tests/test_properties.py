"""What holds for every input, tried on generated ones: a few in the fast tests, many in the slow ones."""

import json
import math
import tempfile
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.evaluation.runs import make_run
from video_trl.curation.engine.manifest import (
    OUTCOME,
    Rule,
    Shard,
    Stage,
    apply_rules_to_table,
    drop_repeats,
    kept_rows,
    new_manifest,
    run_stage,
)
from video_trl.curation.phyaug.sampling import allocate
from video_trl.data.buckets import AspectBucket, BucketBatchSampler, aspect_buckets, nearest_bucket
from video_trl.data.columns import check_columns
from video_trl.data.video_io import iterate_video, read_video
from video_trl.evaluation.votes.gsb import BAD, GOOD, SAME
from video_trl.evaluation.votes.study import Study, Vote, VoteFile, open_study, read_votes
from video_trl.files import formula_free, unmarked, with_formula, without_secrets


FEW, MANY = 10, 1000


def holds_for(*inputs: st.SearchStrategy[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A test of a property for generated inputs. They are the same ones in every run, and none is too slow."""

    def decorate(holds: Callable[..., None]) -> Callable[..., None]:
        @pytest.mark.parametrize("examples", [FEW, pytest.param(MANY, marks=[pytest.mark.slow])])
        def test(examples: int) -> None:
            chosen = settings(
                max_examples=examples, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
            )
            chosen(given(*inputs)(holds))()

        test.__doc__ = holds.__doc__
        return test

    return decorate


# ---- Eq. 1 of PhyGDPO -----------------------------------------------------------------------------------------------

SCORES = st.integers(0, 100).map(lambda hundredths: hundredths / 100)
CATEGORIES = st.lists(st.tuples(st.integers(0, 300), SCORES), min_size=1, max_size=12)


@holds_for(CATEGORIES, st.floats(0, 800), st.integers(1, 2000))
def test_allocation_takes_what_there_is_and_no_more(categories, tau, budget):
    counts, scores = map(list, zip(*categories, strict=True))
    taken, spent = (allocate(counts, scores, tau=tau, budget=budget, redistribute=again) for again in (False, True))
    for picked in (taken, spent):
        assert (picked >= 0).all() and (picked <= counts).all() and picked.sum() <= budget
    assert spent.sum() == min(budget, sum(counts)) and (spent >= taken).all()
    for (n_a, s_a), a in zip(categories, taken, strict=True):
        for (n_b, s_b), b in zip(categories, taken, strict=True):
            if n_a and n_b and s_a < s_b and a < b:  # the harder one gets no less, unless it has fewer
                assert a == n_a


@holds_for(CATEGORIES, st.floats(0, 8), st.integers(1, 2000))
def test_allocation_is_the_quota_of_the_equation_within_one_clip(categories, tau, budget):
    counts, scores = map(np.array, zip(*categories, strict=True))
    weights = np.where(counts > 0, np.exp(tau * (1 - scores)), 0)
    quotas = np.minimum(counts, budget * weights / max(weights.sum(), 1e-300))
    assert (np.abs(allocate(counts, scores, tau=tau, budget=budget) - quotas) < 1 + 1e-6).all()
    named = {f"{number}": value for number, value in enumerate(counts.tolist())}
    by_name = allocate(named, dict(zip(named, scores.tolist(), strict=True)), tau=tau, budget=budget)
    assert list(by_name.values()) == allocate(counts, scores, tau=tau, budget=budget).tolist()


# ---- buckets and batches --------------------------------------------------------------------------------------------


@holds_for(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 1200), st.sampled_from([8, 16, 32]))
def test_the_nearest_bucket_cuts_off_least(width, height, short_edge, multiple):
    buckets = aspect_buckets(short_edge, multiple=multiple)
    assert all(side % multiple == 0 and side > 0 for bucket in buckets for side in (bucket.height, bucket.width))
    best = nearest_bucket(width, height, buckets)
    least = min(bucket.crop_proportion(width, height) for bucket in buckets)
    assert best.crop_proportion(width, height) == pytest.approx(least, abs=1e-8) and 0 <= least < 1
    assert AspectBucket.parse(str(best)) == best
    assert nearest_bucket(width, height, buckets, max_crop=least / 2) is None or least < 1e-8


@holds_for(st.lists(st.sampled_from("abc"), max_size=30), *[st.integers(1, 4)] * 3, st.integers(0, 99))
def test_every_row_counts_once_and_equally_however_a_step_is_split(shapes, batch_size, accumulation, processes, seed):
    options = {"batch_size": batch_size, "accumulation": accumulation, "num_processes": processes, "seed": seed}
    samplers = [BucketBatchSampler(shapes, rank=rank, **options) for rank in range(processes)]
    whole = BucketBatchSampler(shapes, batch_size=batch_size * accumulation * processes, seed=seed)
    assert list(samplers[0].steps()) == list(whole.steps())
    weights = Counter()
    for sampler in samplers:
        batches = list(sampler)
        assert len(batches) == len(sampler) == len(samplers[0])  # no process waits for another
        for batch in batches:
            assert len({shapes[row] for row in batch.rows}) == 1
            for row in batch.rows:
                weights[row] += batch.step_rows / (len(batch.rows) * batch.divisor(processes) * processes)
    assert weights == pytest.approx(dict.fromkeys(range(len(shapes)), 1.0))


# ---- frames ---------------------------------------------------------------------------------------------------------


def numbered_clip(length: int) -> np.ndarray:
    """uint8 (T, 16, 16, 3); every pixel is the number of its frame."""
    return np.broadcast_to(np.arange(length, dtype=np.uint8)[:, None, None, None], (length, 16, 16, 3))


@holds_for(st.integers(1, 30), st.integers(1, 40))
def test_the_first_frames_of_a_clip_are_its_first_frames(length, wanted):
    clip = numbered_clip(length)
    if wanted <= length:
        assert (read_video(clip, num_frames=wanted) == clip[:wanted]).all()
    else:
        with pytest.raises(ValueError, match=f"expected at least {wanted} frames"):
            read_video(clip, num_frames=wanted)


@holds_for(st.integers(1, 60), *[st.integers(1, 120)] * 2, *[st.sampled_from([1000, 1001])] * 2)
def test_resampled_frames_are_those_on_screen_at_every_tick(length, source, target, source_base, target_base):
    """The oracle has whole numbers; rates are such as 24 and 30000/1001."""
    frames = iterate_video(
        numbered_clip(length), fps=target * 1000 / target_base, source_fps=source * 1000 / source_base
    )
    step = source * target_base / (target * source_base)  # frames of the source per tick
    ticks = math.ceil(length * target * source_base / (source * target_base) - 1e-9)
    expected = [(tick * source * target_base) // (target * source_base) for tick in range(ticks)]
    assert [int(frame[0, 0, 0]) for frame in frames] == expected and step > 0


# ---- rows -----------------------------------------------------------------------------------------------------------

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
SCORED = st.fixed_dictionaries({"sa": SCORES, "pc": SCORES})


@st.composite
def groups(draw: st.DrawFn) -> list[dict[str, Any]]:
    several, number = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    return [
        {
            "prompt": draw(TEXTS),
            "chosen": "c.mp4",
            "rejected": [f"{k}.mp4" for k in range(several)],
            "rejected_scores": [draw(SCORED) for _ in range(several)],
        }
        for _ in range(number)
    ]


SPOILT = {
    "no prompt": lambda row: row.update(prompt=None),
    "no chosen video": lambda row: row.update(chosen=None),
    "no rejected video": lambda row: row.update(rejected=[], rejected_scores=[]),
    "a gap": lambda row: row["rejected"].__setitem__(-1, None),
    "a score too many": lambda row: row["rejected_scores"].append({"sa": 0.5, "pc": 0.5}),
    "a score that is none": lambda row: row["rejected_scores"][-1].update(pc=None),
    "not a number": lambda row: row["rejected_scores"][-1].update(sa=math.nan),
    "a score above one": lambda row: row["rejected_scores"][0].update(sa=1.25),
    "a score below zero": lambda row: row["rejected_scores"][0].update(pc=-0.25),
}


@holds_for(groups(), st.sampled_from(sorted(SPOILT)), st.integers(0, 3), st.booleans())
def test_good_rows_are_taken_and_a_spoilt_one_is_named(rows, fault, which, as_table):
    made = Dataset.from_list if as_table else list
    check_columns(made(rows), "group", physics_rewarding=True)
    SPOILT[fault](rows[which % len(rows)])
    with pytest.raises(ValueError, match="Row "):
        check_columns(made(rows), "group", physics_rewarding=True)


@holds_for(st.lists(st.dictionaries(st.sampled_from(["prompt", "chosen", "rejected", "x"]), VALUES), max_size=3))
def test_rows_of_any_kind_are_taken_or_refused(rows):
    for row_type in ("video", "preference", "group"):
        try:
            check_columns(rows, row_type)
        except ValueError as error:
            assert str(error)


# ---- manifests ------------------------------------------------------------------------------------------------------

NUMBERS = st.none() | st.floats(-2, 2) | st.just(math.nan)
MANIFEST_TYPES = {"source_id": pa.string(), "content": pa.string(), "a": pa.float64(), "b": pa.float64()}


@st.composite
def manifests(draw: st.DrawFn) -> pa.Table:
    rows = draw(st.lists(st.tuples(st.sampled_from("xyz"), NUMBERS, NUMBERS), min_size=1, max_size=9))
    contents, a, b = map(list, zip(*rows, strict=True))
    return new_manifest({"source_id": list(map(str, range(len(rows)))), "content": contents, "a": a, "b": b},
                        MANIFEST_TYPES)  # fmt: skip


@holds_for(manifests(), st.floats(-1, 1), st.floats(-1, 1))
def test_a_row_is_dropped_by_the_first_rule_that_it_breaks_and_by_no_later_one(table, low, high):
    rules = [Rule("low", "a", minimum=low), Rule("high", "b", maximum=high)]
    judged = apply_rules_to_table(table, rules)
    for row in judged.to_pylist():
        keeps = [row["a"] is not None and row["a"] >= low, row["b"] is not None and row["b"] <= high]
        expected = "low" if not keeps[0] else None if keeps[1] else "high"
        assert row["dropped_by"] == expected and row["limit"] == {"low": low, "high": high}.get(expected)
    assert apply_rules_to_table(judged, [Rule("all", "a", minimum=9)])["limit"].to_pylist().count(low) == (
        judged["limit"].to_pylist().count(low)
    )
    single = kept_rows(drop_repeats(judged, "content", name="repeat"))
    assert sorted(single["content"].to_pylist()) == sorted(set(kept_rows(judged)["content"].to_pylist()))


@holds_for(st.lists(TEXTS, min_size=1, max_size=9, unique=True), st.integers(1, 4), st.lists(st.integers(0, 5)))
def test_a_stage_that_fails_again_and_again_ends_with_the_table_of_one_that_never_failed(keys, batch_size, failures):
    """It fails after so many batches, and what it had committed is not computed again."""
    left, computed = [], Counter()

    def lengths(batch):
        if left and left[0] == 0:
            raise OSError("no space")
        left[:] = [number - 1 for number in left]
        computed.update(batch["key"])
        short = ["short" if len(key) < 2 else None for key in batch["key"]]
        return {"length": [len(key) for key in batch["key"]], "dropped_by": short}

    table = new_manifest({"key": keys}, {"key": pa.string()})
    stage = Stage("lengths", lengths, {"length": pa.int64()}, "key", batch_size=batch_size)
    with tempfile.TemporaryDirectory() as folder:
        for failure in failures[:3]:
            left[:] = [failure]
            try:
                run_stage(table, stage, folder, Shard())
            except OSError:
                continue
        left.clear()
        done = run_stage(table, stage, folder, Shard())
        assert run_stage(table, stage, folder, Shard()) == done
    assert computed == Counter(keys)
    assert done["key"].to_pylist() == keys and done["length"].to_pylist() == list(map(len, keys))
    assert done["dropped_by"].to_pylist() == ["short" if len(key) < 2 else None for key in keys]
    assert set(done.column_names) == {"key", "length", *OUTCOME}


# ---- votes ----------------------------------------------------------------------------------------------------------


@cache
def study() -> Study:
    with tempfile.TemporaryDirectory() as folder:
        runs = [make_run(Path(folder) / name, name, [(0.5, 0.5)] * 2, scored=False).folder for name in ("a", "b")]
        return open_study(runs)


@st.composite
def votes(draw: st.DrawFn) -> Vote:
    task = study().tasks[draw(st.sampled_from(sorted(study().tasks)))]
    answers = {q.key: draw(st.sampled_from([GOOD, SAME, BAD])) for q in study().questions}
    return Vote(
        study=study().identity, rater=draw(TEXTS), task=task.key, prompt=draw(TEXTS), seed=draw(st.integers(0, 9)),
        a="a", b="b", left=draw(st.sampled_from("ab")), position=draw(st.integers(0, 3)), answers=answers,
        seconds=draw(st.floats(0, 1000)), time="now",
    )  # fmt: skip


@holds_for(st.lists(votes(), max_size=5), votes(), st.integers(0, 9999))
def test_a_file_of_votes_that_is_cut_anywhere_holds_the_votes_before_the_cut(given_votes, later, cut):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "votes.jsonl"
        file = VoteFile(path, study())
        ends = [path.stat().st_size]
        for vote in given_votes:
            file.add(vote)
            ends.append(path.stat().st_size)
        file.close()
        last = {(vote.rater, vote.task): vote for vote in given_votes}
        assert {(vote.rater, vote.task): vote for vote in read_votes(path)[1]} == last
        content = path.read_bytes()
        cut = ends[0] + cut % (len(content) - ends[0] + 1)
        path.write_bytes(content[:cut])
        whole = [vote for vote, end in zip(given_votes, ends[1:], strict=True) if end - 1 <= cut]  # all but a newline
        reopened = VoteFile(path, study())
        reopened.add(later)
        reopened.close()
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[1:-1]]
        assert [Vote(**line) for line in lines] == [*whole, later]


@holds_for(st.lists(VALUES | st.binary(max_size=20), max_size=4), st.integers(0, 60))
def test_a_file_that_is_no_file_of_votes_is_a_value_error(lines, cut):
    header = {"format": 1, "study": "x", "runs": ["a", "b"], "questions": "gsb", "pairs": 1}
    rest = b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "votes.jsonl"
        for content in (rest, json.dumps(header).encode() + b"\n" + rest, json.dumps(header).encode()[:cut]):
            path.write_bytes(content)
            try:
                found, there = read_votes(path)
            except ValueError as error:
                assert "votes.jsonl" in str(error)
            else:
                assert found == header and there == []
            assert path.read_bytes() == content


# ---- what leaves the machine ----------------------------------------------------------------------------------------


@holds_for(st.text(max_size=30))
def test_texts_come_back_from_cells_and_stand_in_a_line(text):
    assert with_formula(formula_free(text)) == text
    assert len(unmarked(text).splitlines()) <= 1 and not set("<>`") & set(unmarked(text))


@holds_for(VALUES, st.text("abcdefghijklmnop", min_size=12, max_size=20))
def test_a_secret_is_hidden_wherever_it_stands(value, secret):
    hidden = json.dumps(without_secrets({"a": [value, {"api_key": secret}], "headers": {"x": secret, "y": [value]}}))
    assert secret not in hidden
