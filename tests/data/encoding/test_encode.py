import dataclasses
import json
import logging
import math
import multiprocessing
import os
import pickle
import resource
import signal
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import datasets
import numpy as np
import pytest
import tokenizers
import torch
import torch.distributed as dist

from tests.support import rounding
from tests.support.tiny import MAX_SEQUENCE_LENGTH, tiny_group_dataset, tiny_mp4, tiny_video, tiny_wan_pipeline
from video_trl.data import EncodedDataset, VideoDecodeError, encode_dataset, read_video, write_video
from video_trl.data.columns import column_names
from video_trl.data.encoding import index, store
from video_trl.data.encoding.store import EncodedWriter
from video_trl.files import unfinished_folders
from video_trl.models import WanFamily


@dataclasses.dataclass(frozen=True)
class CountingFamily(WanFamily):
    """Wan's adapter, which also notes what it was asked to encode."""

    videos: list[int] = dataclasses.field(default_factory=list)  # batch sizes
    prompts: list[str] = dataclasses.field(default_factory=list)

    def encode_video(self, vae, video):
        self.videos.append(len(video))
        return super().encode_video(vae, video)

    def encode_prompt(self, pipeline, prompts, max_sequence_length):
        self.prompts.extend(prompts)
        return super().encode_prompt(pipeline, prompts, max_sequence_length)


@pytest.fixture(scope="module")
def pipeline():
    return tiny_wan_pipeline()


def encode(dataset, pipeline, cache_dir, *, family=None, row_type="group", **options) -> EncodedDataset:
    options = {"max_sequence_length": MAX_SEQUENCE_LENGTH, "device": "cpu"} | options
    return encode_dataset(dataset, pipeline, family or CountingFamily(), row_type, cache_dir=cache_dir, **options)


def array_rows(n: int = 2, m: int = 2) -> list[dict]:
    """Group rows of distinct arrays."""
    return [
        {
            "prompt": f"a {colour} ball falls",
            "chosen": tiny_video(row * (m + 1)),
            "rejected": [tiny_video(row * (m + 1) + j) for j in range(1, m + 1)],
        }
        for row, colour in zip(range(n), ("red", "blue", "green"), strict=False)
    ]


def by_hand(pipeline, source) -> torch.Tensor:
    """Latents of one video as diffusers' own training scripts compute them."""
    video = torch.from_numpy(read_video(source)).permute(3, 0, 1, 2)[None] / 127.5 - 1
    config = pipeline.vae.config
    with torch.no_grad():
        latents = pipeline.vae.encode(video).latent_dist.mode()
    shape = (1, -1, 1, 1, 1)
    return ((latents - torch.tensor(config.latents_mean).view(shape)) / torch.tensor(config.latents_std).view(shape))[
        0
    ]


def test_every_video_and_prompt_equals_encoding_it_by_hand(pipeline, tmp_path):
    raw = tiny_group_dataset(n=3, m=2)
    encoded = encode(raw, pipeline, tmp_path, batch_size=4)
    assert len(encoded) == 3 and encoded.skipped == []
    for row, example in zip(raw, encoded, strict=True):
        assert list(example) == ["prompt", "chosen_latents", "rejected_latents", "prompt_embeds", "rejected_scores"]
        assert example["prompt"] == row["prompt"]
        assert example["chosen_latents"].dtype == torch.float32
        rounding.assert_close(example["chosen_latents"], by_hand(pipeline, row["chosen"]), rounding.SINGLE)
        for latents, video in zip(example["rejected_latents"], row["rejected"], strict=True):
            rounding.assert_close(latents, by_hand(pipeline, video), rounding.SINGLE)
        padded, _ = pipeline.encode_prompt(
            row["prompt"], do_classifier_free_guidance=False, max_sequence_length=MAX_SEQUENCE_LENGTH
        )
        length = len(row["prompt"].split()) + 1
        assert example["prompt_embeds"].shape[0] == length
        rounding.assert_close(example["prompt_embeds"], padded[0, :length], rounding.SINGLE)
        scores = [[score["sa"], score["pc"]] for score in row["rejected_scores"]]
        assert example["rejected_scores"].tolist() == scores


def test_video_and_preference_rows(pipeline, tmp_path):
    videos = [{"prompt": "a red ball falls", "video": tiny_video(0)}]
    example = encode(videos, pipeline, tmp_path, row_type="video")[0]
    assert list(example) == ["prompt", "latents", "prompt_embeds"]
    pairs = [{"prompt": "a red ball falls", "chosen": tiny_video(0), "rejected": tiny_video(1)}]
    pair = encode(pairs, pipeline, tmp_path, row_type="preference")[0]
    assert pair["rejected_latents"].shape == (1, 4, 2, 4, 4) and "rejected_scores" not in pair
    rounding.assert_close(pair["chosen_latents"], example["latents"], rounding.SINGLE)


