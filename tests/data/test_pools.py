"""OpenVid-1M and VidGen-1M in the layouts that they are published in: real zips with real video files."""

import csv
import json
import zipfile

import datasets
import numpy as np
import pytest

from video_trl.cli import main
from video_trl.curation.clips.sources import list_clips, open_clip
from video_trl.data.importers import pools
from video_trl.data.importers.pools import import_pool
from video_trl.data.tables import load_rows
from video_trl.data.video_io import read_video, write_video


COLUMNS = (
    "video,caption,aesthetic score,motion score,temporal consistency score,camera motion,frame,fps,seconds".split(",")
)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Bytes of videos by their brightness."""
    folder = tmp_path_factory.mktemp("clips")
    for value in (40, 80, 120, 160, 200):
        write_video(folder / f"{value}.mp4", np.full((2, 16, 16, 3), value, np.uint8), fps=8)
    return {int(path.stem): path.read_bytes() for path in folder.iterdir()}


def write_zip(path, members, method=zipfile.ZIP_STORED):
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def write_csv(path, captions):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        writer.writerows([f"{name}.mp4", caption, 5.1, 3.2, 0.9, "static", 150, 30, 5] for name, caption in captions)


@pytest.fixture
def openvid(tmp_path, clips):
    """Two whole archives, one in pieces, one that is none; a clip twice, one damaged, one without a caption."""
    root = tmp_path / "OpenVid-1M"
    write_zip(root / "OpenVid_part0.zip", {"video/a_1to9.mp4": clips[40], "video/b.v2.mp4": clips[80], "x.txt": b"x"})
    write_zip(
        root / "OpenVid_part10.zip",
        {"a_1to9.mp4": clips[200], "c.mp4": clips[120], "silent.mp4": clips[160], "hurt.mp4": clips[160]},
        zipfile.ZIP_DEFLATED,
    )
    write_zip(tmp_path / "cut.zip", {"d.mp4": clips[160], "e.mp4": clips[200]})
    cut = (tmp_path / "cut.zip").read_bytes()
    for number, suffix in enumerate(("aa", "ab", "ac")):
        third = len(cut) // 3 + 1
        (root / f"OpenVid_part2_part{suffix}").write_bytes(cut[number * third : (number + 1) * third])
    (root / "OpenVid_part3.zip").write_bytes(b"<html>")
    damaged = bytearray((root / "OpenVid_part10.zip").read_bytes())
    with zipfile.ZipFile(root / "OpenVid_part10.zip") as archive:
        damaged[archive.getinfo("hurt.mp4").header_offset + 60] ^= 255
    (root / "OpenVid_part10.zip").write_bytes(damaged)
    names = ["a_1to9", "b.v2", "c", "d", "e", "hurt", "elsewhere"]
    write_csv(root / "OpenVid-1M.csv", [(name, f'A "clip",\nnamed {name}.') for name in names])
    return root


def brightness(video):
    return round(float(read_video(video).mean()) / 40) * 40


def captions_of(folder, spool):
    rows = list_clips([folder], spool=spool).to_pylist()
    return {
        row["source_id"].rpartition("/")[2]: (
            row["prompt"],
            brightness(open_clip(row["path"], row["offset"], row["length"])),
        )
        for row in rows
    }


def test_every_clip_of_every_archive_comes_with_its_caption(openvid, tmp_path):
    pool = import_pool("openvid", openvid, tmp_path / "out")
    assert (pool.clips, pool.without_video) == (5, 1)
    found = captions_of(pool.folder, tmp_path / "spool")
    shades = {"a_1to9": 40, "b.v2": 80, "c": 120, "d": 160, "e": 200}  # of a clip that is there twice, the first
    assert found == {f"{name}.mp4": (f'A "clip",\nnamed {name}.', shade) for name, shade in shades.items()}
    listed = "\n".join(pool.skipped)
    assert len(pool.skipped) == 3 and "OpenVid_part3.zip: File is not a zip file" in listed
    assert "silent.mp4: it has no caption" in listed and "hurt.mp4: it is damaged" in listed


def test_an_import_goes_on_and_keeps_the_tars_of_archives_that_are_gone(openvid, tmp_path, monkeypatch):
    out = tmp_path / "out"
    whole = pools._write_tar

    def stopped(path, parts, rows):
        if path.name == "OpenVid_part10.tar":
            raise KeyboardInterrupt
        return whole(path, parts, rows)

    monkeypatch.setattr(pools, "_write_tar", stopped)
    with pytest.raises(KeyboardInterrupt):
        import_pool("openvid", openvid, out)
    monkeypatch.undo()
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert set(before) == {"OpenVid_part0.tar", "OpenVid_part2.tar"}
    (openvid / "OpenVid_part0.zip").unlink()
    pool = import_pool("openvid", openvid, out)
    assert pool.clips == 5  # the second a_1to9 is still the second
    assert before.items() <= {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}.items()
    assert not list(out.glob(".index*")) and import_pool("openvid", openvid, out).clips == 5


def test_vidgen_is_read_record_by_record(tmp_path, clips, capsys, monkeypatch):
    root, out = tmp_path / "VIDGEN-1M", tmp_path / "out"
    write_zip(root / "VidGen_video_2.zip", {"VidGen_video_2/Eep9uvenxAo-Scene-0030.mp4": clips[80]})
    records = [{"vid": f"other-{n}", "caption": "[} not here {"} for n in range(3000)]
    records[1500] = {"vid": "Eep9uvenxAo-Scene-0030", "caption": "A hand touches “flowers”."}
    records[7] = {"vid": "", "caption": "x"}
    table = root / "VidGen_1M_video_caption.json"
    table.write_text(json.dumps(records, ensure_ascii=False, indent=1), encoding="utf-8")
    assert main(["data", "import", "vidgen", str(root), "--output_dir", str(out)]) == 0
    said = capsys.readouterr().out
    assert f"1 clips in {out}; 2998 captions whose clip is not here" in said and "entry 7" in said
    rows = load_rows(str(out), "train")
    (row,) = rows.cast_column("video", datasets.Video(decode=False))
    assert row["prompt"] == "A hand touches “flowers”." and brightness(row["video"]) == 80
    assert main(["data", "import", "openvid", str(root), "--output_dir", str(out)]) == 1
    assert "expected archives of OpenVid-1M" in capsys.readouterr().err
    table.write_text(table.read_text()[:-20])
    with pytest.raises(ValueError, match="cut off or damaged near"):
        import_pool("vidgen", root, tmp_path / "other")


def test_what_cannot_be_imported_is_refused(openvid, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match="exists already"):
        import_pool("openvid", openvid, tmp_path / "mine")
    (openvid / "OpenVid-1M.csv").rename(openvid / "OpenVidHD.csv")
    write_csv(openvid / "OpenVidHD.csv", [("nothing", "a clip")])
    with pytest.raises(ValueError, match="no clip of OpenVid-1M can be used"):
        import_pool("openvid", openvid, tmp_path / "empty")
    (openvid / "OpenVidHD.csv").write_text("name,text\n")
    with pytest.raises(ValueError, match=r"expected the columns \['video', 'caption'\]"):
        import_pool("openvid", openvid, tmp_path / "other")
    (openvid / "OpenVidHD.csv").unlink()
    with pytest.raises(ValueError, match="OpenVid-1M.csv or OpenVidHD.csv"):
        import_pool("openvid", openvid, tmp_path / "none")
