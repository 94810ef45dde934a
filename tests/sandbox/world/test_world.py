"""The simulated world: its laws against written-out physics, its determinism, its violations, its language."""

import math
import re

import numpy as np
import pytest

from video_trl.sandbox.world import laws
from video_trl.sandbox.world.prompts import (
    ACTIONS,
    BASE_MOTIONS,
    DIRECTIONS,
    MOTIONS,
    PARAPHRASES,
    STILL_SCENES,
    PromptSpec,
    all_prompts,
    describe,
    parse_prompt,
)
from video_trl.sandbox.world.simulate import (
    BASE_VIOLATIONS,
    FLOOR,
    HEIGHT,
    MIN_DISPLACEMENT,
    NUM_FRAMES,
    PIVOT,
    VIOLATIONS,
    VIOLATIONS_OF,
    WIDTH,
    simulate,
)
from video_trl.sandbox.world.wild import sample_look


TIMES = np.linspace(0.0, 3.0, 301)


def test_bounce_is_free_fall_until_the_floor_and_loses_energy_there():
    path = laws.bounce(TIMES, height=0.5, velocity=0.0, gravity=2.0, restitution=0.8)
    landing = math.sqrt(2 * 0.5 / 2.0)
    before = landing > TIMES
    np.testing.assert_allclose(path[before], 0.5 - TIMES[before] ** 2, atol=1e-12)
    assert path.min() >= 0.0
    rebound = path[(TIMES > landing) & (TIMES < landing * (1 + 2 * 0.8))]
    assert rebound.max() == pytest.approx(0.8**2 * 0.5, abs=1e-4)  # height scales with the square of the speed


def test_bounce_comes_to_rest_instead_of_bouncing_for_ever():
    path = laws.bounce(np.array([50.0]), height=0.5, velocity=0.0, gravity=2.0, restitution=0.6)
    assert path[0] == 0.0


def test_bounce_without_gravity_is_a_straight_line_and_without_floor_a_parabola():
    np.testing.assert_allclose(laws.bounce(TIMES, 0.1, 0.2, 0.0, 0.8), 0.1 + 0.2 * TIMES)
    np.testing.assert_allclose(laws.bounce(TIMES, 0.5, 0.0, 2.0, math.inf), 0.5 - TIMES**2)


@pytest.mark.parametrize("velocity", [0.6, -0.6])
def test_roll_stops_where_its_energy_is_used_up(velocity):
    path = laws.roll(TIMES, 0.5, velocity, deceleration=0.4)
    assert path[-1] == pytest.approx(0.5 + math.copysign(0.6**2 / (2 * 0.4), velocity))
    assert (np.diff(path) * np.sign(velocity) >= 0).all()


def test_roll_with_negative_deceleration_speeds_up():
    np.testing.assert_allclose(laws.roll(TIMES, 0.0, -0.2, -0.4), -0.2 * TIMES - 0.2 * TIMES**2)


def test_elastic_collision_conserves_momentum_and_energy():
    for mass, target in ((1.0, 1.0), (2.0, 0.5), (0.3, 1.7)):
        first, second = laws.elastic_collision(0.8, mass, target)
        assert mass * first + target * second == pytest.approx(mass * 0.8)
        assert mass * first**2 + target * second**2 == pytest.approx(mass * 0.8**2)


def test_pendulum_conserves_energy_and_has_the_small_angle_period():
    length, gravity = 0.5, 2.0
    period = 2 * math.pi * math.sqrt(length / gravity)
    times = np.linspace(0, period, 400)
    angle = laws.pendulum(times, 0.05, length, gravity)
    assert angle[-1] == pytest.approx(0.05, rel=1e-3)
    wide = laws.pendulum(times, 1.2, length, gravity)
    speed = np.gradient(wide, times)
    energy = 0.5 * (length * speed) ** 2 - gravity * length * np.cos(wide)
    assert np.ptp(energy[2:-2]) < 5e-3


def test_buoyant_light_ball_rises_to_its_floating_depth_and_heavy_one_reaches_terminal_velocity():
    times = np.linspace(0, 20, 200)
    floating = laws.buoyant(times, depth=0.4, density=0.5, drag=3.0, radius=0.1)
    assert floating[-1] == pytest.approx(0.0, abs=5e-3)  # half of it under water
    sinking = laws.buoyant(times, depth=0.2, density=2.0, drag=1.5, radius=0.1)
    terminal = 2.0 * (2.0 - 1.0) / (2.0 + 0.5) / 1.5
    assert np.diff(sinking)[-1] / np.diff(times)[-1] == pytest.approx(-terminal, rel=1e-3)


