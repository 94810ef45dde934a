"""Requests are checked before anything runs; frames are the right ones at the right size."""

import av
import numpy as np
import pytest

from tests.support.tiny import tiny_mp4, tiny_video
from video_trl.data import VideoDecodeError, probe_video
from video_trl.data.video_io import read_frames_squashed
from video_trl.judges.frames import check_request, evenly_spaced, sample_frames, segment_starts, size_within


VIDEO = tiny_video(0)


@pytest.mark.parametrize(
    ("videos", "prompts", "message"),
    [
        ([VIDEO], [], "one prompt for each video, got 1 videos and 0 prompts"),
        ([VIDEO, VIDEO], ["x", " "], "prompt 1 is empty"),
        ([VIDEO], [None], "prompt 0 is empty or no string"),
        ([VIDEO.astype(np.float32)], ["x"], "video 0 is float32"),
        ([VIDEO[..., :2]], ["x"], "expected uint8"),
        ([VIDEO, 3], ["x", "y"], "video 1 is a int"),
        (["/nowhere/a.mp4", VIDEO, "/nowhere/b.mp4"], ["x"] * 3, r"video 0 is not.*a\.mp4; video 2 is not.*b\.mp4"),
        ([f"/nowhere/{i}.mp4" for i in range(30)], ["x"] * 30, "and 20 more"),
    ],
)
def test_requests_that_cannot_be_answered(videos, prompts, message):
    with pytest.raises(ValueError, match=message):
        check_request(videos, prompts)


@pytest.mark.parametrize(
    ("count", "first", "last"), [(1, 0, 0), (16, 0, 15), (32, 0, 30), (72, 1, 70), (81, 1, 79), (300, 4, 294)]
)
def test_segment_starts(count, first, last):
    """`start + round(i * (n - 1) / 32)`, start half a segment rounded down."""
    numbers = segment_starts(count, 32)
    expected = [int((count - 1) / 64) + int(np.round((count - 1) / 32 * i)) for i in range(32)]
    assert numbers.tolist() == expected and len(numbers) == 32
    assert (numbers[0], numbers[-1]) == (first, last) and numbers[-1] < count


@pytest.mark.parametrize(("count", "wanted", "expected"), [(9, 5, [0, 2, 4, 6, 8]), (3, 8, [0, 1, 2]), (1, 2, [0])])
def test_evenly_spaced(count, wanted, expected):
    assert evenly_spaced(count, wanted).tolist() == expected


def test_sizes_stay_within_the_limit():
    for height in range(20, 800, 77):
        for width in range(20, 1400, 93):
            for multiple in (2, 28, 32):
                h, w = size_within(height, width, 448 * 448, multiple)
                assert h % multiple == w % multiple == 0 and multiple <= h and multiple <= w and h * w <= 448 * 448
                assert h <= height + multiple and w <= width + multiple


def test_frames_are_scaled_as_the_decoder_gives_them(tmp_path):
    path = tmp_path / "clip.mp4"
    path.write_bytes(tiny_mp4(0, num_frames=9, height=64, width=96))
    frames, numbers = sample_frames(path, 5, evenly_spaced, lambda h, w: (h // 2, w // 4))
    with av.open(str(path)) as container:
        decoded = list(container.decode(video=0))
    expected = [
        decoded[i].reformat(width=24, height=32, format="rgb24", interpolation="BILINEAR").to_ndarray()
        for i in numbers
    ]
    assert numbers.tolist() == [0, 2, 4, 6, 8] and np.array_equal(frames, np.stack(expected))


def test_arrays_are_scaled_in_the_same_way():
    plain = np.broadcast_to(np.arange(0, 256, 4, dtype=np.uint8)[None, None, :, None], (2, 64, 64, 3))
    small, count = read_frames_squashed(plain, [0, 1], 16, 32)
    assert count == 2
    assert small.shape == (2, 16, 32, 3) and small.dtype == np.uint8
    assert np.abs(small[0, 8, 1:-1, 0] - plain[0, 0, :, 0].reshape(32, 2).mean(1)[1:-1]).max() <= 4
    assert np.array_equal(read_frames_squashed(plain, [0, 1], 64, 64)[0], plain)


def test_frames_come_in_the_order_that_is_asked_for_and_as_often():
    frames, count = read_frames_squashed(VIDEO, [3, 0, 3, 99], *VIDEO.shape[1:3])
    assert count == len(VIDEO) and np.array_equal(frames, VIDEO[[3, 0, 3, -1]])


def test_a_header_that_counts_wrongly_does_not_choose_the_frames(tmp_path):
    path = tmp_path / "clip.avi"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.height, stream.width, stream.pix_fmt = 64, 96, "yuv420p"
        for image in tiny_video(0, num_frames=9, height=64, width=96):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    right, _ = sample_frames(path, 3, evenly_spaced, lambda h, w: (h, w))
    data = bytearray(path.read_bytes())
    length = data.index(b"strh") + 40  # number of frames, in the header of the stream
    assert data[length] == 9
    data[length] = 5
    path.write_bytes(data)
    assert probe_video(path).num_frames == 9
    frames, numbers = sample_frames(path, 3, evenly_spaced, lambda h, w: (h, w))
    assert numbers.tolist() == [0, 4, 8] and np.array_equal(frames, right)


def test_a_damaged_file_is_named(tmp_path):
    path = tmp_path / "half.mp4"
    data = tiny_mp4(0, num_frames=30)
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(VideoDecodeError, match=r"half\.mp4"):
        sample_frames(path, 5, evenly_spaced, lambda h, w: (h, w))
