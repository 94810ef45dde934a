"""Which way a clip went: controls on simulated clips, and what is near nothing."""

import re

import numpy as np
import pytest

from video_trl.sandbox import simulate
from video_trl.sandbox.judge.modes import LAWFUL, NEITHER, find_mode, mode_shares
from video_trl.sandbox.world.drawing import draw
from video_trl.sandbox.world.prompts import BASE_MOTIONS, PromptSpec
from video_trl.sandbox.world.simulate import BASE_VIOLATIONS


HELDOUT = 2_000_000
WAYS = [(motion, violation) for motion in BASE_MOTIONS for violation in (None, *BASE_VIOLATIONS[motion])]


@pytest.mark.parametrize(("motion", "violation"), WAYS)
@pytest.mark.parametrize("rendering", ["plain", "wild"])
def test_simulated_clips_are_recognised(motion, violation, rendering):
    clips = [
        simulate(HELDOUT + i, motion=motion, violation=violation, split="heldout", rendering=rendering)
        for i in range(10)
    ]
    found = [find_mode(clip.video, clip.prompt).name for clip in clips]
    assert found.count(violation or LAWFUL) >= 9, found


@pytest.mark.parametrize("motion", BASE_MOTIONS)
def test_a_path_that_wanders_is_neither(motion):
    found = []
    for index in range(5):
        clip = simulate(HELDOUT + index, motion=motion)
        steps = np.random.default_rng(index).normal(0, 0.05, clip.positions.shape)
        path = (clip.positions + steps.cumsum(axis=0)).clip(0.15, 0.85)
        size = clip.video.shape[1:3]
        video = draw(clip.scene.appearance, path, clip.visible, clip.scene.params, motion, *size)
        found.append(find_mode(video, clip.prompt).name)
    assert found.count(NEITHER) >= 4, found


def test_a_clip_without_its_body_is_neither():
    mode = find_mode(np.full((13, 64, 64, 3), 128, np.uint8), "A red ball rolls to the right and slows down.")
    assert mode.name == NEITHER and mode.distances == {}


def test_distances_name_every_way_and_mirrored_clips_are_as_far():
    clip = simulate(HELDOUT, motion="rolling", violation="reversal")
    mode = find_mode(clip.video, clip.prompt)
    assert set(mode.distances) == {LAWFUL, "energy_gain", "reversal"}
    assert mode.distances["reversal"] == min(mode.distances.values()) < 0.01
    swap = {"left": "right", "right": "left"}
    prompt = " ".join(swap.get(word.strip(".,"), word) for word in clip.prompt.split())
    mirrored = find_mode(np.ascontiguousarray(clip.video[:, :, ::-1]), prompt)
    assert mirrored.distances["reversal"] == pytest.approx(mode.distances["reversal"], abs=2e-3)


def test_the_other_ball_and_the_other_side_are_no_other_law():
    clip = simulate(HELDOUT, motion="collision", spec=PromptSpec("collision", ("red", "green"), "left"))
    for prompt in ("A red ball moves to the left and collides with a green ball.",
                   "A green ball moves to the left and collides with a red ball.",
                   "A red ball moves to the right and collides with a green ball."):  # fmt: skip
        assert find_mode(clip.video, prompt).name == LAWFUL


def test_shares_add_up():
    shares = mode_shares([LAWFUL, "reversal", "energy_gain", NEITHER])
    assert shares == {"lawful": 0.25, "violated": 0.5, "neither": 0.25}


def test_a_motion_without_named_ways_is_refused():
    clip = simulate(HELDOUT, motion="pendulum")
    with pytest.raises(ValueError, match=re.escape("of motion 'pendulum'")):
        find_mode(clip.video, clip.prompt)
