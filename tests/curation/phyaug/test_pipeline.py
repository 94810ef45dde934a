"""PhyAugPipe from a pool to groups: every clip accounted for, whatever stops the run and whatever is in the pool."""

import json
import signal
import time
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.support import forks
from tests.support.curation.clips import write_clip
from tests.support.curation.phyaug_runs import KINDS, config, settings, small_pool
from tests.support.judges.server import Step, free_port, serving
from video_trl.curation.engine.manifest import Shard
from video_trl.curation.phyaug.pipeline import (
    PhyAugConfig,
    Runner,
    annotate,
    describe_prompts,
    load_groups,
    read_captions,
    read_pool,
    run_phyaug,
)
from video_trl.curation.phyaug.report import bar_chart
from video_trl.data import read_video
from video_trl.data.columns import check_columns
from video_trl.judges.chat import ChatUnavailableError
from video_trl.losses import physics_weights
from video_trl.sandbox.world.prompts import ACTIONS


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    return small_pool(tmp_path_factory.mktemp("pool"))


@pytest.fixture(scope="module")
def finished(pool, tmp_path_factory):
    """A run from beginning to end."""
    folder = tmp_path_factory.mktemp("run") / "v[1]"
    return folder, run_phyaug(config(folder), [pool])


def test_series_are_named_where_there_are_several():
    rows = [("falling", (3.0, 0.5)), ("rolling", (1.0, 0.25))]
    several = bar_chart(rows, ["available", "sampled"], label="clips")
    assert several.count("<li>") == 2 and "available" in several
    assert "legend" not in bar_chart([(name, values[:1]) for name, values in rows], ["available"], label="clips")


def stores(folder: Path) -> dict[str, int]:
    """Time of every committed batch and generated video: what a rerun must not touch."""
    files = [*(folder / "stages").rglob("*.parquet"), *(folder / "generated").rglob("*.mp4")]
    return {str(path): path.stat().st_mtime_ns for path in files}


def test_every_clip_is_accounted_for_and_the_poor_ones_are_rejected(finished):
    _, result = finished
    fates = dict(zip(KINDS, result.manifest["dropped_by"].to_pylist(), strict=True))
    assert fates["static"] == fates["pan"] == fates["fade"] == "physics_poor" and fates["twice"] == "repeated"
    assert result.funnel == {
        "pool": 11, "usable": 10, "physics-rich": 7, "in a category": 7, "sampled": 4, "groups": 4,
    }  # fmt: skip
    assert result.summary == "11 clips in = 4 kept + 3 not_sampled + 3 physics_poor + 1 repeated; 4 groups"


def test_captions_that_promise_no_physics_never_reach_the_frames(pool, tmp_path):
    made = config(tmp_path, text_annotator="sandbox")
    run = Runner(made, tmp_path, Shard())
    table = read_captions(read_pool(made, [pool], tmp_path, run), made, run)
    fates = dict(zip(KINDS, table["dropped_by"].to_pylist(), strict=True))
    assert fates["static"] == fates["pan"] == "physics_poor_caption" and fates["rolling"] is None
    drafts = [row["text_draft"] for row in table.to_pylist() if row["dropped_by"] is None]
    assert all(json.loads(draft)["parse"]["actions"] for draft in drafts)
    seen = annotate(table, made, run)
    asked = sum(pq.read_table(part).num_rows for part in tmp_path.glob("stages/annotate-*/part-*.parquet"))
    assert asked == len(drafts) < len(KINDS) - 1
    one_stage = annotate(read_pool(config(tmp_path), [pool], tmp_path, run), config(tmp_path), run)
    kept = one_stage["dropped_by"].to_pylist()
    assert [rule is None for rule in seen["dropped_by"].to_pylist()] == [rule is None for rule in kept]


def test_histograms_add_up(finished):
    _, result = finished
    found = {row.name: row.available for row in result.categories}
    assert found == {ACTIONS["rolling"]: 4, ACTIONS["incline"]: 2, ACTIONS["buoyancy"]: 1}
    kept = Counter(result.groups["category"])
    assert {row.name: row.sampled for row in result.categories} == {name: kept[name] for name in found}
    assert all(row.difficulty == 1 - row.score and row.representatives == 1 for row in result.categories)


