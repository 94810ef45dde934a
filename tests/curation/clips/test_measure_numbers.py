"""Each measure on pictures that are small enough to work its number out by hand; limits from both sides."""

import av
import numpy as np
import pytest
from scipy import ndimage

from tests.support.curation.clips import encode
from video_trl.curation.clips import measures
from video_trl.curation.clips.measures import (
    _busiest,
    _lag,
    _SmallPictures,
    _triples,
    blended_share,
    count_flashes,
    find_cuts,
    measure_clip,
    measure_pictures,
    motions,
    tick_numbers,
)


def flat(levels, side=4):
    """Pictures `(n, side, side)` of one grey level each."""
    return np.repeat(np.array(levels, dtype=np.float32), side * side).reshape(-1, side, side)


def texture(seed=0, sigma=4.0, shape=(64, 96)):
    """A smooth random picture of a mean of 128."""
    noise = np.random.default_rng(seed).normal(size=shape)
    return (128 + 150 * sigma * ndimage.gaussian_filter(noise, sigma)).clip(0, 255).astype(np.float32)


# ---- from file to pictures -----------------------------------------------------------------------------------------


def clip_of_levels(path, levels, times_ms):
    return encode(path, np.repeat(flat(levels, 32)[..., None], 3, axis=-1).astype(np.uint8), times_ms=times_ms)


class Levels:
    """A text detector that remembers the grey levels of the pictures it was shown."""

    name = "levels"

    def __call__(self, frames):
        self.seen = (frames.mean(axis=(1, 2, 3)) / 5).round().astype(int).tolist()
        return 0.0


def test_text_is_looked_for_once_a_second_from_the_first_frame_on(tmp_path):
    reader = Levels()
    times = [500 + 250 * frame for frame in range(12)]  # the clock need not start at 0
    clip = clip_of_levels(tmp_path / "clip.mkv", [5 * frame for frame in range(12)], times)
    assert measure_clip(clip, reader)["decoded_seconds"] == pytest.approx(3.0)
    assert reader.seen == [0, 4, 8]


def test_of_a_long_clip_pictures_lie_further_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(measures, "_MAX_LARGE", 4)
    reader = Levels()
    clip = clip_of_levels(tmp_path / "clip.mkv", [5 * frame for frame in range(20)], [500 * f for f in range(20)])
    measure_clip(clip, reader)
    assert reader.seen == [0, 8, 16]  # of 0, 1, 2, 3 s every second, of 0, 2, 4, 6 s again, then 8 s


@pytest.mark.parametrize(
    ("size", "small"), [((720, 1280), (64, 114)), ((1280, 720), (114, 64)), ((16, 4096), (64, 512))]
)
def test_pictures_have_a_short_side_of_64_cells(size, small):
    frame = av.VideoFrame.from_ndarray(np.full(size, 77, dtype=np.uint8), format="gray")
    reader = _SmallPictures()
    assert reader.grey(frame).shape == small and reader.colour(frame).shape[2] == 3


def test_numbers_of_known_pictures():
    rng = np.random.default_rng(0)
    pictures, clock = rng.uniform(0, 255, (3, 16, 20)).astype(np.float32), np.array([1.0, 1.1, 1.5])
    found = measure_pictures(pictures, clock, 1.6)
    assert found["decoded_frames"] == 3 and found["decoded_seconds"] == pytest.approx(0.6)
    assert found["longest_gap"] == pytest.approx(0.4) and found["brightness"] == pytest.approx(pictures.mean())
    assert found["contrast"] == pytest.approx(sorted(picture.std() for picture in pictures)[1])
    smooth = [ndimage.gaussian_filter(picture, 1.0) for picture in pictures]
    changes = np.stack([picture - picture.mean() for picture in smooth]).std(axis=0)
    assert found["motion"] == pytest.approx(np.sort(changes.ravel())[-4], rel=1e-5)
    assert measure_pictures(pictures[:2], clock[:2], 1.2)["longest_gap"] == pytest.approx(0.1)
    assert measure_pictures(pictures[:1], clock[:1], 1.1)["longest_gap"] == 0


