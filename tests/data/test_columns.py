import math

import datasets
import numpy as np
import pytest
import torch

from tests.support.tiny import tiny_encoded_group, tiny_encoded_video, tiny_group_dataset, tiny_video
from video_trl.data import check_columns, column_names, group_features, is_encoded
from video_trl.data.columns import as_scores, as_videos, undecoded


def raw_rows(n: int = 3, m: int = 2) -> list[dict]:
    return [
        {
            "prompt": "a red ball falls",
            "chosen": f"{row}.mp4",
            "rejected": [f"{row}_{j}.mp4" for j in range(m)],
            "rejected_scores": [{"sa": 0.5, "pc": 0.25}] * m,
        }
        for row in range(n)
    ]


def as_dataset(rows: list[dict]) -> datasets.Dataset:
    return datasets.Dataset.from_list(rows, features=group_features())


@pytest.fixture(params=["list of dicts", "datasets.Dataset"])
def kind(request):
    """Every check must hold for both kinds of dataset."""
    return (lambda rows: rows) if request.param == "list of dicts" else as_dataset


def test_good_datasets_pass(kind):
    check_columns(kind(raw_rows()), "group", physics_rewarding=True)
    check_columns(kind(raw_rows()), "preference")
    check_columns(tiny_group_dataset(n=2), "group", physics_rewarding=True)
    check_columns([{"prompt": "a", "video": "a.mp4"}], "video")
    check_columns(tiny_encoded_group(), "group", physics_rewarding=True)
    check_columns(tiny_encoded_video(), "video")


def test_preference_rows_are_groups_of_one():
    rows = [{"prompt": "a", "chosen": "a.mp4", "rejected": "b.mp4", "rejected_scores": {"sa": 1.0, "pc": 0.0}}] * 2
    check_columns(rows, "group", physics_rewarding=True)
    check_columns(datasets.Dataset.from_list(rows), "group", physics_rewarding=True)
    arrays = [{"prompt": "a", "chosen": tiny_video(0), "rejected": tiny_video(1)}] * 2
    check_columns(arrays, "preference")


def test_zero_rows():
    with pytest.raises(ValueError, match="at least one row, got zero rows"):
        check_columns([], "group")
    with pytest.raises(ValueError, match="at least one row, got zero rows"):
        check_columns(as_dataset(raw_rows()).select([]), "group")


@pytest.mark.parametrize("row_type", ["preference", "group"])
def test_missing_column_names_what_is_needed_and_what_is_there(row_type):
    rows = [{"text": "a", "chosen": "a.mp4", "rejected": ["b.mp4"]}]
    with pytest.raises(
        ValueError, match=r"got \['text', 'chosen', 'rejected'\]; missing: \['prompt'\].*rename_column"
    ):
        check_columns(rows, row_type)
    with pytest.raises(ValueError, match=r"missing: \['prompt'\]"):
        check_columns(datasets.Dataset.from_list(rows), row_type)


def test_pairs_are_told_how_they_feed_fine_tuning_and_clips_how_they_become_pairs():
    with pytest.raises(ValueError, match=r"missing: \['video'\].*on the command line with `--column video=chosen`"):
        check_columns([{"prompt": "a", "chosen": "a.mp4", "rejected": "b.mp4"}], "video")
    with pytest.raises(ValueError, match=r"needs rejected videos beside each chosen one.*`video-trl curate gt-pairs`"):
        check_columns([{"prompt": "a", "video": "a.mp4"}], "preference")


def test_half_encoded_dataset_is_told_both_ways_out():
    rows = [{key: value for key, value in row.items() if key != "prompt_embeds"} for row in tiny_encoded_group()]
    with pytest.raises(ValueError, match=r"or, encoded, \['chosen_latents', 'rejected_latents', 'prompt_embeds'\]"):
        check_columns(rows, "group")


def test_missing_cell(kind):
    for column in ("prompt", "chosen"):
        rows = raw_rows()
        rows[1][column] = None
        with pytest.raises(ValueError, match=f"Row 1: expected a value in column '{column}', got none"):
            check_columns(kind(rows), "group")


def test_prompt_that_is_no_string():
    rows = [{"prompt": [{"role": "user", "content": "a ball"}], "video": "a.mp4"}]
    for dataset in (rows, datasets.Dataset.from_list(rows)):
        with pytest.raises(ValueError, match="Row 0: expected a string in column 'prompt', got list"):
            check_columns(dataset, "video")


@pytest.mark.parametrize("empty", [[], None])
def test_empty_rejected(kind, empty):
    rows = raw_rows()
    rows[2] |= {"rejected": empty, "rejected_scores": []}
    with pytest.raises(ValueError, match="Row 2: expected at least one rejected video, got an empty list"):
        check_columns(kind(rows), "group")


