"""Edits whose values stay in files, edits whose wide rows stay behind, and rows in fewer bytes."""

import copy
import pickle
import threading

import pytest
import torch
from dualedit.memory import Budget, EditMemory, packing, tables
from dualedit.memory import budget as budget_module
from dualedit.memory.budget import Tiers, bytes_of
from dualedit.memory.filling import fill
from dualedit.memory.notes import Notes, SavedNotes, text_of
from dualedit.memory.routing import nearest_edit
from dualedit.memory.values import Spill, saved_tables
from safetensors.torch import save_file

from dualedit_kernels import nearest_key
from dualedit_kernels.nearest_key import op as operator

D, M = 24, 8


def rows_for(memory, generator, tokens=3):
    rows = {n: torch.randn(shape, generator=generator) for n, shape in memory.edit_tables.items()}
    rows["radius"] = torch.rand((), generator=generator)
    return rows | {
        n: torch.randn((tokens, M), generator=generator) for n in memory.token_tables
    }


# ---------------------------------------------------------------------- budgets


@pytest.mark.parametrize(
    "size, wanted", [(0, 0), (12, 12), ("12", 12), ("1kB", 1000), ("1.5 MiB", 3 << 19), (" 2gb ", 2 * 10**9)]
)
def test_sizes(size, wanted):
    assert bytes_of(size, "budget") == wanted and Budget.of(size).host == wanted


@pytest.mark.parametrize("size", [-1, 1.5, True, "", "lots", "-1MB", "5XB", "1e400", None, [], 2**63, "nan"])
def test_bad_budgets_are_refused_by_name(size):
    with pytest.raises(ValueError, match=r"^budget=.*pass bytes .* or a text such as '500MB'"):
        Budget.of(size)
    with pytest.raises(ValueError, match=r"^budget\.device="):
        Budget(device=size)


def test_the_least_recently_used_makes_room(monkeypatch):
    monkeypatch.setattr(budget_module, "_BESIDE", 0)
    tiers, row = Tiers(Budget(host=80)), {"k": torch.zeros(10)}  # 40 bytes
    for key in ("a", "b"):
        tiers.put("host", key, row)
    assert tiers.get("host", "a") is row
    tiers.put("host", "c", row)
    assert tiers.get("host", "b") is None and tiers.get("host", "a") is tiers.get("host", "c") is row
    assert tiers.used() == {"host": 80, "device": 0}
    tiers.put("host", "larger than all", {"k": torch.zeros(30)})
    assert tiers.used() == {"host": 80, "device": 0} and tiers.get("host", "a") is row


# ---------------------------------------------------------------------- rows that stay behind


@pytest.fixture
def rows_stay(monkeypatch):
    """Removed edits leave their wide rows, however small the tables are; codes pay from 70 keys on."""
    monkeypatch.setattr(tables, "_SMALL", 0)
    monkeypatch.setattr(tables, "_CLEARED_AT", 2)
    monkeypatch.setattr(operator, "_MANY_VALUES", 70 * D)


def plain_lookup(snapshot, query, metric, radius=None):
    keys = snapshot.tables["key"]
    radius = torch.full((len(keys),), float("inf")) if radius is None else radius
    return nearest_key(query, keys, radius, metric)


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_lookups_pass_over_removed_edits(rows_stay, metric, generator):
    """As among the keys that are left, bit for bit; snapshots of before find what was there then."""
    memory = EditMemory({"key": (D,), "radius": (), "down": (2, D)}, {})
    keys = torch.randn(300, D, generator=generator)
    keys[40:60] = keys[20:40]  # several edits of one key: of these the oldest answers
    for number, key in enumerate(keys, 1):
        memory.add(number, rows_for(memory, generator) | {"key": key})
    query = torch.cat([keys[[0, 20, 25, 47, 48, 49, 299]], torch.randn(5, D, generator=generator)])
    before = memory.snapshot()
    stayed = 0
    was = nearest_edit(query, before, metric)
    order = [1, 21, 22, 300, 26, 48, 49, 50, 46, 299, *range(30, 45), *range(150, 200)]
    for number in order:
        memory.remove(number)
        snapshot = memory.snapshot()
        stayed += snapshot.tables.places is not None
        for radius in (None, torch.full((len(memory),), 3.0), snapshot.tables["radius"]):
            for got, want in zip(
                nearest_edit(query, snapshot, metric, radius),
                plain_lookup(snapshot, query, metric, radius),
                strict=True,
            ):
                assert torch.equal(got, want)
        assert snapshot.ids == tuple(memory.ids) and number not in memory
    assert stayed == len(order)
    for got, want in zip(nearest_edit(query, before, metric), was, strict=True):
        assert torch.equal(got, want)