def test_files_bytes_and_arrays_encode_to_the_same_latents(pipeline, tmp_path):
    path = write_video(tmp_path / "clip.mp4", tiny_video(0), fps=8)
    cells = [str(path), path, {"path": "x", "bytes": path.read_bytes()}, read_video(path)]
    rows = [{"prompt": "a red ball falls", "video": cell} for cell in cells]
    encoded = encode(rows, pipeline, tmp_path / "cache", row_type="video")
    for example in encoded:
        rounding.assert_close(example["latents"], encoded[0]["latents"], rounding.SINGLE)


def test_size_options_reach_the_pixels(pipeline, tmp_path):
    path = write_video(tmp_path / "clip.mp4", tiny_video(0, num_frames=12, height=48, width=64), fps=8)
    rows = [{"prompt": "a red ball falls", "video": path}]
    options = {"num_frames": 5, "fps": 4, "height": 16, "width": 24}
    example = encode(rows, pipeline, tmp_path / "cache", row_type="video", **options)[0]
    expected = by_hand(pipeline, read_video(path, **options))
    assert expected.shape == (4, 2, 2, 3)
    rounding.assert_close(example["latents"], expected, rounding.SINGLE)


def test_each_distinct_video_and_prompt_is_encoded_once(pipeline, tmp_path):
    """The same content under several names and in several rows; the same prompt in several rows."""
    files = [write_video(tmp_path / f"{k}.mp4", tiny_video(k % 3), fps=8) for k in range(6)]  # 3 contents
    rows = [
        {"prompt": prompt, "chosen": files[a], "rejected": [files[b], files[c]]}
        for prompt, a, b, c in (("a ball", 0, 1, 2), ("a red ball", 3, 4, 5), ("a ball", 1, 3, 2))
    ]
    family = CountingFamily()
    encoded = encode(rows, pipeline, tmp_path / "cache", family=family, batch_size=2)
    assert sum(family.videos) == 3 and max(family.videos) == 2
    assert sorted(family.prompts) == ["a ball", "a red ball"]
    assert torch.equal(encoded[0]["chosen_latents"], encoded[1]["chosen_latents"])
    assert torch.equal(encoded[0]["chosen_latents"], encoded[2]["rejected_latents"][0])
    assert not torch.equal(encoded[0]["chosen_latents"], encoded[2]["chosen_latents"])


def test_second_call_does_no_encoding(pipeline, tmp_path):
    first = encode(tiny_group_dataset(n=2), pipeline, tmp_path)
    family = CountingFamily()
    second = encode(tiny_group_dataset(n=2), tiny_wan_pipeline(), tmp_path, family=family)
    assert family.videos == [] and family.prompts == []
    assert second.directory == first.directory
    for one, other in zip(first, second, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one if name != "prompt")


def test_batch_size_and_device_are_not_part_of_the_fingerprint(pipeline, tmp_path):
    rows = array_rows()
    assert encode(rows, pipeline, tmp_path, batch_size=1).fingerprint == encode(rows, pipeline, tmp_path).fingerprint


def changed_vae(pipeline):
    with torch.no_grad():
        next(pipeline.vae.parameters()).view(-1)[0] += 1e-2


def changed_text_encoder(pipeline):
    with torch.no_grad():
        next(pipeline.text_encoder.parameters())[1, 0] += 1e-2  # one number of the embedding of </s>


def changed_latent_statistics(pipeline):
    pipeline.vae.register_to_config(latents_mean=[0.0, 0.0, 0.0, 0.5])


@pytest.mark.parametrize("change", [changed_vae, changed_text_encoder, changed_latent_statistics])
def test_other_weights_are_another_fingerprint(pipeline, tmp_path, change):
    other = tiny_wan_pipeline()
    before = encode(array_rows(1), pipeline, tmp_path)
    change(other)
    after = encode(array_rows(1), other, tmp_path)
    assert after.fingerprint != before.fingerprint
    name = "prompt_embeds" if change is changed_text_encoder else "chosen_latents"
    assert not torch.equal(after[0][name], before[0][name])


