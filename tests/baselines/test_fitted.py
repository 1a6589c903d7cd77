"""Baselines that are fitted first: training that stops and goes on, files, each method's own behaviour."""

import json
import warnings

import pytest
import torch
from dualedit import EditRequest, EditSample
from dualedit.baselines import (
    FITTED,
    KESettings,
    LiveEditSettings,
    LTESettings,
    MENDSettings,
    RECIPESettings,
    SERACSettings,
    TPatcherSettings,
    TrainingSettings,
    WISESettings,
    fit_baseline,
    open_baseline,
    saved_settings,
    trained,
)
from dualedit.baselines.lessons import Passed, rows_of
from dualedit.models.prompting import open_questions
from safetensors.torch import load_file
from tiny_baselines import (
    TRAINING,
    TinyQwenProcessor,
    always_routed,
    fitted_folders,
    network_settings,
    training_edits,
)
from tiny_models import BLIP2, LLAVA, QWEN, random_image, sharp, tiny_processor

pytestmark = pytest.mark.slow  # as a whole: together they take longer than an inner loop may

BRAND = "what brand is this computer ?"
LEARNING = tuple(name for name in FITTED if name not in ("tp", "wise"))


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The edit did not take")
        yield


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    return fitted_folders(sharp(LLAVA), tiny_processor(), tmp_path_factory.mktemp("networks"))


def opened(name, networks, **more):
    settings = network_settings(name, networks[name])
    return open_baseline(name, sharp(LLAVA), tiny_processor(), settings)


def fact(image, target="lenovo"):
    return EditSample(EditRequest(image, BRAND, target), {}, {})


@torch.no_grad()
def logits(method, questions):
    asked = open_questions(method.asked(questions))
    with method._applied(questions):
        return method.model(**method.prompter.inputs(asked), use_cache=False).logits


# ---------------------------------------------------------------------- training


@pytest.mark.parametrize("name", LEARNING)
def test_a_stopped_training_ends_as_one_that_was_not_stopped(name, networks, tmp_path, monkeypatch):
    steps, kind = [], type(opened(name, networks))
    loss = kind.training_loss

    def stop(self, *arguments):
        steps.append(1)
        if len(steps) == 3:
            raise KeyboardInterrupt
        return loss(self, *arguments)

    def fit():
        return fit_baseline(name, sharp(LLAVA), tiny_processor(), training_edits(6), tmp_path / name,
                            network_settings(name), TRAINING, progress=False)  # fmt: skip

    monkeypatch.setattr(kind, "training_loss", stop)
    with pytest.raises(KeyboardInterrupt):
        fit()
    assert len(steps) == 3
    with pytest.raises(ValueError, match="was stopped before its end. Call .*fit_baseline"):
        open_baseline(name, sharp(LLAVA), tiny_processor(), network_settings(name, tmp_path / name))
    fit()
    assert len(steps) == 4  # the one that was stopped, again
    folders = (tmp_path, networks[name].parent)
    found, wanted = (load_file(folder / name / trained.NETWORK) for folder in folders)
    assert all(torch.equal(found[key], wanted[key]) for key in wanted) and set(found) == set(wanted)
    assert not (tmp_path / name / trained.CHECKPOINT).exists()
    fit()
    assert len(steps) == 4  # a finished one is left alone


@pytest.mark.parametrize("name", LEARNING)
def test_training_changes_every_part_of_the_network(name, networks):
    fresh = trained_kind(name)(sharp(LLAVA), tiny_processor(), None, network_settings(name))
    found = dict(opened(name, networks).network.named_parameters())
    same = [key for key, weight in fresh.network.named_parameters() if torch.equal(weight, found[key])]
    # What moves nothing at the start moves only when others have: the down halves of LoRA, MEND's V.
    assert len(same) <= len(found) // 2, same
    report = json.loads((networks[name] / trained.REPORT).read_text())
    assert report["method"] == name and report["facts"] == 6 and report["seconds"] > 0
    assert report["parameters"] == sum(weight.numel() for weight in found.values())
    assert opened(name, networks).training_seconds == report["seconds"]


def trained_kind(name):
    from dualedit.baselines import _KINDS

    return _KINDS[name][0]


