import io
import json
import os
import shutil
import subprocess
import tarfile

import datasets
import pytest

from tests.support.curation.clips import SMALL, first_stages, write_clip
from tests.support.tiny import tiny_mp4
from video_trl.curation import GTPairConfig
from video_trl.curation.clips.sources import decode_clips, list_clips, open_clip
from video_trl.data import VideoDecodeError, read_video, video_hash


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "clips"
    (root / "deep" / "er").mkdir(parents=True)
    for name in ("b.mp4", "a.MP4", "deep/er/a.MP4", "Prüfung 视频 🎈.mkv", ".hidden.mp4", "notes.pdf"):
        (root / name).write_bytes(b"no pixels are read here")
    return root


def rows_of(*sources, tmp_path, **options):
    return list_clips(sources, spool=tmp_path / "spool", **options).to_pylist()


def test_folders_are_searched_through_in_order_and_names_may_repeat(folder, tmp_path, caplog):
    rows = rows_of(folder, tmp_path=tmp_path)
    assert [row["source_id"].removeprefix(f"{folder}/") for row in rows] == [
        "Prüfung 视频 🎈.mkv", "a.MP4", "b.mp4", "deep/er/a.MP4",
    ]  # fmt: skip
    assert len({row["listing"] for row in rows}) == 4 and all(row["prompt"] is None for row in rows)
    assert "1 of .pdf" in caplog.text  # what is not taken is said
    (folder / "linked").symlink_to(folder / "deep")
    assert rows_of(folder, tmp_path=tmp_path) == rows and "linked is a link to a folder" in caplog.text


def test_a_file_that_changes_is_another_listing(folder, tmp_path):
    before = {row["source_id"]: row["listing"] for row in rows_of(folder, tmp_path=tmp_path)}
    (folder / "b.mp4").write_bytes(b"other bytes")
    after = {row["source_id"]: row["listing"] for row in rows_of(folder, tmp_path=tmp_path)}
    assert [name for name in before if before[name] != after[name]] == [f"{folder}/b.mp4"]


def test_captions_come_from_sidecars_and_metadata(folder, tmp_path, caplog):
    (folder / "a.txt").write_text("  a ball falls \n", encoding="utf-8")
    (folder / "b.json").write_text(json.dumps({"caption": "a ball rolls"}))
    (folder / "metadata.csv").write_text(
        "file_name,prompt\ndeep/er/a.MP4,einen Ball\nPrüfung 视频 🎈.mkv,ein Ball, der rollt\n", "utf-8"
    )
    (folder / "Prüfung 视频 🎈.json").write_text("{broken")
    prompts = {row["source_id"].rsplit("clips/")[-1]: row["prompt"] for row in rows_of(folder, tmp_path=tmp_path)}
    assert prompts == {
        "a.MP4": "a ball falls",
        "b.mp4": "a ball rolls",
        "deep/er/a.MP4": "einen Ball",
        "Prüfung 视频 🎈.mkv": None,
    }
    assert "a caption is no JSON" in caplog.text and "row 2 has another number of cells" in caplog.text


