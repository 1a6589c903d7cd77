"""The model hub, by a stand-in on this machine: edits pushed and loaded, models by name and revision."""

import os
import subprocess
import sys

import pytest
from dualedit.cli import main
from dualedit.toy.model import WEIGHTS
from hub_standin import Hub


@pytest.fixture
def hub():
    made = Hub()
    yield made
    made.close()


def run(hub, tmp_path, *command, **more):
    """A process with nothing but the stand-in to reach."""
    set_here = {"HF_ENDPOINT": hub.address, "HF_TOKEN": "none", "HF_HOME": str(tmp_path / "hub"), **more}
    dropped = ("HF_HUB_OFFLINE", "DUALEDIT_CACHE")
    env = {name: value for name, value in os.environ.items() if name not in dropped} | set_here
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *command], env=env, capture_output=True, text=True, timeout=300
    )
    return done.returncode, done.stdout, done.stderr


PUSH = """
import sys

from dualedit import Editor, save_edits
from dualedit.toy.editors import load_editor
from dualedit.toy.model import load_embedded
from dualedit.toy.pictures import sample_pictures
from huggingface_hub import ModelCard
from peft import PeftModel

editor, sample = load_editor(), sample_pictures()[0]
question = sample.questions[0][0]
editor.edit(sample.image, question, "norway")
save_edits(editor.model, sys.argv[1])
editor.model.push_to_hub("me/corrections")
ModelCard.load(sys.argv[1] + "/README.md").push_to_hub("me/corrections")
base, processor = load_embedded()
print(Editor(PeftModel.from_pretrained(base, "me/corrections"), processor).answer(sample.image, question))
"""


@pytest.mark.slow
def test_edits_are_pushed_and_loaded_by_name(hub, tmp_path):
    code, out, error = run(hub, tmp_path, "-c", PUSH, str(tmp_path / "edits"))
    assert code == 0, error
    assert out.splitlines()[-1] == "norway"
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= set(
        hub.files["me/corrections"]
    )
    assert b"with 1 stored edit\n" in hub.files["me/corrections"]["README.md"]


@pytest.mark.slow
def test_a_model_by_name_and_revision(hub, tmp_path):
    hub.files["me/toy"] = {f.name: f.read_bytes() for f in WEIGHTS.iterdir() if f.is_file()}
    ask = ("-m", "dualedit.cli", "ask", "-", "4 plus 5 is what?", "-e", str(tmp_path / "none"), "--model")
    code, out, error = run(hub, tmp_path, *ask, "me/toy@v1")
    assert (code, out.splitlines()[0]) == (0, "9"), error
    assert "GET /api/models/me/toy/revision/v1" in hub.asked
    asked = len(hub.asked)
    code, out, error = run(hub, tmp_path, *ask, "me/toy@v1", HF_HUB_OFFLINE="1")  # from the cache
    assert (code, out.splitlines()[0], len(hub.asked)) == (0, "9", asked), error


def test_offline_it_is_said_plainly(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("dualedit.cli.terminal._WISHED", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert main(["layers", "me/none@v1"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(
        "dualedit: MODEL me/none@v1 is no folder, and the model hub's me/none cannot be fetched"
    )
    assert error.count("\n") == 1
