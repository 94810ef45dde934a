"""Datasets by name: what people have on their disks becomes rows of the columns that trainers read."""

import csv
import io
import json
import tarfile

import datasets
import numpy as np
import pytest

from video_trl.data.columns import check_columns
from video_trl.data.tables import load_rows
from video_trl.data.video_io import read_video, write_video


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Three files of different brightness; the file's name is its brightness."""
    folder = tmp_path_factory.mktemp("videos")
    for value in (40, 120, 200):
        write_video(folder / f"{value}.mp4", np.full((5, 32, 32, 3), value, np.uint8), fps=8)
    return folder


def _put(videos, value, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes((videos / f"{value}.mp4").read_bytes())
    return path


def _brightness(cell):
    return round(float(read_video(cell).mean()) / 40) * 40


def _pairs(videos, root):
    """A table's two rows: paths relative to the table."""
    for value in (40, 120, 200):
        _put(videos, value, root / "clips" / f"{value}.mp4")
    return [
        {"caption": "one", "winner": "clips/40.mp4", "loser": "clips/120.mp4"},
        {"caption": "two", "winner": "clips/200.mp4", "loser": "clips/40.mp4"},
    ]


def _write(kind, rows, path):
    path = path.with_suffix(f".{kind}")
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "json":
        path.write_text(json.dumps(rows))
    elif kind == "parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    else:
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0], delimiter="\t" if kind == "tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv", "parquet"])
def test_tables_with_columns_of_other_names_and_paths_that_start_at_the_table(kind, videos, tmp_path, monkeypatch):
    path = _write(kind, _pairs(videos, tmp_path / "study"), tmp_path / "study" / "pairs")
    monkeypatch.chdir(tmp_path)
    rows = load_rows(f"study/{path.name}", "train", ["chosen=winner", "rejected=loser"])
    check_columns(rows, "preference")
    assert rows["prompt"][:] == ["one", "two"]
    assert [(_brightness(row["chosen"]), _brightness(row["rejected"])) for row in rows] == [(40, 120), (200, 40)]


def test_another_name_of_the_prompts_is_told_once(videos, tmp_path, caplog):
    table = tmp_path / "table.jsonl"
    table.write_text(json.dumps({"caption": "a", "video": str(_put(videos, 40, tmp_path / "a.mp4"))}))
    with caplog.at_level("INFO", logger="video_trl"):
        assert [load_rows(str(table), "train")["prompt"][:] for _ in range(2)] == [["a"], ["a"]]
    assert caplog.text.count("the column 'caption' is read as 'prompt'") == 1


def test_words_of_a_csv_stay_words_and_its_numbers_are_numbers(videos, tmp_path):
    prompts = ["007", "NA", "true", '"Oh!"\nA ball, rolling', "1e5"]
    rows = [
        {"prompt": prompt, "video": str(videos / "40.mp4"), "seed": seed, "share": f"0.{seed}", "image": ""}
        for seed, prompt in enumerate(prompts)
    ]
    path = _write("csv", rows, tmp_path / "clips")
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    loaded = load_rows(str(path), "train")
    assert loaded["prompt"][:] == prompts and loaded["seed"][:] == [0, 1, 2, 3, 4] and loaded["share"][1] == 0.1
    assert loaded["image"][:] == [None] * 5
    renamed = load_rows(str(_write("csv", [{"a": "007", "b": "007"}], tmp_path / "two")), "train", ["prompt=a"])
    assert renamed[0] == {"prompt": "007", "b": 7}


@pytest.mark.parametrize(
    ("table", "fault"),
    [
        ("prompt,video\na ball, rolling,{0}\n", "row 1 has another number of cells than the header"),
        ("prompt,video\na ball\n", "row 1 has another number of cells"),
        ("prompt;video\na ball;{0}\n", "expected columns separated by ',', got ';'"),
        ("prompt\tvideo\na ball\t{0}\n", r"separated by ',', got '\\t'"),
        ("prompt,video,prompt\na ball,{0},a block\n", "got two called 'prompt'"),
    ],
)
def test_no_cell_of_a_csv_is_shifted_or_lost(videos, tmp_path, table, fault):
    (tmp_path / "clips.csv").write_text(table.format(videos / "40.mp4"))
    for name in (tmp_path / "clips.csv", tmp_path):  # the file, and a folder of tables
        with pytest.raises(ValueError, match=fault):
            load_rows(str(name), "train")


