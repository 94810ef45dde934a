"""The exact judge: separates lawful from violated clips, by degrees, from pixels, and says what is wrong."""

import json
import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from video_trl.data.video_io import write_video
from video_trl.judges import VideoJudge
from video_trl.sandbox.judge import fitting
from video_trl.sandbox.judge.calibration import (
    Calibration,
    Tremble,
    calibrate,
    calibrate_trembles,
    main,
    table,
)
from video_trl.sandbox.judge.judge import SandboxJudge
from video_trl.sandbox.judge.tracking import observe
from video_trl.sandbox.world import laws
from video_trl.sandbox.world.drawing import draw
from video_trl.sandbox.world.prompts import COLOURS, DIRECTIONS, MOTIONS, PromptSpec, describe, templates
from video_trl.sandbox.world.simulate import BASE_VIOLATIONS, FPS, VIOLATIONS, VIOLATIONS_OF, Clip
from video_trl.sandbox.world.simulate import simulate as simulate_any


HELDOUT = 1_000_000
simulate = partial(simulate_any, split="heldout")
JUDGE = SandboxJudge()
TIMES = np.arange(13) / FPS


def blurred(video: np.ndarray) -> np.ndarray:
    """Softer, noisier, paler and a little warmer: what a small autoencoder does to a clip."""
    soft = gaussian_filter(video.astype(np.float64), (0.3, 1.0, 1.0, 0))
    noisy = soft + np.random.default_rng(0).normal(0, 5, soft.shape)
    return (0.95 * noisy + [7, 2, 0]).round().clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def measured() -> Calibration:
    return calibrate(range(HELDOUT, HELDOUT + 10))


def judged(clip: Clip, prompt: str | None = None) -> dict:
    return JUDGE.score([clip.video], [prompt or clip.prompt])[0]


def redrawn(clip: Clip, positions: np.ndarray, visible: np.ndarray) -> np.ndarray:
    motion = clip.spec.motion
    return draw(clip.scene.appearance, positions, visible, clip.scene.params, motion, *clip.video.shape[1:3])


def prompt_for(spec: PromptSpec) -> str:
    return describe(spec, templates(spec.motion, "heldout")[0])


# ---- separating lawful from violated --------------------------------------------------------------------------------


def test_lawful_clips_score_high(measured):
    for motion, scores in measured.clean.items():
        assert scores[:, 1].mean() >= 0.95, motion
        assert scores[:, 0].mean() >= 0.95, motion


@pytest.mark.parametrize("violation", VIOLATIONS)
def test_every_violation_is_told_from_lawful_clips(measured, violation):
    assert measured.auc(violation) >= 0.98
    scores = np.concatenate([s for (_, name), s in measured.violated.items() if name == violation])
    assert scores[:, 1].mean() <= 0.25


@pytest.mark.parametrize(("motion", "violation"), [(m, v) for m in MOTIONS for v in VIOLATIONS_OF[m]])
def test_every_violation_is_told_at_every_motion(measured, motion, violation):
    assert measured.auc(violation, (motion,)) >= 0.98


@pytest.mark.parametrize(("motion", "violation"), [(m, v) for m, names in BASE_VIOLATIONS.items() for v in names])
def test_the_base_models_violations_keep_the_sentence_and_cost_the_law(measured, motion, violation):
    sa, pc = measured.violated[motion, violation].mean(axis=0)
    assert pc <= 0.25
    assert sa >= 0.75


def test_a_violation_that_keeps_the_sentence_keeps_sa(measured):
    for violation in ("teleport", "energy_gain", "momentum", "freeze"):
        scores = np.concatenate([s for (_, name), s in measured.violated.items() if name == violation])
        assert scores[:, 0].mean() >= 0.7, violation


def test_blur_noise_and_a_colour_shift_cost_nothing():
    result = calibrate(range(HELDOUT + 100, HELDOUT + 105), degrade=blurred, violations=False)
    for motion, scores in result.clean.items():
        assert scores[:, 1].mean() >= 0.9, motion
        assert scores[:, 0].mean() >= 0.9, motion


