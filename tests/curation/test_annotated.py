import csv
import io
import itertools
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from video_trl.curation import annotated_pairs, read_votes
from video_trl.curation.annotated import DIMENSIONS, pairs_to_mark, write_pairs_to_mark
from video_trl.data import check_columns


def votes_of(pairs, raters=3):
    """Votes with a known answer: `pairs` maps a name to two lists, a mark a rater (in all dimensions)."""
    votes = []
    for name, sides in pairs.items():
        for side, marks in zip("ab", sides, strict=True):
            for rater, mark in enumerate(marks):
                vote = {
                    "pair_id": name,
                    "video": f"{name}-{side}.mp4",
                    "annotator": f"r{rater}",
                    "prompt": f"of {name}",
                }
                votes.append(vote | dict.fromkeys(DIMENSIONS, mark))
    return votes


PAIRS = {
    "ideal": ([5, 5, 5], [2, 2, 2]),
    "exactly": ([2, 2, 2], [4, 4, 4]),  # difference 2 and quality 4 are enough; the second video is better
    "close": ([5, 5, 5], [4, 4, 4]),
    "both bad": ([3, 3, 3], [1, 1, 1]),
    "just below": ([4, 4, 4], [2, 2, 3]),
    "equal": ([4, 4, 4], [4, 4, 4]),
    "two raters": ([5, 5], [1, 1]),
}


def test_a_constructed_vote_has_the_answer_that_it_was_made_for():
    pairs, manifest = annotated_pairs(votes_of(PAIRS))
    assert dict(zip(manifest["source_id"].to_pylist(), manifest["dropped_by"].to_pylist(), strict=True)) == {
        "ideal": None,
        "exactly": None,
        "close": "difference",
        "both bad": "positive_quality",
        "just below": "difference",
        "equal": "difference",
        "two raters": "raters",
    }
    assert [(row["prompt"], row["chosen"]["path"], row["rejected"]["path"]) for row in pairs] == [
        ("of ideal", "ideal-a.mp4", "ideal-b.mp4"),
        ("of exactly", "exactly-b.mp4", "exactly-a.mp4"),
    ]
    assert json.loads(pairs[0]["provenance"]) == {
        "route": "annotated", "source_id": "ideal", "raters": 3, "chosen_mean": 5.0, "rejected_mean": 2.0,
    }  # fmt: skip
    check_columns(pairs, "preference")
    values = {row["source_id"]: row["value"] for row in manifest.to_pylist()}
    assert (values["close"], values["both bad"], values["two raters"]) == (1.0, 3.0, 2.0)
    assert values["just below"] == pytest.approx(5 / 3)


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"min_difference": 1.0}, ["ideal", "exactly", "close", "just below"]),
        ({"min_difference": 1.0, "min_positive": None}, ["ideal", "exactly", "close", "both bad", "just below"]),
        ({"min_difference": 2.0, "min_positive": None}, ["ideal", "exactly", "both bad"]),
        ({"min_difference": 0.0, "min_positive": None, "min_raters": 2}, [name for name in PAIRS if name != "equal"]),
    ],
)
def test_thresholds_are_the_papers_subsets(options, kept):
    pairs, _ = annotated_pairs(votes_of(PAIRS), **options)
    assert [row["prompt"].removeprefix("of ") for row in pairs] == kept


