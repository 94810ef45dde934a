"""What the package asks of its libraries is there in the versions that are installed, in code that no CPU runs too."""

import ast
import importlib
import importlib.util
from types import ModuleType

import pytest

from tests.support.paths import ROOT


FILES = sorted(path for path in (ROOT / "video_trl").rglob("*.py") if "templates" not in path.parts)


def _module(name):
    """A module, or None if it, or something that it needs, is not installed: an extra, another platform."""
    top = name.partition(".")[0]
    if top in ("video_trl", "__future__") or importlib.util.find_spec(top) is None:
        return None
    try:
        return importlib.import_module(name)
    except ImportError as error:
        missing = (error.name or "").partition(".")[0]
        return None if missing and missing != top else error


def _missing(tree):
    modules = {}  # name in the file -> module
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                found = _module(alias.name)
                if isinstance(found, ModuleType):
                    top = alias.name.partition(".")[0]
                    modules[alias.asname or top] = found if alias.asname else importlib.import_module(top)
                elif found is not None:
                    yield alias.name
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found = _module(node.module)
            for alias in node.names if found is not None else ():
                value = getattr(found, alias.name, None) or _module(f"{node.module}.{alias.name}")
                if isinstance(value, ImportError):
                    yield f"{node.module}.{alias.name}"
                if isinstance(value, ModuleType):
                    modules[alias.asname or alias.name] = value
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield from _missing_attribute(node, modules)


def _missing_attribute(node, modules):
    """`torch.accelerator.empty_cache`: the first name that a module of the chain does not have."""
    names = ast.unparse(node).split(".")
    if names[0] not in modules or not all(name.isidentifier() for name in names):
        return
    value = modules[names[0]]
    for name in names[1:]:
        if not isinstance(value, ModuleType):
            return
        value = getattr(value, name, None) or _module(f"{value.__name__}.{name}")
    if isinstance(value, ImportError):
        yield ".".join(names)


@pytest.mark.parametrize("package", sorted({path.relative_to(ROOT / "video_trl").parts[0] for path in FILES}))
def test_every_name_of_a_library_is_there(package):
    paths = [path for path in FILES if path.relative_to(ROOT / "video_trl").parts[0] == package]
    assert not [f"{path.name}: {name}" for path in paths for name in _missing(ast.parse(path.read_text("utf-8")))]


def test_a_name_that_is_not_there_is_found():
    code = (
        "import torch\nfrom transformers.models.videomae import Nothing\ntorch.accelerator.nothing()\ntorch.float32.x"
    )
    assert list(_missing(ast.parse(code))) == ["transformers.models.videomae.Nothing", "torch.accelerator.nothing"]
