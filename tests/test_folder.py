"""The folder of saved edits: what a save writes, what two writers make of it, and what damage is."""

import json
import multiprocessing
import os
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from dualedit import Editor, load_edits, refresh_edits, save_edits
from dualedit.folder import Damaged, FolderLocked, Writer, read_folder
from dualedit.folder.lock import writing_in
from dualedit.folder.sealing import migrate
from dualedit.folder.verifying import verify
from dualedit.records import uid_of
from dualedit.saved import origin_of
from dualedit.storage import compact_edits
from dualedit.tuners.adapter import active_adapter, adapter_of
from peft import PeftModel, peft_model
from safetensors.torch import load_file
from tiny_models import FITTING, LLAVA, METHODS, editor_of, row_of, sharp, store, tiny_processor

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
OLD = Path(__file__).parent / "saved_folders"


@pytest.fixture(params=METHODS)
def method(request):
    return request.param


def logits_of(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


def state(model):
    """The edits of all adapters, bit for bit: records and rows by adapter and number."""
    found = {}
    for name in model.peft_config:
        group = adapter_of(model.get_base_model(), name).group
        snapshots, records = group.listed()
        for number, record in records.items():
            rows = group.rows(snapshots, number)
            tables = {
                f"{m}.{t}": row.numpy().tobytes() for m, each in rows.items() for t, row in each.items()
            }
            found[name, number] = (record, tables)
    return found


@pytest.fixture
def saved(method, generator, tmp_path):
    """A model with one edit, questions, and the folder that it is saved in."""
    model = editor_of(LLAVA, method)
    inputs = LLAVA.questions(4, generator)
    store(model, row_of(inputs, 0), generator)
    folder = tmp_path / "edits"
    save_edits(model, folder)
    return model, inputs, folder


def files_of(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(".lock")
    }


# ---------------------------------------------------------------------- what a save writes


def test_an_edit_writes_itself_alone(saved, generator):
    model, inputs, folder = saved
    before = files_of(folder)
    store(model, row_of(inputs, 1), generator)
    save_edits(model, folder)
    after = files_of(folder)
    journal = "journal-000001.jsonl"
    assert {name for name in after if after[name] != before.get(name)} == {
        journal, "segments/00000001.safetensors",
    }  # fmt: skip
    assert after[journal].startswith(before[journal]) and after[journal].count(b"\n") == 1
    loaded = load_edits(LLAVA.build(), folder)
    assert state(loaded) == state(model)
    assert torch.equal(logits_of(loaded, inputs), logits_of(model, inputs))
    save_edits(model, folder)
    assert files_of(folder) == after  # nothing new, nothing written
    by_peft = PeftModel.from_pretrained(LLAVA.build(), folder)
    assert state(by_peft) == state(model)


def test_removing_noting_and_bringing_back_are_lines(saved, generator):
    model, inputs, folder = saved
    second = store(model, row_of(inputs, 1), generator)
    save_edits(model, folder)
    group = active_adapter(model).group
    rows, record = group.rows(group.everything(), 1), group.first.record(1)
    group.remove(1)
    save_edits(model, folder)
    assert state(load_edits(LLAVA.build(), folder)) == state(model)
    group.add(rows, record, 1)
    group.note(second.id, {**group.first.record(second.id), "note": "Zürich ☃"})
    save_edits(model, folder)
    assert state(load_edits(LLAVA.build(), folder)) == state(model)
    entries = read_folder(folder).entries
    assert [[change["op"] for change in entry.changes] for entry in entries] == [
        ["add"], ["remove"], ["add", "note"],
    ]  # fmt: skip
    assert "generation" in json.loads((folder / "manifest.json").read_text())
    assert len(list(folder.glob("segments/*"))) == 2


def test_numbers_are_not_used_again_by_the_next_process(saved, generator):
    model, inputs, folder = saved
    last = store(model, row_of(inputs, 1), generator)
    save_edits(model, folder)
    active_adapter(model).group.remove(last.id)
    save_edits(model, folder)
    for compacted in (False, True):
        if compacted:
            compact_edits(folder)
        loaded = load_edits(LLAVA.build(), folder)
        assert active_adapter(loaded).group.next_id() == last.id + 1


def test_trained_parameters_and_settings_are_written_anew(saved, generator):
    model, inputs, folder = saved
    store(model, row_of(inputs, 1), generator)
    save_edits(model, folder)
    config = model.peft_config["default"]
    config.alpha = 0.25
    save_edits(model, folder)
    view = read_folder(folder)
    assert view.manifest.generation == 2 and view.entries == []
    assert load_edits(LLAVA.build(), folder).peft_config["default"].alpha == 0.25
    parameters = [p for n, p in model.named_parameters() if "dualedit_adapter" in n]
    for parameter in parameters:
        parameter.data.mul_(1.5)  # moves no version counter
    save_edits(model, folder)
    assert read_folder(folder).manifest.generation == (3 if parameters else 2)
    loaded = load_edits(LLAVA.build(), folder)
    assert torch.equal(logits_of(loaded, inputs), logits_of(model, inputs)) and state(loaded) == state(model)


@pytest.mark.filterwarnings("ignore:.*was not repaired")
def test_files_moved_while_they_are_loaded_are_read_anew(saved, generator, monkeypatch):
    """PEFT reads the file of the save before, and the new one comes to its place before that is noticed."""
    model, inputs, folder = saved
    finish = Writer._finish

    def stopped(*_):
        raise OSError("stopped before the files are in their places")

    monkeypatch.setattr(Writer, "_finish", stopped)
    store(model, row_of(inputs, 1), generator)
    model.peft_config["default"].alpha = 0.25  # all files are written anew
    save_edits(model, folder)
    assert (folder / ".next-000002" / WEIGHTS).is_file()
    read = peft_model.load_peft_weights
    moved = []

    def reading(*args, **kwargs):
        found = read(*args, **kwargs)
        finish(Writer(folder), read_folder(folder).manifest)
        moved.append(not (folder / ".next-000002" / WEIGHTS).exists())
        return found

    monkeypatch.setattr(peft_model, "load_peft_weights", reading)
    loaded = load_edits(LLAVA.build(), folder)
    assert moved == [True]
    assert state(loaded) == state(model)


def test_pefts_own_save_writes_the_same_folder(saved, generator):
    model, inputs, folder = saved
    store(model, row_of(inputs, 1), generator)
    save_edits(model, folder)
    active_adapter(model).group.remove(1)
    model.save_pretrained(folder)
    assert state(load_edits(LLAVA.build(), folder)) == state(model)
    assert not (folder / "manifest.json").exists() and not (folder / "segments").exists()
    store(model, row_of(inputs, 2), generator)
    save_edits(model, folder)
    assert state(load_edits(LLAVA.build(), folder)) == state(model)
    model.peft_config["default"].save_pretrained(folder)  # the settings alone: the edits stay
    assert state(load_edits(LLAVA.build(), folder)) == state(model)


def test_two_adapters_are_of_one_commit(generator, tmp_path):
    model = editor_of(LLAVA, "dualedit")
    inputs = LLAVA.questions(3, generator)
    store(model, row_of(inputs, 0), generator)
    from dualedit import inject_balancedit
    from dualedit.tuners.adapters import disabled

    inject_balancedit(model, adapter_name="more", layer=LLAVA.linear, alpha=0.9, max_steps=3, rank=4)
    model.peft_config["default"].fallback = "more"
    save_edits(model, tmp_path / "edits")
    base = model.get_base_model()
    gate = adapter_of(base, "default").group.first
    key = torch.ones(adapter_of(base, "more").group.first.edit_tables["key"])
    rows = {"key": key, "radius": torch.tensor(0.5)}
    tables = adapter_of(base, "more").group.first.edit_tables
    rows |= {name: torch.rand(shape) for name, shape in tables.items() if name not in rows}
    layer = next(iter(adapter_of(base, "more").group.memories))
    for number in (5, 6):
        adapter_of(base, "more").group.add({layer: rows}, {"uid": f"u{number}"}, number)
        save_edits(model, tmp_path / "edits")
    with disabled(model, "more"):
        store(model, row_of(inputs, 1), generator)
    adapter_of(base, "more").group.remove(5)
    save_edits(model, tmp_path / "edits")
    assert gate.touched == {}
    view = read_folder(tmp_path / "edits")
    assert {change["adapter"] for change in view.entries[-1].changes} == {"default", "more"}
    assert state(load_edits(LLAVA.build(), tmp_path / "edits")) == state(model)
    compact_edits(tmp_path / "edits")
    assert state(load_edits(LLAVA.build(), tmp_path / "edits")) == state(model)


def test_compacting_keeps_every_bit(saved, generator):
    model, inputs, folder = saved
    for row in (1, 2, 3):
        store(model, row_of(inputs, row), generator)
        save_edits(model, folder)
    active_adapter(model).group.remove(2)
    save_edits(model, folder)
    report = verify(folder)
    assert report["commits"] == 4 and report["edits"] == {"default": 3} and report["notes"] == []
    assert compact_edits(folder) == 4
    assert verify(folder)["commits"] == 0 and not (folder / "segments").exists()
    loaded = load_edits(LLAVA.build(), folder)
    assert state(loaded) == state(model) and torch.equal(logits_of(loaded, inputs), logits_of(model, inputs))
    store(model, row_of(inputs, 1), generator)  # a model that knows the folder as it was
    save_edits(model, folder)
    assert state(load_edits(LLAVA.build(), folder)) == state(model)


# ---------------------------------------------------------------------- several writers


def test_two_models_that_save_lose_nothing(saved, generator):
    """Each with edits that the other does not know, of the same number; one removes, one annotates."""
    model, inputs, folder = saved
    other = load_edits(LLAVA.build(), folder)
    mine = store(model, row_of(inputs, 1), generator)
    theirs = store(other, row_of(inputs, 2), generator)
    assert mine.id == theirs.id == 2
    save_edits(other, folder)
    save_edits(model, folder)
    held = {uid_of(record, n): n for (_, n), (record, _) in state(load_edits(LLAVA.build(), folder)).items()}
    assert held[theirs.uid] == 2 and held[mine.uid] == 3 and len(held) == 3
    assert refresh_edits(other) == 1 and state(other) == state(model)
    active_adapter(other).group.remove(1)
    save_edits(other, folder)
    store(model, row_of(inputs, 3), generator)
    compact_edits(folder)  # a third one
    save_edits(model, folder)
    assert refresh_edits(other) == 1
    assert state(other) == state(model) == state(load_edits(LLAVA.build(), folder))
    assert 1 not in active_adapter(model).group.ids() and len(state(model)) == 3


def test_a_folder_of_somebody_elses_edits_is_not_replaced(saved, generator, tmp_path):
    _, inputs, folder = saved
    stranger = editor_of(LLAVA, "dualedit" if "dualedit_memory" in str(files_of(folder)) else "balancedit")
    before = files_of(folder)
    with pytest.raises(ValueError, match="holds 1 edits that this model does not have .* overwrite=True"):
        save_edits(stranger, folder)
    assert files_of(folder) == before
    save_edits(stranger, folder, overwrite=True)
    assert state(load_edits(LLAVA.build(), folder)) == {}


def _hold(folder, ready, done):
    with writing_in(Path(folder)):
        ready.set()
        done.wait(20)


def test_the_message_of_a_held_lock_names_who_holds_it(saved, capsys):
    model, _, folder = saved
    context = multiprocessing.get_context("fork")
    ready, done = context.Event(), context.Event()
    holder = context.Process(target=_hold, args=(str(folder), ready, done))
    holder.start()
    assert ready.wait(20)
    try:
        with pytest.raises(FolderLocked, match=f"is being written by process {holder.pid}, since 20"):
            with Writer(folder, timeout=0.1).open():
                pass
        assert f"Waiting for process {holder.pid}" in capsys.readouterr().err
        load_edits(LLAVA.build(), folder)  # readers do not wait
    finally:
        done.set()
        holder.join()
    save_edits(model, folder)
    with writing_in(folder), writing_in(folder):  # the same thread may hold it again
        save_edits(model, folder)


# ---------------------------------------------------------------------- an editor on a folder


def editor_on(folder, generator):
    from dualedit import BalancEditConfig
    from peft import get_peft_model

    if folder.exists():
        model = load_edits(sharp(LLAVA), folder)
    else:
        model = get_peft_model(sharp(LLAVA), BalancEditConfig(layer=LLAVA.linear, alpha=0.9, **FITTING))
    return Editor(model, tiny_processor(), folder=folder)


@pytest.fixture
def quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The positive sample")
        yield


def test_an_editor_saves_each_change_before_it_counts(generator, tmp_path, quiet, monkeypatch):
    from tiny_models import random_image

    brand, folder = "what brand is this computer ?", tmp_path / "edits"
    editor = editor_on(folder, generator)
    images = [random_image(generator) for _ in range(3)]
    first = editor.edit(images[0], brand, "lenovo")

    def there():
        return {edit.id: edit for edit in editor_on(folder, generator).edits}

    assert there() == {1: first}
    second = editor.edit(images[1], brand, "acer")
    editor.disable(first.id)
    assert [edit.enabled for edit in there().values()] == [False, True]
    editor.undo()
    editor.remove(second.id)
    assert there() == {1: first}
    editor.undo()
    assert there() == {1: first, 2: second} and editor.redo() == second
    with monkeypatch.context() as patched:
        patched.setattr(
            os, "pwrite", lambda *args: (_ for _ in ()).throw(OSError(28, "No space left on device"))
        )
        with pytest.raises(OSError, match="No space"):
            editor.edit(images[2], brand, "dell")
        with pytest.raises(OSError, match="No space"):
            editor.remove(first.id)
    assert editor.edits == [first] and there() == {1: first}
    assert [entry.kind for entry in read_folder(folder).entries] == [
        "commit",
        "commit",
        "undo",
        "commit",
        "undo",
        "redo",
    ]


def test_an_editor_sees_what_others_have_saved(generator, tmp_path, quiet):
    from tiny_models import random_image

    brand, folder = "what brand is this computer ?", tmp_path / "edits"
    one = editor_on(folder, generator)
    images = [random_image(generator) for _ in range(3)]
    one.edit(images[0], brand, "lenovo")
    other = editor_on(folder, generator)
    theirs = other.edit(images[1], brand, "acer")
    assert one.refresh() == 1 and one.edits[-1] == theirs and one.answer(images[1], brand) == "acer"
    replaced = other.edit(images[0], brand, "dell")
    mine = one.edit(images[2], brand, "apple")  # brings the other's change along
    assert [edit.id for edit in one.edits] == [theirs.id, replaced.id, mine.id]
    with pytest.raises(ValueError, match="holds .* edits that this model does not have"):
        from dualedit import BalancEditConfig
        from peft import get_peft_model

        config = BalancEditConfig(layer=LLAVA.linear, alpha=0.9, **FITTING)
        Editor(get_peft_model(sharp(LLAVA), config), tiny_processor(), folder=folder)


# ---------------------------------------------------------------------- damage


def test_flipped_bits_and_swapped_tensors_are_refused(saved, generator, tmp_path):
    model, inputs, folder = saved
    store(model, row_of(inputs, 1), generator)
    save_edits(model, folder)
    names = [n for n in files_of(folder) if n != "README.md"]
    whole = files_of(folder)
    assert len(names) == 5
    for name in names:
        for place in (0, len(whole[name]) // 2, len(whole[name]) - 2):
            data = bytearray(whole[name])
            data[place] ^= 4
            (folder / name).write_bytes(data)
            with pytest.raises(ValueError, match="damaged|cut short"):
                load_edits(LLAVA.build(), folder)
            with pytest.raises(Damaged):
                verify(folder)
        (folder / name).write_bytes(whole[name])
    tensors = load_file(folder / WEIGHTS)
    swapped = dict(zip(tensors, reversed(tensors.values()), strict=True))
    from safetensors.torch import save_file

    save_file(swapped, folder / WEIGHTS)
    with pytest.raises(ValueError, match="is damaged|cut short"):
        load_edits(LLAVA.build(), folder)
    (folder / WEIGHTS).write_bytes(whole[WEIGHTS])
    load_edits(LLAVA.build(), folder)


def test_every_torn_tail_of_the_journal_is_cut_with_a_word(saved, generator):
    model, inputs, folder = saved
    states = [state(model)]
    for row in (1, 2):
        store(model, row_of(inputs, row), generator)
        save_edits(model, folder)
        states.append(state(model))
    journal = folder / "journal-000001.jsonl"
    data = journal.read_bytes()
    first = data.index(b"\n") + 1
    for length in range(0, len(data) + 1, 7):
        (folder / "journal-000001.jsonl").write_bytes(data[:length])
        view = read_folder(folder)
        whole = (length >= first) + (length == len(data))
        assert view.seq == whole and view.torn == length - [0, first, len(data)][whole]
    for length in (first - 1, first, len(data) - 1):
        copy = folder.parent / f"copy-{length}"
        shutil.copytree(folder, copy)
        (copy / journal.name).write_bytes(data[:length])
        with pytest.warns(
            UserWarning, match="is repaired: .*At most the change that was being written is lost"
        ):
            loaded = load_edits(LLAVA.build(), copy)
        assert state(loaded) == states[0 if length < first else 1]
        with warnings.catch_warnings():
            warnings.filterwarnings("error", ".*is repaired")
            assert state(load_edits(LLAVA.build(), copy)) == state(loaded)
        store(loaded, row_of(inputs, 3), generator)
        save_edits(loaded, copy)
        assert state(load_edits(LLAVA.build(), copy)) == state(loaded) and verify(copy)["notes"] == []


def test_a_damaged_line_in_the_middle_is_no_torn_tail(saved, generator):
    model, inputs, folder = saved
    for row in (1, 2):
        store(model, row_of(inputs, row), generator)
        save_edits(model, folder)
    journal = folder / "journal-000001.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    for wrong in ([lines[1]], [lines[1], lines[0]], [lines[0][:-2] + b"\n", lines[1]], [*lines, b"{}\n"]):
        journal.write_bytes(b"".join(wrong))
        with pytest.raises(ValueError, match=r"commit \d: the line is damaged .*Restore the folder"):
            load_edits(LLAVA.build(), folder)


def test_a_folder_whose_manifest_is_gone_is_no_folder_without_a_journal(saved, generator):
    model, inputs, folder = saved
    store(model, row_of(inputs, 1), generator)
    save_edits(model, folder)
    (folder / "manifest.json").unlink()
    with pytest.raises(ValueError, match="manifest.json is missing, and the folder has a journal"):
        load_edits(LLAVA.build(), folder)
    assert migrate(folder, "x") is True
    assert state(load_edits(LLAVA.build(), folder)) == state(model)


def test_the_folder_around_may_be_anybodys(saved):
    model, _, folder = saved
    (folder.parent / "manifest.json").write_text('{"name": "a web page"}')
    (folder.parent / "journal-2020.jsonl").write_text("{}")
    (folder.parent / "journal-000009.jsonl").write_text("{}")
    assert state(load_edits(LLAVA.build(), folder)) == state(model)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (dict(format=99), "has format 99, and this version of dualedit reads up to 1"),
        (dict(generation=-1), "is damaged"),
        (dict(adapters={"default": "../elsewhere"}), "is damaged"),
        (dict(files={}), "is damaged"),
        (dict(staged="/tmp"), "is damaged"),
    ],
)
def test_manifests_that_cannot_be(change, says, saved):
    from dualedit.folder.manifest import _check

    _, _, folder = saved
    content = json.loads((folder / "manifest.json").read_text()) | change
    content.pop("check")
    (folder / "manifest.json").write_text(json.dumps({**content, "check": _check(content)}))
    with pytest.raises(ValueError, match=says):
        load_edits(LLAVA.build(), folder)


