"""The notebooks run from the first cell to the last, on the embedded model."""

import os
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "examples"
nbclient = pytest.importorskip("nbclient", reason="the extra test brings nbclient")
nbformat = pytest.importorskip("nbformat", reason="the extra test brings nbformat")
pytest.importorskip("ipykernel", reason="the extra test brings ipykernel")


def test_there_are_some():
    assert {file.name for file in FOLDER.glob("*.ipynb")} == {
        "edit_and_undo.ipynb",
        "evaluate_your_facts.ipynb",
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", ["edit_and_undo", "evaluate_your_facts"])
def test_a_notebook_runs(name, tmp_path, monkeypatch):
    monkeypatch.setenv("DUALEDIT_CACHE", str(tmp_path))  # nothing is fetched there
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(FOLDER.parent / "python"), str(FOLDER.parent)]))
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    assert all(not cell.outputs for cell in notebook.cells if cell.cell_type == "code")  # committed clean
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute(cwd=str(tmp_path))
    printed = "".join(o.get("text", "") for c in notebook.cells for o in c.get("outputs", ()))
    wanted = {"edit_and_undo": "the edit fires", "evaluate_your_facts": "rel             100.0 %"}
    assert wanted[name] in printed
