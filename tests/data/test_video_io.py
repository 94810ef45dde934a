import gc
import json
import math
import os
import struct
import subprocess
import sys
import tracemalloc
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from torch.utils.data import DataLoader, Dataset

from tests.support.paths import PYTHONPATH
from tests.support.tiny import tiny_mp4, tiny_video
from video_trl.data import (
    VideoDecodeError,
    VideoLimits,
    probe_video,
    read_video,
    video_hash,
    video_io,
    video_shape,
    write_video,
)


def noise_video(num_frames: int = 13, height: int = 32, width: int = 48) -> np.ndarray:
    """Frames that do not compress, so that a file's bytes belong to its frames and not to its header."""
    return np.random.default_rng(0).integers(0, 256, (num_frames, height, width, 3), dtype=np.uint8)


def moving_ramps() -> np.ndarray:
    """25 frames in which every pixel changes: damaged bits show, most of them already to the decoder."""
    y, x = np.mgrid[:96, :128]
    planes = [(2 * x + 5 * t, 2 * y + 3 * t, x + y + 9 * t) for t in range(25)]
    return np.stack([np.stack(channels, -1) % 256 for channels in planes]).astype(np.uint8)


def numbered_video(num_frames: int) -> np.ndarray:
    """Frame k is grey of brightness 10 * k: which frame it was can be read off after encoding."""
    levels = np.arange(num_frames, dtype=np.uint8) * 10
    return np.broadcast_to(levels[:, None, None, None], (num_frames, 32, 32, 3)).copy()


def frame_numbers(video: np.ndarray) -> list[int]:
    return [round(frame.mean() / 10) for frame in video]


def write_container(path: Path, video: np.ndarray, *, codec: str, times_ms: list[int]) -> None:
    """A file with a timestamp of its own for each frame."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=Fraction(25), options={"crf": "12"})
        stream.height, stream.width = video.shape[1:3]
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        for frame, time in zip(video, times_ms, strict=True):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            picture.pts, picture.time_base = time, Fraction(1, 1000)
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))


def test_round_trip_keeps_count_size_rate_and_nearly_the_pixels(tmp_path):
    video = tiny_video(0, num_frames=13, height=64, width=48)
    path = write_video(tmp_path / "new" / "clip.mp4", video, fps=8)
    read = read_video(path)
    assert read.shape == video.shape and read.dtype == np.uint8
    assert np.abs(read.astype(int) - video).mean() < 3  # yuv420p halves the resolution of colour
    info = probe_video(path)
    assert (info.num_frames, info.fps, info.height, info.width) == (13, 8.0, 64, 48)
    assert info.duration == pytest.approx(13 / 8)
    assert [entry.name for entry in path.parent.iterdir()] == ["clip.mp4"]


def test_written_file_is_what_browsers_play(tmp_path):
    path = write_video(tmp_path / "clip.mp4", tiny_video(0), fps=29.97)
    data = path.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert float(stream.average_rate) == pytest.approx(29.97)


def test_grey_survives_exactly(tmp_path):
    """A wrong colour matrix or range shifts every pixel; the tags in the file must say what was encoded."""
    for level in (0, 100, 255):
        video = np.full((2, 16, 16, 3), level, dtype=np.uint8)
        read = read_video(write_video(tmp_path / "grey.mp4", video, fps=8, crf=1))
        assert np.abs(read.astype(int) - level).max() <= 1


def test_saturated_colours_keep_their_hue(tmp_path):
    for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255)):
        video = np.broadcast_to(np.uint8(colour), (2, 32, 32, 3))
        read = read_video(write_video(tmp_path / "colour.mp4", video, fps=8, crf=1))
        assert np.abs(read.astype(int) - video).max() <= 6


def test_odd_sides_grow_by_a_copy_of_the_last_row_and_column(tmp_path):
    video = tiny_video(0, height=31, width=33)
    read = read_video(write_video(tmp_path / "odd.mp4", video, fps=8, crf=1))
    assert read.shape == (5, 32, 34, 3)
    assert np.abs(read[:, 31].astype(int) - read[:, 30]).max() < 12


def test_equal_frames_give_equal_bytes(tmp_path):
    first = write_video(tmp_path / "a.mp4", noise_video(), fps=8)
    second = write_video(tmp_path / "b.mp4", noise_video(), fps=8)
    assert first.read_bytes() == second.read_bytes()
    assert video_hash(first) == video_hash(str(second)) == video_hash({"path": None, "bytes": first.read_bytes()})


@pytest.mark.parametrize(
    "video",
    [tiny_video(0).astype(np.float32), tiny_video(0)[0], tiny_video(0).transpose(3, 0, 1, 2), tiny_video(0)[:0]],
)
def test_arrays_of_another_kind_are_rejected(tmp_path, video):
    with pytest.raises(ValueError, match=r"must be uint8 of shape \(frames, height, width, 3\), got"):
        write_video(tmp_path / "clip.mp4", video, fps=8)
    with pytest.raises(ValueError, match="must be uint8"):
        read_video(video)
    assert list(tmp_path.iterdir()) == []


def test_failed_write_leaves_the_older_file(tmp_path):
    path = write_video(tmp_path / "clip.mp4", tiny_video(0), fps=8)
    before = path.read_bytes()
    with pytest.raises((ValueError, OSError)):
        write_video(path, tiny_video(1), fps=8, preset="no-such-preset")
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


WRITER = """
import hashlib, importlib, json, sys, types
from pathlib import Path

