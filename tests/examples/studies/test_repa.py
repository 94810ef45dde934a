"""The oracle teacher of the VideoREPA study: its tokens are the state of the scene, and it knows its clips only."""

import numpy as np
import pytest
import torch

from tests.support.paths import EXAMPLES
from tests.support.scripts import load_script
from video_trl.data.video_io import read_video
from video_trl.sandbox import build_clip_dataset, simulate


@pytest.fixture(scope="module")
def study():
    return load_script(EXAMPLES / "studies" / "repa.py")


def test_the_state_is_what_the_scene_says(study):
    """Of a ball that rolls: its area, its momentum and its mass, summed over places; and where it is."""
    clip = simulate(7, motion="rolling")
    (radius,) = clip.scene.appearance.radii
    state = study.scene_state(clip)  # (6, 16, 4)
    cover, right, up, mass = state.sum(axis=1).T
    assert cover == pytest.approx(16 * np.pi * radius**2, rel=0.05)  # in places, of which 16 fill the picture
    assert mass == pytest.approx(cover * radius**2)
    speeds = np.diff(clip.positions[:, 0, 0]).reshape(6, 2).mean(axis=1) * clip.fps
    assert right / cover == pytest.approx(speeds, abs=0.15) and np.abs(up).max() < 1e-9
    places = state[..., 0].reshape(6, 4, 4)
    x = clip.positions[1:, 0, 0].reshape(6, 2).mean(axis=1)
    centres = (places.sum(axis=1) * (np.arange(4) + 0.5) / 4).sum(axis=1) / cover
    assert centres == pytest.approx(x, abs=0.09)
    assert places[:, 2:].sum() == pytest.approx(cover.sum())  # it rolls on the floor, in the lower half


def test_the_oracle_knows_its_clips_by_their_pixels(study, tmp_path):
    clips = build_clip_dataset(tmp_path, num_clips=3)
    teacher = study.OracleTeacher(clips)
    videos = torch.stack([torch.from_numpy(read_video(row["video"])) for row in clips]).movedim(-1, 2) / 255
    found = teacher(videos[[2, 0]])
    assert found.tokens.shape == (2, 6, 16, 5) and found.grid == (6, 4, 4)
    assert torch.equal(found.tokens, teacher(videos).tokens[[2, 0]]) and (found.tokens[..., 0] == 1).all()
    assert found.frame_times.tolist() == [1.5, 3.5, 5.5, 7.5, 9.5, 11.5]
    other = study.OracleTeacher(clips.select([0, 1]))
    assert other.identity != teacher.identity
    with pytest.raises(KeyError):
        other(videos)