def test_a_folder_changed_by_hand_is_taken_as_it_is_by_migrate(saved, generator):
    model, inputs, folder = saved
    store(model, row_of(inputs, 1), generator)
    save_edits(model, folder)
    assert migrate(folder, "x") is False
    config = json.loads((folder / CONFIG).read_text()) | {"alpha": 0.125}
    (folder / CONFIG).write_text(json.dumps(config))
    with pytest.raises(ValueError, match="dualedit migrate"):
        load_edits(LLAVA.build(), folder)
    assert migrate(folder, "x") is True
    loaded = load_edits(LLAVA.build(), folder)
    assert loaded.peft_config["default"].alpha == 0.125 and state(loaded) == state(model)
    (folder / "manifest.json").write_text("{")  # the journal goes on under a new one
    assert migrate(folder, "x") is True
    assert state(load_edits(LLAVA.build(), folder)) == state(model)


# ---------------------------------------------------------------------- folders of version 0.1


def test_a_folder_of_0_1_loads_for_ever(method, generator, tmp_path):
    folder = tmp_path / "edits"
    shutil.copytree(OLD / f"{method}-0.1", folder)
    asked = load_file(OLD / f"{method}-0.1.asked.safetensors")
    expected = asked.pop("logits")

    def answers(model):
        return logits_of(model, asked)[:, -1]

    before = files_of(folder)
    model = load_edits(editor_base(method), folder)
    torch.testing.assert_close(answers(model), expected)
    assert files_of(folder) == before and verify(folder)["format"] == 0
    held = state(model)
    active_adapter(model).group.remove(1)
    save_edits(model, folder)  # the same model may take one away
    assert list(state(load_edits(editor_base(method), folder))) == [("default", 2)]
    shutil.rmtree(folder)
    shutil.copytree(OLD / f"{method}-0.1", folder)
    assert migrate(folder, "x") is True and verify(folder)["format"] == 1
    assert state(load_edits(editor_base(method), folder)) == held
    model = load_edits(editor_base(method), folder)
    store(model, LLAVA.question(generator), generator)
    save_edits(model, folder)
    assert len(read_folder(folder).entries) == 1
    assert state(load_edits(editor_base(method), folder)) == state(model)


