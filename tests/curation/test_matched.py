"""Rejected videos made from the chosen one: what stays, what changes, and that a trainer takes the table."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tests.support.models.calls import image
from tests.support.tiny import (
    tiny_cogvideox_pipeline,
    tiny_group_dataset,
    tiny_hunyuan15_pipeline,
    tiny_hunyuan_i2v_pipeline,
    tiny_video,
    tiny_wan_pipeline,
)
from video_trl import VideoDPOConfig, VideoDPOTrainer
from video_trl.cli import main
from video_trl.curation.matched import MatchedLosers, _Maker, matched_losers, moving_region
from video_trl.data.tables import load_rows
from video_trl.data.video_io import read_video
from video_trl.models import family_of


HOW = {"num_inference_steps": 3, "guidance_scale": 2.0, "fps": 8}


@pytest.mark.parametrize("pipeline", [tiny_wan_pipeline, tiny_cogvideox_pipeline])
def test_noise_and_latents_are_separated_again(pipeline):
    process = family_of(pipeline()).noise_process
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 5, 4, 2, 3, 3, generator=generator, dtype=torch.float64).unbind()
    timesteps = process.sample_timesteps(torch.linspace(0.05, 0.95, 5, dtype=torch.float64))
    noisy, velocity = process.add_noise(latents, noise, timesteps), process.velocity(latents, noise, timesteps)
    for ours, theirs in zip(process.separate(noisy, velocity, timesteps), (latents, noise), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)


def test_a_region_moves_and_is_never_empty():
    seen = []
    for seed in range(20):
        region = moving_region((5, 12, 16), torch.Generator().manual_seed(seed))
        assert region.shape == (5, 12, 16) and region.flatten(1).any(dim=1).all() and not region.all()
        seen.append(region)
    assert torch.equal(seen[3], moving_region((5, 12, 16), torch.Generator().manual_seed(3)))
    assert any(not torch.equal(region[0], region[-1]) for region in seen)
    assert moving_region((2, 1, 1), torch.Generator().manual_seed(0)).all()  # as small as it gets


def test_a_region_is_the_same_shape_on_every_grid():
    """The middle one of 5 x 5 fine cells lies where the coarse cell does."""
    for seed in range(5):
        coarse, fine = (moving_region((3, 8 * n, 12 * n), torch.Generator().manual_seed(seed)) for n in (1, 5))
        assert torch.equal(fine[:, 2::5, 2::5], coarse) and coarse.sum() > 9


def test_a_text_encoder_that_sees_the_first_frame_is_shown_it():
    maker = _Maker(tiny_hunyuan_i2v_pipeline(), MatchedLosers(**HOW))
    one, two = (maker._conditions("A ball falls.", tiny_video(seed), 8.0) for seed in (0, 1))
    assert set(one) == set(maker.family.condition_columns)
    assert not torch.allclose(one["prompt_embeds"], two["prompt_embeds"], atol=1e-4)
    assert (maker.family.guidance, maker.guidance) == (2.0, 1.0)  # it is told
    other = _Maker(maker.pipeline, MatchedLosers(**HOW | {"guidance_scale": 3.0}))
    names = {each.identity("A ball falls.", tiny_video(0), "w") for each in (maker, other)}
    assert len(names) == 2  # or the videos of the first one would be taken for the other's
    assert _Maker(maker.pipeline, MatchedLosers()).family.guidance == 6.0  # and not its call's default of 1
    assert maker._negative().keys() == set(maker.family.condition_columns) - {"first_frame_latents"}


def test_a_pipeline_with_a_guider_guides_as_that_does():
    pipeline = tiny_hunyuan15_pipeline()
    assert [_Maker(pipeline, MatchedLosers(guidance_scale=each)).guidance for each in (None, 2.0)] == [1.0, 2.0]


@pytest.mark.parametrize("pipeline", [tiny_wan_pipeline, tiny_cogvideox_pipeline])
def test_outside_of_a_region_nothing_changes(pipeline):
    maker = _Maker(pipeline(), MatchedLosers("repaint", **HOW))
    generator = torch.Generator().manual_seed(1)
    shape = (1, maker.pipeline.transformer.config.in_channels, 3, 4, 4)
    latents, noise = (torch.randn(shape, generator=generator) for _ in range(2))
    conditions = maker._prompt("A ball falls.", image())
    mask = moving_region((3, 4, 4), generator)
    painted = maker._denoise(latents, noise, conditions, 0.7, mask)
    assert torch.equal(painted[:, :, ~mask], latents[:, :, ~mask])
    assert not torch.isclose(painted[:, :, mask], latents[:, :, mask]).any(dim=1).all()
    whole = maker._denoise(latents, noise, conditions, 0.7, None)
    assert whole.isfinite().all() and not torch.isclose(whole, latents).all()


def test_a_model_that_knows_the_video_gives_it_back():
    """With the true velocity at every step what was noised is denoised to what it was, from any level and shift."""
    maker = _Maker(tiny_wan_pipeline(), MatchedLosers(guidance_scale=1.0, num_inference_steps=7))
    latents, noise = torch.randn(2, 1, 4, 3, 4, 4, generator=torch.Generator().manual_seed(2)).unbind()
    asked = []

    class Oracle(type(maker.family)):
        def predict(self, transformer, noisy_latents, timesteps, conditions):
            asked.append(timesteps.item())
            return self.noise_process.velocity(latents, noise, timesteps)

    maker.family = Oracle()
    torch.testing.assert_close(maker._denoise(latents, noise, {}, 0.8, None), latents, rtol=1e-4, atol=1e-4)
    assert asked[0] == pytest.approx(800, abs=1e-3) and asked == sorted(asked, reverse=True) and len(asked) < 7


def test_a_trainer_takes_the_table_and_a_second_run_makes_nothing(tmp_path):
    rows = tiny_group_dataset(2, 1, num_frames=9)
    how = MatchedLosers("repaint", seeds=(0, 1), **HOW)
    pipeline = tiny_wan_pipeline()
    table = matched_losers(rows, pipeline, tmp_path / "matched", how)
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "matched" / "videos").iterdir()}
    assert len(files) == 2 * 3
    assert matched_losers(rows, pipeline, tmp_path / "matched", how) == table
    assert {path: path.stat().st_mtime_ns for path in files} == files
    made = load_rows(str(table), "train")
    assert len(made[0]["rejected"]) == 2 and np.shape(made[0]["loss_weights"])[0] == 3
    etas = json.loads(made[0]["provenance"])["eta"].values()
    assert len(set(etas)) == 2 and all(0.65 <= eta <= 0.8 for eta in etas)
    videos = [read_video(source) for source in (made[0]["chosen"], *made[0]["rejected"])]
    assert videos[0].shape == videos[1].shape and not np.array_equal(videos[1], videos[2])
    settings = {"output_dir": str(tmp_path / "run"), "cache_dir": str(tmp_path / "cache"), "report_to": "none"}
    args = VideoDPOConfig(**settings, use_cpu=True, max_steps=1, lora_rank=2)
    trainer = VideoDPOTrainer(tiny_wan_pipeline(), args, made)
    assert set(trainer.train_dataset[0]["loss_weights"].unique().tolist()) <= {0.0, 1.0}
    trainer.train()


def test_the_command_makes_pairs_of_a_table(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    from video_trl.data.video_io import write_video
    from video_trl.sandbox import simulate

    clip = simulate(0, motion="free_fall")
    write_video("clip.mp4", clip.video, clip.fps)
    Path("pairs.jsonl").write_text(json.dumps({"prompt": clip.prompt, "chosen": "clip.mp4", "rejected": "clip.mp4"}))
    argv = ["generate", "--from", "chosen", "--dataset_name", "pairs.jsonl", "--output_dir", "matched"]
    argv += ["--num_inference_steps", "2", "--round_trip", "False"]
    assert main(argv) == 0
    assert "1 chosen videos with 1 rejected ones each: matched/pairs.parquet" in capsys.readouterr().out
    (row,) = load_rows("matched/pairs.parquet", "train")
    assert row["chosen"] == str(tmp_path / "clip.mp4") and Path(row["rejected"][0]).is_file()
    assert main([*argv[:3], "--output_dir", "matched"]) == 2
    assert "dataset_name" in capsys.readouterr().err
    assert main([argv[0], *argv[3:]]) == 2  # without `--from chosen` it would make the sandbox's own videos
    assert "--dataset_name, --round_trip: read with --from chosen, got --from prompts" in capsys.readouterr().err
    assert main([*argv, "--batch_size", "4", "--prompts", "p.txt"]) == 2
    assert "--prompts, --batch_size: read with --from prompts" in capsys.readouterr().err


def test_the_adapter_acts_as_strongly_as_it_is_told_to(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("pairs.jsonl").write_text(json.dumps({"prompt": "a", "chosen": "pairs.jsonl"}))
    asked = []

    class Loaded:
        pipeline, fps, call_kwargs, revision, adapter_hash = None, 8.0, {}, "r", "h"

    def make(rows, pipeline, output_dir, how, *, weights):
        asked.append(weights)
        Path("made").mkdir(exist_ok=True)
        pq.write_table(pa.table({"prompt": ["a"]}), "made/pairs.parquet")
        return Path("made/pairs.parquet")

    monkeypatch.setattr("video_trl.evaluation.runs.generate.load_generator", lambda *a, **k: asked.append(k) or Loaded)
    monkeypatch.setattr("video_trl.curation.matched.matched_losers", make)
    argv = ["generate", "--from", "chosen", "--dataset_name", "pairs.jsonl", "--adapter", "x"]
    for more in ([], ["--adapter_scale", "0.5"], ["--adapter_alpha", "64"]):
        assert main([*argv, *more]) == 0
    told = [(each["adapter_alpha"], each["adapter_scale"]) for each in asked[::2]]
    assert told == [(None, 1.0), (None, 0.5), (64.0, 1.0)]
    assert asked[1] == "r h" and len(set(asked[1::2])) == 3  # of the names of files: other losers


def test_a_video_that_cannot_be_read_costs_its_own_row(tmp_path, caplog):
    """Also one that is too short; the others are made, and stay."""
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    good, short = (np.zeros((frames, 32, 32, 3), dtype=np.uint8) for frames in (5, 1))
    rows = [{"prompt": "a", "chosen": video} for video in (str(tmp_path / "bad.mp4"), good, short)]
    how = MatchedLosers(num_frames=5, **HOW)
    made = load_rows(str(matched_losers(rows, tiny_wan_pipeline(), tmp_path / "out", how)), "train")
    assert len(made) == 1
    assert "Row 0 is left out" in caplog.text and "Row 2 is left out" in caplog.text
    with pytest.raises(ValueError, match="None of 1 chosen videos can be used"):
        matched_losers(rows[:1], tiny_wan_pipeline(), tmp_path / "none", how)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "crop"}, "`kind` must be one of 'partial', 'repaint', got 'crop'"),
        ({"eta": (0.8, 0.6)}, "`eta` must be two noise levels"),
        ({"eta": (0.5,)}, "`eta` must be two noise levels"),
        ({"seeds": (1, 1)}, "`seeds` must be different numbers"),
        ({"guidance_scale": 0.0}, "`guidance_scale` must be positive"),
    ],
)
def test_bad_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        MatchedLosers(**changes)


def test_rows_without_a_chosen_video_or_file_are_refused(tmp_path):
    with pytest.raises(ValueError, match="Expected rows with 'prompt' and 'chosen'"):
        matched_losers([{"prompt": "a", "clip": "b"}], tiny_wan_pipeline(), tmp_path, MatchedLosers())
    rows = [{"prompt": "A ball.", "video": np.zeros((9, 32, 32, 3), dtype=np.uint8)}]
    with pytest.raises(ValueError, match="Leave `round_trip` on"):
        matched_losers(rows, tiny_wan_pipeline(), tmp_path, MatchedLosers(round_trip=False, **HOW))