import numpy as np

# Without what the folder's own module imports: torch takes longer than all the writing.
data = sys.modules["video_trl.data"] = types.ModuleType("video_trl.data")
data.__path__ = [str(Path(sys.argv[1]).parent)]
video_io = importlib.import_module("video_trl.data.video_io")
assert "torch" not in sys.modules
folder, number, video_io._X264_PARAMS = Path(sys.argv[2]), sys.argv[3], video_io._X264_PARAMS + sys.argv[4]
videos = [np.load(path) for path in sorted(folder.glob("*.npy"))]
path, found, dirt = folder / f"{number}.mp4", [], np.random.default_rng(int(number))
for _ in range(25):
    # Other bytes in the memory that is free, as after any other work in this process.
    blocks = [dirt.bytes(int(size)) for size in dirt.integers(64, 100_000, 200)]
    del blocks
    hashes = []
    for video in videos:
        video_io.write_video(path, video, fps=8)
        hashes.append(hashlib.sha256(path.read_bytes()).hexdigest())
        video_io.read_video(path, height=24, width=40)
    found.append(hashes)
print(json.dumps(found))
"""


def test_equal_frames_give_equal_bytes_on_every_processor_and_under_load(tmp_path):
    """300 files of three videos, by four processes at once with the instructions that x264 and libc may use."""
    videos = [moving_ramps()[:9], tiny_video(0, num_frames=9, height=32, width=64), noise_video()]
    for number, video in enumerate(videos):
        np.save(tmp_path / f"{number}.npy", video)
    older = {"GLIBC_TUNABLES": "glibc.cpu.hwcaps=-AVX512F,-AVX2,-FMA"}
    processors = [("", {}), ("", {}), (":asm=avx2", {}), (":asm=0", older)]
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, video_io.__file__, str(tmp_path), str(number), asm],
            env={**os.environ, "PYTHONPATH": PYTHONPATH, **variables},
            stdout=subprocess.PIPE,
            text=True,
        )
        for number, (asm, variables) in enumerate(processors)
    ]
    found = [json.loads(worker.communicate(timeout=240)[0]) for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * 4
    hashes = [tuple(files) for files_of_one in found for files in files_of_one]
    assert len(hashes) == 100 and len(set(hashes)) == 1
    assert len(set(hashes[0])) == 3


def test_array_and_file_take_the_same_way_through_size_and_count():
    data = {"path": "clip.mp4", "bytes": tiny_mp4(0, num_frames=9, height=48, width=64)}
    whole = read_video(data)
    options = {"num_frames": 5, "height": 32, "width": 32}
    np.testing.assert_array_equal(read_video(data, **options), read_video(whole, **options))
    np.testing.assert_array_equal(read_video(whole.tolist()), whole)  # nested lists, from an array column


def test_resizing_covers_and_crops_the_centre():
    video = np.zeros((1, 20, 60, 3), dtype=np.uint8)
    video[:, :, 20:40] = 255  # the middle third
    assert (read_video(video, height=20, width=20) == 255).all()
    scaled = read_video(video, height=40, width=80)  # twice as large, then 20 columns cut on each side
    assert scaled.shape == (1, 40, 80, 3)
    assert (scaled[:, :, 24:56] > 250).all() and (scaled[:, :, :16] < 5).all() and (scaled[:, :, 64:] < 5).all()


def test_num_frames_takes_the_first_ones(tmp_path):
    path = write_video(tmp_path / "clip.mp4", numbered_video(13), fps=8)
    assert frame_numbers(read_video(path, num_frames=5)) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("fps", "expected"),
    [
        (4, [0, 2, 4, 6, 8, 10, 12]),
        (8, list(range(13))),
        (16, [frame for frame in range(13) for _ in range(2)]),
        (6, [0, 1, 2, 4, 5, 6, 8, 9, 10, 12]),  # 8 fps seen at 6: every fourth frame goes
    ],
)
def test_resampling_shows_the_frame_on_screen_at_each_tick(tmp_path, fps, expected):
    path = write_video(tmp_path / "clip.mp4", numbered_video(13), fps=8)
    assert frame_numbers(read_video(path, fps=fps)) == expected


def test_resampling_goes_by_timestamps_not_by_frame_numbers(tmp_path):
    """Frames at 0, 100, 200, 800 and 900 ms: a long pause in the middle, as a screen recorder leaves it."""
    path = tmp_path / "variable.mkv"
    write_container(path, numbered_video(5), codec="libx264", times_ms=[0, 100, 200, 800, 900])
    assert frame_numbers(read_video(path)) == [0, 1, 2, 3, 4]
    assert frame_numbers(read_video(path, fps=10)) == [0, 1, 2, 2, 2, 2, 2, 2, 3, 4]


def test_matroska_without_a_frame_count_is_counted_and_checked(tmp_path):
    path = tmp_path / "clip.mkv"
    write_container(path, noise_video(25), codec="libx264", times_ms=list(range(0, 1000, 40)))
    assert probe_video(path).num_frames == 25
    assert len(read_video(path)) == 25
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(VideoDecodeError, match=r"clip\.mkv"):
        read_video(path)


def test_phone_rotation_is_applied(tmp_path):
    """The display matrix of a phone held upright: rotate clockwise by a quarter."""
    path = write_video(tmp_path / "clip.mp4", tiny_video(0, height=32, width=48), fps=8)
    upright = read_video(path)
    data = bytearray(path.read_bytes())
    matrix = data.index(b"tkhd") + 4 + 40
    identity = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    assert data[matrix : matrix + 36] == identity
    data[matrix : matrix + 36] = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    np.testing.assert_array_equal(read_video(path), np.rot90(upright, k=-1, axes=(1, 2)))
    info = probe_video(path)
    assert (info.height, info.width) == (48, 32)


def test_probe_of_an_array_has_no_clock():
    info = probe_video(tiny_video(0))
    assert (info.num_frames, info.height, info.width) == (5, 32, 32) and math.isnan(info.fps)


def test_missing_file_is_named(tmp_path):
    for read in (read_video, probe_video, video_hash):
        with pytest.raises(VideoDecodeError, match=r"gone\.mp4: cannot open the file \(No such file"):
            read(tmp_path / "gone.mp4")
    with pytest.raises(VideoDecodeError, match="gone.mp4"):
        read_video({"path": str(tmp_path / "gone.mp4"), "bytes": None})
    with pytest.raises(VideoDecodeError, match="expected a path, a dict with 'path' or 'bytes'"):
        read_video({"path": None, "bytes": None})


@pytest.mark.parametrize("data", [b"", b"not a video" * 100, bytes(5000)])
def test_file_without_a_video_in_it_is_named(tmp_path, data):
    path = tmp_path / "bad.mp4"
    path.write_bytes(data)
    for read in (read_video, probe_video):
        with pytest.raises(VideoDecodeError, match=r"bad\.mp4: .*(Fetch or render it again|Drop its row)"):
            read(path)


@pytest.mark.parametrize("path", ["pipe.mp4", "/dev/zero", "/proc/self/mem"])
def test_what_is_no_regular_file_is_not_waited_for(tmp_path, path):
    os.mkfifo(tmp_path / "pipe.mp4")
    for function in (read_video, probe_video, video_hash):
        with pytest.raises(VideoDecodeError, match=path):
            function(tmp_path / path)


def test_audio_only_file_is_named(tmp_path):
    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), dtype=np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with pytest.raises(VideoDecodeError, match=r"sound\.mp4: expected a video stream, got audio"):
        read_video(path)


@pytest.mark.parametrize("kept", [0.3, 0.6, 0.9, 0.999])
def test_truncated_mp4_is_found_though_it_opens_and_partly_plays(tmp_path, kept):
    path = write_video(tmp_path / "cut.mp4", noise_video(), fps=8)
    data = path.read_bytes()
    path.write_bytes(data[: int(kept * len(data))])
    with av.open(str(path)) as container:  # FFmpeg itself opens it and says 13 frames
        assert container.streams.video[0].frames == 13
    for read in (read_video, probe_video):
        with pytest.raises(VideoDecodeError, match=r"cut\.mp4: truncated\. The header declares 13 frames") as error:
            read(path)
        assert int(str(error.value).split("ends after ")[1].split(".")[0]) < 13
    with pytest.raises(VideoDecodeError, match="truncated"):  # even when the frames asked for are there
        read_video(path, num_frames=1)


def test_truncated_mp4_with_its_index_at_the_end_is_found(tmp_path):
    path = tmp_path / "cut.mp4"
    data = tiny_mp4(0, num_frames=13)
    for kept in (len(data) // 2, len(data) - 400, len(data) - 100):
        path.write_bytes(data[:kept])
        with pytest.raises(VideoDecodeError, match=r"cut\.mp4: .*cut off"):
            read_video(path)


def test_frames_missing_from_an_index_that_is_intact_are_found(tmp_path):
    """Zeroes where frames were: the size is right and the header is right, only decoding can tell."""
    path = write_video(tmp_path / "holes.mp4", noise_video(), fps=8)
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 3000] = bytes(3000)
    path.write_bytes(data)
    with pytest.raises(VideoDecodeError, match=r"holes\.mp4: damaged after \d+ good frames"):
        read_video(path)


def test_damage_that_ffmpeg_paints_over_raises(tmp_path):
    """H.264 has no checksum: some damage decodes to other pixels unnoticed. What FFmpeg does notice, it conceals."""
    path = write_video(tmp_path / "noise.mp4", moving_ramps(), fps=8)
    whole, concealed = path.read_bytes(), 0
    for seed in range(12):
        generator, data = np.random.default_rng(seed), bytearray(whole)
        start = int(generator.integers(whole.index(b"mdat") + 900, len(whole) - 100))
        data[start : start + 60] = generator.bytes(60)
        path.write_bytes(data)
        try:
            with av.open(str(path)) as container:
                frames = list(container.decode(video=0))
        except av.error.FFmpegError:
            frames = []
        if len(frames) == 25 and any(frame.is_corrupt for frame in frames):
            concealed += 1
            with pytest.raises(VideoDecodeError, match=r"noise\.mp4: damaged after \d+ good frames"):
                read_video(path)
    assert concealed >= 4


def test_damage_is_found_where_the_decoder_says_nothing_by_default(tmp_path):
    """Damaged motion JPEG is painted over without even a mark on the frame."""
    path, found = tmp_path / "clip.mkv", 0
    write_container(path, moving_ramps(), codec="mjpeg", times_ms=list(range(0, 25 * 125, 125)))
    whole = path.read_bytes()
    assert len(read_video(path)) == 25
    for seed in range(20):
        generator, data = np.random.default_rng(seed), bytearray(whole)
        start = int(generator.integers(len(whole) // 4, len(whole) - 500))
        data[start : start + 60] = generator.bytes(60)
        path.write_bytes(data)
        with av.open(str(path)) as container:
            try:
                frames = list(container.decode(video=0))
            except av.error.FFmpegError:
                continue
        try:
            read_video(path)
        except VideoDecodeError as error:
            found += "clip.mkv: damaged" in str(error) and not any(frame.is_corrupt for frame in frames)
    assert found >= 10


def test_too_short_video_names_what_it_has(tmp_path):
    path = write_video(tmp_path / "short.mp4", tiny_video(0, num_frames=5), fps=8)
    with pytest.raises(VideoDecodeError, match=r"short\.mp4: expected at least 9 frames, got 5"):
        read_video(path, num_frames=9)
    with pytest.raises(VideoDecodeError, match=r"expected at least 5 frames at 4 fps, got 3.*`num_frames=1`"):
        read_video(path, num_frames=5, fps=4)


def test_options_that_make_no_sense_are_rejected():
    with pytest.raises(ValueError, match="`height` and `width` go together, got height=32, width=None"):
        read_video(tiny_video(0), height=32)
    with pytest.raises(ValueError, match="must be positive"):
        read_video(tiny_video(0), num_frames=0)
    with pytest.raises(ValueError, match="`fps` must be positive"):
        write_video("never.mp4", tiny_video(0), fps=0)


def test_playlist_does_not_open_other_files(tmp_path, monkeypatch):
    """A "video" from a stranger's dataset that is a list of other files must not be followed."""
    monkeypatch.chdir(tmp_path)
    write_video("secret.mp4", tiny_video(0), fps=8)
    playlist = Path("clip.mp4")
    playlist.write_text("ffconcat version 1.0\nfile secret.mp4\n")
    with open(playlist, "rb") as file, av.open(file) as container:  # FFmpeg as it comes follows it
        assert len(list(container.decode(video=0))) == 5
    with pytest.raises(VideoDecodeError, match=r"clip\.mp4"):
        read_video(playlist)


