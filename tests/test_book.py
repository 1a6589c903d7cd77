"""The life of stored edits: ids, notes, expiry, switching off, undo, filters, policies, exports, merging."""

import json
import logging
import warnings

import pytest
import torch
from dualedit import BalancEditConfig, DualEditConfig, Editor
from dualedit.overlaps import Policies
from dualedit.records import new_uid
from peft import get_peft_model
from tiny_models import FITTING, LLAVA, METHODS, random_image, sharp, strengthen, tiny_processor

BRAND, COLOR = "what brand is this computer ?", "what color is the cat ?"


@pytest.fixture(params=METHODS)
def method(request):
    return request.param


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The positive sample")
        yield


def editor_for(method, keep_failed=True, **more):
    if method == "dualedit":
        settings = dict(text_layer=1, vis_layer=2, mid_dim=16, num_heads=2, init_weights=False)
        config = DualEditConfig(threshold=more.pop("threshold", 0.9999), **settings)
        model = strengthen(get_peft_model(sharp(LLAVA), config))
    else:
        config = BalancEditConfig(layer=LLAVA.linear, alpha=more.pop("alpha", 0.9), **FITTING)
        model = get_peft_model(sharp(LLAVA), config)
    return Editor(model, tiny_processor(), keep_failed=keep_failed, **more)


def test_ids_sort_by_time_and_are_never_the_same():
    made = [new_uid() for _ in range(2000)]
    assert len(set(made)) == 2000 and all(len(uid) == 32 and uid[12] == "7" for uid in made)
    assert [uid[:16] for uid in made] == sorted(uid[:16] for uid in made)


def test_what_is_noted_about_an_edit(method, generator):
    editor = editor_for(method, author="ada")
    image = random_image(generator)
    noted = dict(note="from the label", tags=["b", "a", "b"], expires="2999-01-01")
    edit = editor.edit(image, BRAND, "lenovo", **noted)
    assert (edit.author, edit.note, edit.tags, edit.expires) == (
        "ada", "from the label", ("a", "b"), "2999-01-01T00:00:00Z",
    )  # fmt: skip
    assert edit.method.lower() == method and edit.enabled and len(edit.image_sha256) == 16
    record = editor.record(edit.id)
    assert record["image_size"] == [24, 20] and len(record["thumbnail"]) < 3000
    assert json.loads(json.dumps(edit.as_dict()))["uid"] == edit.uid == record["uid"]
    changed = editor.annotate(edit.id, note="", tags=["c"], expires="")
    assert (changed.author, changed.note, changed.tags, changed.expires) == ("ada", "", ("c",), None)
    assert editor.undo().note == "from the label" and editor.redo().tags == ("c",)


@pytest.mark.parametrize(
    ("notes", "says"),
    [
        (dict(author=3), "author=3: pass a text"),
        (dict(tags="brand"), "tags='brand' is one text: pass a list"),
        (dict(tags=[""]), "tags=.*: pass texts that are not empty"),
        (dict(expires="tomorrow"), "expires='tomorrow' is no point in time"),
        (dict(expires=3.0), "expires=3.0: pass a text in ISO 8601"),
    ],
)
def test_what_cannot_be_noted(notes, says, generator):
    editor = editor_for("dualedit")
    with pytest.raises(ValueError, match=says):
        editor.edit(random_image(generator), BRAND, "lenovo", **notes)
    assert editor.edits == []


def test_a_disabled_edit_changes_no_bit_and_comes_back(method, generator):
    editor = editor_for(method)
    images = [random_image(generator) for _ in range(3)]
    inputs = editor.prompter.inputs([(images[0], BRAND)])

    def logits():
        with torch.no_grad():
            return editor.model(**inputs).logits

    editor.edit(images[1], COLOR, "red")
    without = logits()
    edit = editor.edit(images[0], BRAND, "lenovo")
    editor.edit(images[2], COLOR, "green")
    edited = logits()
    assert not torch.equal(edited, without)
    assert not editor.disable(edit.id).enabled and torch.equal(logits(), without)
    assert editor.explain(images[0], BRAND).edit.id != edit.id
    assert editor.explain(images[1], COLOR).fired and editor.explain(images[2], COLOR).fired
    assert [e.enabled for e in editor.edits] == [True, False, True]
    assert editor.enable(edit.id).enabled and torch.equal(logits(), edited)
    editor.undo()
    assert torch.equal(logits(), without)
    editor.redo()
    assert torch.equal(logits(), edited)


def test_an_expired_edit_answers_nothing(method, generator, monkeypatch):
    editor = editor_for(method)
    image = random_image(generator)
    editor.edit(image, BRAND, "lenovo", expires="2998-06-01")
    assert editor.explain(image, BRAND).fired
    from dualedit.records import seconds_of

    monkeypatch.setattr("time.time", lambda: seconds_of("2998-06-01T00:00:00Z"))
    assert not editor.explain(image, BRAND).fired and not editor.edits[0].enabled
    assert editor.explain(image, BRAND).why == "no edit is stored that may answer"