def test_the_busiest_cells_are_all_but_three():
    assert _busiest(np.arange(9.0).reshape(3, 3)) == 5
    assert _busiest(np.array([[7.0, 3.0, 5.0]])) == 3


def test_ticks_are_the_first_frames_of_each_tenth():
    assert tick_numbers(np.arange(4) / 10).tolist() == [0, 1, 2, 3]
    assert tick_numbers(5 + np.arange(7) / 16).tolist() == [0, 2, 4, 5]
    assert tick_numbers(np.array([0.0, 0.05, 0.29, 0.31, 0.42])).tolist() == [0, 2, 3, 4]


# ---- cuts ----------------------------------------------------------------------------------------------------------


def stairs(steps, rate=0.0, frames=40):
    """Levels that grow by `rate` from frame to frame, and by so much with the frames named."""
    return np.cumsum([0.0] + [steps.get(frame, rate) for frame in range(1, frames)])


@pytest.mark.parametrize(
    ("step", "rate", "is_cut"),
    [(6.5, 0, True), (6, 0, False), (9.5, 2, True), (9, 2, False), (8, 2, False)],
)
def test_a_cut_is_a_step_above_6_and_above_3_times_the_usual_one_and_3(step, rate, is_cut):
    assert find_cuts(flat(stairs({20: step}, rate)), np.arange(40) / 16) == [20] * is_cut


@pytest.mark.parametrize(("fps", "reach"), [(16, 4), (2, 2)])
def test_of_two_cuts_within_a_fifth_of_a_second_the_first_one_counts(fps, reach):
    for second, cuts in ((20 + reach, [20]), (21 + reach, [20, 21 + reach])):
        assert find_cuts(flat(stairs({20: 100, second: 100})), np.arange(40) / fps) == cuts


@pytest.mark.parametrize(("fps", "most"), [(16, 4), (2, 3)])
def test_steps_that_fill_half_a_quarter_of_a_second_on_both_sides_are_motion(fps, most):
    for number, cuts in ((most, [20]), (most + 1, [])):
        steps = dict.fromkeys(range(20, 20 + number), 20.0)
        assert find_cuts(flat(stairs(steps)), np.arange(40) / fps)[:1] == cuts


def test_near_the_ends_the_first_and_the_last_frame_are_compared():
    begins = [0.0, 5.0, 105.0, 105.0, 105.0] + [62.0] * 35  # 62 above the first frame, 57 above the second
    assert find_cuts(flat(begins), np.arange(40) / 16) == [2]
    ends = [0.0] * 37 + [100.0, 100.0, 59.0]
    assert find_cuts(flat(ends), np.arange(40) / 16) == []


@pytest.mark.parametrize(("level", "cuts"), [(61.0, [20]), (59.0, [23])])
def test_a_cut_lasts(level, cuts):
    """A step of 100, and what is left of it three frames later, which is another scene where it is no part of it."""
    levels = np.zeros(40)
    levels[20:23], levels[23:] = 100, level
    assert find_cuts(flat(levels), np.arange(40) / 16) == cuts


# ---- flashes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("levels", "count"), [([115.5], 1), ([115], 0), ([115.5, 140], 1), ([115, 140], 1)])
def test_a_flash_is_more_than_15_levels_from_the_usual(levels, count, sign):
    brightness = np.full(40, 100.0)
    brightness[20 : 20 + len(levels)] += sign * (np.array(levels) - 100)
    assert count_flashes(brightness, np.arange(40) / 10) == count