def test_clips_in_the_wild_are_judged_like_plain_ones():
    result = calibrate(range(HELDOUT + 200, HELDOUT + 204), rendering="wild")
    for motion, scores in result.clean.items():
        assert scores[:, 1].mean() >= 0.95, motion
        assert scores[:, 0].mean() >= 0.9, motion
    for violation in VIOLATIONS:
        assert result.auc(violation) >= 0.98, violation
    assert np.mean(np.concatenate(list(result.violated.values()))[:, 1]) <= 0.25


def test_blurred_violations_stay_violations():
    clips = [simulate(HELDOUT + i, motion=m, violation="any") for i in range(3) for m in MOTIONS]
    scores = JUDGE.score([blurred(clip.video) for clip in clips], [clip.prompt for clip in clips])
    assert np.mean([score["pc"] for score in scores]) <= 0.35


def test_mp4_round_trip_with_the_fps_of_the_file(tmp_path):
    clips = [simulate(HELDOUT + i, motion=m, fps=16.0, num_frames=25) for i, m in enumerate(MOTIONS)]
    paths = [write_video(tmp_path / f"{i}.mp4", clip.video, 16.0) for i, clip in enumerate(clips)]
    for clip, score in zip(clips, JUDGE.score(paths, [clip.prompt for clip in clips]), strict=True):
        assert score["pc"] >= 0.9, (clip.spec, score["explanation"])
        assert score["sa"] >= 0.9, (clip.spec, score["explanation"])


@pytest.mark.parametrize(
    "size",
    [
        {"height": 32, "width": 32},
        {"height": 64, "width": 96},
        {"height": 200, "width": 200},
        {"num_frames": 9},
        {"num_frames": 49, "fps": 24.0},
    ],
    ids=str,
)
def test_other_sizes_and_rates(size):
    judge = SandboxJudge(fps=size.get("fps", FPS))
    clips = [simulate(HELDOUT + i, motion=m, **size) for i, m in enumerate(MOTIONS)]
    scores = judge.score([clip.video for clip in clips], [clip.prompt for clip in clips])
    assert np.mean([score["pc"] for score in scores]) >= 0.9


# ---- by degrees -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("motion", MOTIONS)
def test_score_falls_frame_by_frame_as_a_body_goes_missing(motion):
    clip = simulate(HELDOUT + 7, motion=motion)
    scores = []
    for missing in (0, 2, 3, 5, 8):
        visible = clip.visible.copy()
        visible[len(visible) - missing :] = False
        scores.append(JUDGE.score([redrawn(clip, clip.positions, visible)], [clip.prompt])[0]["pc"])
    assert all(better > worse for better, worse in zip(scores, scores[1:], strict=False)), scores
    assert scores[0] >= 0.95 and scores[-1] <= 0.2
    assert 0.3 <= scores[2] <= 0.7  # 10 good frames of 13


def test_score_falls_with_the_error_in_gravity():
    clip = simulate(HELDOUT + 1, motion="free_fall")
    scores = []
    for factor in (1.0, 1.6, 2.0, 2.5):  # less than that is within the tolerance
        scene = replace(clip.scene, params={**clip.scene.params, "gravity": factor * laws.GRAVITY})
        p = scene.params
        y = clip.positions[0, 0, 1] - p["height"]
        path = clip.positions.copy()
        path[:, 0, 1] = y + laws.bounce(TIMES, p["height"], 0.0, p["gravity"], p["restitution"])
        scores.append(JUDGE.score([redrawn(clip, path, clip.visible)], [clip.prompt])[0]["pc"])
    assert scores[0] > scores[1] > scores[2] > scores[3], scores


@pytest.fixture(scope="module")
def trembling() -> dict[str, dict[str, np.ndarray]]:
    return calibrate_trembles(range(HELDOUT, HELDOUT + 6), (Tremble(1.0), Tremble(1.0, hold=4), Tremble(3.0)))


@pytest.mark.parametrize("motion", MOTIONS)
def test_a_lawful_path_may_tremble_by_a_pixel(trembling, motion):
    anew, held, wild = trembling[motion].values()
    assert anew[:, 1].mean() >= 0.8 and held[:, 1].mean() >= 0.8
    assert wild[:, 1].mean() <= 0.4


