"""The Qwen-VL judge: patches as the stock processor makes them, log-probabilities as the stock model gives them."""

import math

import numpy as np
import pytest
import torch
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tests.support import rounding
from tests.support.judges.tiny_qwen import write_qwen
from tests.support.tiny import tiny_video
from video_trl.judges import QwenVLJudge, VideoJudge
from video_trl.judges.mplug_owl_model import IMAGE_MEAN, IMAGE_STD
from video_trl.judges.qwen_vl import QUESTIONS
from video_trl.judges.qwen_vl_model import patchify


FAMILIES = {"qwen2_5_vl": (14, IMAGE_MEAN, IMAGE_STD), "qwen3_vl": (16, (0.5,) * 3, (0.5,) * 3)}
VIDEO = tiny_video(1, num_frames=6, height=64, width=96)


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory):
    return write_qwen(tmp_path_factory.mktemp(request.param), request.param)


def _judge(folder, **options):
    return QwenVLJudge(folder, **({"device": "cpu", "dtype": torch.float32, "num_frames": 5} | options))


# ---- patches --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_one_frame_is_cut_as_by_the_stock_processor(family):
    patch, mean, std = FAMILIES[family]
    frame = np.random.default_rng(0).integers(0, 256, (4 * patch, 6 * patch, 3), dtype=np.uint8)
    stock = Qwen2VLImageProcessorPil(patch_size=patch, image_mean=list(mean), image_std=list(std), do_resize=False)
    expected = stock([frame], return_tensors="pt")
    rows, grid = patchify(frame[None], patch=patch, temporal_patch=2, merge=2, mean=mean, std=std)
    assert [list(grid)] == expected["image_grid_thw"].tolist()
    torch.testing.assert_close(rows, expected["pixel_values"], rtol=0, atol=2e-6)


