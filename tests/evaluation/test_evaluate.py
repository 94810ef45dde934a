"""From a model to a table in one call, on the sandbox's shipped pipeline with few steps."""

import json

import numpy as np
import pytest

from tests.support.evaluation.runs import ColourJudge, make_run
from video_trl import files
from video_trl.data.video_io import read_video
from video_trl.evaluation.evaluate import TrainingEvaluator, evaluate_model, evaluate_pipeline, sandbox_prompts
from video_trl.evaluation.runs.generate import VideoGenerator, generate_run
from video_trl.evaluation.runs.run import load_run, make_room
from video_trl.evaluation.runs.score import score_run
from video_trl.evaluation.runs.tables import tabulate
from video_trl.load import load_judge
from video_trl.sandbox import load_sandbox
from video_trl.sandbox.world.prompts import BASE_MOTIONS


QUICK = {"num_inference_steps": 1}


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluation") / "base"
    return folder, evaluate_model(folder, num_prompts=3, call_kwargs=QUICK, batch_size=3)


def test_the_default_is_the_sandbox_on_held_out_sentences_by_law(evaluated):
    folder, table = evaluated
    assert table.run.name == "sandbox" and table.judge == "sandbox-exact"
    assert list(table.proportions) == ["all", *BASE_MOTIONS[:3]] and table.proportions["all"]["joint"].n == 3
    assert json.loads((folder / "run.json").read_text())["generation"]["call_kwargs"]["num_inference_steps"] == 1
    assert [prompt.category for prompt in sandbox_prompts(6)] == [*BASE_MOTIONS, BASE_MOTIONS[0]]


def test_again_is_instant_and_the_same(evaluated):
    folder, table = evaluated
    stamps = {path: path.stat().st_mtime_ns for path in folder.rglob("*.*") if path.name != ".lock"}
    again = evaluate_model(folder, num_prompts=3, call_kwargs=QUICK)
    assert str(again) == str(table)
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps


@pytest.fixture(scope="module")
def generator():
    sandbox = load_sandbox()
    return VideoGenerator(sandbox.pipeline, "sandbox", 8, {**sandbox.call_kwargs, **QUICK})


def _distance(first, second):
    """Mean difference of two files in grey levels: sums of floats come out a little differently from call to call."""
    return np.abs(read_video(first).astype(int) - read_video(second)).mean()


def test_a_pipeline_in_memory_makes_the_videos_of_the_named_model(evaluated, generator, tmp_path):
    """Same prompts, same noise: the two runs pair up."""
    _, table = evaluated
    again = evaluate_pipeline(tmp_path, generator, load_judge("sandbox"), table.run.prompts, batch_size=3)
    assert [(row["prompt"], row["seed"]) for row in again.rows()] == [(p.text, 0) for p in table.run.prompts]
    videos = [again.run.video(case) for case in again.run.cases]
    for case, video, other in zip(table.run.cases, videos, reversed(videos), strict=True):
        assert _distance(table.run.video(case), video) < 0.5
        assert video == other or _distance(table.run.video(case), other) > 5


class RecordingJudge:
    """The sandbox's judge, and what it was shown."""

    def __init__(self):
        self.judge, self.videos = load_judge("sandbox"), []
        self.name, self.identity = self.judge.name, self.judge.identity

    def score(self, videos, prompts):
        self.videos += videos
        return self.judge.score(videos, prompts)


def test_a_judge_beside_the_model_sees_frames_before_compression(generator, tmp_path):
    """Its scores are those of the arrays, to the last bit; scores of the files are refused beside them."""
    judge = RecordingJudge()
    table = evaluate_pipeline(tmp_path, generator, judge, sandbox_prompts(2), seeds=(0, 1))
    rows = table.rows()
    assert [(video.dtype, video.shape) for video in judge.videos] == [(np.uint8, (13, 64, 64, 3))] * 4
    texts = [row["prompt"] for row in rows]
    expected = judge.judge.score(judge.videos, texts)
    assert [(row["pc"], row["sa"]) for row in rows] == [(score["pc"], score["sa"]) for score in expected]
    assert all(row["joint"] == float(row["sa"] >= 0.5 and row["pc"] >= 0.5) for row in rows)
    of_files = judge.judge.score([row["video"] for row in rows], texts)
    assert [score["pc"] for score in of_files] != [score["pc"] for score in expected]
    with pytest.raises(ValueError, match="scores of another judge"):
        score_run(tmp_path, judge)


def test_a_video_without_its_score_is_made_again(generator, tmp_path):
    """Stopped between the two, a run has the file alone, and what the judge would see in that is another thing."""
    arguments = {"batch_size": 2, "judge": RecordingJudge(), "rank": 0, "num_ranks": 1}
    run = generate_run(tmp_path, generator, sandbox_prompts(2), **arguments)
    case = run.cases[1]
    score = tmp_path / "scores" / arguments["judge"].name / f"{case.key}.json"
    score.unlink()
    run.video(case).write_bytes(b"half")
    generate_run(tmp_path, generator, sandbox_prompts(2), **arguments)
    judge = arguments["judge"]
    assert len(judge.videos) == 3 and np.abs(judge.videos[2].astype(int) - judge.videos[1]).mean() < 0.5
    assert score.is_file() and len(read_video(run.video(case))) == 13 and len(tabulate(run).rows()) == 2


