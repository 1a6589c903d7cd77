"""The baselines: what they store, that nothing of it stays, and that their edits take."""

import dataclasses
import warnings

import pytest
import torch
from dualedit import EditRequest, EditSample, Probe, inject_dualedit, save_edits
from dualedit.baselines import (
    BASELINES,
    FITTED,
    FineTuneSettings,
    GRACESettings,
    IKESettings,
    LoRASettings,
    RetrievalSettings,
    VisEditSettings,
    open_baseline,
)
from dualedit.baselines.finetune import vision_layers
from dualedit.evaluation import Method
from dualedit.evaluation.forcing import forced_batch, forced_predictions
from dualedit.models.prompting import open_questions
from dualedit.toy.baselines import baseline_settings, load_baseline
from dualedit.toy.samples import edit_samples
from dualedit.toy.world import World
from tiny_baselines import FIT, always_routed, fitted_folders, network_settings
from tiny_models import LLAVA, edit_layers, random_image, sharp, strengthen, tiny_processor

pytestmark = pytest.mark.slow  # as a whole: together they take longer than an inner loop may

BRAND, COLOR = "what brand is this computer ?", "what color is the cat ?"
EDITING = tuple(name for name in BASELINES if name != "base")
# VisEdit leaves its wrapped layer in the model, and IKE changes no weight.
WEIGHTS = ("ft-l", "ft-v", "lora")


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The edit did not take")
        warnings.filterwarnings("ignore", "Unable to fetch remote file")
        warnings.filterwarnings("ignore", "Could not find a config file")
        yield


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """A saved image adapter of the tiny model, loud and untrained."""
    model = strengthen(
        inject_dualedit(
            LLAVA.build(), text_layer=None, vis_layer=2, mid_dim=16, num_heads=2, init_weights=False
        )
    )
    folder = tmp_path_factory.mktemp("adapters") / "vision"
    save_edits(model, folder)
    return folder


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """What the fitted baselines need, of a few training steps on the tiny model."""
    return fitted_folders(sharp(LLAVA), tiny_processor(), tmp_path_factory.mktemp("networks"))


@pytest.fixture
def saved(adapters, networks, monkeypatch):
    """Folders of what is trained before the first edit, by baseline; every question finds an edit there."""
    always_routed(monkeypatch)
    return {"visedit": adapters} | networks


def settings_of(name, saved):
    """Settings that let an edit take on the tiny model in no time."""
    if name in FITTED:
        return network_settings(name, saved[name])
    return {
        "base": None,
        "ft-l": FineTuneSettings(**FIT),
        "ft-v": FineTuneSettings(**FIT),
        "lora": LoRASettings(**FIT),
        "ike": IKESettings(),
        "retrieval": RetrievalSettings(),
        "grace": GRACESettings(**FIT),
        "visedit": VisEditSettings(saved["visedit"]),
    }[name]


def opened(name, saved, model=None):
    model = sharp(LLAVA) if model is None else model
    return open_baseline(name, model, tiny_processor(), settings_of(name, saved))


def fact(image, prompt=BRAND, target="lenovo"):
    return EditSample(EditRequest(image, prompt, target), {}, {})


@torch.no_grad()
def logits(method, questions):
    """What the model says to these questions as the method asks them."""
    asked = open_questions(method.asked(questions))
    with method._applied(questions):
        return method.model(**method.prompter.inputs(asked), use_cache=False).logits


@pytest.fixture
def questions(generator):
    image = random_image(generator)
    return [(image, BRAND), (random_image(generator), COLOR), (None, "what color is it ?")]


# ---------------------------------------------------------------------- the interface


@pytest.mark.parametrize("name", BASELINES)
def test_an_edit_shows_and_reset_leaves_no_bit_of_it(name, saved, questions):
    method = opened(name, saved)
    assert isinstance(method, Method) and method.name == name and method.memory_bytes() == 0
    modules = [path for path, _ in method.model.named_modules()]
    weights = {path: weight.clone() for path, weight in method.model.state_dict().items()}
    before, said = logits(method, questions), method.answers(questions)

    method.edit(fact(questions[0][0]))
    method.edit(fact(questions[1][0], COLOR, "green"))
    edited = logits(method, questions)
    changes = name != "base"
    assert (method.memory_bytes() > 0) is changes
    assert torch.equal(edited, before) is not changes, "the edits do not show"
    with method.unedited():
        assert torch.equal(logits(method, questions), before)
        assert method.answers(questions) == said
    assert torch.equal(logits(method, questions), edited)

    method.reset()
    assert method.memory_bytes() == 0
    assert torch.equal(logits(method, questions), before)
    assert [path for path, _ in method.model.named_modules()] == modules
    after = method.model.state_dict()
    assert all(torch.equal(weight, after[path]) for path, weight in weights.items() if path in after)
    assert not any(parameter.requires_grad for parameter in method.model.parameters())


