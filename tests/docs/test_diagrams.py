"""Diagrams are pictures that were rendered from the sources beside them, as those are now."""

import importlib.util

import pytest

from tests.support.paths import DOCS


SOURCES = sorted((DOCS / "assets").glob("*.mmd"))


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_a_diagram_is_of_its_source(source):
    specification = importlib.util.spec_from_file_location("render_diagrams", DOCS / "assets" / "render_diagrams.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    picture = source.with_suffix(".svg").read_text(encoding="utf-8")
    assert picture.endswith(f"<!-- source {module.source_hash(source)} -->\n")
    assert any(source.with_suffix(".svg").name in page.read_text("utf-8") for page in DOCS.rglob("*.md"))
