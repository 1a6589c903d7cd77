"""The tables of edits: growing, shrinking, snapshots, saving, and all layers or none."""

import copy
import json
import threading

import pytest
import torch
from dualedit.memory import EditMemory, MemoryGroup
from dualedit.memory.routing import cosine_radius

D, M = 6, 4


def gate_memory(**more):
    return EditMemory({"key": (D,), "radius": ()}, {"k_text": M, "v_text": M}, **more)


def rows_for(memory, generator, tokens=None, dtype=torch.float32):
    tokens = int(torch.randint(1, 6, (1,), generator=generator)) if tokens is None else tokens
    rows = {
        name: torch.randn(shape, generator=generator).to(dtype) for name, shape in memory.edit_tables.items()
    }
    return rows | {
        name: torch.randn((tokens, *shape), generator=generator).to(dtype)
        for name, shape in memory.token_tables.items()
    }


def filled(count, generator):
    memory, stored = gate_memory(), {}
    for edit_id in range(1, count + 1):
        stored[edit_id] = rows_for(memory, generator)
        memory.add(edit_id, stored[edit_id], {"number": edit_id, "text": "Zürich ☃"})
    return memory, stored


def assert_holds(memory_or_snapshot, stored):
    snapshot = (
        memory_or_snapshot.snapshot() if isinstance(memory_or_snapshot, EditMemory) else memory_or_snapshot
    )
    assert snapshot.ids == tuple(stored)
    for edit_id, rows in stored.items():
        found = snapshot.rows(edit_id)
        assert set(found) == set(rows)
        assert all(torch.equal(found[name], rows[name]) for name in rows)
    total = sum(len(rows["k_text"]) for rows in stored.values())
    assert total == int(snapshot.length.sum())
    # What removed edits leave is never the larger half.
    assert total <= snapshot.tables["k_text"].shape[0] <= max(2 * total, 0)


def test_an_edit_that_comes_back_stands_where_it_stood(generator):
    """In the order of the numbers, snapshots of before untouched; a file in another order is put in order."""
    memory, stored = filled(6, generator)
    before = memory.snapshot()
    for edit_id in (1, 4, 6):
        rows, record = stored[edit_id], memory.record(edit_id)
        memory.remove(edit_id)
        memory.add(edit_id, rows, record)
        assert_holds(memory, stored)
        assert memory.record(edit_id) == record and memory.row_of(edit_id) == edit_id - 1
    assert_holds(before, stored)
    state = {name: value.clone() for name, value in memory.state_dict().items()}
    turn = torch.arange(5, -1, -1)
    owner = torch.arange(6).repeat_interleave(state["edit_lengths"])
    backwards = torch.cat([(owner == row).nonzero()[:, 0] for row in turn.tolist()])
    for name in state:
        if name != "record_bytes":
            state[name] = state[name][backwards if name in ("k_text", "v_text") else turn]
    records = [memory.record(edit_id) for edit_id in range(6, 0, -1)]
    text = json.dumps(records, ensure_ascii=False).encode()
    state["record_bytes"] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    other = gate_memory()
    other.load_state_dict(state)
    assert_holds(other, stored)
    assert [other.record(i) for i in stored] == [memory.record(i) for i in stored]


def test_growth_and_removal(generator):
    memory, stored = filled(21, generator)
    assert len(memory) == 21
    assert_holds(memory, stored)
    order = torch.randperm(21, generator=generator) + 1
    for edit_id in order.tolist():
        memory.remove(edit_id)
        del stored[edit_id]
        assert_holds(memory, stored)
    memory.add(99, rows := rows_for(memory, generator))
    assert_holds(memory, {99: rows})