def test_means_are_those_of_all_marks_of_the_raters_who_saw_both():
    """By brute force on random marks; one more rater who marked one side only must not count."""
    rng = np.random.default_rng(0)
    votes, marks = [], rng.integers(1, 6, size=(20, 2, 4, 5))
    for pair, side, rater in itertools.product(range(20), range(2), range(4)):
        vote = {"pair_id": str(pair), "video": f"{side}", "annotator": str(rater), "prompt": "p"}
        votes.append(vote | dict(zip(DIMENSIONS, marks[pair, side, rater].tolist(), strict=True)))
    votes += [v | {"annotator": "once"} | dict.fromkeys(DIMENSIONS, 5) for v in votes if v["video"] == "0"]
    pairs, manifest = annotated_pairs(votes, min_difference=0.5, min_positive=None)
    means = marks.mean(axis=(2, 3))
    clear = np.flatnonzero(np.abs(means[:, 0] - means[:, 1]) >= 0.5 - 1e-9)
    assert [json.loads(row["provenance"])["source_id"] for row in pairs] == [str(pair) for pair in clear]
    assert [row["chosen"]["path"] for row in pairs] == [str(means[pair].argmax()) for pair in clear]
    assert manifest["raters"].to_pylist() == [4] * 20
    assert manifest["chosen_mean"].to_numpy() == pytest.approx(means.max(axis=1))


def test_a_pair_is_two_videos():
    three = votes_of({"x": ([5] * 3, [1] * 3)})
    three.append(three[0] | {"video": "third"})
    _, manifest = annotated_pairs(three)
    assert manifest["dropped_by"].to_pylist() == ["not_two_videos"] and manifest["value"].to_pylist() == [3]
    assert len(annotated_pairs([])[0]) == 0
    _, manifest = annotated_pairs(three[:1])
    assert manifest["dropped_by"].to_pylist() == ["not_two_videos"] and manifest["prompt"].to_pylist() == ["of x"]


def test_pairs_to_mark_are_written_into_the_folder_of_a_run(tmp_path):
    with pytest.raises(ValueError, match="expected the folder of a finished run of GT-Pair"):
        write_pairs_to_mark(tmp_path)
    run = {"content": ["c"] * 4, "prompt": ["p"] * 4, "rejected": ["a.mp4", "b.mp4", "c.mp4", "d.mp4"]}
    run["dropped_by"] = [None, None, None, "damaged"]
    pq.write_table(pa.table(run), tmp_path / "generations.parquet")
    rows = [json.loads(line) for line in write_pairs_to_mark(tmp_path).read_text().splitlines()]
    assert len(rows) == 3 and {row["prompt"] for row in rows} == {"p"}
    assert (rows[0]["video_a"], rows[0]["video_b"]) == (str(tmp_path / "a.mp4"), str(tmp_path / "b.mp4"))


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_votes_are_read_from_both_kinds_of_file(tmp_path, suffix):
    votes, path = votes_of(PAIRS), tmp_path / f"votes{suffix}"
    with open(path, "w", encoding="utf-8-sig" if suffix == ".csv" else "utf-8", newline="") as file:
        if suffix == ".csv":
            writer = csv.DictWriter(file, votes[0].keys())
            writer.writeheader()
            writer.writerows(votes)
        else:
            file.writelines(json.dumps(vote) + "\n" for vote in votes)
    assert read_votes(path) == votes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_quality": 6}, r"line 3: expected a whole number from 1 to 5 in image_quality, got '6'"),
        ({"image_quality": 4.5}, r"line 3: expected a whole number from 1 to 5"),
        ({"motion_quality": ""}, r"line 3: expected values for \['motion_quality'\].*name the dimensions"),
        ({"annotator": "r0"}, r"line 3: r0 has marked x-a\.mp4 of pair x before"),
    ],
)
def test_votes_that_cannot_be_are_refused_by_their_line(tmp_path, change, message):
    votes = votes_of({"x": ([5] * 3, [1] * 3)})
    votes[2] |= change
    path = tmp_path / "votes.jsonl"
    path.write_text("".join(json.dumps(vote) + "\n" for vote in votes))
    with pytest.raises(ValueError, match=message):
        read_votes(path)


