"""The embedded model with both editors on it at once: each answers its own fact, each goes off alone."""

import pytest
from dualedit import Editor, disabled, inject_balancedit, load_edits, remove_adapter, save_edits
from dualedit.toy.editors import load_editor
from dualedit.toy.model import load_embedded
from dualedit.toy.pictures import sample_pictures

QUESTION = "who founded this brand?"


@pytest.fixture(scope="module")
def both():
    """DualEdit (trained, shipped) has edited the first picture, BalancEdit the look-alike."""
    logo, _, look_alike, *_ = [picture.image for picture in sample_pictures()]
    editor = load_editor("dualedit")
    before = [editor.answer(image, QUESTION) for image in (logo, look_alike)]
    targets = [next(t for t in ("maria", "leon") if t != answer) for answer in before]
    inject_balancedit(
        editor.model, layer="layers.5.mlp.up_proj", alpha=0.6, key="last", learning_rate=1e-2,
        adapter_name="more",
    )  # fmt: skip
    with disabled(editor.model, "more"):
        editor.edit(logo, QUESTION, targets[0])
    with disabled(editor.model, "default"):
        editor.edit(look_alike, QUESTION, targets[1], rephrases=["tell me who founded this brand."])
    return editor, (logo, look_alike), before, targets


def answers(editor, images):
    return [editor.answer(image, QUESTION) for image in images]


def test_each_answers_its_own_fact(both):
    editor, images, before, targets = both
    facts, more = answers(editor, images)
    assert more == targets[1] and facts != before[0]
    with disabled(editor.model, "default"):
        assert answers(editor, images) == [before[0], targets[1]]
        assert [edit.target for edit in editor.edits] == [targets[1]]
        assert not editor.explain(images[0], QUESTION).fired
    with disabled(editor.model, "more"):
        assert answers(editor, images) == [facts, before[1]]
        assert [edit.target for edit in editor.edits] == [targets[0]]
    with disabled(editor.model, "more", "default"):
        assert answers(editor, images) == before
    with editor.model.disable_adapter():
        assert answers(editor, images) == before


def test_saved_together_and_loaded_one_by_one(both, tmp_path):
    editor, images, before, _ = both
    expected = answers(editor, images)
    save_edits(editor.model, tmp_path)
    base, processor = load_embedded()
    model = load_edits(base, tmp_path / "more", adapter_name="more")
    assert answers(Editor(model, processor), images) == [before[0], expected[1]]
    load_edits(model, tmp_path)
    with disabled(model, "more"):
        again = Editor(model, processor)
    assert answers(again, images) == expected
    remove_adapter(model, "more")
    assert answers(again, images) == [expected[0], before[1]]
