"""The rules of the house, held by reading the source: sizes, who imports whom, and habits that are not wanted."""

import ast
import inspect
import re
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path

import pytest

from tests.support.paths import EXAMPLES, ROOT
from tests.support.toml import tomllib
from video_trl.load import SANDBOX


PACKAGE = ROOT / "video_trl"
SOURCES = sorted(PACKAGE.rglob("*.py"))
EXAMPLES = sorted((EXAMPLES).rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))

MAX_FILE_LINES = 800
MAX_FUNCTION_LINES = 80
BANNED_FILE_NAMES = {"utils.py", "common.py", "misc.py"}
BANNED_FOLDERS = {"utils", "common", "helpers", "core"}
BANNED_IMPORTS = {"torchvision", "decord", "cv2"}

# Part of the package -> the other parts it may import, beside `files`. Nothing imports `cli`.
MAY_IMPORT = {
    "methods": set(),
    "presets": set(),
    "losses": set(),
    "diffusion": set(),
    "files": set(),
    "models": {"diffusion"},
    "judges": {"data"},
    "teachers": set(),
    "data": {"models", "teachers"},
    "sandbox": {"judges", "teachers", "data", "diffusion"},
    "load": {"judges", "teachers", "data", "sandbox"},
    "hub": {"data", "load", "models"},
    "curation": {"data", "judges", "models", "losses", "load", "hub"},
    "evaluation": {"judges", "data", "models", "teachers", "load", "hub"},
    "trainer": {"losses", "diffusion", "models", "data", "hub", "teachers", "load"},
    "experiment": {"load", "evaluation", "trainer"},
    "testbed": {"load", "experiment", "methods", "evaluation", "sandbox", "trainer"},
    "cli": {"load", "methods", "presets"},
    "__main__": {"cli"},
}
# Allowed only inside a function: a verb loads nothing slow before it has read its options.
MAY_IMPORT_LAZILY = {
    "cli": set(MAY_IMPORT) - {"__main__"} | {"__version__"},
    "methods": {"trainer"},
    "curation": {"evaluation", "methods", "trainer"},
    "experiment": {"__version__", "data", "sandbox"},
    "testbed": {"__version__"},
}
# The only files that may know the name of the default model: the others get what it stands for from `load.py`.
KNOW_THE_SANDBOX_BY_NAME = {"load"}
# The only third-party packages of these parts.
PURE = {"losses": {"torch"}, "diffusion": {"torch"}, "files": {"torch", "filelock", "xxhash"}}

# Calls of getattr/hasattr in a file, and the foreign interface that forces them.
DYNAMIC_ATTRIBUTES = {
    "cli/dry_run.py": (2, "a checkpoint names the classes of its parts"),
    "curation/__init__.py": (1, "lazy public names: the name is only known when it is asked for"),
    "judges/__init__.py": (1, "lazy public names: the name is only known when it is asked for"),
    "sandbox/__init__.py": (1, "lazy public names: the name is only known when it is asked for"),
    "trainer/setup/models.py": (1, "pipelines of diffusers are known by the names of their classes"),
    "hub/lora.py": (1, "PEFT sets `peft_config` on a model with its first adapter"),
    "trainer/setup/lora.py": (1, "PEFT sets `peft_config` on a model with its first adapter"),
}

# Distribution -> import name, where they differ.
# Modules that need an extra as a whole; nothing may import them at module level.
MODULES_OF_EXTRAS = {
    "video_trl.evaluation.votes.server": {"starlette", "uvicorn"},
    "video_trl.evaluation.votes.marks": {"starlette"},
}
IMPORT_NAMES = {"pillow": "PIL", "pyyaml": "yaml"}


def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def _part(path: Path) -> str:
    """`video_trl/data/encoding/encode.py` -> `data`, `video_trl/losses/preference.py` -> `losses`."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _module(path: Path) -> str:
    """Dotted name of a file."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def _package(path: Path) -> str:
    """Dotted name of the package that a file lies in: what its relative imports start from."""
    return ".".join(path.relative_to(ROOT).parent.parts)