# ---- limits ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large_frames(tmp_path_factory):
    """A few kilobytes on the disk, 27 MB in memory."""
    video = np.zeros((12, 768, 1024, 3), dtype=np.uint8)
    return write_video(tmp_path_factory.mktemp("large") / "large.mp4", video, fps=8)


def peak(function, *arguments, **options):
    tracemalloc.start()
    try:
        function(*arguments, **options)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"max_pixels": 768 * 1024 - 1}, r"at most 786431 pixels in a frame, got 786432\. Raise `max_pixels`"),
        ({"max_frames": 11}, r"at most 11 frames, got more\. Raise `max_frames`"),
        ({"max_seconds": 1.2}, r"at most 1\.2 s, got a frame at 1 s\. Raise `max_seconds`"),
        (
            {"max_bytes": 12 * 768 * 1024 * 3 - 1},
            r"more than 28311551 bytes.*Ask for `num_frames`, `height` and `width`",
        ),
    ],
)
def test_a_file_beyond_a_limit_is_named_with_the_way_out(large_frames, limits, message):
    for read in (read_video, video_shape):
        with pytest.raises(VideoDecodeError, match=rf"large\.mp4: .*{message}") as error:
            read(large_frames, limits=VideoLimits(**limits))
        assert error.value.kind == "too_large"
    with pytest.raises(ValueError, match="must be positive, got 0"):
        VideoLimits(**dict.fromkeys(limits, 0))


