"""Curated datasets on a Hub on this machine: parquet with playable videos, a card, and back on another machine."""

import io
import json
import os
from pathlib import Path

import av
import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from datasets import Dataset, Video, load_dataset

from tests.support.evaluation.runs import damage
from tests.support.hub_server import TOKEN, USER, serving, use
from tests.support.tiny import PROMPTS, tiny_group_dataset, tiny_mp4
from tests.support.trainer.runs import config, trainer
from video_trl import hub
from video_trl.data import read_video


REPOSITORY = f"{USER}/groups"


@pytest.fixture
def server(monkeypatch):
    with serving() as made:
        use(made, monkeypatch)
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", made.url)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(datasets.config, "USE_PARQUET_EXPORT", False)  # asks another server than the Hub's
        yield made


@pytest.fixture
def pairs(tmp_path):
    """Rows as GT-Pair leaves them: paths, some as text."""
    rows = []
    for number in range(3):
        for name in ("chosen", "rejected"):
            (tmp_path / f"{name}{number}.mp4").write_bytes(tiny_mp4(number + 10 * (name == "rejected")))
        rows.append(
            {
                "prompt": f"{PROMPTS[number]} | {number}",
                "chosen": str(tmp_path / f"chosen{number}.mp4"),
                "rejected": str(tmp_path / f"rejected{number}.mp4"),
                "generator": "tiny/model",
                "provenance": json.dumps({"route": "gt-pair"}),
            }
        )
    return Dataset.from_list(rows)


def test_a_dataset_comes_back_on_another_machine_and_trains(server, tmp_path):
    groups = tiny_group_dataset(4, 2)
    hub.push_dataset(groups, REPOSITORY, license="cc-by-4.0", description="Tiny groups.", details={"seed": 0})
    there = load_dataset(REPOSITORY, split="train", cache_dir=str(tmp_path / "another-machine"))
    assert there.features == groups.features and there["prompt"] == groups["prompt"]
    for mine, theirs in zip(groups, there, strict=True):
        assert theirs["chosen"]["bytes"] == mine["chosen"]["bytes"]
        assert [video["bytes"] for video in theirs["rejected"]] == [video["bytes"] for video in mine["rejected"]]
        assert read_video(theirs["rejected"][1]).shape == (5, 32, 32, 3)
    args = config(tmp_path / "run", max_steps=1, per_device_train_batch_size=1, cache_dir=str(tmp_path / "cache"))
    made = trainer(args, train_dataset=there)
    made.train()
    made.create_model_card()
    front, card = _card(made.args.output_dir)
    revision = server.dataset("groups").commits[-1][0]
    assert front["datasets"] == [REPOSITORY] and f"from {REPOSITORY} (revision `{revision}`)" in card
    assert "4 rows" in card and card.count("samples/data/row_") == 9  # three rows of three videos
    assert (tmp_path / "run" / "samples" / "data" / "row_2_rejected_2.mp4").read_bytes() == (
        groups[2]["rejected"][1]["bytes"]
    )


def test_the_hub_can_play_the_columns_and_reads_the_card(server):
    hub.push_dataset(tiny_group_dataset(2, 2), REPOSITORY, license="cc-by-4.0")
    files = server.dataset("groups").files
    assert set(files) == {
        "README.md",
        "data/train-00000-of-00001.parquet",
        *(f"samples/row_{row}_{name}.mp4" for row in (0, 1) for name in ("chosen", "rejected_1", "rejected_2")),
    }
    table = pq.read_table(io.BytesIO(files["data/train-00000-of-00001.parquet"]))
    features = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
    assert features["chosen"]["_type"] == "Video" and features["rejected"]["feature"]["_type"] == "Video"
    cell = table["chosen"][1].as_py()
    assert cell["path"] == "000001-chosen.mp4"  # the viewer goes by the ending
    with av.open(io.BytesIO(cell["bytes"])) as container:
        assert container.streams.video[0].codec_context.name == "h264"
    front = yaml.safe_load(files["README.md"].decode().split("---\n")[1])
    assert front["license"] == "cc-by-4.0" and front["task_categories"] == ["text-to-video"]
    assert front["tags"] == ["video-trl", "group", "video", "preference"] and front["size_categories"] == "n<1K"
    assert front["configs"] == [{"config_name": "default", "data_files": [{"split": "train", "path": "data/train-*"}]}]
    card = files["README.md"].decode()
    assert "| rows with 2 rejected videos | 2 |" in card and "| `rejected` | list of video |" in card
    assert 'src="samples/row_1_rejected_2.mp4"' in card and "VideoGroupDPOTrainer" in card


