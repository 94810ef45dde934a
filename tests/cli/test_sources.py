"""Help and refusals of the command line without the seconds that imports take: options are read from sources."""

import argparse
import subprocess
import sys
from dataclasses import fields

import pytest
import torch
import trl
from accelerate.commands.launch import launch_command_parser
from packaging.version import Version
from transformers import TrainingArguments
from trl import TrlParser

from video_trl.cli.curate import RECIPES
from video_trl.cli.sources import read_arguments, read_attribute, read_config, read_dataclass
from video_trl.curation import GTPairConfig, PhyAugConfig, SelfPairsConfig
from video_trl.data.buckets import ASPECT_RATIOS
from video_trl.methods import own_methods


SLOW = ["torch", "diffusers", "datasets", "accelerate", "pyarrow", "av"]
if Version(trl.__version__) >= Version("1"):  # the parser of older ones imports transformers, without torch
    SLOW.append("transformers")
# The default of transformers depends on torch, which a reader of its source cannot know.
COMPUTED_DEFAULTS = ["optim"] if Version(torch.__version__) < Version("2.8") else []
METHODS = own_methods()
CURATION = {
    "gt_pair.pipeline:GTPairConfig": GTPairConfig,
    "phyaug.config:PhyAugConfig": PhyAugConfig,
    "self_pairs:SelfPairsConfig": SelfPairsConfig,
}
COMMANDS = [
    *(f"{verb} {method.name} --help" for verb in ("train", "encode", "estimate") for method in METHODS),
    *(f"curate {recipe} --help" for recipe in RECIPES),
    *("data check --help", "generate --help", "score --help", "eval --help", "report --help", "vote --help"),
    *("push --help", "export --help", "doctor --help", "train gdpo --help_all"),
    *("train gdpo --lerning_rate 1", "train repa --learning_rate high", "train dpo --step_mode both"),
    *("train sft --num_processes 2 --foo 1", "estimate gdpo --foo 1", "encode sft --foo 1", "curate gt-pairs --foo 1"),
    *("curate phyaug --tau much", "train gdpo --preset regdpo-paper-t2v", "score --judgee x", "train sft --lr many"),
]


COMPUTED = ("log_level", "log_level_replica")  # choices that transformers computes, and a reader cannot know


def options_of(kind):
    return [
        (
            a.option_strings,
            a.nargs,
            a.dest in COMPUTED_DEFAULTS or a.default,
            a.help,
            a.dest in COMPUTED or a.choices and [*map(str, a.choices)],
        )
        for a in TrlParser([kind])._actions
    ]


def test_help_and_typos_import_nothing_slow():
    """One process for all of them: a module that any of them imports stays imported."""
    code = (
        "import sys\nfrom contextlib import redirect_stderr, redirect_stdout\nfrom io import StringIO\n"
        "from video_trl.cli import main\n"
        f"for command in {COMMANDS!r}:\n"
        "    told = StringIO()\n"
        "    with redirect_stdout(told), redirect_stderr(told):\n"
        "        code = main(command.split())\n"
        "    assert code == (0 if '--help' in command else 2), (command, code, told.getvalue())\n"
        f"    slow = set({SLOW!r}) & set(sys.modules)\n"
        "    assert not slow, (command, slow)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_a_configuration_read_from_its_source_is_the_one_that_is_imported(method):
    assert options_of(read_config(method.path)) == options_of(method.load().config_class)
    assert read_attribute(method.path, "workload_options") == method.load().workload_options


@pytest.mark.parametrize("path", CURATION)
def test_so_is_one_of_curation(path):
    assert options_of(read_dataclass(f"video_trl.curation.{path}")) == options_of(CURATION[path])


def test_aspect_ratios_of_gt_pairs_are_those_of_the_buckets():
    assert GTPairConfig().ratios == [f"{across}:{down}" for across, down in ASPECT_RATIOS]


def test_options_of_the_launcher_are_those_of_its_parser():
    actions = [action for action in launch_command_parser()._actions if not isinstance(action, argparse._HelpAction)]
    options = {
        name[2:].replace("-", "_"): action.nargs != 0
        for action in actions
        for name in action.option_strings
        if name.startswith("--")
    }
    assert read_arguments("accelerate.commands.launch") == options


@pytest.mark.parametrize(
    "source",
    [
        "class T: ...",  # no configuration
        "from nowhere_at_all import C\nclass T: config_class = C",
        "class T: config_class = make()",
        "from dataclasses import dataclass\n@dataclass\nclass C:\n    x: int = compute()\nclass T: config_class = C",
        "def f(:",
    ],
)
def test_a_source_that_cannot_be_read_leaves_the_import(source, tmp_path, monkeypatch):
    name = f"module_{abs(hash(source))}"
    (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert read_config(f"{name}:T") is None
    assert read_config("nowhere_at_all:T") is None


def test_fields_of_training_arguments():
    read = read_dataclass("transformers.training_args:TrainingArguments")
    assert list(read.__dataclass_fields__) == [item.name for item in fields(TrainingArguments) if item.init]
