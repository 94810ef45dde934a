"""The same clip in every container, clock and orientation gives the same frames, the same length and the same rate."""

import shutil
import subprocess
from fractions import Fraction

import av
import numpy as np
import pytest
from av.bitstream import BitStreamFilterContext

from tests.support.data.media import (
    CONTAINERS,
    HEIGHT,
    WIDTH,
    cut_by_edit_list,
    frame_numbers,
    numbered_frames,
    write_container,
    write_media,
)
from video_trl.curation.clips.measures import measure_clip
from video_trl.curation.clips.normalise import normalise_video
from video_trl.data import VideoDecodeError, probe_video, read_video, video_shape
from video_trl.data.video_io import decode_video


RATES = (Fraction(30), Fraction(24000, 1001))
TARGETS = (1, 7, 12.5, 16, 23.976, 24, 25, 29.97, 30, 50, 59, 60)
# Seconds at which the frames of a clip of variable rate are shown: a phone in bad light, then a long pause.
IRREGULAR = [Fraction(int(time), 1000) for time in np.cumsum([0, 21, 39, 50, 33, 34, 71, 400, 17, 16, 90, 55])]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("media")


@pytest.fixture(scope="module", params=RATES, ids=["30 fps", "23.976 fps"])
def clips(request, folder):
    """(rate, container -> file): 3 s, a number in each frame."""
    rate = request.param
    video = numbered_frames(round(3 * rate))
    return rate, {name: write_container(folder / str(float(rate)), name, video, rate) for name in CONTAINERS}


def on_screen(count, rate, fps):
    """Numbers of the frames shown at the ticks of a clock."""
    ticks = range(int(np.ceil(count / float(rate) * fps - 1e-6)))
    return [min(int(tick / fps * float(rate) + 1e-6 * float(rate)), count - 1) for tick in ticks]


@pytest.mark.parametrize("name", CONTAINERS)
def test_every_container_gives_the_same_frames_at_the_same_times(clips, name):
    """Equal times, to the rounding of a double, mean equal frames at every target rate."""
    rate, files = clips
    decoded = list(decode_video(files[name]))
    times = np.array([time for time, _, _ in decoded])
    assert np.abs(times - times[0] - np.arange(len(times)) / float(rate)).max() < 1e-9
    assert np.abs(np.array([duration for _, duration, _ in decoded]) - 1 / float(rate)).max() < 1e-9
    frames = np.stack([frame.to_ndarray(format="rgb24") for _, _, frame in decoded])
    assert frame_numbers(frames) == list(range(round(3 * rate)))
    info = probe_video(files[name])
    assert (info.num_frames, info.height, info.width) == (round(3 * rate), HEIGHT, WIDTH)
    assert info.fps == pytest.approx(float(rate), rel=1e-9) and info.duration == pytest.approx(info.num_frames / rate)


@pytest.mark.parametrize("fps", TARGETS)
def test_target_rates_show_the_frame_on_screen(clips, fps):
    rate, files = clips
    expected = on_screen(round(3 * rate), rate, fps)
    for name in ("mp4", "mkv", "avi"):
        assert frame_numbers(read_video(files[name], fps=fps)) == expected, name
        assert video_shape(files[name], fps=fps) == (len(expected), HEIGHT, WIDTH)


@pytest.mark.parametrize("name", CONTAINERS)
def test_normalisation_and_filters_see_the_same_clip(clips, name, tmp_path):
    rate, files = clips
    options = {"height": HEIGHT, "width": WIDTH, "fps": 16.0, "num_frames": 45}
    assert normalise_video(files[name], tmp_path / "out.mp4", **options) == 45
    assert frame_numbers(read_video(tmp_path / "out.mp4")) == on_screen(round(3 * rate), rate, 16)[:45]
    if name in ("mkv", "avi", "gif"):
        measured, expected = (measure_clip(files[kind]) for kind in (name, "mp4"))
        assert measured["decoded_frames"] == expected["decoded_frames"]
        assert measured["decoded_seconds"] == pytest.approx(expected["decoded_seconds"])
        assert measured["cuts"] == expected["cuts"]
        assert measured["motion"] == pytest.approx(expected["motion"], rel=0.1)  # codecs blur, and GIF has 256 colours