@pytest.mark.parametrize("name", EDITING)
def test_two_runs_agree_to_the_bit(name, saved, questions):
    found = []
    for noise in (1, 2):
        method = opened(name, saved)
        torch.manual_seed(noise)  # what ran before must not matter
        method.edit(fact(questions[0][0]))
        found.append(logits(method, questions))
    assert torch.equal(*found)


@pytest.mark.parametrize("name", BASELINES)
def test_predictions_are_the_models_own_at_the_answers_tokens(name, saved, questions):
    method = opened(name, saved)
    targets = ["lenovo", "big old", "red"]
    found = method.predictions(questions, targets)
    batch = forced_batch(method.prompter, questions, targets)
    with method.unedited():
        expected = forced_predictions(method.model, batch)
    for (best, wanted), (theirs, ids) in zip(found, expected, strict=True):
        assert wanted.tolist() == ids.tolist() and best.shape == wanted.shape
        assert best.tolist() == theirs.tolist()
    with pytest.raises(ValueError, match="2 entries for 3 questions"):
        method.predictions(questions, targets[:2])


@pytest.mark.parametrize("name", ["ft-l", "ft-v", "lora", "grace", "tp", "wise"])
def test_what_was_fitted_is_predicted_and_answered(name, saved, generator):
    """On a picture that can be fitted: in a random model 200 steps of FT-V are too few for one in six."""
    method = opened(name, saved)
    target = "dell" if name == "grace" else "old dell"  # GRACE writes to one place of a random model only
    for _ in range(8):
        question = [(random_image(generator), BRAND)]
        method.reset()
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            method.edit(fact(question[0][0], target=target))
        # GRACE answers so, if with less than the asked probability.
        if name == "grace" or not any("did not take" in str(warning.message) for warning in told):
            break
    else:
        pytest.fail("none of eight pictures could be fitted")
    best, wanted = method.predictions(question, [target])[0]
    assert best.tolist() == wanted.tolist()
    assert method.answers(question)[0].startswith(target)


@pytest.mark.parametrize("name", EDITING)
def test_an_empty_target_is_refused_and_nothing_stored(name, saved, questions):
    method = opened(name, saved)
    before = logits(method, questions)
    with pytest.raises(ValueError, match="target="):
        method.edit(fact(questions[0][0], target="  "))
    assert method.memory_bytes() == 0 and torch.equal(logits(method, questions), before)


# ---------------------------------------------------------------------- each method's own


def test_fine_tuning_stays_inside_its_ball(questions):
    bound = 1e-3
    settings = FineTuneSettings(norm_constraint=bound, **FIT)
    method = open_baseline("ft-l", sharp(LLAVA), tiny_processor(), settings)
    before = {name: weight.clone() for name, weight in method.model.named_parameters()}
    method.edit(fact(questions[0][0]))
    moved = {name: (w - before[name]).abs().max() for name, w in method.model.named_parameters()}
    # One rounding of the sum of weight and bound.
    assert bound * 0.5 < max(moved.values()) <= bound * (1 + 1e-3)
    last = max(int(name.split(".layers.")[1].split(".")[0]) for name in moved if "language" in name
               and ".layers." in name)  # fmt: skip
    assert all(f"language_model.layers.{last}." in name for name, far in moved.items() if far > 0)


def test_ft_v_tunes_the_last_layer_that_reaches_the_language_model(questions):
    model = sharp(LLAVA)
    layers = vision_layers(model)
    assert model.config.vision_feature_layer == -2  # LLaVA's own choice: the last layer is never read
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    method = open_baseline("ft-v", model, tiny_processor(), FineTuneSettings(**FIT))
    method.edit(fact(questions[0][0]))
    moved = {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}
    assert moved and all(name.startswith(layers[-2] + ".") for name in moved)
    with pytest.raises(ValueError, match="image=None"):
        method.edit(fact(None))


def test_fine_tuning_a_named_module(questions):
    model = sharp(LLAVA)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    settings = FineTuneSettings(module="layers.1.mlp.down_proj", **FIT)
    open_baseline("ft-l", model, tiny_processor(), settings).edit(fact(questions[0][0]))
    moved = {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}
    assert moved == {"model.language_model.layers.1.mlp.down_proj.weight"}


def test_lora_leaves_the_very_modules_that_were_there(questions):
    model = sharp(LLAVA)
    modules = dict(model.named_modules())
    method = open_baseline("lora", model, tiny_processor(), LoRASettings(**FIT))
    method.edit(fact(questions[0][0]))
    assert any("lora_" in name for name, _ in model.named_parameters())
    method.reset()
    assert dict(model.named_modules()) == modules and not hasattr(model, "peft_config")


