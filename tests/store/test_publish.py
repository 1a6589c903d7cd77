"""From a folder of edits to a store: what is written, what is read again, and what is refused."""

import json
import os
import shutil
import signal
import threading
import time

import pytest
import torch
from dualedit import load_edits, save_edits
from dualedit.cli import main
from dualedit.editing import remove_edit
from dualedit.folder import Damaged
from dualedit.store import Store, publish
from dualedit.store import places as places_module
from dualedit.store.manifest import EDITS, MANIFEST, VERSIONS, edit_name, version_name
from dualedit.store.publishing import SHARD_EDITS
from dualedit.tuners.adapter import active_adapter
from tiny_models import LLAVA, METHODS, editor_of, row_of, store


@pytest.fixture(params=METHODS)
def method(request):
    return request.param


@pytest.fixture
def made(method, generator, tmp_path):
    """A model with three edits, its questions, the folder that they are saved in."""
    model = editor_of(LLAVA, method)
    inputs = LLAVA.questions(6, generator)
    for row in range(3):
        store(model, row_of(inputs, row), generator)
    save_edits(model, tmp_path / "edits")
    return model, inputs, tmp_path / "edits"


def add(model, inputs, row, folder, generator):
    edit = store(model, row_of(inputs, row), generator)
    save_edits(model, folder)
    return edit


def note(model, number, **more):
    group = active_adapter(model).group
    group.note(number, {**group.first.record(number), **more})


def same_rows(model, read):
    """Whether a store that was read holds the edits of a model's active adapter, bit for bit."""
    group = active_adapter(model).group
    moment = read.now()
    assert moment.ids.tolist() == group.ids()
    snapshots, records = group.listed()
    for number, record in records.items():
        stored = read.edit(moment.file_of(number))
        assert stored.record == record
        rows = group.rows(snapshots, number)
        assert len(stored.tables) == len(rows)
        for layer, tables in rows.items():
            theirs = next(t for memory, t in stored.tables.items() if f".{layer}." in f".{memory}.")
            assert set(theirs) == set(tables)
            for name, table in tables.items():
                assert torch.equal(theirs[name], table), (number, name)
    gate = snapshots[group.gate_name]
    assert torch.equal(moment.keys, gate.tables["key"])
    assert torch.equal(moment.radius, gate.tables["radius"].float())
    return True


def test_a_store_holds_what_the_folder_holds(made, tmp_path):
    model, _, folder = made
    done = publish(folder, tmp_path / "store")
    assert (done.version, done.edits, done.added, done.changed, done.removed) == (1, 3, 3, 0, 0)
    read = Store(tmp_path / "store")
    assert same_rows(model, read)
    again = publish(folder, tmp_path / "store")
    assert (again.version, again.added, again.changed, again.removed) == (1, 0, 0, 0)


def test_only_what_changed_is_written(made, tmp_path, generator):
    model, inputs, folder = made
    publish(folder, tmp_path / "store")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "store").rglob("*.safetensors")}
    added = add(model, inputs, 3, folder, generator)
    done = publish(folder, tmp_path / "store")
    assert (done.version, done.added, done.changed, done.removed) == (2, 1, 0, 0)
    after = {p: p.stat().st_mtime_ns for p in (tmp_path / "store").rglob("*.safetensors")}
    assert all(after.get(path) == at for path, at in before.items())
    new = sorted(p.relative_to(tmp_path / "store").parts[0] for p in set(after) - set(before))
    assert new == ["codebook", "edits"] and edit_name(added.id, 1) == f"{EDITS}/{added.id}-v1.safetensors"


def test_removed_and_brought_back(made, tmp_path, generator):
    model, inputs, folder = made
    publish(folder, tmp_path / "store")
    read = Store(tmp_path / "store")
    old = read.now()
    number = int(old.ids[1])
    remove_edit(model, number)
    save_edits(model, folder)
    assert publish(folder, tmp_path / "store").removed == 1
    assert read.refresh() and number not in read.now().ids.tolist()
    with pytest.raises(KeyError, match=f"edit_id={number}"):
        read.now().file_of(number)
    # An answer that began with the version before still has its edit.
    assert read.edit(read.at(old.version).file_of(number)).tables
    assert Store(tmp_path / "store").at(old.version).ids.tolist() == old.ids.tolist()


