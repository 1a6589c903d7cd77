"""The recipe of the embedded model's editors: which edits it draws, what training moves, what it writes."""

import json
from dataclasses import replace

import pytest
import torch
from dualedit.baselines import VisEditSettings, open_baseline
from dualedit.data import Probe
from dualedit.evaluation import ask_before, evaluate_batch, evaluate_single
from dualedit.models.architectures import unwrap
from dualedit.models.prompting import Prompter
from dualedit.storage import load_edits
from dualedit.toy.editors import load_editor
from dualedit.toy.model import load_embedded
from dualedit.toy.samples import edit_samples
from dualedit.toy.world import World
from dualedit.training import measure_curve
from dualedit.training.batches import with_answers
from dualedit.training.calibration import with_threshold
from dualedit.training.metrics import read_metrics
from dualedit.training.questions import questions_of
from dualedit.training.recipe import TERMS
from dualedit.tuners import inject_dualedit

from recipes.toy import train_editors, train_visedit
from recipes.toy.train_editors import (
    KEY_DIM,
    SETTINGS,
    FreshEdits,
    calibration_samples,
    held_out_entities,
    train_adapters,
    trained_adapters,
    training_samples,
)

pytestmark = pytest.mark.slow  # as a whole: together they take longer than an inner loop may


@pytest.fixture(scope="module")
def world():
    return World(0)


@pytest.fixture(scope="module")
def samples(world):
    return edit_samples(world, "train", 6, seed=5)


@pytest.fixture
def injected():
    base, processor = load_embedded()
    torch.manual_seed(0)
    return inject_dualedit(base, text_layer=2, vis_layer=3, mid_dim=64, num_heads=4), processor


def _eos(model):
    return unwrap(model).generation_config.eos_token_id


def test_wordings_of_the_test_never_train(samples):
    generator, weights = torch.Generator().manual_seed(0), dict.fromkeys(TERMS, 1.0)
    for sample in samples:
        kept_for_test = {probe.prompt for probe in sample.generality["t_gen"]}
        questions = [q for _ in range(40) for q in questions_of(sample, 0, weights, generator)]
        seen = {q.probe.prompt for q in questions if q.term in TERMS[:3]}
        assert len(seen) > 2
        assert not seen & kept_for_test


def test_calibration_entities_never_train(world):
    held_out = held_out_entities(world)
    assert 0 < len(held_out) < 0.3 * len(world.entities("train"))
    trained = {sample.entity for sample in training_samples(world, 600, 0)}
    assert len(trained) > 200 and not trained & held_out
    assert {s.entity for s in calibration_samples(world, 60, 0, held_out)} <= held_out


def test_answers_follow_the_prompts_in_one_column(samples, injected):
    model, processor = injected
    probes = [Probe(s.request.image, s.request.prompt, s.request.target) for s in samples]
    probes.append(Probe(None, "what is the opposite of hot ?", "cold"))
    inputs = with_answers(Prompter(processor), probes, _eos(model))
    labels = inputs["labels"]
    begins = (labels != -100).int().argmax(1)
    assert (begins == begins[0]).all()
    for row, probe in enumerate(probes):
        answer = labels[row][labels[row] != -100]
        assert answer[-1] == _eos(model)
        assert processor.tokenizer.decode(answer[:-1]) == probe.answer
        assert torch.equal(inputs["input_ids"][row][labels[row] != -100], answer)
    assert ((labels != -100) <= (inputs["attention_mask"] == 1)).all()


def same(first, second):
    """Whether two lists of edits are the same; pictures are drawn anew each time."""
    return [(s.request.prompt, s.request.target, s.entity) for s in first] == [
        (s.request.prompt, s.request.target, s.entity) for s in second
    ]


def test_edits_are_drawn_when_they_are_asked_for_and_never_twice(world, monkeypatch):
    monkeypatch.setattr(train_editors, "CHUNK", 8)
    drawn = []
    real = training_samples
    monkeypatch.setattr(train_editors, "training_samples", lambda *given: drawn.append(given) or real(*given))
    edits = FreshEdits(world, 20, seed=3)
    assert len(edits) == 20 and not drawn
    first = edits[:8]
    assert [given[1:] for given in drawn] == [(8, 3000)] and len(edits[16:]) == 4
    assert [given[1] for given in drawn] == [8, 4]
    assert drawn[0][0] is world and drawn[1][0].seed != world.seed  # every third chunk of a new world
    assert same(edits[:8], first) and not same(edits[8:16], first)
    assert edits.fingerprint != FreshEdits(world, 20, seed=4).fingerprint