@pytest.mark.parametrize(("fps", "most"), [(10, 2), (20, 5)])
def test_what_lasts_longer_than_a_quarter_of_a_second_is_a_scene(fps, most):
    for length, count in ((most, 1), (most + 1, 0)):
        brightness = np.full(60, 100.0)
        brightness[20 : 20 + length] = 200
        assert count_flashes(brightness, np.arange(60) / fps) == count


def flashes(before, peaks, start=20, fps=30):
    """Number of flashes of a scene `(4, 4)` that shows `peaks` from frame `start` on, then itself again."""
    pictures = np.repeat(np.asarray(before, dtype=np.float32)[None], 60, axis=0)
    pictures[start : start + len(peaks)] = np.asarray(peaks)
    return count_flashes(pictures.mean(axis=(1, 2)), np.arange(60) / fps, pictures)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_flash_changes_three_quarters_of_the_picture_by_more_than_5(sign):
    scene = np.full((4, 4), 120.0)
    for others, count in ((5.5, 1), (5.0, 0), (0.0, 0)):
        peak = scene + sign * 100
        peak[0] = scene[0] + sign * others  # a quarter of the picture
        assert flashes(scene, [peak]) == count
    peak[0, 0] = scene[0, 0] + sign * 50
    assert flashes(scene, [peak]) == 1  # 13 of 16 cells


def test_cells_that_cannot_become_brighter_or_darker_do_not_count():
    scene = np.full((4, 4), 100.0)
    for white, count in ((235.0, 1), (234.5, 0)):
        scene[:2] = white
        peak = scene.copy()
        peak[2:] = 200
        assert flashes(scene, [peak]) == count
    for black, count in ((20.0, 1), (20.5, 0)):
        scene[:2] = black
        peak = scene.copy()
        peak[2:] = 25
        assert flashes(scene, [peak]) == count
    assert flashes(np.full((4, 4), 236.0), [np.full((4, 4), 255.0)]) == 1


def test_a_flash_may_take_two_frames_at_30_a_second_and_one_at_10():
    scene, whole = np.full((4, 4), 100.0), np.full((4, 4), 220.0)
    half = scene.copy()
    half[:2] = 200
    assert flashes(scene, [half, whole]) == 1
    assert flashes(scene, [half, whole], fps=10) == 0
    assert flashes(scene, [whole], start=1) == 1


# ---- blends --------------------------------------------------------------------------------------------------------


def dissolve(change, ticks=7):
    """From a flat picture to one that differs by `change`, in even steps."""
    part = np.linspace(0, 1, ticks)[:, None, None]
    return (100 + part * change).astype(np.float32)


def test_cells_that_change_by_more_than_10_count():
    change = np.full((20, 20), 10.5)
    change[:6] = 100
    assert blended_share(dissolve(change)) == pytest.approx(1)
    change[6:] = 10
    assert blended_share(dissolve(change)) == pytest.approx(0.3)


def test_a_fifth_of_the_picture_is_too_little():
    change = np.zeros((20, 20))
    change[:4] = 100
    assert blended_share(dissolve(change)) == 0
    change[4, 0] = 100
    assert blended_share(dissolve(change)) == pytest.approx(81 / 400)


@pytest.mark.parametrize(("tick", "share"), [(1, 1), (2, 0), (3, 1), (4, 0), (5, 1)])
def test_two_pictures_between_the_ends_must_be_mixtures(tick, share):
    slow = dissolve(np.full((20, 20), 90.0))
    slow[tick, ::2] += 60
    slow[tick, 1::2] -= 60
    assert blended_share(slow) == pytest.approx(share)


@pytest.mark.parametrize(("error", "share"), [(18, 1), (22, 0)])
def test_a_mixture_is_right_to_a_fifth_of_the_change(error, share):
    slow = dissolve(np.full((20, 20), 100.0))
    slow[2, ::2] += error
    slow[2, 1::2] -= error
    assert blended_share(slow) == pytest.approx(share)