def test_ike_puts_the_nearest_edit_in_front(questions):
    method = open_baseline("ike", sharp(LLAVA), tiny_processor())
    assert method.asked(questions) == questions
    method.edit(fact(questions[0][0], BRAND, "lenovo"))
    method.edit(fact(questions[1][0], COLOR, "green"))
    asked = method.asked(questions[:2])
    assert [image for image, _ in asked] == [image for image, _ in questions[:2]]
    assert [prompt for _, prompt in asked] == [
        f"New Fact: {BRAND} lenovo\nPrompt: {BRAND}",
        f"New Fact: {COLOR} green\nPrompt: {COLOR}",
    ]
    method.edit(fact(questions[1][0], COLOR, "red"))  # the same question about the same image
    assert method.asked(questions[1:2])[0][1].startswith(f"New Fact: {COLOR} red\n")
    both = open_baseline("ike", method.model, tiny_processor(), IKESettings(retrieved=5))
    both.edit(fact(questions[0][0], BRAND, "lenovo"))
    both.edit(fact(questions[1][0], COLOR, "green"))
    told = both.asked(questions[:1])[0][1]
    assert told.index("green") < told.index("lenovo")  # the nearest last


def test_ike_shows_demonstrations_of_training_edits(questions):
    kept = {"t_loc": [Probe(None, "what is small ?", "old")]}
    shown = tuple(
        dataclasses.replace(
            fact(questions[0][0], f"what brand is w{n} ?", "dell"), rephrases=["name it ?"], locality=kept
        )
        for n in range(50, 53)
    )
    settings = IKESettings(demonstrations=shown, shown=3)
    method = open_baseline("ike", sharp(LLAVA), tiny_processor(), settings)
    assert method.asked(questions) == questions  # without an edit there is nothing to be told
    method.edit(fact(questions[0][0]))
    prompt = method.asked(questions[:1])[0][1]
    assert "New Fact: what brand is w50 ? dell\nPrompt: what brand is w50 ? dell\n\n" in prompt
    assert "New Fact: what brand is w51 ? dell\nPrompt: name it ? dell\n\n" in prompt
    assert "New Fact: what brand is w52 ? dell\nPrompt: what is small ? old\n\n" in prompt
    assert prompt.endswith(f"New Fact: {BRAND} lenovo\nPrompt: {BRAND}")


def grace(epsilon, model=None):
    settings = GRACESettings(epsilon=epsilon, layer=1, **FIT)
    return open_baseline("grace", sharp(LLAVA) if model is None else model, tiny_processor(), settings)


def test_grace_leaves_every_other_row_of_a_batch_alone(questions):
    method = grace(epsilon=1e-3)
    before = logits(method, questions)
    method.edit(fact(questions[0][0]))
    after = logits(method, questions)
    assert not torch.equal(after[0], before[0]) and torch.equal(after[1:], before[1:])
    why = method.explain(questions)
    assert [one.fired for one in why] == [True, False, False]
    assert why[0].edit.target == "lenovo" and why[0].distance <= 1e-4 < why[1].distance


def test_grace_splits_widens_and_replaces(questions):
    (first, _), (second, _), _ = questions
    apart = grace(epsilon=1e-3)
    apart.edit(fact(first))
    far = apart.explain([(second, COLOR)])[0].distance

    split = grace(epsilon=0.8 * far)  # two such radii meet
    split.edit(fact(first))
    split.edit(fact(second, COLOR, "green"))
    radii = [split.explain([question])[0].radius for question in questions[:2]]
    assert radii == pytest.approx([far / 2, far / 2], rel=1e-3) and radii[0] < radii[1]

    wide = grace(epsilon=0.8 * far)
    wide.edit(fact(first))
    one = wide.memory_bytes()
    wide.edit(fact(second, COLOR, "lenovo"))  # the same answer
    assert wide.memory_bytes() == one
    assert wide.explain([(first, BRAND)])[0].radius == pytest.approx(far, rel=1e-4)

    wide.edit(fact(first, BRAND, "green"))  # the very key of a stored edit
    assert wide.memory_bytes() == one
    assert wide.answers([(first, BRAND)])[0].startswith("green")