def test_the_tremble_is_reported_beside_the_law(trembling):
    jitter = np.mean([scores["1 px, every frame anew"][:, 2].mean() for scores in trembling.values()])
    assert jitter == pytest.approx(1.0, abs=0.25)
    clip = simulate(HELDOUT + 3, motion="free_fall")
    shaken = JUDGE.score([Tremble(1.0).of(clip, np.random.default_rng(0))], [clip.prompt])[0]
    assert "obeyed in every frame" in shaken["explanation"] and "trembles by" in shaken["explanation"]
    still = judged(clip)
    assert 64 * still["jitter"] < 0.2 and "trembles" not in still["explanation"]


def test_a_change_of_size_is_reported_beside_the_law():
    clip = simulate(HELDOUT + 3, motion="rolling")
    grown = clip.video.copy()
    appearance = replace(clip.scene.appearance, radii=(1.7 * clip.scene.appearance.radii[0],))
    larger = draw(appearance, clip.positions, clip.visible, clip.scene.params, "rolling", 64, 64)
    grown[6:8] = larger[6:8]
    score = JUDGE.score([grown], [clip.prompt])[0]
    assert score["size_change"] == pytest.approx(1.7, abs=0.15)
    assert "changes size by a factor of 1." in score["explanation"]
    assert judged(clip)["size_change"] < 1.1 and "size" not in judged(clip)["explanation"]


def test_one_stray_frame_costs_little():
    clip = simulate(HELDOUT + 2, motion="rolling")
    path = clip.positions.copy()
    path[6, 0, 1] += 0.2
    assert 0.8 <= JUDGE.score([redrawn(clip, path, clip.visible)], [clip.prompt])[0]["pc"] < 1.0


# ---- clips that show nothing ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("motion", MOTIONS)
def test_blank_static_and_noisy_clips_score_near_zero(motion):
    clip = simulate(HELDOUT + 4, motion=motion)
    rng = np.random.default_rng(0)
    first, last = clip.video[:1], clip.video[-1:]
    trivial = {
        "grey": np.full_like(clip.video, 180),
        "black": np.zeros_like(clip.video),
        "noise": rng.integers(0, 256, clip.video.shape, dtype=np.uint8),
        "first frame": np.repeat(first, 13, axis=0),
        "last frame": np.repeat(last, 13, axis=0),
        "noisy still": blurred(np.repeat(first, 13, axis=0)),
        "one frame": first,
    }
    for name, score in zip(trivial, JUDGE.score(list(trivial.values()), [clip.prompt] * len(trivial)), strict=True):
        assert score["pc"] <= 0.1, name
        assert score["sa"] <= 0.4, name


# ---- sa -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("motion", MOTIONS)
def test_wrong_colour_lowers_sa_and_not_pc(motion):
    for seed in range(HELDOUT + 10, HELDOUT + 13):
        clip = simulate(seed, motion=motion)
        others = tuple(COLOURS[(COLOURS.index(colour) + 1) % len(COLOURS)] for colour in clip.spec.colours)
        score = judged(clip, prompt_for(replace(clip.spec, colours=others)))
        assert score["sa"] <= 0.4 and score["pc"] >= 0.9


@pytest.mark.parametrize("motion", [motion for motion in MOTIONS if len(DIRECTIONS[motion]) == 2])
def test_wrong_direction_lowers_sa(motion):
    for seed in range(HELDOUT + 20, HELDOUT + 23):
        clip = simulate(seed, motion=motion)
        other = next(d for d in DIRECTIONS[motion] if d != clip.spec.direction)
        score = judged(clip, prompt_for(replace(clip.spec, direction=other)))
        assert score["sa"] <= 0.4
        if motion != "buoyancy":  # where the direction is part of the law
            assert score["pc"] >= 0.9


@pytest.mark.parametrize("shown", MOTIONS)
def test_wrong_motion_lowers_sa(shown):
    clip = simulate(HELDOUT + 30, motion=shown)
    first = clip.spec.colours[0]
    second = next(colour for colour in COLOURS if colour != first)
    for asked in MOTIONS:
        if asked == shown:
            continue
        direction = clip.spec.direction if clip.spec.direction in DIRECTIONS[asked] else DIRECTIONS[asked][0]
        colours = (first, second) if asked == "collision" else (first,)
        assert judged(clip, prompt_for(PromptSpec(asked, colours, direction)))["sa"] <= 0.5, asked


