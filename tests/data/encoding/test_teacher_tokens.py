"""Tokens cached ahead: right, small, found again, and never half written."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset, Features, Value, Video

from tests.support.teachers import models
from tests.support.tiny import tiny_mp4, tiny_video
from video_trl.data import (
    VideoDecodeError,
    dequantise_tokens,
    encode_teacher,
    quantise_tokens,
    read_video,
    write_video,
)
from video_trl.data.encoding import store
from video_trl.data.encoding.store import EncodedWriter
from video_trl.data.encoding.teacher_tokens import TeacherTokenDataset
from video_trl.load import load_teacher
from video_trl.teachers import TeacherTokens, VideoMAETeacher


def rows(*seeds, **size):
    return [{"video": tiny_video(seed, **size)} for seed in seeds]


def teacher(**options):
    return VideoMAETeacher(models.videomae(), **options)


class CountingTeacher:
    """A real teacher that remembers how many videos it has seen."""

    def __init__(self, inner=None):
        self.inner, self.seen = inner or teacher(), 0
        self.name, self.identity = self.inner.name, self.inner.identity

    def __call__(self, video):
        self.seen += len(video)
        return self.inner(video)

    def to(self, device):
        self.inner.to(device)
        return self


def test_rows_are_the_tokens_of_the_videos(tmp_path):
    dataset = rows(0, 1, 0, 2)
    counting = CountingTeacher()
    encoded = encode_teacher(dataset, counting, cache_dir=tmp_path, batch_size=2)
    assert len(encoded) == 4 and counting.seen == 3  # one video stands in two rows
    assert encoded.grid == (2, 4, 4) and encoded.frame_times.tolist() == [1.5, 3.5]
    assert encoded.column_names == ["teacher_tokens", "teacher_scale"] and encoded.teacher == teacher().identity
    for row, raw in zip(encoded, dataset, strict=True):
        assert row["teacher_tokens"].shape == (2, 16, 24) and row["teacher_tokens"].dtype == torch.int8
        assert row["teacher_scale"].shape == (2, 16) and row["teacher_scale"].dtype == torch.float32
        expected = teacher()(torch.from_numpy(raw["video"])[None].movedim(-1, 2).float() / 255).tokens[0]
        restored = dequantise_tokens(row["teacher_tokens"], row["teacher_scale"])
        assert ((restored - expected).abs() <= 0.501 * row["teacher_scale"][..., None]).all()


def test_videos_are_prepared_as_for_the_autoencoder(tmp_path):
    features = Features({"prompt": Value("string"), "clip": Video(decode=False)})
    files = [{"path": None, "bytes": tiny_mp4(seed, num_frames=16, height=48, width=64)} for seed in (0, 1)]
    dataset = Dataset.from_list([{"prompt": "a", "clip": file} for file in files], features=features)
    pixels = {"num_frames": 5, "fps": 4.0, "height": 32, "width": 40}
    options = {"height": 32, "width": 40}
    encoded = encode_teacher(dataset, teacher(**options), column="clip", cache_dir=tmp_path, **pixels)
    video = torch.from_numpy(np.stack([read_video(file, **pixels) for file in files])).movedim(-1, 2).float() / 255
    expected, _ = quantise_tokens(teacher(**options)(video).tokens)
    assert torch.equal(torch.stack([row["teacher_tokens"] for row in encoded]), expected)


def test_the_cache_is_used_and_keyed_by_all_that_matters(tmp_path):
    dataset = rows(0, 1, num_frames=9)
    first = encode_teacher(dataset, CountingTeacher(), cache_dir=tmp_path)
    again = CountingTeacher()
    assert encode_teacher(dataset, again, cache_dir=tmp_path, batch_size=1).directory == first.directory
    assert again.seen == 0
    others = [
        encode_teacher(rows(0, 2, num_frames=9), teacher(), cache_dir=tmp_path),  # another clip
        encode_teacher(dataset[::-1], teacher(), cache_dir=tmp_path),  # another order
        encode_teacher(dataset, teacher(), cache_dir=tmp_path, num_frames=5),
        encode_teacher(dataset, teacher(), cache_dir=tmp_path, height=40, width=40),
        encode_teacher(dataset, teacher(height=48, width=48), cache_dir=tmp_path),
        encode_teacher(dataset, VideoMAETeacher(models.randomise(models.videomae(), 1)), cache_dir=tmp_path),
    ]
    assert len({first.directory, *(other.directory for other in others)}) == 7


def relations(tokens):
    tokens = F.normalize(tokens.double(), dim=-1)
    return tokens @ tokens.mT


def worst_change(tokens):
    return (relations(dequantise_tokens(*quantise_tokens(tokens))) - relations(tokens)).abs().max().item()


def test_quantising_changes_relations_far_less_than_the_margin():
    tokens = torch.randn(500, 768, generator=torch.Generator().manual_seed(0))
    assert worst_change(tokens) < 0.002
    tokens[:, :4] *= 30  # channels of this size are common in large encoders
    assert worst_change(tokens) < 0.01
    clip = torch.from_numpy(tiny_video(0, num_frames=13, height=64, width=64))[None].movedim(-1, 2).float() / 255
    assert worst_change(load_teacher("sandbox")(clip).tokens.flatten(0, 2)) < 0.01


def test_quantised_values_use_the_whole_range_and_zero_stays():
    quantised, scale = quantise_tokens(torch.tensor([[1.0, -2.0, 0.5], [0.0, 0.0, 0.0]]))
    assert quantised.tolist() == [[64, -127, 32], [0, 0, 0]] and scale[1] == 0
    assert dequantise_tokens(quantised, scale)[1].tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("dataset", "options", "message"),
    [
        ([], {}, "no rows"),
        (rows(0), {"column": "clip"}, "no column 'clip', only video"),
        (rows(0), {"batch_size": 0}, "batch_size"),
        (rows(0) + rows(1, num_frames=9), {}, r"expected .* \(5, 32, 32\) .* got \(9, 32, 32\)"),
        (
            rows(0) + rows(1, num_frames=9),
            {"batch_size": 1},
            r"grid is \(4, 4, 4\), that of the first video \(2, 4, 4",
        ),
        (rows(0, num_frames=6), {}, "multiple of 2, got 5"),
    ],
)
def test_what_does_not_suit_is_refused_and_leaves_nothing_behind(tmp_path, dataset, options, message):
    with pytest.raises(ValueError, match=message):
        encode_teacher(dataset, teacher(), cache_dir=tmp_path, **options)
    assert not list(tmp_path.iterdir())


def test_a_video_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(VideoDecodeError, match="missing.mp4"):
        encode_teacher([{"video": "missing.mp4"}], teacher(), cache_dir=tmp_path)
    with pytest.raises(VideoDecodeError, match="at least 9 frames"):
        encode_teacher(rows(0), teacher(), cache_dir=tmp_path, num_frames=9)
    assert not list(tmp_path.iterdir())


def test_an_interruption_leaves_no_cache(tmp_path):
    class Stops(CountingTeacher):
        def __call__(self, video):
            if self.seen >= 2:
                raise KeyboardInterrupt
            return super().__call__(video)

    with pytest.raises(KeyboardInterrupt):
        encode_teacher(rows(0, 1, 2), Stops(), cache_dir=tmp_path, batch_size=1)
    assert not list(tmp_path.iterdir())
    assert len(encode_teacher(rows(0, 1, 2), teacher(), cache_dir=tmp_path)) == 3


def test_tokens_that_are_not_finite_are_refused(tmp_path):
    class Overflows(CountingTeacher):
        def __call__(self, video):
            encoded = super().__call__(video)
            encoded.tokens[1] = torch.inf
            return TeacherTokens(encoded.tokens, encoded.grid, encoded.frame_times)

    with pytest.raises(ValueError, match="row 1, video .* not finite"):
        encode_teacher(rows(0, 1), Overflows(), cache_dir=tmp_path)


def test_another_kind_of_folder_is_refused(tmp_path):
    with EncodedWriter(tmp_path / "video-x", "video", "x") as writer:
        writer.finish([], [])
    with pytest.raises(ValueError, match="type 'video', not a teacher's tokens"):
        TeacherTokenDataset(tmp_path / "video-x")


def test_an_interrupted_encoding_goes_on_and_an_exchanged_file_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "_SECONDS_AT_STAKE", 0)
    monkeypatch.setattr(store, "_PROPORTION_AT_STAKE", 0)
    path = write_video(tmp_path / "2.mp4", tiny_video(2), fps=8)

    original = path.read_bytes()

    class Swaps(CountingTeacher):
        def __call__(self, video):
            write_video(path, tiny_video(3), fps=8)
            return super().__call__(video)

    clips, options = [*rows(0, 1), {"video": path}], {"cache_dir": tmp_path / "cache", "batch_size": 1}
    with pytest.raises(ValueError, match=r"row 2, video \(.*2\.mp4\): the file has changed since encoding began"):
        encode_teacher(clips, Swaps(), **options)
    path.write_bytes(original)
    counting = CountingTeacher()
    encoded = encode_teacher(clips, counting, **options)
    assert counting.seen == 2  # the first, which says what the grid is, and the one that is missing
    assert [each.name for each in (tmp_path / "cache").iterdir()] == [encoded.directory.name]
    straight = encode_teacher(clips, teacher(), cache_dir=tmp_path / "straight", batch_size=1)
    for row, expected in zip(encoded, straight, strict=True):
        assert all(torch.equal(row[name], expected[name]) for name in row)
