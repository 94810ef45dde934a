"""The documentation of this part: its Python compiles, its imports exist, and what it computes is what it says."""

import ast
import importlib
import re

import pytest

from tests.support.paths import DOCS


BLOCKS = [
    (page, block)
    for page in ("evaluation.md", "voting.md")
    for block in re.findall(r"```python\n(.*?)```", (DOCS / "results" / page).read_text(encoding="utf-8"), re.DOTALL)
]


@pytest.mark.parametrize(("page", "block"), BLOCKS, ids=[f"{p}-{i}" for i, (p, _) in enumerate(BLOCKS)])
def test_blocks_compile_and_import_what_exists(page, block):
    imports = [node for node in ast.walk(ast.parse(block)) if isinstance(node, ast.ImportFrom)]
    assert imports
    for node in imports:
        module = importlib.import_module(node.module)
        assert all(hasattr(module, alias.name) for alias in node.names)


def test_the_phygenbench_example_gives_its_numbers():
    (block,) = [block for _, block in BLOCKS if "phygenbench_aggregate" in block]
    names = {}
    exec(compile(block, "docs/results/evaluation.md", "exec"), names)
    printed = re.search(r"# ([\d.]+), ([\d.]+)", block).groups()
    assert tuple(f"{names[name]:.3f}" for name in ("published", "exact")) == printed