def test_groups_are_what_the_trainer_reads(finished):
    folder, result = finished
    groups = load_groups(folder)
    check_columns(groups, "group", physics_rewarding=True)
    assert groups.features == result.groups.features and len(groups) == 4
    for row in groups:
        chosen, *rejected = (read_video(video) for video in (row["chosen"], *row["rejected"]))
        assert [video.shape for video in rejected] == [chosen.shape] * 2 == [(13, 64, 64, 3)] * 2
        assert len(set(row["seeds"])) == 2 and [made["seed"] for made in row["rejected_generation"]] == row["seeds"]
        for score, weight in zip(row["rejected_scores"], row["rejected_weights"], strict=True):
            import torch

            alpha, gamma = physics_weights(torch.tensor(score["sa"]), torch.tensor(score["pc"]))
            assert (weight["alpha"], weight["gamma"]) == pytest.approx((alpha.item(), gamma.item()), abs=1e-5)
        told = json.loads(row["provenance"])
        assert told["route"] == "phyaug" and "sandbox-rules" in told["annotator"] and "sandbox-exact" in told["judge"]
        assert row["physics"]["richness"] >= 0.6 and json.loads(row["physics"]["parse"])["forces"]


def test_a_rerun_computes_nothing_and_gives_the_same(finished, pool):
    folder, result = finished
    before = stores(folder)
    again = run_phyaug(config(folder), [pool])
    assert stores(folder) == before and again.groups[:] == result.groups[:] and again.summary == result.summary


def test_other_thresholds_and_budgets_ask_no_model_again(finished, pool):
    folder, result = finished
    annotated = {name: when for name, when in stores(folder).items() if "/annotate-" in name or "/probe-" in name}
    smaller = run_phyaug(config(folder, budget=2), [pool])
    assert len(smaller.groups) == 2 and set(smaller.groups["prompt"]) <= set(result.groups["prompt"])
    assert annotated.items() <= stores(folder).items()
    run_phyaug(config(folder), [pool])


def test_a_representative_that_is_sampled_is_generated_once(finished):
    """The first seed of a clip makes one video, for difficulty and as a loser."""
    folder, result = finished
    tried = pq.read_table(folder / "representatives.parquet")["rejected"].to_pylist()
    rejected = result.rejected["rejected"].to_pylist()
    assert len(set(tried + rejected)) == len(list((folder / "generated").rglob("*.mp4")))
    assert set(tried) & set(rejected)


def test_people_find_the_funnel_the_histograms_and_the_card(finished):
    folder, result = finished
    page = (folder / "funnel.html").read_text()
    assert page.count("<svg") == 3 and "physics_poor" in page and ACTIONS["rolling"] in page and "http" not in page
    card = (folder / "groups" / "README.md").read_text()
    for text in (
        "| physics-rich | 7 |",
        "| physics_poor | 3 |",
        f"| {ACTIONS['incline']} | 2 | 1 |",
        "sandbox-rules",
    ):
        assert text in card
    assert json.loads((folder / "run.json").read_text())["state"] == "finished"


_RUN = """
import json, sys
from datasets import Dataset
from video_trl.curation.phyaug.pipeline import PhyAugConfig, run_phyaug
run_phyaug(PhyAugConfig(**json.loads(sys.argv[1])), [Dataset.from_list(json.loads(sys.argv[2]))])
"""