def test_removed_edits_come_back_to_their_rows(rows_stay, generator):
    """Under their numbers, in their order, without copying; with other values they take a row anew."""
    memory = EditMemory({"key": (D,), "radius": (), "down": (2, D)}, {})
    stored = {}
    for number in range(1, 101):
        stored[number] = rows_for(memory, generator)
        memory.add(number, stored[number], {"n": number})
    rng = torch.Generator().manual_seed(5)
    for turn in range(300):
        number = int(torch.randint(1, 101, (), generator=rng))
        if number in memory:
            memory.remove(number)
        else:
            if turn % 3 == 0:
                stored[number] = rows_for(memory, generator)
            memory.add(number, stored[number], {"n": number})
        snapshot = memory.snapshot()
        assert list(snapshot.ids) == sorted(snapshot.ids) == memory.ids
        places = memory.edit_places[: len(memory)]
        assert bool((places.diff() > 0).all()) and (not len(places) or int(places[-1]) < memory._num_rows)
    assert len(memory) > 20
    for number in memory.ids:
        assert all(torch.equal(a, stored[number][n]) for n, a in memory.snapshot().rows(number).items())
        assert memory.record(number) == {"n": number}
    route = torch.tensor([0, -1, len(memory) - 1])
    fired = memory.snapshot().fetch(route)
    for row, place in zip(route.tolist(), fired.route.tolist(), strict=True):
        assert (row < 0) == (place < 0)
        if row >= 0:
            assert torch.equal(fired.tables["down"][place], stored[memory.ids[row]]["down"])
    state = memory.state_dict()
    other = EditMemory({"key": (D,), "radius": (), "down": (2, D)}, {})
    other.load_state_dict(state)
    assert all(torch.equal(a, state[n]) for n, a in other.state_dict().items())


def test_removing_copies_no_wide_rows(rows_stay, generator):
    memory = EditMemory({"key": (D,), "radius": (), "down": (2, D)}, {})
    for number in range(1, 101):
        memory.add(number, rows_for(memory, generator))
    memory.add(101, back := rows_for(memory, generator))
    places = {name: getattr(memory, name).data_ptr() for name in ("key", "down")}
    memory.remove(50)
    memory.remove(101)
    memory.add(101, back)
    assert {name: getattr(memory, name).data_ptr() for name in places} == places
    with torch.no_grad():
        trial = memory.fork()
        trial.remove(7)
        assert 7 in memory and 7 in memory.snapshot().ids and 7 not in trial.snapshot().ids
        memory.take(trial)
    assert 7 not in memory and memory.key.data_ptr() == places["key"]


# ---------------------------------------------------------------------- records


def test_notes_are_shared_until_they_change():
    notes = Notes({i: {"n": i} for i in range(1, 1001)})
    twin = notes.copy()
    for i in range(1, 1001, 2):
        del notes[i]
    notes[5000] = {"n": 5000}
    assert len(notes) == 501 and sorted(notes) == [*range(2, 1001, 2), 5000] and 1 not in notes
    assert len(twin) == 1000 and twin[1] == {"n": 1} and 5000 not in twin
    with pytest.raises(KeyError):
        notes[1]
    assert notes.get(1) == {} and len(notes._changed) < 500  # put together meanwhile


@pytest.mark.parametrize("size", [64, 1 << 24])
def test_records_are_read_from_their_file(size, tmp_path, monkeypatch):
    from dualedit.memory import notes as module

    monkeypatch.setattr(module, "_PIECE", size)
    records = [{"prompt": f"Zürich ☃ \n{i}", "tags": []} for i in range(200)]
    records[3]["expires"], records[150]["disabled"] = "2020-01-01T00:00:00Z", True
    records[7]["prompt"] = 'says "disabled" and "expires"'
    text = torch.frombuffer(bytearray(text_of(records)), dtype=torch.uint8)
    save_file({"record_bytes": text}, tmp_path / "a.safetensors")
    table = saved_tables(tmp_path / "a.safetensors")["record_bytes"]
    ids = list(range(10, 210))
    found = Notes(SavedNotes(table, torch.tensor(ids)))
    assert [found[i] for i in ids] == records and 9 not in found and 210 not in found
    assert set(found.ending()) == {13, 160} and found.ending()[160] == 0.0
    found[13], found[500] = {"prompt": "new"}, {"disabled": True}
    assert found.ending() == {160: 0.0, 500: 0.0} and len(found) == 201
    with pytest.raises(ValueError, match="199 edits with 200 lines"):
        SavedNotes(table, torch.tensor(ids[:-1]))


# ---------------------------------------------------------------------- values in files


class Kept:
    source, record = 0, None


def saved(memory, path):
    save_file({name: t.contiguous() for name, t in memory.state_dict().items()}, path)
    return saved_tables(path)


