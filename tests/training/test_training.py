"""Training the adapters, on the embedded model: what a batch holds, what moves, what stays."""

import pytest
import torch
from dualedit.data import Probe
from dualedit.editor import Editor
from dualedit.evaluation import ask_before, evaluate_batch, evaluate_single
from dualedit.models.architectures import unwrap
from dualedit.models.prompting import Prompter
from dualedit.runtime.context import bound
from dualedit.toy.editors import load_editor
from dualedit.toy.model import load_embedded
from dualedit.toy.samples import edit_samples
from dualedit.toy.world import World
from dualedit.training import TrainSettings, measure_curve, train_adapters
from dualedit.training.calibration import with_threshold
from dualedit.training.dualedit import losses, make_batch, teacher_forced, train_step, training_probes
from dualedit.tuners import inject_balancedit, inject_dualedit
from dualedit.tuners.adapter import active_adapter

from recipes.toy.adapter_pool import Pool
from recipes.toy.train_editors import (
    KEY_DIM,
    calibration_samples,
    held_out_entities,
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
    generator = torch.Generator().manual_seed(0)
    for sample in samples:
        kept_for_test = {probe.prompt for probe in sample.generality["t_gen"]}
        seen = {p.prompt for _ in range(40) for p in training_probes(sample, generator)[0]}
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
    inputs = teacher_forced(Prompter(processor), probes, _eos(model))
    labels = inputs["labels"]
    begins = (labels != -100).int().argmax(1)
    assert (begins == begins[0]).all()
    for row, probe in enumerate(probes):
        answer = labels[row][labels[row] != -100]
        assert answer[-1] == _eos(model)
        assert processor.tokenizer.decode(answer[:-1]) == probe.answer
        assert torch.equal(inputs["input_ids"][row][labels[row] != -100], answer)
    assert ((labels != -100) <= (inputs["attention_mask"] == 1)).all()


def test_identity_adapters_lose_what_the_base_loses(samples, injected):
    model, processor = injected
    adapter = active_adapter(model)
    name = adapter.name
    edits, batch = make_batch(Prompter(processor), samples, _eos(model), torch.Generator().manual_seed(1))
    change, keep = train_step(model, active_adapter(model).layers, name, edits, batch)
    assert float(keep.detach()) == pytest.approx(0, abs=1e-5)
    call = {k: v for k, v in batch.inputs.items() if k != "labels"}
    base = unwrap(model)
    with torch.no_grad(), bound(base, batch.route, {}):
        logits = base(**call).logits
    expected, _ = losses(logits, logits[batch.keep][:, :-1], batch)
    assert float(change.detach()) == pytest.approx(float(expected), rel=1e-4)


def test_questions_kept_above_the_frozen_layers_lose_the_same(samples, injected):
    model, processor = injected
    adapter = active_adapter(model)
    name, layers = adapter.name, adapter.layers
    for layer in layers.values():
        for adapter in layer.dualedit_adapter[name].values():
            torch.nn.init.normal_(adapter.o_proj.weight, std=0.3)
    pool = Pool(model, Prompter(processor), layers, samples, seed=9)
    edits, batch = make_batch(Prompter(processor), samples, _eos(model), torch.Generator().manual_seed(9))
    expected = train_step(model, layers, name, edits, batch)
    found = pool.losses(name, torch.arange(len(samples)))
    assert float(found[0].detach()) == pytest.approx(float(expected[0].detach()), rel=1e-3)
    assert float(found[1].detach()) == pytest.approx(float(expected[1].detach()), rel=1e-3)


def test_training_moves_the_adapters_only_and_learns(samples, injected):
    model, processor = injected
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    settings = TrainSettings(steps=12, batch_size=6, learning_rate=5e-3, warmup=2, locality_weight=0.1)
    history = train_adapters(model, Prompter(processor), lambda step: samples, settings)
    assert history[-1][0] < 0.7 * history[0][0]
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != ("dualedit_adapter" in name), name


def test_refuses_stored_edits_and_other_adapters(samples, injected):
    model, processor = injected
    editor = Editor(model, processor)
    request = samples[0].request
    editor.edit(request.image, request.prompt, request.target)
    with pytest.raises(ValueError, match="holds 1 edits"):
        train_adapters(model, Prompter(processor), lambda step: samples, TrainSettings(steps=1))
    other = inject_balancedit(load_embedded()[0], layer="layers.5.mlp.up_proj")
    with pytest.raises(ValueError, match="BalancEditConfig"):
        train_adapters(other, Prompter(processor), lambda step: samples, TrainSettings(steps=1))


@pytest.mark.parametrize("together", [False, True])
def test_a_curve_foretells_what_a_threshold_gives(together, world):
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