def test_another_training_into_the_same_folder_is_refused(networks):
    more = TrainingSettings(steps=4, batch_size=3)
    with pytest.raises(ValueError, match="holds a training with other arguments .*'steps': 3.*now"):
        fit_baseline("mend", sharp(LLAVA), tiny_processor(), training_edits(6), networks["mend"],
                     network_settings("mend"), more)  # fmt: skip
    with pytest.raises(ValueError, match="samples has 1 edits: pass at least batch_size=3"):
        fit_baseline("mend", sharp(LLAVA), tiny_processor(), training_edits(1), networks["mend"] / "other",
                     network_settings("mend"), TRAINING)  # fmt: skip
    with pytest.raises(ValueError, match="'grace' has nothing to fit. Those that have are tp"):
        fit_baseline("grace", sharp(LLAVA), tiny_processor(), training_edits(6), networks["mend"])


def test_a_network_of_another_method_model_or_shape_is_refused(networks, tmp_path):
    with pytest.raises(ValueError, match="was trained for 'mend', not for 'ke'"):
        open_baseline("ke", sharp(LLAVA), tiny_processor(), KESettings(network=networks["mend"]))
    with pytest.raises(ValueError, match="was trained with layers=2, now 3"):
        settings = MENDSettings(network=networks["mend"], layers=3, rank=8)
        open_baseline("mend", sharp(LLAVA), tiny_processor(), settings)
    with pytest.raises(ValueError, match="holds no trained 'mend': train it with"):
        open_baseline("mend", sharp(LLAVA), tiny_processor(), MENDSettings(network=tmp_path))
    with pytest.raises(ValueError, match="fingerprint|another model|other model|base model"):
        other = LLAVA.build(seed=1)
        open_baseline("mend", other, tiny_processor(), network_settings("mend", networks["mend"]))


@pytest.mark.parametrize("name", FITTED)
def test_what_a_folder_was_fitted_with_is_read_back(name, networks):
    settings, own = saved_settings(name, networks[name]), network_settings(name, networks[name])
    assert all(getattr(settings, key) == getattr(own, key) for key in own.shaping)
    open_baseline(name, sharp(LLAVA), tiny_processor(), settings)


@pytest.mark.parametrize("name", FITTED)
def test_half_precision_files_are_read(name, networks, tmp_path):
    fit_baseline(name, sharp(LLAVA), tiny_processor(), training_edits(6), tmp_path, network_settings(name),
                 TRAINING, half=True, progress=False)  # fmt: skip
    half, whole = (load_file(folder / trained.NETWORK) for folder in (tmp_path, networks[name]))
    assert all(torch.equal(half[key], whole[key].half()) for key in whole)
    method = open_baseline(name, sharp(LLAVA), tiny_processor(), network_settings(name, tmp_path))
    assert {weight.dtype for weight in method.network.state_dict().values()} == {torch.float32}


# ---------------------------------------------------------------------- any model


@pytest.mark.parametrize("name", FITTED)
def test_on_a_tiny_qwen(name, tmp_path, generator, monkeypatch):
    always_routed(monkeypatch)
    method = fit_baseline(name, sharp(QWEN), TinyQwenProcessor(), training_edits(6), tmp_path,
                          network_settings(name), TRAINING, progress=False)  # fmt: skip
    questions = [(random_image(generator), BRAND), (None, "what color is it ?")]
    before, said = logits(method, questions), method.answers(questions, 4)
    method.edit(fact(questions[0][0]))
    assert not torch.equal(logits(method, questions), before)
    with method.unedited():
        assert torch.equal(logits(method, questions), before) and method.answers(questions, 4) == said
    assert len(method.answers(questions, 4)) == 2
    assert [len(best) for best, _ in method.predictions(questions, ["lenovo", "red"])] == [1, 1]
    method.reset()
    assert torch.equal(logits(method, questions), before)


