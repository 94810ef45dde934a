"""Small real files for the tests of curation, good ones and every kind of bad one, made by PyAV when needed."""

import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from tests.support.data.media import REPEATABLE
from video_trl.curation.clips.sources import list_clips
from video_trl.curation.engine.manifest import Shard
from video_trl.curation.gt_pair.pipeline import acquire, filter_clips, normalise
from video_trl.data import write_video
from video_trl.sandbox.data.labelled_clips import make_footage


SIZE = {"height": 96, "width": 96, "fps": 16.0, "seconds": 2.0}
#: Rules for such clips: as the paper's, but for small and short ones, brought to 13 frames of 64 x 64 at 8 fps.
SMALL = {
    "min_seconds": 1.5,
    "max_seconds": 2.5,
    "min_edge": 64,
    "ratios": ["1:1", "16:9", "9:16"],
    "short_edge": 64,
    "fps": 8.0,
    "num_frames": 13,
}


def moving_video(seed: int = 0, **size) -> np.ndarray:
    """A clip that every filter lets through."""
    return make_footage("balls", seed, **(SIZE | size)).video


def write_clip(path: Path, video: np.ndarray | None = None, *, prompt: str | None = "a red ball falls", seed: int = 0):
    """An mp4 at 16 fps with its caption beside it."""
    write_video(path, moving_video(seed) if video is None else video, 16.0)
    if prompt is not None:
        path.with_suffix(".txt").write_text(prompt, encoding="utf-8")
    return path


def encode(
    path: Path,
    video: np.ndarray,
    *,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    times_ms: list[int] | None = None,
    prompt: str | None = "a red ball falls",
) -> Path:
    """A file of any codec and pixel format, with a timestamp of its own for each frame where asked for."""
    times_ms = times_ms or [round(1000 * index / 16) for index in range(len(video))]
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=Fraction(16), options=REPEATABLE if codec == "libx264" else {})
        stream.height, stream.width = video.shape[1:3]
        stream.pix_fmt = pix_fmt
        stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        for frame, time in zip(video, times_ms, strict=True):
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            picture.pts, picture.time_base = time, Fraction(1, 1000)
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    if prompt is not None:
        path.with_suffix(".txt").write_text(prompt, encoding="utf-8")
    return path


def first_stages(config, sources=()):
    """The manifest after stages 1 to 3 of a run."""
    root, shard = Path(config.output_dir), Shard()
    table = list_clips([*config.sources, *sources], spool=root / "sources")
    table = acquire(table, config, root / "stages", shard, needs_prompt=True)
    table = filter_clips(table, config, root / "stages", shard)
    return normalise(table, config, root, shard)


def rotate(path: Path) -> None:
    """The display matrix that a phone held upright writes. PyAV reads it (`frame.rotation`) and cannot write it."""
    data = bytearray(path.read_bytes())
    matrix = data.index(b"tkhd") + 4 + 40
    assert struct.unpack(">9i", data[matrix : matrix + 36]) == (1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    data[matrix : matrix + 36] = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)
    path.write_bytes(data)


def audio_only(path: Path) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), dtype=np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
