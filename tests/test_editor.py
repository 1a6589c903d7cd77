"""The editor: editing in words and pictures, undoing, listing, explaining, answering."""

import warnings

import pytest
import torch
from dualedit import BalancEditConfig, DualEditConfig, Editor, EditRequest
from dualedit.models.images import open_image
from dualedit.models.prompting import Prompter
from peft import get_peft_model
from PIL import Image, ImageEnhance
from tiny_models import (
    BOS,
    EOS,
    FITTING,
    IMAGE,
    LLAVA,
    METHODS,
    PAD,
    edit_layers,
    random_image,
    sharp,
    strengthen,
    tiny_processor,
)

BRAND, COLOR = "what brand is this computer ?", "what color is the cat ?"


@pytest.fixture(params=METHODS)
def method(request):
    return request.param


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The edit did not take")
        warnings.filterwarnings("ignore", "The positive sample")
        yield


def editor_for(method, **more):
    if method == "dualedit":
        settings = dict(
            text_layer=1, vis_layer=2, mid_dim=16, num_heads=2, threshold=0.9999, init_weights=False
        )
        model = strengthen(get_peft_model(LLAVA.build(), DualEditConfig(**(settings | more))))
    else:
        settings = dict(layer=LLAVA.linear, alpha=0.9) | FITTING
        model = get_peft_model(sharp(LLAVA), BalancEditConfig(**(settings | more)))
    return Editor(model, tiny_processor(), keep_failed=True)


# ---------------------------------------------------------------------- prompts


def test_prompts(generator):
    prompter = Prompter(tiny_processor())
    batch = prompter.inputs([(random_image(generator), BRAND), (None, COLOR)])
    ids, mask = batch["input_ids"], batch["attention_mask"]
    assert batch["pixel_values"].shape == (1, 3, 16, 16)
    assert ids[0].tolist().count(IMAGE) == 4 and ids[1].tolist().count(IMAGE) == 0
    assert ids[1, 0] == PAD and mask[1].tolist() == (ids[1] != PAD).tolist()  # padded on the left
    assert [row[row != PAD].tolist().count(BOS) for row in ids] == [1, 1]
    assert torch.equal(ids[:, -2:], ids[:1, -2:].expand(2, -1))  # the template's "assistant :"
    assert prompter.tokenizer.decode(ids[0]).endswith("assistant :")


def test_the_tokenizer_keeps_its_padding_side(generator):
    """It may be padding for another thread at the same time, so not even for the length of a call."""
    processor, seen = tiny_processor(), []
    processor.tokenizer.padding_side = "right"

    class Watched(type(processor)):
        def __call__(self, *args, **kwargs):
            seen.append(self.tokenizer.padding_side)
            return super().__call__(*args, **kwargs)

    processor.__class__ = Watched
    image = random_image(generator)
    inputs = Prompter(processor).inputs([(image, "what is this ?"), (image, BRAND + " " + COLOR)])
    assert seen == ["right"] and processor.tokenizer.padding_side == "right"
    assert inputs["input_ids"][0, 0] == PAD and inputs["attention_mask"][:, -1].all()


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("template", [None, "<image> question : {prompt} answer {x} :"])
@pytest.mark.parametrize("with_image", [True, False])
def test_a_target_continues_its_prompt(chat, template, with_image, generator):
    prompter = Prompter(tiny_processor(chat), template)
    image = random_image(generator) if with_image else None
    tokens = prompter.target_ids(image, BRAND, " lenovo blue ", eos=EOS)
    assert prompter.tokenizer.convert_ids_to_tokens(tokens) == ["lenovo", "blue", "</s>"]
    assert torch.equal(prompter.target_ids(image, BRAND, "lenovo blue", eos=None), tokens[:-1])
    text = prompter.text(image, BRAND)
    assert text.count("<image>") == int(with_image) and BRAND in text
    whole = prompter.tokenizer(f"{text} lenovo blue", add_special_tokens=False)["input_ids"]
    assert whole[-2:] == tokens[:-1].tolist()


def test_a_template_needs_its_place():
    with pytest.raises(ValueError, match=r"template='question' has no \{prompt\}"):
        Prompter(tiny_processor(), "question")


def test_images_by_path(generator, tmp_path):
    image = random_image(generator)
    image.save(tmp_path / "a.png")
    assert open_image(tmp_path / "a.png").tobytes() == image.tobytes()
    (tmp_path / "b.png").write_bytes(b"no image")
    for bad, message in (
        (tmp_path / "b.png", "cannot be read"),
        (tmp_path / "c.png", "no such file"),
        (3, "pass a PIL"),
    ):
        with pytest.raises(ValueError, match=message):
            open_image(bad)


# ---------------------------------------------------------------------- editing


