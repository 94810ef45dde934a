"""The probe: reading Physion's layout, pooled features, and a regression that answers what it can know."""

import json

import numpy as np
import pytest
import torch

from tests.support import rounding
from tests.support.tiny import tiny_pipeline, tiny_video
from tests.support.trainer.repa_runs import tiny_teacher
from video_trl.data import write_video
from video_trl.evaluation.probes import physion
from video_trl.evaluation.probes.physion import (
    DiffusionFeatures,
    PixelFeatures,
    ProbeClip,
    TeacherFeatures,
    extract_features,
    fit_probe,
    pool_tokens,
    probe_features,
    probe_table,
    read_physion,
    scenario_of,
)
from video_trl.evaluation.probes.physion_stimuli import BAD_STIMULI


NAMES = {
    "pilot_it2_rollingSliding_simple_collision_box_0003": "roll",
    "pilot_it2_collision_non-sphere_box_0001": "collision",
    "pilot_it2_drop_simple_box_0007": "drop",
    "pilot_towers_nb4_fr015_SJ000_gr000sph_mono1_dis0_occ0_tdwroom_stable_0004": "towers",
    "pilot_linking_nl6_aNone_bCone_occ1_dis1_boxroom_0012": "link",
    "pilot-containment-cone-plate_0016": "contain",
    "pilot_dominoes_SJ020_d3chairs_o1plants_tdwroom_0006": "dominoes",
}


def write_physion(folder, split, names, frames=50):
    home = folder / "physion_mp4s" / split
    for number, name in enumerate(names):
        write_video(home / f"{name}.mp4", tiny_video(number, num_frames=frames, height=16, width=16), 30)
    labels = {name: {"label": number % 2 == 0, "contact_frame_label": 60} for number, name in enumerate(names)}
    (home / "all_video_labels.json").write_text(json.dumps(labels))


def test_published_layout_is_read_by_file_name_alone(tmp_path):
    folder = tmp_path / "drop_and_roll"  # words of scenarios in a folder must not count
    bad = sorted(BAD_STIMULI)[0]
    write_physion(folder, "test", [*NAMES, bad])
    clips = read_physion(folder, "test")
    assert [clip.name for clip in clips] == sorted(NAMES)
    assert {clip.name: clip.scenario for clip in clips} == NAMES
    assert len(BAD_STIMULI) == 41 and len(read_physion(folder, "test", bad_stimuli=())) == 8
    labels = json.loads((folder / "physion_mp4s" / "test" / "all_video_labels.json").read_text())
    for clip in clips:
        last = 15 if clip.scenario == "collision" else 45
        assert len(clip.frames) == 49 and clip.frames[-1] == last and clip.frames[0] == 0
        assert clip.frames[48 - last :] == tuple(range(last + 1)) and set(clip.frames[: 48 - last]) == {0}
        assert clip.label == labels[clip.name]["label"]
    video = clips[0].read()
    assert video.shape == (49, 16, 16, 3) and np.array_equal(video[0], video[clips[0].frames.count(0) - 1])
    # The published default: every 15th frame, which is frames 0, 15, 30 and 45.
    assert read_physion(folder, "test", num_frames=4, frame_step=15)[1].frames[-3:] == (15, 30, 45)


def test_what_is_not_physion_is_refused(tmp_path):
    with pytest.raises(ValueError, match="Unpack the published archive"):
        read_physion(tmp_path, "train")
    write_physion(tmp_path, "train", ["pilot_dominoes_0001"])
    with pytest.raises(ValueError, match="leaves 46 frames, more than `num_frames=9`"):
        read_physion(tmp_path, "train", num_frames=9)
    (tmp_path / "physion_mp4s" / "train" / "all_video_labels.json").write_text("{}")
    with pytest.raises(ValueError, match="no label of pilot_dominoes_0001.mp4"):
        read_physion(tmp_path, "train")
    with pytest.raises(ValueError, match="none"):
        scenario_of("pilot_0001")
    with pytest.raises(ValueError, match="drop"):
        scenario_of("pilot_drop_towers_0001")


def test_pooling_takes_frames_and_areas_where_they_are():
    tokens = torch.arange(5.0)[None, :, None, None, None] + 10 * torch.arange(4.0)[:, None, None]
    tokens = tokens.expand(2, 5, 4, 6, 1)  # frame + 10 * row
    pooled = pool_tokens(tokens, 3, (2, 3)).view(2, 3, 1, 2, 3)  # slices 0, 2 and 4
    for position, frame in enumerate((0, 2, 4)):
        assert torch.equal(pooled[0, position, 0], torch.tensor([[5.0], [25.0]]).expand(2, 3) + frame)
    assert pool_tokens(tokens, 9, (1, 1)).shape == (2, 5)
    assert torch.equal(pool_tokens(tokens, 5, None), tokens.permute(0, 1, 4, 2, 3).flatten(1))  # every token


