"""The study of PhyAugPipe: who trains on what, and how its results are told."""

import json
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pytest

from tests.support.paths import EXAMPLES
from tests.support.scripts import load_script
from video_trl.curation.engine.manifest import new_manifest
from video_trl.sandbox.world.prompts import ACTIONS


SCRIPT = EXAMPLES / "studies" / "phyaug.py"


@pytest.fixture(scope="module")
def study():
    return load_script(SCRIPT)


def tables() -> tuple[pa.Table, pa.Table]:
    """A pool of 300 clips, and the 150 of it that are rich: 100 easy, 30 medium and 20 hard ones."""
    categories = ["easy"] * 100 + ["medium"] * 30 + ["hard"] * 20
    names = [f"clip{row}" for row in range(300)]
    pool = new_manifest({"content": names}, {"content": pa.string()})
    rich = {"content": names[:150], "category": categories}
    return pool, new_manifest(rich, {"content": pa.string(), "category": pa.string()})


def test_every_arm_trains_on_as_many_groups_and_chooses_them_its_own_way(study):
    pool, rich = tables()
    scores = {"easy": 0.9, "medium": 0.5, "hard": 0.1}
    of_content = dict(zip(rich["content"].to_pylist(), rich["category"].to_pylist(), strict=True))
    chosen = {(arm, seed): study.choose(arm, seed, pool, rich, scores, 60) for arm in study.ARMS for seed in range(3)}
    assert all(len(contents) == 60 for contents in chosen.values())
    assert all(chosen[arm, 0] != chosen[arm, 1] for arm in study.ARMS)
    counts = {arm: Counter(of_content.get(content) for content in chosen[arm, 0]) for arm in study.ARMS}
    assert counts["random"][None] > 15 and counts["filter"][None] == 0
    assert counts["filter"]["easy"] > 30
    assert counts["cluster"] == {"easy": 20, "medium": 20, "hard": 20}
    assert counts["physics"]["hard"] == 20 and counts["physics"]["medium"] > counts["physics"]["easy"]


def result(study, folder: Path, arm: str, seed: int | None, pc: float) -> None:
    args = study.StudyArguments(output_dir=str(folder))
    scores = [
        {"prompt": f"p{row}", "category": ("rolling", "pendulum")[row % 2], "seed": 1, "pc": pc + row / 100, "sa": 0.5}
        for row in range(10)
    ]
    study.write_result(args, arm, {"scores": scores, "categories": {"rolling": 3}}, seed)


def test_a_report_compares_arms_and_needs_every_result(study, tmp_path):
    args = study.StudyArguments(output_dir=str(tmp_path / "out"))
    page = tmp_path / "page.md"
    page.write_text("before\n\n" + "\n".join(study.MARKS) + "\n\nafter\n")
    study.write_result(args, "setting", args.setting())
    study.write_result(args, "difficulty", {ACTIONS["pendulum"]: 0.2, ACTIONS["rolling"]: 0.8})
    result(study, tmp_path / "out", "base", None, 0.3)
    for arm, pc in zip(study.ARMS, (0.4, 0.4, 0.45, 0.2), strict=True):
        for seed in range(3):
            with pytest.raises(ValueError, match=f"missing: .*{arm}-seed{seed}"):
                study.write_report(page, args)
            result(study, tmp_path / "out", arm, seed, pc)
    study.write_report(page, args)
    text = page.read_text()
    assert text.startswith("before") and text.endswith("after\n")
    assert (
        "| physics: + physics rewarding | 0.245 | -0.100 [-0.100, -0.100] worse | -0.200 [-0.200, -0.200] worse |"
        in text
    )
    assert "pc, hard (pendulum, rolling)" in text and "| rolling | 0.800 | 3.0 | 3.0 | 3.0 | 3.0 |" in text
    study.write_report(page, args)
    assert page.read_text() == text


def test_another_setting_is_not_mixed_in(study, tmp_path):
    args = study.StudyArguments(output_dir=str(tmp_path))
    study.write_result(args, "setting", args.setting())
    with pytest.raises(ValueError, match="Pass another --output_dir"):
        study.write_result(args, "setting", args.setting() | {"max_steps": 7})
    with pytest.raises(ValueError, match="Expected arms of"):
        study.main(["--arms", "other", "--output_dir", str(tmp_path)])


@pytest.mark.slow
def test_the_study_from_end_to_end(study, tmp_path):
    """Two steps of everything: to leave the files and the table that the full study leaves."""
    folder = ["--output_dir", str(tmp_path)]
    sizes = ["--pool_clips", "60", "--num_groups", "8", "--num_rejected", "1", "--representatives", "1"]
    study.main([*folder, *sizes, "--max_steps", "2", "--batch_size", "4", "--eval_prompts", "7", "--seeds", "0"])
    results = {path.stem for path in (tmp_path / "results").glob("*.json")}
    assert results == {"setting", "difficulty", "base", *(f"{arm}-seed0" for arm in study.ARMS)}
    scores = json.loads((tmp_path / "results" / "physics-seed0.json").read_text())["scores"]
    assert len(scores) == 7 and all(0 <= score["pc"] <= 1 for score in scores)