def test_snapshots_do_not_move(generator):
    memory, stored = filled(5, generator)
    moments = [(memory.snapshot(), dict(stored))]
    for edit_id in range(6, 30):
        stored[edit_id] = rows_for(memory, generator)
        memory.add(edit_id, stored[edit_id])
        if edit_id % 3 == 0:
            gone = list(stored)[len(stored) // 2]
            memory.remove(gone)
            del stored[gone]
        moments.append((memory.snapshot(), dict(stored)))
    for snapshot, then in moments:
        assert_holds(snapshot, then)


def test_removal_of_an_unknown_edit(generator):
    memory, stored = filled(3, generator)
    with pytest.raises(KeyError, match="edit_id=7: no such edit. Stored: 1, 2, 3"):
        memory.remove(7)
    assert_holds(memory, stored)
    with pytest.raises(KeyError, match="Stored: none"):
        gate_memory().remove(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_dict_round_trip(dtype, generator):
    memory, stored = filled(7, generator)
    memory.remove(3)
    del stored[3]
    memory.to(dtype)
    state = {name: value.clone() for name, value in memory.state_dict().items()}
    other = gate_memory(dtype=torch.float16)
    other.add(50, rows_for(other, generator))
    result = other.load_state_dict(state)
    assert not result.missing_keys and not result.unexpected_keys
    assert_holds(other, {i: {n: r.to(dtype) for n, r in rows.items()} for i, rows in stored.items()})
    assert other.record(7) == {"number": 7, "text": "Zürich ☃"}
    for value in state.values():  # loaded tensors are the memory's own
        value.fill_(0)
    assert float(other.snapshot().tables["key"].abs().sum()) > 0
    assert set(other.state_dict()) == set(state)


def test_empty_state_dict_round_trip(generator):
    memory, _ = filled(3, generator)
    memory.load_state_dict(gate_memory().state_dict())
    assert len(memory) == 0 and memory.ids == []
    memory.add(9, rows := rows_for(memory, generator))
    assert_holds(memory, {9: rows})


def test_state_of_another_size_is_refused(generator):
    memory, stored = filled(2, generator)
    other = EditMemory({"key": (D + 1,), "radius": ()}, {"k_text": M, "v_text": M})
    other.add(1, rows_for(other, generator))
    with pytest.raises(RuntimeError, match=r"key has shape \(1, 7\) in the file, this model needs \(1, 6\)"):
        memory.load_state_dict(other.state_dict())
    assert_holds(memory, stored)


def test_damaged_state_is_refused(generator):
    memory, stored = filled(2, generator)
    for name, value in (
        ("record_bytes", torch.tensor(list(b"[{]"), dtype=torch.uint8)),
        ("record_bytes", torch.tensor([0xFF, 0xFE], dtype=torch.uint8)),
        ("edit_lengths", torch.tensor([1, -1])),
        ("edit_lengths", torch.tensor([1])),
        ("edit_ids", torch.tensor([4, 4])),
    ):
        state = dict(memory.state_dict()) | {name: value}
        with pytest.raises(RuntimeError):
            memory.load_state_dict(state)
        assert_holds(memory, stored)


def test_missing_keys_are_named(generator):
    memory, stored = filled(2, generator)
    state = dict(memory.state_dict())
    del state["v_text"]
    assert memory.load_state_dict(state, strict=False).missing_keys == ["v_text"]
    assert_holds(memory, stored)


@pytest.mark.parametrize("bad", ["nan", "inf", "shape", "tokens", "none", "missing", "unknown"])
def test_bad_rows(bad, generator):
    memory, stored = filled(2, generator)
    rows = rows_for(memory, generator, tokens=3)
    if bad in ("nan", "inf"):
        rows["v_text"][1, 2] = float(bad)
    elif bad == "shape":
        rows["key"] = torch.zeros(D + 1)
    elif bad == "tokens":
        rows["v_text"] = torch.zeros(2, M)
    elif bad == "none":
        rows |= {"k_text": torch.zeros(0, M), "v_text": torch.zeros(0, M)}
    elif bad == "missing":
        del rows["key"]
    else:
        rows["value"] = torch.zeros(1)
    with pytest.raises(ValueError):
        memory.add(3, rows)
    assert_holds(memory, stored)


def test_a_radius_of_none_is_a_flag_and_no_nan(generator):
    """Tensors with NaN are not equal to themselves. Version 0.1 saved NaN; it is read as the flag."""
    memory = gate_memory()
    rows = rows_for(memory, generator)
    with pytest.raises(ValueError, match="radius: NaN or infinite"):
        memory.add(1, rows | {"radius": torch.tensor(float("nan"))})
    memory.add(1, rows | {"radius": torch.tensor(0.5)})
    state = dict(memory.state_dict()) | {"radius": torch.tensor([float("nan")])}
    memory.load_state_dict(state)
    assert memory.snapshot().tables["radius"].tolist() == [-1.0]
    assert cosine_radius(memory.snapshot().tables["radius"], 0.75).tolist() == [0.25]


def test_inference_mode(generator):
    """Edits made in inference mode can be added to, removed and differentiated through outside it."""
    memory = gate_memory()
    with torch.inference_mode():
        for edit_id in (1, 2, 3):
            memory.add(edit_id, rows_for(memory, generator))
        memory.remove(2)
    memory.add(4, rows_for(memory, generator))
    x = torch.ones(M, requires_grad=True)
    (memory.snapshot().tables["k_text"] * x).sum().backward()
    memory.remove(1)
    assert memory.ids == [3, 4]


# ---------------------------------------------------------------------- groups


def group_of_two(generator):
    group = MemoryGroup()
    group.memories["early"] = gate_memory()
    group.memories["late"] = EditMemory({}, {"k_vision": M, "v_vision": M})
    return group, lambda: {
        name: rows_for(memory, generator, tokens=2) for name, memory in group.memories.items()
    }


def test_ids_are_never_used_again(generator):
    group, rows = group_of_two(generator)
    ids = [group.add(rows(), {}) for _ in range(3)]
    group.remove(ids[-1])
    ids.append(group.add(rows(), {}))
    assert len(set(ids)) == 4
    with pytest.raises(ValueError, match="is stored already"):
        group.add(rows(), {}, ids[0])
    group.remove(ids[0])
    assert group.add(rows(), {"back": 1}, ids[0]) == ids[0] and group.records()[ids[0]] == {"back": 1}
    state = {name: memory.state_dict() for name, memory in group.memories.items()}
    loaded, _ = group_of_two(generator)
    for name, memory in loaded.memories.items():
        memory.load_state_dict(state[name])
    loaded.remove(max(loaded.ids()))
    assert loaded.add(rows(), {}) not in ids
    empty, _ = group_of_two(generator)
    for name, memory in group.memories.items():  # an older state does not bring numbers back into use
        memory.load_state_dict(empty.memories[name].state_dict())
    assert group.add(rows(), {}) not in ids


@pytest.mark.parametrize("bad", ["nan early", "nan late", "record", "no memory left"])
def test_an_edit_is_in_all_memories_or_in_none(bad, generator, monkeypatch):
    group, rows = group_of_two(generator)
    kept = group.add(rows(), {"a": 1})
    before = {name: memory.state_dict() for name, memory in group.memories.items()}
    new, record = rows(), {}
    if bad.startswith("nan"):
        table = next(iter(new[bad.split()[1]].values()))
        table.view(-1)[0] = float("nan")
    elif bad == "record":
        record = {"image": object()}
        group.memories = dict(reversed(group.memories.items()))  # the record is stored last
    else:

        def fail(*args, **kwargs):
            raise torch.OutOfMemoryError("no memory left")

        monkeypatch.setattr(group.memories["late"], "_append", fail)
    with pytest.raises((ValueError, TypeError, torch.OutOfMemoryError)):
        group.add(new, record)
    monkeypatch.undo()
    assert group.ids() == [kept]
    for name, memory in group.memories.items():
        after = memory.state_dict()
        assert all(torch.equal(after[key], before[name][key]) for key in after)
    group.add(rows(), {})
    assert all(len(memory) == 2 for memory in group.memories.values())


def test_changes_by_threads(generator):
    """Adding and removing from several threads: every snapshot holds the same edits in all memories."""
    group, rows = group_of_two(generator)
    prepared = [[rows() for _ in range(15)] for _ in range(4)]
    wrong, done = [], threading.Event()

    def change(mine):
        for place, new in enumerate(mine):
            edit_id = group.add(new, {})
            if place % 2:
                group.remove(edit_id)

    def watch():
        while not done.is_set():
            snapshots = group.snapshot()
            if snapshots["early"].ids != snapshots["late"].ids:
                wrong.append(snapshots)

    watcher = threading.Thread(target=watch)
    changers = [threading.Thread(target=change, args=(mine,)) for mine in prepared]
    for thread in (watcher, *changers):
        thread.start()
    for thread in changers:
        thread.join()
    done.set()
    watcher.join()
    assert not wrong
    assert len(group) == 4 * 8 and len(set(group.ids())) == 4 * 8


def test_a_copied_group_is_another(generator):
    group, rows = group_of_two(generator)
    group.add(rows(), {"a": 1})
    twin = copy.deepcopy(group)
    twin.add(rows(), {})
    assert len(group) == 1 and len(twin) == 2 and twin.records()[1] == {"a": 1}