def test_edit_and_explain(method, generator):
    editor = editor_for(method)
    image, other = random_image(generator), random_image(generator)
    assert editor.edits == []
    nothing = editor.explain(image, BRAND)
    assert (nothing.fired, nothing.edit, nothing.distance) == (False, None, float("inf"))
    edit = editor.edit(image, BRAND, "lenovo", rephrases=["what brand is it ?"], negatives=[other])
    assert (edit.prompt, edit.target, edit.replaces) == (BRAND, "lenovo", ())
    assert editor.edits == [edit]
    found = editor.explain(image, BRAND)
    assert found.fired and found.edit == edit and found.distance <= found.radius == pytest.approx(edit.radius)
    unrelated = editor.explain(None, "who made the red dog ?")
    assert not unrelated.fired and unrelated.edit == edit and unrelated.distance > unrelated.radius


def test_answers(method, generator):
    editor = editor_for(method)
    images = [random_image(generator) for _ in range(2)]
    questions = [(images[0], BRAND), (None, COLOR), (images[1], COLOR), (None, BRAND)]
    before = editor.answer_many(questions, max_new_tokens=4)
    edit = editor.edit(images[0], BRAND, "lenovo")
    after = editor.answer_many(questions, max_new_tokens=4)
    assert after[1:] == before[1:]
    assert editor.answer(images[0], BRAND, max_new_tokens=4) == after[0]
    if method == "balancedit":
        assert after[0] == "lenovo"  # and nothing behind it: the edit ends with EOS
    editor.remove(edit.id)
    assert editor.answer_many(questions, max_new_tokens=4) == before


def test_answers_of_a_batch_are_those_alone(method, generator):
    editor = editor_for(method)
    questions = [
        (random_image(generator), BRAND),
        (None, COLOR),
        (random_image(generator), "a picture of a dog in"),
    ]
    editor.edit(questions[0][0], BRAND, "acer")
    assert editor.answer_many(questions, 5) == [editor.answer(*question, 5) for question in questions]


def test_edit_many(method, generator):
    editor = editor_for(method)
    images = [random_image(generator) for _ in range(3)]
    requests = [
        EditRequest(images[0], BRAND, "dell"),
        (images[1], COLOR, "green"),
        (images[2], "who made it ?", "apple"),
    ]
    edits = editor.edit_many(requests, progress=False)
    assert editor.edits == edits and [edit.target for edit in edits] == ["dell", "green", "apple"]
    for image, edit in zip(images, edits, strict=True):
        assert editor.explain(image, edit.prompt).edit == edit
    with pytest.raises(ValueError, match=r"requests\[1\]: target='  '.*1 of 3 edits are stored"):
        editor.edit_many([requests[0], (images[1], COLOR, "  "), requests[2]], progress=False)
    assert [edit.target for edit in editor.edits] == [
        "green",
        "apple",
        "dell",
    ]  # the first took its old one's place


def test_edit_many_takes_mappings(method, generator):
    editor = editor_for(method)
    images = [random_image(generator) for _ in range(2)]
    asked = {"image": images[0], "prompt": BRAND, "target": "dell"}
    more = {"image": images[1], "prompt": BRAND, "target": "apple", "rephrases": [COLOR]}
    edits = editor.edit_many([asked, more], progress=False)
    assert [edit.target for edit in edits] == ["dell", "apple"]
    assert editor.explain(images[0], BRAND).edit == edits[0]


def test_undo(method, generator):
    editor = editor_for(method)
    image, other = random_image(generator), random_image(generator)
    questions = [(image, BRAND), (other, COLOR)]
    base = editor.answer_many(questions, 4)
    first = editor.edit(image, BRAND, "lenovo")
    one = editor.answer_many(questions, 4)
    second = editor.edit(other, COLOR, "green")
    replacing = editor.edit(image, BRAND, "acer")
    assert [entry["target"] for entry in replacing.replaces] == ["lenovo"]
    assert [edit.id for edit in editor.edits] == [second.id, replacing.id]

    assert editor.undo() == replacing  # brings the replaced edit back
    assert editor.edits == [first, second]  # oldest first, as it was before
    assert editor.explain(image, BRAND).edit.target == "lenovo"
    assert editor.undo() == second
    assert editor.answer_many(questions, 4) == one
    assert editor.edits == [first]
    editor.remove(first.id)
    assert editor.answer_many(questions, 4) == base
    assert editor.undo() == first  # a removal is taken back, too
    assert editor.undo() == first and editor.edits == []
    with pytest.raises(ValueError, match="Nothing to undo"):
        editor.undo()
    assert editor.answer_many(questions, 4) == base
    redone = [editor.redo() for _ in range(2)]
    assert redone == [first, first] and editor.edits == []  # stored, and removed
    with pytest.raises(ValueError, match="Nothing to redo"):
        editor.redo()


