"""The command `video-trl` itself: help, errors, options, files of options."""

import importlib
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.support.paths import DOCS, ROOT
from tests.support.toml import tomllib
from video_trl import __version__
from video_trl.cli import VERBS, _is_expected, main
from video_trl.cli.parser import UsageError, parse
from video_trl.cli.train import split_launcher
from video_trl.trainer.step.nan_guard import NonFiniteLossError


@dataclass
class TinyArguments:
    """Options of a made-up verb."""

    beta: float = field(default=1.0, metadata={"help": "Strength."})
    names: list[str] = field(default_factory=list, metadata={"help": "Names."})
    fast: bool = field(default=True, metadata={"help": "Fast."})


def examples(text):
    """Commands in the docstring of a verb or in a page, as words after `video-trl`; remarks follow three spaces."""
    text = text.replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines() if line.strip().startswith("video-trl ")]
    return [shlex.split(re.split(r"(?<=\S)   +(?!--)", line)[0])[1:] for line in lines]


COMMANDS = [words for verb in VERBS for words in examples(importlib.import_module(f"video_trl.cli.{verb}").__doc__)]
PAGE = examples("\n".join(re.findall(r"```bash\n(.*?)```", (DOCS / "start" / "cli.md").read_text(), re.DOTALL)))


def test_help_lists_every_verb_and_imports_nothing_slow():
    code = (
        "import sys\nfrom video_trl.cli import main\nassert main(['--help']) == 0\n"
        "slow = {'torch', 'transformers', 'trl', 'diffusers', 'datasets', 'numpy'} & set(sys.modules)\n"
        "assert not slow, slow"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for verb, summary in VERBS.items():
        assert re.search(rf"^  {verb} +{re.escape(summary)}$", done.stdout, re.MULTILINE)


def test_the_module_and_the_script_are_the_command():
    done = subprocess.run([sys.executable, "-m", "video_trl", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == __version__
    script = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]["video-trl"]
    module, _, name = script.partition(":")
    assert vars(importlib.import_module(module))[name] is main


@pytest.mark.parametrize("words", COMMANDS + PAGE, ids=" ".join)
def test_examples_in_the_help_and_on_the_page_have_options_that_exist(words, capsys, monkeypatch):
    """An unknown option, or an unknown key of a file, is refused before the help is shown."""
    monkeypatch.chdir(ROOT)
    _, words = split_launcher(words) if words[0] == "train" else ([], words)
    assert main([*words, "--help"]) == 0
    assert f"usage: video-trl {words[0]}" in capsys.readouterr().out


def test_every_verb_has_examples():
    assert {words[0] for words in COMMANDS} >= set(VERBS) and len(PAGE) >= 8


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["evla"], 2, "no verb 'evla' (did you mean 'eval'?)"),
        (["eval", "--num_promts", "2"], 2, "no option --num_promts (did you mean 'num_prompts'?)"),
        (["eval", "--config"], 2, "--config needs a file"),
        (["eval", "--config", "missing.yaml"], 1, "No such file or directory: 'missing.yaml'"),
        (["eval", "--config=typo.yaml"], 2, "typo.yaml: there is no option 'jugde' (did you mean 'judge'?)"),
        (["eval", "--config", "list.yaml"], 2, "list.yaml: expected options as 'name: value'"),
        (["eval", "--config", "torn.yaml"], 2, "torn.yaml is not YAML"),
        (["eval", "--benchmark", "vidophy"], 2, "unknown benchmark 'vidophy' (did you mean 'videophy'?)"),
        (["eval", "--benchmark=vbnch"], 2, "unknown benchmark 'vbnch' (did you mean 'vbench'?)"),
        (
            ["train", "sft", "--model_name_or_path", "w.gguf", "--dry_run"],
            1,
            "w.gguf is a file; expected a",
        ),
        (["eval", "--benchmark", "vbnch"], 2, "(did you mean 'vbench'?); expected one of custom, videophy, videophy2"),
        (["eval", "--judge_options", "{"], 2, "--judge_options must be JSON"),
        (["eval", "--judge_options", "[1]"], 2, "--judge_options must be a mapping"),
        (["eval", "--judge_options", '{"color": 1}', "--judge", "qwen-vl:x/y"], 2, "--judge_options"),
        (["eval", "--model_name_or_path", "my/model"], 2, "--judge is needed"),
        (["eval", "--model_name_or_path", "my/model", "--judge", "scores.csv"], 1, "needs `prompts` and `judge`"),
        (["eval", "--results", "x.json"], 2, "--results are read for phygenbench, vbench and physics-iq"),
        (["eval", "--benchmark", "vbench"], 2, "--results is needed"),
        (["generate", "--model_name_or_path", "my/model"], 2, "--prompts is needed"),
        (["score", "runs/a", "t.csv"], 2, "either runs or one table"),
        (["report", "nowhere"], 1, "Expected an evaluation run in nowhere"),
        (["report", "nowhere", "--curves", "x.json"], 2, "--curves are NAME=FILE"),
        (["vote", "a", "b", "--export", "votes.txt"], 2, ".parquet or .csv"),
        (["train", "gdpp"], 2, "no method 'gdpp' (did you mean 'gdpo'?)"),
        (["train", "gdpo", "--model_name_or_path", "my/model"], 2, "needs --dataset_name"),
        (["train", "dpo", "--beta", "-1"], 1, "`beta` must be positive"),
        (["train", "dpo", "--evaluator_judge", "sandbox"], 2, "add --eval_strategy steps"),
        (["train", "dpo", "--early_stopping_patience", "2"], 2, "needs a metric to watch"),
        (["train", "sft", "--snr_gamma", "5"], 2, "(here it is 'loss_weighting')"),
        (["train", "gdpo", "--snr_gamma", "5"], 2, "--snr_gamma: a preference weighs all noise levels alike"),
        (["train", "gdpo", "--ref_model", "x"], 2, "--ref_model: the reference is the model with its adapter"),
        (["train", "sft", "--num_processes", "2", "--config_file", "x.yaml", "--max_step", "1"], 2, "'max_steps'"),
        (
            ["train", "sft", "--model_name_or_path", "a/b", "--dataset_name", "c", "--sample_every", "9"],
            2,
            "--sample_prompts is needed",
        ),
        (["eval", "--benchmark", "physion", "--model_name_or_path", "my/model"], 1, "needs `physion`"),
        (["eval", "--benchmark", "vbench", "--results", "a=.", "b=scores.csv"], 2, "all files or all runs"),
        (["eval", "--benchmark", "vbench", "--results", "a=."], 1, "Expected an evaluation run in ."),
        (["push", "folder"], 2, "expected a folder and a repository id"),
        (["push", ".", "me/adapter"], 1, "Nothing to push"),
        (["curate", "gtpairs"], 2, "no recipe 'gtpairs' (did you mean 'gt-pairs'?)"),
        (["curate", "gt-pairs"], 2, "--sources is needed"),
        (["curate", "phyaug", "--actions", "sandbox"], 2, "--sources is needed"),
        (["curate", "phyaug", "--sources", "clips", "--actions", ""], 1, "`actions` is needed"),
    ],
)
def test_errors_are_one_line_with_the_right_code(argv, code, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("typo.yaml").write_text("jugde: sandbox\n")
    Path("list.yaml").write_text("- judge\n")
    Path("scores.csv").write_text("video,prompt,sa,pc\na.mp4,A ball falls.,1,1\n")
    Path("torn.yaml").write_text("judge: [\n")
    Path("w.gguf").touch()
    assert main(argv) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"video-trl {argv[0]}: ") and message in line


