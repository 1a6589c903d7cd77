"""`dualedit calibrate`: a threshold from facts of one's own, in a folder that the other commands take."""

import json

import pytest
import torch
from dualedit.cli import main
from dualedit.datasets import to_jsonl
from dualedit.toy.samples import edit_samples
from dualedit.toy.world import World
from dualedit.training import load_calibration
from tiny_models import LLAVA, random_image, tiny_processor


@pytest.fixture(scope="module")
def embedded(tmp_path_factory):
    """Both editors of the embedded model, calibrated on six training facts."""
    folder = tmp_path_factory.mktemp("embedded")
    for method in ("dualedit", "balancedit"):
        given = ["--method", method, "--edits", "6", "--together", "3", "--out", str(folder / method)]
        assert main(["calibrate", *given]) == 0
    return folder


@pytest.mark.parametrize(
    ("method", "setting", "field"), [("dualedit", "threshold", "threshold"), ("balancedit", "alpha", "alpha")]
)
def test_the_threshold_is_in_the_folder(embedded, method, setting, field):
    folder = embedded / method
    sweep, curve = load_calibration(folder)
    assert sweep.setting == setting
    assert {point.sample for point in curve.points} == set(range(6))
    assert json.loads((folder / "adapter_config.json").read_text())[field] == pytest.approx(sweep.chosen)
    assert sweep.chosen_figures["rel"] >= 80, "training facts of the shipped editors"
    assert (folder / "calibration.png").read_bytes()[1:4] == b"PNG"


def test_edits_go_on_from_there(embedded, tmp_path, capsys):
    sample = edit_samples(World(0), "test", 1, seed=3)[0]
    sample.request.image.save(tmp_path / "logo.png")
    request = [str(tmp_path / "logo.png"), sample.request.prompt]
    given = ["--edits", str(embedded / "balancedit")]
    assert main(["edit", *request, sample.request.target, *given]) == 0
    assert main(["ask", *request, *given]) == 0
    assert capsys.readouterr().out.splitlines()[-2] == sample.request.target


def test_facts_of_a_file_on_a_model_of_ones_own(tmp_path):
    generator = torch.Generator().manual_seed(0)
    LLAVA.build().save_pretrained(tmp_path / "model")
    tiny_processor().save_pretrained(tmp_path / "model")
    rows = []
    for number, target in enumerate(("lenovo", "acer", "red apple")):
        for kind in "abc":
            random_image(generator).save(tmp_path / f"{number}{kind}.png")
        rows.append(
            {
                "image": f"{number}a.png", "prompt": "what brand is this ?", "target": target,
                "other_images": [f"{number}b.png"],
                "keep": [
                    {"image": f"{number}c.png", "prompt": "what color is it ?", "answer": "blue"},
                    {"prompt": "who is the dog ?", "answer": "cat"},
                ],
            }
        )  # fmt: skip
    file = tmp_path / "facts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = ["--model", str(tmp_path / "model"), "--layer", "layers.1.mlp.up_proj"]
    out = tmp_path / "calibrated"
    assert main(["calibrate", "--data", str(file), *model, "--out", str(out)]) == 0
    sweep, curve = load_calibration(out)
    assert sweep.setting == "alpha" and {point.sample for point in curve.points} == {0, 1, 2}
    assert json.loads((out / "adapter_config.json").read_text())["alpha"] == pytest.approx(sweep.chosen)


def test_what_cannot_be_done_is_said_first(embedded, tmp_path, capsys):
    taken = ["--out", str(embedded / "dualedit")]
    for given, told in (
        (taken, "exists: pass another folder, nothing is written over"),
        (["--together", "0"], "--together 0"),
        (["--edits", "-3"], "--edits -3"),
        (["--method", "dualedti"], "choose one of dualedit, balancedit"),
        (["--model", str(tmp_path)], "--data is missing"),
        (["--data", str(tmp_path / "none.jsonl")], "none.jsonl"),
    ):
        before = sorted(tmp_path.iterdir())
        assert main(["calibrate", *([] if given is taken else ["--out", str(tmp_path / "new")]), *given]) == 2
        error = capsys.readouterr().err
        assert told in error and len(error.strip().splitlines()) == 1
        assert sorted(tmp_path.iterdir()) == before


def test_facts_that_ask_nothing_else(tmp_path, capsys):
    samples = edit_samples(World(0), "train", 2, seed=3)
    for sample in samples:
        sample.locality.clear()
    file = tmp_path / "facts.jsonl"
    to_jsonl(samples, file)
    assert main(["calibrate", "--data", str(file), "--out", str(tmp_path / "out")]) == 2
    assert "nothing that must stay" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
