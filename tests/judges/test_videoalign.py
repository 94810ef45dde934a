"""VideoAlign's reward model: the published layout, and rewards as the network of the real classes gives them."""

import json

import numpy as np
import pytest
import torch

from tests.support import rounding
from tests.support.judges.tiny_reward import NORMS, write_reward
from tests.support.tiny import tiny_video
from video_trl.judges import VideoAlignJudge, VideoJudge
from video_trl.judges.frames import sample_frames
from video_trl.judges.qwen_vl_model import FAMILIES, patchify
from video_trl.judges.videoalign import REWARD_TOKENS, question_for
from video_trl.load import check_judge, load_judge


VIDEO = tiny_video(1, num_frames=6, height=64, width=96)
PROMPT = "red ball falls"


@pytest.fixture(scope="module", params=[1, 3])
def published(request, tmp_path_factory):
    return write_reward(tmp_path_factory.mktemp("reward"), request.param)


def _judge(published, **options):
    weights, base, _ = published
    return load_judge(f"videoalign:{weights}", base=base, **({"device": "cpu", "dtype": torch.float32} | options))


def _rewards_by_hand(judge, wrapped, video):
    """By the whole network, which merges pixels and text itself; six frames at 4 a second are four at 2 a second."""
    frames, _ = sample_frames(video, 0, lambda *_: np.round(np.linspace(0, 5, 4)).astype(int), lambda h, w: (280, 392))
    mean, std, system = FAMILIES["qwen2_vl"]
    rows, grid = patchify(frames, patch=14, temporal_patch=2, merge=2, mean=mean, std=std)
    assert grid == (2, 20, 28)
    pads = "<|video_pad|>" * (2 * 10 * 14)
    text = (
        f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n<|vision_start|>{pads}<|vision_end|>"
        f"{question_for(PROMPT)}<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = judge.vlm.tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    model = wrapped.base_model.model
    hidden = model.model(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        mm_token_type_ids=(ids == model.config.video_token_id).int() * 2,
        pixel_values_videos=rows,
        video_grid_thw=torch.tensor([grid]),
        position_ids=torch.arange(ids.shape[1]).expand(3, 1, -1),
    ).last_hidden_state[0]
    places = [ids[0].tolist().index(judge.vlm.tokenizer.convert_tokens_to_ids(token)) for token in REWARD_TOKENS]
    outputs = model.rm_head(hidden[places])
    return [outputs[row, row if outputs.shape[1] == 3 else 0].item() for row in range(3)]


def test_rewards_are_those_of_the_network_with_its_lora(published):
    judge = _judge(published, fps=4.0)
    assert isinstance(judge, VideoAlignJudge) and isinstance(judge, VideoJudge)
    (score,) = judge.score([VIDEO], [PROMPT])
    with torch.no_grad():
        rewards = dict(zip(("VQ", "MQ", "TA"), _rewards_by_hand(judge, published[2], VIDEO), strict=True))
    expected = {name: (value - NORMS[f"{name}_mean"]) / NORMS[f"{name}_std"] for name, value in rewards.items()}
    assert score["raw"] == pytest.approx(expected | {"Overall": sum(expected.values())}, rel=1e-4, abs=1e-4)
    assert score["sa"] == pytest.approx(1 / (1 + np.exp(-score["raw"]["TA"])), abs=rounding.SINGLE)
    assert score["pc"] == pytest.approx(1 / (1 + np.exp(-score["raw"]["MQ"])), abs=rounding.SINGLE)
    other = judge.score([VIDEO, VIDEO[::-1].copy()], [PROMPT, PROMPT])
    assert other[0] == score and other[1]["raw"] != score["raw"]


def test_its_question_asks_for_the_three_rewards_behind_the_caption():
    text = question_for("A {ball} falls.")
    assert all(text.count(token) == 1 for token in REWARD_TOKENS) and "A {ball} falls." in text


def test_the_identity_follows_weights_and_settings(published, tmp_path):
    judge = _judge(published)
    assert judge.identity == _judge(published).identity != _judge(published, fps=8.0).identity
    weights, base, _ = write_reward(tmp_path, seed=1)
    assert VideoAlignJudge(weights, base=base, device="cpu", dtype=torch.float32).identity != judge.identity


def test_what_is_missing_or_other_is_named(published, tmp_path):
    weights, base, _ = write_reward(tmp_path)
    check_judge(f"videoalign:{weights}")
    options = {"base": base, "device": "cpu", "dtype": torch.float32}
    settings, file = weights / "model_config.json", weights / "checkpoint-20" / "model.pth"
    state, whole = torch.load(file, weights_only=True), json.loads(settings.read_text())

    def refused(match, **change):
        torch.save({**state, **change} if change else state, file)
        with pytest.raises(ValueError, match=match):
            VideoAlignJudge(weights, **options)

    name = "base_model.model.model.layers.0.mlp.down_proj"
    refused("unexpected .1.: language_model.layers.0.mlp.other", **{f"{name[:-10]}.other": torch.ones(1)})
    refused("another shape", **{"base_model.model.model.norm.weight": torch.ones(3)})
    refused("rm_head", **{"rm_head.weight": torch.ones(2, 16), "base_model.model.rm_head.weight": torch.ones(2, 16)})
    del state[f"{name}.lora_B.default.weight"]
    refused("no complete LoRA")
    file.unlink()
    with pytest.raises(ValueError, match=r"expected model.safetensors or model.pth, found \[\]"):
        VideoAlignJudge(weights, **options)
    whole["data_config"]["prompt_template_type"] = "none"
    settings.write_text(json.dumps(whole))
    with pytest.raises(ValueError, match="template 'detailed_special'.* got 'none'"):
        VideoAlignJudge(weights, **options)
    settings.write_text("{}")
    with pytest.raises(ValueError, match="expected VideoAlign's configuration"):
        VideoAlignJudge(weights, **options)


def test_refusals_of_a_request(published):
    with pytest.raises(ValueError, match="fps"):
        VideoAlignJudge("nowhere", fps=0)
    with pytest.raises(ValueError, match="control tokens"):
        _judge(published).score([VIDEO], ["<|VQ_reward|>"])
