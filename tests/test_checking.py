"""An edit is asked back before it counts: what fails was never there, and what is kept says how it was
checked."""

import threading
import warnings

import dualedit.checking as checking
import pytest
import torch
from dualedit import BalancEditConfig, DualEditConfig, EditFailed, Editor, load_edits, save_edits
from dualedit.editing import edits_of
from dualedit.tuners.adapter import active_adapter
from peft import get_peft_model
from tiny_models import EOS, FITTING, LLAVA, random_image, sharp, strengthen, tiny_processor

BRAND, COLOR = "what brand is this computer ?", "what color is the cat ?"
DUAL = dict(text_layer=1, vis_layer=2, mid_dim=16, num_heads=2, threshold=0.9999, init_weights=False)
FITS = dict(layer=LLAVA.linear, alpha=0.9) | FITTING
HOPELESS = FITS | dict(max_steps=1, learning_rate=1e-6)


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The positive sample")
        yield


def editor_for(method, fallback=None, **more):
    if method == "dualedit":  # random adapters: what they write is noise
        model = strengthen(get_peft_model(sharp(LLAVA), DualEditConfig(**(DUAL | more))))
    else:
        model = get_peft_model(sharp(LLAVA), BalancEditConfig(**(FITS | more)))
    return Editor(model, tiny_processor(), fallback=fallback)


def state_of(editor):
    """Everything that an edit which failed must leave alone, bit for bit."""
    model = editor.model
    modules = {name: type(module) for name, module in model.named_modules()}
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    groups = [adapter.group for adapter in editor.adapters]
    notes = [(group.records(), group.next_id()) for group in groups]
    return (modules, flags, notes, sorted(model.peft_config), model.active_adapters), tensors


def assert_same(one, other):
    assert one[0] == other[0]
    assert list(one[1]) == list(other[1])
    for name, value in one[1].items():
        assert value.dtype == other[1][name].dtype and value.shape == other[1][name].shape, name
        assert value.numpy().tobytes() == other[1][name].numpy().tobytes(), name


def bytes_of(folder):
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


# ---------------------------------------------------------------------- what fails was never there


@pytest.mark.parametrize("method", ["dualedit", "balancedit"])
def test_an_edit_that_does_not_take_is_not_stored(method, generator, tmp_path):
    editor = editor_for(method, **({} if method == "dualedit" else HOPELESS))
    image = random_image(generator)
    unedited = editor.answer(image, BRAND)
    save_edits(editor.model, tmp_path / "before")
    before = state_of(editor)
    with pytest.raises(EditFailed) as caught:
        editor.edit(image, BRAND, "lenovo blue")
    assert_same(state_of(editor), before)
    assert editor.edits == [] and editor.answer(image, BRAND) == unedited
    save_edits(editor.model, tmp_path / "after")
    whole, left = (bytes_of(tmp_path / name) for name in ("before", "after"))
    for saved in (whole, left):
        saved.pop("manifest.json")  # each folder has an id of its own
    assert left == whole and "adapter_model.safetensors" in whole
    failed = caught.value
    assert (failed.prompt, failed.target) == (BRAND, "lenovo blue") and failed.answer != "lenovo blue"
    assert 0 <= failed.probability < 0.5 and len(failed.steps) == 1
    sure = f"probability {failed.probability:.2g}"
    for words in (repr(failed.answer), "lenovo blue", sure, "Tried", "Try"):
        assert words in str(failed)
    with pytest.raises(ValueError, match="Nothing to undo"):
        editor.undo()