def test_text_to_video_has_no_reference_to_be_consistent_with(tmp_path):
    votes = [{k: v for k, v in vote.items() if k != "reference_consistency"} for vote in votes_of(PAIRS)]
    path = tmp_path / "votes.jsonl"
    path.write_text("".join(json.dumps(vote) + "\n" for vote in votes))
    four = [name for name in DIMENSIONS if name != "reference_consistency"]
    assert len(annotated_pairs(read_votes(path, four), dimensions=four)[0]) == 2
    (tmp_path / "votes.txt").touch()
    with pytest.raises(ValueError, match=r"expected votes in a \.csv or \.jsonl file, got \.txt"):
        read_votes(tmp_path / "votes.txt")


def graded(differences):
    """Three raters, each pair with a difference of means."""
    votes = []
    for number, (high, low) in enumerate(differences):
        for who in ("a", "b", "c"):
            for video, mark in (("x", high), ("y", low)):
                votes.append({"pair_id": f"p{number}", "video": video, "annotator": who, "prompt": "p"})
                votes[-1] |= dict.fromkeys(DIMENSIONS, mark)
    return votes


def test_the_training_set_is_filled_up_with_smaller_differences_to_a_number():
    votes = graded([(5, 2), (5, 3), (4, 3), (3, 2), (5, 4), (3, 3)])  # 3, 2, 1, 1, 1, 0
    sizes = {}
    for fill_to in (None, 2, 4, 5, 99):
        pairs, table = annotated_pairs(votes, min_positive=None, fill_to=fill_to)
        sizes[fill_to] = len(pairs)
        differences = [row["difference"] for row in table.to_pylist() if row["dropped_by"] is None]
        assert sorted(differences, reverse=True)[:2] == [3.0, 2.0] and min(differences) >= 1
        assert [row["source_id"] for row in table.to_pylist()] == [f"p{n}" for n in range(6)]
    assert sizes == {None: 2, 2: 2, 4: 4, 5: 5, 99: 5}
    drawn = set()
    for seed in range(8):
        pairs, _ = annotated_pairs(votes, min_positive=None, fill_to=3, seed=seed)
        drawn.add(tuple(json.loads(row["provenance"])["source_id"] for row in pairs))
    default, first = (annotated_pairs(votes, min_positive=None, fill_to=3, **seed)[0] for seed in ({}, {"seed": 0}))
    assert default["provenance"] == first["provenance"]
    assert len(drawn) > 1 and all(ids[:2] == ("p0", "p1") for ids in drawn)


def _csv(votes):
    file = io.StringIO()
    writer = csv.DictWriter(file, votes[0].keys())
    writer.writeheader()
    writer.writerows(votes)
    return file.getvalue()


def test_a_table_from_a_spreadsheet_is_read_and_one_that_hides_rows_is_not(tmp_path):
    votes, path = votes_of(PAIRS), tmp_path / "votes.csv"
    path.write_text("\ufeff" + _csv(votes), encoding="utf-8")
    assert read_votes(path) == votes
    # A quote that is never closed swallows all rows after it.
    path.write_text(_csv(votes).replace(votes[2]["prompt"], f'"{votes[2]["prompt"]}', 1))
    with pytest.raises(ValueError, match="cannot be read as a CSV file in UTF-8"):
        read_votes(path)
    path.write_text(_csv(votes).replace(votes[2]["prompt"], "a, b", 1))
    with pytest.raises(ValueError, match="row 1 has another number of cells"):
        read_votes(path)
    with pytest.raises(ValueError, match="gone.csv cannot be read as a CSV file"):
        read_votes(tmp_path / "gone.csv")


def test_the_id_of_a_pair_stays_when_more_videos_are_made():
    def ids(*files):
        run = {"content": ["c"] * len(files), "prompt": ["p"] * len(files), "rejected": [f"g/{f}.mp4" for f in files]}
        pairs = pairs_to_mark(pa.table(run | {"dropped_by": pa.array([None] * len(files), pa.string())}))
        return {pair["pair_id"]: {pair["video_a"], pair["video_b"]} for pair in pairs}

    before, after = ids("a", "b"), ids("new", "b", "a")
    assert len(after) == 3 and before.items() <= after.items()
