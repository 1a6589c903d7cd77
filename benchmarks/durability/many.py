"""Many stored edits: how long opening, adding, removing and looking up take, and what memory they need."""

from __future__ import annotations

import gc
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from dualedit import load_edits, save_edits
from dualedit.memory.routing import nearest_edit
from dualedit.memory.rows import records_tensor
from dualedit.toy.editors import EDITORS, load_editor
from dualedit.toy.model import load_embedded
from dualedit.tuners.adapter import active_adapter
from torch import Tensor

from dualedit_kernels import nearest_key

METHODS = ("dualedit", "balancedit")
_TOKENS = 16  # of an edit's image, question and answer in the embedded model, about
_TURNS = 15


def _resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def run(size: int, seed: int) -> dict[str, Any]:
    """So many edits of the embedded models' sizes."""
    return {method: _many_of(method, size, seed) for method in METHODS}


def _fill(model: Any, count: int, seed: int) -> None:
    """So many edits of chance in the model's memory."""
    generator = torch.Generator().manual_seed(seed)
    group = active_adapter(model).group
    lengths = torch.full((count,), _TOKENS)
    for memory in group.memories.values():
        state: dict[str, Tensor] = {
            name: torch.randn((count, *shape), generator=generator)
            for name, shape in memory.edit_tables.items()
        }
        if "radius" in state:
            state["radius"] = torch.full((count,), 0.01)
        state |= {
            name: torch.randn((count * _TOKENS, *shape), generator=generator)
            for name, shape in memory.token_tables.items()
        }
        records = [{"uid": f"u{i}", "prompt": f"question {i}", "target": "answer"} for i in range(count)]
        state["edit_ids"] = torch.arange(1, count + 1)
        state["edit_lengths"] = lengths if memory.token_tables else torch.zeros_like(lengths)
        state["record_bytes"] = records_tensor(records if "radius" in state else [{}] * count)
        memory._adopt(state)


def _many_of(method: str, size: int, seed: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place, "edits")
        model = load_edits(load_embedded()[0], EDITORS / method)
        _fill(model, size, seed)
        began = time.perf_counter()
        save_edits(model, folder)
        found: dict[str, Any] = {"edits": size, "save_s": round(time.perf_counter() - began, 2)}
        found["folder_mb"] = round(sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) / 1e6, 1)
        base = load_embedded()[0]
        del model
        gc.collect()
        before = _resident()
        began = time.perf_counter()
        model = load_edits(base, folder)
        found["open_s"] = round(time.perf_counter() - began, 2)
        gc.collect()
        group = active_adapter(model).group
        stored = group.snapshot()[group.gate_name]
        keys = stored.tables["key"]
        found["keys_mb"] = round(keys.numel() * keys.element_size() / 1e6, 1)
        found["resident_mb"] = round((_resident() - before) / 1e6, 1)
        found |= _changes(model, folder) | _lookups(model, seed)
        return found


def _changes(model: Any, folder: Path) -> dict[str, float]:
    """Median milliseconds of adding and removing, each saved; and of the file work alone."""
    group = active_adapter(model).group
    rows = group.rows(group.everything(), 1)
    adding, removing = [], []
    for turn in range(_TURNS):
        began = time.perf_counter()
        number = group.add(rows, {"uid": f"new{turn}"})
        save_edits(model, folder)
        adding.append(time.perf_counter() - began)
        began = time.perf_counter()
        group.remove(number if turn % 2 else turn + 1)
        save_edits(model, folder)
        removing.append(time.perf_counter() - began)
    return {
        "add_ms": round(1000 * statistics.median(adding), 1),
        "remove_ms": round(1000 * statistics.median(removing), 1),
    }


def _lookups(model: Any, seed: int) -> dict[str, float]:
    """The library's lookup against the bare operator with codes, alternately: median of paired ratios."""
    adapter = active_adapter(model)
    stored = adapter.stored()
    keys = stored.tables["key"]
    query = torch.randn((1, keys.shape[1]), generator=torch.Generator().manual_seed(seed))
    radius, codes = adapter.radii(stored), stored.codes(keys, adapter.metric)
    ours, bare = [], []
    for _ in range(40):
        began = time.perf_counter()
        nearest_edit(query, adapter.stored(), adapter.metric, radius)
        ours.append(time.perf_counter() - began)
        began = time.perf_counter()
        nearest_key(query, keys, radius, adapter.metric, codes)
        bare.append(time.perf_counter() - began)
    ratios = [a / b for a, b in zip(ours[5:], bare[5:], strict=True)]
    return {
        "lookup_ms": round(1000 * statistics.median(ours[5:]), 3),
        "lookup_ratio": round(statistics.median(ratios), 3),
    }


def sequential(size: int, seed: int) -> dict[str, Any]:
    """Edits told one after the other: how many of the first are still answered as told, along the way."""
    from dualedit.checking import EditFailed

    found: dict[str, Any] = {}
    for method in METHODS:
        editor = load_editor(method, fallback=False)
        facts = _facts(size, seed)
        first: list[tuple[Any, str, str]] = []
        curve = []
        marks = sorted({min(size, n) for n in (10, 100, 200, 500, 1000, size)})
        told = failed = 0
        for image, question, answer in facts:
            try:
                editor.edit(image, question, answer)
            except EditFailed:
                failed += 1
                continue
            told += 1
            if len(first) < 100:
                first.append((image, question, answer))
            if told in marks:
                answers = [editor.answer(picture, asked) for picture, asked, _ in first]
                right = sum(said == wanted for said, (_, _, wanted) in zip(answers, first, strict=True))
                curve.append({"edits": told, "first": len(first), "right": right})
        found[method] = {"told": told, "failed": failed, "curve": curve}
    return found


def _facts(size: int, seed: int) -> list[tuple[Any, str, str]]:
    """Facts of the embedded model's world, no two of one picture and question."""
    from dualedit.toy.samples import edit_samples
    from dualedit.toy.world import World

    samples = [each for split in ("test", "train") for each in edit_samples(World(), split, size, seed=seed)]
    return [(s.request.image, s.request.prompt, s.request.target) for s in samples[:size]]