def test_what_camera_motion_explains_is_no_blend():
    """A slow pan over soft shapes: each picture in between is nearly a mixture of the ends."""
    wide = texture(3, 12.0, (64, 160)) * 1.0
    pan = np.stack([ndimage.shift(wide, (0, -0.7 * tick), order=3, mode="nearest")[:, 30:126] for tick in range(7)])
    change = pan[6] - pan[0]
    assert (np.abs(change) > 10).mean() > 0.3
    assert blended_share(pan) < 0.2 < blended_share(dissolve(change))


# ---- motion --------------------------------------------------------------------------------------------------------


def test_pictures_that_are_compared_lie_four_ticks_apart_where_there_are_enough():
    assert [_lag(np.zeros((number, 1, 1))) for number in range(2, 12)] == [1, 1, 1, 2, 2, 3, 3, 4, 4, 4]

    def triples(number):
        return [tuple(int(p.item()) for p in triple) for triple in _triples(np.arange(number).reshape(-1, 1, 1))]

    assert triples(12) == [(0, 4, 8), (3, 7, 11)]
    assert triples(5) == [(0, 2, 4)] and triples(3) == [(0, 1, 2)] and triples(2) == [(0, 1, 1)]


def test_object_motion_is_the_80th_percentile_of_what_is_left():
    slow = flat([50.0] * 25, 16)
    for middle, level in zip((4, 7, 10, 13, 16, 19), (0, 0.5, 1, 1.5, 2, 2.5), strict=True):
        slow[middle, 0, :4] += level
    assert motions(slow, np.arange(25) / 10) == (0.0, pytest.approx(2.0))


def pan(cells, ticks, contrast=1.0):
    wide = 128 + contrast * (texture(5, 3.0, (64, 200)) - 128)
    frames = [ndimage.shift(wide, (0, -cells * tick), order=3, mode="nearest")[:, 40:136] for tick in range(ticks)]
    return np.stack(frames).astype(np.float32)


def test_a_pan_moves_the_camera_at_its_speed_and_no_object():
    camera, objects = motions(pan(1.5, 12), np.arange(12) / 10)
    assert camera == pytest.approx(15 / 64, rel=0.03) and objects < 0.5
    camera, _ = motions(pan(1.5, 2), np.arange(2) / 10)
    assert camera == pytest.approx(15 / 64, rel=0.03)


def test_a_zoom_about_the_middle_moves_nothing_and_shakes_nothing():
    picture, middle = texture(6, 3.0), np.array([32.0, 48.0])
    slow = []
    for tick in range(9):
        scale = 1 - 0.01 * tick
        slow.append(
            ndimage.affine_transform(picture, np.eye(2) * scale, middle * (1 - scale), order=3, mode="nearest")
        )
    camera, objects = motions(np.stack(slow), np.arange(9) / 10)
    assert camera < 0.01 and objects < 1


def test_a_dissolve_moves_nothing():
    part = np.linspace(0, 1, 12)[:, None, None].astype(np.float32)
    camera, objects = motions((1 - part) * texture(7) + part * texture(8), np.arange(12) / 10)
    assert objects < 0.5


def test_a_body_on_a_flat_ground_is_seen_with_its_whole_contrast():
    y, x = np.mgrid[:64, :96]
    slow = [100 + 80 * (np.hypot(y - 32, x - 20 - 5 * tick) < 6).astype(np.float32) for tick in range(12)]
    smooth = ndimage.gaussian_filter(np.stack(slow), (0, 1, 1))
    assert motions(smooth, np.arange(12) / 10)[1] > 60


@pytest.mark.parametrize(("level", "is_moving"), [(3.4, True), (2.9, False)])
def test_changes_of_less_than_3_levels_are_noise(level, is_moving):
    slow = pan(0.5, 9)
    contrast = level / _busiest(np.abs(slow[4] - slow[0]))
    assert (motions(pan(0.5, 9, contrast), np.arange(9) / 10)[0] > 0) == is_moving
