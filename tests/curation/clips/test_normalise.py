import numpy as np
import pytest
from PIL import Image

from tests.support.curation.clips import encode, moving_video, write_clip
from video_trl.curation.clips.normalise import normalise_batch, normalise_video
from video_trl.data import VideoDecodeError, probe_video, read_video, write_video


def numbered(count, height=32, width=32):
    """Frame k is grey of brightness 7 * k."""
    levels = (7 * np.arange(count)).astype(np.uint8)
    return np.broadcast_to(levels[:, None, None, None], (count, height, width, 3)).copy()


def numbers(path):
    return [round(frame.mean() / 7) for frame in read_video(path)]


def normalised(source, path, **options):
    settings = {"height": 32, "width": 32, "fps": 16.0, "num_frames": 13} | options
    return normalise_video(source, path, **settings)


@pytest.mark.parametrize("fps", [16.0, 24.0, 25.0, 29.97, 30.0, 45.0])
def test_frames_are_those_on_screen_at_the_ticks_of_the_new_clock(tmp_path, fps):
    source = write_video(tmp_path / "in.mp4", numbered(35), fps)
    assert normalised(source, tmp_path / "out.mp4") == 13
    expected = [int(np.floor(tick / 16 * fps + 1e-6)) for tick in range(13)]
    assert numbers(tmp_path / "out.mp4") == expected
    assert probe_video(tmp_path / "out.mp4").fps == 16


def test_variable_rate_keeps_real_time(tmp_path):
    """Frames at their own times; the clip starts at 400 ms, as clips cut from longer ones do."""
    times = [400 + time for time in (0, 10, 200, 210, 220, 600, 640, 700, 900, 1000)]
    source = encode(tmp_path / "in.mkv", numbered(10), times_ms=times)
    normalised(source, tmp_path / "out.mp4", fps=10.0, num_frames=9)
    ticks = [100 * tick + 400 for tick in range(9)]
    assert numbers(tmp_path / "out.mp4") == [max(i for i, time in enumerate(times) if time <= tick) for tick in ticks]


@pytest.mark.parametrize("name", ["in.mkv", "in.flv", "in.ts", "in.mp4"])
def test_a_clip_that_starts_late_is_whole(tmp_path, name):
    """Cut out of a longer one with its clock kept; one that does end early is found all the same."""
    times = [3000 + round(1000 * index / 16) for index in range(32)]
    path = encode(tmp_path / name, moving_video(), times_ms=times)
    assert normalised(path, tmp_path / "out.mp4") == 13 and len(read_video(path)) == 32
    if name == "in.mkv":
        path.write_bytes(path.read_bytes()[: path.stat().st_size * 9 // 10])
        with pytest.raises(VideoDecodeError, match=r"truncated\. The header declares \d+ bytes, the file has \d+"):
            read_video(path)


def test_five_seconds_are_enough_for_81_frames_and_less_is_not(tmp_path):
    """At 5.0 s the clip ends where the 81st frame would be shown: its last frame stays on screen."""
    exact = write_video(tmp_path / "exact.mp4", moving_video(seconds=5.0, fps=30.0, height=32, width=32), 30)
    assert normalised(exact, tmp_path / "out.mp4", num_frames=81) == 80
    video = read_video(tmp_path / "out.mp4")
    assert len(video) == 81 and np.abs(video[-1].astype(int) - video[-2]).max() < 8
    short = write_video(tmp_path / "short.mp4", moving_video(seconds=4.9, fps=30.0, height=32, width=32), 30)
    assert normalised(short, tmp_path / "no.mp4", num_frames=81) == 79
    assert not (tmp_path / "no.mp4").exists()


@pytest.mark.parametrize(("height", "width"), [(48, 96), (96, 48), (40, 40), (20, 20), (33, 47)])
def test_any_size_covers_the_bucket_around_its_centre(tmp_path, height, width):
    """A frame with a mark in the middle, larger and smaller than the bucket: nothing is squeezed."""
    video = np.full((13, height, width, 3), 40, dtype=np.uint8)
    half = min(height, width) // 4
    middle = np.s_[:, height // 2 - half : height // 2 + half, width // 2 - half : width // 2 + half]
    video[middle] = 220
    normalised(video, tmp_path / "out.mp4", source_fps=16.0)
    bright = read_video(tmp_path / "out.mp4")[0, ..., 0] > 130
    rows, columns = bright.any(axis=1).sum(), bright.any(axis=0).sum()
    assert abs(int(rows) - 16) <= 1 and abs(int(columns) - 16) <= 1
    assert abs(np.flatnonzero(bright.any(axis=1)).mean() - 15.5) <= 1


def test_frames_in_memory_have_the_clock_they_are_given(tmp_path):
    assert normalised(numbered(20), tmp_path / "out.mp4", source_fps=8.0) == 13
    assert numbers(tmp_path / "out.mp4") == [tick // 2 for tick in range(13)]


def batch_of(path, content="abc", bucket="32x64"):
    return {"path": [str(path)], "offset": [None], "length": [None], "content": [content], "bucket": [bucket]}


def test_the_batch_function_writes_the_clip_and_its_first_frame_and_repeats_to_the_bit(tmp_path):
    source = write_clip(tmp_path / "in.mp4")
    written = []
    for run in ("one", "two"):
        added = normalise_batch(batch_of(source), root=tmp_path / run, folder="videos", fps=8.0, num_frames=13)
        assert added["video"] == ["videos/abc.mp4"] and added["reference_image"] == ["videos/abc.png"]
        written.append([(tmp_path / run / added[name][0]).read_bytes() for name in ("video", "reference_image")])
        assert sorted(path.name for path in (tmp_path / run / "videos").iterdir()) == ["abc.mp4", "abc.png"]
    assert written[0] == written[1]
    video = read_video(tmp_path / "one" / "videos" / "abc.mp4")
    assert video.shape == (13, 32, 64, 3)
    assert np.array_equal(np.array(Image.open(tmp_path / "one" / "videos" / "abc.png")), video[0])


def test_what_cannot_be_brought_to_the_format_is_dropped_with_its_length(tmp_path):
    short = write_clip(tmp_path / "short.mp4", moving_video()[:12])
    added = normalise_batch(batch_of(short), root=tmp_path, folder="videos", fps=16.0, num_frames=81)
    assert (added["dropped_by"], added["value"], added["limit"]) == (["too_short"], [12.0], [81.0])
    gone = normalise_batch(batch_of(tmp_path / "gone.mp4"), root=tmp_path, folder="videos", fps=16.0, num_frames=81)
    assert gone["dropped_by"] == ["missing"] and "gone.mp4" in gone["detail"][0]