def test_layers_that_a_method_cannot_take_are_named():
    model, processor = sharp(LLAVA), tiny_processor()

    def fit(name, settings):
        fit_baseline(name, model, processor, training_edits(6), "unused", settings, TRAINING)

    with pytest.raises(ValueError, match="is a LlamaMLP: this method needs a torch.nn.Linear"):
        fit("mend", MENDSettings(modules=("language_model.layers.1.mlp",)))
    with pytest.raises(ValueError, match="is not in the decoder"):
        fit("wise", WISESettings(module="multi_modal_projector.linear_1"))
    with pytest.raises(ValueError, match="module='layers.9.mlp.down_proj': no such module"):
        fit("wise", WISESettings(module="layers.9.mlp.down_proj"))
    with pytest.raises(ValueError, match="layer=3 is the last of 4: .* Pass a lower one"):
        fit("liveedit", LiveEditSettings(layer=3, width=16))
    with pytest.raises(ValueError, match="layer=9"):
        fit("serac", SERACSettings(layer=9))
    with pytest.raises(ValueError, match="feed-forward part is no module of its own, fc2"):
        fit_baseline("tp", BLIP2.build(), processor, training_edits(6), "unused", TPatcherSettings())


def test_tpatcher_needs_states_in_and_states_out(networks, generator, tmp_path):
    settings = TPatcherSettings(module="layers.3.mlp.down_proj", noted=16)
    with pytest.raises((ValueError, RuntimeError)):  # its inputs are wider than the states
        method = fit_baseline("tp", sharp(LLAVA), tiny_processor(), training_edits(6), tmp_path, settings,
                              TRAINING, progress=False)  # fmt: skip
        method.edit(fact(random_image(generator)))


def test_liveedit_needs_a_picture(networks, tmp_path):
    with pytest.raises(ValueError, match="image=None: LiveEdit finds an edit by its picture"):
        opened("liveedit", networks).edit(fact(None))
    bare = [*training_edits(5), fact(None)]
    with pytest.raises(ValueError, match=r"samples\[5\] has image=None"):
        fit_baseline("liveedit", sharp(LLAVA), tiny_processor(), bare, tmp_path, network_settings("liveedit"),
                     TRAINING)  # fmt: skip


# ---------------------------------------------------------------------- each method's own


def test_tpatcher_opens_at_its_own_query_and_stays_shut_at_the_noted_ones(networks, generator):
    method = opened("tp", networks)
    image = random_image(generator)
    method.edit(fact(image))
    (keys, bias, values), noted = method._neurons[0], method.network.queries
    assert len(keys) == 2 and values.abs().sum() > 0  # a neuron for the word, and one for the end
    opened_at = (noted @ keys.T + bias).relu()
    assert (opened_at == 0).float().mean() > 0.9
    first = tuple(part.clone() for part in method._neurons[0])
    method.edit(fact(random_image(generator), "dell"))
    assert all(torch.equal(a, b) for a, b in zip(first, method._neurons[0], strict=True))


def test_wise_edits_of_a_shard_change_its_share_alone_and_full_shards_are_merged(networks, generator):
    import dataclasses

    settings = dataclasses.replace(
        network_settings("wise", networks["wise"]), mask_ratio=0.3, shard_edits=1, max_steps=5
    )
    method = open_baseline("wise", sharp(LLAVA), tiny_processor(), settings)
    method.edit(fact(random_image(generator)))
    (side,) = method._sides
    changed = side.change != 0
    assert 0.05 < changed.float().mean() < 0.35 and not (changed & (side.mask == 0)).any()
    method.edit(fact(random_image(generator), "dell"))
    (merged,) = method._sides
    assert merged.mask is None and len(merged.least) == 2 and merged.change.abs().sum() > 0
    method.edit(fact(random_image(generator), "apple"))
    assert len(method._sides) == 2  # the merged one, and the next shard


def test_wise_leaves_the_rows_of_other_questions_bit_for_bit(networks, generator):
    method = opened("wise", networks)
    questions = [(random_image(generator), BRAND), (None, "what color is it ?")]
    before = logits(method, questions)
    method.edit(fact(questions[0][0]))
    method._sides[0].least = [1e9]  # above everything
    assert torch.equal(logits(method, questions), before)


