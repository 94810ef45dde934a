"""The notebooks run from top to bottom, and are kept without output."""

import os

import nbformat
import pytest

from tests.support.paths import EXAMPLES


NOTEBOOKS = sorted((EXAMPLES / "notebooks").glob("*.ipynb"))
SMALLER = "NUM_GROUPS, MAX_STEPS, NUM_PROMPTS = 2, 3, 2"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebook_is_valid_and_without_output(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert not cell.outputs and cell.execution_count is None


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebook_runs(path, tmp_path, monkeypatch):
    from nbclient import NotebookClient

    monkeypatch.setitem(os.environ, "HF_HOME", str(tmp_path / "home"))
    notebook = nbformat.read(path, as_version=4)
    (parameters,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    parameters.source = SMALLER
    NotebookClient(notebook, timeout=280, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert (tmp_path / "notebook" / "report.html").is_file()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 4
    assert any("PhyGDPO vs base" in output.get("text", "") for output in outputs)
