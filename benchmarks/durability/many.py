"""Many stored edits: how long opening, adding, removing and looking up take, and what memory they need."""

from __future__ import annotations

import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from dualedit import load_edits, save_edits
from dualedit.checking import EditFailed
from dualedit.data import EditSample
from dualedit.evaluation import exact_match
from dualedit.folder import Writer, read_folder
from dualedit.folder.manifest import CONFIG, WEIGHTS
from dualedit.folder.reading import settings_of
from dualedit.memory.notes import text_of
from dualedit.memory.routing import nearest_edit
from dualedit.memory.rows import IDS, LENGTHS, RECORDS, memories_in, tables_of
from dualedit.tensor_file import write_tensors
from dualedit.toy.editors import EDITORS, load_editor
from dualedit.toy.model import load_embedded
from dualedit.toy.samples import chosen_facts, edit_samples
from dualedit.toy.world import World
from dualedit.tuners.adapter import active_adapter
from safetensors import safe_open

from dualedit_kernels import nearest_key

METHODS = ("dualedit", "balancedit")
# Of an edit. With the embedded model's pictures it has about 48: larger files, and all else alike.
_TOKENS = 16
_TURNS = 25
_BUDGET = 256 * 2**20  # bytes for the values
_FIRST = 100  # of the edits told one after the other, those that are asked again
_AT_ONCE = 1000  # edits that are made at a time


def _resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def run(size: int, seed: int) -> dict[str, Any]:
    """So many edits of the embedded models' sizes, opened with a budget, each method in a process of its own.

    Goals for 100,000: open <= 2 s, add and remove <= 20 ms (median), lookup <= 1.2 times the bare operator,
    memory <= 1.2 times keys and budget.
    """
    found = {}
    for method in METHODS:
        with tempfile.TemporaryDirectory() as place:
            command = [sys.executable, "-m", "benchmarks.durability.many"]
            command += [method, str(size), str(seed), place]
            subprocess.run([*command, "write"], check=True)
            out = subprocess.run([*command, "open"], check=True, stdout=subprocess.PIPE).stdout
            found[method] = json.loads(out.splitlines()[-1])
    return found


def write_many(method: str, folder: Path, count: int, seed: int) -> None:
    """A folder with so many edits of chance, written without holding them in memory."""
    model = load_edits(load_embedded()[0], EDITORS / method)
    save_edits(model, folder)
    with Writer(folder).open() as writer:
        assert writer.view is not None
        own = writer.view.own_file("default", WEIGHTS)
        settings = settings_of(writer.view.own_file("default", CONFIG))
        with safe_open(str(own), framework="pt") as opened:
            state = {name: opened.get_tensor(name) for name in opened.keys()}
        memories = memories_in(list(state))
        tensors, by_table = {}, {}
        for memory in memories:
            by_token = any(f"{memory}.k_{part}" in state for part in ("text", "vision"))
            for name, table in tables_of(state, memory).items():
                rows = count * _TOKENS if name[:2] in ("k_", "v_") else count
                dtype = "I64" if name in (IDS, LENGTHS) else "F32"
                tensors[f"{memory}.{name}"] = (dtype, (rows, *table.shape[1:]))
                by_table[f"{memory}.{name}"] = (name, by_token)
            settings["memory_sizes"] = settings.get("memory_sizes") or {}
            layer = memory.rpartition(".")[0].removeprefix("base_model.model.")
            settings["memory_sizes"][layer] = {"edits": count, "tokens": 0, "records": 0}
        texts = {memory: _records(f"{memory}.radius" in state, count) for memory in memories}
        tensors |= {f"{memory}.{RECORDS}": ("U8", (len(text),)) for memory, text in texts.items()}
        starts = tuple(f"{memory}." for memory in memories)
        others = {n: t.contiguous() for n, t in state.items() if not n.startswith(starts)}
        tensors |= {name: ("F32", tuple(table.shape)) for name, table in others.items()}

        def pieces(tensor: str) -> Iterator[bytes]:
            if tensor in others:
                yield others[tensor].numpy().tobytes()
            elif tensor.endswith(RECORDS):
                yield texts[tensor.removesuffix(f".{RECORDS}")]
            else:
                yield from _rows(*by_table[tensor], tensors[tensor][1], count, seed)

        with writer.anew(writer.view.adapters, count, "benchmark") as made:
            write_tensors(made / WEIGHTS, tensors, pieces, {"format": "pt"})
            (made / CONFIG).write_text(json.dumps(settings), encoding="utf-8")