def test_training_moves_the_adapters_only_and_learns(world, tmp_path, monkeypatch):
    monkeypatch.setattr(train_editors, "FreshEdits", lambda world, count, seed: training_samples(world, 6, 0))
    recipe = replace(SETTINGS, steps=12, batch_size=6, warmup=2, mid_dim=64, precision="fp32")
    report = train_adapters(world, None, recipe, tmp_path)
    losses = [line["reliability"] for line in read_metrics(tmp_path / "metrics.jsonl")]
    assert len(losses) == 12 and losses[-1] < 0.7 * losses[0]
    assert report["steps"] == 12 and report["loss_change"] > 0 and report["loss_keep"] >= 0
    base, _ = load_embedded()
    loaded = unwrap(load_edits(load_embedded()[0], tmp_path)).state_dict()
    names = {name.replace(".base_layer", "") for name in loaded if "dualedit" not in name}
    assert names == set(base.state_dict())
    for name, value in loaded.items():
        if "dualedit" not in name:
            assert torch.equal(base.state_dict()[name.replace(".base_layer", "")], value), name


def test_the_recipes_run_from_end_to_end(tmp_path, monkeypatch):
    """A few steps of each stage: what is written loads, and its settings are those that were asked for."""
    monkeypatch.setattr(train_editors, "CHUNK", 8)
    train_editors.main(["--out", str(tmp_path), "--editor", "dualedit", "--steps", "2", "--finish", "1",
                        "--batch-size", "4", "--calibration", "3"])  # fmt: skip
    report = json.loads((tmp_path / "editors.json").read_text())["dualedit"]
    assert report["steps"] == 2 and report["finish"]["steps"] == 1 and report["facts"] == 8
    editor = load_editor("dualedit", weights=tmp_path)
    assert editor.model.peft_config["default"].key == "pooled"
    recipe = replace(train_visedit.SETTINGS, steps=1, batch_size=4, warmup=0)
    made = train_visedit.run(tmp_path, None, recipe, 1, start=tmp_path / "adapters")
    assert made["began_with"].startswith("the image half") and made["vis_layer"] == SETTINGS.vis_layer
    assert open_baseline("visedit", *load_embedded(), VisEditSettings(adapters=str(tmp_path / "visedit")))


@pytest.mark.parametrize("together", [False, True])
def test_a_curve_says_what_a_threshold_gives(together, world):
    """Figures read off one pass with the gate open are those of an evaluation with that threshold."""
    editor = load_editor("dualedit")
    samples = edit_samples(world, "train", 5, seed=3)
    before = ask_before(editor, samples, progress=False)
    curve = measure_curve(editor, samples, together=together, progress=False, before=before)
    assert not editor.edits
    measure = evaluate_batch if together else evaluate_single
    # Not so near 1 that the radius is the distance of an edit's own rewording instead.
    for threshold in (0.2, 0.6, 0.9):
        with_threshold(editor, threshold)
        found = measure(editor, samples, "dualedit", progress=False, before=before).row.metrics
        assert curve.figures(lambda point, r=1 - threshold: r) == pytest.approx(found)


def test_trained_adapters_are_taken_whatever_key_they_were_saved_with(tmp_path):
    folder = tmp_path / "last"
    base, _ = load_embedded()
    torch.manual_seed(3)
    saved = inject_dualedit(base, text_layer=1, vis_layer=1, mid_dim=32, num_heads=8)
    saved.save_pretrained(folder)
    taken = trained_adapters(folder, None, (1, 1), 32)
    config = taken.model.peft_config["default"]
    assert (config.key, config.key_dim) == ("pooled", KEY_DIM)
    wanted = {n: p for n, p in saved.named_parameters() if ".dualedit_adapter." in n}
    found = {n: p for n, p in taken.model.named_parameters() if ".dualedit_adapter." in n}
    assert wanted.keys() == found.keys() and all(torch.equal(wanted[n], found[n]) for n in wanted)
    with pytest.raises(ValueError, match=r"layers\.2.*pass a folder of adapters"):
        trained_adapters(folder, None, (1, 2), 32)
