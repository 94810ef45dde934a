"""
Change the package's mathematics in one place at a time, and see whether its tests notice.

`python -m tests.support.mutants FILE` changes signs, factors, comparisons, whole numbers and the order of arguments,
and drops `detach`; then it runs the tests of the changed file. It lists the changes that no test has noticed. The slow
tests run a fixed sample of all changes (`--sample`, tests/test_mutants.py).

The tests are collected once. For each change a copy of the process (`fork`) gets the changed code in its functions.
"""

import argparse
import ast
import copy
import functools
import hashlib
import importlib
import inspect
import os
import resource
import signal
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from _pytest.main import pytest_runtestloop

from tests.support.mutants_without_effect import WITHOUT_EFFECT
from tests.support.paths import ROOT


# File -> tests that are to notice a change of it, cheap ones first.
SUBJECTS: dict[str, tuple[str, ...]] = {
    "video_trl/losses/preference.py": ("tests/losses",),
    "video_trl/losses/alignment.py": ("tests/losses/test_alignment.py",),
    "video_trl/losses/safeguard.py": ("tests/losses",),
    "video_trl/diffusion.py": ("tests/test_diffusion.py",),
    "video_trl/trainer/step/denoising.py": ("tests/trainer/step/test_noise.py",),
    "video_trl/curation/annotated.py": ("tests/curation/test_annotated.py",),
    "video_trl/curation/captions.py": ("tests/curation/test_captions.py",),
    "video_trl/curation/generate.py": ("tests/curation/test_generate.py",),
    "video_trl/curation/matched.py": ("tests/curation/test_matched.py",),
    "video_trl/curation/rounds.py": ("tests/curation/test_rounds.py",),
    "video_trl/curation/self_pairs.py": ("tests/curation/test_self_pairs.py",),
    "video_trl/curation/clips/camera_motion.py": (
        "tests/curation/clips/test_measure_numbers.py",
        "tests/curation/clips/test_measures.py",
    ),
    "video_trl/curation/clips/container.py": ("tests/curation/clips/test_bad_files.py",),
    "video_trl/curation/clips/measures.py": (
        "tests/curation/clips/test_measure_numbers.py",
        "tests/curation/clips/test_measures.py",
    ),
    "video_trl/curation/clips/normalise.py": ("tests/curation/clips/test_normalise.py",),
    "video_trl/curation/clips/sources.py": ("tests/curation/clips/test_sources.py",),
    "video_trl/curation/clips/text_overlay.py": ("tests/curation/clips/test_measures.py",),
    "video_trl/curation/engine/journal.py": ("tests/curation/engine/test_manifest.py",),
    "video_trl/curation/engine/manifest.py": ("tests/curation/engine/test_manifest.py",),
    "video_trl/curation/engine/output.py": ("tests/curation/engine/test_output.py",),
    "video_trl/curation/engine/ray.py": ("tests/curation/engine/test_ray.py",),
    "video_trl/curation/gt_pair/elsewhere.py": ("tests/curation/gt_pair/test_elsewhere.py",),
    "video_trl/curation/gt_pair/pairs.py": ("tests/curation/gt_pair/test_pairs.py",),
    "video_trl/curation/gt_pair/pipeline.py": (
        "tests/curation/gt_pair/test_elsewhere.py",
        "tests/curation/gt_pair/test_pipeline.py",
    ),
    "video_trl/curation/phyaug/actions.py": ("tests/curation/phyaug/test_actions.py",),
    "video_trl/curation/phyaug/annotate.py": ("tests/curation/phyaug/test_annotate.py",),
    "video_trl/curation/phyaug/annotation.py": ("tests/curation/phyaug/test_annotate.py",),
    "video_trl/curation/phyaug/config.py": ("tests/curation/phyaug",),
    "video_trl/curation/phyaug/groups.py": ("tests/curation/phyaug/test_groups.py",),
    "video_trl/curation/phyaug/pipeline.py": ("tests/curation/phyaug/test_pipeline.py",),
    "video_trl/curation/phyaug/report.py": ("tests/curation/phyaug/test_pipeline.py",),
    "video_trl/curation/phyaug/sampling.py": ("tests/curation/phyaug/test_sampling.py",),
}
ALL_SLOW = {"video_trl/curation/engine/ray.py"}  # the others are tried with their fast tests alone
# Start of a path -> one change of so many is in the sample: about twenty of the losses, fifteen of the processes, and
# thirty of curation.
ONE_OF = {"video_trl/losses/": 15, "video_trl/diffusion.py": 10, "video_trl/curation/": 40}
SECONDS = 60  # of the processor, at least, and three times what the tests take: a change may make a loop endless
WAIT = 1200  # of the clock: or make it wait for what never comes
_OPPOSITE = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult}
_NEIGHBOUR = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt}
# Their first two arguments may come in any order.
_SYMMETRIC = {"max", "min", "maximum", "minimum", "promote_types", "cosine_similarity", "_compute_dtype"}


@dataclass(frozen=True)
class Mutant:
    """One change: where it is, of which kind, the line as it stands and as it then is, and the file's new source."""

    path: str
    line: int
    kind: str
    before: str
    after: str
    source: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line} {self.kind}: {self.before} -> {self.after}"

    @property
    def reason(self) -> str | None:
        """Why no test can notice it, where that is known."""
        lines = WITHOUT_EFFECT.get(self.path, {})
        return next((reason for reason, changed in lines.items() if self.after in changed), None)


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
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if name == "detach":
            yield "no detach", new.func.value
        elif (
            len(node.args) >= 2
            and name not in _SYMMETRIC
            and not any(isinstance(each, ast.Starred) for each in node.args[:2])
        ):
            new.args[:2] = reversed(new.args[:2])
            yield "swapped arguments", new