def _imports(tree: ast.Module, package: str = "") -> Iterator[tuple[str, bool]]:
    """
    (absolute dotted name, runs when the module is imported); `from a import b` is `a.b`. Imports for type checkers
    count as well: they tie files together for a reader, though they do not run.
    """

    def visit(node: ast.AST, top: bool) -> Iterator[tuple[str, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
                for statement in child.body:
                    yield from visit(ast.Module([statement], []), False)
                for statement in child.orelse:
                    yield from visit(ast.Module([statement], []), top)
            elif isinstance(child, ast.Import):
                yield from ((alias.name, top) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                start = package.split(".")[: len(package.split(".")) - child.level + 1] if child.level else []
                module = ".".join([*start, *([child.module] if child.module else [])])
                yield from ((f"{module}.{alias.name}", top) for alias in child.names)
            else:
                inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                yield from visit(child, top and not inside)

    yield from visit(tree, True)


def layering_faults(part: str, tree: ast.Module, package: str = "") -> list[str]:
    """Imports of other parts of the package, or of third-party packages by a pure part, that the tables forbid."""
    faults = []
    for name, top in _imports(tree, package):
        root, *rest = name.split(".")
        if root != "video_trl":
            if part in PURE and root not in PURE[part] and root not in sys.stdlib_module_names:
                faults.append(f"{part} may import only {sorted(PURE[part])}, not {root}")
            continue
        target = rest[0]
        allowed = (
            MAY_IMPORT[part]
            | {part}
            | (set() if part in PURE else {"files"})
            | (MAY_IMPORT_LAZILY.get(part, set()) if not top else set())
        )
        if target not in allowed:
            faults.append(f"{part} may not import video_trl.{target}{' at module level' if top else ''}")
    return faults


def imported_modules(module: str, tree: ast.Module, package: str, modules: Collection[str]) -> set[str]:
    """Those of `modules`, by dotted name, that a file imports anywhere: at the top, lazily, for type checkers."""
    imported = set()
    for name, _ in _imports(tree, package):
        while name and name not in modules:  # `a.b.C` is a name in the module `a.b`
            name = name.rpartition(".")[0]
        imported.add(name)
    return imported - {"", module}


def in_circles(graph: Mapping[str, Collection[str]]) -> set[str]:
    """Modules that are reached again from what they import."""
    circles = set()
    for start in graph:
        seen: set[str] = set()
        waiting = list(graph[start])
        while waiting:
            module = waiting.pop()
            if module not in seen:
                seen.add(module)
                waiting += graph[module]
        if start in seen:
            circles.add(start)
    return circles


def upward_imports(graph: Mapping[str, Collection[str]]) -> list[str]:
    """
    Imports that go up within `trainer`: leaf trainers stand on the bases, these on the parts in the folders. Of what
    is beside the folders, parts know the arguments that all trainers share, and nothing else.
    """
    return [
        f"{module} imports {target}"
        for module, targets in graph.items()
        if re.fullmatch(r"video_trl\.trainer\.\w+\.\w+", module)
        for target in sorted(targets)
        if re.fullmatch(
            r"video_trl\.trainer(\.\w+_trainer|\.(?!base_)\w+_config|\.callbacks|\.collapse_monitor)?", target
        )
    ]


def trainer_tower(trainers: dict[str, tuple[str, ...]]) -> list[str]:
    """Classes that lie between Trainer and `VideoTrainer`: parts are objects, not slices of a class."""
    return [name for name, parents in trainers.items() if "Trainer" in parents and name != "VideoTrainer"]


def trainer_classes(trees: Iterable[ast.Module]) -> dict[str, tuple[str, ...]]:
    """Every class that is a trainer by inheritance, whatever its file is called, with the names of its bases."""
    bases = {
        node.name: tuple(ast.unparse(base).rpartition(".")[2] for base in node.bases)
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    }
    trainers: dict[str, tuple[str, ...]] = {}
    while more := {
        name: parents
        for name, parents in bases.items()
        if name not in trainers and {"Trainer", *trainers} & set(parents)
    }:
        trainers |= more
    return trainers


def sibling_faults(tree: ast.Module, trainers: dict[str, tuple[str, ...]], package: str = "") -> list[str]:
    """Leaf trainers, from which nobody inherits, that a file which defines a trainer imports."""
    if not any(isinstance(node, ast.ClassDef) and node.name in trainers for node in ast.walk(tree)):
        return []
    leaves = set(trainers) - {parent for parents in trainers.values() for parent in parents}
    names = (name.rpartition(".")[2] for name, _ in _imports(tree, package) if name.startswith("video_trl."))
    return [name for name in names if name in leaves]


def long_functions(tree: ast.Module) -> list[str]:
    return [
        f"{node.name}: {node.end_lineno - node.lineno + 1} lines"
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno - node.lineno + 1 > MAX_FUNCTION_LINES
    ]


def calls_of(tree: ast.Module, *names: str) -> list[ast.Call]:
    """Calls by name (`print(...)`) or by dotted name (`torch.load(...)`)."""
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) in names]


def unsafe_loads(tree: ast.Module) -> list[int]:
    """Lines of `torch.load` without a literal `weights_only=True`: anything else can run code from the file."""
    faults = []
    for call in calls_of(tree, "torch.load"):
        safe = [k for k in call.keywords if k.arg == "weights_only" and ast.unparse(k.value) == "True"]
        if not safe:
            faults.append(call.lineno)
    return faults


def fields_without_help(tree: ast.Module) -> list[str]:
    """Fields of dataclasses that stand on a command line (`...Config`, `...Arguments`) and have no help text."""
    faults = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.ClassDef) or not node.name.endswith(("Config", "Arguments")):
            continue
        if not any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list):
            continue
        for field in node.body:
            if not isinstance(field, ast.AnnAssign) or ast.unparse(field.annotation).startswith("ClassVar"):
                continue
            metadata = [k.value for k in field.value.keywords if k.arg == "metadata"] if _is_field(field.value) else []
            if not any("'help':" in ast.unparse(value) for value in metadata):
                faults.append(f"{node.name}.{ast.unparse(field.target)}")
    return faults