def test_what_the_caller_asks_for_is_not_limited_and_what_is_left_out_costs_nothing(large_frames):
    limits = VideoLimits(max_frames=3, max_bytes=1000)
    assert read_video(large_frames, num_frames=2, height=96, width=128, limits=limits).shape == (2, 96, 128, 3)
    with pytest.raises(VideoDecodeError, match="at most 3 frames"):
        read_video(large_frames, num_frames=5, height=96, width=128, limits=limits)


def test_frames_are_in_memory_once_and_a_survey_keeps_none(large_frames):
    size = 12 * 768 * 1024 * 3
    assert video_shape(large_frames) == (12, 768, 1024)
    assert peak(read_video, large_frames) < 2.3 * size  # the array is reserved while the frames are still there
    assert peak(video_shape, large_frames) < 0.1 * size
    assert peak(probe_video, large_frames) < 0.1 * size


@pytest.mark.parametrize("options", [{}, {"num_frames": 7}, {"fps": 3}, {"fps": 19.0, "height": 20, "width": 24}])
def test_the_shape_is_that_of_what_is_read(tmp_path, options):
    path = write_video(tmp_path / "clip.mp4", tiny_video(0, num_frames=9, height=32, width=48), fps=8)
    assert video_shape(path, **options) == read_video(path, **options).shape[:3]
    assert video_shape(read_video(path), **options) == read_video(read_video(path), **options).shape[:3]
    with pytest.raises(VideoDecodeError, match="expected at least 10 frames, got 9"):
        video_shape(path, num_frames=10)