def test_a_saved_dataset_a_folder_of_tables_and_splits(videos, tmp_path):
    rows = _pairs(videos, tmp_path / "a")
    _write("jsonl", rows, tmp_path / "a" / "train")
    saved = datasets.DatasetDict(train=datasets.Dataset.from_list(rows), test=datasets.Dataset.from_list(rows[1:]))
    saved.save_to_disk(tmp_path / "saved")
    (tmp_path / "saved" / "clips").symlink_to(tmp_path / "a" / "clips")
    columns = {"chosen": "winner", "rejected": "loser"}
    for name, split, count in ((tmp_path / "a", "train", 2), (tmp_path / "saved", "test", 1)):
        loaded = load_rows(str(name), split, columns)
        assert len(loaded) == count and _brightness(loaded[count - 1]["chosen"]) == 200
    with pytest.raises(ValueError, match=r"has the splits \['train', 'test'\], got 'validation'"):
        load_rows(str(tmp_path / "saved"), "validation")


def test_lists_of_rejected_videos_keep_their_order_and_missing_cells_stay_missing(videos, tmp_path):
    _pairs(videos, tmp_path)
    rows = [
        {"prompt": "one", "chosen": "clips/40.mp4", "rejected": ["clips/200.mp4", "clips/120.mp4"]},
        {"prompt": "two", "chosen": None, "rejected": ["clips/40.mp4", None]},
    ]
    loaded = load_rows(str(_write("jsonl", rows, tmp_path / "groups")), "train")
    assert [_brightness(video) for video in loaded[0]["rejected"]] == [200, 120]
    assert loaded[1]["chosen"] is None and loaded[1]["rejected"][1] is None
    with pytest.raises(ValueError, match="Row 1: expected a value in column 'chosen'"):
        check_columns(loaded, "group")


def test_a_folder_of_videos_with_captions_beside_them(videos, tmp_path):
    _put(videos, 40, tmp_path / "b" / "clip.mp4").with_suffix(".TXT").write_text("\ufeffA ball falls.\n")
    _put(videos, 120, tmp_path / "a.MOV").with_suffix(".txt").write_text("A block slides.")
    _put(videos, 200, tmp_path / "c.mp4").with_suffix(".json").write_text('{"caption": "A disc floats."}')
    _put(videos, 200, tmp_path / ".hidden.mp4")
    loaded = load_rows(str(tmp_path), "train")
    check_columns(loaded, "video")
    assert loaded["prompt"][:] == ["A block slides.", "A ball falls.", "A disc floats."]
    assert [_brightness(video) for video in loaded["video"]] == [120, 40, 200]


def test_a_folder_with_a_metadata_table(videos, tmp_path):
    for value in (40, 120):
        _put(videos, value, tmp_path / f"{value}.mp4")
    rows = [{"file_name": "120.mp4", "text": "fast"}, {"file_name": "40.mp4", "text": "slow"}]
    _write("jsonl", rows, tmp_path / "metadata")
    loaded = load_rows(str(tmp_path), "train")
    check_columns(loaded, "video")
    from video_trl.data.columns import undecoded

    found = {row["prompt"]: _brightness(row["video"]) for row in undecoded(loaded)}
    assert found == {"fast": 120, "slow": 40}


@pytest.mark.parametrize("several", [False, True])
def test_chosen_and_rejected_folders_with_equal_names(several, videos, tmp_path):
    for name in ("x", "sub/y"):
        _put(videos, 200, tmp_path / "chosen" / f"{name}.mp4")
        for number, value in enumerate((40, 120) if several else (40,)):
            _put(videos, value, tmp_path / "rejected" / (f"{name}/{number}.mp4" if several else f"{name}.mkv"))
    (tmp_path / "chosen" / "x.txt").write_text("one")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "y.txt").write_text("two")
    loaded = load_rows(str(tmp_path), "train")
    check_columns(loaded, "group")
    assert {row["prompt"] for row in loaded} == {"one", "two"}
    for row in loaded:
        assert _brightness(row["chosen"]) == 200
        assert [_brightness(video) for video in row["rejected"]] == ([40, 120] if several else [40])