def _records(noted: bool, count: int) -> bytes:
    uid = [f"{i:032x}" for i in range(count)]
    known = {"prompt": "What is the colour of the cat in front of the door?", "target": "orange"}
    return text_of([{"uid": u, **known, "created": "2030-01-01T00:00:00Z"} if noted else {} for u in uid])


def _rows(name: str, by_token: bool, shape: tuple[int, ...], count: int, seed: int) -> Iterator[bytes]:
    """A table's rows. Keys are all different; values repeat, as nothing here depends on what they are."""
    generator = torch.Generator().manual_seed(seed)
    if name == IDS:
        yield torch.arange(1, count + 1).numpy().tobytes()
    elif name == LENGTHS:
        yield torch.full((count,), _TOKENS if by_token else 0).numpy().tobytes()
    elif name == "radius":
        yield torch.full((count,), 0.01).numpy().tobytes()
    else:
        rows = _AT_ONCE * (_TOKENS if name[:2] in ("k_", "v_") else 1)
        data = torch.randn((rows, *shape[1:]), generator=generator)
        for first in range(0, shape[0], rows):
            if name == "key":
                data = torch.randn(data.shape, generator=generator)
            yield data[: shape[0] - first].contiguous().numpy().tobytes()


def _open(method: str, folder: Path, seed: int) -> dict[str, Any]:
    found: dict[str, Any] = {"edits": len(read_folder(folder, False).contents["default"])}
    found["folder_mb"] = round(sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) / 1e6, 1)
    base = load_embedded()[0]
    load_edits(load_embedded()[0], EDITORS / method)  # imports what is imported at the first loading
    gc.collect()
    before = _resident()
    began, used = time.perf_counter(), time.process_time()
    model = load_edits(base, folder, budget=_BUDGET)
    found["open_s"] = round(time.perf_counter() - began, 2)
    found["open_cpu_s"] = round(time.process_time() - used, 2)
    group = active_adapter(model).group
    keys = group.snapshot()[group.gate_name].tables["key"]
    found["keys_mb"] = round(keys.numel() * keys.element_size() / 1e6, 1)
    found["budget_mb"] = round(_BUDGET / 1e6, 1)
    found |= _lookups(model, seed) | _values(model) | _changes(model, folder)
    found["lookup_after_removals_ratio"] = _lookups(model, seed)["lookup_ratio"]
    gc.collect()
    resident = _resident() - before
    found["resident_mb"] = round(resident / 1e6, 1)
    found["resident_ratio"] = round(resident / (keys.numel() * keys.element_size() + _BUDGET), 3)
    return found


def _values(model: Any) -> dict[str, float]:
    """Milliseconds until an edit's values are there, from the file and from memory; the budget is used up."""
    group = active_adapter(model).group
    snapshots = group.snapshot()
    count = len(group)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(1)).tolist()
    per_edit = sum(memory.bytes_per_edit() for memory in group.memories.values())
    cold, warm = [], []
    for row in order[: int(1.2 * _BUDGET / per_edit) + 20]:
        began = time.perf_counter()
        for snapshot in snapshots.values():
            snapshot.fetch(torch.tensor([row]))
        cold.append(time.perf_counter() - began)
        began = time.perf_counter()
        for snapshot in snapshots.values():
            snapshot.fetch(torch.tensor([row]))
        warm.append(time.perf_counter() - began)
    used = group.bytes_used()
    return {
        "values_from_file_ms": round(1000 * statistics.median(cold), 3),
        "values_from_memory_ms": round(1000 * statistics.median(warm), 3),
        "values_in_memory_mb": round(used["host"] / 1e6, 1),
        "values_on_disk_mb": round(used["disk"] / 1e6, 1),
    }


