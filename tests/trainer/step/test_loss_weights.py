"""The column `loss_weights`: errors of a part of the videos, and preferences of segments."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import rounding
from tests.support.rounding import assert_close_weights
from tests.support.tiny import tiny_encoded_group, tiny_group_dataset, tiny_wan_pipeline
from tests.support.trainer.runs import disturb_adapter, double, first_batch
from tests.trainer.step.test_step_modes import make
from video_trl import VideoDPOConfig, VideoDPOTrainer, VideoRegDPOConfig, VideoRegDPOTrainer
from video_trl.data import EncodedDataset
from video_trl.data.encoding.store import EncodedWriter
from video_trl.losses import velocity_error


def rows(weights: Any, count: int = 2) -> list[dict[str, Any]]:
    return [{**row, "loss_weights": weights} for row in tiny_encoded_group(count, latents_shape=(4, 3, 4, 4))]


def written(folder: Path, encoded: list[dict[str, Any]]) -> EncodedDataset:
    """The rows as `encode_dataset` leaves them in a folder."""
    with EncodedWriter(folder, "group", "x") as writer:
        index = []
        for number, row in enumerate(encoded):
            tensors = {"chosen": row["chosen_latents"], "rejected": row["rejected_latents"][0]}
            tensors |= {"prompt_embeds": row["prompt_embeds"]}
            if row.get("loss_weights") is not None:
                tensors["loss_weights"] = torch.tensor(row["loss_weights"])
            for name, tensor in tensors.items():
                writer.add(f"{name}/{number}", tensor)
            names = {name: f"{name}/{number}" for name in tensors}
            index.append({"prompt": "a", "loss_weights": None} | names | {"rejected": [f"rejected/{number}"]})
        writer.finish(index, [])
    return EncodedDataset(folder)


def loss_of(directory: Any, weights: Any, name: str = "DPO", mode: str = "concat", **changes: Any) -> Any:
    """Loss, gradients and per-element squared errors `(N, F)` of policy and reference, the model in float64."""
    made = make(directory, name, mode, model=double(tiny_wan_pipeline()), rows=rows(weights), **changes)
    disturb_adapter(made)
    seen: dict[str, Any] = {}
    prepare = made.step.prepare

    def watch(*args: Any, **kwargs: Any) -> Any:
        seen["denoising"] = prepare(*args, **kwargs)
        return seen["denoising"]

    made.step.prepare = watch
    loss = made.compute_loss(made.model, first_batch(made, 0, 1))
    loss.backward()
    made.passes.backward()
    gradients = {name: weight.grad.clone() for name, weight in made.model.named_parameters() if weight.requires_grad}
    video = seen["denoising"]
    squares = []
    with torch.no_grad():
        for context in (None, made.reference):
            call = (video.noisy_latents, video.timesteps, video.conditions)
            if context is None:
                prediction = made.family.predict(made.model, *call)
            else:
                with context() as module:
                    prediction = made.family.predict(module, *call)
            squares.append((prediction - video.target).square().mean(dim=1))  # (N, F, H, W)
    return loss.item(), gradients, squares


def test_errors_are_weighted_means():
    prediction, target = torch.randn(2, 2, 3, 2, 4, 4, generator=torch.Generator().manual_seed(0)).unbind()
    plain = velocity_error(prediction, target)
    torch.testing.assert_close(velocity_error(prediction, target, torch.ones(2, 1, 2, 1, 1)), plain)
    mask = (torch.rand(2, 1, 2, 4, 4, generator=torch.Generator().manual_seed(1)) > 0.5).float()
    inside = [((prediction - target)[n].square() * mask[n]).sum() / (3 * mask[n].sum()) for n in range(2)]
    torch.testing.assert_close(velocity_error(prediction, target, mask), torch.stack(inside))
    signs = torch.tensor([1.0, -1.0]).view(1, 1, 2, 1, 1).expand(2, -1, -1, -1, -1)
    frames = (prediction - target).square().mean(dim=(1, 3, 4))  # (B, F)
    torch.testing.assert_close(velocity_error(prediction, target, signs), (frames[:, 0] - frames[:, 1]) / 2)


@pytest.mark.parametrize("kind", ["mask", "frames", "segments"])
def test_the_same_weights_hold_for_policy_and_reference_chosen_and_rejected(kind, tmp_path):
    """The margin by hand; of segments it is the mean of their signed gaps, ties left out."""
    generator = torch.Generator().manual_seed(2)
    weights = {
        "mask": (torch.rand(3, 4, 4, generator=generator) > 0.6).float(),
        "frames": torch.tensor([0.0, 0.5, 2.0]),
        "segments": torch.tensor([1.0, 0.0, -1.0]),
    }[kind]
    loss, gradients, (policy, reference) = loss_of(tmp_path / "concat", weights)
    each = weights.double() if weights.ndim == 3 else weights.double()[:, None, None].expand(3, 4, 4)
    gaps = ((policy - reference) * each).sum(dim=(1, 2, 3)) / each.abs().sum()  # (N,)
    margins = -25.0 * (gaps[0::2] - gaps[1::2])  # beta is 50
    expected = torch.nn.functional.softplus(-margins).mean().item()
    assert loss == pytest.approx(expected, rel=rounding.by_hand(beta=50.0))
    assert abs(loss - loss_of(tmp_path / "ones", torch.ones(3))[0]) > 1e-4  # it matters
    _, sequential, _ = loss_of(tmp_path / "sequential", weights, mode="sequential")
    assert_close_weights(sequential, gradients, rounding.DOUBLE)


def test_ones_and_no_weights_are_the_same(tmp_path):
    for name in ("DPO", "RegDPO", "GroupDPO"):
        ones = loss_of(tmp_path, [1.0, 1.0, 1.0], name)
        none = loss_of(tmp_path, None, name)
        assert ones[0] == pytest.approx(none[0], rel=1e-6)
        assert_close_weights(ones[1], none[1], 1e-5)


def test_rows_with_and_without_weights_make_a_batch(tmp_path):
    made = make(tmp_path, "DPO", "concat", rows=[*rows([0.0, 1.0, 1.0], 1), *rows(None, 1)])
    assert first_batch(made, 0, 1)["loss_weights"].flatten(1).tolist() == [[0.0, 1.0, 1.0], [1.0, 1.0, 1.0]]
    mixed = [*rows([0.0, 1.0, 1.0], 1), *rows(torch.ones(3, 4, 4), 1)]
    assert first_batch(make(tmp_path, "DPO", "concat", rows=mixed), 0, 1)["loss_weights"].shape == (2, 1, 3, 4, 4)


def test_weights_of_raw_rows_are_encoded_with_them(tmp_path):
    """They are part of what names the cache, and come back from it; reference errors are cached beside them."""
    raw = [{**row, "loss_weights": [0.0, 1.0, 0.5]} for row in tiny_group_dataset(2, 2, num_frames=9)]
    settings = {"output_dir": str(tmp_path), "use_cpu": True, "max_steps": 1, "cache_dir": str(tmp_path / "cache")}
    args = VideoDPOConfig(**settings, fps=8, precompute_ref_errors=1, lora_rank=2, report_to="none")
    made = VideoDPOTrainer(tiny_wan_pipeline(), args, raw)
    assert made.train_dataset[1]["loss_weights"].tolist() == [0.0, 1.0, 0.5]
    made.train()
    other = [{**row, "loss_weights": None} for row in raw]
    assert VideoDPOTrainer(tiny_wan_pipeline(), args, other).train_dataset.rows.directory != (
        made.train_dataset.rows.directory
    )


@pytest.mark.parametrize(
    ("weights", "changes", "message"),
    [
        ([1.0, 1.0], {}, r"Row 0: expected 'loss_weights' of shape \(3,\) or \(3, 4, 4\)"),
        ([0.0, 0.0, 0.0], {}, "finite and not all 0"),
        ([1.0, float("nan"), 1.0], {}, "finite and not all 0"),
        ([[1.0, 1.0, 1.0]], {}, r"got shape \(1, 3\)"),
        ([1.0, "a", 1.0], {}, "must be numbers of one shape"),
        ([1.0, -1.0, 1.0], {"win_gap_penalty": 1.0}, "negative numbers, which say that the rejected video is better"),
        ([1.0, -1.0, 1.0], {"gap": "log_ratio"}, "negative numbers"),
    ],
)
def test_weights_that_mean_nothing_are_refused(weights, changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make(tmp_path, "DPO", "concat", rows=rows(weights), **changes)


@pytest.mark.parametrize("form", ["raw", "encoded", "in a folder"])
def test_rows_behind_one_without_weights_are_checked_too(form, tmp_path):
    whole = tiny_group_dataset(2, 2, num_frames=9) if form == "raw" else rows(None)
    mixed: Any = [{name: cell for name, cell in row.items() if name != "loss_weights"} for row in whole]
    mixed[1]["loss_weights"] = [1.0, -1.0, 0.0]
    if form == "in a folder":
        mixed = written(tmp_path / "group-x", mixed)
    settings = {"output_dir": str(tmp_path), "use_cpu": True, "report_to": "none", "fps": 8}
    args = VideoRegDPOConfig(**settings, cache_dir=str(tmp_path / "cache"))
    with pytest.raises(ValueError, match="Row 1: 'loss_weights' has negative numbers"):
        VideoRegDPOTrainer(tiny_wan_pipeline(), args, mixed)
    assert not (tmp_path / "cache").exists()  # nothing was encoded for it


def test_a_regulariser_does_not_go_with_negative_weights(tmp_path):
    with pytest.raises(ValueError, match="negative numbers"):
        make(tmp_path, "RegDPO", "concat", rows=rows([1.0, -1.0, 0.0]))
    make(tmp_path, "RegDPO", "concat", rows=rows([1.0, -1.0, 0.0]), sft_coefficient=0.0)
