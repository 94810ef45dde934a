"""Studies, the file of votes, and what is made of it."""

import json
import multiprocessing
import os
import signal
import time
from collections import Counter

import pytest

from tests.support.evaluation.held_files import CHANGES, OTHER_FILES
from tests.support.evaluation.runs import colour_video, make_run
from video_trl.data.video_io import write_video
from video_trl.evaluation.statistics import holm
from video_trl.evaluation.votes.agreement import krippendorff_alpha
from video_trl.evaluation.votes.gsb import gsb
from video_trl.evaluation.votes.results import vote_results, votes_dataset, votes_table
from video_trl.evaluation.votes.study import Vote, VoteFile, open_study, read_votes


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Three models, twelve prompts; the videos of each differ by their colour."""
    folder = tmp_path_factory.mktemp("runs")
    for number, name in enumerate(("ours", "base", "sft")):
        scores = [(0.3 * number + index / 50, 0.5) for index in range(12)]
        make_run(folder / name, name, scores, scored=False)
    return [folder / name for name in ("ours", "base", "sft")]


def _vote(study, rater, task, **answers):
    shown = study.tasks[task]
    return Vote(
        study=study.identity,
        rater=rater,
        task=task,
        prompt=shown.case.prompt.text,
        seed=shown.case.seed,
        a=shown.a.name,
        b=shown.b.name,
        left=study.left(rater, task),
        position=study.order(rater).index(task),
        answers=answers,
        seconds=1.0,
        time="now",
    )


# ---- studies --------------------------------------------------------------------------------------------------------


def test_the_first_run_meets_each_other_one_on_every_prompt(runs):
    study = open_study(runs)
    assert Counter((t.a.name, t.b.name) for t in study.tasks.values()) == {("ours", "base"): 12, ("ours", "sft"): 12}
    assert [question.key for question in study.questions] == ["video_quality", "prompt_following"]


def test_order_and_sides_are_random_for_each_rater_and_survive_a_restart(runs):
    study, again = open_study(runs), open_study(runs)
    raters = [f"rater {number}" for number in range(40)]
    assert len({tuple(study.order(rater)) for rater in raters}) == 40
    for rater in raters[:3]:
        assert sorted(study.order(rater)) == sorted(study.tasks) and study.order(rater) == again.order(rater)
        assert [study.left(rater, task) for task in study.tasks] == [again.left(rater, task) for task in study.tasks]
    sides = Counter(study.left(rater, task) for rater in raters for task in study.tasks)
    assert abs(sides["a"] - 480) < 3.5 * 960**0.5 / 2  # 960 fair coins
    for task in list(study.tasks)[:5]:
        assert len({study.left(rater, task) for rater in raters}) == 2


def test_a_side_becomes_a_verdict_about_the_first_run(runs):
    study = open_study(runs)
    for task in study.tasks:
        ours, other = ("left", "right") if study.left("x", task) == "a" else ("right", "left")
        assert [study.verdict("x", task, side) for side in (ours, "same", other)] == ["good", "same", "bad"]


def test_runs_that_make_no_pairs_are_refused(runs, tmp_path):
    with pytest.raises(ValueError, match="two or more runs of distinct names"):
        open_study(runs[:1])
    with pytest.raises(ValueError, match="distinct names"):
        open_study([runs[0], runs[0]])
    with pytest.raises(ValueError, match="Unknown questions 'beauty'"):
        open_study(runs, "beauty")
    make_run(tmp_path / "few", "few", [(0.5, 0.5)], scored=False)
    with pytest.raises(ValueError, match="other prompts or seeds"):
        open_study([runs[0], tmp_path / "few"])


def test_videos_that_are_missing_or_lead_out_of_the_run_are_refused(tmp_path):
    ours = make_run(tmp_path / "ours", "ours", [(0.5, 0.5)] * 2, scored=False)
    base = make_run(tmp_path / "base", "base", [(0.1, 0.5)] * 2, scored=False)
    outside = tmp_path / "secret.mp4"
    ours.video(ours.cases[1]).rename(outside)
    with pytest.raises(ValueError, match="1 of 2 videos are missing"):
        open_study([ours.folder, base.folder])
    ours.video(ours.cases[1]).symlink_to(outside)
    with pytest.raises(ValueError, match="video 00001-0 leads out of the run"):
        open_study([ours.folder, base.folder])


# ---- the file -------------------------------------------------------------------------------------------------------


def test_votes_survive_and_the_last_one_on_a_pair_counts(runs, tmp_path):
    study, path = open_study(runs), tmp_path / "deep" / "votes.jsonl"
    votes = VoteFile(path, study)
    votes.add(_vote(study, "Ada", "1/00000-0", video_quality="good", prompt_following="same"))
    votes.add(_vote(study, "Bo", "1/00000-0", video_quality="bad", prompt_following="same"))
    votes.add(_vote(study, "Ada", "1/00000-0", video_quality="same", prompt_following="same"))
    votes.close()
    again = VoteFile(path, study)
    assert again.of("Ada")["1/00000-0"].answers["video_quality"] == "same" and again.of("Cy") == {}
    again.close()
    header, kept = read_votes(path)
    assert header["runs"] == ["ours", "base", "sft"] and header["pairs"] == 12
    assert [(vote.rater, vote.answers["video_quality"]) for vote in kept] == [("Ada", "same"), ("Bo", "bad")]
    assert len(path.read_text().splitlines()) == 4  # nothing is ever overwritten


def test_half_a_line_of_a_killed_process_is_dropped_and_the_next_vote_is_whole(runs, tmp_path):
    study, path = open_study(runs), tmp_path / "votes.jsonl"
    votes = VoteFile(path, study)
    votes.add(_vote(study, "Ada", "1/00000-0", video_quality="good", prompt_following="same"))
    votes.close()
    with open(path, "ab") as file:
        file.write(b'{"study": "' + study.identity.encode())
    assert len(read_votes(path)[1]) == 1
    votes = VoteFile(path, study)
    votes.add(_vote(study, "Bo", "1/00001-0", video_quality="bad", prompt_following="bad"))
    votes.close()
    assert [vote.rater for vote in read_votes(path)[1]] == ["Ada", "Bo"]


def _vote_for_ever(path, study, counter):
    votes = VoteFile(path, study)
    for number in range(100_000):
        votes.add(_vote(study, f"rater {number}", "1/00000-0", video_quality="good", prompt_following="good"))
        counter.value = number + 1  # told that it is saved


def test_kill_loses_at_most_the_vote_in_flight(runs, tmp_path):
    study, path, context = open_study(runs), tmp_path / "votes.jsonl", multiprocessing.get_context("fork")
    counter = context.Value("i", 0)
    process = context.Process(target=_vote_for_ever, args=(path, study, counter))
    process.start()
    deadline = time.monotonic() + 60
    while counter.value < 20 and time.monotonic() < deadline:
        time.sleep(0.005)
    with pytest.raises(ValueError, match="Another process is writing"):
        VoteFile(path, study)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    votes = VoteFile(path, study)  # the lock went with the process
    votes.close()
    assert counter.value >= 20 and len(read_votes(path)[1]) in (counter.value, counter.value + 1)


def test_a_full_disk_leaves_no_half_line(runs, tmp_path, monkeypatch):
    study, path = open_study(runs), tmp_path / "votes.jsonl"
    votes = VoteFile(path, study)
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            votes.add(_vote(study, "Ada", "1/00000-0", video_quality="good", prompt_following="same"))
    assert path.read_bytes() == before and votes.of("Ada") == {}
    votes.add(_vote(study, "Bo", "1/00000-0", video_quality="good", prompt_following="same"))
    votes.close()
    assert [vote.rater for vote in read_votes(path)[1]] == ["Bo"]


def test_votes_of_another_study_are_refused(runs, tmp_path):
    study, path = open_study(runs), tmp_path / "votes.jsonl"
    VoteFile(path, study).close()
    for other in (open_study(runs[:2]), open_study(runs, "physics"), open_study(runs[::-1])):
        with pytest.raises(ValueError, match="votes about other videos or questions"):
            VoteFile(path, other)
    with open(path, "a") as file:
        stranger = _vote(study, "Ada", "1/00000-0", video_quality="good", prompt_following="same")
        file.write(json.dumps({**vars(stranger), "study": "f" * 32}) + "\n")
    with pytest.raises(ValueError, match="line 2 is a vote about study ffff"):
        read_votes(path)
    with pytest.raises(ValueError, match=r"There are no votes yet: expected the file .*nothing.jsonl.*--votes FILE"):
        read_votes(tmp_path / "nothing.jsonl")


def test_a_changed_video_makes_another_study(tmp_path):
    folders = [make_run(tmp_path / n, n, [(0.2, 0.5)] * 2, scored=False).folder for n in ("ours", "base")]
    path = tmp_path / "votes.jsonl"
    VoteFile(path, open_study(folders)).close()
    write_video(folders[1] / "videos" / "00001-0.mp4", colour_video(0.9, 0.1), 8)
    with pytest.raises(ValueError, match="votes about other videos"):
        VoteFile(path, open_study(folders))
    with pytest.raises(ValueError, match="holds votes about other videos"):
        vote_results(path, folders)


@pytest.mark.parametrize("by", ["the next vote", "the end"])
@pytest.mark.parametrize("change", CHANGES)
def test_votes_outlive_what_happens_to_their_file(runs, tmp_path, change, by):
    study, path = open_study(runs), tmp_path / "held" / "votes.jsonl"
    votes, saved = VoteFile(path, study), []
    for number in range(3):
        saved.append(_vote(study, f"rater {number}", "1/00000-0", video_quality="good", prompt_following="same"))
        votes.add(saved[-1])
    CHANGES[change](path)
    if by == "the next vote":
        saved.append(_vote(study, "young rater", "1/00001-0", video_quality="bad", prompt_following="same"))
        votes.add(saved[-1])
        with pytest.raises(ValueError, match="Another process is writing"):  # the lock moved along
            VoteFile(path, study)
    votes.close()
    kept = read_votes(path)[1]
    assert sorted(kept, key=lambda vote: vote.rater) == saved


def test_votes_that_somebody_adds_to_the_held_file_count(runs, tmp_path):
    study, path = open_study(runs), tmp_path / "votes.jsonl"
    votes = VoteFile(path, study)
    by_hand = _vote(study, "Ada", "1/00000-0", video_quality="good", prompt_following="same")
    path.write_text(path.read_text() + json.dumps(vars(by_hand)))
    votes.add(_vote(study, "Bo", "1/00000-0", video_quality="good", prompt_following="same"))
    assert votes.of("Ada") == {"1/00000-0": by_hand}
    votes.close()
    assert [vote.rater for vote in read_votes(path)[1]] == ["Ada", "Bo"]


@pytest.mark.parametrize("name", OTHER_FILES)
def test_a_wrong_file_is_left_as_it_is(runs, tmp_path, name):
    study, path = open_study(runs), tmp_path / "other"
    content = OTHER_FILES[name].replace(b"{HEADER}", json.dumps(study.header()).encode())
    path.write_bytes(content)
    os.utime(path, ns=(1, 1))
    with pytest.raises(ValueError, match="other"):
        VoteFile(path, study)
    assert path.read_bytes() == content and path.stat().st_mtime_ns == 1 and os.listdir(tmp_path) == ["other"]


def test_a_folder_or_a_pipe_is_no_file_of_votes(runs, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(ValueError, match="is a folder or a device"):
            VoteFile(path, open_study(runs))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no file of votes"),
        ('{"prompt": "a"}\n', "no file of votes"),
        ("{HEADER}\nnot json\n", "line 2 is damaged"),
        ('{HEADER}\n{"rater": "Ada"}\n', "line 2 is no vote"),
    ],
)
def test_damaged_files_are_refused_by_line(runs, tmp_path, text, message):
    path = tmp_path / "votes.jsonl"
    path.write_text(text.replace("{HEADER}", json.dumps(open_study(runs).header())))
    with pytest.raises(ValueError, match=message):
        read_votes(path)


def test_answers_to_other_questions_are_refused(runs, tmp_path):
    study, path = open_study(runs), tmp_path / "votes.jsonl"
    votes = VoteFile(path, study)
    votes.add(_vote(study, "Ada", "1/00000-0", physics="good"))
    votes.close()
    with pytest.raises(ValueError, match="line 2 has answers"):
        read_votes(path)


# ---- results --------------------------------------------------------------------------------------------------------

ANSWERS = {  # of each rater on pairs 0 to 3 with base
    "Ada": ("good", "good", "same", "bad"),
    "Bo": ("good", "bad", "same", "good"),
    "Cy": ("good", "good", "bad", "bad"),
}


@pytest.fixture
def voted(runs, tmp_path):
    study, path = open_study(runs), tmp_path / "votes.jsonl"
    votes = VoteFile(path, study)
    for rater, answers in ANSWERS.items():
        for index, answer in enumerate(answers):
            votes.add(_vote(study, rater, f"1/{index:05d}-0", video_quality=answer, prompt_following="good"))
    votes.add(_vote(study, "Ada", "2/00007-0", video_quality="bad", prompt_following="same"))
    votes.close()
    return path


def test_results_count_pairs_by_their_majority(voted, runs):
    results = vote_results(voted, runs)
    assert [(r.a, r.b, r.question) for r in results] == [
        ("ours", "base", "video_quality"), ("ours", "base", "prompt_following"),
        ("ours", "sft", "video_quality"), ("ours", "sft", "prompt_following"),
    ]  # fmt: skip
    quality = results[0]
    expected = gsb(["good", "good", "same", "bad"], [f"prompt {i}" for i in range(4)])
    assert quality.gsb == expected
    assert (quality.num_pairs, quality.num_raters, quality.num_votes) == (12, 3, 12)
    ranks = {"bad": 0, "same": 1, "good": 2}
    units = [[ranks[answers[i]] for answers in ANSWERS.values()] for i in range(4)]
    assert quality.alpha == krippendorff_alpha(units, "ordinal")
    assert (quality.preferred.k, quality.preferred.n, quality.preferred.num_clusters) == (6, 10, 4)
    assert results[1].alpha is None and results[1].gsb.good == 4  # all the same: nothing to agree about
    assert results[2].alpha is None and results[3].preferred is None
    assert [r.p_adjusted for r in results] == holm([r.gsb.p_value for r in results])
    assert quality.verdict == "no preference shown"


def test_table_of_results_prints_counts_and_n(voted):
    table = votes_table(vote_results(voted))
    row = dict(zip(table.header, table.rows[0], strict=True))
    assert row["Good/Same/Bad"] == "2/1/1" and row["pairs"] == "4 of 12" and row["votes"] == "12"
    assert row["score"].startswith("1.50 [") and row["A preferred"].startswith("6/10 = 60.0 %")
    assert "95 % intervals over prompts" in table.note


def test_votes_go_into_a_dataset_with_what_the_rater_saw(voted, runs, tmp_path):
    study, dataset = open_study(runs), votes_dataset(voted)
    assert len(dataset) == 26 and set(dataset["question"]) == {"video_quality", "prompt_following"}
    for row in dataset:
        if row["verdict"] != "same":
            assert study.verdict(row["rater"], row["task"], row["choice"]) == row["verdict"]
    dataset.to_parquet(tmp_path / "votes.parquet")
    assert dataset.from_parquet(str(tmp_path / "votes.parquet"))[0] == dataset[0]


def test_forced_choices_give_the_share_that_prefers(runs, tmp_path):
    """PhyGDPO's study: 104 people, one vote each, 67 of them for A is 64.4 %."""
    study, path = open_study(runs[:2], "physics"), tmp_path / "votes.jsonl"
    votes = VoteFile(path, study)
    for number in range(104):
        task = f"1/{number % 12:05d}-0"
        votes.add(_vote(study, f"person {number}", task, physics="good" if number < 67 else "bad"))
    votes.close()
    (result,) = vote_results(path)
    assert (result.preferred.k, result.preferred.n) == (67, 104) and result.num_raters == 104
    assert round(100 * result.preferred.value, 1) == 64.4


def test_no_vote_is_no_result(runs, tmp_path):
    VoteFile(tmp_path / "votes.jsonl", open_study(runs)).close()
    with pytest.raises(ValueError, match="holds no vote yet"):
        vote_results(tmp_path / "votes.jsonl")
    with pytest.raises(ValueError, match="There are no votes yet: expected the file .*gone.jsonl"):
        vote_results(tmp_path / "gone.jsonl")