def test_other_data_or_settings_are_another_fingerprint(pipeline, tmp_path):
    rows = array_rows()
    fingerprints = [encode(rows, pipeline, tmp_path).fingerprint]
    variants = [
        [rows[0] | {"prompt": "the green ball bounces"}, rows[1]],
        [rows[0] | {"rejected": rows[0]["rejected"][::-1]}, rows[1]],
        [rows[0] | {"chosen": tiny_video(99)}, rows[1]],
        [row | {"rejected_scores": [{"sa": 0.5, "pc": 0.5}] * 2} for row in rows],
        [row | {"rejected_scores": [{"sa": 0.5, "pc": 0.6}] * 2} for row in rows],
        rows[::-1],
        rows[:1],
    ]
    fingerprints += [encode(variant, pipeline, tmp_path).fingerprint for variant in variants]
    options = [{"num_frames": 1}, {"height": 16, "width": 16}, {"max_sequence_length": 8}, {"on_bad_video": "skip"}]
    fingerprints += [encode(rows, pipeline, tmp_path, **option).fingerprint for option in options]
    assert len(set(fingerprints)) == 1 + len(variants) + len(options)


def test_a_file_that_changes_under_the_same_name_is_another_fingerprint(pipeline, tmp_path):
    path = write_video(tmp_path / "clip.mp4", tiny_video(0), fps=8)
    rows = [{"prompt": "a red ball falls", "video": path}]
    before = encode(rows, pipeline, tmp_path / "cache", row_type="video")
    stat = path.stat()
    write_video(path, tiny_video(1), fps=8)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # time stamps prove nothing
    after = encode(rows, pipeline, tmp_path / "cache", row_type="video")
    assert not torch.equal(before[0]["latents"], after[0]["latents"])


def test_vae_and_text_encoder_end_on_the_cpu_untouched(tmp_path):
    pipeline = tiny_wan_pipeline()
    pipeline.vae.train()
    before = {name: tensor.clone() for name, tensor in pipeline.vae.state_dict().items()}
    trainable = [parameter.requires_grad for parameter in pipeline.vae.parameters()]
    encode(array_rows(1), pipeline, tmp_path)
    for module in (pipeline.vae, pipeline.text_encoder):
        assert not module.training
        assert {(p.device.type, p.dtype, p.grad) for p in module.parameters()} == {("cpu", torch.float32, None)}
    assert trainable == [parameter.requires_grad for parameter in pipeline.vae.parameters()]
    assert all(torch.equal(tensor, before[name]) for name, tensor in pipeline.vae.state_dict().items())


def test_wrong_frame_count_is_found_before_any_encoding(pipeline, tmp_path):
    rows = array_rows()
    rows[1]["rejected"][1] = rows[1]["rejected"][0] = rows[1]["chosen"] = tiny_video(0, num_frames=7)
    family = CountingFamily()
    with pytest.raises(ValueError, match=r"row 1, chosen .*4 \* k \+ 1 frames.*got 7\. Set `num_frames` to 5 or 9"):
        encode(rows, pipeline, tmp_path, family=family)
    assert family.videos == [] and family.prompts == [] and list(tmp_path.iterdir()) == []


def test_side_that_the_vae_cannot_divide(pipeline, tmp_path):
    rows = [{"prompt": "a ball", "video": tiny_video(0, height=36)}]
    with pytest.raises(ValueError, match=r"row 0, video .*divisible by 8.*got 36x32"):
        encode(rows, pipeline, tmp_path, row_type="video")


def test_sizes_may_differ_between_rows_but_not_within_one(pipeline, tmp_path):
    small = [tiny_video(seed, height=16) for seed in range(3)]
    rows = [*array_rows(1), {"prompt": "a ball", "chosen": small[0], "rejected": small[1:]}]
    encoded = encode(rows, pipeline, tmp_path)
    assert [tuple(example["chosen_latents"].shape) for example in encoded] == [(4, 2, 4, 4), (4, 2, 2, 4)]
    rows[1]["rejected"] = [small[1], tiny_video(7)]
    with pytest.raises(ValueError, match=r"row 1, rejected\[1\] .*expected .*\(5, 16, 32\).*got \(5, 32, 32\)"):
        encode(rows, pipeline, tmp_path)


