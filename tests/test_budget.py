"""Saved edits on a model with a budget for their values: the same answers, and the same folder."""

import copy

import pytest
import torch
from dualedit import Editor, load_edits, refresh_edits, save_edits
from dualedit.folder import read_folder
from dualedit.memory import Budget, tables
from dualedit.storage import compact_edits
from dualedit.tuners.adapter import active_adapter
from tiny_models import FITTING, LLAVA, METHODS, editor_of, random_image, row_of, sharp, store, tiny_processor

BRAND = "What brand is this computer?"


@pytest.fixture(params=METHODS)
def method(request):
    return request.param


def logits_of(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


def rows_of(model):
    group = active_adapter(model).group
    snapshots = group.everything()
    return {i: (group.first.record(i), group.rows(snapshots, i)) for i in group.ids()}


def assert_same(one, other):
    first, second = rows_of(one), rows_of(other)
    assert list(first) == list(second)
    for number, (record, rows) in first.items():
        assert second[number][0] == record
        for layer, each in rows.items():
            assert all(torch.equal(row, second[number][1][layer][name]) for name, row in each.items())


@pytest.fixture
def saved(method, generator, tmp_path, monkeypatch):
    """A model with edits in its own file and in its journal, questions, and the folder."""
    monkeypatch.setattr(tables, "_SMALL", 0)
    model, inputs = editor_of(LLAVA, method), LLAVA.questions(6, generator)
    for row in range(3):
        store(model, row_of(inputs, row), generator)
    save_edits(model, tmp_path / "edits")
    for row in (3, 4):
        store(model, row_of(inputs, row), generator)
        save_edits(model, tmp_path / "edits")
    group = active_adapter(model).group
    group.remove(2)
    group.note(1, {**group.first.record(1), "note": "Zürich"})
    save_edits(model, tmp_path / "edits")
    return model, inputs, tmp_path / "edits"


@pytest.mark.parametrize("budget", [0, "4kB", Budget("1GB", 0)])
def test_answers_and_edits_are_the_same(saved, budget, generator):
    model, inputs, folder = saved
    twin = load_edits(LLAVA.build(), folder, budget=budget)
    for _ in range(2):  # from the file, and from memory where it may be kept
        assert torch.equal(logits_of(twin, inputs), logits_of(model, inputs))
    out = twin.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert torch.equal(out, model.generate(**inputs, max_new_tokens=4, do_sample=False))
    assert_same(twin, model)
    group = active_adapter(twin).group
    used = group.bytes_used()
    assert 0 <= used["host"] <= Budget.of(budget).host and used["host"] + used["disk"] == used["values"] > 0
    assert active_adapter(model).group.bytes_used() == {
        "keys": used["keys"], "values": used["values"], "device": 0, "host": used["values"], "disk": 0,
    }  # fmt: skip
    twice = copy.deepcopy(twin)
    assert torch.equal(logits_of(twice, inputs), logits_of(model, inputs))


def test_what_is_changed_is_saved(saved, generator):
    """Adding, removing, noting, undoing, settings, compacting, and taking over what others have saved."""
    model, inputs, folder = saved
    twin = load_edits(LLAVA.build(), folder, budget=0)
    state = generator.get_state()
    edit = store(twin, row_of(inputs, 5), generator)
    active_adapter(twin).group.remove(1)
    save_edits(twin, folder)
    assert len(read_folder(folder).entries) == 4  # a line, not the folder anew
    assert refresh_edits(model) == 2
    assert_same(twin, model)
    plain = load_edits(LLAVA.build(), folder)
    assert_same(plain, twin)
    assert torch.equal(logits_of(plain, inputs), logits_of(twin, inputs))
    active_adapter(model).group.remove(edit.id)
    save_edits(model, folder)
    assert refresh_edits(twin) == 1 and edit.id not in active_adapter(twin).group
    generator.set_state(state)
    store(twin, row_of(inputs, 5), generator)
    twin.peft_config["default"].alpha = 0.75  # settings: the files are written anew
    save_edits(twin, folder)
    assert_same(load_edits(LLAVA.build(), folder), twin)
    compact_edits(folder)
    again = load_edits(LLAVA.build(), folder, budget=0)
    assert_same(again, twin)
    assert torch.equal(logits_of(again, inputs), logits_of(twin, inputs))


def test_peft_writes_the_edits_and_takes_none_away(saved, tmp_path):
    model, inputs, folder = saved
    compact_edits(folder)
    twin = load_edits(LLAVA.build(), folder, budget=0)
    twin.save_pretrained(tmp_path / "elsewhere")
    assert_same(load_edits(LLAVA.build(), tmp_path / "elsewhere"), twin)
    old = load_edits(LLAVA.build(), tmp_path / "elsewhere", budget=0)  # a folder without a manifest
    assert torch.equal(logits_of(old, inputs), logits_of(twin, inputs))
    before = logits_of(model, inputs)
    twin.save_pretrained(folder)  # over the file that its values are in
    try:
        assert torch.equal(logits_of(twin, inputs), before)
    except ValueError as error:  # of a safetensors that writes in place
        assert "was written over while its edits were in use" in str(error)
    assert torch.equal(logits_of(load_edits(LLAVA.build(), folder, budget=0), inputs), before)


@pytest.mark.parametrize("budget", [-1, "much", 0.5, True])
def test_a_budget_that_is_none_leaves_the_model_as_it_was(saved, budget):
    _, _, folder = saved
    base = LLAVA.build()
    with pytest.raises(ValueError, match=r"^budget=.*pass bytes"):
        load_edits(base, folder, budget=budget)
    assert not hasattr(base, "peft_config")


def test_an_editor_with_a_fallback(generator, tmp_path):
    """Both adapters' values stay in files; edits are told, taken back and told again."""
    model = editor_of(LLAVA, "dualedit", sharp(LLAVA), threshold=0.9)
    from dualedit import inject_balancedit

    inject_balancedit(model, layer=LLAVA.linear, adapter_name="more", **FITTING)
    model.peft_config["default"].fallback = "more"
    folder, pictures = tmp_path / "edits", [random_image(generator) for _ in range(4)]
    editor = Editor(model, tiny_processor(), folder=folder)
    for picture, target in zip(pictures[:3], ("lenovo", "red", "green"), strict=True):
        editor.edit(picture, BRAND, target, keep_failed=True)
    compact_edits(folder)
    editor.refresh()
    twin = Editor(load_edits(sharp(LLAVA), folder, budget=0), tiny_processor(), folder=folder)
    asked = [(picture, BRAND) for picture in pictures]
    assert twin.answer_many(asked) == editor.answer_many(asked)
    made = twin.edit(pictures[3], BRAND, "red", keep_failed=True)
    told = twin.answer_many(asked)
    twin.remove(1)
    twin.undo()
    twin.disable(made.id)
    twin.enable(made.id)
    assert twin.answer_many(asked) == told
    editor.refresh()
    assert editor.answer_many(asked) == told and len(editor.edits) == 4


@pytest.mark.parametrize("kind", ["bfloat16", "int8", "float8"])
def test_keys_and_values_in_fewer_bytes(kind, generator, tmp_path):
    """Smaller by a half or nearly three quarters; nearly the same answers, wherever they lie."""
    inputs = LLAVA.questions(3, generator)
    state = generator.get_state()
    models = {}
    for each in ("native", kind):
        generator.set_state(state)
        models[each] = editor_of(LLAVA, "dualedit", kv_dtype=each)
        for row in range(2):
            store(models[each], row_of(inputs, row), generator)
    whole, small = (active_adapter(m).group.bytes_used()["values"] for m in models.values())
    assert small == whole // 2 if kind == "bfloat16" else 0.25 * whole < small <= 0.32 * whole
    base = logits_of(LLAVA.build(), inputs)
    near, want = logits_of(models[kind], inputs), logits_of(models["native"], inputs)
    assert torch.equal(near[2], base[2]) and not torch.equal(near[0], base[0])
    assert float((near - want).norm()) < 0.1 * float((want - base).norm())
    save_edits(models[kind], tmp_path / "edits")
    for budget in (None, 0):
        loaded = load_edits(LLAVA.build(), tmp_path / "edits", budget=budget)
        assert torch.equal(logits_of(loaded, inputs), near)
        assert_same(loaded, models[kind])


def test_image_tokens_that_are_hardly_read_are_dropped(generator):
    inputs = LLAVA.questions(2, generator)
    lengths, outputs, state = [], [], generator.get_state()
    for share in (1.0, 0.999999, 0.5):
        generator.set_state(state)
        model = editor_of(LLAVA, "dualedit", image_mass=share)
        store(model, row_of(inputs, 0), generator)
        memories = active_adapter(model).group.memories.values()
        lengths.append([int(memory.snapshot().length[0]) for memory in memories])
        outputs.append(logits_of(model, inputs))
    assert lengths[0] == lengths[1] and torch.equal(outputs[0], outputs[1])
    words = lengths[0][0] - len(LLAVA.image_tokens)
    assert all(words < n < m for n, m in zip(lengths[2], lengths[0], strict=True))
    assert not torch.equal(outputs[2], outputs[0]) and torch.equal(outputs[2][1], outputs[0][1])


@pytest.mark.parametrize(
    "field, value", [("kv_dtype", "int4"), ("kv_dtype", None), ("image_mass", 0), ("image_mass", "0.5"),
                     ("image_mass", 1.5)]
)  # fmt: skip
def test_bad_settings_are_refused_by_name(field, value):
    with pytest.raises(ValueError, match=f"^{field}="):
        editor_of(LLAVA, "dualedit", **{field: value})