# ---- clocks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mp4", "mov", "mkv", "webm", "flv"])
def test_a_variable_rate_has_one_clock_in_every_container(tmp_path, name):
    """Documented difference: how long the last frame lasts, which Matroska and FLV do not store."""
    path = write_container(tmp_path, name, numbered_frames(len(IRREGULAR)), Fraction(30), times=IRREGULAR)
    times = np.array([time for time, _, _ in decode_video(path)])
    assert np.abs(times - times[0] - [float(time) for time in IRREGULAR]).max() < 1e-9
    assert frame_numbers(read_video(path)) == list(range(len(IRREGULAR)))
    for fps in TARGETS:
        ticks = np.arange(int(IRREGULAR[-1] * Fraction(fps)) + 1) / fps
        expected = [max(k for k, time in enumerate(IRREGULAR) if time <= tick + 1e-3) for tick in ticks]
        assert frame_numbers(read_video(path, fps=fps))[: len(ticks)] == expected, fps
    info = probe_video(path)
    assert info.num_frames == len(IRREGULAR) and info.fps == pytest.approx(info.num_frames / info.duration)
    assert 0 < info.duration - float(IRREGULAR[-1]) < 0.1


@pytest.mark.parametrize("name", ["mp4", "mkv", "webm"])
def test_dropped_frames_leave_the_others_in_their_places(tmp_path, name):
    """A variable rate on a grid, as of recorders that skip frames: the rate of the header is not that of the clip."""
    shown = [k for k in range(60) if k % 7 and k % 5]
    times = [Fraction(k, 30) for k in [0, *shown]]
    path = write_container(tmp_path, name, numbered_frames(60)[[0, *shown]], Fraction(30), times=times)
    expected = [max(k for k in (0, *shown) if k <= tick) for tick in range(60)][: shown[-1] + 1]
    assert frame_numbers(read_video(path, fps=30))[: len(expected)] == expected
    assert probe_video(path).duration == pytest.approx(2.0, abs=0.035)
    assert probe_video(path).fps == pytest.approx((len(shown) + 1) / 2, rel=0.02)


def test_frames_before_time_zero_of_which_matroska_has_no_time_are_a_part_of_the_clip(tmp_path):
    times = [Fraction(k, 30) - 1 for k in range(60)]
    options = {"avoid_negative_ts": "disabled"}
    path = write_media(tmp_path / "clip.mkv", numbered_frames(60), times=times, container_options=options)
    with av.open(str(path)) as container:
        assert any(packet.pts is None for packet in container.demux() if packet.size)
    info = probe_video(path)
    assert (info.num_frames, info.fps, info.duration) == (60, pytest.approx(30), pytest.approx(2.0))
    for fps in (15, 24, 30, 60):
        assert frame_numbers(read_video(path, fps=fps)) == on_screen(60, 30, fps), fps


@pytest.mark.parametrize("start", [0.1, 1.0, 1.5])
def test_an_edit_list_shows_what_it_says(tmp_path, start):
    path = write_container(tmp_path, "mp4", numbered_frames(90), Fraction(30))
    cut_by_edit_list(path, start, 1.2)
    first = round(30 * start)
    assert frame_numbers(read_video(path)) == list(range(first, first + 36))
    info = probe_video(path)
    assert (info.num_frames, info.fps) == (36, 30.0) and info.duration == pytest.approx(1.2)


# Codec, options of x264, container, seconds. Without an edit list, a cut begins with pictures that miss references.
CUTS = [
    ("libx264", "bframes=3", "mp4", 1.07),
    ("libx264", "intra-refresh=1:keyint=30", "mp4", 1.07),
    ("libx264", "intra-refresh=1:keyint=30", "mkv", 1.07),
    *[("libx264", "open-gop=1:keyint=20:min-keyint=20", suffix, 1.07) for suffix in ("mp4", "mkv", "avi")],
    ("libx264", "open-gop=1:keyint=22:min-keyint=22:b-pyramid=normal:ref=5:bframes=4", "mkv", 1.5),
    ("mpeg2video", None, "ts", 1.07),
    ("mpeg4", None, "mkv", 1.07),
    ("mpeg4", None, "avi", 1.07),
]