def bad_file(path: Path, kind: str) -> Path:
    if kind == "corrupt":
        path.write_bytes(b"no video" * 200)
    elif kind == "truncated":
        video = np.random.default_rng(0).integers(0, 256, (9, 32, 32, 3), dtype=np.uint8)
        data = write_video(path, video, fps=8).read_bytes()
        path.write_bytes(data[: 3 * len(data) // 4])
    elif kind == "empty":
        path.touch()
    elif kind == "short":
        write_video(path, tiny_video(0, num_frames=3), fps=8)
    return path


@pytest.mark.parametrize("kind", ["corrupt", "truncated", "empty", "missing", "short"])
def test_bad_video_stops_the_run_before_any_encoding(pipeline, tmp_path, kind):
    rows = array_rows()
    rows[1]["rejected"][0] = bad_file(tmp_path / "broken.mp4", kind)
    family = CountingFamily()
    with pytest.raises(VideoDecodeError, match=r"row 1, rejected\[0\] \(.*broken\.mp4\): .*on_bad_video='skip'"):
        encode(rows, pipeline, tmp_path / "cache", family=family, num_frames=5)
    assert family.videos == [] and family.prompts == [] and not (tmp_path / "cache").exists()


@pytest.mark.parametrize("kind", ["corrupt", "truncated", "empty", "missing", "short"])
def test_bad_video_is_skipped_by_option_and_reported(pipeline, tmp_path, kind, caplog):
    rows = array_rows(3)
    rows[1]["rejected"][0] = bad_file(tmp_path / "broken.mp4", kind)
    for _ in range(2):  # the second time from the cache: the report must not depend on it
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="video_trl"):
            encoded = encode(rows, pipeline, tmp_path / "cache", on_bad_video="skip", num_frames=5)
        assert [example["prompt"] for example in encoded] == [rows[0]["prompt"], rows[2]["prompt"]]
        assert [skipped.row for skipped in encoded.skipped] == [1]
        assert encoded.skipped[0].video == f"row 1, rejected[0] ({tmp_path / 'broken.mp4'})"
        assert "Left out 1 of 3 rows" in caplog.text and "broken.mp4" in caplog.text
    good = encode(rows[::2], pipeline, tmp_path / "cache", num_frames=5)
    for example, expected in zip(encoded, good, strict=True):
        assert torch.equal(example["chosen_latents"], expected["chosen_latents"])


def test_equal_damage_is_reported_under_each_name(pipeline, tmp_path, caplog):
    """Two empty files have one content and two names; both rows must be findable."""
    rows = array_rows(3)
    rows[0]["chosen"] = bad_file(tmp_path / "first.mp4", "empty")
    rows[2]["rejected"][1] = bad_file(tmp_path / "second.mp4", "empty")
    with caplog.at_level(logging.WARNING, logger="video_trl"):
        encoded = encode(rows, pipeline, tmp_path / "cache", on_bad_video="skip")
    assert [skipped.row for skipped in encoded.skipped] == [0, 2]
    assert "first.mp4" in encoded.skipped[0].video and "second.mp4" in encoded.skipped[1].video
    assert "Left out 2 of 3 rows" in caplog.text and "first.mp4" in caplog.text and "second.mp4" in caplog.text


def test_a_cache_made_by_skipping_does_not_silence_raise(pipeline, tmp_path):
    rows = array_rows()
    rows[0]["chosen"] = bad_file(tmp_path / "broken.mp4", "corrupt")
    encode(rows, pipeline, tmp_path / "cache", on_bad_video="skip")
    with pytest.raises(VideoDecodeError, match="broken.mp4"):
        encode(rows, pipeline, tmp_path / "cache")


def test_nothing_left_after_skipping(pipeline, tmp_path):
    rows = [{"prompt": "a ball", "video": bad_file(tmp_path / "broken.mp4", "empty")}]
    with pytest.raises(ValueError, match=r"No row is left: all 1 .*broken\.mp4"):
        encode(rows, pipeline, tmp_path / "cache", row_type="video", on_bad_video="skip")


def test_latents_that_are_not_finite_are_named(tmp_path):
    pipeline = tiny_wan_pipeline()
    with torch.no_grad():
        next(pipeline.vae.parameters()).fill_(torch.inf)
    with pytest.raises(ValueError, match=r"row 0, chosen .*not finite.*float32"):
        encode(array_rows(1), pipeline, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_options_and_components_are_checked_first(pipeline, tmp_path):
    with pytest.raises(ValueError, match="`on_bad_video` must be 'raise' or 'skip', got 'replace'"):
        encode(array_rows(), pipeline, tmp_path, on_bad_video="replace")
    with pytest.raises(ValueError, match="`batch_size` must be at least 1"):
        encode(array_rows(), pipeline, tmp_path, batch_size=0)
    bare = tiny_wan_pipeline()
    bare.register_modules(text_encoder=None)
    with pytest.raises(ValueError, match="no 'text_encoder' to encode with"):
        encode(array_rows(), bare, tmp_path)


def test_shards_split_and_read_back_and_survive_pickling(tmp_path):
    tensors = {f"videos/{k}": torch.full((4, 2, 2, 2), float(k)) for k in range(5)}
    rows = [{"prompt": "a", "video": key, "prompt_embeds": key} for key in tensors]
    with EncodedWriter(tmp_path / "video-x", "video", "x", shard_bytes=200) as writer:
        for key, tensor in tensors.items():
            writer.add(key, tensor)
        writer.finish(rows, [])
    assert len(list((tmp_path / "video-x").glob("*.safetensors"))) == 3  # 128 bytes each, two a shard
    encoded = EncodedDataset(tmp_path / "video-x")
    encoded[0]
    for copy in (encoded, pickle.loads(pickle.dumps(encoded))):  # as a DataLoader worker gets it
        assert [example["latents"].mean().item() for example in copy] == [0, 1, 2, 3, 4]
    loader = torch.utils.data.DataLoader(encoded, batch_size=None, num_workers=1)
    assert [example["latents"].mean().item() for example in loader] == [0, 1, 2, 3, 4]


def test_behind_a_damaged_shard_of_an_unfinished_folder_all_is_written_again(tmp_path):
    def write(*, stop: bool) -> None:
        with EncodedWriter(tmp_path / "video-x", "video", "x", shard_bytes=16) as writer:
            for number in range(4):
                writer.add(f"videos/{number}", torch.full((4,), float(number)))  # a shard each
            if stop:
                raise InterruptedError
            writer.finish([{"video": f"videos/{n}", "prompt_embeds": "videos/0", "prompt": "a"} for n in range(4)], [])

    with pytest.raises(InterruptedError):
        write(stop=True)
    (folder,) = unfinished_folders(tmp_path)
    shard = folder / "00001.safetensors"
    flip(shard, len(shard.read_bytes()) - 1)
    write(stop=False)
    assert [row["latents"].mean().item() for row in EncodedDataset(tmp_path / "video-x")] == [0, 1, 2, 3]


def test_folder_that_lost_a_piece_is_not_read(pipeline, tmp_path):
    encoded = encode(array_rows(), pipeline, tmp_path)
    shard = next(encoded.directory.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ValueError, match=rf"{shard.name}: expected \d+ bytes, got \d+\. Delete .* and encode again"):
        encode(array_rows(), pipeline, tmp_path)
    shard.unlink()
    with pytest.raises(ValueError, match="bytes, got None"):
        EncodedDataset(encoded.directory)
    with pytest.raises(ValueError, match="is not an encoded dataset"):
        EncodedDataset(tmp_path)


def start(function: Callable[..., None], *arguments: object) -> BaseProcess:
    """A process of its own, forked: importing everything again would take longer than the test."""
    process = multiprocessing.get_context("fork").Process(target=function, args=arguments)
    process.start()
    return process


def video_rows(n: int) -> list[dict]:
    return [{"prompt": "a ball falls", "video": tiny_video(seed, num_frames=9)} for seed in range(n)]


@dataclasses.dataclass(frozen=True)
class DyingFamily(CountingFamily):
    """Kills its process when it is asked to encode the videos of a batch."""

    batch: int = 0

    def encode_video(self, vae, video):
        if len(self.videos) == self.batch:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().encode_video(vae, video)


def encode_until(batch: int, cache_dir: Path, rows: list[dict]) -> None:
    store._SECONDS_AT_STAKE = 0  # every tensor is written at once
    store._PROPORTION_AT_STAKE = 0
    encode(rows, tiny_wan_pipeline(), cache_dir, family=DyingFamily(batch=batch), row_type="video", batch_size=2)


def test_a_killed_encoding_goes_on_where_it_was_and_leaves_nothing(pipeline, tmp_path):
    rows = video_rows(6)
    for batch in (0, 1, 1):
        process = start(encode_until, batch, tmp_path / "cache", rows)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        (unfinished,) = (tmp_path / "cache").iterdir()
        assert unfinished.name.endswith(".unfinished")
    last = max(unfinished.glob("*.safetensors"))
    last.write_bytes(last.read_bytes()[:-1])  # a power cut on a disk that does not keep its word
    family = CountingFamily()
    encoded = encode(rows, pipeline, tmp_path / "cache", family=family, row_type="video", batch_size=2)
    assert family.videos == [2, 2] and family.prompts == []  # batches stay whole, so that no bit depends on the kill
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [encoded.directory.name]
    assert not [path for path in encoded.directory.iterdir() if path.name.startswith(".")]
    straight = encode(rows, pipeline, tmp_path / "straight", row_type="video", batch_size=2)
    for example, expected in zip(encoded, straight, strict=True):
        assert torch.equal(example["latents"], expected["latents"])
        assert torch.equal(example["prompt_embeds"], expected["prompt_embeds"])


def encode_and_count(number: int, folder: Path, rows: list[dict]) -> None:
    family = CountingFamily()
    encoded = encode(rows, tiny_wan_pipeline(), folder / "cache", family=family, row_type="video", batch_size=1)
    (folder / f"{number}.json").write_text(json.dumps([len(family.videos), encoded[0]["latents"].sum().item()]))


def test_of_two_runs_in_one_cache_one_encodes_and_the_other_waits_for_it(tmp_path):
    processes = [start(encode_and_count, number, tmp_path, video_rows(4)) for number in range(2)]
    for process in processes:
        process.join()
    counts, sums = zip(*(json.loads((tmp_path / f"{number}.json").read_text()) for number in range(2)), strict=True)
    assert sorted(counts) == [0, 4] and sums[0] == sums[1]
    assert len(list((tmp_path / "cache").iterdir())) == 1


@dataclasses.dataclass(frozen=True)
class SwappingFamily(CountingFamily):
    """Exchanges a file when all are hashed and checked, and none is encoded."""

    path: Path = Path()

    def encode_prompt(self, pipeline, prompts, max_sequence_length):
        write_video(self.path, tiny_video(7), fps=8)
        return super().encode_prompt(pipeline, prompts, max_sequence_length)


def test_a_file_that_is_exchanged_while_it_is_encoded_is_noticed(pipeline, tmp_path):
    paths = [write_video(tmp_path / f"{number}.mp4", tiny_video(number), fps=8) for number in range(2)]
    rows = [{"prompt": "a ball falls", "video": path} for path in paths]
    family = SwappingFamily(path=paths[1])
    with pytest.raises(ValueError, match=r"row 1, video \(.*1\.mp4\): the file has changed since encoding began"):
        encode(rows, pipeline, tmp_path / "cache", family=family, row_type="video")
    encoded = encode(rows, pipeline, tmp_path / "cache", row_type="video")
    rounding.assert_close(encoded[1]["latents"], by_hand(pipeline, paths[1]), rounding.SINGLE)


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 64
    path.write_bytes(content)


def test_damage_is_noticed_when_it_is_read(pipeline, tmp_path):
    encoded = encode(video_rows(2), pipeline, tmp_path, row_type="video")
    (shard,) = encoded.directory.glob("*.safetensors")
    whole = shard.read_bytes()
    header = int.from_bytes(whole[:8], "little") + 8
    for position in (0, 9, header - 2, header, len(whole) - 1):  # its length, its text, first and last byte of tensors
        flip(shard, position)
        with pytest.raises(ValueError, match=rf"{shard.name} is damaged: .*Delete .* and encode again"):
            for _ in EncodedDataset(encoded.directory):
                pass
        shard.write_bytes(whole)
    shard.write_bytes(whole[:header] + bytes(len(whole) - header))  # as a file system leaves it that lost the content
    with pytest.raises(ValueError, match="is damaged: the checksum of"):
        EncodedDataset(encoded.directory)[0]


def test_a_damaged_index_and_one_of_another_version_are_refused(pipeline, tmp_path):
    encoded = encode(video_rows(1), pipeline, tmp_path, row_type="video")
    index = encoded.directory / "index.json"
    text = index.read_text()
    for broken, words in (
        (text.replace('"row_type": "video"', '"row_type": "group"'), "is damaged: its checksum differs"),
        (text[:100], "cannot be read as JSON"),
        (text.replace('"format": 3', '"format": 2'), "is not in format 3"),
        ("[]", "is not in format 3"),
    ):
        index.write_text(broken)
        with pytest.raises(ValueError, match=rf"{words}.* Delete .* and encode again"):
            EncodedDataset(encoded.directory)
    index.write_text(text)
    assert len(EncodedDataset(encoded.directory)) == 1
    for name in ("rows.arrow", "tensors.arrow"):
        whole = (encoded.directory / name).read_bytes()
        for broken in (whole[:-1], whole.replace(whole[64:65], b"\xff")):
            (encoded.directory / name).write_bytes(broken)
            with pytest.raises(ValueError, match=rf"{name} is missing or damaged. Delete .* and encode again"):
                EncodedDataset(encoded.directory)
        (encoded.directory / name).write_bytes(whole)


@pytest.mark.parametrize("chunk", [1, 2, 9])
def test_rows_of_an_index_come_back_as_they_were_written(tmp_path, monkeypatch, chunk):
    """Scores, weights, prompts that are no Unicode, conditions and several forms; what is asked of all at once."""
    monkeypatch.setattr(index, "_CHUNK", chunk)
    shapes = [(4, 2, 2, 2), (4, 1, 2, 2)]
    with EncodedWriter(tmp_path / "group-x", "group", "x") as writer:
        for kind, shape in enumerate(shapes):
            for number in range(3):
                writer.add(f"v{kind}{number}", torch.full(shape, float(number)))
        writer.add("p", torch.ones(5, 8))
        writer.add("rate", torch.tensor(8.0))
        rows = [
            {
                "prompt": "a \udce9",
                "chosen": "v00",
                "rejected": ["v01", "v02"],
                "rejected_scores": [[0.1, 0.2], [1, 0]],
            },
            {"prompt": "b", "chosen": "v10", "rejected": ["v11", "v10"], "rejected_scores": None},
            {"prompt": "c", "chosen": "v01", "rejected": ["v02", "v00"], "rejected_scores": None},
        ]
        writer.finish(
            [
                row | {"prompt_embeds": "p", "frame_rate": "rate", "weight": w}
                for row, w in zip(rows, [None, 2.0, 0.5], strict=True)
            ],
            [],
        )
    encoded = EncodedDataset(tmp_path / "group-x")
    assert [row["prompt"] for row in encoded] == ["a \udce9", "b", "c"]
    assert [row.get("weight") for row in encoded] == [None, 2.0, 0.5]
    columns = {"prompt", "prompt_embeds", "chosen_latents", "rejected_latents", "rejected_scores", "frame_rate"}
    assert set(column_names(encoded)) == columns | {"weight"}  # of which the first row has none
    assert encoded[0]["rejected_scores"].tolist() == torch.tensor([[0.1, 0.2], [1, 0]]).tolist()
    assert "rejected_scores" not in encoded[1] and encoded[-1]["frame_rate"].item() == 8.0
    assert [row["rejected_latents"].flatten(1).mean(1).tolist() for row in encoded] == [[1, 2], [1, 0], [2, 0]]
    assert encoded[1]["chosen_latents"].shape == shapes[1] and encoded[2]["chosen_latents"].mean() == 1
    assert encoded.rejected_counts() == [2, 2, 2] and encoded.index.twins() == [1]
    assert list(encoded.rejected_scores()) == [[[0.1, 0.2], [1, 0]], None, None]
    assert not encoded.scores_are_whole()
    assert encoded.index.form_of() == [0, 1, 0] and encoded.forms[1]["rejected"] == [list(shapes[1])] * 2
    with pytest.raises(IndexError):
        encoded[3]


def encode_on_a_full_disk(folder: Path) -> None:
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), sys.stderr.fileno())  # captured in a file, and that is about to be full
    pipeline = tiny_wan_pipeline()
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
    try:
        encode(video_rows(8), pipeline, folder / "cache", row_type="video")
    except OSError as error:
        (folder / "error.txt").write_text(str(error))


