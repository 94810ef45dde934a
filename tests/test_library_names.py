"""What the package asks of its libraries is there in the versions that are installed, in code that no CPU runs too."""

import ast
import importlib
import importlib.util
from types import ModuleType

import pytest

from tests.support.paths import ROOT


FILES = sorted(path for path in (ROOT / "video_trl").rglob("*.py") if "templates" not in path.parts)
SET_WHILE_RUNNING = {"deepspeed._hf_deepspeed_config_weak_ref"}  # by transformers, where DeepSpeed is configured


def _module(name):
    """A module; its ImportError if it is not there; None if it, or something that it needs, is not installed."""
    top = name.partition(".")[0]
    if top in ("video_trl", "__future__") or importlib.util.find_spec(top) is None:
        return None
    try:
        return importlib.import_module(name)
    except ImportError as error:
        missing = (error.name or "").partition(".")[0]
        return None if missing and missing != top else error


def _member(module, name):
    return getattr(module, name) if hasattr(module, name) else _module(f"{module.__name__}.{name}")


def _missing(tree):
    modules = {}  # name in the file -> what it stands for, in all of its functions
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                found = _module(alias.name)
                top = alias.name.partition(".")[0]
                here = importlib.import_module(top) if isinstance(found, ModuleType) and not alias.asname else found
                modules.setdefault(alias.asname or top, []).append(here)
                if isinstance(found, ImportError):
                    yield alias.name
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found = _module(node.module)
            for alias in node.names if isinstance(found, ModuleType) else ():
                value = _member(found, alias.name)
                modules.setdefault(alias.asname or alias.name, []).append(value)
                if isinstance(value, ImportError):
                    yield f"{node.module}.{alias.name}"
            if isinstance(found, ImportError):
                yield node.module
    known = {name: found[0] for name, found in modules.items() if all(each is found[0] for each in found)}
    for node in ast.walk(tree):
        names = ast.unparse(node).split(".") if isinstance(node, ast.Attribute) else [""]
        value = known.get(names[0])
        for name in names[1:]:  # `torch.accelerator.empty_cache`: as far as it is modules
            value = _member(value, name) if isinstance(value, ModuleType) else None
        if isinstance(value, ImportError):
            yield ".".join(names)


@pytest.mark.parametrize("package", sorted({path.relative_to(ROOT / "video_trl").parts[0] for path in FILES}))
def test_every_name_of_a_library_is_there(package):
    paths = [path for path in FILES if path.relative_to(ROOT / "video_trl").parts[0] == package]
    found = [(path.name, name) for path in paths for name in _missing(ast.parse(path.read_text("utf-8")))]
    assert not [(path, name) for path, name in found if name not in SET_WHILE_RUNNING]


def test_a_name_that_is_not_there_is_found():
    code = "import os, torch\nfrom transformers.models.videomae import Nothing\ntorch.accelerator.nothing()\n"
    found = list(_missing(ast.parse(code + "torch.float32.x\nos.SEEK_SET\nfrom torch.nowhere import x")))
    assert found == ["transformers.models.videomae.Nothing", "torch.nowhere", "torch.accelerator.nothing"]
