"""The verbs around runs, each called as from the shell, on the sandbox or on runs of coloured clips."""

import json
import os
import signal
import subprocess
import sys

import datasets
import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection, ViTConfig, ViTModel

from tests.support.evaluation.runs import make_run
from video_trl import VideoSFTConfig, VideoSFTTrainer
from video_trl.cli import main
from video_trl.cli.doctor import FAULT, NOTE, OK, device, disk, memory, python, versions
from video_trl.data.video_io import write_video
from video_trl.evaluation.benchmarks.vbench import FrameConsistency
from video_trl.evaluation.probes import compare, physion
from video_trl.evaluation.runs.run import load_run
from video_trl.evaluation.votes.study import Vote, VoteFile, open_study
from video_trl.load import load_judge
from video_trl.sandbox import simulate


FEW = ["--num_prompts", "2", "--num_inference_steps", "1", "--batch_size", "2"]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def runs(here):
    make_run(here / "base", "base", [(0.9, 0.2), (0.2, 0.2), (0.6, 0.6), (0.9, 0.1)])
    make_run(here / "dpo", "dpo", [(0.9, 0.7), (0.2, 0.6), (0.6, 0.9), (0.9, 0.6)], training_seed=0)
    return ["base", "dpo"]


def test_eval_makes_a_run_and_prints_its_table_and_goes_on(capsys):
    argv = ["eval", *FEW, "--seeds", "3", "4", "--output_dir", "run", "--name", "tiny"]
    assert main(argv) == 0
    table = capsys.readouterr().out
    assert table.startswith("tiny, custom\n") and "\nall " in table
    run = load_run("run")
    assert run.seeds == (3, 4) and not run.missing() and run.generation["call_kwargs"]["num_inference_steps"] == 1
    made = {path.name: path.stat().st_mtime_ns for path in (run.folder / "videos").glob("*.mp4")}
    assert main(argv) == 0
    assert capsys.readouterr().out == table
    assert made == {path.name: path.stat().st_mtime_ns for path in (run.folder / "videos").glob("*.mp4")}
    assert main(["eval", "--num_prompts", "3", "--output_dir", "run"]) == 1
    assert "holds another run" in capsys.readouterr().err


def test_generate_then_score_is_eval(capsys):
    assert main(["eval", *FEW, "--output_dir", "one", "--name", "tiny"]) == 0
    table = capsys.readouterr().out
    assert main(["generate", *FEW, "--output_dir", "two", "--name", "tiny"]) == 0
    assert capsys.readouterr().out == "2 of 2 videos in two\n"
    assert main(["score", "two", "--judge_options", '{"fps": 8}']) == 0
    assert capsys.readouterr().out.strip() == table.strip()


def test_generate_reads_prompts_from_a_file(capsys):
    with open("prompts.csv", "w") as file:
        file.write('prompt,category\n"A ball, ""red"",\nfalls.",fall\nA ball rolls.,roll\n')
    assert main(["generate", "--prompts", "prompts.csv", *FEW, "--output_dir", "run"]) == 0
    assert [prompt.text for prompt in load_run("run").prompts] == ['A ball, "red",\nfalls.', "A ball rolls."]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_score_of_a_table_can_be_used_as_a_judge(here, capsys, suffix):
    clips = [simulate(0, motion="free_fall"), simulate(0, motion="free_fall", violation="teleport")]
    (here / "clips").mkdir()
    for name, clip in zip("ab", clips, strict=True):
        write_video(here / "clips" / f"{name}.mp4", clip.video, clip.fps)
    rows = [f'{name}.mp4,"{clip.prompt}"\n' for name, clip in zip("ab", clips, strict=True)]
    (here / "clips" / "table.csv").write_text("".join(["video,prompt\n", *rows]))
    output = here / f"scores{suffix}"
    assert main(["score", "clips/table.csv", "--output", str(output), "--batch_size", "1"]) == 0
    assert "2 of 2 videos scored" in capsys.readouterr().out
    prompts, paths = [clip.prompt for clip in clips], [here / "clips" / "a.mp4", here / "clips" / "b.mp4"]
    good, bad = load_judge(output).score(paths, prompts)
    assert good["pc"] > 0.9 > 0.5 > bad["pc"]
    (here / "clips" / "b.mp4").unlink()
    assert main(["score", "clips/table.csv", "--output", "x.csv"]) == 1
    assert "b.mp4" in capsys.readouterr().err and not (here / "x.csv").exists()


