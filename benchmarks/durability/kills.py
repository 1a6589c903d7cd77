"""A writer that is killed, at every fsync and rename and at random; a journal that is cut at every byte."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dualedit import load_edits, save_edits
from dualedit.folder import read_folder
from dualedit.storage import compact_edits

from benchmarks.durability.world import (
    SECOND,
    State,
    base_model,
    edited_model,
    group_of,
    leftovers,
    rows_for,
    state_of,
)


def script(model: Any, folder: Path, adapters: int, done: Callable[[int], None]) -> list[tuple[float, State]]:
    """Save, add, remove, note, change settings, compact; tell after each that it is saved.

    Returns:
        settings and edits after each step.
    """
    names = ["default", SECOND][:adapters]
    states: list[tuple[float, State]] = []

    def saved() -> None:
        save_edits(model, folder)
        done(len(states))
        states.append((model.peft_config["default"].alpha, state_of(model)))

    number = 0
    saved()
    for turn in range(3):
        for name in names:
            number += 1
            group_of(model, name).add(rows_for(group_of(model, name), number), {"uid": f"u{number}"}, number)
        saved()
        if turn == 1:
            group_of(model).remove(group_of(model).ids()[0])
            saved()
            newest = group_of(model).ids()[-1]
            group_of(model).note(newest, {**group_of(model).first.record(newest), "note": "changed"})
            saved()
            model.peft_config["default"].alpha = 0.75
            saved()
    compact_edits(folder)
    done(len(states))
    states.append(states[-1])
    number += 1
    group_of(model).add(rows_for(group_of(model), number), {"uid": f"u{number}"}, number)
    saved()
    return states


def _forked(work: Callable[[int], None]) -> tuple[int, int]:
    """Run a function in a fork; its process id, and where it writes."""
    read, write = os.pipe()
    child = os.fork()
    if child:
        os.close(write)
        return child, read
    try:
        os.close(read)
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 2)
        work(write)
    finally:
        os._exit(0)


def _wrapped(before: Callable[[], None]) -> None:
    """Call something before each fsync and rename of this process."""
    for name in ("fsync", "replace"):
        whole = getattr(os, name)

        def call(*args, _whole=whole):
            before()
            return _whole(*args)

        setattr(os, name, call)


def _writer(folder: Path, adapters: int, kill_at: int | None) -> tuple[int, int]:
    model = edited_model(adapters)

    def work(pipe: int) -> None:
        count = 0

        def before() -> None:
            nonlocal count
            if count == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1

        _wrapped(before)
        script(model, folder, adapters, lambda step: os.write(pipe, bytes([step])))
        os.write(pipe, bytes([255]) + json.dumps(count).encode())

    return _forked(work)


def _rest_of(pipe: int) -> bytes:
    data = b""
    while piece := os.read(pipe, 4096):
        data += piece
    os.close(pipe)
    return data


def run(size: int, seed: int) -> dict[str, Any]:
    """Kills of a writer with one adapter and with two: first at each fsync and rename, then at random."""
    rng = random.Random(seed)
    faults: list[str] = []
    kills = {"fsync or rename": 0, "random": 0}
    repaired = 0
    with tempfile.TemporaryDirectory() as place:
        plans = {}
        for adapters in (1, 2):
            folder = Path(place, f"whole-{adapters}")
            states = script(edited_model(adapters), folder, adapters, lambda step: None)
            began = time.perf_counter()
            child, pipe = _writer(Path(place, f"timed-{adapters}"), adapters, None)
            seams = int(_rest_of(pipe).partition(bytes([255]))[2])
            os.waitpid(child, 0)
            plans[adapters] = (states, seams, time.perf_counter() - began)
        points = [(a, k) for a in (1, 2) for k in range(plans[a][1])]
        if size < len(points):
            points = rng.sample(points, size)
        points += [(rng.choice((1, 2)), -1) for _ in range(size - len(points))]
        for turn, (adapters, point) in enumerate(points):
            states, _, seconds = plans[adapters]
            folder = Path(place, f"kill-{turn}")
            child, pipe = _writer(folder, adapters, None if point < 0 else point)
            if point < 0:
                time.sleep(rng.uniform(0, seconds))
                os.kill(child, signal.SIGKILL)
            acknowledged = _rest_of(pipe).partition(bytes([255]))[0]
            os.waitpid(child, 0)
            kills["random" if point < 0 else "fsync or rename"] += 1
            told, was_repaired = _examine(folder, adapters, states, len(acknowledged))
            repaired += was_repaired
            faults += [f"{adapters} adapters, point {point}: {fault}" for fault in told]
            shutil.rmtree(folder, ignore_errors=True)
    return {"kills": sum(kills.values()), "at": kills, "repaired": repaired, "faults": faults}


def _examine(
    folder: Path, adapters: int, states: list[tuple[float, State]], acknowledged: int
) -> tuple[list[str], int]:
    """What is wrong with a folder whose writer was killed after so many acknowledged steps."""
    if not (folder / "manifest.json").is_file():
        return (["acknowledged, and nothing is there"] if acknowledged else []), 0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            model = load_edits(base_model(), folder)
        except Exception as error:
            return [f"does not open: {type(error).__name__}: {error}"], 0
    found = (model.peft_config["default"].alpha, state_of(model))
    faults = []
    # The step in flight may have been saved, though nobody was told so.
    if found not in states[max(0, acknowledged - 1) : acknowledged + 1]:
        faults.append(f"holds neither what was acknowledged (step {acknowledged}) nor the step in flight")
    rest = leftovers(folder, ["default", SECOND][:adapters])
    if rest:
        faults.append(f"left over: {rest}")
    return faults, int(any("is repaired" in str(each.message) for each in caught))


def truncations(size: int, seed: int) -> dict[str, Any]:
    """A journal cut at every byte: each opens, as it was after some commit, and says so where one is torn."""
    faults: list[str] = []
    cuts = loaded = 0
    with tempfile.TemporaryDirectory() as place:
        for adapters in (1, 2):
            folder = Path(place, f"edits-{adapters}")
            model = edited_model(adapters)
            names = ["default", SECOND][:adapters]
            for number in range(1, 6):
                for name in names:
                    group = group_of(model, name)
                    group.add(rows_for(group, number), {"uid": f"u{name}{number}"}, number)
                save_edits(model, folder)
            journal = folder / read_folder(folder).manifest.journal
            data = journal.read_bytes()
            ends = [0, *(i + 1 for i, byte in enumerate(data) if byte == 10)]
            for length in range(len(data) + 1):
                journal.write_bytes(data[:length])
                cuts += 1
                try:
                    view = read_folder(folder)
                except Exception as error:
                    faults.append(f"{length} bytes: {type(error).__name__}: {error}")
                    continue
                whole = sum(end <= length for end in ends) - 1
                if view.seq != whole or (view.torn > 0) != (length not in ends):
                    faults.append(f"{length} bytes: {view.seq} commits, {view.torn} bytes torn")
                if length % 97 == 0:
                    copy = Path(place, "copy")
                    shutil.copytree(folder, copy)
                    model = load_edits(base_model(), copy)
                    loaded += 1
                    if len(state_of(model)) != (whole + 1) * adapters or leftovers(copy, names):
                        faults.append(f"{length} bytes: loads otherwise, or leaves something over")
                    shutil.rmtree(copy)
    return {"cuts": cuts, "loaded": loaded, "faults": faults}