def cut_without_encoding(folder, codec, options, suffix, seconds, video):
    """The end of a clip of 90 frames, and the numbers that FFmpeg shows of it."""
    encoder = {"bf": "3", "x264-params": options} if options else {"bf": "2", "g": "15"}
    whole = write_media(folder / "whole.mp4", video, codec=codec, options=encoder)
    cut = folder / f"cut.{suffix}"
    command = ["ffmpeg", "-v", "error", "-ss", str(seconds), "-i", str(whole), "-c", "copy", str(cut)]
    subprocess.run(command, check=True)
    command = ["ffmpeg", "-v", "fatal", "-i", str(cut), "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    raw = subprocess.run(command, check=True, capture_output=True).stdout
    return cut, frame_numbers(np.frombuffer(raw, dtype=np.uint8).reshape(-1, HEIGHT, WIDTH, 3))


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="needs the ffmpeg command")
@pytest.mark.parametrize(("codec", "options", "suffix", "seconds"), CUTS)
def test_clips_that_ffmpeg_cuts_without_encoding_are_read_as_ffmpeg_reads_them(
    tmp_path, codec, options, suffix, seconds
):
    cut, expected = cut_without_encoding(tmp_path, codec, options, suffix, seconds, numbered_frames(90))
    assert 30 < len(expected) < 90
    assert frame_numbers(read_video(cut)) == frame_numbers(read_video(cut, fps=30)) == expected
    info = probe_video(cut)
    assert (info.num_frames, info.fps) == (len(expected), pytest.approx(30))
    assert measure_clip(cut)["decoded_frames"] == len(expected)


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="needs the ffmpeg command")
def test_damage_is_found_in_a_clip_that_begins_in_the_middle_of_another(tmp_path):
    """Not all of it shows, here as little as elsewhere: other bits are mostly another picture."""
    options = "open-gop=1:keyint=20:min-keyint=20"
    cut, _ = cut_without_encoding(tmp_path, "libx264", options, "mkv", 1.07, numbered_frames(90))
    whole, rng, kinds = cut.read_bytes(), np.random.default_rng(0), []
    for place in rng.integers(len(whole) // 4, len(whole) - 40, 20):
        cut.write_bytes(whole[:place] + rng.bytes(20) + whole[place + 20 :])
        try:
            read_video(cut)
        except VideoDecodeError as error:
            kinds.append(error.kind)
    assert kinds.count("damaged") > 8


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="needs the ffmpeg command")
def test_frames_that_are_never_shown_do_not_count(tmp_path):
    """Some writers of WebM store VP9's alternative references as packets of their own."""
    for number in ("1", "2"):
        film = ["-f", "lavfi", "-i", "testsrc2=s=64x48:r=30:d=2,noise=alls=20:allf=t", "-c:v", "libvpx-vp9"]
        film += ["-cpu-used", "5", "-auto-alt-ref", "1", "-lag-in-frames", "25", "-b:v", "60k", "-pass", number]
        target = [str(tmp_path / "whole.webm")] if number == "2" else ["-f", "null", "-"]
        command = ["ffmpeg", "-v", "error", *film, "-passlogfile", str(tmp_path / "log"), *target]
        subprocess.run(command, check=True)
    with (
        av.open(str(tmp_path / "whole.webm")) as source,
        av.open(str(tmp_path / "apart.webm"), "w", options={"fflags": "-autobsf"}) as target,
    ):
        stream, last, stored = source.streams.video[0], 0, 0
        split = BitStreamFilterContext("vp9_superframe_split", stream)
        copy = target.add_stream_from_template(stream)
        for packet in source.demux(stream):
            for part in split.filter(packet if packet.size else None):
                last = part.pts if part.pts is not None else last
                part.pts = part.dts = last
                part.stream, stored = copy, stored + 1
                target.mux(part)
    assert stored > 60
    assert probe_video(tmp_path / "apart.webm").num_frames == 60
    assert len(read_video(tmp_path / "apart.webm")) == 60


