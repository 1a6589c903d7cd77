"""`dualedit doctor`: what fits, what is missing and what has to be mended, told apart."""

import json
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed

import pytest
from dualedit.cli import doctor, main


def versions(monkeypatch, **changed):
    """Let packages seem to have other versions; None: not installed."""

    def version(name):
        if name in changed and changed[name] is None:
            raise PackageNotFoundError(name)
        return changed.get(name) or installed(name)

    monkeypatch.setattr(doctor, "version", version)


def rows(capsys):
    code = main(["doctor", "--json"])
    return code, {row["what"]: row for row in json.loads(capsys.readouterr().out)}


def test_a_sound_installation(capsys):
    code, found = rows(capsys)
    assert code == 0 and all(row["state"] != "fault" for row in found.values())
    assert found["torch"]["text"] == installed("torch")
    assert main(["doctor"]) == 0
    assert "FAULT" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("package", "there", "words"),
    [("torch", "2.3.0", "2.3.0, but torch>=2.11 is needed"), ("peft", None, 'pip install "peft>=0.21"')],
)
def test_what_does_not_fit_is_a_fault(package, there, words, monkeypatch, capsys):
    versions(monkeypatch, **{package: there})
    code, found = rows(capsys)
    assert code == 1 and found[package]["state"] == "fault" and words in found[package]["text"]
    assert [row["what"] for row in found.values() if row["state"] == "fault"] == [package]


def test_a_torchvision_of_another_torch(monkeypatch, capsys):
    versions(monkeypatch, torchvision="0.20.0")
    asked = doctor.requires
    monkeypatch.setattr(
        doctor, "requires", lambda name: ["torch==2.5.0"] if name == "torchvision" else asked(name)
    )
    code, found = rows(capsys)
    assert code == 1 and "built for torch==2.5.0" in found["torchvision"]["text"]


def test_an_extra_that_is_missing_is_a_note(monkeypatch, capsys):
    versions(monkeypatch, **{"scikit-learn": None})
    code, found = rows(capsys)
    assert code == 0 and found["extra toy"]["state"] == "note"
    assert "scikit-learn missing" in found["extra toy"]["text"]