def test_files_are_embedded_and_no_folder_of_this_machine_leaks(server, pairs, tmp_path):
    pairs.save_to_disk(str(tmp_path / "saved"))
    hub.push_dataset(tmp_path / "saved", REPOSITORY, folder=tmp_path / "export")
    for path, data in server.dataset("groups").files.items():
        assert str(tmp_path).encode() not in data, path
    for number in range(3):
        (tmp_path / f"chosen{number}.mp4").unlink()
    there = load_dataset(REPOSITORY, split="train", cache_dir=str(tmp_path / "another-machine"))
    assert there[2]["chosen"] == {"path": "000002-chosen.mp4", "bytes": tiny_mp4(2)}
    card = server.dataset("groups").files["README.md"].decode()
    assert "| made by tiny/model | 3 |" in card and "a red ball falls to the floor \\| 0" in card
    assert "VideoDPOTrainer" in card and (tmp_path / "export" / "README.md").is_file()
    hub.push_dataset(tmp_path / "export", f"{USER}/copy")  # an export is sent as it is
    assert server.dataset("copy").files == server.dataset("groups").files


def test_shards_hold_so_many_rows_and_an_older_export_goes(server, tmp_path, monkeypatch):
    monkeypatch.setattr("video_trl.hub.dataset._ROWS_PER_FILE", 2)
    hub.push_dataset(tiny_group_dataset(5, 1), REPOSITORY)
    names = [f"data/train-{n:05d}-of-00003.parquet" for n in range(3)]
    assert [path for path in server.dataset("groups").files if path.startswith("data/")] == names
    loaded = load_dataset(REPOSITORY, split="train", cache_dir=str(tmp_path / "cache"))
    assert loaded["prompt"] == tiny_group_dataset(5, 1)["prompt"]
    hub.push_dataset(tiny_group_dataset(1, 1), REPOSITORY)
    assert [path for path in server.dataset("groups").files if path.startswith("data/")] == [
        "data/train-00000-of-00001.parquet"
    ]


def test_an_export_that_fails_half_way_leaves_the_older_one(pairs, tmp_path, monkeypatch):
    monkeypatch.setattr("video_trl.hub.dataset._ROWS_PER_FILE", 1)
    hub.export_dataset(pairs.select([0, 1]), tmp_path / "export", name="first")
    before = {path: path.read_bytes() for path in (tmp_path / "export").rglob("*") if path.is_file()}
    (tmp_path / "rejected2.mp4").unlink()
    with pytest.raises(ValueError, match="Row 2: .*rejected2.mp4 cannot be read"):
        hub.export_dataset(pairs, tmp_path / "export", name="second")
    assert {path: path.read_bytes() for path in (tmp_path / "export").rglob("*") if path.is_file()} == before
    hub.export_dataset(pairs.select([0, 1]), tmp_path / "export", name="third")  # clears it
    assert not list(tmp_path.glob(".*"))


def test_a_killed_export_goes_on_with_what_it_has_written(pairs, tmp_path, monkeypatch):
    """But for files that have changed since."""
    monkeypatch.setattr(hub.dataset, "_ROWS_PER_FILE", 1)
    folder, write, embed, written = tmp_path / "export", hub.dataset.pq.write_table, hub.dataset._embed, []

    def count(table, path, **options):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path)
        write(table, path, **options)

    monkeypatch.setattr(hub.dataset.pq, "write_table", count)
    with pytest.raises(KeyboardInterrupt):
        hub.export_dataset(pairs, folder, name="pairs")
    assert not folder.exists()
    (tmp_path / "chosen1.mp4").write_bytes(tiny_mp4(5))
    monkeypatch.setattr(hub.dataset.pq, "write_table", write)
    kept = {path.name for path in tmp_path.glob(".export.unfinished/data/*")}
    rewritten = []

    def note(row, number, media):
        rewritten.append(number)
        return embed(row, number, media)

    monkeypatch.setattr(hub.dataset, "_embed", note)
    hub.export_dataset(pairs, folder, name="pairs")
    assert len(kept) == 2 and rewritten == [0, 1, 2]  # row 0 for the card; 1 has changed, 2 was not written
    assert not list(tmp_path.glob(".export*")) and not list(folder.rglob(".*"))
    rows = load_dataset(str(folder), split="train", cache_dir=str(tmp_path / "cache"))
    assert [row["chosen"]["bytes"] for row in rows.cast_column("chosen", Video(decode=False))] == [
        (tmp_path / f"chosen{number}.mp4").read_bytes() for number in range(3)
    ]


