"""Folders with a change made by chance: each is refused with a ValueError, or loads what it held."""

from __future__ import annotations

import json
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dualedit import load_edits, save_edits
from dualedit.folder import View, find_folder, read_folder
from dualedit.memory import EditMemory
from dualedit.memory.rows import memories_in
from dualedit.storage import _edit_config
from dualedit.tuners.journaled import with_journal
from safetensors.torch import load_file

from benchmarks.durability.world import SECOND, base_model, edited_model, group_of, rows_for, state_of

Files = dict[str, bytes]
_WHOLE_LOADS = 200  # every so many mutations are loaded onto a model, too


def _flip(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    if changed:
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _overwrite(data: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(len(data) + 1)
    return data[:place] + rng.randbytes(rng.choice((1, 4, 64))) + data[place + 4 :]


def _cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def _cut_out(data: bytes, rng: random.Random) -> bytes:
    first, last = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    return data[:first] + data[last:]


def _twice(data: bytes, rng: random.Random) -> bytes:
    first, last = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    return data[:last] + data[first:]


def _swap_lines(data: bytes, rng: random.Random) -> bytes:
    lines = data.splitlines(keepends=True)
    rng.shuffle(lines)
    return b"".join(lines)


def _zeros(data: bytes, rng: random.Random) -> bytes:
    first = rng.randrange(len(data) + 1)
    return data[:first] + bytes(len(data) - first)


def _value(data: bytes, rng: random.Random) -> bytes:
    """Another value somewhere in JSON."""
    try:
        content = json.loads(data)
    except ValueError:
        return _flip(data, rng)
    place: Any = content
    while isinstance(place, (dict, list)) and place:
        key = rng.choice(list(place) if isinstance(place, dict) else range(len(place)))
        if not isinstance(place[key], (dict, list)) or not place[key] or rng.random() < 0.3:
            place[key] = rng.choice((None, -1, 0, 1.5, 2**63, "x", "../x", [], {}, True, "NaN"))
            break
        place = place[key]
    return json.dumps(content).encode()


CHANGES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "flip": _flip, "overwrite": _overwrite, "cut": _cut, "cut out": _cut_out, "twice": _twice,
    "swap lines": _swap_lines, "zeros": _zeros, "value": _value,
}  # fmt: skip


def _opened(folder: Path) -> dict[str, Any]:
    """What a folder holds, as loading takes it in, without a model: every check but the model's."""
    config = _edit_config(folder)
    found: dict[str, Any] = {"settings": json.dumps(config.to_dict(), sort_keys=True, default=str)}
    place = find_folder(folder)
    if place is None:
        view, adapters = None, {"default": ""}
    else:
        view = read_folder(place[0], records=False)
        adapters = view.adapters
    for name, inside in adapters.items():
        state: Any = load_file(str(folder / inside / "adapter_model.safetensors"))
        if isinstance(view, View):
            state = with_journal(view, name, state)
        for memory in memories_in(list(state)):
            tables = {n.removeprefix(f"{memory}."): t for n, t in state.items() if n.startswith(f"{memory}.")}
            made = EditMemory({}, {})
            records = {"edit_ids", "edit_lengths", "record_bytes"}
            by_token = {n for n, t in tables.items() if n not in records and n[:2] in ("k_", "v_")}
            made.edit_tables = {
                n: tuple(t.shape[1:]) for n, t in tables.items() if n not in records | by_token
            }
            made.token_tables = {n: tuple(tables[n].shape[1:]) for n in by_token}
            made._adopt(dict(tables))
            found[f"{name}.{memory}"] = (
                made.ids, {i: made.record(i) for i in made.ids},
                {n: t.numpy().tobytes() for n, t in made._buffers.items()},
            )  # fmt: skip
    return found


def _small_folder(place: Path, method: str) -> Path:
    model = edited_model(2 if method == "both" else 1, "dualedit" if method == "dualedit" else "balancedit")
    for number in range(1, 4):
        for name in ["default", SECOND][: 2 if method == "both" else 1]:
            group = group_of(model, name)
            group.add(rows_for(group, number), {"uid": f"u{number}", "prompt": "p", "target": "t"}, number)
        save_edits(model, place)
    group_of(model).remove(1)
    save_edits(model, place)
    return place


def run(size: int, seed: int) -> dict[str, Any]:
    """Mutated folders. A journal cut behind a line is a folder of an earlier moment, and counted as such."""
    rng = random.Random(seed)
    faults: list[str] = []
    outcomes: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as place:
        folders = [
            _small_folder(Path(place, method), method) for method in ("balancedit", "dualedit", "both")
        ]
        known = [(folder, _files(folder), _opened(folder), _earlier(folder)) for folder in folders]
        for turn in range(size):
            folder, files, expected, earlier = rng.choice(known)
            name = rng.choice(sorted(files))
            kind = rng.choice([*CHANGES, "remove", "exchange"])
            wrote = _mutate(folder, files, name, kind, rng)
            told = f"{folder.name}/{name}, {kind}, turn {turn}"
            try:
                found = _opened(folder)
                if turn % _WHOLE_LOADS == 0:
                    budget = None if turn % (2 * _WHOLE_LOADS) else 0  # with a budget, values are read later
                    state_of(load_edits(base_model(), folder, budget=budget))
                if found == expected:
                    outcomes["the same"] += 1
                elif found in earlier:
                    outcomes["as of an earlier commit"] += 1
                else:
                    faults.append(f"{told}: loads something else")
            except ValueError:
                outcomes["refused"] += 1
            except Exception as error:
                faults.append(f"{told}: {type(error).__name__}: {error}")
            if wrote:
                for each in files:
                    (folder / each).parent.mkdir(exist_ok=True)
                    (folder / each).write_bytes(files[each]) if each in wrote else None
            for path in folder.glob(".next-*"):
                shutil.rmtree(path)
    return {"folders": size, "outcomes": dict(outcomes), "faults": faults[:50], "count": len(faults)}


def _files(folder: Path) -> Files:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.suffix in (".json", ".jsonl", ".safetensors")
    }


def _earlier(folder: Path) -> list[dict[str, Any]]:
    """What the folder held after each commit."""
    view = read_folder(folder)
    journal = folder / view.manifest.journal
    data, found = journal.read_bytes(), []
    ends = [0, *(i + 1 for i, byte in enumerate(data) if byte == 10)]
    for end in ends[:-1]:
        journal.write_bytes(data[:end])
        found.append(_opened(folder))
    journal.write_bytes(data)
    return found


def _mutate(folder: Path, files: Files, name: str, kind: str, rng: random.Random) -> list[str]:
    """Change a file of the folder; the files that have to be put back."""
    if kind == "remove":
        (folder / name).unlink()
        return [name]
    if kind == "exchange":
        other = rng.choice(sorted(files))
        (folder / name).write_bytes(files[other])
        (folder / other).write_bytes(files[name])
        return [name, other]
    (folder / name).write_bytes(CHANGES[kind](files[name], rng))
    return [name]