def mutants_of(path: str) -> list[Mutant]:
    """All changes of a file's functions, but for those of annotations, documentation and messages."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    original = ast.unparse(tree).splitlines()  # a statement a line
    found = []

    def note(child: ast.AST, kind: str) -> None:
        source = ast.unparse(ast.fix_missing_locations(tree))
        for before, after in zip(original, source.splitlines(), strict=True):
            if before != after:  # nowhere, where two arguments that are alike were swapped
                found.append(Mutant(path, child.lineno, kind, before.strip(), after.strip(), source))

    def visit(node: ast.AST) -> None:
        for name, value in ast.iter_fields(node):
            if isinstance(node, ast.Raise | ast.JoinedStr) or name in ("annotation", "returns", "decorator_list"):
                continue
            for position, child in enumerate(value if isinstance(value, list) else [value]):
                if not isinstance(child, ast.AST):
                    continue
                for kind, new in changes(child):
                    if isinstance(value, list):
                        value[position] = new
                    else:
                        setattr(node, name, new)
                    note(child, kind)
                    if isinstance(value, list):
                        value[position] = child
                    else:
                        setattr(node, name, child)
                visit(child)

    for definition in tree.body:
        members = definition.body if isinstance(definition, ast.ClassDef) else [definition]
        for function in members:
            if isinstance(function, ast.FunctionDef):
                visit(function)
    return found


def sample_of(path: str) -> list[Mutant]:
    """A file's changes in the sample, those with the lowest checksums: nobody chooses them, and they stay the same."""
    one_of = next((number for start, number in ONE_OF.items() if path.startswith(start)), None)
    if one_of is None:
        return []

    def place(mutant: Mutant) -> int:
        change = f"{mutant.kind}: {mutant.before} -> {mutant.after}"
        return int.from_bytes(hashlib.sha256(change.encode()).digest()[:4], "big")

    return [mutant for mutant in mutants_of(path) if place(mutant) * one_of < 2**32]


def put_in(mutant: Mutant) -> None:
    """The changed code into the functions of the module, which others have imported by name."""
    module = importlib.import_module(mutant.path.removesuffix(".py").replace("/", "."))
    changed = types.ModuleType(module.__name__)
    changed.__dict__.update(__file__=module.__file__, __package__=module.__package__, __spec__=module.__spec__)
    exec(compile(mutant.source, str(module.__file__), "exec"), changed.__dict__)
    _replace(vars(module), vars(changed), module.__name__)


def _replace(old: Any, new: Any, module: str) -> None:
    for name, value in list(old.items()):
        function = inspect.unwrap(value.__func__ if isinstance(value, staticmethod | classmethod) else value)
        if isinstance(function, types.FunctionType) and function.__module__ == module and name in new:
            other = new[name]
            other = inspect.unwrap(other.__func__ if isinstance(other, staticmethod | classmethod) else other)
            function.__code__, function.__defaults__ = other.__code__, other.__defaults__
            function.__kwdefaults__ = other.__kwdefaults__
        elif isinstance(value, type) and value.__module__ == module and name in new:
            _replace(vars(value), vars(new[name]), module)


def is_failing(session: pytest.Session, prepare: Callable[[], None], seconds: int = WAIT) -> bool:
    """Whether a collected test fails, or takes more of the processor, in a copy of this process that was prepared."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            signal.alarm(WAIT)
            resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
            quiet = os.open(os.devnull, os.O_WRONLY)
            os.dup2(quiet, 1)
            os.dup2(quiet, 2)
            prepare()
            pytest_runtestloop(session)
            code = int(session.testsfailed > 0)
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    return status != 0


class Hunt:
    """A plugin of pytest that, instead of running the tests, runs them for every change."""

    def __init__(self, mutants: list[Mutant]) -> None:
        self.mutants = mutants
        self.survivors: list[Mutant] = []

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        assert session.items and not is_failing(session, lambda: None), "the tests fail without any change"
        usual = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        limit = max(SECONDS, round(3 * usual))
        for mutant in self.mutants:
            is_noticed = is_failing(session, functools.partial(put_in, mutant), limit)
            if not is_noticed:
                self.survivors.append(mutant)
            print("noticed " if is_noticed else "SURVIVED", mutant, flush=True)  # noqa: T201
        return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", choices=SUBJECTS, help="The file to change.")
    parser.add_argument("--sample", action="store_true", help="Only the changes of the sample.")
    parser.add_argument("--part", type=int, default=0, help="Which part of its changes.")
    parser.add_argument("--parts", type=int, default=1, help="Parts that they are divided into.")
    options = parser.parse_args()
    os.chdir(ROOT)
    changes_of_it = sample_of(options.path) if options.sample else mutants_of(options.path)
    every = [mutant for mutant in changes_of_it if mutant.reason is None]
    hunt = Hunt(every[options.part :: options.parts])
    marked = "slow or not slow" if options.path in ALL_SLOW else "not slow"
    arguments = ["-x", "-q", "-s", "-p", "no:cacheprovider", "-m", marked]
    code = pytest.main([*arguments, *SUBJECTS[options.path]], plugins=[hunt])
    assert code in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED), code
    tried, left = len(hunt.mutants), len(hunt.survivors)
    print(f"{tried - left} of {tried} changes noticed")  # noqa: T201
    return int(left > 0.05 * tried)


if __name__ == "__main__":
    sys.exit(main())
