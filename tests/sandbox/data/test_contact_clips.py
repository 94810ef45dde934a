"""The sandbox's question "will the two balls touch?": balanced, answered by the simulation, and not shown."""

from collections import Counter

import numpy as np
import pytest

from video_trl.sandbox.data import contact_clips as probe
from video_trl.sandbox.data.contact_clips import contact_clips
from video_trl.sandbox.world import laws
from video_trl.sandbox.world.simulate import FPS, HEIGHT, NUM_FRAMES, WIDTH


@pytest.fixture(scope="module")
def clips():
    return contact_clips(24, seed=3)


def test_scenarios_and_answers_are_balanced_and_clips_have_the_sandbox_size(clips):
    counts = Counter((clip.scenario, clip.label) for clip in clips)
    assert counts == {(scenario, label): 4 for scenario in probe._SCENARIOS for label in (True, False)}
    assert len({clip.name for clip in clips}) == 24
    for clip in clips:
        assert clip.video.shape == (NUM_FRAMES, HEIGHT, WIDTH, 3) and clip.video.dtype == np.uint8
        assert np.array_equal(clip.read(), clip.video)


def test_the_same_seed_gives_the_same_bytes_and_another_one_does_not(clips):
    again, other = contact_clips(2, seed=3), contact_clips(2, seed=4)
    assert all(np.array_equal(a.video, b.video) for a, b in zip(again, clips, strict=False))
    assert not any(np.array_equal(a.video, b.video) for a, b in zip(again, other, strict=True))


@pytest.mark.parametrize("scenario", probe._SCENARIOS)
@pytest.mark.parametrize("label", [True, False])
def test_the_answer_is_what_the_laws_say_after_the_clip_and_never_during_it(scenario, label, monkeypatch):
    paths = []
    make = probe._SCENARIOS[scenario]
    monkeypatch.setitem(probe._SCENARIOS, scenario, lambda *args: paths.append((args[1], make(*args))) or paths[-1][1])
    for seed in range(3):
        paths.clear()
        probe._sample(np.random.default_rng(seed), "clip", scenario, label, NUM_FRAMES)
        radii, path = paths[-1]  # the last one drawn is the one that was taken
        end = (NUM_FRAMES - 1) / FPS
        gaps = {}
        for name, times in (("seen", np.linspace(0, end, 400)), ("later", np.linspace(end, end + probe.HORIZON, 400))):
            positions: laws.Array = path(times)
            gaps[name] = (np.linalg.norm(positions[:, 0] - positions[:, 1], axis=1) - sum(radii)).min()
        assert gaps["seen"] > 0.02
        assert gaps["later"] < 0.005 if label else gaps["later"] > 0.02