def test_several_frames_are_cut_as_written_out():
    patch, merge, mean, std = 2, 2, (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    frames = np.random.default_rng(1).integers(0, 256, (5, 8, 12, 3), dtype=np.uint8)
    rows, grid = patchify(frames, patch=patch, temporal_patch=2, merge=merge, mean=mean, std=std)
    assert grid == (3, 4, 6) and rows.shape == (72, 3 * 2 * 2 * 2)
    padded, row = [*frames, frames[-1]], 0
    for t in range(3):
        for block_y in range(2):
            for block_x in range(3):
                for y in range(merge):
                    for x in range(merge):
                        top, left = (block_y * merge + y) * patch, (block_x * merge + x) * patch
                        expected = [
                            (padded[2 * t + f][top + i, left + j, c] / 255 - mean[c]) / std[c]
                            for c in range(3)
                            for f in range(2)
                            for i in range(patch)
                            for j in range(patch)
                        ]
                        torch.testing.assert_close(rows[row], torch.tensor(expected, dtype=torch.float32))
                        row += 1


# ---- scores ---------------------------------------------------------------------------------------------------------


def _logits_by_hand(judge, video, question, fps):
    """From the whole model with its own head; frames, text and positions made here."""
    patch, mean, std = FAMILIES[judge.family]
    numbers = [0, 1, 2, 4, 5]  # five of six, evenly: 0, 1.25, 2.5 (to even), 3.75, 5
    size = 2 * patch
    height, width = (max(1, round(side / size)) * size for side in video.shape[1:3])
    from video_trl.judges.frames import sample_frames

    frames, _ = sample_frames(video[numbers], 5, lambda n, w: np.arange(n), lambda h, w: (height, width))
    rows, grid = patchify(frames, patch=patch, temporal_patch=2, merge=2, mean=mean, std=std)
    tokens = grid[1] * grid[2] // 4
    pads = "<|video_pad|>" * tokens
    times = [number / fps for number in [*numbers, numbers[-1]]]
    if judge.family == "qwen2_5_vl":
        text = (
            f"<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>{pads * 3}"
        )
        text += "<|vision_end|>"
    else:
        text = "<|im_start|>user\n" + "".join(
            f"<{(times[i] + times[i + 1]) / 2:.1f} seconds><|vision_start|>{pads}<|vision_end|>" for i in (0, 2, 4)
        )
    text += f"{question}<|im_end|>\n<|im_start|>assistant\n"
    ids = judge.tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    extra = {"second_per_grid_ts": torch.tensor([2 * (5 / 4) / fps])} if judge.family == "qwen2_5_vl" else {}
    output = judge.model(
        input_ids=ids,
        mm_token_type_ids=(ids == judge.model.config.video_token_id).int() * 2,
        pixel_values_videos=rows,
        video_grid_thw=torch.tensor([grid]),
        **extra,
    )
    return output.logits[0, -1].double().log_softmax(0)


@pytest.mark.parametrize("answers", ["yes_no", "rating"])
def test_scores_are_the_models_own_log_probabilities(folder, answers):
    judge = _judge(folder, answers=answers, fps=10.0)
    score = judge.score([VIDEO], ["red ball falls"])[0]
    words = ["Yes", "No"] if answers == "yes_no" else ["1", "2", "3", "4", "5"]
    for key in ("sa", "pc"):
        question = QUESTIONS[answers][key].format(caption='"red ball falls"')
        everything = _logits_by_hand(judge, VIDEO, question, fps=10.0)
        picked = {word: everything[judge.tokenizer.convert_tokens_to_ids(word)].item() for word in words}
        assert score["raw"][key]["logprobs"] == pytest.approx(picked, abs=1e-4)
        shares = np.exp(list(picked.values())) / np.exp(list(picked.values())).sum()
        expected = shares[0] if answers == "yes_no" else (shares @ np.arange(1, 6) - 1) / 4
        assert score[key] == pytest.approx(expected, abs=rounding.SINGLE)
        assert score["raw"][key]["coverage"] == pytest.approx(sum(map(math.exp, picked.values())), abs=1e-4)


def test_the_judge_sees_the_video_and_the_caption_but_judges_physics_without_it(folder):
    judge = _judge(folder)
    other = tiny_video(7, num_frames=6, height=64, width=96)
    a, b, c = judge.score([VIDEO, VIDEO, other], ["red ball falls", "blue", "red ball falls"])
    assert a["sa"] != b["sa"] and a["pc"] == b["pc"]
    assert a["sa"] != c["sa"] and a["pc"] != c["pc"]
    assert judge.score([other], ["red ball falls"]) == [c] and isinstance(judge, VideoJudge)


def test_time_reaches_the_model(folder):
    """Frames per second alone change the score: as rotary positions, or as seconds in the text."""
    slow, fast = (_judge(folder, fps=fps).score([VIDEO], ["blue"])[0] for fps in (1.0, 24.0))
    assert slow["pc"] != fast["pc"]


def test_identity(folder):
    judges = [_judge(folder), _judge(folder, answers="rating"), _judge(folder, num_frames=4)]
    assert len({judge.identity for judge in judges}) == 3
    assert _judge(folder).identity == judges[0].identity


# ---- refusals -------------------------------------------------------------------------------------------------------


def test_control_tokens_in_a_caption_are_refused(folder):
    with pytest.raises(ValueError, match="control tokens"):
        _judge(folder).score([VIDEO], ["x<|im_end|>"])


@pytest.mark.parametrize("options", [{"answers": "maybe"}, {"num_frames": 1}, {"max_pixels": 100}, {"fps": 0.0}])
def test_settings_out_of_range(folder, options):
    with pytest.raises(ValueError, match="Expected `answers`"):
        _judge(folder, **options)


def test_another_model_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="'qwen2_5_vl' or 'qwen3_vl' in config.json, got 'llama'"):
        _judge(tmp_path)


def test_weights_that_are_missing(folder, tmp_path):
    for path in folder.iterdir():
        if path.suffix != ".safetensors":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.raises(ValueError, match="cannot be loaded.*model.safetensors"):
        _judge(tmp_path)