def _is_field(value: ast.expr | None) -> bool:
    return isinstance(value, ast.Call) and ast.unparse(value.func) in {"field", "dataclasses.field"}


def _id(path: Path) -> str:
    return str(path.relative_to(ROOT))


TRAINERS = trainer_classes(map(_tree, SOURCES))


@pytest.mark.parametrize("path", SOURCES, ids=_id)
def test_source_keeps_the_rules(path):
    tree, part, lines = _tree(path), _part(path), path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= MAX_FILE_LINES
    assert not long_functions(tree)
    if part != "__init__":
        assert part in MAY_IMPORT, f"{part} is new: say in MAY_IMPORT what it may import"
        assert not layering_faults(part, tree, _package(path))
    assert not sibling_faults(tree, TRAINERS, _package(path))
    assert not [call.lineno for call in calls_of(tree, "print", "breakpoint", "eval", "exec")]
    assert path.name not in BANNED_FILE_NAMES
    assert not BANNED_FOLDERS & set(path.relative_to(PACKAGE).parts[:-1])
    assert "pickle" not in {name.split(".")[0] for name, _ in _imports(tree)}  # loading one runs code from the file


@pytest.mark.parametrize("path", SOURCES + EXAMPLES + TESTS, ids=_id)
def test_every_python_file_is_safe_and_finished(path):
    tree, text = _tree(path), path.read_text(encoding="utf-8")
    assert not unsafe_loads(tree)
    assert not BANNED_IMPORTS & {name.split(".")[0] for name, _ in _imports(tree, _package(path))}
    assert not [
        line for line in text.splitlines() if re.search(r"\b(TODO|FIXME|XXX)\b", line) and path != Path(__file__)
    ]


@pytest.mark.parametrize("path", SOURCES + EXAMPLES, ids=_id)
def test_every_field_of_a_config_has_help(path):
    assert not fields_without_help(_tree(path))