def test_filters(generator):
    editor = editor_for("dualedit")
    one = editor.edit(random_image(generator), BRAND, "lenovo", tags=["cars"], author="ada")
    two = editor.edit(random_image(generator), COLOR, "red", note="Lenovo too")
    editor.disable(two.id)
    ids = lambda **asked: [edit.id for edit in editor.filter(**asked)]  # noqa: E731
    assert ids() == [one.id, two.id] == ids(text="LENOVO") == ids(method="dualedit")
    assert ids(author="ada") == [one.id] == ids(tag="cars") and ids(enabled=False) == [two.id]
    assert ids(image=one.image_sha256[:6]) == [one.id] and ids(since="2998-01-01") == []
    assert ids(until="2998-01-01", text="red") == [two.id] == ids(where=lambda e: e.target == "red")
    with pytest.raises(ValueError, match="since='soon'"):
        editor.filter(since="soon")


def test_policies_are_followed_logged_and_noted(generator, caplog):
    image = random_image(generator)
    editor = editor_for("balancedit", policies=Policies(repeated="refuse", changed="refuse"))
    first = editor.edit(image, BRAND, "lenovo")
    for target, kind in (("Lenovo", "repeated"), ("acer", "changed")):
        with pytest.raises(ValueError, match=f"edit {first.id} .* the policy for that is {kind}='refuse'"):
            editor.edit(image, BRAND, target)
        assert editor.edits == [first]
    with caplog.at_level(logging.INFO, "dualedit.policies"):
        editor.policies = Policies()
        second = editor.edit(image, BRAND, "acer")
    assert "changed: edit 1" in caplog.text and "policy replace" in caplog.text
    [noted] = second.overlaps
    assert (noted["id"], noted["uid"], noted["kind"], noted["policy"]) == (1, first.uid, "changed", "replace")
    with pytest.raises(ValueError, match="policies: inside='drop': choose one of"):
        Policies(inside="drop")


@pytest.mark.parametrize("policy", ["nearest", "replace", "refuse"])
def test_opposite_answers_at_near_keys(policy, generator):
    editor = editor_for("dualedit", threshold=-1.0, policies=Policies(opposite=policy))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The edit answers everything")
        first = editor.edit(random_image(generator), BRAND, "lenovo")
        if policy == "refuse":
            with pytest.raises(ValueError, match="gives another answer, and the policy .* opposite='refuse'"):
                editor.edit(random_image(generator), BRAND, "acer")
            assert editor.edits == [first]
            return
        second = editor.edit(random_image(generator), BRAND, "acer")
    assert second.overlaps[0]["kind"] == "opposite" and second.overlaps[0]["policy"] == policy
    if policy == "replace":
        assert editor.edits == [second] and [old["id"] for old in second.replaces] == [first.id]
        assert editor.undo() == second and editor.edits == [first]
    else:
        [conflict] = editor.conflicts()
        assert (conflict.first, conflict.second) == (first, second) and not conflict.same_question


def test_the_nearest_three_are_explained(method, generator):
    editor = editor_for(method)
    images = [random_image(generator) for _ in range(4)]
    edits = [editor.edit(image, BRAND, "lenovo") for image in images]
    why = editor.explain(images[2], BRAND)
    assert why.fired and why.edit == edits[2] and len(why.nearest) == 3 and why.nearest[0].edit == edits[2]
    assert why.nearest[0].why == "answers: the nearest, and within its radius"
    assert why.nearest[0].distance == pytest.approx(why.distance, abs=1e-4)
    assert why.why.startswith(f"edit {edits[2].id} answers (distance ")
    rest = [near.distance for near in why.nearest[1:]]
    assert rest == sorted(rest)
    for near in why.nearest[1:]:
        nearer = "within its radius, and another edit is nearer"
        assert near.why == (nearer if near.distance <= near.radius else "outside its radius")


def test_stored_edits_are_asked_again(generator):
    editor = editor_for("balancedit", keep_failed=False)
    image = random_image(generator)
    edit, other = editor.edit(image, BRAND, "lenovo"), editor.edit(random_image(generator), COLOR, "red")
    editor.disable(other.id)
    found = editor.check()
    assert [(each.answers, each.shadowed_by) for each in found] == [(True, None), (None, None)]
    group = editor.adapter.group  # another edit with the same key and a lower number goes first
    rows = group.rows(group.everything(), edit.id)
    editor.remove(edit.id)
    group.add(rows, {"target": "acer", "prompt": BRAND, "image_sha256": "ffff"}, 8)
    group.add(rows, {**editor.record(other.id), "prompt": BRAND, "target": "lenovo", "disabled": False}, 9)
    shadowed = editor.check([9])[0]
    assert shadowed.shadowed_by == 8 and "edit 8 is looked up in its place" in shadowed.why
    assert editor.check([8])[0].answers is None and "not kept" in editor.check([8])[0].why
    asked = editor.check([8], images={"ffff": image})[0]
    assert asked.answers is False and asked.answer == "lenovo"


