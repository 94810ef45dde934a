"""Published preference data of other projects, in the layouts that they are published in, with real video files."""

import csv
import json

import pytest

from tests.support.data.clips import clips_by_brightness
from video_trl.cli import main
from video_trl.data.columns import check_columns
from video_trl.data.importers.imported import save_import
from video_trl.data.importers.phygdpo import read_phygdpo
from video_trl.data.importers.simpletuner import read_simpletuner
from video_trl.data.importers.videodpo import read_videodpo
from video_trl.data.tables import load_rows
from video_trl.data.video_io import read_video


COLUMNS = ["videopath", "caption", "orig_idx", "sa_score", "pc_score", "joint_score"]
SEEDS = (0, 1, 3)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return clips_by_brightness(tmp_path_factory.mktemp("clips"))


def brightness(path):
    return round(float(read_video(path).mean()) / 40) * 40


def put(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def write_tables(root, lines, size="14B"):
    """`lines`: seed -> rows of (id, caption, sa, pc)."""
    for seed, rows in lines.items():
        path = put(root / "videophy/evaluated_score" / f"train_part_0_{size}_seed_{seed}" / "final.csv", b"")
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(COLUMNS)
            for name, caption, sa, pc, *more in rows:
                writer.writerow([f"/data/home/x/seed_{seed}/{name}.mp4", caption, name, sa, pc, 0, *more])


NAMES = ["-0MNKMpwaUY-Scene-0018", "__1tDwG_iAE-Scene-0003"]


@pytest.fixture
def phygdpo(tmp_path, clips):
    root = tmp_path / "PhyGDPO"
    rows = [(NAMES[0], 'A "syringe", held.\nThen a cap.', 3, 5), (NAMES[1], "A knife.", 0, 4)]
    write_tables(root, dict.fromkeys(SEEDS, rows))
    for seed, value in zip(SEEDS, (40, 80, 120), strict=True):
        for name in NAMES:
            put(root / f"DPO_data/Wan14B/seed_{seed}/{name}.mp4", clips[value])
            put(root / f"DPO_data/Wan14B/seed_{seed}/{name}.txt", b"caption")
    for name in NAMES:
        put(root / f"T2V_data/VIDGEN-1M_unzip/{name}.mp4", clips[200])
    return root


def test_phygdpos_groups_become_rows(phygdpo):
    imported = read_phygdpo(phygdpo)
    assert imported.skipped == [] and [row["seeds"] for row in imported.rows] == [[0, 1, 3]] * 2
    first, second = imported.rows
    assert first["prompt"] == 'A "syringe", held.\nThen a cap.' and first["generator"] == "Wan14B"
    assert [brightness(path) for path in (first["chosen"], *first["rejected"])] == [200, 40, 80, 120]
    assert first["rejected_scores"] == [{"sa": 0.6, "pc": 1.0}] * 3
    assert second["rejected_scores"][0] == {"sa": 0.0, "pc": 0.8}
    check_columns(imported.rows, "group", physics_rewarding=True)
    assert [len(row["rejected"]) for row in read_phygdpo(phygdpo, seeds=[3]).rows] == [1, 1]


def test_the_parts_of_a_table_belong_together(phygdpo):
    scores = phygdpo / "videophy/evaluated_score"
    for seed in SEEDS:
        first, second = scores / f"train_part_0_14B_seed_{seed}", scores / f"train_part_1_14B_seed_{seed}"
        lines = (first / "final.csv").read_text().splitlines(keepends=True)
        put(second / "final.csv", "".join([lines[0], lines[-1]]).encode())
        (first / "final.csv").write_text("".join(lines[:-1]))
    imported = read_phygdpo(phygdpo)
    assert len(imported.rows) == 2 and imported.skipped == []


def test_the_command_writes_what_training_reads(phygdpo, tmp_path, capsys):
    (phygdpo / f"DPO_data/Wan14B/seed_3/{NAMES[1]}.mp4").write_bytes(b"no video")
    out = tmp_path / "out"
    assert main(["data", "import", "phygdpo", str(phygdpo), "--output_dir", str(out)]) == 0
    said = capsys.readouterr().out
    assert f"1 rows in {out}" in said and f"group {NAMES[1]}: " in said
    assert (out / "skipped.txt").read_text().startswith(f"group {NAMES[1]}: ")
    rows = load_rows(str(out), "train")
    check_columns(rows, "group", physics_rewarding=True)
    assert brightness(rows[0]["rejected"][2]) == 120
    assert main(["data", "check", str(out)]) == 0
    assert "train gdpo: yes" in capsys.readouterr().out
    assert main(["data", "phygdpo", str(phygdpo), "--output_dir", str(out)]) == 1
    assert "exists already" in capsys.readouterr().err


BAD_LINES = {
    "score off the scale": ("b", "text", 6, 1),
    "score that is none": ("b", "text", "high", 1),
    "score not finite": ("b", "text", "nan", 1),
    "no score": ("b", "text", "", 1),
    "no caption": ("b", "  ", 1, 1),
    "path in place of a name": ("../../b", "text", 1, 1),
    "no name": ("", "text", 1, 1),
    "a cell too many": ("b", "text", 1, 1, "more"),
}


@pytest.mark.parametrize("line", BAD_LINES.values(), ids=BAD_LINES)
def test_a_bad_line_costs_its_own_group(tmp_path, clips, line):
    root = tmp_path / "data"
    write_tables(root, {0: [("a", "text", 1, 1), line, ("c", "text", 1, 1)]})
    for name in "abc":
        put(root / f"Wan14B/seed_0/{name}.mp4", clips[40])
        put(root / f"VIDGEN-1M_unzip/{name}.mp4", clips[200])
    imported = read_phygdpo(root)
    assert [row["chosen"].rpartition("/")[2] for row in imported.rows] == ["a.mp4", "c.mp4"]
    assert len(imported.skipped) == 1 and "final.csv, line 3: " in imported.skipped[0]


def test_lines_that_repeat_differ_or_break_off_cost_their_own_group(tmp_path, clips):
    root = tmp_path / "data"
    write_tables(root, {0: [(n, "text", 1, 1) for n in "abcaz"], 1: [(n, "text", 1, 1) for n in "adc"]})
    table = root / "videophy/evaluated_score/train_part_0_14B_seed_1/final.csv"
    table.write_text(table.read_text().replace("text,c", "other,c") + 'x,"' + "never closed " * 12000)
    for name in "abcd":
        for seed in (0, 1):
            put(root / f"Wan14B/seed_{seed}/{name}.mp4", clips[40])
        put(root / f"VIDGEN-1M_unzip/{name}.mp4", clips[200])
    imported = read_phygdpo(root)
    assert [row["chosen"].rpartition("/")[2] for row in imported.rows] == ["a.mp4"]
    listed = "\n".join(imported.skipped)
    assert "a stands in" in listed and "this is no CSV" in listed and "group c: its captions differ" in listed
    assert "group b: it has no usable line in the table of seed 1" in listed
    assert "group d: it has no usable line in the table of seed 0" in listed


def test_what_phygdpos_folder_lacks_is_asked_for(phygdpo, tmp_path, clips, capsys):
    for name in NAMES:
        put(phygdpo / f"DPO_data/Wan1.3B/seed_0/{name}.mp4", clips[160])
    write_tables(phygdpo, {0: [(name, "text", 1, 1) for name in NAMES]}, size="1.3B")
    with pytest.raises(ValueError, match=r"has videos of \['Wan1.3B', 'Wan14B'\]. Choose one with"):
        read_phygdpo(phygdpo)
    small = read_phygdpo(phygdpo, generator_model="Wan1.3B")
    assert brightness(small.rows[0]["rejected"][0]) == 160 and small.rows[0]["generator"] == "Wan1.3B"
    with pytest.raises(ValueError, match="expected one of .*got 'Wan2'"):
        read_phygdpo(phygdpo, generator_model="Wan2")
    with pytest.raises(ValueError, match=r"no table of Wan14B with seed \[7\]; there are \[0, 1, 3\]"):
        read_phygdpo(phygdpo, generator_model="Wan14B", seeds=[0, 7])
    (phygdpo / "T2V_data/VIDGEN-1M_unzip").rename(tmp_path / "real")
    with pytest.raises(ValueError, match="VidGen-1M.*name their folder with `--real_videos`"):
        read_phygdpo(phygdpo, generator_model="Wan14B")
    assert len(read_phygdpo(phygdpo, generator_model="Wan14B", real_videos=tmp_path / "real").rows) == 2
    (phygdpo / "DPO_data/Wan14B/seed_1").rename(phygdpo / "DPO_data/Wan14B/other")
    with pytest.raises(ValueError, match=r"none for seed \[1\].*`--seeds 0 3`"):
        read_phygdpo(phygdpo, generator_model="Wan14B", real_videos=tmp_path / "real")
    (phygdpo / "DPO_data").rename(tmp_path / "DPO_data")
    with pytest.raises(ValueError, match="expected one folder DPO_data/Wan14B with seed_0/<id>.mp4.*Unzip"):
        read_phygdpo(phygdpo, generator_model="Wan14B", real_videos=tmp_path / "real")
    table = phygdpo / "videophy/evaluated_score/train_part_0_1.3B_seed_0/final.csv"
    (tmp_path / "DPO_data").rename(phygdpo / "DPO_data")
    table.write_text("caption,score\n")
    with pytest.raises(ValueError, match=r"expected the columns .*'orig_idx'.* got \['caption', 'score'\]"):
        read_phygdpo(phygdpo, generator_model="Wan1.3B", real_videos=tmp_path / "real")
    with pytest.raises(ValueError, match="expected tables such as train_part_0_14B_seed_0/final.csv, found none"):
        read_phygdpo(tmp_path / "real")
    with pytest.raises(ValueError, match="which is no folder"):
        read_phygdpo(tmp_path / "nowhere")


def videodpo_folder(root, clips, moved=False):
    """Two pairs as VideoDPO's code writes them, a third that is broken in several ways."""
    videos, pairs = [], []
    for pair, caption in enumerate(["a red ball", "a blue ball", "a ball"]):
        for folder, value in (("winvideos", 200), ("losevideos", 40)):
            file = put(root / folder / f"{pair:06}.mp4", clips[value])
            path = f"/home/x/dataset/{folder}/{pair:06}.mp4" if moved else str(file.relative_to(root))
            basic = {"clip_duration": 0.5, "clip_path": path, "globalidx": pair}
            videos.append({"basic": basic, "misc": {"frame_caption": [caption]}})
        pairs.append({"video1": 2 * pair, "video2": 2 * pair + 1, "label": 1, "frame_caption": caption})
    (root / "metadata.json").write_text(json.dumps(videos))
    (root / "pair.json").write_text(json.dumps(pairs))
    return videos, pairs


@pytest.mark.parametrize("moved", [False, True])
def test_videodpos_pairs_become_rows(tmp_path, clips, moved):
    videodpo_folder(tmp_path, clips, moved)
    imported = read_videodpo(tmp_path)
    assert [row["prompt"] for row in imported.rows] == ["a red ball", "a blue ball", "a ball"]
    assert all(brightness(row["chosen"]) == 200 and brightness(row["rejected"]) == 40 for row in imported.rows)
    check_columns(load_rows(str(save_import(imported, tmp_path / "out")), "train"), "preference")


@pytest.mark.parametrize(
    "change",
    [
        {"video1": 99},
        {"video1": -1},
        {"video1": True},
        {"video2": "1"},
        {"video2": 2},
        {"video1": None},
    ],
    ids=str,
)
def test_a_bad_pair_of_videodpo_costs_itself(tmp_path, clips, change):
    _, pairs = videodpo_folder(tmp_path, clips)
    pairs[1] |= change
    (tmp_path / "pair.json").write_text(json.dumps([pairs[0], pairs[1], "none", pairs[2]]))
    imported = read_videodpo(tmp_path)
    assert [row["prompt"] for row in imported.rows] == ["a red ball", "a ball"]
    assert [line.partition(":")[0] for line in sorted(imported.skipped)] == ["pair.json, pair 1", "pair.json, pair 2"]


@pytest.mark.parametrize("path", ["/etc/passwd", "../x.mp4", "gone/x.mp4", "", None, 3])
def test_a_video_outside_the_folder_costs_its_pair(tmp_path, clips, path):
    root = tmp_path / "data"
    videos, _ = videodpo_folder(root, clips)
    put(tmp_path / "x.mp4", clips[120])
    videos[3]["basic"]["clip_path"] = path
    (root / "metadata.json").write_text(json.dumps(videos))
    imported = read_videodpo(root)
    assert len(imported.rows) == 2 and len(imported.skipped) == 1


def test_the_scores_of_videodpos_pairs_become_weights(tmp_path, clips):
    videodpo_folder(tmp_path, clips)
    pairs = json.loads((tmp_path / "pair.json").read_text())
    for pair, score in zip(pairs, (0.36, 0.72, None), strict=True):
        pair |= {} if score is None else {"score": score}
    (tmp_path / "pair.json").write_text(json.dumps(pairs))
    rows = read_videodpo(tmp_path).rows
    assert [row["weight"] for row in rows] == [2, 1, 0.72]
    check_columns(rows, "preference", pair_weights=True)
    pairs[0]["score"] = 0
    (tmp_path / "pair.json").write_text(json.dumps(pairs))
    imported = read_videodpo(tmp_path)
    assert len(imported.rows) == 2 and "positive, finite number in 'score', got 0" in imported.skipped[0]


def test_other_folders_are_not_videodpos(tmp_path, clips):
    with pytest.raises(ValueError, match="expected metadata.json and pair.json, found no metadata.json"):
        read_videodpo(tmp_path)
    videodpo_folder(tmp_path, clips)
    (tmp_path / "pair.json").write_text("{}")
    with pytest.raises(ValueError, match="expected a list with at least one entry, got dict"):
        read_videodpo(tmp_path)
    (tmp_path / "pair.json").write_text("[")
    with pytest.raises(ValueError, match="cannot be read as JSON"):
        read_videodpo(tmp_path)
    (tmp_path / "pair.json").write_text('[{"video1": 0, "video2": 0}]')
    with pytest.raises(ValueError, match="No row of the dataset can be used, of 1: pair.json, pair 0: .*the chosen"):
        read_videodpo(tmp_path)


def simpletuner_config(root, clips, rejected=("lose",), **options):
    put(root / "win/sub/one_ball.mp4", clips[200])
    put(root / "win/sub/one_ball.txt", b"first line\nsecond line\n")
    put(root / "win/two.mp4", clips[160])
    put(root / "win/two.txt", b"two balls")
    for number, name in enumerate(rejected):
        put(root / name / "sub/one_ball.webm", clips[40 + 40 * number])
        put(root / name / "two.mp4", clips[40 + 40 * number])
    config = [
        {"id": "win", "type": "local", "dataset_type": "video", "instance_data_dir": "win", "caption_strategy":
         "textfile", "conditioning_data": list(rejected)} | options,
        *({"id": name, "type": "local", "dataset_type": "conditioning", "conditioning_type": "reference_strict",
           "instance_data_dir": str(root / name), "source_dataset_id": "win"} for name in rejected),
        {"id": "text", "dataset_type": "text_embeds", "default": True, "type": "local", "cache_dir": "cache"},
        {"id": "old", "dataset_type": "video", "disabled": True, "instance_data_dir": "gone"},
    ]  # fmt: skip
    (root / "multidatabackend.json").write_text(json.dumps(config))
    return config


@pytest.mark.parametrize(
    ("options", "prompts"),
    [
        ({}, ["first line", "two balls"]),
        ({"disable_multiline_split": True}, ["first line second line", "two balls"]),
        ({"caption_strategy": "filename"}, ["one ball", "two"]),
        ({"caption_strategy": "instanceprompt", "instance_prompt": "a ball"}, ["a ball", "a ball"]),
        ({"prepend_instance_prompt": True, "instance_prompt": "film,"}, ["film, first line", "film, two balls"]),
        ({"conditioning_data": "lose"}, ["first line", "two balls"]),
        ({"caption_shuffle": {"enable": False, "count": 3}}, ["first line", "two balls"]),
    ],
    ids=str,
)
def test_simpletuners_pairs_become_rows(tmp_path, clips, options, prompts):
    simpletuner_config(tmp_path, clips, **options)
    imported = read_simpletuner(tmp_path / "multidatabackend.json")
    assert sorted(row["prompt"] for row in imported.rows) == sorted(prompts) and imported.skipped == []
    assert sorted((brightness(row["chosen"]), brightness(row["rejected"])) for row in imported.rows) == [
        (160, 40),
        (200, 40),
    ]
    check_columns(imported.rows, "preference")


def test_several_rejected_datasets_make_groups(tmp_path, clips):
    simpletuner_config(tmp_path, clips, rejected=("lose", "lose2"))
    (tmp_path / "lose2/two.mp4").unlink()
    (tmp_path / "win/three.mp4").write_bytes(clips[120])
    imported = read_simpletuner(tmp_path / "multidatabackend.json")
    assert [[brightness(path) for path in row["rejected"]] for row in imported.rows] == [[40, 80]]
    assert sorted(imported.skipped) == [
        "win, three: a rejected video of that name is missing",
        "win, two: a rejected video of that name is missing",
    ]
    check_columns(imported.rows, "group")


def test_captions_are_read_inside_the_folder_only(tmp_path, clips):
    simpletuner_config(tmp_path / "data", clips)
    put(tmp_path / "secret.txt", b"a secret")
    (tmp_path / "data/win/two.txt").unlink()
    (tmp_path / "data/win/two.txt").symlink_to(tmp_path / "secret.txt")
    imported = read_simpletuner(tmp_path / "data/multidatabackend.json")
    assert [row["prompt"] for row in imported.rows] == ["first line"]
    assert imported.skipped == ["win, two: there is no caption in two.txt beside it"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"caption_strategy": "parquet"}, "`caption_strategy` of 'win' is 'parquet'.*Write NAME.txt"),
        ({"caption_strategy": "instanceprompt"}, "needs an `instance_prompt`"),
        ({"dataset_type": "image"}, "'win' has images"),
        ({"type": "aws"}, "'win' is of the type 'aws'; expected 'local'"),
        ({"instance_data_dir": "gone"}, "there is no such folder here.*Correct it in a copy"),
        ({"conditioning_data": ["gone"]}, r"`conditioning_data` of 'win' names \['gone'\]"),
        ({"conditioning_data": []}, "expected a dataset of type 'video' with `conditioning_data`.*found none among"),
        ({"caption_shuffle": {"enable": True}}, "which change captions"),
        ({"caption_filter_list": "words.txt"}, "which change captions"),
        ({"caption_strategy": "instanceprompt", "instance_prompt": ["a", "b"]}, "expected one text.*choose one"),
        ({"id": "lose"}, r"several datasets have the `id` \['lose'\]"),
        ({"id": None}, "expected a list of datasets with an `id` each"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_cannot_be_taken_from_simpletuner_is_refused(tmp_path, clips, change, message):
    simpletuner_config(tmp_path, clips, **change)
    with pytest.raises(ValueError, match=message):
        read_simpletuner(tmp_path / "multidatabackend.json")


def test_the_command_refuses_what_it_cannot_read(tmp_path, capsys):
    words = ["data", "import"]
    for argv, code, message in (
        ([*words, "webvid", ".", "--output_dir", "x"], 2, "expected one of phygdpo, videodpo, simpletuner"),
        ([*words, "videodpo", "."], 2, "--output_dir is needed"),
        ([*words, "videodpo", ".", "--output_dir", "x", "--seeds", "1"], 2, "--seeds is read for phygdpo"),
        ([*words, "simpletuner", "gone.json", "--output_dir", "x"], 1, "multidatabackend.json, got gone.json"),
        (["data", "imports"], 2, "did you mean 'import'"),
    ):
        assert main(argv) == code
        assert message in capsys.readouterr().err