def editor_base(method):
    return LLAVA.build()


def test_a_fallback_of_0_1_loads_with_it(tmp_path):
    from PIL import Image

    folder = tmp_path / "edits"
    shutil.copytree(OLD / "both-0.1", folder)
    editor = Editor(load_edits(sharp(LLAVA), folder), tiny_processor())
    assert [(edit.id, edit.target, edit.method) for edit in editor.edits] == [
        (1, "lenovo", "BalancEdit"), (2, "red", "BalancEdit"),
    ]  # fmt: skip
    picture = Image.open(OLD / "both-0.1.png")
    assert editor.answer(picture, "what brand is this computer ?") == "lenovo"
    migrate(folder, "x")
    editor = Editor(load_edits(sharp(LLAVA), folder), tiny_processor(), folder=folder)
    editor.remove(2)
    again = Editor(load_edits(sharp(LLAVA), folder), tiny_processor())
    assert [edit.id for edit in again.edits] == [1] and read_folder(folder).seq == 1


# ---------------------------------------------------------------------- the disk, the terminal, the process


def test_a_full_disk_is_said_as_the_disk_says_it(saved, generator, monkeypatch):
    from safetensors import SafetensorError

    model, inputs, folder = saved
    before = files_of(folder)
    model.peft_config["default"].alpha = 0.25

    def full(*args, **kwargs):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(model, "save_pretrained", full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        save_edits(model, folder)
    assert caught.value.errno == 28 and files_of(folder) == before


def test_a_new_folder_is_synced_with_the_one_it_lies_in(generator, tmp_path, monkeypatch):
    synced, whole = [], os.fsync

    def noted(opened):
        synced.append(os.readlink(f"/proc/self/fd/{opened}"))
        whole(opened)

    monkeypatch.setattr(os, "fsync", noted)
    model = editor_of(LLAVA, "balancedit")
    save_edits(model, tmp_path / "new" / "edits")
    assert str(tmp_path / "new") in synced and str(tmp_path / "new" / "edits") in synced
    synced.clear()
    store(model, LLAVA.question(generator), generator)
    save_edits(model, tmp_path / "new" / "edits")
    store(model, LLAVA.question(generator), generator)
    synced.clear()
    save_edits(model, tmp_path / "new" / "edits")
    assert [Path(path).name for path in synced][-3:] == [
        "00000001.safetensors",
        "segments",
        "journal-000002.jsonl",
    ]


def test_what_a_folder_says_does_not_steer_the_terminal(saved, capsys):
    from dualedit.cli import main

    model, _, folder = saved
    group = active_adapter(model).group
    group.note(
        1, {"prompt": "\x1b[2Jwho\r\n?", "target": "a\x07b\u202e", "tags": ["\x1b]0;x\x07"], "note": 3}
    )
    save_edits(model, folder)
    assert main(["list", "-e", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "\\x1b[2Jwho\\r\\n?" in out and "a\\x07b\\u202e" in out
    assert all(c == "\n" or c.isprintable() for c in out)
    assert main(["show", "1", "-e", str(folder)]) == 0
    assert all(c == "\n" or c.isprintable() for c in capsys.readouterr().out)


@pytest.mark.parametrize("ids", [[1.5], [0.0], [-3]])
def test_numbers_that_are_none_are_one_line_in_the_terminal(ids, generator, tmp_path, capsys):
    from dualedit.cli import main
    from safetensors.torch import save_file

    model = editor_of(LLAVA, "balancedit")
    store(model, LLAVA.question(generator), generator)
    save_edits(model, tmp_path)
    (tmp_path / "manifest.json").unlink()
    tensors = load_file(tmp_path / WEIGHTS)
    for name in [name for name in tensors if name.endswith("edit_ids")]:
        tensors[name] = torch.tensor(ids)
    save_file(tensors, tmp_path / WEIGHTS)
    assert main(["list", "-e", str(tmp_path)]) == 2
    assert "edits count from 1" in capsys.readouterr().err


def test_the_commands_of_a_book(saved, capsys, tmp_path):
    """Without a model: switch, note, undo, redo, export, list as JSON, verify, compact."""
    from dualedit.cli import main

    model, _, folder = saved
    place = ["-e", str(folder)]

    def listed():
        capsys.readouterr()
        assert main(["list", "--json", *place]) == 0
        return json.loads(capsys.readouterr().out)

    assert main(["disable", "1", *place]) == 0 and listed()["edits"][0]["enabled"] is False
    assert main(["undo", *place]) == 0 and listed()["edits"][0]["enabled"] is True
    assert main(["redo", *place]) == 0 and listed()["edits"][0]["enabled"] is False
    assert main(["enable", "1", *place]) == 0
    assert main(["note", "1", *place, "--author", "ada", "--tag", "a", "--tag", "b", "--note", "why"]) == 0
    edit = listed()["edits"][0]
    assert (edit["author"], edit["tags"], edit["note"]) == ("ada", ["a", "b"], "why")
    assert main(["list", "--tag", "c", *place]) == 0 and "0 of them shown" in capsys.readouterr().out
    assert main(["remove", "1", *place]) == 0 and listed()["edits"] == []
    assert main(["undo", *place]) == 0 and listed()["edits"] == [edit]
    assert main(["export", str(tmp_path / "all.jsonl"), *place]) == 0
    assert json.loads((tmp_path / "all.jsonl").read_text())["note"] == "why"
    assert main(["verify", str(folder)]) == 0 and "is whole: 1 in default" in capsys.readouterr().out
    assert main(["compact", str(folder)]) == 0 and listed()["edits"] == [edit]
    assert main(["undo", *place]) == 2 and "Nothing to undo" in capsys.readouterr().err
    assert main(["note", "1", *place]) == 2 and "nothing to note" in capsys.readouterr().err
    assert main(["note", "1", *place, "--expires", "soon"]) == 2
    assert "--expires 'soon' is no point in time" in capsys.readouterr().err
    assert main(["show", "7", *place]) == 2 and "no edit 7 in" in capsys.readouterr().err
    refreshed = refresh_edits(model)
    assert refreshed == 1 and state(model) == state(load_edits(LLAVA.build(), folder))


def test_what_a_model_knows_of_its_folder_does_not_grow_with_what_is_noted(saved, generator):
    """Records hold pictures; once a commit is made or taken over, the memories have them and nothing else."""
    import pickle

    model, _, folder = saved
    other = load_edits(LLAVA.build(), folder)
    group = active_adapter(model).group
    rows, record = group.rows(group.everything(), 1), group.first.record(1)
    before = len(pickle.dumps(origin_of(model).view))
    for turn in range(10):
        number = group.add(rows, {**record, "uid": f"u{turn}", "image": "x" * 100_000})
        save_edits(model, folder)
        group.remove(number)
        save_edits(model, folder)
        refresh_edits(other)
    for each in (model, other):
        assert len(pickle.dumps(origin_of(each).view)) < before + 20 * 1000
    loaded = load_edits(LLAVA.build(), folder)  # of a journal that holds them
    held = loaded.peft_config["default"].saved_in
    assert len(pickle.dumps((origin_of(loaded).view, held))) < 2 * before + 20 * 1000
    assert state(loaded) == state(model) == state(other)


def test_every_command_of_a_book_prints_json(saved, capsys, tmp_path):
    from dualedit.cli import main as run

    model, _, folder = saved
    at, done = ["--edits", str(folder), "--json"], {}
    for name, arguments in {
        "list": at, "show": ["1", *at], "note": ["1", "--note", "Zürich", *at], "disable": ["1", *at],
        "enable": ["1", *at], "undo": at, "redo": at, "export": [str(tmp_path / "all.jsonl"), *at],
        "verify": [str(folder), "--json"], "compact": [str(folder), "--json"],
        "migrate": [str(folder), "--json"], "remove": ["1", *at],
    }.items():  # fmt: skip
        assert run([name, *arguments]) == 0, name
        done[name] = json.loads(capsys.readouterr().out)
    assert done["note"] == {"id": 1, "noted": {"note": "Zürich"}}
    assert done["disable"] == {"id": 1, "disabled": True} and done["enable"]["disabled"] is False
    assert done["undo"] == done["redo"] == [{"id": 1, "change": "note"}]
    assert done["export"]["edits"] == 1 and done["compact"]["commits"] == 5
    assert done["migrate"]["changed"] is False and done["remove"] == {"removed": [1], "left": 0}
    use = active_adapter(model).group.bytes_used()
    assert {name: done["list"]["bytes"][name] for name in ("keys", "values")} == {
        name: use[name] for name in ("keys", "values")
    }