def test_a_note_makes_a_new_version_of_the_edit(made, tmp_path):
    model, _, folder = made
    publish(folder, tmp_path / "store")
    read = Store(tmp_path / "store")
    first = read.now().file_of(1)
    note(model, 1, disabled=True)
    save_edits(model, folder)
    assert publish(folder, tmp_path / "store").changed == 1
    assert read.refresh()
    assert read.now().file_of(1).version == 2 and read.now().answering().tolist() == [False, True, True]
    assert read.edit(first).record != read.edit(read.now().file_of(1)).record  # both are there


def test_an_adapter_without_its_edits_is_what_peft_loads(made, tmp_path):
    model, _, folder = made
    publish(folder, tmp_path / "store")
    file = next((tmp_path / "store" / "adapters").glob("*/adapter_config.json"))
    again = load_edits(LLAVA.build(), file.parent)
    assert len(active_adapter(again).group) == 0
    settings, weights = Store(tmp_path / "store").adapter()
    for name, weight in model.state_dict().items():
        plain = name.replace(".default", "")
        if plain in weights and "memory" not in plain:
            assert torch.equal(weights[plain], weight), name
    assert settings["peft_type"] == model.peft_config["default"].peft_type


def test_many_blocks(method, tmp_path, generator, monkeypatch):
    monkeypatch.setattr("dualedit.store.publishing.SHARD_EDITS", 2)
    assert SHARD_EDITS > 2
    model = editor_of(LLAVA, method)
    inputs = LLAVA.questions(6, generator)
    for row in range(5):
        store(model, row_of(inputs, row), generator)
    save_edits(model, tmp_path / "edits")
    publish(tmp_path / "edits", tmp_path / "store")
    read = Store(tmp_path / "store")
    assert [shard.block for shard in read.now().manifest.shards] == [0, 1, 2] and same_rows(model, read)
    shards = read.now().shards
    remove_edit(model, 3)
    save_edits(model, tmp_path / "edits")
    publish(tmp_path / "edits", tmp_path / "store")
    assert read.refresh() and same_rows(model, read)
    kept = [shard for shard in read.now().shards if shard in shards]
    assert len(kept) == 2 and all(read.now().shards[s] is shards[s] for s in kept)  # not read again