def test_debug_shows_where_an_error_came_from(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for argv in (["--debug", "report", "nowhere"], ["report", "nowhere", "--debug"]):
        with pytest.raises(ValueError, match="nowhere"):
            main(argv)


def test_debug_with_a_value_is_an_option_of_training(capsys):
    assert main(["train", "sft", "--debug", "underflow_overflow", "--dry_run", "--use_cpu"]) == 0
    assert "- underflow_overflow" in capsys.readouterr().out


def test_only_errors_that_explain_themselves_lose_their_traceback():
    assert all(map(_is_expected, (ValueError(), FileNotFoundError(), ImportError(), NonFiniteLossError())))
    assert not any(map(_is_expected, (RuntimeError(), KeyError(), TypeError(), AssertionError())))


def test_wrong_values_are_refused_by_the_parser(capsys):
    assert main(["vote", "a", "b", "--port", "many"]) == 2
    assert "--port" in capsys.readouterr().err


def test_options_come_from_file_and_command_line(tmp_path):
    path = tmp_path / "options.yaml"
    path.write_text("beta: 1e-3\nnames: [a, b]\nfast: false\n")
    (args,) = parse("tiny", "", [TinyArguments], ["--config", str(path)])
    assert args == TinyArguments(beta=1e-3, names=["a", "b"], fast=False)
    args, runs = parse("tiny", "", [TinyArguments], [f"--config={path}", "x", "--beta", "2"], positional="runs")
    assert (args.beta, args.names, runs) == (2.0, ["a", "b"], ["x"])
    (args,) = parse("tiny", "", [TinyArguments], ["--no_fast"])
    assert not args.fast


def test_parts_of_an_option_are_not_the_option():
    with pytest.raises(UsageError, match=r"no option --bet \(did you mean 'beta'\?\)"):
        parse("tiny", "", [TinyArguments], ["--bet", "3"])


def test_short_help_leaves_out_what_is_in_the_long_one(capsys):
    texts = []
    for flag in ("--help", "--help_all"):
        assert main(["train", "sft", flag]) == 0
        texts.append(capsys.readouterr().out)
    short, long = texts
    assert "--lora_rank" in short and "--adam_beta1" not in short and "--help_all lists them" in short
    assert "--adam_beta1" in long