# ---- pictures -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_all_eight_orientations_are_shown_upright(tmp_path, degrees, mirrored):
    corners = np.zeros((3, 64, 96, 3), dtype=np.uint8)
    corners[:, :32, :48, 0], corners[:, :32, 48:, 1], corners[:, 32:, :48, 2] = 250, 250, 250
    plain = read_video(write_media(tmp_path / "plain.mp4", corners))
    turned = write_media(tmp_path / "turned.mp4", corners, turned={"degrees": degrees, "hflip": mirrored})
    # FFmpeg's helper turns first, then mirrors what the turned picture shows.
    expected = np.rot90(plain, k=degrees // 90, axes=(1, 2))
    expected = expected[:, :, ::-1] if mirrored else expected
    np.testing.assert_array_equal(read_video(turned), expected)
    info = probe_video(turned)
    assert (3, info.height, info.width) == video_shape(turned) == expected.shape[:3]


@pytest.mark.parametrize("pix_fmt", ["yuv420p", "yuv420p10le", "yuv422p", "yuv444p"])
def test_depth_and_subsampling_change_no_frame(tmp_path, pix_fmt):
    path = write_container(tmp_path, "mkv", numbered_frames(20), Fraction(30), pix_fmt=pix_fmt)
    assert frame_numbers(read_video(path, fps=15)) == list(range(0, 20, 2))


def test_odd_sides(tmp_path):
    video = numbered_frames(5, height=47, width=65)[:, :, :63]
    path = write_media(tmp_path / "odd.mkv", video, codec="ffv1", pix_fmt="yuv444p")
    assert read_video(path).shape == (5, 47, 63, 3) and probe_video(path).width == 63


def test_the_best_of_two_streams_is_taken_and_no_cover(tmp_path):
    path = tmp_path / "two.mkv"
    with av.open(str(path), "w") as container:
        streams = []
        for side in (32, 128):
            stream = container.add_stream("libx264", rate=30)
            stream.height = stream.width = side
            stream.pix_fmt = "yuv420p"
            streams.append(stream)
        for _ in range(9):
            for stream in streams:
                frame = np.full((stream.height, stream.width, 3), 100, dtype=np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        for stream in streams:
            container.mux(stream.encode(None))
    with av.open(str(path)) as container:
        best = container.streams.best("video")
        size = best.height, best.width
    assert read_video(path).shape[1:3] == size
    info = probe_video(path)
    assert (info.height, info.width) == size and info.num_frames == 9


def test_tags_in_an_old_code_page_are_no_damage(tmp_path):
    path = tmp_path / "title.mp4"
    with av.open(str(path), "w") as container:
        container.metadata["title"] = "Caf_ au lait"
        stream = container.add_stream("libx264", rate=30)
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
        for frame in numbered_frames(9):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    data = path.read_bytes()
    assert data.count(b"Caf_ au lait") == 1
    path.write_bytes(data.replace(b"Caf_ au lait", b"Caf\xe9 au lait"))
    assert frame_numbers(read_video(path)) == list(range(9)) and probe_video(path).num_frames == 9


def test_a_size_that_changes_on_the_way_is_brought_to_the_first(tmp_path):
    """MPEG-TS may go on in another size; players scale, and so does this."""
    for name, side in (("a", 64), ("b", 96)):
        write_media(tmp_path / f"{name}.ts", numbered_frames(8, height=side, width=side))
    data = (tmp_path / "a.ts").read_bytes() + (tmp_path / "b.ts").read_bytes()
    (tmp_path / "joined.ts").write_bytes(data)
    video = read_video(tmp_path / "joined.ts")
    assert video.shape[1:] == (64, 64, 3) and len(video) >= 15
    assert frame_numbers(video[:8]) == list(range(8)) and frame_numbers(video[-7:]) == list(range(1, 8))
    assert measure_clip(tmp_path / "joined.ts")["decoded_frames"] == len(video)


@pytest.mark.parametrize("name", ["mkv", "webm", "mp4", "fragmented", "avi", "flv"])
def test_a_cut_off_file_is_found_in_every_container(tmp_path, name):
    noise = np.random.default_rng(0).integers(0, 256, (30, HEIGHT, WIDTH, 3), dtype=np.uint8)
    path = write_container(tmp_path, name, noise, Fraction(30))
    whole = path.read_bytes()
    for kept in (0.35, 0.6, 0.85):
        path.write_bytes(whole[: int(kept * len(whole))])
        with pytest.raises(VideoDecodeError) as error:
            read_video(path)
        assert error.value.kind in ("truncated", "damaged", "unreadable") and str(path) in str(error.value)