def test_a_pendulum_whose_rod_was_lost_is_still_a_pendulum():
    clip = simulate(HELDOUT + 6, motion="pendulum")
    params = clip.scene.params
    without_rod = draw(clip.scene.appearance, clip.positions, clip.visible, params, "rolling", 64, 64)
    assert JUDGE.score([without_rod], [clip.prompt])[0]["sa"] >= 0.8


def test_a_second_ball_lowers_sa():
    clip = simulate(HELDOUT + 5, motion="collision", spec=PromptSpec("collision", ("red", "green"), "right"))
    score = judged(clip, "A red ball rolls to the right and slows down.")
    assert score["sa_parts"]["number"] == 0.5
    assert judged(clip)["sa_parts"]["number"] == 1.0


@pytest.mark.parametrize("motion", MOTIONS)
def test_mirrored_clip_with_mirrored_sentence_scores_the_same(motion):
    swap = {"left": "right", "right": "left"}
    for violation in (None, "teleport"):
        clip = simulate(HELDOUT + 40, motion=motion, violation=violation)
        prompt = " ".join(swap.get(word.strip(".,"), word.strip(".,")) for word in clip.prompt.split())
        mirrored = JUDGE.score([np.ascontiguousarray(clip.video[:, :, ::-1])], [prompt])[0]
        original = judged(clip)
        assert mirrored["pc"] == pytest.approx(original["pc"], abs=0.05)
        assert mirrored["sa"] == pytest.approx(original["sa"], abs=0.05)


# ---- explanation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("motion", MOTIONS)
def test_explanation_names_the_frame_of_a_teleport(motion):
    clip = simulate(HELDOUT + 50, motion=motion, violation="teleport")
    score, frame = judged(clip), int(clip.scene.event["frame"])
    assert score["jump_frame"] == frame
    assert f"at frame {frame}" in score["explanation"]


@pytest.mark.parametrize("motion", MOTIONS)
def test_explanation_names_the_frames_of_a_vanished_body(motion):
    clip = simulate(HELDOUT + 51, motion=motion, violation="vanish")
    score, frame = judged(clip), int(clip.scene.event["frame"])
    assert score["missing_frames"] == list(range(frame, 13))
    assert f"missing in frames {frame}-12" in score["explanation"]


def test_explanation_gives_law_and_parameters_and_fits_json():
    clip = simulate(HELDOUT + 52, motion="pendulum")
    score = json.loads(json.dumps(judged(clip)))
    assert score["explanation"].startswith("Law of pendulum")
    assert score["parameters"]["length"] == pytest.approx(clip.scene.params["length"], abs=0.01)
    assert score["parameters"]["angle"] == pytest.approx(clip.scene.params["angle"], abs=0.05)
    assert score["residual"] < 0.003 and score["worst_frames"] == []


def test_explanation_says_what_cannot_be_followed():
    score = JUDGE.score([np.full((13, 64, 64, 3), 128, np.uint8)], ["A red ball falls and bounces on the floor."])[0]
    assert "red" in score["explanation"] and score["missing_frames"] == list(range(13))


# ---- tracking and fitting -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("motion", ["free_fall", "projectile", "rolling", "incline", "buoyancy"])
def test_tracking_is_sub_pixel(motion):
    clip = simulate(HELDOUT + 60, motion=motion)
    (body,) = observe(clip.video).bodies
    assert body.colour == clip.spec.colours[0]
    assert np.linalg.norm(body.positions - clip.positions[:, 0], axis=1).max() * 64 < 0.25
    factor = math.sqrt(4 / math.pi) if motion == "incline" else 1.0  # a square's area as that of a disc
    assert body.radius == pytest.approx(factor * clip.scene.appearance.radii[0], rel=0.03)