@pytest.mark.parametrize("stage", [pytest.param("annotate", marks=pytest.mark.slow), "generate"])
def test_a_run_that_is_killed_goes_on_and_never_looks_finished(stage, finished, pool, tmp_path):
    _, result = finished
    folder = tmp_path / "run"
    changes = {"batch_size": 1, "model_options": settings(folder)["model_options"] | {"batch_size": 1}}
    arguments = [json.dumps(settings(folder, **changes)), json.dumps(list(pool))]
    process = forks.start("-c", _RUN, *arguments)
    deadline = time.monotonic() + 200
    while len(list(folder.glob(f"stages/{stage}-*/part-*.parquet"))) < 2 and not process.ended():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    assert process.wait() == [-signal.SIGKILL]
    with pytest.raises(ValueError, match="a run that is not finished"):
        load_groups(folder)
    assert not (folder / "groups").exists() and not (folder / "manifest.parquet").exists()
    before = stores(folder)
    done = run_phyaug(config(folder, **changes), [pool])
    assert before.items() <= stores(folder).items()
    assert sorted(done.groups["prompt"]) == sorted(result.groups["prompt"])
    seeds = [dict(zip(run.groups["prompt"], run.groups["seeds"], strict=True)) for run in (done, result)]
    assert seeds[0] == seeds[1] and done.summary == result.summary


def test_a_finished_run_does_not_cover_for_a_later_one_that_fails(finished, pool, tmp_path):
    folder, _ = finished
    with pytest.raises(ValueError, match="No clip is left after the filter"):
        run_phyaug(config(folder, min_richness=1.0), [pool])
    assert not (folder / "groups").exists() and not (folder / "manifest.parquet").exists()
    with pytest.raises(ValueError, match="not finished"):
        load_groups(folder)
    run_phyaug(config(folder), [pool])
    assert len(load_groups(folder)) == 4


def test_bad_rows_are_recorded_by_name(tmp_path):
    pool = small_pool(tmp_path, ("rolling", "rolling", "rolling", "incline", "incline", "incline", "buoyancy"))
    rows = list(pool)
    Path(rows[1]["video"]).unlink()
    rows[2]["prompt"] = " ".join(["a red ball rolls"] * 500)
    Path(rows[4]["video"]).write_bytes(b"<html>404</html>")
    rows[5]["prompt"] = "Красный блок скользит вниз."
    rows.append({"video": rows[0]["video"].replace("00", "77"), "prompt": ""})
    write_clip(Path(rows[-1]["video"]), prompt=None)
    result = run_phyaug(config(tmp_path / "run", seeds=[0]), [type(pool).from_list(rows)])
    assert result.manifest["dropped_by"].to_pylist() == [
        None, "missing", "long_prompt", None, "unreadable", "other_script", None, "no_prompt",
    ]  # fmt: skip
    long_row = result.manifest.to_pylist()[2]
    assert (long_row["value"], long_row["limit"]) == (2000, 256)
    assert [row.available for row in result.categories] == [1, 1, 1]  # categories of a single clip


def test_an_empty_pool_is_refused(tmp_path, pool):
    with pytest.raises(ValueError, match="at least one source"):
        run_phyaug(config(tmp_path))
    (tmp_path / "clips").mkdir()
    with pytest.raises(ValueError, match="no video found"):
        run_phyaug(config(tmp_path), [tmp_path / "clips"])
    with pytest.raises(ValueError, match="No clip is left after reading the pool: 3 clips in = 0 kept"):
        run_phyaug(config(tmp_path), [pool.select(range(3)).map(lambda row: {"prompt": ""})])


def test_a_judge_that_cannot_be_reached_stops_the_run_and_nothing_is_lost(finished, pool, tmp_path):
    url = f"http://127.0.0.1:{free_port()}/v1"
    options = {"model": "judge", "max_retries": 0}
    with pytest.raises(ChatUnavailableError, match="Is the server running"):
        run_phyaug(config(tmp_path, judge=url, judge_options=options), [pool])
    made = stores(tmp_path)
    assert any("/generate-" in name for name in made) and not (tmp_path / "groups").exists()
    with serving(
        Step(answer={**JUDGED, "pc": 1}), Step(answer="no"), Step(answer="no"), Step(answer=JUDGED)
    ) as server:
        other = {"model": "judge", "max_repairs": 1, "concurrency": 1}
        result = run_phyaug(config(tmp_path, judge=server.url, judge_options=other), [pool])
    # The second video, a rolling ball, got no answer, and its category had no other representative.
    assert Counter(result.manifest["dropped_by"].to_pylist())["no_score"] == 4
    assert made.items() <= stores(tmp_path).items() and len(result.groups)


