"""Latents in bfloat16: what is stored is rounded once, and nothing else of a run changes."""

import pytest
import torch

from tests.support.tiny import tiny_group_dataset, tiny_wan_pipeline
from video_trl import VideoGroupDPOConfig, VideoGroupDPOTrainer


LATENTS = ("chosen_latents", "rejected_latents")


def trainer(tmp_path, rows, name, **options):
    args = VideoGroupDPOConfig(
        output_dir=str(tmp_path / name), use_cpu=True, max_steps=3, logging_steps=1, save_strategy="no", lora_rank=4,
        learning_rate=1e-2, cache_dir=str(tmp_path / "cache"), disable_tqdm=True, report_to="none", **options,
    )  # fmt: skip
    return VideoGroupDPOTrainer(tiny_wan_pipeline(), args, rows)


def losses(made):
    made.train()
    return [entry["loss"] for entry in made.state.log_history if "loss" in entry]


def test_a_run_on_bfloat16_is_the_run_on_rounded_latents(tmp_path):
    raw = tiny_group_dataset(4, 2)
    whole, half = (trainer(tmp_path, raw, dtype, latents_dtype=dtype) for dtype in ("float32", "bfloat16"))
    stored, plain = half.train_dataset.rows, whole.train_dataset.rows
    assert stored.directory != plain.directory
    rounded = []
    for ours, theirs in zip(stored, plain, strict=True):
        for name in LATENTS:
            assert ours[name].dtype == torch.bfloat16 and ours[name].nbytes == theirs[name].nbytes // 2
            assert torch.equal(ours[name], theirs[name].bfloat16())
        assert torch.equal(ours["prompt_embeds"], theirs["prompt_embeds"])
        rounded.append({**theirs, **{name: ours[name].float() for name in LATENTS}})
    found = losses(half)
    assert found == losses(trainer(tmp_path, rounded, "rounded"))
    assert half.state.log_history[0]["rewards/margins"] == 0.0
    # A number is off by 2^-9 of itself at most, and so are videos; errors of the model are off by some times that.
    assert found == pytest.approx(losses(whole), rel=2**-5)


def test_another_dtype_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`latents_dtype` must be one of 'float32', 'bfloat16', got 'float16'"):
        trainer(tmp_path, tiny_group_dataset(1, 1), "x", latents_dtype="float16")