def test_captions_are_found_in_capitals_and_a_bad_line_costs_its_own(folder, tmp_path, caplog):
    (folder / "a.TXT").write_bytes(b"\xef\xbb\xbfa ball falls")  # with the mark that Windows writes
    (folder / "b.Json").write_text(json.dumps({"text": "a ball rolls"}))
    (folder / "metadata.jsonl").write_text('{"file_name": "deep/er/a.MP4", "text": "einen"}\n\n{broken\n"text"\n[1]\n')
    with tarfile.open(folder / "shard.tar", "w") as tar:
        for name, content in (("0.MP4", b"x"), ("0.TXT", b"in a tar")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    prompts = {row["source_id"].rsplit("clips/")[-1]: row["prompt"] for row in rows_of(folder, tmp_path=tmp_path)}
    assert prompts.pop("Prüfung 视频 🎈.mkv") is None
    assert prompts == {
        "a.MP4": "a ball falls",
        "b.mp4": "a ball rolls",
        "deep/er/a.MP4": "einen",
        "shard.tar/0.MP4": "in a tar",
    }
    assert "metadata.jsonl, line 3 is no JSON" in caplog.text
    assert rows_of(folder / "a.MP4", tmp_path=tmp_path)[0]["prompt"] == "a ball falls"


def test_a_name_that_is_no_text_is_dropped_by_name(folder, tmp_path):
    """Names are bytes on Linux, and parquet holds texts."""
    with open(os.fsencode(folder) + b"/bad\xff.mp4", "wb") as file:
        file.write(b"x")
    bad = [row for row in rows_of(folder, tmp_path=tmp_path) if row["dropped_by"]]
    assert [(row["dropped_by"], row["path"]) for row in bad] == [("file_name", None)]
    assert "bad\\udcff.mp4" in bad[0]["source_id"] and "rename" in bad[0]["detail"]


def test_tars_are_read_in_place(tmp_path):
    data = [tiny_mp4(seed) for seed in range(2)]
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        for name, content in (
            ("000.mp4", data[0]),
            ("000.txt", b"first"),
            ("sub/000.mp4", data[1]),
            ("sub/000.json", json.dumps({"text": "second"}).encode()),
        ):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    (tmp_path / "clips").mkdir()
    os.rename(tmp_path / "shard.tar", tmp_path / "clips" / "shard.tar")  # found inside a folder as well
    rows = rows_of(tmp_path / "clips", tmp_path=tmp_path)
    assert [row["prompt"] for row in rows] == ["first", "second"]
    assert [row["source_id"].rsplit("/clips/")[-1] for row in rows] == ["shard.tar/000.mp4", "shard.tar/sub/000.mp4"]
    for row, content in zip(rows, data, strict=True):
        clip = open_clip(row["path"], row["offset"], row["length"])
        assert clip["bytes"] == content and len(read_video(clip)) == 5
    assert not (tmp_path / "spool").exists()


def test_a_tar_that_goes_away_costs_its_rows_and_no_run(tmp_path):
    from video_trl.curation.clips.container import read_containers
    from video_trl.curation.clips.measures import measure_batch

    batch = {"path": [str(tmp_path / "gone.tar")], "offset": [512], "length": [100]}
    assert read_containers(batch)["dropped_by"] == measure_batch(batch)["dropped_by"] == ["missing"]


def test_a_tar_that_is_cut_off_is_refused_by_name(tmp_path):
    (tmp_path / "cut.tar").write_bytes(b"not a tar at all" * 100)
    with pytest.raises(ValueError, match=r"cut\.tar: not an uncompressed tar, or cut off"):
        rows_of(tmp_path / "cut.tar", tmp_path=tmp_path)


def test_a_tar_among_others_that_cannot_be_read_costs_itself(folder, tmp_path):
    before = len(rows_of(folder, tmp_path=tmp_path))
    (folder / "cut.tar").write_bytes(b"not a tar at all" * 100)
    rows = rows_of(folder, tmp_path=tmp_path)
    (bad,) = [row for row in rows if row["dropped_by"]]
    assert len(rows) == before + 1 and bad["dropped_by"] == "unreadable" and "cut.tar: not" in bad["detail"]


@pytest.mark.skipif(shutil.which("tar") is None, reason="packs holes, which tarfile does not")
def test_a_tar_may_promise_more_than_memory_holds(tmp_path, caplog):
    """Files with holes are small in a tar; names there are bytes, too."""
    clips = tmp_path / "clips"
    clips.mkdir()
    for name in ("a.mp4", "a.txt"):
        with open(clips / name, "wb") as file:
            file.truncate(1 << 40)
    (clips / "b.mp4").write_bytes(tiny_mp4(0))
    with open(os.fsencode(clips) + b"/c\xff.mp4", "wb") as file:
        file.write(b"x")
    subprocess.run(["tar", "--sparse", "-cf", tmp_path / "shard.tar", "-C", clips, "."], check=True)
    rows = rows_of(tmp_path / "shard.tar", tmp_path=tmp_path)
    found = {row["source_id"].rsplit("/")[-1]: row["dropped_by"] for row in rows}
    assert found == {"b.mp4": None, "c\\udcff.mp4": "file_name"}
    assert "2 files with holes are left out" in caplog.text


def test_whatever_lies_beside_a_clip_costs_a_caption_at_most(folder, tmp_path, caplog):
    with open(folder / "a.txt", "wb") as file:
        file.truncate(1 << 40)
    (folder / "b.json").write_text('{"prompt": "half a pair \\ud800"}')
    os.mkfifo(folder / "pipe.mp4")
    (folder / "gone.mp4").symlink_to(folder / "nowhere.mp4")
    (folder / "ring.mp4").symlink_to(folder / "ring.mp4")
    (tmp_path / "theirs.csv").write_text("file_name,prompt\ndeep/er/a.MP4,a secret\n")
    (folder / "metadata.csv").symlink_to(tmp_path / "theirs.csv")
    prompts = {row["source_id"].rsplit("clips/")[-1]: row["prompt"] for row in rows_of(folder, tmp_path=tmp_path)}
    assert prompts == {
        "a.MP4": None,
        "b.mp4": "half a pair ?",
        "deep/er/a.MP4": None,
        "Prüfung 视频 🎈.mkv": None,
    }
    assert "a.txt is larger than a caption" in caplog.text and "metadata.csv leads out of" in caplog.text


def test_datasets_give_paths_and_bytes(tmp_path):
    (tmp_path / "file.mp4").write_bytes(tiny_mp4(0))
    cells = [{"path": str(tmp_path / "file.mp4"), "bytes": None}, {"path": "x.mp4", "bytes": tiny_mp4(1)}]
    features = datasets.Features({"clip": datasets.Video(), "caption": datasets.Value("string")})
    dataset = datasets.Dataset.from_dict({"clip": cells, "caption": ["one", " "]}, features=features)
    options = {"video_column": "clip", "prompt_column": "caption", "tmp_path": tmp_path}
    rows = rows_of(dataset, **options)
    assert [row["prompt"] for row in rows] == ["one", None]
    assert rows[0]["path"] == str(tmp_path / "file.mp4")
    assert video_hash(rows[1]["path"]) == video_hash({"path": None, "bytes": tiny_mp4(1)})
    assert [row["listing"] for row in rows_of(dataset, **options)] == [row["listing"] for row in rows]

    paths = datasets.Dataset.from_dict({"video": [str(tmp_path / "file.mp4"), str(tmp_path / "gone.mp4")]})
    paths.save_to_disk(tmp_path / "saved")
    rows = rows_of(tmp_path / "saved", tmp_path=tmp_path)
    assert [row["source_id"] for row in rows] == [f"{tmp_path}/saved[0]", f"{tmp_path}/saved[1]"]


def test_a_clip_is_the_same_from_every_kind_of_source(tmp_path):
    """Folder, tar, and datasets of bytes and of paths: after stages 1 to 3 the files are equal to the bit."""
    clip = write_clip(tmp_path / "clips" / "clip.mp4")
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        tar.add(clip, "clip.mp4")
        tar.add(clip.with_suffix(".txt"), "clip.txt")
    cells = {"bytes": {"path": "clip.mp4", "bytes": clip.read_bytes()}, "path": {"path": str(clip), "bytes": None}}
    features = datasets.Features({"video": datasets.Video(), "prompt": datasets.Value("string")})
    sources = {"folder": str(tmp_path / "clips"), "tar": str(tmp_path / "shard.tar")}
    for name, cell in cells.items():
        rows = {"video": [cell], "prompt": ["a red ball falls"]}
        sources[name] = datasets.Dataset.from_dict(rows, features=features)
    made = []
    for name, source in sources.items():
        config = GTPairConfig(output_dir=str(tmp_path / name), **SMALL)
        (row,) = first_stages(config, [source]).to_pylist()
        assert row["dropped_by"] is None and row["prompt"] == "a red ball falls"
        made.append([(tmp_path / name / row[column]).read_bytes() for column in ("video", "reference_image")])
    assert made == [made[0]] * 4


@pytest.mark.parametrize("known", [True, False])
def test_streams_are_read_to_their_end(tmp_path, known):
    """An `IterableDataset`, with columns that it knows or that its first row tells."""
    path = str(write_clip(tmp_path / "clip.mp4"))
    rows = [{"video": path, "prompt": "one"}, {"video": {"path": "x.mp4", "bytes": tiny_mp4(1)}, "prompt": None}]
    if known:
        cells = [{"path": path, "bytes": None}, rows[1]["video"]]
        features = datasets.Features({"video": datasets.Video(), "prompt": datasets.Value("string")})
        columns = {"video": cells, "prompt": ["one", None]}
        stream = datasets.Dataset.from_dict(columns, features=features).to_iterable_dataset()
    else:
        rows[1] = {"video": str(tmp_path / "gone.mp4"), "prompt": None}
        stream = datasets.IterableDataset.from_generator(lambda: iter(rows))
    listed = rows_of(stream, tmp_path=tmp_path)
    assert [row["source_id"] for row in listed] == ["stream 0[0]", "stream 0[1]"]
    assert [row["prompt"] for row in listed] == ["one", None] and listed[0]["path"] == path
    if known:
        assert video_hash(listed[1]["path"]) == video_hash({"path": None, "bytes": tiny_mp4(1)})
    with pytest.raises(ValueError, match="got DatasetDict. Of a `DatasetDict`, pass one of its splits"):
        rows_of(datasets.DatasetDict(), tmp_path=tmp_path)


def test_saved_datasets_with_splits_are_taken_apart(tmp_path):
    clip = str(write_clip(tmp_path / "clip.mp4"))
    splits = {
        name: datasets.Dataset.from_dict({"video": [clip] * count}) for name, count in (("train", 1), ("test", 2))
    }
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    assert len(rows_of(tmp_path / "saved", tmp_path=tmp_path)) == 1
    assert len(rows_of(tmp_path / "saved", tmp_path=tmp_path, split="test")) == 2
    with pytest.raises(ValueError, match=r"saved: expected a split out of \['train', 'test'\], got 'dev'"):
        rows_of(tmp_path / "saved", tmp_path=tmp_path, split="dev")


def test_sources_that_are_none_are_refused_with_the_way_out(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty: no video found\. Expected files ending in \.3gp"):
        rows_of(tmp_path / "empty", tmp_path=tmp_path)
    with pytest.raises(ValueError, match=r"no/such-source, which is none that can be loaded.*Check the spelling"):
        rows_of("no/such-source", tmp_path=tmp_path)
    with pytest.raises(ValueError, match=r"4 clips are listed twice"):
        rows_of(folder, folder, tmp_path=tmp_path)
    with pytest.raises(ValueError, match=r"expected a column 'video' with videos, got \['x'\]"):
        rows_of(datasets.Dataset.from_dict({"x": [1]}), tmp_path=tmp_path)
    for captions in ([["a", "b"]], [3], [{"text": "a"}]):  # each would have become the text of a list, a number, ...
        dataset = datasets.Dataset.from_dict({"video": ["x.mp4"], "prompt": captions})
        with pytest.raises(ValueError, match="expected a text in each row of the column 'prompt'"):
            rows_of(dataset, tmp_path=tmp_path)
    assert rows_of(datasets.Dataset.from_dict({"video": ["x.mp4"], "prompt": [None]}), tmp_path=tmp_path)


def test_clips_are_decoded_to_their_end_in_files_and_in_tars(tmp_path):
    path = write_clip(tmp_path / "clip.mp4")
    data = path.read_bytes()
    (tmp_path / "clips.tar").write_bytes(bytes(512) + data + bytes(512))
    batch = {"path": [str(path), str(tmp_path / "clips.tar")], "offset": [None, 512], "length": [None, len(data)]}
    decode_clips(batch)
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(VideoDecodeError, match=r"clip\.mp4"):
        decode_clips(batch)