def test_missing_video_among_the_rejected(kind):
    rows = raw_rows()
    rows[2]["rejected"] = ["a.mp4", None]
    with pytest.raises(ValueError, match=r"Row 2: expected a video in rejected\[1\], got none.*`dataset.filter"):
        check_columns(kind(rows), "group")
    check_columns(kind(rows[:2]), "group")


def test_missing_rejected_video_is_counted_after_select():
    rows = raw_rows()
    rows[0]["rejected"] = [None, "a.mp4"]
    with pytest.raises(ValueError, match=r"Row 1: expected a video in rejected\[0\]"):
        check_columns(as_dataset(rows).select([2, 0]), "group")
    single = [{"prompt": "a", "chosen": "a.mp4", "rejected": name} for name in ("b.mp4", None)]
    with pytest.raises(ValueError, match=r"Row 1: expected a video in rejected\[0\]"):
        check_columns(datasets.Dataset.from_list(single), "preference")


def test_different_numbers_of_rejected_videos(kind):
    rows = raw_rows(m=3)
    rows[1]["rejected"] = rows[1]["rejected"][:2]
    with pytest.raises(ValueError, match="Row 1: expected 3 rejected videos as in row 0, got 2. .* the first 2"):
        check_columns(kind(rows), "group")


def test_rows_are_counted_after_select_and_shuffle():
    """Indices of a `datasets.Dataset` must be followed: row 0 of the selection is row 2 of the table."""
    rows = raw_rows()
    rows[2]["rejected"] = []
    selected = as_dataset(rows).select([2, 0])
    with pytest.raises(ValueError, match="Row 0: expected at least one rejected video"):
        check_columns(selected, "group")
    check_columns(as_dataset(rows).select([1, 0]), "group")


@pytest.mark.parametrize("bad", [-0.01, 1.01, 5.0, math.nan, math.inf])
@pytest.mark.parametrize("name", ["sa", "pc"])
def test_scores_outside_the_unit_interval(kind, name, bad):
    rows = raw_rows()
    rows[1]["rejected_scores"] = [{"sa": 0.5, "pc": 0.5}, {"sa": 0.5, "pc": 0.5, name: bad}]
    with pytest.raises(ValueError, match=rf"Row 1: '{name}' of rejected\[1\] is .*, expected a number in \[0, 1\]"):
        check_columns(kind(rows), "group", physics_rewarding=math.isnan(bad))


def test_limits_of_the_unit_interval_are_scores(kind):
    rows = raw_rows()
    rows[1]["rejected_scores"] = [{"sa": 0.0, "pc": 1.0}] * 2
    check_columns(kind(rows), "group", physics_rewarding=True)


@pytest.mark.parametrize("missing", [{"sa": 0.5, "pc": None}, {"sa": 0.5, "pc": math.nan}, None])
def test_missing_score_of_one_video_stops_those_who_use_scores(kind, missing):
    rows = raw_rows()
    rows[0]["rejected_scores"] = [missing, {"sa": 0.5, "pc": 0.5}]
    with pytest.raises(ValueError, match=r"Row 0: '(sa|pc)' of rejected\[0\] is nan.*set `physics_rewarding=False`"):
        check_columns(kind(rows), "group", physics_rewarding=True)
    check_columns(kind(rows), "group")


def test_scores_on_another_scale_are_told_to_all():
    rows = raw_rows()
    rows[1]["rejected_scores"] = [{"sa": 3, "pc": 4}] * 2
    with pytest.raises(ValueError, match=r"Rescale .*This run does not use them: `dataset.remove_columns"):
        check_columns(rows, "group")


def test_wrong_number_of_scores(kind):
    rows = raw_rows()
    rows[1]["rejected_scores"] = rows[1]["rejected_scores"][:1]
    with pytest.raises(ValueError, match=r"Row 1: expected \(sa, pc\) of each of the 2 rejected videos.*\(1, 2\)"):
        check_columns(kind(rows), "group")


def test_scores_that_are_no_numbers():
    rows = raw_rows()
    rows[1]["rejected_scores"] = ["good", "bad"]
    with pytest.raises(ValueError, match="Row 1: 'rejected_scores' must be numbers, got \\['good', 'bad'\\]"):
        check_columns(rows, "group")


def test_scores_missing_while_physics_rewarding(kind):
    rows = raw_rows()
    rows[1]["rejected_scores"] = None
    check_columns(kind(rows), "group")
    with pytest.raises(ValueError, match="Row 1: expected scores of 2 rejected videos, got none. Judge"):
        check_columns(kind(rows), "group", physics_rewarding=True)
    bare = [{key: value for key, value in row.items() if key != "rejected_scores"} for row in raw_rows()]
    check_columns(bare, "group")
    with pytest.raises(ValueError, match="needs the column 'rejected_scores'.*set `physics_rewarding=False`"):
        check_columns(bare, "group", physics_rewarding=True)