def test_benchmarks_are_known_before_they_are_imported():
    from video_trl.cli.eval import _COUNTED
    from video_trl.evaluation.runs.tables import BENCHMARKS

    assert _COUNTED == tuple(BENCHMARKS)


def test_eval_counts_the_results_of_other_programs(here, capsys):
    items = [
        {"main_category": "Force", "single": 2, "multi_gpt": 3, "video_gpt": 3, "multi_llava": 3, "video_intern": 2}
    ]
    (here / "result.json").write_text(json.dumps(items))
    assert main(["eval", "--benchmark", "phygenbench", "--results", "result.json"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("result.json")]
    assert [row[1:] for row in rows] == [["published", "1", "0.667", "0.667"], ["exact", "1", "0.833", "0.833"]]
    from video_trl.evaluation.benchmarks.vbench import DIMENSIONS

    for name, value in (("a", 0.5), ("b", 0.75)):
        row = [{"video_path": "0.mp4", "video_results": value}]
        (here / f"{name}.json").write_text(json.dumps({dimension: [value, row] for dimension in DIMENSIONS}))
    assert main(["eval", "--benchmark", "vbench", "--results", "base=a.json", "dpo=b.json"]) == 0
    table = capsys.readouterr().out
    assert "0.75000 ↑ [2]" in table and f" {2 * len(DIMENSIONS)}\n" in table
    assert main(["eval", "--benchmark", "vbench", "--results", "a.json"]) == 2
    content = json.loads((here / "b.json").read_text())
    content["dynamic_degree"][1].append({"video_path": "1.mp4", "video_results": 1.0})
    (here / "b.json").write_text(json.dumps(content))
    assert main(["eval", "--benchmark", "vbench", "--results", "base=a.json", "dpo=b.json"]) == 1
    assert "as many videos in every dimension, got {'base': [1], 'dpo': [1, 2]}" in capsys.readouterr().err


def test_eval_computes_two_dimensions_of_vbench_for_runs(runs, here, capsys):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    ViTModel(ViTConfig(image_size=224, patch_size=32, **sizes)).save_pretrained(here / "dino")
    config = CLIPVisionConfig(image_size=224, patch_size=32, projection_dim=8, **sizes)
    CLIPVisionModelWithProjection(config).save_pretrained(here / "clip")
    encoders = ["--dino", str(here / "dino"), "--clip", str(here / "clip")]
    capsys.readouterr()
    assert main(["eval", "--benchmark", "vbench", "--results", "base=base", "dpo=dpo", *encoders]) == 0
    header, _, base, *_ = [
        line for line in capsys.readouterr().out.splitlines() if "consistency" in line or "[" in line
    ]
    assert "dino_consistency" in header and "clip_consistency" in header
    videos = sorted((here / "base" / "videos").glob("*.mp4"))
    expected = sum(FrameConsistency("dino", here / "dino")(videos)) / len(videos)
    assert f"{expected:.5f}" in base
    next((here / "base" / "videos").glob("*.mp4")).unlink()
    assert main(["eval", "--benchmark", "vbench", "--results", "base=base", *encoders]) == 1
    assert "1 of 4 videos are missing" in capsys.readouterr().err


@pytest.mark.slow
def test_eval_probes_the_model_and_its_adapter(here, capsys):
    pytest.importorskip("sklearn")
    save_adapter(here / "adapter")
    argv = ["eval", "--benchmark", "physion", "--adapter", str(here / "adapter"), "--probe_clips", "12"]
    assert main(argv) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert [line.split("|")[1].strip() for line in lines[2:]] == [
        "pixels", "sandbox", str(here / "adapter"), "sandbox (teacher)"
    ]  # fmt: skip
    assert all(line.rstrip().endswith("/12 |") for line in lines[2:])


@pytest.mark.parametrize(("value", "cells"), [("all", "all"), ("3x5", (3, 5)), (None, None)])
def test_probe_cells_reach_the_probe(monkeypatch, value, cells):
    given = {}
    monkeypatch.setattr(compare, "probe_models", lambda *args, **options: given.update(options) or {})
    monkeypatch.setattr(physion, "probe_table", lambda results: "")
    assert main(["eval", "--benchmark", "physion", *([] if value is None else ["--probe_cells", value])]) == 0
    assert given["cells"] == cells


@pytest.mark.parametrize("value", ["0x3", "2", "every", "2x3x4"])
def test_probe_cells_that_are_none_are_refused(capsys, value):
    assert main(["eval", "--benchmark", "physion", "--probe_cells", value]) == 2
    assert f"such as 2x3, or 'all', got '{value}'" in capsys.readouterr().err


@pytest.mark.slow
def test_eval_probes_all_tokens(capsys):
    """The sandbox's frames have 4 x 4 tokens: all of them are the default, and one cell is another probe."""
    pytest.importorskip("sklearn")
    tables = []
    for cells in ("all", "4x4", "1x1"):
        assert main(["eval", "--benchmark", "physion", "--probe_clips", "12", "--probe_cells", cells]) == 0
        tables.append(capsys.readouterr().out)
    assert tables[0] == tables[1] != tables[2]


def save_adapter(folder):
    """An adapter of the sandbox's model, as training saves it before its first step."""
    args = VideoSFTConfig(str(folder), use_cpu=True)
    clip = {"prompt": "A red ball falls to the floor.", "video": simulate(1).video}
    VideoSFTTrainer("sandbox", args, [clip]).save_model()


def test_report_prints_the_comparison_and_writes_the_page(runs, here, capsys):
    log = {"log_history": [{"step": step, "loss": 1 / step} for step in (1, 2, 3)]}
    (here / "state.json").write_text(json.dumps(log))
    argv = ["report", *runs, "--output", "page.html", "--curves", "dpo=state.json", "--title", "A <b> title"]
    assert main(argv) == 0
    printed = capsys.readouterr().out
    assert "pc      dpo vs base" in printed and "page.html" in printed
    page = (here / "page.html").read_text()
    assert "A &lt;b&gt; title" in page and "dpo: loss" in page and page.count("<video") == 8
    assert main(["report", "base", "--no_page", "--output", "none.html"]) == 0
    assert not (here / "none.html").exists()
    assert main(["report", "dpo", "base", "--baseline", "sft"]) == 1
    assert "'sft' is not among the methods" in capsys.readouterr().err


def half_of_a_table(dataset, path, **options):
    with open(path, "w") as file:
        file.write("rater,tas")
    raise OSError(28, "No space left on device")


def test_vote_counts_and_exports(runs, here, capsys):
    study = open_study(runs)
    file = VoteFile("votes.jsonl", study)
    for position, task in enumerate(study.tasks.values()):
        file.add(
            Vote(study.identity, "ann", task.key, task.case.prompt.text, task.case.seed, "base", "dpo", "a", position,
                 {"video_quality": "bad", "prompt_following": "same"}, 1.0, "now")
        )  # fmt: skip
    file.close()
    assert main(["vote", *runs, "--results"]) == 0
    assert "0/0/4" in capsys.readouterr().out
    assert main(["vote", *runs, "--export", "votes.parquet"]) == 0
    assert main(["vote", *runs, "--export", "votes.csv"]) == 0
    before = (here / "votes.csv").read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.Dataset.to_csv", half_of_a_table)
        assert main(["vote", *runs, "--export", "votes.csv"]) == 1
    assert (here / "votes.csv").read_bytes() == before and main(["vote", *runs, "--export", "votes.csv"]) == 0
    for name in ("mine.csv", "mine.parquet"):
        (here / name).write_text("years of work\n")
        assert main(["vote", *runs, "--export", name]) != 0
        assert (here / name).read_text() == "years of work\n"
    table = datasets.Dataset.from_parquet("votes.parquet")
    assert len(table) == 8 and set(table["choice"]) == {"right", "same"}
    assert main(["vote", *reversed(runs), "--results"]) == 1
    assert "other videos" in capsys.readouterr().err
    assert main(["report", *reversed(runs), "--votes", "votes.jsonl", "--output", "voted.html"]) == 0
    capsys.readouterr()
    assert main(["report", "base", "--votes", "votes.jsonl", "--output", "other.html"]) == 1
    assert "votes about videos of base, dpo, which are not those" in capsys.readouterr().err
    assert not (here / "other.html").exists()


@pytest.mark.slow
def test_vote_serves_until_it_is_interrupted(runs, here):
    command = [sys.executable, "-m", "video_trl", "vote", *runs, "--port", "0", "--votes", "v.jsonl"]

    def heed_interrupts() -> None:  # a shell lets what it starts in the background ignore them
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=heed_interrupts) as process:
        lines = iter(process.stderr.readline, "")
        assert next(line for line in lines if "Vote at http://127.0.0.1:" in line)
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
        assert process.wait(60) == 0
    assert "All votes that were given are in v.jsonl" in rest


