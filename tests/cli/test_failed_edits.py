"""`dualedit edit` of an answer that the model does not give: exit code, what is said, and what is saved."""

import pytest
from dualedit import checking
from dualedit.cli import main

QUESTION = "who founded this brand?"


@pytest.fixture(scope="module")
def logo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    assert main(["sample", str(folder)]) == 0
    return str(folder / "logo.png")


@pytest.fixture
def deaf(monkeypatch):
    """A model that answers the same whatever it is told, while it is asked back."""
    monkeypatch.setattr(checking, "generate_answers", lambda *_, **__: ["as ever"])


def test_it_is_not_saved_and_the_exit_code_is_1(logo, deaf, tmp_path, capsys):
    folder = tmp_path / "edits"
    edit = ["edit", logo, QUESTION, "maria", "-e", str(folder), "--fallback", "none"]
    assert main(edit) == 1
    told = capsys.readouterr()
    assert "after" not in told.out and not folder.exists()
    [line] = told.err.splitlines()
    assert line.startswith("dualedit: The edit is not stored: asked 'who founded this brand?', the model")
    assert "answers 'as ever', not 'maria'" in line and "Tried: DualEdit, " in line


def test_it_is_saved_with_a_mark_when_it_is_to_be_kept(logo, deaf, tmp_path, capsys):
    folder = str(tmp_path / "edits")
    edit = ["edit", logo, QUESTION, "maria", "-e", folder, "--fallback", "none", "--keep-failed"]
    assert main(edit) == 1
    assert "FAILED" in capsys.readouterr().out
    assert main(["list", "-e", folder]) == 0
    assert "FAILED, answers 'as ever'" in capsys.readouterr().out


def test_what_was_saved_before_stays_as_it_is(logo, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "edits"
    assert main(["edit", logo, QUESTION, "maria", "-e", str(folder)]) == 0
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}

    def stop(*_, **__):
        raise KeyboardInterrupt

    for answer, code in ((lambda *_, **__: ["as ever"], 1), (stop, 130)):
        monkeypatch.setattr(checking, "generate_answers", answer)
        assert main(["edit", logo, QUESTION, "leon", "-e", str(folder), "--fallback", "none"]) == code
        assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before


def test_edits_of_the_second_adapter_are_listed_and_removed(logo, tmp_path, capsys):
    folder = tmp_path / "edits"
    assert main(["edit", logo, QUESTION, "lenovo", "-e", str(folder)]) == 0
    assert "DualEdit, 50 steps" in capsys.readouterr().out
    other = "which country does this brand come from?"
    assert main(["edit", logo, other, "peru", "-e", str(folder)]) == 0
    capsys.readouterr()
    assert main(["list", "-e", str(folder)]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    shown = [(row[0], row[-2], row[-1]) for row in rows if row[0].isdigit() and row[-1] == "ok"]
    assert shown == [("1", "BalancEdit", "ok"), ("2", "DualEdit", "ok")]
    assert main(["ask", logo, QUESTION, "-e", str(folder)]) == 0
    assert capsys.readouterr().out.startswith("lenovo\n(edit 1 answers")
    assert main(["remove", "1", "-e", str(folder)]) == 0
    assert main(["remove", "3", "-e", str(folder)]) == 2
    assert "no edit 3 in" in capsys.readouterr().err
    assert main(["list", "-e", str(folder)]) == 0
    assert "lenovo" not in capsys.readouterr().out


def test_an_unknown_fallback_is_refused(logo, tmp_path, capsys):
    assert main(["edit", logo, QUESTION, "maria", "-e", str(tmp_path / "e"), "--fallback", "lora"]) == 2
    assert "--fallback lora: choose one of balancedit, none" in capsys.readouterr().err