def in_files(memory, path, budget, kind="native"):
    """A memory like another one whose values are in a file."""
    tokens = {n: M for n in memory.token_tables}
    made = EditMemory(memory.edit_tables, tokens, kind=kind)
    unread = Kept.record
    fill(
        made, saved(memory, path), {i: Kept() for i in memory.ids}, unread, None,
        tiers := Tiers(Budget.of(budget)), Spill(),
    )  # fmt: skip
    return made, tiers


def both_kinds():
    return [
        EditMemory({"key": (D,), "radius": ()}, {"k_text": M, "v_text": M}),
        EditMemory({"key": (D,), "radius": (), "down": (2, D), "up": (M, 2)}, {}),
        EditMemory({}, {"k_vision": M, "v_vision": M}),
    ]


@pytest.mark.parametrize("budget", [0, 7000, "1GB"])
@pytest.mark.parametrize("which", range(3))
def test_values_are_the_same_wherever_they_lie(which, budget, tmp_path, generator):
    memory = both_kinds()[which]
    for number in range(1, 41):
        rows = rows_for(memory, generator, tokens=1 + number % 4)
        if "key" not in memory.edit_tables:
            del rows["radius"]
        memory.add(number, rows, {"n": number} if "key" in memory.edit_tables else None)
    twin, tiers = in_files(memory, tmp_path / "a.safetensors", budget)
    new = {n: r for n, r in rows_for(memory, generator).items() if n in memory.edit_tables or r.ndim == 2}
    for each in (memory, twin):
        each.remove(4)
        each.add(41, new, {"n": 41})
        each.remove(20)
    assert twin.ids == memory.ids and twin.sizes() == memory.sizes()
    one, other = memory.snapshot(), twin.snapshot()
    for number in memory.ids:
        a, b = one.rows(number), other.rows(number)
        assert set(a) == set(b) and all(torch.equal(a[n], b[n]) for n in a)
    for route in (torch.tensor([3, -1, 38, 3]), torch.tensor([-1, -1])):
        a, b = one.fetch(route), other.fetch(route)
        for place, there in zip(a.route.tolist(), b.route.tolist(), strict=True):
            assert (place < 0) == (there < 0)
            for name in other.tables.apart[0].names if place >= 0 else ():
                if name in memory.edit_tables:
                    assert torch.equal(a.tables[name][place], b.tables[name][there])
                else:
                    first, now, n = int(a.start[place]), int(b.start[there]), int(a.length[place])
                    assert n == int(b.length[there])
                    want, got = a.tables[name][first : first + n], b.tables[name][now : now + n]
                    assert torch.equal(want, got)
    assert tiers.used()["host"] <= tiers.budget.host
    for number in range(1, 4):
        twin.remove(number), memory.remove(number)
    assert all(torch.equal(a, twin.state_dict()[n]) for n, a in memory.state_dict().items())
    assert other.ids == one.ids and torch.equal(other.rows(1)[other.tables.apart[0].names[0]],
                                                one.rows(1)[other.tables.apart[0].names[0]])  # fmt: skip


def test_copies_share_files_and_pickles_are_refused(tmp_path, generator):
    memory = both_kinds()[0]
    for number in range(1, 6):
        memory.add(number, rows_for(memory, generator), {"n": number})
    twin, _ = in_files(memory, tmp_path / "a.safetensors", 0)
    copied = copy.deepcopy(twin)
    copied.remove(1)
    copied.add(6, new := rows_for(memory, generator), {"n": 6})
    twin.add(6, rows_for(memory, generator), {"n": 60})
    assert torch.equal(copied.snapshot().rows(6)["k_text"], new["k_text"]) and twin.record(6) == {"n": 60}
    assert 1 in twin and not torch.equal(twin.snapshot().rows(6)["k_text"], new["k_text"])
    with pytest.raises(TypeError, match="loaded with a budget"):
        pickle.dumps(twin)


def test_a_file_that_is_replaced_stays_and_one_that_is_written_over_is_noticed(tmp_path, generator):
    memory = both_kinds()[0]
    for number in range(1, 6):
        memory.add(number, rows_for(memory, generator))
    twin, _ = in_files(memory, tmp_path / "a.safetensors", 0)
    (tmp_path / "b").write_bytes(b"something else")
    (tmp_path / "b").replace(tmp_path / "a.safetensors")
    assert torch.equal(twin.snapshot().rows(3)["v_text"], memory.snapshot().rows(3)["v_text"])
    twin, _ = in_files(memory, tmp_path / "c.safetensors", 0)
    data = (tmp_path / "c.safetensors").read_bytes()
    (tmp_path / "c.safetensors").write_bytes(data[:-200] + bytes(200))
    with pytest.raises(ValueError, match="was written over while its edits were in use. Load them again"):
        twin.snapshot().rows(3)
    (tmp_path / "c.safetensors").write_bytes(data[:-200])
    with pytest.raises(ValueError, match="is cut short|was written over"):
        twin.snapshot().rows(5)


