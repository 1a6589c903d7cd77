"""`dualedit eval --benchmark pictures` and `--model smol`: what is refused, in one line with the remedy."""

import pytest
from dualedit.cli import main

EVAL = ["eval", "--benchmark", "pictures"]


@pytest.mark.parametrize(
    "arguments, told",
    [
        (EVAL, "pass --model smol"),
        (["eval", "--family", "flags"], "--benchmark pictures"),
        (["eval", "--unseen"], "--benchmark pictures"),
        (["eval", "--model", "smol"], "about the embedded model"),
        ([*EVAL, "--model", "smol", "--family", "cars"], "choose from flags, animals"),
        ([*EVAL, "--model", "smol", "--methods", "dualedit"], "dualedit fetch smol"),
        ([*EVAL, "--model", "smol"], "dualedit fetch smol"),
        (["layers", "smol"], "dualedit fetch smol"),
        (["ask", "-", "What is 3 plus 4?", "--model", "smol"], "dualedit fetch smol"),
        (["edit", "-", "What is 3 plus 4?", "8", "--model", "smol"], "dualedit fetch smol"),
    ],
)
def test_what_cannot_be_done_is_one_line(arguments, told, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DUALEDIT_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err.strip()
    assert told in error and len(error.splitlines()) == 1, error


def test_a_folder_called_smol_goes_first(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smol").mkdir()
    (tmp_path / "smol" / "config.json").write_text("{}")
    assert main(["layers", "smol"]) == 2
    assert "does not describe a model" in capsys.readouterr().err
