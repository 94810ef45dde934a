"""The registry of methods: what names lead to, and what is wrong with a registration, said in one line."""

import ast
import gc
import subprocess
import sys
from types import SimpleNamespace

import pytest

from tests.support.paths import ROOT
from video_trl import methods
from video_trl.cli import main
from video_trl.methods import ENTRY_POINTS, Method, known_methods, own_methods
from video_trl.trainer import PreferenceConfig, VideoConfig, VideoTrainer


@pytest.fixture
def register(tmp_path, monkeypatch):
    """Installs a distribution with a method, as metadata alone."""

    def install(distribution, name, path):
        info = tmp_path / distribution / f"{distribution}-1.dist-info"
        info.mkdir(parents=True)
        info.joinpath("METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1\n")
        info.joinpath("entry_points.txt").write_text(f"[{ENTRY_POINTS}]\n{name} = {path}\n")
        monkeypatch.syspath_prepend(info.parent)

    return install


@pytest.mark.parametrize("method", own_methods(), ids=lambda method: method.name)
def test_every_method_says_all_that_is_asked_of_it(method):
    trainer_class = method.load()
    assert trainer_class.__name__ == method.class_name and issubclass(trainer_class, VideoTrainer)
    assert issubclass(trainer_class.config_class, VideoConfig)
    assert trainer_class.row_type in ("video", "preference", "group")
    for text in (trainer_class.method_name, trainer_class.tag, trainer_class.summary, method.summary):
        assert text
    options = {name: field.default for name, field in trainer_class.config_class.__dataclass_fields__.items()}
    assert set(trainer_class.workload_options) <= set(options)
    if issubclass(trainer_class.config_class, PreferenceConfig):
        assert set(trainer_class.config_class.reference_error_options) <= set(options)
    assert ("beta" in options) >= trainer_class.config_class.logs_gaps
    assert trainer_class.config_class.regulariser_field in {None, *options}


@pytest.mark.parametrize(
    ("name", "changes", "num_rejected", "videos"),
    [
        ("sft", {}, 3, 1),
        ("repa", {}, 0, 1),
        ("dpo", {}, 3, 2),
        ("regdpo", {}, 1, 2),
        ("gdpo", {"loss_type": "sampled"}, 3, 2),
        ("gdpo", {"loss_type": "sum"}, 3, 4),
        ("gdpo", {"loss_type": "plackett_luce"}, 1, 2),
    ],
)
def test_videos_of_a_row(name, changes, num_rejected, videos, tmp_path):
    trainer_class = {method.name: method for method in own_methods()}[name].load()
    args = trainer_class.config_class(str(tmp_path), use_cpu=True, **changes)
    assert trainer_class.videos_per_row(args, num_rejected) == videos


def test_type_checkers_are_shown_the_names_of_the_registry():
    tree = ast.parse((ROOT / "video_trl" / "__init__.py").read_text(encoding="utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    shown = {alias.name: node.module for node in block.body for alias in node.names}
    for method in own_methods():
        module, _, trainer = method.path.partition(":")
        assert shown.pop(trainer) == module.removeprefix("video_trl.")
        assert shown.pop(method.load().config_class.__name__) == method.load().config_class.__module__.removeprefix(
            "video_trl."
        )
    assert not shown


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("no_such_module:X", "there is no module 'no_such_module'. Install it"),
        ("video_trl.trainer:NoSuchTrainer", "has no attribute 'NoSuchTrainer'. Expected a trainer class"),
        ("video_trl.trainer:VideoConfig", "expected a class that extends `VideoTrainer`"),
        ("video_trl.trainer:find_collapse", "expected a class that extends `VideoTrainer`"),
    ],
)
def test_a_registration_that_leads_nowhere_says_so(path, message, register, capsys):
    with pytest.raises(ValueError, match="The method 'mine' is"):
        Method("mine", path).load()
    register("broken", "mine", path)
    assert main(["train"]) == 0  # the others are there all the same; without a summary, the path is shown
    assert f"  mine    {path}\n" in capsys.readouterr().out
    for argv in (["mine", "--max_steps", "1"], [path]):
        assert main(["train", *argv]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line


@pytest.mark.parametrize("is_first", [True, False])
def test_a_class_is_imported_without_looks_for_garbage(is_first, tmp_path, monkeypatch):
    name = f"imported_{is_first}"
    (tmp_path / f"{name}.py").write_text(
        "import gc\nfrom video_trl.trainer import VideoTrainer\nENABLED = gc.isenabled()\n"
        "class Mine(VideoTrainer): pass"
    )
    monkeypatch.syspath_prepend(tmp_path)
    if is_first:
        monkeypatch.setattr(methods, "sys", SimpleNamespace(modules=sys.modules.keys() - {"torch"}))
    kept = [[] for _ in range(1000)]
    before = gc.get_freeze_count()
    loaded = Method("mine", f"{name}:Mine").load()
    assert not sys.modules[loaded.__module__].ENABLED and gc.isenabled()
    assert (gc.get_freeze_count() >= before + len(kept)) == is_first
    with pytest.raises(ValueError, match="no module"):
        Method("mine", "no_such_module:X").load()
    assert gc.isenabled()


@pytest.mark.parametrize("argv", [["train"], ["estimate", "--help"], ["train", "dop"]])
def test_methods_are_listed_and_typos_found_without_an_import_of_torch(argv):
    code = (
        f"import sys\nfrom video_trl.cli import main\nmain({argv})\n"
        "sys.exit({'torch', 'transformers', 'trl', 'diffusers', 'datasets', 'numpy'} & set(sys.modules) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "regdpo" in done.stdout + done.stderr


def test_a_name_that_two_distributions_give_is_refused_where_it_is_used(register, capsys):
    register("other", "dpo", "other_module:Trainer")
    assert [method.name for method in known_methods()].count("dpo") == 2
    assert main(["train", "dpo", "--help"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "write one of video_trl.trainer.dpo_trainer:VideoDPOTrainer, other_module:Trainer instead" in line
    assert main(["train", "sft", "--help"]) == 0
    assert main(["train", "video_trl.trainer.dpo_trainer:VideoDPOTrainer", "--help"]) == 0
