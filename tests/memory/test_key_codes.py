"""Codes of the stored keys: right after every change of the memory, shared by its snapshots, never saved."""

import copy
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from dualedit.memory import EditMemory, key_codes
from dualedit.memory.key_codes import TableCodes
from dualedit.memory.routing import nearest_edit

from dualedit_kernels import backend, nearest_key
from dualedit_kernels.nearest_key import op as operator

D = 24


@pytest.fixture(autouse=True)
def few_keys_are_many(monkeypatch):
    monkeypatch.setattr(operator, "_MANY_VALUES", 70 * D)


def add(memory, generator, first, count, dtype=torch.float32):
    for edit_id in range(first, first + count):
        key = torch.randn(D, generator=generator).to(dtype)
        memory.add(edit_id, {"key": key, "radius": torch.tensor(1e6, dtype=dtype)})


def memory_of(count, generator):
    memory = EditMemory({"key": (D,), "radius": ()}, {})
    add(memory, generator, 1, count)
    return memory


def check(memory_or_snapshot, generator, reads=True):
    """The lookup of a snapshot with its codes is the one without; return the codes for l2."""
    is_memory = isinstance(memory_or_snapshot, EditMemory)
    snapshot = memory_or_snapshot.snapshot() if is_memory else memory_or_snapshot
    keys, query = snapshot.tables["key"], torch.randn(6, D, generator=generator)
    query = torch.cat([query, keys[-3:].float(), keys[:3].float()])
    for metric in ("cosine", "l2"):
        codes = snapshot.codes(keys, metric)
        assert (codes is not None) == (reads and coded())
        radius = snapshot.tables["radius"].float()
        for got, want in zip(
            nearest_key(query, keys, radius, metric, codes),
            nearest_key(query, keys, radius, metric),
            strict=True,
        ):
            assert torch.equal(got, want)
    return codes


def coded():
    chosen = backend.explain("nearest_key", "cpu", torch.float32).implementation
    return "nearest_key_coded" in chosen.functions


def test_adding_and_removing(generator):
    memory = memory_of(69, generator)
    check(memory, generator, reads=False)
    add(memory, generator, 70, 40)
    check(memory, generator)
    before = memory.snapshot()
    for _ in range(30):
        memory.remove(memory.ids[int(torch.randint(0, len(memory), (), generator=generator))])
        if len(memory) % 3 == 0:
            check(memory, generator)
        if len(memory) % 4 == 0:
            add(memory, generator, memory.highest_id + 1, 2)
    check(memory, generator)
    check(before, generator)


def test_a_snapshot_of_before_is_looked_up_in_rightly(generator):
    memory = memory_of(90, generator)
    before = memory.snapshot()
    check(before, generator)
    add(memory, generator, 91, 200)
    check(memory, generator)
    check(before, generator, reads=False)
    memory.remove(5)
    check(before, generator, reads=False)
    check(memory, generator)


def test_another_dtype_after_all_were_removed(generator):
    memory = memory_of(75, generator)
    check(memory, generator)
    for edit_id in memory.ids:
        memory.remove(edit_id)
    add(memory, generator, 100, 75, torch.bfloat16)
    check(memory, generator)


def test_conversion_loading_and_copies(generator):
    memory = memory_of(100, generator)
    codes = check(memory, generator)
    assert codes is memory.snapshot().codes(memory.snapshot().tables["key"], "l2")  # made once
    assert memory.snapshot().codes(memory.snapshot().tables["key"].double(), "l2") is None
    assert set(memory.state_dict()) == {"key", "radius", "edit_ids", "edit_lengths", "record_bytes"}
    other = memory_of(80, generator)
    check(other, generator)
    other.load_state_dict(memory.state_dict())
    check(other, generator)
    twin = copy.deepcopy(memory)
    twin.remove(1)
    add(twin, generator, 500, 3)
    check(twin, generator)
    add(memory, generator, 600, 3)
    check(memory, generator)
    check(memory.to(torch.bfloat16), generator)


def test_other_devices_and_compiled_models_go_without(generator, monkeypatch):
    memory = memory_of(100, generator)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    check(memory, generator, reads=False)
    monkeypatch.undo()
    assert TableCodes().of(torch.empty(1 << 12, 1 << 12, device="meta"), "l2") is None


def test_a_codebook_in_half_precision_is_read_as_it_is_stored(generator):
    memory = memory_of(0, generator)
    add(memory, generator, 1, 90, torch.bfloat16)
    edits = memory.snapshot()
    query = torch.randn(2, D, generator=generator)
    radius = edits.tables["radius"].float()
    route, distance = nearest_edit(query, edits, "l2", radius)
    assert ("l2" in edits.key_codes._known) == coded()  # of a converted table there are none
    wide = edits.tables["key"].float()
    want = nearest_key(query, wide, radius, "l2")
    assert torch.equal(route, want[0]) and torch.equal(distance, want[1])


def test_threads_that_ask_at_once_encode_once(generator, monkeypatch):
    if not coded():
        pytest.skip("the implementation that runs reads no codes")
    keys, encoded, together = torch.randn(100, D, generator=generator), [], threading.Barrier(4)

    def slowly(*arguments):
        encoded.append(arguments[1])
        time.sleep(0.2)
        return encode(*arguments)

    def ask(metric):
        together.wait(30)
        return codes.of(keys, metric)

    encode, codes = key_codes.encode_keys, TableCodes()
    monkeypatch.setattr(key_codes, "encode_keys", slowly)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(ask, ["l2", "cosine", "l2", "cosine"]))
    assert sorted(encoded) == ["cosine", "l2"]
    assert found[0] is found[2] and found[1] is found[3]


def test_inference_mode(generator):
    memory = memory_of(100, generator)
    with torch.inference_mode():
        check(memory, generator)
        add(memory, generator, 200, 5)
        check(memory, generator)
    add(memory, generator, 300, 100)
    check(memory, generator)
    memory.remove(7)
    with torch.inference_mode():
        check(memory, generator)
