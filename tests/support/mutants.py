"""
Change the package's mathematics in one place at a time, and see whether its tests notice.

`python -m tests.support.mutants` changes signs, factors, comparisons, whole numbers and the order of arguments, and
drops `detach`; then it runs the tests of the changed file. It lists the changes that no test has noticed.
"""

import argparse
import ast
import copy
import importlib.machinery
import os
import random
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.support.paths import ROOT


# File -> tests that are to notice a change of it.
SUBJECTS = {
    "video_trl/losses/preference.py": ("tests/losses",),
    "video_trl/losses/alignment.py": ("tests/losses/test_alignment.py",),
    "video_trl/diffusion.py": ("tests/test_diffusion.py",),
    "video_trl/curation/phyaug/sampling.py": ("tests/curation/phyaug/test_sampling.py",),
    "video_trl/curation/phyaug/groups.py": ("tests/curation/phyaug/test_groups.py",),
    "video_trl/curation/gt_pair/pairs.py": ("tests/curation/gt_pair/test_pipeline.py",),
    "video_trl/curation/clips/measures.py": ("tests/curation/clips/test_measures.py",),
}
SECONDS = 300  # a change may make a loop endless
_OPPOSITE = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult}
_NEIGHBOUR = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt}


@dataclass(frozen=True)
class Mutant:
    """One change: where it is, of which kind, what stood and what stands there, and the new source of the file."""

    path: str
    line: int
    kind: str
    before: str
    after: str
    source: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line} {self.kind}: {self.before} -> {self.after}"


def changes(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """Kind of a change, and what takes the place of the node."""
    new = copy.deepcopy(node)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPPOSITE:
        new.op = _OPPOSITE[type(node.op)]()
        yield "sign" if isinstance(node.op, ast.Add | ast.Sub) else "factor", new
    elif (
        isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and not isinstance(node.operand, ast.Constant)
    ):
        yield "sign", new.operand
    elif isinstance(node, ast.Compare) and type(node.ops[0]) in _NEIGHBOUR:
        new.ops[0] = _NEIGHBOUR[type(node.ops[0])]()
        yield "off by one", new
    elif isinstance(node, ast.Constant) and type(node.value) is int:
        new.value += 1
        yield "off by one", new
    elif isinstance(node, ast.Call):
        if isinstance(node.func, ast.Attribute) and node.func.attr == "detach":
            yield "no detach", new.func.value
        elif len(node.args) >= 2 and not any(isinstance(each, ast.Starred) for each in node.args[:2]):
            new.args[:2] = reversed(new.args[:2])
            yield "swapped arguments", new


def mutants_of(path: str) -> list[Mutant]:
    """All changes of a file, but for those of annotations, documentation and messages."""
    text = (ROOT / path).read_text(encoding="utf-8")
    tree = ast.parse(text)
    found = []

    def visit(node: ast.AST) -> None:
        for name, value in ast.iter_fields(node):
            if isinstance(node, ast.Raise | ast.JoinedStr) or name in ("annotation", "returns", "decorator_list"):
                continue
            for position, child in enumerate(value if isinstance(value, list) else [value]):
                if not isinstance(child, ast.AST):
                    continue
                for kind, new in changes(child):
                    before = ast.unparse(child)
                    if isinstance(value, list):
                        value[position] = new
                    else:
                        setattr(node, name, new)
                    source = ast.unparse(ast.fix_missing_locations(tree))
                    if isinstance(value, list):
                        value[position] = child
                    else:
                        setattr(node, name, child)
                    found.append(Mutant(path, child.lineno, kind, before, ast.unparse(new), source))
                visit(child)

    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef | ast.ClassDef) and function in tree.body:
            visit(function)
    return found


def chosen_mutants(number: int, seed: int) -> list[Mutant]:
    """So many changes, of all files and kinds in turn."""
    generator = random.Random(seed)
    groups: dict[tuple[str, str], list[Mutant]] = {}
    for path in SUBJECTS:
        for mutant in mutants_of(path):
            groups.setdefault((mutant.kind, path), []).append(mutant)
    for group in groups.values():
        generator.shuffle(group)
    chosen: list[Mutant] = []
    while len(chosen) < number and any(groups.values()):
        for group in groups.values():
            if group and len(chosen) < number:
                chosen.append(group.pop())
    return chosen


def is_noticed(mutant: Mutant) -> bool:
    """Whether the tests fail with the change. They run in a child of this process, which must not know the package."""
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        signal.alarm(SECONDS)
        _import_changed(mutant)
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        import pytest

        os._exit(int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-m", "not slow", *SUBJECTS[mutant.path]])))
    _, status = os.waitpid(child, 0)
    return status != 0


def _import_changed(mutant: Mutant) -> None:
    get_code = importlib.machinery.SourceFileLoader.get_code

    def changed(loader: importlib.machinery.SourceFileLoader, name: str):
        path = loader.get_filename(name)
        if Path(path) == ROOT / mutant.path:
            return compile(mutant.source, path, "exec")
        return get_code(loader, name)

    importlib.machinery.SourceFileLoader.get_code = changed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--number", type=int, default=40, help="Changes to try.")
    parser.add_argument("--seed", type=int, default=0, help="Of the choice of changes.")
    options = parser.parse_args()
    os.chdir(ROOT)
    # Slow to import, and the same in every child.
    import diffusers  # noqa: F401
    import transformers  # noqa: F401

    assert not [name for name in sys.modules if name.startswith("video_trl")]
    for mutant in chosen_mutants(options.number, options.seed):
        print(f"{'noticed' if is_noticed(mutant) else 'SURVIVED'}  {mutant}", flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
