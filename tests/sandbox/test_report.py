import json
from dataclasses import replace

import numpy as np
import pytest

from video_trl.data.video_io import write_video
from video_trl.sandbox.benchmark import Record
from video_trl.sandbox.report import Run, compare_runs, save_results, write_sandbox_report


LOG = [
    {"step": step, "loss": 0.7 - step / 100, "win_gap": -step / 1e4, "lose_gap": step / 1e4, "rewards/chosen": 0.1,
     "rewards/rejected": -0.1} for step in (10, 20)
] + [{"step": 20, "train_runtime": 3.0}]  # fmt: skip


@pytest.fixture
def base(tmp_path):
    video = str(write_video(tmp_path / "clip.mp4", np.zeros((5, 32, 32, 3), dtype=np.uint8), 8))
    rng = np.random.default_rng(0)
    return [
        Record(f"prompt {i}", "free fall", 0, 0.9, float(pc), float(pc >= 0.5), f"residual <{i}>", video)
        for i, pc in enumerate(rng.uniform(0.2, 0.6, size=12))
    ]


def _runs(base, gains, seeds=(0, 1, 2)):
    """Runs whose `pc` lies above base by the method's gain, give or take a little."""
    runs = []
    for method, gain in gains.items():
        for seed in seeds:
            noise = np.random.default_rng([seed, len(method)]).normal(0, 0.01, len(base))
            records = [replace(r, pc=r.pc + gain + float(e)) for r, e in zip(base, noise, strict=True)]
            runs.append(Run(method, seed, records, LOG))
    return runs


def test_compare_runs_pairs_every_method_with_base_and_the_first_with_the_others(base):
    comparisons = compare_runs(base, _runs(base, {"PhyGDPO": 0.3, "SFT": 0.1}))
    found = {(c.metric, c.a, c.b): c for c in comparisons}
    assert set(found) == {
        (metric, a, b)
        for metric in ("pc", "sa", "joint")
        for a, b in [("PhyGDPO", "base"), ("SFT", "base"), ("PhyGDPO", "SFT")]
    }
    for pair, gain in {("PhyGDPO", "base"): 0.3, ("SFT", "base"): 0.1, ("PhyGDPO", "SFT"): 0.2}.items():
        comparison = found["pc", *pair]
        assert comparison.difference.difference == pytest.approx(gain, abs=0.01)
        assert comparison.verdict == "better"
        assert (comparison.difference.num_items, comparison.difference.num_clusters, comparison.num_seeds) == (
            36,
            12,
            3,
        )
        assert found["sa", *pair].verdict == "no difference shown"


def test_one_seed_never_earns_the_word_better(base):
    comparisons = compare_runs(base, _runs(base, {"PhyGDPO": 0.3}, seeds=(0,)))
    assert comparisons[0].verdict.startswith("higher in 1 seed")


def test_compare_runs_refuses_what_cannot_be_paired(base):
    runs = _runs(base, {"PhyGDPO": 0.3})
    with pytest.raises(ValueError, match="different prompts or noise"):
        compare_runs([base[1], base[0], *base[2:]], runs)
    with pytest.raises(ValueError, match="same training seeds"):
        compare_runs(base, [*runs, *_runs(base, {"SFT": 0.1}, seeds=(0,))])
    with pytest.raises(ValueError, match="same training seeds"):
        compare_runs(base, [])


def test_report_and_results_hold_the_runs(tmp_path, base):
    runs = _runs(base, {"PhyGDPO": 0.3, "SFT": 0.1})
    comparisons = compare_runs(base, runs)
    page = write_sandbox_report(
        tmp_path / "report.html", base, runs, comparisons, notes=["made by a test"], num_samples=4
    )
    html = page.read_text()
    assert html.count("<video") == 4 * 3
    assert "prompt 3" in html and "prompt 4" not in html
    assert "residual &lt;0&gt;" in html
    right = sum(record.pc >= 0.5 for record in base)
    assert f"{right}/12" in html
    assert "PhyGDPO: Error gaps to the reference" in html and "Physics weights" not in html

    saved = json.loads(save_results(tmp_path / "results.json", base, runs, comparisons, {"beta": 500}).read_text())
    assert saved["settings"] == {"beta": 500}
    assert [c["verdict"] for c in saved["comparisons"]] == [c.verdict for c in comparisons]
    assert len(saved["runs"]) == 6 and saved["runs"][0]["records"][0]["pc"] == runs[0].records[0].pc