def test_doctor_finds_this_environment_good_and_shows_no_token(capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert "No faults found." in printed and "a token is there" in printed and "hf_secret" not in printed
    assert {"Python", "torch", "device", "attention", "memory", "mp4", "disk"} <= {
        line[6:28].strip() for line in printed.splitlines()
    }


def test_doctor_names_what_is_too_old_or_missing_and_what_to_do(monkeypatch):
    monkeypatch.setattr("importlib.metadata.requires", lambda name: ["torch>=99", "no-such-package>=1", "numpy>=1"])
    found = {finding.subject: finding for finding in versions()}
    assert found["torch"].verdict == found["no-such-package"].verdict == FAULT and found["numpy"].verdict == OK
    assert "pip install 'no-such-package>=1'" in found["no-such-package"].text


def test_doctor_notices_a_gpu_that_torch_cannot_use(monkeypatch, here):
    if torch.accelerator.is_available():
        pytest.skip("torch can use the one that is there")
    (finding,) = device()
    assert finding.verdict == NOTE and "CPU" in finding.text
    (here / "version").write_text("NVRM version: NVIDIA UNIX")
    monkeypatch.setattr("video_trl.cli.doctor._NVIDIA_DRIVER", str(here / "version"))
    (finding,) = device()
    assert finding.verdict == FAULT and torch.__version__ in finding.text and "install the torch build" in finding.text


def test_doctor_notices_little_memory_and_an_old_python(monkeypatch):
    assert {finding.subject for finding in memory()} >= {"memory"}
    monkeypatch.setattr("video_trl.cli.doctor._LEAST_MEMORY_GIB", 1e6)
    monkeypatch.setattr("video_trl.cli.doctor._LEAST_SHARED_GIB", 1e6)
    assert {finding.verdict for finding in memory()} == {NOTE}
    assert next(python()).verdict == OK
    monkeypatch.setattr("platform.python_version", lambda: "3.9.1")
    assert next(python()).verdict == FAULT


def test_doctor_looks_at_the_folder_that_will_be_made(monkeypatch, here):
    (enough,) = disk("not/yet/there")
    assert str(here) in enough.text
    monkeypatch.setattr("video_trl.cli.doctor._LEAST_FREE_GIB", 1e9)
    assert next(disk(".")).verdict == NOTE
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert next(disk(".")).verdict == FAULT