def test_undo_goes_on_after_bringing_one_back(generator):
    """Three edits of one question, undone one by one, and the first one too."""
    editor = editor_for("dualedit")
    image = random_image(generator)
    for target in ("lenovo", "acer", "dell"):
        editor.edit(image, BRAND, target)
    assert [editor.undo().target for _ in range(2)] == ["dell", "acer"]
    assert [edit.target for edit in editor.edits] == ["lenovo"]
    assert editor.undo().target == "lenovo"
    assert editor.edits == []
    with pytest.raises(ValueError, match="Nothing to undo"):
        editor.undo()


def test_undo_skips_what_is_gone(generator):
    editor = editor_for("dualedit")
    first = editor.edit(random_image(generator), BRAND, "lenovo")
    second = editor.edit(random_image(generator), COLOR, "red")
    Editor(editor.model, tiny_processor()).remove(second.id)  # by somebody else
    assert editor.undo().id == first.id
    editor.edit(random_image(generator), BRAND, "lenovo")
    editor.model.add_adapter("b", DualEditConfig(text_layer=1, vis_layer=2, mid_dim=16, num_heads=2))
    editor.model.set_adapter("b")
    editor.model.delete_adapter("default")
    with pytest.raises(ValueError, match="Nothing to undo"):
        editor.undo()


def test_rephrases_and_negatives_set_the_radius(generator):
    """DualEdit: as far as the given rewordings need, and never as far as a given negative."""
    editor = editor_for("dualedit")
    image, other = random_image(generator), random_image(generator)
    plain = editor.edit(image, BRAND, "lenovo")
    assert plain.radius == pytest.approx(1e-4, rel=1e-3)
    rephrase = "name the brand of this computer"
    wider = editor.edit(image, BRAND, "lenovo", rephrases=[rephrase])
    assert editor.explain(image, rephrase).fired and wider.radius > plain.radius
    narrow = editor.edit(image, BRAND, "lenovo", rephrases=[rephrase], negatives=[(other, BRAND)])
    assert not editor.explain(other, BRAND).fired and editor.explain(image, BRAND).fired
    assert narrow.radius < editor.explain(other, BRAND).distance


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_an_own_radius_lies_between_samples_made_by_the_editor(alpha, generator):
    """One image and one question: rewording and brighter image inside, black image and other question out."""
    editor = editor_for("dualedit", radius="own", alpha=alpha)
    image = random_image(generator)
    editor.edit(random_image(generator), COLOR, "red")
    edit = editor.edit(image, BRAND, "lenovo")
    editor.remove(editor.edits[0].id)
    black = Image.new("RGB", image.size)
    bright = ImageEnhance.Brightness(image).enhance(1.1)
    near = [editor.explain(image, f"Question: {BRAND}"), editor.explain(bright, BRAND)]
    far = [editor.explain(black, BRAND), editor.explain(image, COLOR)]
    far_positive, near_negative = max(e.distance for e in near), min(e.distance for e in far)
    wanted = alpha * far_positive + (1 - alpha) * near_negative
    assert edit.radius == pytest.approx(min(wanted, near_negative), rel=1e-3)
    assert not any(e.fired for e in far)


def test_an_own_radius_needs_both_kinds_of_samples():
    with pytest.raises(ValueError, match="radius='wide'.*'threshold', 'own'"):
        DualEditConfig(radius="wide")
    with pytest.raises(ValueError, match="alpha=2"):
        DualEditConfig(alpha=2)
    editor = editor_for("dualedit", vis_layer=None, radius="own")
    with pytest.raises(ValueError, match="negatives .0.: the radius of an edit lies"):
        editor.edit(None, BRAND, "lenovo")
    assert editor.edits == []
    assert editor.edit(None, BRAND, "lenovo", negatives=[(None, COLOR)]).radius > 0


def test_targets_end_with_eos(generator):
    editor = editor_for("dualedit")
    memory = edit_layers(editor.model)[0].dualedit_memory["default"]
    image = random_image(generator)
    prompt = editor.prompter.inputs([(image, BRAND)])["input_ids"].shape[1]
    for eos, extra in ((EOS, 1), ([EOS, 7], 1), (None, 0)):
        editor.model.get_base_model().generation_config.eos_token_id = eos
        editor.edit(image, BRAND, "lenovo blue")
        assert int(memory.snapshot().length[-1]) == prompt + 2 + extra


def test_text_only_edits(generator):
    editor = editor_for("dualedit", vis_layer=None)
    edit = editor.edit(None, BRAND, "lenovo")
    assert editor.explain(None, BRAND).edit == edit and editor.explain(None, BRAND).fired
    with pytest.raises(ValueError, match="image=None: the edit's image is missing"):
        editor_for("dualedit").edit(None, BRAND, "lenovo")


def test_an_editor_needs_an_adapter():
    with pytest.raises(ValueError, match="no active edit adapter: call inject_dualedit"):
        Editor(LLAVA.build(), tiny_processor())
