import json
import math
import re

import numpy as np
import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection, ViTConfig, ViTModel

from tests.support import rounding
from tests.support.evaluation.reg_dpo_tables import TOTAL_SCORE
from tests.support.tiny import tiny_video
from video_trl.data.video_io import write_video
from video_trl.evaluation.benchmarks.vbench import (
    DIMENSIONS,
    FrameConsistency,
    direction,
    frame_consistency,
    load_vbench,
    vbench_table,
)


# Arrows of Reg-DPO's tables against Base, method by method, dimension by dimension, as printed.
ARROWS = {
    "Table 2": {"GT-Pair": "↓↓↑↑↑↑", "Annotated_Pair": "↓↓↓↑↓↑", "GT+Annotated": "↑↑↓↑↓↑"},
    "Table 5": {"SFT": "↑↑↓↓↓↓", "DPO": "↓↓↑↑↑↑", "Reg-DPO": "↑↑↑↑↑↑"},
    "Table 6": {"SFT": "↓↑↑↓↑↓", "DPO": "↑↑↓-↑↓", "Reg-DPO": "↑↑↑↓↑↓"},
}


@pytest.mark.parametrize("name", TOTAL_SCORE)
def test_published_rows_come_out_with_values_ranks_and_totals(name):
    rows = TOTAL_SCORE[name]
    values = {method: dict(zip(DIMENSIONS, numbers, strict=True)) for method, (numbers, _, _) in rows.items()}
    table = vbench_table(values, baseline="Base")
    for (method, *cells, total), (expected, (numbers, ranks, printed)) in zip(table.rows, rows.items(), strict=True):
        assert (method, total) == (expected, str(printed))
        for cell, number, rank in zip(cells, numbers, ranks, strict=True):
            assert re.fullmatch(rf"{number:.5f} [↑↓-] \[{rank}\]", cell)
        if method in ARROWS.get(name, {}):
            assert "".join(cell.split()[1] for cell in cells) == ARROWS[name][method]


def test_arrows_look_at_rounded_values():
    assert direction(0.682004, 0.681996) == "-" and direction(0.68201, 0.68200) == "↑" and direction(0.1, 0.2) == "↓"
    with pytest.raises(ValueError, match="baseline 'x' is not among"):
        vbench_table({"a": {"d": 1.0}}, baseline="x")


def _results(**changes):
    rows = [{"video_path": f"/somewhere/{i}.mp4", "video_results": 0.5 + i / 10} for i in range(3)]
    return {name: [0.6, rows] for name in DIMENSIONS} | {
        "dynamic_degree": [1 / 3, [{**row, "video_results": i == 0} for i, row in enumerate(rows)]]
    } | changes  # fmt: skip


def _load(tmp_path, content, **kwargs):
    (tmp_path / "r_eval_results.json").write_text(json.dumps(content))
    return load_vbench(tmp_path / "r_eval_results.json", **kwargs)


def test_results_of_vbench_are_read_with_their_videos(tmp_path):
    results = _load(tmp_path, _results(), num_videos=3)
    assert results.values["subject_consistency"] == 0.6
    assert results.videos["dynamic_degree"] == {"0.mp4": 1.0, "1.mp4": 0.0, "2.mp4": 0.0}


@pytest.mark.parametrize(
    ("changes", "kwargs", "message"),
    [
        ({"imaging_quality": 0.5}, {}, "not in VBench's form"),
        ({"imaging_quality": [math.nan, []]}, {}, "not finite"),
        ({"imaging_quality": [0.5, [{"video_path": "a.mp4", "video_results": math.inf}]]}, {}, "not finite"),
        ({"imaging_quality": [0.5, [{"video_path": "a.mp4", "video_results": 1}] * 2]}, {}, "same name twice"),
        ({}, {"num_videos": 4}, "has 3 videos, expected 4"),
        ({}, {"dimensions": ["human_action"]}, "no results of human_action"),
    ],
)
def test_bad_results_are_refused(tmp_path, changes, kwargs, message):
    with pytest.raises(ValueError, match=message):
        _load(tmp_path, _results(**changes), **kwargs)


# ---- consistency of frames ------------------------------------------------------------------------------------------


def test_consistency_is_the_written_out_formula_and_clips_negative_cosines():
    features = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    total = 0.0
    for t in range(1, 6):
        cosines = [float(features[t] @ features[s] / features[t].norm() / features[s].norm()) for s in (t - 1, 0)]
        total += sum(max(0.0, cosine) for cosine in cosines) / 2
    assert frame_consistency(features) == pytest.approx(total / 5, abs=rounding.sums(64))
    assert frame_consistency(torch.tensor([[1.0, 0.0], [-1.0, 0.0]])) == 0.0
    with pytest.raises(ValueError, match="T >= 2"):
        frame_consistency(features[:1])


@pytest.fixture(scope="module", params=["dino", "clip"])
def metric(request):
    shared = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
              "image_size": 32, "patch_size": 8}  # fmt: skip
    torch.manual_seed(0)
    if request.param == "dino":
        model = ViTModel(ViTConfig(**shared), add_pooling_layer=False)
    else:
        model = CLIPVisionModelWithProjection(CLIPVisionConfig(**shared, projection_dim=8))
    return FrameConsistency(request.param, model, size=32)


def test_a_frozen_picture_is_perfectly_consistent_and_files_are_read(metric, tmp_path):
    moving = tiny_video(0, num_frames=6, height=40, width=64)
    frozen = np.repeat(moving[:1], 6, axis=0)
    path = write_video(tmp_path / "v.mp4", moving, 8)
    still, moved, read = metric([frozen, moving, path])
    assert metric.name in ("dino_consistency", "clip_consistency")
    assert still == pytest.approx(1.0, abs=rounding.sums(64)) and 0 <= moved < still
    assert read == pytest.approx(moved, abs=0.05)  # the codec loses a little


def test_features_are_those_of_the_encoder_on_normalised_pixels(metric):
    """At the encoder's own size nothing is resized: the pipeline is only scaling, normalising and the forward pass."""
    video = tiny_video(1, num_frames=3)
    mean = {"dino": (0.485, 0.456, 0.406), "clip": (0.48145466, 0.4578275, 0.40821073)}[metric.kind]
    std = {"dino": (0.229, 0.224, 0.225), "clip": (0.26862954, 0.26130258, 0.27577711)}[metric.kind]
    pixels = torch.from_numpy((video / 255 - np.array(mean)) / np.array(std)).permute(0, 3, 1, 2).float()
    with torch.no_grad():
        output = metric._model(pixels)
    expected = output.last_hidden_state[:, 0] if metric.kind == "dino" else output.image_embeds
    assert metric([video])[0] == pytest.approx(frame_consistency(expected), abs=1e-4)


def test_dino_sees_the_sides_that_clip_cuts_off(metric):
    video = tiny_video(2, num_frames=4, height=32, width=96)
    changed = video.copy()
    changed[1:, :, -24:] = np.random.default_rng(0).integers(0, 255, size=(3, 32, 24, 3))
    before, after = metric([video, changed])
    assert (before == pytest.approx(after, abs=rounding.sums(64))) == (metric.kind == "clip")


def test_single_frames_and_unknown_kinds_are_refused(metric):
    with pytest.raises(ValueError, match="T >= 2"):
        metric([tiny_video(0, num_frames=1)])
    with pytest.raises(ValueError, match="'dino' or 'clip'"):
        FrameConsistency("raft")