def test_a_run_in_memory_replaces_a_run_and_nothing_else(generator, tmp_path):
    judge = load_judge("sandbox")
    evaluate_pipeline(tmp_path / "run", generator, judge, ["A red ball rolls to the right."], name="first")
    (tmp_path / "thesis.txt").write_text("all I have")
    with pytest.raises(ValueError, match="holds files that are no evaluation run"):
        evaluate_pipeline(tmp_path, generator, judge, ["A red ball rolls to the right."])
    assert (tmp_path / "thesis.txt").read_text() == "all I have"
    table = evaluate_pipeline(tmp_path / "run", generator, judge, ["A red ball rolls to the left."], name="second")
    assert load_run(tmp_path / "run").name == "second" and len(table.rows()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "thesis.txt"]


@pytest.mark.parametrize("description", [None, '{"program": "another", "format": 7}'])
def test_what_else_is_in_the_folder_of_a_replaced_run_is_kept(tmp_path, description):
    folder = make_run(tmp_path / "run", "ours", [(0.5, 0.5)], scored=False).folder
    (folder / "thesis.txt").write_text("all I have")
    if description is not None:
        (folder / "run.json").write_text(description)
        (folder / "thesis.txt").rename(folder / "videos" / "thesis.txt")
    before = {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    make_room(folder)
    (kept,) = tmp_path.iterdir()
    assert kept.name.startswith("run.kept-")
    assert {path.name: path.read_bytes() for path in kept.rglob("*") if path.is_file()} == before


def test_videos_without_a_description_are_those_of_others(tmp_path):
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "00000-0.mp4").write_bytes(b"holiday")
    with pytest.raises(ValueError, match=r"no evaluation run \(videos\)"):
        make_run(tmp_path, "ours", [(0.5, 0.5)], scored=False)
    assert (tmp_path / "videos" / "00000-0.mp4").read_bytes() == b"holiday"


def test_other_ranks_return_nothing_and_the_first_waits_for_their_files(tmp_path, monkeypatch):
    arguments = {"num_prompts": 2, "call_kwargs": QUICK}
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert evaluate_model(tmp_path, **arguments) is None
    assert [path.name for path in (tmp_path / "videos").glob("*.mp4")] == ["00001-0.mp4"]
    monkeypatch.setenv("RANK", "0")
    table = evaluate_model(tmp_path, **arguments)
    assert table.proportions["all"]["pc"].n == 2


def test_a_rank_that_an_earlier_launch_left_in_the_environment_is_told(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(files, "_SECONDS_TO_WARN", 0.0)
    monkeypatch.setattr(files, "_SECONDS_TO_WAIT", 0.1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    words = r"RANK=0 of WORLD_SIZE=2, waits .* \(RANK 1\)\. .* unset RANK and WORLD_SIZE"
    with pytest.raises(RuntimeError, match=words):
        evaluate_model(tmp_path, num_prompts=2, call_kwargs=QUICK)
    assert "Giving up in" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "some/model"}, "needs `prompts` and `judge`"),
        ({"model": "some/model", "judge": ColourJudge()}, "needs `prompts` and `judge`"),
        ({"model": "some/model", "judge": ColourJudge(), "prompts": ["a"]}, "No folder 'some/model'"),
        ({"benchmark": "videophy3"}, "Unknown benchmark"),
        ({"num_prompts": 0}, "between 1 and"),
        ({"prompts": ["a"], "num_prompts": 2}, "between 1 and the 1 prompts"),
        ({"prompts": "gone.txt"}, "gone.txt cannot be read"),
        ({"benchmark": "videophy", "prompts": "gone.csv"}, "No file 'gone.csv'"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_made(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        evaluate_model(tmp_path / "run", **arguments)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("benchmark", "joint", "fps"), [("custom", 1.0, 8), ("videophy2", 0.0, None)])
def test_an_evaluator_in_training_counts_by_the_rule_of_its_benchmark(benchmark, joint, fps, tmp_path):
    class Lenient:
        name = identity = "lenient"

        def score(self, videos, prompts):
            return [{"sa": 0.6, "pc": 0.6} for _ in videos]  # a rating of 3 of 5

    sandbox = load_sandbox()
    call = {**sandbox.call_kwargs, **QUICK}
    evaluator = TrainingEvaluator(sandbox_prompts(1), Lenient(), fps=fps, call_kwargs=call, benchmark=benchmark)
    found = evaluator(sandbox.pipeline, output_dir=str(tmp_path), step=3)
    low, high = found.pop("joint_low"), found.pop("joint_high")
    assert found == {"sa": 0.6, "pc": 0.6, "joint": joint}
    assert (low, high) == pytest.approx((0.2065, 1.0) if joint else (0.0, 0.7935), abs=1e-4)  # Wilson's, of one video
    run = load_run(tmp_path / "evaluation" / "step-3")
    assert run.benchmark == benchmark and run.generation["fps"] == (fps or 16)  # unset: its family's
    with pytest.raises(ValueError, match="vidophy"):
        TrainingEvaluator(["A ball falls."], Lenient(), fps=8, benchmark="vidophy")