def test_full_disk_raises_and_leaves_nothing(tmp_path):
    start(encode_on_a_full_disk, tmp_path).join()
    assert "File too large" in (tmp_path / "error.txt").read_text()
    assert list((tmp_path / "cache").iterdir()) == []


def encode_in_every_process(rank: int, folder: Path, rows: list[dict]) -> None:
    os.environ["LOCAL_RANK"] = str(rank)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    family = CountingFamily()
    try:
        encoded = encode(rows, tiny_wan_pipeline(), folder / "cache", family=family, row_type="video")
        result = [sum(family.videos), encoded[3]["latents"].sum().item(), encoded.directory.name]
    except ValueError as error:
        result = [str(error)]
    (folder / f"{rank}.json").write_text(json.dumps(result))
    dist.destroy_process_group()


def in_two_processes(folder: Path, rows: list[dict]) -> tuple[list, list]:
    processes = [start(encode_in_every_process, rank, folder, rows) for rank in range(2)]
    for process in processes:
        process.join(timeout=100)
    assert [process.exitcode for process in processes] == [0, 0]
    return tuple(json.loads((folder / f"{rank}.json").read_text()) for rank in range(2))


def test_of_two_processes_one_encodes_and_both_load(tmp_path):
    first, second = in_two_processes(tmp_path, video_rows(4))
    assert first[0] == 4 and second[0] == 0
    assert first[1:] == second[1:]


