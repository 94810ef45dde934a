"""Pairs of a model's own videos: which are chosen, what they weigh, and that a trainer takes them."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from video_trl import VideoDPOConfig, VideoDPOTrainer
from video_trl.cli import main
from video_trl.curation.phyaug.groups import judge_settings
from video_trl.curation.self_pairs import (
    SelfPairsConfig,
    best_and_worst,
    make_pairs,
    pair_weights,
    read_prompts,
    run_self_pairs,
)
from video_trl.data import probe_video


def small(output_dir, **changes):
    call = {"num_inference_steps": 2, "guidance_scale": 1.0}
    values = {
        "output_dir": str(output_dir),
        "num_prompts": 4,
        "num_videos": 2,
        "model_options": {"dtype": "float32", "batch_size": 4, "call_kwargs": call},
        "height": 64,
        "width": 64,
        "fps": 8.0,
        "num_frames": 13,
        "judge": "sandbox",
        "drop_proportion": 0.0,
    }
    return SelfPairsConfig(**(values | changes))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("self-pairs")
    return folder, run_self_pairs(small(folder))


def test_every_pair_is_the_best_and_the_worst_video_of_its_prompt(made):
    folder, result = made
    assert result.funnel["prompts"] == 4 and len(result.videos) == 8 and len(result.pairs) >= 1
    scores = {row["rejected"]: (row["sa"] + row["pc"]) / 2 for row in result.videos.to_pylist()}
    for row in result.pairs:
        chosen, rejected = row["chosen"]["path"], row["rejected"]["path"]
        assert row["chosen_score"] == scores[chosen.removeprefix(f"{folder}/")] > row["rejected_score"]
        assert row["rejected_score"] == scores[rejected.removeprefix(f"{folder}/")]
        info = probe_video(chosen)
        assert (info.num_frames, info.fps, info.height, info.width) == (13, 8.0, 64, 64)
        assert len(set(row["seeds"])) == 2 and row["generator"] == "sandbox"
    assert np.mean(result.pairs["weight"][:]) == pytest.approx(1.0)
    assert (folder / "pairs" / "train.parquet").is_file() and (folder / "videos.parquet").is_file()


def test_a_run_that_was_done_makes_and_judges_nothing_again(made, monkeypatch):
    folder, result = made
    monkeypatch.setattr("video_trl.curation.generate.load_pipeline", None)
    monkeypatch.setattr("video_trl.load._load_judge", None)
    monkeypatch.setattr("video_trl.curation.self_pairs.check_judge", lambda *names, **options: None)
    again = run_self_pairs(small(folder))
    assert again.videos.equals(result.videos) and again.pairs.to_list() == result.pairs.to_list()


def test_a_table_of_scores_that_was_changed_is_read_again(made, tmp_path, monkeypatch):
    """The same name of a judge is not the same judge; no video is made again."""
    folder, result = made
    monkeypatch.setattr("video_trl.curation.generate.load_pipeline", None)
    run, table = shutil.copytree(folder, tmp_path / "run"), tmp_path / "scores.csv"
    rows = result.videos.to_pylist()
    for better in (0, 1):
        lines = [
            f'{Path(row["rejected"]).name},"{row["prompt"]}",{score},{score}'
            for number, row in enumerate(rows)
            for score in [float(number % 2 == better)]
        ]
        table.write_text("\n".join(["video,prompt,sa,pc", *lines, ""]))
        pairs = run_self_pairs(small(run, judge=str(table))).pairs
        assert [row["path"] for row in pairs["chosen"]] == [str(run / row["rejected"]) for row in rows[better::2]]


def test_options_of_a_judge_decide_its_scores_and_how_it_is_reached_does_not():
    def settings(**options):
        return judge_settings("http://localhost:1/v1", {"model": "a", **options})

    assert settings(api_key="x", timeout=3) == settings(api_key="y") == settings()
    assert len({str(settings(**o)) for o in ({}, {"model": "b"}, {"temperature": 1.0}, {"num_frames": 4})}) == 4


def test_the_weight_of_a_pair_multiplies_its_loss(made, tmp_path):
    _, result = made
    rows = result.pairs.select([0])
    heavy = rows.map(lambda row: {"weight": 3.0}, load_from_cache_file=False)
    losses = {}
    for name, data, on in (("plain", rows, False), ("heavy", heavy, True)):
        args = VideoDPOConfig(str(tmp_path / name), use_cpu=True, report_to="none", pair_weights=on)
        trainer = VideoDPOTrainer("sandbox", args, data)
        batch = trainer.data_collator([trainer.train_dataset[0]])
        losses[name] = trainer.compute_loss(trainer.model, batch).item()
    assert losses["heavy"] == pytest.approx(3 * losses["plain"], rel=1e-6) and losses["plain"] > 0


def test_weights_are_needed_where_they_are_asked_for(made, tmp_path):
    _, result = made
    args = VideoDPOConfig(str(tmp_path), use_cpu=True, report_to="none", pair_weights=True)
    with pytest.raises(ValueError, match="`pair_weights` needs the column 'weight'.*self-pairs"):
        VideoDPOTrainer("sandbox", args, result.pairs.remove_columns("weight"))
    bad = result.pairs.select([0]).map(lambda row: {"weight": -1.0}, load_from_cache_file=False)
    with pytest.raises(ValueError, match="Row 0: 'weight' must be a positive, finite number, got -1.0"):
        VideoDPOTrainer("sandbox", args, bad)


def video(content, sa, pc, seed=0):
    return {"content": content, "sa": sa, "pc": pc, "prompt": content, "rejected": f"{content}-{seed}.mp4"} | {
        "seed": seed, "model": "m", "judge": "j"
    }  # fmt: skip


def test_prompts_without_a_difference_have_no_pair():
    rows = [video("a", 0.2, 0.4), video("a", 0.9, 0.5), video("a", 0.5, 0.5), video("b", 1, 1), video("c", 0.5, 0.5)]
    rows.append(video("c", 0.4, 0.6))
    ((best, worst),) = best_and_worst(rows)
    assert best["score"] == pytest.approx(0.7) and worst["score"] == pytest.approx(0.3)


def test_the_pairs_that_differ_least_are_dropped(tmp_path):
    candidates = best_and_worst(
        [
            v
            for n, gap in enumerate((0.1, 0.4, 0.2, 0.3))
            for v in (video(f"p{n}", gap, gap, 1), video(f"p{n}", 0, 0, 2))
        ]
    )
    pairs = make_pairs(candidates, small(tmp_path, drop_proportion=0.25), tmp_path)
    assert pairs["prompt"][:] == ["p1", "p2", "p3"] and pairs["seeds"][0] == [1, 2]
    with pytest.raises(ValueError, match="No prompt has two videos"):
        make_pairs([], small(tmp_path), tmp_path)


def test_weights_by_hand():
    chosen, rejected = [0.95, 0.95, 0.55], [0.05, 0.05, 0.05]
    # Bins of 0.09 from 0.05 to 0.95: the scores 0.05, 0.55 and 0.95 stand 3, 1 and 2 times among 6.
    by_frequency = np.array([(2 / 6 * 3 / 6) ** -1, (2 / 6 * 3 / 6) ** -1, (1 / 6 * 3 / 6) ** -1])
    found = pair_weights(chosen, rejected, weighting="frequency")
    np.testing.assert_allclose(found, by_frequency / by_frequency.mean())
    by_score = np.array([(0.72 / (a * b)) ** 0.5 for a, b in zip(chosen, rejected, strict=True)])
    found = pair_weights(chosen, rejected, weighting="score", power=0.5)
    np.testing.assert_allclose(found, by_score / by_score.mean())
    for neutral in (
        pair_weights(chosen, rejected, weighting="none"),
        pair_weights(chosen, rejected, weighting="score", power=0),
    ):
        np.testing.assert_array_equal(neutral, np.ones(3))
    assert np.isfinite(pair_weights([1.0], [0.0], weighting="score")).all()


def test_prompts_come_from_a_file_or_a_dataset(tmp_path):
    (tmp_path / "prompts.txt").write_text("a ball falls\n\n a ball rolls \na ball falls\n")
    assert read_prompts(str(tmp_path / "prompts.txt"), None) == ["a ball falls", "a ball rolls"]
    assert len(read_prompts("sandbox", 3)) == 3
    (tmp_path / "odd.txt").write_text("\ufeffa ball\u2028falls\nb\n", encoding="utf-8")
    assert read_prompts(str(tmp_path / "odd.txt"), None) == ["a ball\u2028falls", "b"]
    with pytest.raises(ValueError, match="gone.txt: expected a text file in UTF-8"):
        read_prompts(str(tmp_path / "gone.txt"), None)
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(ValueError, match="at least one prompt"):
        read_prompts(str(tmp_path / "empty.txt"), None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_videos": 1}, "A pair needs two videos"),
        ({"drop_proportion": 1.0}, "`drop_proportion` in"),
        ({"weighting": "omni"}, "`weighting` must be one of none, frequency, score"),
        ({"num_frames": 12}, "4k \\+ 1"),
        ({"model_options": {"speed": 1}}, "`model_options`"),
    ],
)
def test_wrong_settings_are_refused(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        small(tmp_path, **change).video_model()


def test_videos_that_end_too_early_are_refused_before_anything_is_made(tmp_path):
    with pytest.raises(ValueError, match="sandbox makes 13 frames at 8 fps, 1.62 s; pairs of 81 frames at 16 fps"):
        run_self_pairs(SelfPairsConfig(output_dir=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


def test_the_command_says_where_the_pairs_are(made, capsys):
    folder, _ = made
    options = '{"dtype": "float32", "batch_size": 4, "call_kwargs": {"num_inference_steps": 2, "guidance_scale": 1.0}}'
    argv = ["--output_dir", str(folder), "--num_prompts", "4", "--num_videos", "2", "--model_options", options]
    argv += ["--height", "64", "--width", "64", "--fps", "8", "--num_frames", "13", "--judge", "sandbox"]
    assert main(["curate", "self-pairs", *argv]) == 0
    printed = capsys.readouterr().out
    assert "prompts      4" in printed and f"dataset: {folder}/pairs" in printed
