"""docs/extend/adding_a_method.md: its code, in another distribution, does all that the package's own does."""

import json
import re
import sys

import pytest
from safetensors.torch import load_file

from tests.support.paths import DOCS
from tests.support.toml import tomllib
from video_trl.cli import main
from video_trl.hub import LORA_FILE_NAME
from video_trl.methods import ENTRY_POINTS, known_methods


PAGE = (DOCS / "extend" / "adding_a_method.md").read_text(encoding="utf-8")
SIZES = ["--num_groups", "3", "--num_rejected", "1", "--use_cpu", "--report_to", "none", "--disable_tqdm", "true"]


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """What pip leaves of the page's distribution: the module, and the folder with its metadata and entry points."""
    folder = tmp_path_factory.mktemp("site")
    *module, _ = blocks("python")  # the last one trains
    (folder / "video_hinge.py").write_text("\n\n".join(module), encoding="utf-8")
    (project,) = (tomllib.loads(text)["project"] for text in blocks("toml"))
    info = folder / f"video_hinge-{project['version']}.dist-info"
    info.mkdir()
    info.joinpath("METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
        f"Summary: {project['description']}\n"
    )
    ((group, points),) = project["entry-points"].items()
    info.joinpath("entry_points.txt").write_text(
        "\n".join([f"[{group}]", *(f"{name} = {path}" for name, path in points.items())])
    )
    return folder


@pytest.fixture
def installed(site, monkeypatch):
    monkeypatch.syspath_prepend(site)
    yield
    sys.modules.pop("video_hinge", None)


def training(output_dir, cache):
    return ["train", "hinge", *SIZES, "--cache_dir", str(cache), "--output_dir", str(output_dir), "--margin", "2"]


def test_it_is_listed_with_the_others_and_has_help(installed, capsys):
    names = [method.name for method in known_methods()]
    assert names == ["sft", "dpo", "gdpo", "regdpo", "repa", "hinge"]
    assert main(["train"]) == 0
    assert re.search(r"^  hinge   hinge loss on pairs$", capsys.readouterr().out, re.MULTILINE)
    assert "video_hinge" not in sys.modules  # nothing is imported for a list
    assert main(["train", "hinge", "--help"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"--margin MARGIN +Lead of the chosen video.*\(default: 1.0\)", printed)
    assert "--beta BETA" in printed and "--step_mode" in printed and "--adam_beta1" not in printed
    assert main(["train", "hing"]) == 2
    assert "did you mean 'hinge'?" in capsys.readouterr().err
    assert main(["train", "hinge", "--margn", "2"]) == 2
    assert "did you mean 'margin'?" in capsys.readouterr().err


def test_it_trains_under_the_monitor_and_resumes_exactly(installed, tmp_path):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    steps = ["--max_steps", "4", "--logging_steps", "1", "--save_steps", "2", "--learning_rate", "3e-4"]
    assert main([*training(whole, tmp_path / "cache"), *steps]) == 0
    state = json.loads((whole / "checkpoint-4" / "trainer_state.json").read_text())
    first, *_, last = state["log_history"]
    assert first["loss"] == 2.0  # the margin: policy and reference agree to the last bit
    assert first["win_gap"] == first["lose_gap"] == 0 != last["win_gap"]
    assert "CollapseMonitor" in state["stateful_callbacks"]
    card = (whole / "README.md").read_text()
    assert "trained with video_trl by preference optimisation with a hinge" in card and "- hinge\n" in card

    checkpoint = ["--resume_from_checkpoint", str(whole / "checkpoint-2")]
    # The rows are the same ones: only where results go differs.
    data = ["--dataset_name", str(whole / "dataset" / "table")]
    assert main([*training(resumed, tmp_path / "cache"), *steps, *checkpoint, *data]) == 0
    again = json.loads((resumed / "checkpoint-4" / "trainer_state.json").read_text())
    assert again["log_history"] == state["log_history"]
    expected, weights = load_file(whole / LORA_FILE_NAME), load_file(resumed / LORA_FILE_NAME)
    assert expected.keys() == weights.keys() and all(weights[name].equal(expected[name]) for name in expected)


def test_the_commands_of_the_page_plan_it(installed, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (block,) = blocks("console")
    dry_run, estimate, train = (line.split()[1:] for line in block.splitlines())
    assert main([*dry_run, "--use_cpu"]) == 0
    printed = capsys.readouterr().out
    assert "margin: 2.0\n" in printed and "rows:                   8\n" in printed
    assert re.search(r"memory of a step: +0\.\d\d GiB with step_mode=concat", printed)
    assert not list(tmp_path.iterdir())
    assert main(estimate) == 0
    assert "64 tokens a video" in (printed := capsys.readouterr().out) and "reference" not in printed
    assert main([*estimate, "--group_parallel_size", "3", "--num_gpus", "3"]) == 2  # two videos: asked of the class
    assert "the loss of a row compares, 2," in capsys.readouterr().err
    assert main([*train, "--dry_run", "--use_cpu"]) == 0


def test_a_module_in_the_folder_needs_no_distribution(site, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(site)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(site))])
    argv = ["train", "video_hinge:VideoHingeTrainer", "--dry_run", *SIZES]
    try:
        assert main([*argv, "--margin", "3"]) == 0
        assert "margin: 3.0\n" in capsys.readouterr().out
        assert main([*argv, "--margin", "-1"]) == 1
        assert "`margin` must be positive, got -1.0" in capsys.readouterr().err
    finally:
        sys.modules.pop("video_hinge", None)


def test_the_page_names_the_group_that_is_read():
    assert f'[project.entry-points."{ENTRY_POINTS}"]' in PAGE