@pytest.mark.parametrize("family", ["wan-t2v", "cogvideox-t2v"])
def test_features_of_a_pipeline_are_its_hidden_states_at_a_noise_level(family):
    pipeline = tiny_pipeline(family)
    video = torch.from_numpy(np.stack([tiny_video(seed, num_frames=9) for seed in range(3)]))
    features = DiffusionFeatures(pipeline, block=1, noise_levels=(0.1, 0.6), cells=(1, 2))
    both = features(video)
    width = pipeline.transformer.config.num_attention_heads * pipeline.transformer.config.attention_head_dim
    assert both.shape == (3, 2, 2 * 2 * width) and both.dtype == torch.float32  # two latent frames behind the first
    rounding.assert_close(features(video[1:2]), both[1:2], rounding.SINGLE)  # whatever the batch
    assert not torch.allclose(both[:, 0], both[:, 1])
    every = DiffusionFeatures(pipeline, block=1, noise_levels=(0.6,), cells=None)(video)
    assert every.shape[2] == 2 * both.shape[2]  # 2 x 2 tokens instead of two halves
    means = [part.reshape(3, 2, width, -1).mean(-1) for part in (every, both[:, 1])]
    rounding.assert_close(*means, rounding.SINGLE)
    torch.testing.assert_close(
        DiffusionFeatures(pipeline, block=1, noise_levels=(0.6,), cells=(1, 2))(video)[:, 0], both[:, 1]
    )
    if family == "wan-t2v":
        with pytest.raises(ValueError, match="Expected a text-to-video pipeline, got WanImageToVideoPipeline"):
            DiffusionFeatures(tiny_pipeline("wan-i2v"), block=1)
    for wrong in ({"block": 0}, {"block": 3}, {"block": 1, "noise_levels": (0.0,)}):
        with pytest.raises(ValueError, match="`block` must be in|in \\(0, 1\\)"):
            DiffusionFeatures(pipeline, **wrong)


def test_features_of_teacher_and_pixels():
    video = torch.from_numpy(np.stack([tiny_video(seed, num_frames=9) for seed in range(2)]))
    teacher = tiny_teacher()
    seen = teacher(video.permute(0, 1, 4, 2, 3).float() / 255)
    features = TeacherFeatures(teacher, num_slices=2, cells=(1, 1))(video)
    expected = torch.stack([seen.tokens[:, frame].mean(1) for frame in (0, 3)], dim=-1).flatten(1)
    torch.testing.assert_close(features[:, 0].view(2, 2, -1).transpose(1, 2).flatten(1), expected)
    assert PixelFeatures(cells=(4, 4))(video).shape == (2, 1, 3 * 4 * 4 * 3)


def made_up(number, seed, informative):
    """Clips without a video and features of which a few tell the label, with noise."""
    rng = np.random.default_rng(seed)
    clips = [ProbeClip(str(k), np.zeros((1, 2, 2, 3), np.uint8), k % 2 == 0, "ab"[k // 2 % 2]) for k in range(number)]
    features = rng.normal(size=(number, 300)).astype(np.float32) * 7 + 3
    if informative:
        features[:, :5] += np.array([[8.0 if clip.label else -8.0] for clip in clips])
    return clips, features


def test_the_probe_finds_what_is_there_and_nothing_else():
    train, x = made_up(60, 0, True)
    test, y = made_up(80, 1, True)
    result = fit_probe(x, train, y, test)
    right, clips = result.counts()
    assert clips == 80 and right > 60 and result.cv_accuracy > 0.7
    share, low, high = result.accuracy("a")
    assert result.counts("a")[1] == 40 and low < share < high
    noise = fit_probe(made_up(60, 2, False)[1], train, made_up(80, 3, False)[1], test)
    assert 20 < noise.counts()[0] < 60


def test_rotating_wide_features_changes_no_answer():
    """300 features of 60 clips, against the same regression on all 300."""
    linear = pytest.importorskip("sklearn.linear_model")
    train, x = made_up(60, 0, True)
    test, y = made_up(80, 1, True)
    result = fit_probe(x, train, y, test, c_grid=(0.01,))
    mean, scale = x.mean(0), x.std(0)
    plain = linear.LogisticRegression(C=0.01, max_iter=20_000, tol=1e-8)
    plain.fit((x - mean) / scale, [clip.label for clip in train])
    np.testing.assert_allclose(result.probabilities, plain.predict_proba((y - mean) / scale)[:, 1], atol=1e-3)


def test_the_kind_is_chosen_on_the_training_clips():
    train, good = made_up(40, 0, True)
    test, tested = made_up(40, 1, True)
    kinds = {id(clip): i for i, clip in enumerate([*train, *test])}
    noise = np.random.default_rng(5).normal(size=(80, 300)).astype(np.float32)
    table = np.stack([noise, np.concatenate([good, tested])], axis=1)
    position = iter(range(80))

    def features(video):
        return torch.from_numpy(table[[next(position) for _ in video]])

    result = probe_features(features, train, test, batch_size=16)
    assert result.kind == 1 and result.counts()[0] > 28 and len(kinds) == 80
    page = probe_table({"model": result})
    assert page.count("\n") == 2 and f"{result.counts()[0]}/40" in page


def test_bad_features_and_too_few_clips_are_refused():
    train, x = made_up(40, 0, True)
    with pytest.raises(ValueError, match="7: a feature is not finite"):
        extract_features(
            lambda video: torch.full((len(video), 1, 2), float("nan")), [ProbeClip("7", train[0].video, True, "a")]
        )
    with pytest.raises(ValueError, match="5 folds need as many clips of each answer, got 4"):
        fit_probe(x[:8], train[:8], x[:8], train[:8])
    assert physion.C_GRID == (1e-6, 1e-5, 0.01, 0.1, 1, 5, 10, 20)