def test_replacing_tells_the_same_question_another_answer(generator):
    editor = editor_for("balancedit")
    image = random_image(generator)
    edit = editor.edit(image, BRAND, "lenovo", note="old", tags=["x"])
    new = editor.replace(edit.id, "acer", note="new")
    assert editor.edits == [new] and (new.target, new.note, new.tags) == ("acer", "new", ("x",))
    assert editor.answer(image, BRAND) == "acer"
    with pytest.raises(KeyError, match="edit_id=99"):
        editor.replace(99, "dell")


def test_an_export_is_told_to_another_model(generator, tmp_path):
    editor = editor_for("balancedit")
    image = random_image(generator)
    one = editor.edit(image, BRAND, "lenovo", note="Zürich", tags=["a"])
    two = editor.edit(random_image(generator), COLOR, "red")
    editor.disable(two.id)
    assert editor.export(tmp_path / "all.jsonl") == 2
    other = editor_for("balancedit")
    told = other.import_edits(tmp_path / "all.jsonl", progress=False)
    assert [(e.prompt, e.target, e.note, e.tags, e.enabled) for e in told] == [
        (BRAND, "lenovo", "Zürich", ("a",), True), (COLOR, "red", "", (), False),
    ]  # fmt: skip
    assert other.answer(image, BRAND) == "lenovo" and told[0].uid != one.uid
    assert other.import_edits(tmp_path / "all.jsonl", progress=False) == []  # they are here already
    line = json.loads((tmp_path / "all.jsonl").read_text().splitlines()[0])
    line.pop("picture")
    (tmp_path / "bare.jsonl").write_text(json.dumps(line))
    third = editor_for("balancedit")
    with pytest.raises(ValueError, match="the export holds no picture of"):
        third.import_edits(tmp_path / "bare.jsonl", progress=False)
    images = {one.image_sha256: image}
    assert third.import_edits(tmp_path / "bare.jsonl", images, progress=False)[0].target == "lenovo"


def test_edits_of_a_table(generator, tmp_path):
    random_image(generator).save(tmp_path / "one.png")
    (tmp_path / "edits.csv").write_text(
        "image,question,answer,rephrases,tags,author\n"
        f'one.png,"{BRAND}",lenovo,"what is it ?|{COLOR}",a|b,ada\n'
    )
    editor = editor_for("balancedit")
    [edit] = editor.import_edits(tmp_path / "edits.csv", progress=False)
    assert (edit.prompt, edit.target, edit.tags, edit.author) == (BRAND, "lenovo", ("a", "b"), "ada")


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.jsonl", "{", "line 1: no JSON"),
        ("a.jsonl", "\n[1]", "line 2: list, not a mapping"),
        ("a.jsonl", '{"prompt": "p"}', "line 1: target is None: it takes a text"),
        ("a.jsonl", '{"prompt": "p", "target": "t", "colour": 1}', "'colour' is not known; there are"),
        ("a.jsonl", '{"prompt": "p", "target": "t", "image": "no.png"}', "no such file"),
        ("a.jsonl", '{"prompt": "p", "target": "t", "image": 3}', "it takes the path"),
        ("a.jsonl", '{"prompt": "p", "target": "t", "uid": "x", "picture": "?"}', "the edit is damaged"),
        ("a.csv", "prompt,target\nonly one\n", "not as many columns"),
        ("a.csv", b"\xff\xfe", "no text in UTF-8"),
    ],
)
def test_files_of_edits_that_cannot_be(name, text, says, tmp_path):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    editor = editor_for("dualedit")
    with pytest.raises(ValueError, match=says):
        editor.import_edits(tmp_path / name, progress=False)
    assert editor.edits == []


def test_two_memories_become_one(method, generator):
    one, other = editor_for(method), editor_for(method)
    images = [random_image(generator) for _ in range(3)]
    shared = one.edit(images[0], BRAND, "lenovo")
    one.merge(other)  # nothing to take over
    assert other.merge(one).added[0].uid == shared.uid
    newer = other.edit(images[0], BRAND, "acer")
    own = one.edit(images[1], COLOR, "red")
    there = other.edit(images[2], COLOR, "green")
    before = one.edits
    merged = one.merge(other)
    assert [e.uid for e in merged.added] == [newer.uid, there.uid]
    assert [e.uid for e in merged.replaced] == [shared.uid]
    assert {e.uid for e in one.edits} == {own.uid, newer.uid, there.uid}
    assert one.answer(images[0], BRAND) == other.answer(images[0], BRAND)
    again = one.merge(other)
    assert again.added == [] and again.known == 2
    one.undo()
    assert one.edits == before
    back = other.merge(one)  # it holds the older edit of the first picture again
    assert [e.uid for e in back.older] == [shared.uid]


def test_memories_that_do_not_fit_are_not_merged(generator):
    one, other = editor_for("dualedit"), editor_for("balancedit")
    other.edit(random_image(generator), BRAND, "lenovo")
    with pytest.raises(ValueError, match=r"its adapter 'default' \(BalancEdit\) fits none of these"):
        one.merge(other)
    assert one.edits == []