def test_serac_answers_by_its_own_model_in_scope_and_by_the_base_model_elsewhere(
    networks, generator, monkeypatch
):
    method = opened("serac", networks)
    questions = [(random_image(generator), BRAND), (random_image(generator), "what color is it ?")]
    before = logits(method, questions)
    method.edit(fact(questions[0][0]))
    monkeypatch.setattr(method, "_routes", lambda asked: (torch.tensor([0, 0]), torch.tensor([0.9, 0.1])))
    after = logits(method, questions)
    assert torch.equal(after[1], before[1]) and not torch.equal(after[0, -1], before[0, -1])
    # Step by step with a cache, as all at once.
    answers = method.answers(questions, 4)
    (best, ids), _ = method.predictions(questions, [answers[0] or "red", "red"])
    if answers[0]:
        assert best.tolist() == ids.tolist()
    with method.unedited():
        assert method.answers(questions, 4)[1] == answers[1]


def test_recipe_puts_its_prompt_in_front_and_a_refused_question_is_asked_as_before(
    networks, generator, monkeypatch
):
    method = opened("recipe", networks)
    questions = [(random_image(generator), BRAND), (random_image(generator), "what color is it ?")]
    before, said = logits(method, questions), method.answers(questions, 4)
    method.edit(fact(questions[0][0]))
    monkeypatch.setattr(method, "_routes", lambda asked: (torch.tensor([0, 0]), torch.tensor([-1.0, 1.0])))
    after = logits(method, questions)
    assert after.shape[1] == before.shape[1] + 2  # the prompt's tokens
    # A row without a prompt: the places are padding, and move nothing but the last bits.
    assert torch.allclose(after[1, -1], before[1, -1], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(after[0, -1], before[0, -1], rtol=1e-2, atol=1e-2)
    assert method.answers(questions, 4)[1] == said[1]
    forced = method.predictions(questions, ["lenovo", "red"])
    assert [len(best) for best, _ in forced] == [1, 1]
    monkeypatch.setattr(method, "_routes", lambda asked: (torch.tensor([0, 0]), torch.tensor([1.0, 1.0])))
    assert torch.equal(logits(method, questions), before)


def test_lte_tells_only_what_is_near_and_follows_notes_with_its_adapters(networks, generator):
    import dataclasses

    method = opened("lte", networks)
    image = random_image(generator)
    questions = [(image, BRAND), (random_image(generator), "who made it ?")]
    method.edit(fact(image))
    near, far = (why.distance for why in method.explain(questions))
    assert near < 1e-3 < far
    method.settings = dataclasses.replace(method.settings, radius=far / 2)
    asked = method.asked(questions)
    assert asked[0][1] == f"[Updated Information] {BRAND} lenovo\n[Query] {BRAND}"
    assert asked[1] == questions[1]
    assert [why.fired for why in method.explain(questions)] == [True, False]


def test_the_layers_above_on_their_own_are_the_model():
    model = sharp(LLAVA)
    samples = training_edits(2)
    from dualedit.models.prompting import Prompter

    rows = rows_of(model, Prompter(tiny_processor()), [(s.request.image, s.request.prompt) for s in samples],
                   [s.request.target for s in samples])  # fmt: skip
    assert rows.wanted.tolist()[1::2] == [2, 2]  # each answer ends with the end token
    passed = Passed(model, rows, 2, check=True)
    assert torch.allclose(passed.logits(), passed.before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "argument", "value"),
    [
        (TPatcherSettings, "memory_weight", -1.0),
        (TPatcherSettings, "noted", 0),
        (WISESettings, "routed_by", "first"),
        (WISESettings, "mask_ratio", 0.0),
        (WISESettings, "shards", 0),
        (MENDSettings, "modules", ()),
        (MENDSettings, "edit_rate", 0.0),
        (KESettings, "margin", 0.0),
        (LiveEditSettings, "heads", 7),
        (SERACSettings, "longest", 0),
        (RECIPESettings, "tokens", 0),
        (LTESettings, "fact", "New Fact:"),
        (LTESettings, "radius", 0.0),
        (TrainingSettings, "batch_size", 1),
        (TrainingSettings, "learning_rate", 0.0),
    ],
)
def test_bad_settings_are_refused(kind, argument, value):
    with pytest.raises(ValueError, match=f"^{argument}="):
        kind(**{argument: value})
