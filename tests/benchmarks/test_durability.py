"""The durability benchmark at a small scale: its parts run, find nothing, and find what is broken."""

import json
import os

import pytest

from benchmarks.durability import kills, mutations
from benchmarks.durability.__main__ import main


@pytest.mark.slow
@pytest.mark.parametrize(
    ("part", "scale"),
    [
        ("kills", 0.2),
        ("truncations", 1),
        ("processes", 0.34),
        ("mutations", 0.1),
        ("threads", 0.2),
        ("many", 0.05),
    ],
)
def test_a_small_run_finds_no_fault(part, scale, tmp_path):
    file = tmp_path / "figures.json"
    code = main(["--quick", "--only", part, "--scale", str(scale), "--json", str(file)])
    figures = json.loads(file.read_text())["parts"][part]
    assert code == 0 and not figures.get("faults")


def test_kills_that_lose_something_are_seen(monkeypatch):
    """A writer that acknowledges before it saves."""
    from benchmarks.durability import kills as module

    whole = module.save_edits
    last = []

    def lazy(model, folder):  # saves what the call before was to save
        if last:
            whole(*last)
        last[:] = [model, folder]

    def script(model, folder, adapters, done):
        monkeypatch.setattr(module, "save_edits", lazy)
        try:
            return true_script(model, folder, adapters, done)
        finally:
            monkeypatch.setattr(module, "save_edits", whole)

    true_script = module.script
    monkeypatch.setattr(module, "script", lambda *args: (last.clear(), script(*args))[1])
    monkeypatch.setattr(module, "compact_edits", lambda folder: None)
    if not hasattr(os, "fork"):
        pytest.skip("kills are made in forks")
    assert kills.run(3, 0)["faults"]


def test_mutations_that_load_otherwise_are_seen(monkeypatch):
    """A reader that compares no digests."""
    from dualedit.folder import manifest, reading

    monkeypatch.setattr(reading, "check_file", lambda *args, **more: None)
    monkeypatch.setattr(manifest, "sha256_of", lambda path: "0" * 64)
    assert mutations.run(150, 0)["count"]