@pytest.mark.parametrize("motion", MOTIONS + STILL_SCENES)
def test_a_clip_is_deterministic_and_has_the_size_asked_for(motion):
    clip = simulate(3, motion=motion)
    assert clip.video.shape == (NUM_FRAMES, HEIGHT, WIDTH, 3) and clip.video.dtype == np.uint8
    np.testing.assert_array_equal(clip.video, simulate(3, motion=motion).video)
    assert not np.array_equal(clip.video, simulate(4, motion=motion).video)
    assert clip.action == ACTIONS[motion]
    other = simulate(3, motion=motion, num_frames=9, height=48, width=80, fps=12.0)
    assert other.video.shape == (9, 48, 80, 3)


@pytest.mark.parametrize("motion", MOTIONS)
def test_lawful_bodies_stay_in_the_picture_and_above_the_floor(motion):
    for seed in range(40):
        clip = simulate(seed, motion=motion, height=8, width=8)
        assert (clip.positions[..., 0] > 0.02).all() and (clip.positions[..., 0] < 0.98).all()
        assert (clip.positions[..., 1] > FLOOR).all() and (clip.positions[..., 1] < 1.0).all()
        assert clip.visible.all()


@pytest.mark.parametrize("size", [(48, 80), (45, 80), (64, 64)])
def test_blocks_start_inside_the_picture_at_any_aspect(size):
    height, width = size
    for seed in range(40):
        clip = simulate(seed, motion="incline", height=height, width=width)
        assert (clip.positions[..., 1] + clip.scene.appearance.radii[0] < 1.05).all()
        assert ((clip.positions[..., 0] > 0) & (clip.positions[..., 0] < width / height)).all()


def test_drawn_bodies_are_where_the_simulation_puts_them():
    clip = simulate(11, spec=PromptSpec("projectile", ("red",), "right"), height=128, width=128)
    for frame, (x, y) in zip(clip.video.astype(float), clip.positions[:, 0], strict=True):
        redness = (frame[..., 0] - frame[..., 1:].max(axis=2)).clip(40) - 40
        rows, columns = np.indices(redness.shape)
        assert (redness * columns).sum() / redness.sum() / 128 == pytest.approx(x, abs=0.012)
        assert 1 - (redness * rows).sum() / redness.sum() / 128 == pytest.approx(y, abs=0.012)


def test_a_drawn_disc_covers_its_area_to_a_fraction_of_a_pixel():
    clip = simulate(11, spec=PromptSpec("projectile", ("red",), "right"))
    frame = clip.video[0, :50].astype(float)  # above the floor
    wall, body = frame[:, -1:, 1], frame[..., 1].min()
    cover = ((wall - frame[..., 1]) / (wall - body)).clip(0, 1)
    area = np.pi * (clip.scene.appearance.radii[0] * HEIGHT) ** 2
    assert cover.sum() == pytest.approx(area, rel=0.05)
    assert ((cover > 0.1) & (cover < 0.9)).sum() > 10  # edges are neither body nor background


def test_pendulum_keeps_its_distance_to_the_pivot():
    clip = simulate(5, motion="pendulum")
    distance = np.linalg.norm(clip.positions[:, 0] - [0.5, PIVOT], axis=1)
    assert np.ptp(distance) < 1e-9


@pytest.mark.parametrize(("motion", "violation"), [(m, v) for m in MOTIONS for v in VIOLATIONS_OF[m]])
def test_every_violation_can_be_seen(motion, violation):
    for seed in range(4):
        clip = simulate(seed, motion=motion, violation=violation, height=16, width=16)
        assert clip.violation == violation
        if violation == "vanish":
            assert not clip.visible[-1].all() and clip.visible[0].all()
        else:
            assert clip.visible.all()
        if violation == "freeze":
            assert (clip.positions[-1] == clip.positions[-3]).all()
        if violation == "reversal":  # the way back is the way there
            frame = int(clip.scene.event["frame"])
            np.testing.assert_array_equal(clip.positions[frame + 3], clip.positions[frame - 3])


def test_the_base_models_world_is_part_of_the_world():
    assert set(BASE_VIOLATIONS) == set(BASE_MOTIONS) <= set(MOTIONS)
    for motion, names in BASE_VIOLATIONS.items():
        assert 1 <= len(names) <= 2 and set(names) <= set(VIOLATIONS_OF[motion])


def test_a_block_without_gravity_leaves_the_ramp_level():
    clip = simulate(3, spec=PromptSpec("incline", ("red",), "left"), violation="no_gravity")
    x, y = clip.positions[:, 0].T
    assert np.ptp(y) < 1e-9
    np.testing.assert_allclose(np.diff(x), np.diff(x)[0])
    assert np.diff(x)[0] < 0