@pytest.mark.parametrize("colours", [("red", "orange"), ("yellow", "orange"), ("blue", "purple"), ("green", "blue")])
def test_neighbouring_colours_are_two_bodies(colours):
    clip = simulate(HELDOUT + 61, spec=PromptSpec("collision", colours, "right"))
    bodies = {body.colour: body for body in observe(blurred(clip.video)).bodies}
    assert set(bodies) == set(colours)
    for index, colour in enumerate(colours):
        distance = np.linalg.norm(bodies[colour].positions - clip.positions[:, index], axis=1)
        assert np.median(distance) * 64 < 0.5


def test_batched_laws_equal_the_simulators():
    rng, times = np.random.default_rng(0), np.arange(40) / 16
    for _ in range(20):
        height, speed, restitution = rng.uniform(0.1, 0.8), rng.uniform(-0.2, 1.0), rng.uniform(0.5, 0.9)
        column = [np.array([[value]]) for value in (height, speed, restitution)]
        expected = laws.bounce(times, height, speed, laws.GRAVITY, restitution)
        np.testing.assert_allclose(fitting.bounces(times, *column)[0], expected, atol=2e-3)

        angle, length = rng.uniform(-1.3, 1.3), rng.uniform(0.3, 0.7)
        swing = fitting.pendulums(times, np.array([[angle]]), np.array([[length]]))[0]
        np.testing.assert_allclose(swing, laws.pendulum(times, angle, length), atol=1e-4)

        speed, friction = rng.uniform(-1, 1), rng.uniform(0.1, 1)
        column = [np.array([[value]]) for value in (0.3, speed, friction)]
        np.testing.assert_allclose(fitting.rolls(times, *column)[0], laws.roll(times, 0.3, speed, friction), atol=1e-9)

        depth, density, drag = rng.uniform(0.1, 0.5), rng.uniform(0.3, 2.0), rng.uniform(0.8, 2.5)
        column = [np.array([value]) for value in (depth, density, drag)]
        expected = laws.buoyant(times, depth, density, drag, 0.085)
        np.testing.assert_allclose(fitting.buoyants(times, *column, 0.085)[0], expected, atol=0.01)


def test_a_disc_at_the_edge_is_seen_in_part():
    radii = np.array([0.1])
    half = np.array([[[0.0, 0.5]]])
    assert fitting.visible_share(half, radii, 1.0)[0, 0] == pytest.approx(0.5)
    assert fitting.seen_centroids(half, radii, 1.0)[0, 0, 0] == pytest.approx(
        0.1 * 4 / (3 * math.pi)
    )  # of a half disc
    inside = np.array([[[0.5, 0.5]]])
    assert fitting.visible_share(inside, radii, 1.0)[0, 0] == pytest.approx(1.0)
    np.testing.assert_array_equal(fitting.seen_centroids(inside, radii, 1.0), inside)


# ---- interface ------------------------------------------------------------------------------------------------------


def test_judge_fulfils_the_protocol_and_is_deterministic():
    assert isinstance(JUDGE, VideoJudge)
    clip = simulate(HELDOUT + 70, violation="any")
    assert judged(clip) == judged(clip)
    assert JUDGE.score([], []) == []


@pytest.mark.parametrize("video", [np.zeros((13, 64, 64, 3), np.float32), np.zeros((64, 64, 3), np.uint8)])
def test_malformed_arrays_are_refused(video):
    with pytest.raises(ValueError, match=r"uint8 video of shape \(T, H, W, 3\)"):
        JUDGE.score([video], ["A red ball falls."])


def test_wrong_arguments_are_refused():
    clip = simulate(0)
    with pytest.raises(ValueError, match="one prompt for each video"):
        JUDGE.score([clip.video], [])
    with pytest.raises(ValueError, match="names no motion"):
        JUDGE.score([clip.video], ["A red ball."])
    with pytest.raises(ValueError, match="fps"):
        SandboxJudge(fps=0)


def test_calibration_writes_its_table(tmp_path, measured):
    main(["--count", "1", "--out", str(tmp_path / "table.md")])
    text = (tmp_path / "table.md").read_text()
    assert "--count 1" in text and all(motion in text for motion in MOTIONS)
    assert table(measured).count("\n") == len(MOTIONS) + 2