@pytest.mark.parametrize("name", ["notes.txt", "README.md", "data/train.csv", "data/.notes", "samples/a/b.mp4"])
def test_a_folder_that_holds_more_than_an_export_is_not_written_into(pairs, tmp_path, name):
    """Also under the names that an export uses: a dataset that somebody else has made looks like that."""
    folder = tmp_path / "mine"
    if name != "README.md":  # that is an export's own
        hub.export_dataset(pairs.select([0]), folder, name="x")
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("years of work")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=rf"holds more than an export \({name}\)"):
        hub.export_dataset(pairs, folder, name="x")
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_card_that_was_edited_is_not_lost(pairs, tmp_path):
    folder = hub.export_dataset(pairs.select([0]), tmp_path / "out", name="x")
    hub.export_dataset(pairs.select([0, 1]), folder, name="x")
    (folder / "README.md").write_text("years of work")
    with pytest.raises(ValueError, match=r"README\.md was edited"):
        hub.export_dataset(pairs, folder, name="x")
    assert (folder / "README.md").read_text() == "years of work"
    with pytest.raises(ValueError, match="is a file, and an export is a folder"):
        hub.export_dataset(pairs, folder / "README.md", name="x")


def test_a_failed_upload_leaves_the_files_and_says_so(server, pairs, tmp_path):
    server.fail("*/commit/main", 403)
    with pytest.raises(hub.HubUploadError, match="403.*The files are in .*export. Call `push_dataset` again"):
        hub.push_dataset(pairs, REPOSITORY, folder=tmp_path / "export", token=TOKEN)
    assert len(pq.read_table(tmp_path / "export" / "data")) == 3


def test_what_is_no_dataset_is_refused_before_anything_is_sent(server, pairs, tmp_path):
    with pytest.raises(ValueError, match="holds no dataset"):
        hub.push_dataset(tmp_path, REPOSITORY)
    with pytest.raises(ValueError, match="Expected rows with videos, got 1 rows with"):
        hub.push_dataset(Dataset.from_list([{"prompt": "a"}]), REPOSITORY)
    (tmp_path / "rejected1.mp4").unlink()
    with pytest.raises(ValueError, match="Row 1: .*rejected1.mp4 cannot be read"):
        hub.push_dataset(pairs, REPOSITORY)
    assert not server.repositories


def _card(folder):
    text = (Path(folder) / "README.md").read_text()
    return yaml.safe_load(text.split("---\n")[1]), text


# ---- what is published ----------------------------------------------------------------------------------------------


def _with(pairs, **changes):
    return Dataset.from_list([row | (changes if number == 1 else {}) for number, row in enumerate(pairs)])


@pytest.mark.parametrize(
    "content", [b"root:x:0:0:root:/root:/bin/bash\n", b"", b"#EXTM3U\n/etc/passwd\n", bytes(5000)]
)
def test_only_videos_that_can_be_read_are_embedded(pairs, tmp_path, content):
    (tmp_path / "passwd.mp4").write_bytes(content)
    with pytest.raises(ValueError, match=r"Row 1: .*passwd\.mp4.*no readable video"):
        hub.export_dataset(_with(pairs, chosen=str(tmp_path / "passwd.mp4")), tmp_path / "out", name="a/b")
    assert not (tmp_path / "out").exists()