def test_two_balls_without_momentum():
    clip = simulate(3, spec=PromptSpec("collision", ("red", "green"), "right"), violation="momentum")
    first, second = clip.positions[..., 0].T
    assert np.ptp(second) == 0 and np.diff(first)[0] > 0 > np.diff(first)[-1]


@pytest.mark.parametrize("motion", MOTIONS + STILL_SCENES)
def test_in_the_wild_the_scene_is_the_same_and_the_picture_is_not(motion):
    plain, wild = simulate(5, motion=motion), simulate(5, motion=motion, rendering="wild")
    np.testing.assert_array_equal(plain.positions, wild.positions)
    assert plain.prompt == wild.prompt and plain.scene == wild.scene
    assert np.abs(plain.video.astype(int) - wild.video).mean() > 5
    np.testing.assert_array_equal(wild.video, simulate(5, motion=motion, rendering="wild").video)
    with pytest.raises(ValueError, match='"plain" or "wild"'):
        simulate(5, rendering="tame")


def test_the_camera_sways_by_less_than_a_pixel():
    looks = [sample_look(seed) for seed in range(50)]
    offsets = np.stack([look.camera(np.linspace(0, 1, 13)) for look in looks])
    assert 0.1 / 64 < np.abs(offsets).max(axis=(1, 2)).mean() < 0.6 / 64 and np.abs(offsets).max() < 0.7 / 64


def test_violations_are_all_used_and_named():
    assert {v for options in VIOLATIONS_OF.values() for v in options} == set(VIOLATIONS)
    assert MIN_DISPLACEMENT > 0
    clip = simulate(9, violation="any")
    assert clip.violation in VIOLATIONS_OF[clip.spec.motion]
    assert simulate(9, motion="static", violation="any").violation is None


def test_still_scenes_show_no_motion_of_bodies():
    static, fade = simulate(2, motion="static").video, simulate(2, motion="fade").video
    assert (static == static[0]).all()
    assert fade[-1].mean() < 0.5 * fade[0].mean()
    pan = simulate(2, motion="pan").video.astype(int)
    assert np.abs(pan[-1] - pan[0]).mean() > 1


@pytest.mark.parametrize("motion", MOTIONS)
def test_prompts_read_back_as_what_they_describe(motion):
    number = 2 if motion == "collision" else 1
    for template in PARAPHRASES[motion]:
        for direction in DIRECTIONS[motion]:
            spec = PromptSpec(motion, ("purple", "orange")[:number], direction)
            assert parse_prompt(describe(spec, template)) == spec


def test_sentences_use_the_right_article():
    for sentence in all_prompts("train") + all_prompts("heldout"):
        assert not re.search(r"\b[Aa] [aeiou]|\b[Aa]n [^aeiou]", sentence), sentence


@pytest.mark.parametrize("motion", STILL_SCENES)
def test_prompts_of_still_scenes_are_recognised(motion):
    assert {parse_prompt(template.format(a="red")).motion for template in PARAPHRASES[motion]} == {motion}


def test_heldout_prompts_are_new_sentences_made_of_known_words():
    train, heldout = set(all_prompts("train")), set(all_prompts("heldout"))
    assert heldout and not train & heldout
    assert len(train) == len(all_prompts("train")) and len(heldout) == len(all_prompts("heldout"))

    def words(sentences):
        return {word for sentence in sentences for word in re.findall(r"\w+", sentence.lower())}

    assert words(heldout) <= words(train)


def test_heldout_clips_speak_in_heldout_paraphrases():
    assert simulate(1_000_001, split="heldout").prompt in all_prompts("heldout")
    assert simulate(1, split="train").prompt in all_prompts("train")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"motion": "flying"}, "Unknown motion 'flying'"),
        (
            {"motion": "rolling", "violation": "momentum"},
            "cannot show the violation 'momentum'; it can show: energy_gain, reversal",
        ),
        ({"motion": "static", "violation": "freeze"}, "cannot show the violation 'freeze'; it can show: none"),
        ({"num_frames": 0}, "positive num_frames"),
        ({"fps": 0}, "positive num_frames"),
        ({"motion": "rolling", "spec": PromptSpec("incline", ("red",), "left")}, "contradicts"),
        ({"motion": "pendulum", "violation": "energy_gain", "num_frames": 1}, "use a longer clip"),
    ],
)
def test_wrong_requests_say_what_was_expected(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        simulate(0, **arguments)


@pytest.mark.parametrize("prompt", ["A red ball.", "A ball rolls to the right.", ""])
def test_a_sentence_without_motion_or_colour_is_refused(prompt):
    with pytest.raises(ValueError, match="names no (motion|colour)"):
        parse_prompt(prompt)