def test_dynamic_attribute_access_stands_only_where_a_foreign_interface_forces_it():
    """Each use has a reason in the table above; the count keeps a second one from slipping in beside it."""
    found = {str(path.relative_to(PACKAGE)): len(calls_of(_tree(path), "getattr", "hasattr")) for path in SOURCES}
    assert {name: count for name, count in found.items() if count} == {
        name: count for name, (count, _) in DYNAMIC_ATTRIBUTES.items()
    }


def test_what_is_imported_at_module_level_is_a_declared_dependency():
    """An extra may only be imported inside a function, or by a module that is, so that the package works without."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    names = {re.match(r"[\w-]+", requirement).group().lower() for requirement in project["dependencies"]}
    allowed = {IMPORT_NAMES.get(name, name.replace("-", "_")) for name in names} | {"video_trl"}
    for path in SOURCES:
        names = {name for name, top in _imports(_tree(path), _package(path)) if top}
        extra = MODULES_OF_EXTRAS.get(_module(path), set())
        users = [name for name in names for module in MODULES_OF_EXTRAS if f"{name}.".startswith(f"{module}.")]
        assert extra or not users, path
        assert {name.split(".")[0] for name in names} - allowed - extra - set(sys.stdlib_module_names) == set(), path


def test_no_circle_of_files():
    """A file can be read, and changed, without those that import it."""
    modules = {_module(path): path for path in SOURCES}
    graph = {
        module: imported_modules(module, _tree(path), _package(path), modules) for module, path in modules.items()
    }
    assert not in_circles(graph)
    assert not upward_imports(graph)


def test_no_class_stands_between_trainer_and_the_base_of_ours():
    assert not trainer_tower(TRAINERS)


def test_one_file_knows_the_default_model_by_its_name():
    """Everywhere else the name is asked of `load.py`, so that another default would be one change."""
    for path in SOURCES:
        if _part(path) not in KNOW_THE_SANDBOX_BY_NAME | {"sandbox"}:
            constants = [node for node in ast.walk(_tree(path)) if isinstance(node, ast.Constant)]
            assert not [node.lineno for node in constants if node.value == SANDBOX], path


def test_nothing_imports_the_examples_or_the_tests():
    for path in SOURCES:
        assert not {"examples", "tests"} & {name.split(".")[0] for name, _ in _imports(_tree(path), _package(path))}, (
            path
        )


# ---- the checks themselves: each sees the fault it is there for -----------------------------------------------------


@pytest.mark.parametrize(
    ("part", "source", "allowed"),
    [
        ("data", "from .columns import check_columns", True),
        ("data", "from ..models import family_for", True),
        ("data", "from .. import models", True),
        ("data", "from ..trainer.base_trainer import x", False),
        ("data", "from .. import trainer", False),
        ("losses", "import torch", True),
        ("losses", "import math", True),
        ("losses", "import numpy", False),
        ("losses", "from ..files import fingerprint", False),
        ("teachers", "from ..files import fingerprint", True),
        ("files", "import numpy", False),
        ("files", "import xxhash", True),
        ("files", "from video_trl import models", False),
        ("losses", "from video_trl.diffusion import FlowMatching", False),
        ("models", "from video_trl.diffusion import FlowMatching", True),
        ("models", "from video_trl import diffusion", True),
        ("models", "from video_trl import trainer", False),
        ("data", "import video_trl.trainer.base_trainer", False),
        ("trainer", "from video_trl.sandbox import load_sandbox", False),
        ("trainer", "def f():\n    from video_trl.sandbox import load_sandbox", False),
        ("trainer", "from video_trl.load import load_pipeline", True),
        ("judges", "def f():\n    from video_trl.load import load_judge", False),
        ("cli", "from video_trl.sandbox import load_sandbox", False),
        ("cli", "def f():\n    from video_trl.sandbox import load_sandbox", True),
        ("cli", "if TYPE_CHECKING:\n    from video_trl.judges import VideoJudge", True),
        ("data", "if TYPE_CHECKING:\n    from video_trl.trainer import x", False),
        ("data", "if TYPE_CHECKING:\n    pass\nelse:\n    from video_trl.trainer import x", False),
    ],
)
def test_layering_check(part, source, allowed):
    assert (not layering_faults(part, ast.parse(source), package=f"video_trl.{part}")) == allowed


def test_sibling_check():
    """By class: a base is no sibling under any file name, nor is a leaf hidden by one."""
    source = """
    class VideoTrainer(transformers.Trainer): ...
    class PreferenceTrainer(VideoTrainer): ...
    class VideoDPOTrainer(PreferenceTrainer): ...
    class VideoSFTTrainer(VideoTrainer): ...
    class Collator: ...
    """
    trainers = trainer_classes([ast.parse(inspect.cleandoc(source))])
    assert set(trainers) == {"VideoTrainer", "PreferenceTrainer", "VideoDPOTrainer", "VideoSFTTrainer"}
    leaf = "class VideoDPOTrainer(PreferenceTrainer): ..."

    def faults(imported: str, body: str = leaf) -> list[str]:
        return sibling_faults(ast.parse(f"{imported}\n{body}"), trainers, "video_trl.trainer")

    assert faults("from video_trl.trainer.sft import VideoSFTTrainer") == ["VideoSFTTrainer"]
    assert faults("from .sft_trainer import VideoSFTTrainer") == ["VideoSFTTrainer"]
    assert not faults("from .base import VideoTrainer\nfrom .preference import PreferenceTrainer")
    assert not faults("from .sft_trainer import VideoSFTTrainer", body="x = VideoSFTTrainer")  # a list of them


def test_circle_check():
    modules = ("a", "a.b", "a.c")
    source = "import torch\nfrom .c import f\nif TYPE_CHECKING:\n    from .b import g\ndef h():\n    from . import x"
    assert imported_modules("a.b", ast.parse(source), "a", modules) == {"a", "a.c"}
    assert in_circles({"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set()}) == {"b", "c"}
    assert not in_circles({"a": {"b", "c"}, "b": {"c"}, "c": set()})


def test_tower_check():
    sliced = "class _Saving(Trainer): ...\nclass VideoTrainer(_Saving): ...\nclass X(VideoTrainer): ..."
    assert trainer_tower(trainer_classes([ast.parse(sliced)])) == ["_Saving"]
    whole = "class VideoTrainer(Trainer): ...\nclass X(VideoTrainer): ..."
    assert not trainer_tower(trainer_classes([ast.parse(whole)]))


def test_upward_check():
    passes, base = "video_trl.trainer.step.passes", "video_trl.trainer.base_trainer"
    allowed = {base: {passes}, passes: {"video_trl.trainer.base_config", "video_trl.trainer.step.denoising"}}
    assert not upward_imports(allowed)
    for target in (base, "video_trl.trainer.dpo_config", "video_trl.trainer.callbacks", "video_trl.trainer"):
        assert upward_imports(allowed | {passes: {target}}) == [f"{passes} imports {target}"]


def test_size_check():
    body = "\n".join("    x = 1" for _ in range(MAX_FUNCTION_LINES))
    assert long_functions(ast.parse(f"def f():\n{body}")) == [f"f: {MAX_FUNCTION_LINES + 1} lines"]
    assert not long_functions(ast.parse(f"def f():\n{body.removesuffix('x = 1').rstrip()}"))


@pytest.mark.parametrize(
    ("source", "num_faults"),
    [
        ("torch.load(p)", 1),
        ("torch.load(p, weights_only=False)", 1),
        ("torch.load(p, weights_only=flag)", 1),
        ("torch.load(p, weights_only=True)", 0),
        ("safetensors.torch.load(p)", 0),
    ],
)
def test_unsafe_load_check(source, num_faults):
    assert len(unsafe_loads(ast.parse(source))) == num_faults


@pytest.mark.parametrize(
    ("field", "complete"),
    [
        ("beta: float = field(default=1.0, metadata={'help': 'Strength.'})", True),
        ("beta: float = field(default=1.0)", False),
        ("beta: float = 1.0", False),
        ("beta: float", False),
        ("names: ClassVar[list[str]] = []", True),
    ],
)
def test_help_check(field, complete):
    tree = ast.parse(f"@dataclass\nclass XConfig:\n    {field}")
    assert (not fields_without_help(tree)) == complete