def test_encoded_scores_are_checked_as_well():
    rows = tiny_encoded_group()
    rows[1]["rejected_scores"] = torch.full((3, 2), 2.0)
    with pytest.raises(ValueError, match="Row 1: 'sa' of rejected"):
        check_columns(rows, "group")
    rows = tiny_encoded_group()
    rows[2]["rejected_latents"] = rows[2]["rejected_latents"][:1]
    with pytest.raises(ValueError, match="Row 2: expected 3 rejected videos"):
        check_columns(rows, "group")


def test_rows_without_a_number_are_refused():
    with pytest.raises(ValueError, match="Expected a dataset with a length, got a list_iterator. Make a list"):
        check_columns(iter([{"prompt": "a", "video": "a.mp4"}]), "video")


def test_streaming_dataset_and_unknown_row_type():
    with pytest.raises(ValueError, match="got a streaming one. Load it without `streaming=True`"):
        check_columns(as_dataset(raw_rows()).to_iterable_dataset(), "group")
    with pytest.raises(ValueError, match="Unknown row type 'pairs'; expected one of"):
        check_columns(raw_rows(), "pairs")


def test_splits_or_a_name_instead_of_a_dataset():
    splits = datasets.DatasetDict(train=as_dataset(raw_rows()), test=as_dataset(raw_rows()))
    with pytest.raises(ValueError, match=r"got a DatasetDict with the splits \['train', 'test'\].*dataset\['train'\]"):
        check_columns(splits, "group")
    with pytest.raises(ValueError, match=r"got the name 'my/groups'.*datasets\.load_dataset\('my/groups'"):
        check_columns("my/groups", "group")
    with pytest.raises(ValueError, match="got a DatasetDict"):  # trainers look at the columns before they check them
        column_names(splits)


def test_is_encoded_tells_raw_from_encoded():
    assert is_encoded(tiny_encoded_group(), "group") and is_encoded(tiny_encoded_video(), "video")
    assert not is_encoded(raw_rows(), "group") and not is_encoded(tiny_encoded_video(), "group")


def test_group_features_round_trip_through_parquet(tmp_path):
    features = group_features("category", "seeds")
    videos = [{"path": f"{name}.mp4", "bytes": name.encode()} for name in "abc"]
    row = raw_rows()[0] | {"chosen": videos[0], "rejected": videos[1:], "category": "fall", "seeds": [1, 2]}
    datasets.Dataset.from_list([row], features=features).to_parquet(tmp_path / "data.parquet")
    loaded = datasets.Dataset.from_parquet(str(tmp_path / "data.parquet"), cache_dir=str(tmp_path))
    assert loaded.features == features and loaded[0] == row
    with pytest.raises(ValueError, match="Unknown optional columns"):
        group_features("colour")


def test_undecoded_needs_no_video_decoder():
    """`load_dataset` gives columns that want torchcodec on access; the encoder must not need it."""
    decoding = as_dataset(raw_rows()).cast_column("chosen", datasets.Video())
    decoding = decoding.cast_column("rejected", datasets.List(datasets.Video())).with_format("numpy")
    row = undecoded(decoding)[0]
    assert row["chosen"] == {"path": "0.mp4", "bytes": None} and row["rejected"][1]["path"] == "0_1.mp4"


def test_cells_with_one_or_several_videos_become_lists():
    video = tiny_video(0)
    assert as_videos("a.mp4") == ["a.mp4"] and as_videos(["a.mp4", "b.mp4"]) == ["a.mp4", "b.mp4"]
    assert as_videos({"path": "a.mp4"}) == [{"path": "a.mp4"}]
    for cell, count in ((video, 1), (np.stack([video] * 3), 3), (video.tolist(), 1), ([video.tolist()] * 2, 2)):
        videos = as_videos(cell)
        assert len(videos) == count
        np.testing.assert_array_equal(videos[-1], video)


def test_scores_in_every_accepted_form_are_the_same_numbers():
    expected = np.array([[0.25, 1.0], [0.5, 0.0]], dtype=np.float32)
    dicts = [{"pc": 1.0, "sa": 0.25, "explanation": "kept out"}, {"sa": 0.5, "pc": 0.0}]
    for cell in (dicts, expected, expected.tolist(), torch.from_numpy(expected)):
        np.testing.assert_array_equal(as_scores(cell), expected)
        assert as_scores(cell).dtype == np.float32
    np.testing.assert_array_equal(as_scores(dicts[0]), expected[:1])
    in_lists = {"sa": [0.25, 0.5], "pc": [1.0, 0.0]}  # as a dataset with `Sequence` of the two shows them
    np.testing.assert_array_equal(as_scores(in_lists), expected)
    np.testing.assert_array_equal(as_scores(in_lists | {"pc": [None, 0.0]}), [[0.25, np.nan], [0.5, 0.0]])
    assert as_scores([]).shape == (0, 2)