def test_a_video_that_is_damaged_behind_its_first_frame_and_a_pipe_are_not_embedded(pairs, tmp_path):
    damage(tmp_path / "bad.mp4")
    os.mkfifo(tmp_path / "pipe.mp4")
    for name, words in (("bad.mp4", "no readable video"), ("pipe.mp4", "a pipe or a device")):
        with pytest.raises(ValueError, match=rf"Row 1: .*{name}.*{words}"):
            hub.export_dataset(_with(pairs, chosen=str(tmp_path / name)), tmp_path / "out", name="a/b")
    assert not (tmp_path / "out").exists()


def test_files_that_lie_elsewhere_are_not_embedded(pairs, tmp_path):
    with pytest.raises(ValueError, match="no folder of their own.*/etc"):
        hub.export_dataset(_with(pairs, chosen="/etc/passwd"), tmp_path / "out", name="a/b")
    inside, outside = tmp_path / "clips", tmp_path / "private"
    outside.mkdir()
    inside.mkdir()
    (outside / "mine.mp4").write_bytes(tiny_mp4(5))
    (inside / "link.mp4").symlink_to(outside / "mine.mp4")
    rows = Dataset.from_list([{"prompt": "a", "video": str(inside / "link.mp4")}])
    with pytest.raises(ValueError, match=r"Row 0: .*mine\.mp4 lies outside"):
        hub.export_dataset(rows, tmp_path / "out", name="a/b", media_folders=[inside])
    hub.export_dataset(rows, tmp_path / "out", name="a/b", media_folders=[inside, outside])
    assert (tmp_path / "out" / "export.json").is_file()


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: next(folder.glob("data/*")).unlink(),
        lambda folder: os.truncate(next(folder.glob("data/*")), 100),
        lambda folder: (folder / "data" / "other.parquet").write_bytes(b"x"),
        lambda folder: (folder / "README.md").write_text("changed"),
        lambda folder: (folder / "export.json").unlink(),
        lambda folder: (folder / "export.json").write_text('{"rows": 0, "files": {}}'),
    ],
    ids=["a table is gone", "cut", "more", "another card", "no list", "an empty list"],
)
def test_an_export_that_is_not_whole_is_not_sent(server, pairs, tmp_path, damage):
    folder = hub.export_dataset(pairs, tmp_path / "out", name="a/b")
    damage(folder)
    with pytest.raises(ValueError, match="no whole export"):
        hub.push_dataset(folder, REPOSITORY)
    assert not server.repositories


# ---- tables of other programs, splits, and what would have no effect -----------------------------------------------


def test_tables_with_large_columns_are_embedded_like_others(pairs, tmp_path):
    """As polars writes them: paths of this machine must not be what is published."""
    large, several = pa.large_string(), pa.large_list(pa.large_string())
    columns = {name: pa.array(pairs[name], large) for name in ("prompt", "chosen")}
    columns["rejected"] = pa.array([[path] for path in pairs["rejected"]], several)
    pq.write_table(pa.table(columns), tmp_path / "large.parquet")
    rows = Dataset.from_parquet(str(tmp_path / "large.parquet"), cache_dir=str(tmp_path / "cache"))
    folder = hub.export_dataset(rows, tmp_path / "out", name="a/b")
    there = pq.read_table(folder / "data").to_pylist()
    assert [row["rejected"][0]["bytes"][4:8] for row in there] == [b"ftyp"] * 3
    assert str(tmp_path) not in str([{**row, "chosen": row["chosen"]["path"]} for row in there])
    assert "VideoGroupDPO" in (folder / "README.md").read_text()


def test_another_split_of_a_repository_is_not_deleted(server, pairs):
    hub.push_dataset(pairs, REPOSITORY)
    hub.push_dataset(pairs.select([0]), REPOSITORY)  # a later version of the same split is
    before = dict(server.dataset("groups").files)
    with pytest.raises(
        ValueError, match=r"holds the splits \['train'\], which this upload of \['test'\] would delete"
    ):
        hub.push_dataset(pairs, REPOSITORY, split="test")
    assert server.dataset("groups").files == before


def test_an_export_has_its_card_already(server, pairs, tmp_path):
    folder = hub.export_dataset(pairs, tmp_path / "out", name="a/b")
    with pytest.raises(ValueError, match=r"has its card: \['license'\] would change nothing"):
        hub.push_dataset(folder, REPOSITORY, license="mit", description="")
    assert not server.repositories