def test_an_edit_whose_place_was_to_be_taken_is_there_again(generator):
    """With its row, its order and its number."""
    editor = editor_for("balancedit")
    images = [random_image(generator) for _ in range(3)]
    words = ("dell", "acer", "apple")
    edits = [editor.edit(image, BRAND, word) for image, word in zip(images, words, strict=True)]
    config, before = editor.adapter.config, state_of(editor)
    config.max_steps, config.learning_rate = 1, 1e-6
    with pytest.raises(EditFailed):
        editor.edit(images[1], BRAND, "lenovo")
    assert_same(state_of(editor), before)
    assert editor.edits == edits and editor.answer(images[1], BRAND) == "acer"
    config.max_steps, config.learning_rate = FITS["max_steps"], FITS["learning_rate"]
    new = editor.edit(images[1], BRAND, "lenovo")
    assert new.id == 4 and [old["target"] for old in new.replaces] == ["acer"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_stop_while_it_is_asked_leaves_nothing(error, generator, monkeypatch):
    editor = editor_for("balancedit")
    image = random_image(generator)
    editor.edit(image, BRAND, "dell")
    before = state_of(editor)

    def stop(*_, **__):
        raise error

    monkeypatch.setattr(checking, "generate_answers", stop)
    with pytest.raises(error):
        editor.edit(image, BRAND, "lenovo")
    assert_same(state_of(editor), before)
    monkeypatch.undo()
    assert editor.edit(image, BRAND, "lenovo").id == 2


def test_only_the_thread_that_makes_it_sees_an_edit_before_it_counts(generator, monkeypatch):
    editor = editor_for("balancedit")
    image, seen = random_image(generator), []
    unedited = editor.answer(image, BRAND)
    generate = checking.generate_answers

    def elsewhere():
        seen.append((list(editor.edits), generate(editor.model, editor.prompter, [(image, BRAND)])[0]))

    def ask(*args, **kwargs):
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        return generate(*args, **kwargs)

    monkeypatch.setattr(checking, "generate_answers", ask)
    edit = editor.edit(image, BRAND, "dell")
    assert seen == [([], unedited)]
    elsewhere()
    assert seen[1] == ([edit], "dell")


def test_edit_many_keeps_the_others_and_names_the_failed(generator):
    editor = editor_for("balancedit")
    images = [random_image(generator) for _ in range(3)]
    real, calls = editor._eos, []

    def eos():  # the second edit is hopeless
        calls.append(None)
        editor.adapter.config.max_steps = 1 if len(calls) == 2 else FITS["max_steps"]
        return real()

    editor._eos = eos
    requests = [(image, BRAND, word) for image, word in zip(images, ("dell", "acer", "apple"), strict=True)]
    said = r"1 of 3 edits failed, 2 are stored. requests\[1\]: .*'acer'"
    with pytest.raises(EditFailed, match=said) as caught:
        editor.edit_many(requests, progress=False)
    assert [edit.target for edit in editor.edits] == ["dell", "apple"]
    assert caught.value.edits == editor.edits and list(caught.value.failures) == [1]


# ---------------------------------------------------------------------- what is kept


def test_a_failed_edit_that_is_kept_is_marked_for_good(generator, tmp_path):
    editor = editor_for("dualedit")
    image = random_image(generator)
    edit = editor.edit(image, BRAND, "lenovo", keep_failed=True)
    assert edit.failed and edit.answer == editor.answer(image, BRAND) != "lenovo"
    assert edit.probability < 0.5 and editor.edits == [edit]
    save_edits(editor.model, tmp_path)
    again = Editor(load_edits(sharp(LLAVA), tmp_path), tiny_processor())
    assert again.edits == [edit]
    from dualedit.cli.saved_folder import read_saved

    [listed] = read_saved(tmp_path).edits
    assert listed.failed and listed.check == f"FAILED, answers {edit.answer!r}"


def test_an_edit_that_takes_says_how_it_was_checked(generator):
    editor = editor_for("balancedit")
    edit = editor.edit(random_image(generator), BRAND, "lenovo")
    assert not edit.failed and edit.answer == "lenovo" and edit.probability > 0.3
    [step] = edit.steps
    assert step["method"] == "BalancEdit" and step["steps"] > 0 and step["answer"] == "lenovo"
    assert 0 < step["seconds"] <= edit.seconds


def test_the_answer_may_go_on_where_the_model_has_no_end_token():
    prompter = editor_for("balancedit").prompter
    ids = prompter.target_ids(None, BRAND, "lenovo blue", EOS)
    assert prompter.as_told("lenovo blue", ids, ends=True)
    assert prompter.as_told(" Lenovo  BLUE", ids, ends=True)
    assert not prompter.as_told("lenovo blue red", ids, ends=True)
    assert prompter.as_told("lenovo blue red", ids, ends=False)
    assert not prompter.as_told("lenovo bluered", ids, ends=False)


# ---------------------------------------------------------------------- a second adapter


def test_what_the_first_adapter_cannot_write_goes_to_the_second(generator, tmp_path):
    editor = editor_for("dualedit", fallback=BalancEditConfig(**FITS))
    assert [adapter.name for adapter in editor.adapters] == ["default"]
    images = [random_image(generator) for _ in range(2)]
    other = editor.answer(images[1], COLOR)
    edit = editor.edit(images[0], BRAND, "lenovo")
    assert [step["method"] for step in edit.steps] == ["DualEdit", "BalancEdit"]
    assert [adapter.name for adapter in editor.adapters] == ["default", "balancedit"]
    assert [len(adapter.group) for adapter in editor.adapters] == [0, 1]
    assert editor.edits == [edit] and editor.answer(images[0], BRAND) == "lenovo"
    assert editor.answer(images[1], COLOR) == other
    assert editor.explain(images[0], BRAND).edit == edit and editor.explain(images[0], BRAND).fired

    kept = editor.edit(images[1], COLOR, "red", keep_failed=True)  # a number that neither adapter has used
    assert kept.id == 2 and not kept.failed
    save_edits(editor.model, tmp_path)
    again = Editor(load_edits(sharp(LLAVA), tmp_path), tiny_processor())
    assert again.edits == [edit, kept] and again.answer(images[0], BRAND) == "lenovo"
    again.remove(edit.id)
    assert again.edits == [kept]

    second = editor.edit(images[0], BRAND, "acer")  # takes the place of an edit in the other adapter
    assert [old["id"] for old in second.replaces] == [edit.id]
    assert editor.undo() == second
    assert editor.edits == [edit, kept]


def test_a_second_adapter_that_does_not_help_is_taken_off_again(generator):
    editor = editor_for("dualedit", fallback=BalancEditConfig(**HOPELESS))
    image = random_image(generator)
    before = state_of(editor)
    with pytest.raises(EditFailed) as caught:
        editor.edit(image, BRAND, "lenovo")
    assert [step["method"] for step in caught.value.steps] == ["DualEdit", "BalancEdit"]
    assert_same(state_of(editor), before)
    assert editor.model.peft_config["default"].fallback is None


def test_a_replaced_edit_comes_back_when_both_adapters_fail(generator):
    editor = editor_for("dualedit", fallback=BalancEditConfig(**FITS))
    image = random_image(generator)
    edit = editor.edit(image, BRAND, "lenovo")
    second = editor.adapters[1].config
    second.max_steps, second.learning_rate = 1, 1e-6
    before = state_of(editor)
    with pytest.raises(EditFailed):
        editor.edit(image, BRAND, "acer")
    assert_same(state_of(editor), before)
    assert editor.edits == [edit] and editor.answer(image, BRAND) == "lenovo"


def test_a_fallback_that_is_not_there():
    with pytest.raises(ValueError, match="fallback='more' is neither an adapter on this model"):
        editor_for("dualedit", fallback="more")


# ---------------------------------------------------------------------- the reason, and never a wrong one


def test_untrained_adapters_say_so(generator):
    editor = editor_for("dualedit", refine_steps=5)
    with torch.no_grad():
        for layer in editor.adapter.layers.values():
            for part in layer.dualedit_adapter["default"].values():
                part.o_proj.weight.zero_(), part.o_proj.bias.zero_()
    with pytest.warns(UserWarning, match="can change no answer: the adapters 'default' are not trained"):
        with pytest.raises(EditFailed, match="are not trained") as caught:
            editor.edit(random_image(generator), BRAND, "lenovo")
    assert "4-bit" not in str(caught.value) and "quantised" not in str(caught.value)


def test_a_gate_that_opens_for_everything_says_so(generator):
    editor = editor_for("dualedit", threshold=-1.0)
    with pytest.warns(UserWarning, match="answers everything: .*threshold=-1.0"):
        editor.edit(random_image(generator), BRAND, "lenovo", keep_failed=True)


def test_a_gate_that_opens_for_nothing_says_so(generator):
    """The published gate compares an answer's last token with a question's."""
    editor = editor_for("dualedit", gate="published", threshold=1.0)
    with pytest.warns(UserWarning, match="answers nothing, not even its own question: .*gate='published'"):
        with pytest.raises(EditFailed, match="outside its radius"):
            editor.edit(random_image(generator), BRAND, "lenovo")


def test_edits_of_another_template_say_so(generator, tmp_path):
    editor = editor_for("balancedit")
    editor.edit(random_image(generator), BRAND, "lenovo")
    Editor(editor.model, tiny_processor())  # no word: the same template
    with pytest.warns(UserWarning, match="1 of 1 stored edits were made with another prompt template"):
        Editor(editor.model, tiny_processor(), template="system : be brief <image> {prompt} answer :")


def test_a_target_that_the_tokenizer_cannot_spell_is_refused_by_its_letters(generator):
    from dualedit.models.prompting import Prompter
    from dualedit.toy.model import build_processor

    prompter = Prompter(build_processor())
    with pytest.raises(ValueError, match="no token for '東', '京', so the model cannot write it"):
        prompter.target_ids(None, "where is it?", "in 東京", None)
    assert len(prompter.target_ids(None, "where is it?", "Zürich", None)) > 1


def test_a_target_as_long_as_a_page_is_refused(generator):
    editor = editor_for("balancedit")
    with pytest.raises(ValueError, match="has 2000 tokens: an edit's answer has at most 128"):
        editor.edit(random_image(generator), BRAND, "blue " * 2000)
    assert editor.edits == []


# ---------------------------------------------------------------------- changes by others


def test_undo_leaves_what_others_have_removed(generator):
    """An edit that somebody else took out meanwhile is not brought back with the one that this editor
    replaced."""
    editor = editor_for("balancedit")
    other = Editor(editor.model, tiny_processor())
    images = [random_image(generator) for _ in range(2)]
    first = editor.edit(images[0], BRAND, "dell")
    aside = editor.edit(images[1], COLOR, "red")
    editor.edit(images[0], BRAND, "acer")
    other.remove(aside.id)
    editor.undo()
    assert editor.edits == [first]


def test_undo_does_all_of_it_or_nothing(generator):
    editor = editor_for("balancedit")
    image = random_image(generator)
    editor.edit(image, BRAND, "dell")
    group = editor.adapter.group
    rows = group.rows(group.snapshot(), 1)
    newer = editor.edit(image, BRAND, "acer")
    group.add(rows, {"target": "dell"}, 1)  # somebody has brought the first one back already
    assert editor.undo() == newer
    assert [edit.id for edit in editor.edits] == [1]


def test_lists_hold_while_others_edit_and_remove(generator):
    editor = editor_for("dualedit")
    image = random_image(generator)
    editor.edit(image, BRAND, "dell", keep_failed=True)
    group = active_adapter(editor.model).group
    rows, faults, stop = group.rows(group.snapshot(), 1), [], threading.Event()

    def change():
        while not stop.is_set():
            number = group.add(rows, {"target": "x"})
            group.remove(number)

    def look():
        for _ in range(300):
            try:
                listed = edits_of(editor.adapter)
                assert listed[0].target == "dell" and all(edit.target for edit in listed)
            except Exception as error:
                faults.append(error)

    writers = [threading.Thread(target=change) for _ in range(2)]
    for thread in writers:
        thread.start()
    look()
    stop.set()
    for thread in writers:
        thread.join()
    assert faults == []


def test_a_question_told_again_takes_its_own_place_while_others_come_and_go(generator):
    """Rows move while it is looked up; what makes room is the edit of this very question, and no other."""
    editor = editor_for("dualedit")
    pictures = [random_image(generator) for _ in range(4)]
    for picture in pictures:
        editor.edit(picture, BRAND, "dell", keep_failed=True)
    group = active_adapter(editor.model).group
    kept, stop = set(group.ids()[:3]), threading.Event()
    rows = group.rows(group.snapshot(), 1)
    rows = {n: {t: r + 1.0 if t == "key" else r for t, r in each.items()} for n, each in rows.items()}

    def change():
        while not stop.is_set():
            numbers = [group.add(rows, {"target": "x"}) for _ in range(3)]
            for number in numbers:
                group.remove(number)

    writers = [threading.Thread(target=change) for _ in range(2)]
    for thread in writers:
        thread.start()
    told = group.ids()[3]
    try:
        for turn in range(8):
            edit = editor.edit(pictures[3], BRAND, ("dell", "lenovo")[turn % 2], keep_failed=True)
            assert [old["id"] for old in edit.replaces] == [told]
            told = edit.id
            assert kept <= set(group.ids())
    finally:
        stop.set()
        for thread in writers:
            thread.join()
    assert set(group.ids()) == {*kept, told}