def test_a_gap_of_weeks_asks_for_no_memory(tmp_path):
    """Two frames 23 days apart: at 16 fps they would be 32 million."""
    path = tmp_path / "gap.mkv"
    write_container(path, numbered_video(2), codec="libx264", times_ms=[0, 23 * 86_400_000])
    for read in (read_video, video_shape):
        with pytest.raises(VideoDecodeError, match=r"gap\.mkv: expected at most 3600 s, got a frame at 1987200 s"):
            read(path, fps=16)
    assert probe_video(path).duration > 1e6
    with pytest.raises(VideoDecodeError, match=r"more than 10000000 bytes"):  # an hour's gap is within the limit
        write_container(path, numbered_video(2), codec="libx264", times_ms=[0, 3_000_000])
        read_video(path, fps=16, limits=VideoLimits(max_bytes=10_000_000))


def test_whatever_the_libraries_raise_names_the_file(tmp_path, monkeypatch):
    """A stream without a decoder, a tag, a size: no exception of theirs gets past, and none of ours is lost."""
    path = write_video(tmp_path / "clip.mp4", tiny_video(0), fps=8)
    for error, kind in ((AttributeError("codec_context"), "damaged"), (MemoryError(), "too_large")):
        monkeypatch.setattr(video_io, "read_timeline", lambda *_, error=error: (_ for _ in ()).throw(error))
        with pytest.raises(VideoDecodeError, match=r"clip\.mp4: ") as caught:
            read_video(path)
        assert caught.value.kind == kind
    with pytest.raises(VideoDecodeError, match="cannot open the file"):
        read_video("null\0byte.mp4")


class _Collects(Dataset):
    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> int:
        gc.collect()
        return index


def test_a_worker_of_a_loader_does_not_wait_for_the_threads_of_inherited_frames():
    """Frames that its parent has left in a circle, their scaler's threads included, hang whoever frees them there."""
    circle = [av.VideoFrame.from_ndarray(noise_video(1)[0], format="rgb24")]
    circle[0].reformat(format="yuv420p")
    circle.append(circle)
    gc.collect()
    del circle
    loader = DataLoader(_Collects(), num_workers=1, multiprocessing_context="fork", timeout=60)
    assert list(loader) == [0]