def test_of_two_processes_both_fail_when_one_does(tmp_path):
    """The second one must not wait for a cache that never comes."""
    rows = video_rows(4)
    rows[2]["video"] = "gone.mp4"
    for error in in_two_processes(tmp_path, rows):
        assert "row 2, video (gone.mp4)" in error[0]


def test_embedded_parquet_of_a_stranger_trains_as_it_is(pipeline, tmp_path):
    """Columns as `load_dataset` gives them: video features that want torchcodec, bytes inside, a numpy format."""
    row = {
        "prompt": "a red ball",
        "chosen": {"path": "a.mp4", "bytes": tiny_mp4(0)},
        "rejected": [{"bytes": tiny_mp4(1)}],
    }
    features = datasets.Features(
        {"prompt": datasets.Value("string"), "chosen": datasets.Video(), "rejected": datasets.List(datasets.Video())}
    )
    dataset = datasets.Dataset.from_list([row], features=features).with_format("numpy")
    example = encode(dataset, pipeline, tmp_path)[0]
    rounding.assert_close(example["chosen_latents"], by_hand(pipeline, row["chosen"]), rounding.SINGLE)


# ---- The key of the cache, and numbers that are not finite ----


def tile(pipeline):
    pipeline.vae.enable_tiling(16, 16, 8, 8)