JUDGED = {"description_of_video": "a ball", "sa_reason": "", "sa": 5, "pc_reason": "", "pc": 3}


def test_settings_show_no_key(tmp_path, monkeypatch):
    options = {"model": "vlm", "api_key": "sk-secret"}
    made = config(tmp_path, annotator="http://localhost:1/v1", annotator_options=json.dumps(options))
    assert made.options("annotator_options") == options
    assert "secret" not in json.dumps(made.settings())
    assert (
        made.fingerprint
        == config(tmp_path, annotator="http://localhost:1/v1", annotator_options={"model": "vlm"}).fingerprint
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"actions": ""}, "`actions` is needed"),
        ({"min_richness": 1.5}, "`min_richness`"),
        ({"min_text_richness": -0.1}, "`min_text_richness`"),
        ({"min_similarity": 2.0}, "`min_similarity`"),
        ({"budget": 0}, "`budget` >= 1"),
        ({"seeds": [1, 1]}, "Each seed generates one rejected video"),
        ({"num_frames": 12}, r"4k \+ 1"),
        ({"height": 60}, "multiples of 16"),
        ({"engine": "spark"}, "`engine` 'local' or 'ray'"),
        ({"model_options": {"steps": 1}}, "`model_options`"),
        ({"ray_workers": 0}, "`max_workers` >= 1"),
    ],
)
def test_bad_settings_are_refused_before_anything_runs(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **changes)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"judge": "sandbx"}, "No judge 'sandbx'"),
        ({"judge": "videocon-physics:/nowhere"}, "No weights at /nowhere"),
        ({"judge": "/nowhere/scores.csv"}, "scores.csv"),
        ({"judge_options": {"speed": 3}}, "Check `judge_options`"),
        ({"judge": "http://localhost:1/v1"}, "needs `model`"),
        ({"annotator": "/nowhere/qwen"}, "No weights at /nowhere/qwen"),
        ({"text_annotator": "/nowhere/llama"}, "No weights at /nowhere/llama"),
        ({"annotator": "http://localhost:1/v1"}, "Check `annotator_options`"),
        ({"embedder": "/nowhere/mpnet"}, "No weights at /nowhere/mpnet"),
        ({"model": "/nowhere/wan"}, "/nowhere/wan: expected a pipeline"),
    ],
)
def test_models_that_are_not_there_are_found_before_anything_runs(pool, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        run_phyaug(config(tmp_path, **changes), [pool])
    assert not list(tmp_path.iterdir())


def test_equal_scores_share_a_budget_evenly_and_one_beyond_the_pool_takes_all(pool, tmp_path, caplog):
    some = pool.select([0, 2, 3, 5, 6, 8])  # 3 rolling, 2 incline, 1 buoyancy
    with serving(Step(answer={**JUDGED, "sa": 3})) as server:
        options = {"judge": server.url, "judge_options": {"model": "judge"}, "seeds": [0], "redistribute": False}
        three = run_phyaug(config(tmp_path, budget=3, **options), [some])
        assert [(row.score, row.sampled) for row in three.categories] == [(0.5, 1)] * 3
        every = run_phyaug(config(tmp_path, budget=1000, **options), [some])
    assert [row.sampled for row in every.categories] == [row.available for row in every.categories]
    assert len(every.groups) == 6 and "The budget of 1000 is larger than what there is, 6 clips" in caplog.text


def test_defaults_are_those_of_the_paper():
    made = PhyAugConfig()
    assert made.actions == "real-world" and made.text_annotator is None
    assert (made.min_richness, made.tau, made.budget, made.redistribute) == (0.60, 3.0, 20_000, False)
    assert (made.height, made.width, len(made.seeds)) == (480, 832, 3)


def test_captions_are_counted_in_words_and_letters():
    columns = describe_prompts({"content": ["x", "x", None], "prompt": ["a red  ball", "мяч ball", "42"]})
    assert columns["prompt_words"] == [3, 2, 1]
    assert columns["latin_proportion"] == [1.0, pytest.approx(4 / 7), 0.0]
    assert columns["clip"][0] != columns["clip"][1] and columns["clip"][2] is None