def test_from_the_command_line(made, tmp_path, capsys):
    _, _, folder = made
    assert main(["publish", str(folder), str(tmp_path / "store"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["added"] == 3
    assert main(["publish", str(folder), str(tmp_path / "store")]) == 0
    assert "nothing new" in capsys.readouterr().out
    assert main(["publish", str(tmp_path / "nowhere"), str(tmp_path / "store")]) == 2
    assert "nowhere" in capsys.readouterr().err


# ---------------------------------------------------------------------- refused by name


def test_a_store_of_another_folder_is_refused(made, tmp_path, generator):
    _, inputs, folder = made
    publish(folder, tmp_path / "store")
    other = editor_of(LLAVA, "dualedit")
    store(other, row_of(inputs, 0), generator)
    save_edits(other, tmp_path / "other")
    with pytest.raises(ValueError, match="published from another folder"):
        publish(tmp_path / "other", tmp_path / "store")


def test_nothing_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="No store"):
        Store(tmp_path / "store")


@pytest.mark.parametrize("where", ["edits", "codebook", "adapters", MANIFEST])
@pytest.mark.parametrize("how", ["torn", "flipped", "gone"])
def test_damage_is_refused_by_name(made, tmp_path, where, how):
    _, _, folder = made
    target = tmp_path / "store"
    publish(folder, target)
    read = Store(target)
    moment = read.now()
    file = target / where if where == MANIFEST else sorted((target / where).rglob("*.safetensors"))[0]
    data = bytearray(file.read_bytes())
    if how == "gone":
        file.unlink()
    else:
        data = data[: len(data) // 2] if how == "torn" else data
        if how == "flipped":
            data[len(data) // 2] ^= 1
        file.write_bytes(data)
    if where == "edits":
        number = int(file.name.split("-")[0])
        with pytest.raises((Damaged, FileNotFoundError), match=file.name):
            read.edit(moment.file_of(number))
        others = [n for n in moment.ids.tolist() if n != number]
        assert all(read.edit(moment.file_of(n)).tables for n in others)  # the rest is served
    elif where == MANIFEST and how == "gone":
        assert Store(target).now().version == 1  # the version's own file is there
    else:
        with pytest.raises((Damaged, FileNotFoundError), match=file.name):
            Store(target).adapter()
    assert read.now() is moment


def test_a_manifest_of_the_future(made, tmp_path):
    _, _, folder = made
    publish(folder, tmp_path / "store")
    file = tmp_path / "store" / MANIFEST
    file.write_text(file.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(ValueError, match="format 2.*newer version"):
        Store(tmp_path / "store")


# ---------------------------------------------------------------------- stopped at any point, and followed


def killed_at(count, folder, target):
    """Publish in another process that is killed before its n-th change of the disk; whether it was."""
    pid = os.fork()
    if pid == 0:
        left = [count]

        def before(work):
            def counted(*args, **kwargs):
                left[0] -= 1
                if left[0] < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return work(*args, **kwargs)

            return counted

        for name in ("fsync", "replace", "link", "write"):
            setattr(os, name, before(getattr(os, name)))
        places_module.write_new = before(places_module.write_new)
        try:
            publish(folder, target)
        except BaseException:
            os._exit(1)
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    assert status in (0, signal.SIGKILL)
    return status != 0


def test_a_publisher_killed_anywhere_leaves_the_old_or_the_new(made, tmp_path, generator):
    model, inputs, folder = made
    target = tmp_path / "store"
    publish(folder, target)
    shutil.copytree(target, tmp_path / "first")
    old = Store(tmp_path / "first").now().ids.tolist()
    add(model, inputs, 3, folder, generator)
    remove_edit(model, 1)
    save_edits(model, folder)
    new = active_adapter(model).group.ids()
    seen, count = set(), 0
    while True:
        shutil.rmtree(target)
        shutil.copytree(tmp_path / "first", target)
        killed = killed_at(count, folder, target)
        ids = tuple(Store(target).now().ids.tolist())
        assert ids in (tuple(old), tuple(new)), count
        seen.add(ids)
        # The next publication finishes it, whatever was left.
        publish(folder, target)
        assert same_rows(model, Store(target))
        if not killed:
            break
        count += 1
    assert count > 8 and len(seen) == 2


def test_the_commit_without_its_copy_is_read(made, tmp_path, generator):
    model, inputs, folder = made
    target = tmp_path / "store"
    publish(folder, target)
    before = (target / MANIFEST).read_bytes()
    add(model, inputs, 3, folder, generator)
    publish(folder, target)
    (target / MANIFEST).write_bytes(before)
    assert (target / version_name(2)).is_file() and (target / VERSIONS).is_dir()
    assert Store(target).now().version == 2
    add(model, inputs, 4, folder, generator)
    assert publish(folder, target).version == 3


def test_replicas_follow_while_edits_come_and_go(made, tmp_path, generator):
    model, inputs, folder = made
    target = tmp_path / "store"
    publish(folder, target)
    replicas = [Store(target) for _ in range(2)]
    versions = [[], []]
    for replica, seen in zip(replicas, versions, strict=True):
        replica.follow(0.02, lambda moment, seen=seen: seen.append((moment.version, moment.ids.tolist())))
    wanted = {}
    try:
        for row in (3, 4, 5):
            add(model, inputs, row, folder, generator)
            done = publish(folder, target)
            wanted[done.version] = active_adapter(model).group.ids()
            began = time.monotonic()
            while any(r.now().version < done.version for r in replicas):
                assert time.monotonic() - began < 2.0
                time.sleep(0.005)
    finally:
        for replica in replicas:
            replica.close()
    for seen in versions:
        assert dict(seen) == wanted


def test_publishers_at_once_lose_nothing(made, tmp_path, generator):
    model, inputs, folder = made
    target = tmp_path / "store"
    errors = []

    def run():
        try:
            for _ in range(5):
                publish(folder, target)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    add(model, inputs, 3, folder, generator)
    for thread in threads:
        thread.join()
    assert errors == []
    publish(folder, target)
    assert same_rows(model, Store(target))


def test_old_versions_are_forgotten(made, tmp_path, monkeypatch):
    model, _, folder = made
    monkeypatch.setattr("dualedit.store.manifest.KEPT", 2)
    target = tmp_path / "store"
    for turn in range(5):
        note(model, 1, note=f"turn {turn}")
        save_edits(model, folder)
        publish(folder, target)
    assert len(list((target / VERSIONS).iterdir())) == 2
    assert len(list((target / "codebook").iterdir())) == 2
    assert same_rows(model, Store(target))


def test_a_place_of_fsspec(made, tmp_path, generator):
    pytest.importorskip("fsspec")
    model, inputs, folder = made
    address = f"memory://bucket/{tmp_path.name}"
    assert publish(folder, address).added == 3
    read = Store(address, cache=tmp_path / "cache")
    assert same_rows(model, read)
    add(model, inputs, 3, folder, generator)
    assert publish(folder, address).version == 2
    assert read.refresh() and same_rows(model, read)
    with pytest.raises(FileExistsError):
        read.place.create(version_name(2), b"")