def test_visedit_answers_text_as_before_and_says_whose_adapter_it_has(adapters, questions, tmp_path):
    method = opened("visedit", {"visedit": adapters})
    before = logits(method, questions)
    method.edit(fact(questions[0][0]))
    changed = [not torch.equal(a, b) for a, b in zip(logits(method, questions), before, strict=True)]
    assert changed == [True, True, False]  # no gate: an unrelated picture, too
    with pytest.raises(ValueError, match="image"):
        method.edit(fact(None))

    both = inject_dualedit(
        LLAVA.build(), text_layer=1, vis_layer=2, mid_dim=16, num_heads=2, init_weights=False
    )
    save_edits(both, tmp_path / "both")
    half = open_baseline("visedit", sharp(LLAVA), tiny_processor(), VisEditSettings(tmp_path / "both"))
    assert half.name == "visedit (image half of dualedit)"
    wanted = {n: w for n, w in both.named_parameters() if ".default.vision." in n}
    found = {n: w for n, w in half.model.named_parameters() if ".default.vision." in n}
    assert wanted and all(torch.equal(wanted[name], found[name]) for name in wanted)
    assert not [layer for layer in edit_layers(half.model) if "text" in layer.dualedit_adapter["default"]]


# ---------------------------------------------------------------------- errors


def test_unknown_names_and_misfits_are_named(saved):
    model, processor = sharp(LLAVA), tiny_processor()
    with pytest.raises(ValueError, match="'gracee' is unknown. Known are base, ft-l"):
        open_baseline("gracee", model, processor)
    for name in FITTED:
        with pytest.raises(ValueError, match=f"'{name}' has to be fitted to training facts first"):
            open_baseline(name, model, processor)
    with pytest.raises(ValueError, match="LoRASettings: 'grace' takes GRACESettings"):
        open_baseline("grace", model, processor, LoRASettings())
    with pytest.raises(ValueError, match="'base' takes no settings"):
        open_baseline("base", model, processor, LoRASettings())
    with pytest.raises(ValueError, match="no such module. Nearest: .*down_proj"):
        open_baseline("ft-l", model, processor, FineTuneSettings(module="layers.1.mlp.down_prog"))
    with pytest.raises(ValueError, match="ambiguous"):
        open_baseline("ft-l", model, processor, FineTuneSettings(module="down_proj"))
    with pytest.raises(ValueError, match="layer=9"):
        open_baseline("grace", model, processor, GRACESettings(layer=9))
    with pytest.raises(ValueError, match="has to be trained"):
        open_baseline("visedit", model, processor)
    with pytest.raises(ValueError, match="with adapters: a baseline is measured on the base model"):
        open_baseline("ft-l", opened("visedit", saved).model, processor)


@pytest.mark.parametrize(
    ("kind", "argument", "value"),
    [
        (FineTuneSettings, "learning_rate", 0.0),
        (FineTuneSettings, "norm_constraint", -1.0),
        (LoRASettings, "max_steps", 0),
        (LoRASettings, "rank", 0),
        (LoRASettings, "scale", 0.0),
        (LoRASettings, "targets", ()),
        (GRACESettings, "stop_probability", 1.0),
        (GRACESettings, "epsilon", 0.0),
        (IKESettings, "fact", "New Fact:"),
        (IKESettings, "question", "Prompt:"),
        (IKESettings, "retrieved", 0),
        (IKESettings, "shown", 0),
        (RetrievalSettings, "radius", 0.0),
    ],
)
def test_bad_settings_are_refused(kind, argument, value):
    with pytest.raises(ValueError, match=f"^{argument}="):
        kind(**{argument: value})


# ---------------------------------------------------------------------- the embedded model


@pytest.fixture(scope="module")
def facts():
    return edit_samples(World(0), "train", 6, seed=31)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ft-l", "ft-v", "lora", "ike", "grace"])
def test_edits_of_the_embedded_model_take(name, facts):
    method = load_baseline(name)
    taken = 0
    for sample in facts:
        question = [(sample.request.image, sample.request.prompt)]
        before = method.answers(question)[0]
        assert before != sample.request.target
        method.edit(sample)
        taken += method.answers(question)[0] == sample.request.target
        method.reset()
        assert method.answers(question)[0] == before
    assert taken >= len(facts) - 1


@pytest.mark.slow
def test_memories_keep_many_edits_of_the_embedded_model_apart(facts):
    for name in ("ike", "grace"):
        method = load_baseline(name)
        for sample in facts:
            method.edit(sample)
        answers = method.answers([(sample.request.image, sample.request.prompt) for sample in facts])
        right = [answer == sample.request.target for answer, sample in zip(answers, facts, strict=True)]
        assert sum(right) >= len(facts) - 1


def test_settings_of_the_embedded_model(tmp_path):
    assert baseline_settings("base") is None
    assert isinstance(baseline_settings("lora"), LoRASettings)
    with pytest.raises(ValueError, match="'rome' is unknown"):
        baseline_settings("rome")
    with pytest.raises(FileNotFoundError, match="tune_baselines"):
        baseline_settings("grace", tmp_path)