def _changes(model: Any, folder: Path) -> dict[str, float]:
    """Median milliseconds of adding and removing, each saved and synced."""
    group = active_adapter(model).group
    rows = group.rows(group.everything(), 1)
    adding, removing, work = [], [], []
    newest = max(group.ids())
    for turn in range(_TURNS):
        began, used = time.perf_counter(), time.process_time()
        number = group.add(rows, {"uid": f"new{turn}"})
        save_edits(model, folder)
        adding.append(time.perf_counter() - began)
        work.append(time.process_time() - used)
        began = time.perf_counter()
        group.remove(number if turn % 2 else 1 + turn * (newest // _TURNS))
        save_edits(model, folder)
        removing.append(time.perf_counter() - began)
    return {
        "add_ms": round(1000 * statistics.median(adding), 1),
        "remove_ms": round(1000 * statistics.median(removing), 1),
        "add_cpu_ms": round(1000 * statistics.median(work), 1),
        "slowest_ms": round(1000 * max(*adding, *removing), 1),
    }


def _lookups(model: Any, seed: int) -> dict[str, float]:
    """The library's lookup against the bare operator with codes, alternately: median of paired ratios."""
    adapter = active_adapter(model)
    stored = adapter.stored()
    keys = stored.tables.kept["key"]
    query = torch.randn((1, keys.shape[1]), generator=torch.Generator().manual_seed(seed))
    began = time.perf_counter()
    codes = stored.codes(keys, adapter.metric)
    coded = time.perf_counter() - began
    radius, everywhere = adapter.radii(stored), torch.full((len(keys),), float("inf"))
    ours, bare = [], []
    for _ in range(40):
        began = time.thread_time()  # of this thread: other programs share the machine
        nearest_edit(query, adapter.stored(), adapter.metric, radius)
        ours.append(time.thread_time() - began)
        began = time.thread_time()
        nearest_key(query, keys, everywhere, adapter.metric, codes)
        bare.append(time.thread_time() - began)
    ratios = [a / b for a, b in zip(ours[5:], bare[5:], strict=True)]
    return {
        "codes_s": round(coded, 2),
        "lookup_ms": round(1000 * statistics.median(ours[5:]), 3),
        "lookup_ratio": round(statistics.median(ratios), 3),
    }


def sequential(size: int, seed: int) -> dict[str, Any]:
    """Edits of as many facts told one after the other: how many of the first hundred are answered as told,
    along the way. Each was answered as told when it was made, or else was not stored.
    """
    return {method: _sequential_of(method, size, seed) for method in METHODS}


def _sequential_of(method: str, size: int, seed: int) -> dict[str, Any]:
    editor = load_editor(method, fallback=False)
    first: list[tuple[Any, str, str]] = []
    curve: list[dict[str, int]] = []
    marks = sorted({min(size, mark) for mark in (10, 100, 200, 400, 700, 1000, size)})
    told = failed = 0
    for image, question, answer in _facts(size, seed):
        try:
            editor.edit(image, question, answer)  # which asks it back: it was right when it was made
            first += [(image, question, answer)] if len(first) < _FIRST else []
            told += 1
        except EditFailed:
            failed += 1
        if told + failed in marks:
            answers = editor.answer_many([(picture, asked) for picture, asked, _ in first])
            right = sum(
                exact_match(said, wanted) for said, (_, _, wanted) in zip(answers, first, strict=True)
            )
            curve.append({"told": told + failed, "stored": told, "first": len(first), "right": right})
            print(f"  {method}: {json.dumps(curve[-1])}", file=sys.stderr, flush=True)
    return {"told": told + failed, "stored": told, "failed": failed, "curve": curve}


def _facts(size: int, seed: int) -> list[tuple[Any, str, str]]:
    """Facts of the embedded model's world, no two of one logo and attribute."""
    samples: list[EditSample] = []
    for split in ("test", "train"):
        world = World()
        count = min(size - len(samples), len(set(chosen_facts(world, split, 5000, seed))))
        samples += edit_samples(world, split, count, seed=seed) if count else []
    return [(s.request.image, s.request.prompt, s.request.target) for s in samples]


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    _method, _size, _seed, _place, _what = sys.argv[1:]
    if _what == "write":
        write_many(_method, Path(_place, "edits"), int(_size), int(_seed))
    else:
        print(json.dumps(_open(_method, Path(_place, "edits"), int(_seed))))
