"""`dualedit analyze`: the embedded model, a folder with facts of one's own, and what is refused."""

import json

import pytest
from dualedit.cli import main
from dualedit.datasets import to_jsonl
from dualedit.toy.samples import edit_samples
from dualedit.toy.world import World
from tiny_hub_models import make_llava

FEW = ["--facts", "4", "--layers", "2"]


@pytest.fixture(scope="module")
def facts(tmp_path_factory):
    """Four facts in a file."""
    return to_jsonl(edit_samples(World(0), "train", 4), tmp_path_factory.mktemp("facts") / "facts.jsonl")


def test_a_folder_with_facts(tmp_path, facts, capsys):
    model = make_llava(tmp_path / "model", 0)
    files = [tmp_path / name for name in ("found.json", "page.html", "records.jsonl")]
    arguments = ["analyze", "--model", str(model), "--data", str(facts), *FEW]
    arguments += ["--json", str(files[0]), "--page", str(files[1]), "--records", str(files[2])]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "inject_dualedit(model, text_layer=" in out and "inject_balancedit(model, layer=" in out
    found = json.loads(files[0].read_text())
    assert found["model"]["decoder_layers"] == 24 and found["layers"] == [0, 23]
    assert "<svg" in files[1].read_text()
    records = files[2].read_text()
    assert main(arguments) == 0  # all of it is known
    assert files[2].read_text() == records
    assert main([*arguments, "--seed", "3"]) == 2
    assert "--seed 0, now 3" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "somewhere"], "pass --data FILE"),
        (["--facts", "1"], "--facts takes a number from 4 up"),
        (["--grid", "a,b"], "--grid a,b: pass whole numbers"),
        (["--json", "."], "--json . is a folder"),
        (["--model", "somewhere", "--data", "nothing.jsonl"], "nothing.jsonl"),
    ],
)
def test_what_is_refused(arguments, said, capsys):
    assert main(["analyze", *arguments]) == 2
    assert said in capsys.readouterr().err
