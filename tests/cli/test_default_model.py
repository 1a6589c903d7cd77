"""Which model a command is about where `--model` is left out."""

import json
from pathlib import Path

import pytest
from dualedit import smol
from dualedit.cli.loading import model_for, own_model

SMOL = Path("smol")


@pytest.fixture
def fetched(monkeypatch):
    monkeypatch.setattr(smol, "is_fetched", lambda: True)


def saved(folder: Path, base: str) -> Path:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "BALANCEDIT", "base_model_name_or_path": base})
    )
    return folder


def test_smol_where_it_is_fetched_and_nothing_is_saved(tmp_path, fetched):
    assert model_for(tmp_path / "edits", None) == SMOL


def test_the_embedded_model_where_nothing_is_fetched(tmp_path):
    assert model_for(tmp_path / "edits", None) is None


@pytest.mark.parametrize("base, expected", [("smol", SMOL), ("dualedit-embedded", None)])
def test_saved_edits_bring_their_model(base, expected, tmp_path, fetched):
    assert model_for(saved(tmp_path / "edits", base), None) == expected


@pytest.mark.parametrize("name", ["toy", "embedded"])
def test_the_embedded_model_has_names(name, tmp_path, fetched, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert model_for(tmp_path / "edits", Path(name)) is None
    Path(name).mkdir()
    Path(name, "config.json").write_text("{}")
    assert own_model(Path(name)) == Path(name)  # a folder of that name goes first


def test_what_the_user_names_is_taken(tmp_path, fetched):
    folder = saved(tmp_path / "edits", "smol")
    assert model_for(folder, Path("llava")) == Path("llava")