def test_tars_in_the_layout_of_webdataset(videos, tmp_path):
    for part, value in enumerate((40, 200)):
        with tarfile.open(tmp_path / f"{part}.tar", "w") as tar:
            for name, data in (
                ("clip.mp4", (videos / f"{value}.mp4").read_bytes()),
                ("clip.txt", f"at {value}".encode()),
            ):
                member = tarfile.TarInfo(f"{part}-{name}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    from video_trl.data.columns import undecoded

    for name, count in ((tmp_path, 2), (tmp_path / "1.tar", 1)):
        loaded = undecoded(load_rows(str(name), "train"))
        check_columns(loaded, "video")
        assert len(loaded) == count
        assert all(row["prompt"] == f"at {_brightness(row['video'])}" for row in loaded)


def _broken(kind, videos, root):
    if kind == "no caption":
        _put(videos, 40, root / "a.mp4").with_suffix(".txt").write_text("one")
        _put(videos, 40, root / "b.mp4").with_suffix(".txt").write_text(" ")
    elif kind == "link":
        (root.parent / "secret").write_text("root:x:0")
        _put(videos, 40, root / "a.mp4").with_suffix(".txt").symlink_to(root.parent / "secret")
    elif kind == "alone":
        _put(videos, 40, root / "chosen" / "a.mp4").with_suffix(".txt").write_text("one")
        _put(videos, 40, root / "rejected" / "b.mp4")
    elif kind == "missing":
        return _write("jsonl", [{"prompt": "a", "video": "no.mp4"}], root / "table"), []
    elif kind == "column":
        return _write("jsonl", [{"prompt": "a", "film": "no.mp4"}], root / "table"), ["video=movie"]
    elif kind == "cut":
        (root / "table.jsonl").write_text('{"prompt": "a"}\n{"prom')
        return root / "table.jsonl", []
    elif kind == "cut tar":
        with tarfile.open(root / "whole.tar", "w") as tar:
            tar.add(videos / "40.mp4", "a.mp4")
        (root / "cut.tar").write_bytes((root / "whole.tar").read_bytes()[:1000])
        return root / "cut.tar", []
    elif kind == "typo":
        (root / "clips.jsonl").write_text("{}")
        return root / "clip.jsonl", []
    elif kind == "ours":
        return _write("jsonl", [{"prompt": "a", "film": "no.mp4"}], root / "table"), ["chosenn=film"]
    elif kind == "nothing":
        (root / "folder").mkdir()
        return root / "folder", []
    elif kind in ("empty", "header"):
        path = root / f"table.{'jsonl' if kind == 'empty' else 'csv'}"
        path.write_text("" if kind == "empty" else "prompt,video\n")
        return path, []
    elif kind == "suffix":
        (root / "table.xls").write_text("")
        return root / "table.xls", []
    elif kind == "builder":
        return "videofolder", []
    else:
        return root / "nowhere", []
    return root, []


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("no caption", "videos without a caption: 1 of 2, the first is .*b.mp4. Write b.txt beside it"),
        ("link", "videos without a caption: 1 of 1"),
        ("alone", "videos without a counterpart: 2, the first is .*chosen/a.mp4"),
        ("missing", "Row 0: expected a file in column 'video', got .*/no.mp4, .*Relative paths start at the table"),
        ("column", r"--column video=movie: .* has no column 'movie'.* It has \['prompt', 'film'\]"),
        ("cut", r"cannot be read as jsonl \(line 2 is no JSON object: '\{\"prom'\)"),
        ("cut tar", "cut.tar cannot be read as a tar in WebDataset layout .*it is cut"),
        ("typo", "there is no file .*clip.jsonl .from .*; did you mean '.*clips.jsonl'"),
        ("ours", "--column chosenn=film: no trainer reads a column 'chosenn'; did you mean 'chosen'"),
        ("nothing", "holds no videos, tables or tars. Expected videos with captions"),
        ("empty", "table.jsonl: expected rows, got none"),
        ("header", "table.csv: expected rows, got none"),
        ("suffix", "a file that ends in .xls; expected a table"),
        ("builder", "'videofolder' is a way of reading a folder"),
        ("nowhere", "expected a table .*, a folder, tars, or a dataset on the Hub, got .*nowhere"),
    ],
)
def test_what_cannot_be_loaded_says_why_and_the_way_out(kind, words, videos, tmp_path):
    (tmp_path / "data").mkdir()
    name, columns = _broken(kind, videos, tmp_path / "data")
    with pytest.raises(ValueError, match=words):
        load_rows(str(name), "train", columns)


def test_the_name_of_a_table_is_no_pattern(tmp_path):
    folder = tmp_path / "run [v2]"
    folder.mkdir()
    for name in ("rows1", "rows[1]"):
        _write("jsonl", [{"prompt": name}], folder / name)
    assert list(load_rows(str(folder / "rows[1].jsonl"), "train", [])["prompt"]) == ["rows[1]"]


def test_a_folder_of_several_configurations_is_read_by_their_names(tmp_path):
    head = "\n".join(f"- config_name: {name}\n  data_files: {name}.jsonl" for name in ("short", "long"))
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{head}\n---\n")
    for name in ("short", "long"):
        _write("jsonl", [{"prompt": name}], tmp_path / name)
    assert list(load_rows(f"{tmp_path}:long", "train", [])["prompt"]) == ["long"]
    with pytest.raises(ValueError, match=f"{tmp_path} has several configurations .*Name one as {tmp_path}:CONFIG"):
        load_rows(str(tmp_path), "train", [])


def test_a_mapping_that_is_none_is_refused():
    with pytest.raises(ValueError, match="expected OURS=THEIRS, such as chosen=winner, got 'chosen'"):
        load_rows("anything", "train", ["chosen"])


def test_two_chosen_videos_of_one_name_are_refused_and_none_is_left_out(tmp_path):
    for name in ("chosen/a.mp4", "chosen/a.webm", "rejected/a.mp4", "a.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("a ball")
    with pytest.raises(ValueError, match="two chosen videos of one name: a.mp4 and a.webm"):
        load_rows(str(tmp_path), "train")