def test_values_that_are_not_finite_are_refused_when_they_are_read(tmp_path, generator):
    memory = both_kinds()[0]
    for number in range(1, 4):
        memory.add(number, rows_for(memory, generator))
    memory.v_text[4, 0] = float("nan")  # of the second edit
    twin, _ = in_files(memory, tmp_path / "a.safetensors", 0)
    twin.snapshot().rows(1)
    with pytest.raises(ValueError, match="v_text of an edit holds values that are not finite"):
        twin.snapshot().fetch(torch.tensor([1]))


def test_threads_read_while_edits_come_and_go(tmp_path, generator):
    memory = both_kinds()[0]
    for number in range(1, 31):
        memory.add(number, rows_for(memory, generator))
    twin, _ = in_files(memory, tmp_path / "a.safetensors", 10_000)
    snapshot, faults = twin.snapshot(), []
    want = [memory.snapshot().rows(i)["k_text"] for i in range(1, 31)]

    def read(seed):
        rng = torch.Generator().manual_seed(seed)
        for _ in range(200):
            row = int(torch.randint(30, (), generator=rng))
            fired = snapshot.fetch(torch.tensor([row]))
            if not torch.equal(fired.tables["k_text"], want[row]):
                faults.append(row)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for number in range(1, 31):
        twin.remove(number)
        twin.add(100 + number, rows_for(memory, generator))
    for thread in threads:
        thread.join()
    assert not faults


# ---------------------------------------------------------------------- fewer bytes


@pytest.mark.parametrize("kind, most", [("bfloat16", 2**-8), ("int8", 0.5 / 127), ("float8", 2**-4)])
def test_packed_rows(kind, most, generator):
    """An error of half a step of the row's largest value (int8), or relative to each value."""
    rows = torch.randn(50, 64, generator=generator) * torch.logspace(-20, 20, 50)[:, None]
    rows[7] = 0.0
    stored = packing.pack(rows, kind)
    assert stored.shape == (50, packing.stored_width(64, kind)) and packing.are_storable(stored, kind)
    back = packing.unpack(stored, kind, torch.float32)
    largest = rows.abs().amax(1, keepdim=True)
    # float8's subnormal values have steps of 2^-9 of 448ths of the largest one.
    allowed = most * (largest if kind == "int8" else rows.abs()) * 1.001 + largest * (
        2**-10 / 448 if kind == "float8" else 0
    )
    assert bool(((back - rows).abs() <= allowed).all()) and not back[7].any()


@pytest.mark.parametrize("kind", ["int8", "float8"])
def test_damaged_packed_rows_are_refused(kind, generator):
    stored = packing.pack(torch.randn(4, 8, generator=generator), kind)
    for place, byte in ((0, 0x80 if kind == "int8" else 0x7F), (-1, 0x7F), (-1, 0xFF)):
        wrong = stored.clone()
        wrong[2, place] = byte
        if place == -1:
            wrong[2, -2] = 0xFF  # a scale of infinity or NaN, or a negative one
        assert not packing.are_storable(wrong, kind)


@pytest.mark.parametrize("kind", packing.KINDS)
def test_memories_of_packed_rows(kind, tmp_path, generator):
    """Values are those of the packed rows, in tables and in files, loaded and brought back."""
    memory = EditMemory({"key": (D,), "radius": ()}, {"k_text": M, "v_text": M}, kind=kind)
    stored = {}
    for number in range(1, 9):
        stored[number] = rows_for(memory, generator, tokens=1 + number % 3)
        memory.add(number, stored[number])
    rows = memory.snapshot().rows(5)
    memory.remove(5)
    memory.add(5, rows)
    twin, _ = in_files(memory, tmp_path / "a.safetensors", 0, kind)
    other = EditMemory({"key": (D,), "radius": ()}, {"k_text": M, "v_text": M}, kind=kind)
    other.load_state_dict(memory.state_dict())
    for each in (memory, twin, other):
        fired = each.snapshot().fetch(torch.tensor([4, -1]))
        first, count = int(fired.start[fired.route[0]]), int(fired.length[fired.route[0]])
        for name in ("k_text", "v_text"):
            want = packing.unpack(packing.pack(stored[5][name], kind), kind, torch.float32)
            assert torch.equal(fired.tables[name][first : first + count], want)
    bad = memory.state_dict()
    if packing.is_packed(kind):
        bad["k_text"] = bad["k_text"].clone()
        bad["k_text"][0, 0] = 0x80 if kind == "int8" else 0x7F
    else:
        bad["k_text"] = torch.full_like(bad["k_text"], float("nan"))
    with pytest.raises(RuntimeError, match="not finite"):
        other.load_state_dict(bad)