def cut_from_the_left(pipeline):
    pipeline.tokenizer.truncation_side = "left"


def fill_on_the_left(pipeline):
    pipeline.tokenizer.padding_side = "left"


def lower_case(pipeline):
    pipeline.tokenizer.backend_tokenizer.normalizer = tokenizers.normalizers.Lowercase()


def scale_attribute(pipeline):
    pipeline.vae.encoder.mid_block.attentions[0].norm.scale *= 2


def text_encoder_eps(pipeline):
    pipeline.text_encoder.encoder.final_layer_norm.variance_epsilon = 1e-3


def hook_on_the_vae(pipeline):
    pipeline.vae.encoder.register_forward_hook(lambda module, inputs, output: output * 2)


def other_method(pipeline):
    encode_as_before = pipeline.vae.encode
    pipeline.vae.encode = lambda video, **options: encode_as_before(video * 0.5, **options)


CHANGES = [
    tile, cut_from_the_left, fill_on_the_left, lower_case, scale_attribute, text_encoder_eps, hook_on_the_vae,
    other_method,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_what_decides_the_numbers_is_in_the_key(tmp_path, change):
    """Also where neither weights nor configuration say it; what does not, is not."""
    rows = [{"prompt": "A red ball falls", "video": tiny_video(0)}]
    pipeline = tiny_wan_pipeline()
    first = encode(rows, pipeline, tmp_path, row_type="video")
    pipeline.vae.train()
    pipeline.text_encoder.name_or_path = "elsewhere"
    assert encode(rows, pipeline, tmp_path, row_type="video").directory == first.directory
    change(pipeline)
    assert encode(rows, pipeline, tmp_path, row_type="video").directory != first.directory


def test_prompts_that_are_not_finite_are_not_cached(tmp_path):
    pipeline = tiny_wan_pipeline()
    pipeline.text_encoder.encoder.final_layer_norm.weight.data.fill_(math.nan)
    with pytest.raises(ValueError, match="The prompt 'a red ball falls': encoding it .*text encoder in float32"):
        encode(array_rows(1), pipeline, tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_writer_takes_finite_numbers_only(tmp_path, value):
    with pytest.raises(ValueError, match="a/b: encoding it returned numbers that are not finite"):
        with EncodedWriter(tmp_path / "data", "video", "0") as writer:
            writer.add("a/b", torch.tensor([0.0, value]))
    assert not (tmp_path / "data").exists()


def test_prompts_that_are_cut_are_told(tmp_path, caplog):
    rows = [{"prompt": prompt, "video": tiny_video(0)} for prompt in ("a red ball", " ".join(["a red ball"] * 4))]
    with caplog.at_level(logging.WARNING):
        encode(rows, tiny_wan_pipeline(), tmp_path, row_type="video", max_sequence_length=8)
    assert "1 of 2 prompts are longer than 8 tokens" in caplog.text and "the longest has 13" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        encode(rows[:1], tiny_wan_pipeline(), tmp_path, row_type="video", max_sequence_length=8)
    assert "longer than" not in caplog.text


@pytest.mark.parametrize(
    "scores, whole",
    [
        ([[0.0, 1.0], [0.5, 0.5]], True),
        ([[0.0, 1.0]], False),
        ([[0.0, 1.0], [0.5]], False),
        ([[0.0, 1.0], [0.5, 1.01]], False),
        ([[0.0, 1.0], [0.5, math.nan]], False),
        ([[0.0, 1.0], None], False),
        (None, False),
    ],
)
@pytest.mark.parametrize("chunk", [1, 9])
def test_scores_of_all_rows_are_looked_at_together(tmp_path, monkeypatch, scores, whole, chunk):
    monkeypatch.setattr(index, "_CHUNK", chunk)
    with EncodedWriter(tmp_path / "group-x", "group", "x") as writer:
        writer.add("v", torch.ones(4, 1, 2, 2))
        row = {"prompt": "a", "chosen": "v", "rejected": ["v", "v"], "prompt_embeds": "v"}
        writer.finish([row | {"rejected_scores": each} for each in ([[0.1, 0.2], [1, 0]], scores)], [])
    assert EncodedDataset(tmp_path / "group-x").scores_are_whole() == whole
