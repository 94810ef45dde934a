"""From a model to a table in one call, on the sandbox's shipped pipeline with few steps."""

import importlib.util
import json
import sys

import pytest

from tests.support.evaluation.runs import ColourJudge
from tests.support.paths import EXAMPLES
from video_trl.data.video_io import read_video
from video_trl.evaluation.evaluate import TrainingEvaluator, evaluate_model, sandbox_prompts
from video_trl.evaluation.runs.run import load_run
from video_trl.sandbox import load_sandbox
from video_trl.sandbox.benchmark import evaluate
from video_trl.sandbox.world.prompts import MOTIONS


QUICK = {"num_inference_steps": 1}


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluation") / "base"
    return folder, evaluate_model(folder, num_prompts=3, call_kwargs=QUICK, batch_size=3)


def test_the_default_is_the_sandbox_on_held_out_sentences_by_law(evaluated):
    folder, table = evaluated
    assert table.run.name == "sandbox" and table.judge == "sandbox-exact"
    assert list(table.shares) == ["all", *MOTIONS[:3]] and table.shares["all"]["joint"].n == 3
    assert json.loads((folder / "run.json").read_text())["generation"]["call_kwargs"]["num_inference_steps"] == 1
    assert [prompt.category for prompt in sandbox_prompts(8)] == [*MOTIONS, MOTIONS[0]]


def test_again_is_instant_and_the_same(evaluated):
    folder, table = evaluated
    stamps = {path: path.stat().st_mtime_ns for path in folder.rglob("*.*") if path.name != ".lock"}
    again = evaluate_model(folder, num_prompts=3, call_kwargs=QUICK)
    assert str(again) == str(table)
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps


def test_videos_are_those_of_the_sandbox_benchmark(evaluated, tmp_path):
    """Same prompts, same noise: runs made here pair up with results made there."""
    _, table = evaluated
    sandbox = load_sandbox()
    prompts = [prompt.text for prompt in table.run.prompts]
    records = evaluate(
        sandbox.pipeline, sandbox.judge, prompts, [0], {**sandbox.call_kwargs, **QUICK}, tmp_path, batch_size=3
    )
    for case, record in zip(table.run.cases, records, strict=True):
        assert (read_video(table.run.video(case)) == read_video(record.video)).all()


def test_other_ranks_return_nothing_and_the_first_waits_for_their_files(tmp_path, monkeypatch):
    arguments = {"num_prompts": 2, "call_kwargs": QUICK}
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert evaluate_model(tmp_path, **arguments) is None
    assert [path.name for path in (tmp_path / "videos").glob("*.mp4")] == ["00001-0.mp4"]
    monkeypatch.setenv("RANK", "0")
    table = evaluate_model(tmp_path, **arguments)
    assert table.shares["all"]["pc"].n == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "some/model"}, "needs `prompts` and `judge`"),
        ({"model": "some/model", "judge": ColourJudge()}, "needs `prompts` and `judge`"),
        ({"model": "some/model", "judge": ColourJudge(), "prompts": ["a"]}, "`fps` is needed"),
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


def test_script_evaluates_and_compares(evaluated, tmp_path, capsys):
    path = EXAMPLES / "evaluate.py"
    spec = importlib.util.spec_from_file_location("example_evaluate", path)
    script = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = script
    spec.loader.exec_module(script)
    folder, _ = evaluated
    arguments = ["--output_dir", str(tmp_path / "run"), "--num_prompts", "3", "--num_inference_steps", "1"]
    script.main(
        [*arguments, "--guidance_scale", "1", "--batch_size", "3", "--name", "unguided", "--compare", str(folder)]
    )
    printed = capsys.readouterr().out
    assert "unguided, custom" in printed and "unguided vs sandbox" in printed
    assert (tmp_path / "run" / "comparison.html").read_text().count("<video") == 6


@pytest.mark.parametrize(("benchmark", "joint"), [("custom", 1.0), ("videophy2", 0.0)])
def test_an_evaluator_in_training_counts_by_the_rule_of_its_benchmark(benchmark, joint, tmp_path):
    class Lenient:
        name = identity = "lenient"

        def score(self, videos, prompts):
            return [{"sa": 0.6, "pc": 0.6} for _ in videos]  # a rating of 3 of 5

    sandbox = load_sandbox()
    call = {**sandbox.call_kwargs, **QUICK}
    evaluator = TrainingEvaluator(sandbox_prompts(1), Lenient(), fps=8, call_kwargs=call, benchmark=benchmark)
    found = evaluator(sandbox.pipeline, output_dir=str(tmp_path), step=3)
    low, high = found.pop("joint_low"), found.pop("joint_high")
    assert found == {"sa": 0.6, "pc": 0.6, "joint": joint}
    assert (low, high) == pytest.approx((0.2065, 1.0) if joint else (0.0, 0.7935), abs=1e-4)  # Wilson's, of one video
    assert load_run(tmp_path / "evaluation" / "step-3").benchmark == benchmark
    with pytest.raises(ValueError, match="vidophy"):
        TrainingEvaluator(["A ball falls."], Lenient(), fps=8, benchmark="vidophy")
