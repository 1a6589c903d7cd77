"""Several processes on one folder, and several threads on one model."""

from __future__ import annotations

import os
import random
import signal
import tempfile
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from dualedit import load_edits, refresh_edits, save_edits
from dualedit.history import Change, apply
from dualedit.records import uid_of

from benchmarks.durability.kills import _forked, _rest_of
from benchmarks.durability.world import (
    IMAGE,
    SECOND,
    base_model,
    edited_model,
    group_of,
    leftovers,
    rows_for,
    state_of,
)


def processes(size: int, seed: int) -> dict[str, Any]:
    """Two writers that load, add to both adapters, remove and save, and one reader that refreshes.

    Each commit brings an edit of the same mark to both adapters: a reader that sees one and not the other has
    seen a mixture. One writer of each turn is killed at a random moment.
    """
    faults: list[str] = []
    acknowledged = reads = 0
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as place:
        for turn in range(size):
            folder = Path(place, f"edits-{turn}")
            start = edited_model(2)
            save_edits(start, folder)
            writers = [_forked(_adding(folder, f"{turn}-{who}", 6)) for who in "ab"]
            reader = _forked(_reading(folder))
            if turn % 2:
                time.sleep(rng.uniform(0.05, 1.0))
                os.kill(writers[0][0], signal.SIGKILL)
            marks = [_rest_of(pipe).decode().split() for _, pipe in writers]
            for child, _ in writers:
                os.waitpid(child, 0)
            os.kill(reader[0], signal.SIGTERM)
            lines = _rest_of(reader[1]).decode().splitlines()
            os.waitpid(reader[0], 0)
            reads += sum(line == "ok" for line in lines)
            faults += [f"turn {turn}, reader: {line}" for line in lines if line != "ok"]
            model = load_edits(base_model(), folder)
            held = {note for (name, _), (_, note, _) in state_of(model).items() if name == "default"}
            more = {note for (name, _), (_, note, _) in state_of(model).items() if name == SECOND}
            told = {mark for each in marks for mark in each}
            acknowledged += len(told)
            if told - held or held != more:
                faults.append(f"turn {turn}: lost {sorted(told - held)}, mixed {sorted(held ^ more)}")
            faults += [f"turn {turn}: left over {rest}" for rest in leftovers(folder, ["default", SECOND])]
    return {"turns": size, "acknowledged": acknowledged, "reads": reads, "faults": faults[:50]}


def _adding(folder: Path, who: str, count: int):
    def work(pipe: int) -> None:
        model = load_edits(base_model(), folder)
        for number in range(count):
            mark = f"{who}-{number}"
            for name in ("default", SECOND):
                group = group_of(model, name)
                group.add(
                    rows_for(group, sum(mark.encode()) + number), {"uid": f"{name}-{mark}", "note": mark}
                )
            save_edits(model, folder)
            os.write(pipe, f"{mark} ".encode())

    return work


def _reading(folder: Path):
    def work(pipe: int) -> None:
        warnings.simplefilter("ignore")
        model, seen = None, 0
        while True:
            try:
                if model is None or seen % 5 == 0:
                    model = load_edits(base_model(), folder)
                else:
                    refresh_edits(model)
                state = state_of(model)
                sets = [{v[1] for k, v in state.items() if k[0] == name} for name in ("default", SECOND)]
                said = "ok" if sets[0] == sets[1] else f"mixture {sorted(sets[0] ^ sets[1])}"
                seen += 1
            except Exception as error:
                said = f"{type(error).__name__}: {error}".replace("\n", " ")
            os.write(pipe, f"{said}\n".encode())

    return work


def threads(size: int, seed: int) -> dict[str, Any]:
    """8 threads generate, 2 store, remove and undo; every answer is that of one state of the memory.

    Each of four questions has one edit, which is stored or not: there are sixteen states.

    Args:
        size: seconds, for both methods together.
    """
    found: dict[str, Any] = {"faults": []}
    for method in ("dualedit", "balancedit"):
        figures = _threads_of(method, size / 2, seed)
        found["faults"] += [f"{method}: {fault}" for fault in figures.pop("faults")]
        found[method] = figures
    return found


def _question(number: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(number)
    words = torch.randint(3, 50, (6,), generator=generator)
    ids = torch.cat([torch.tensor([1, *[IMAGE] * 4]), words])[None]
    pixels = torch.randn(1, 3, 8, 8, generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def _threads_of(method: str, seconds: float, seed: int) -> dict[str, Any]:
    from dualedit import add_edit, list_edits
    from dualedit.tuners.adapter import active_adapter

    model = edited_model(1, method)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "o_proj" in name and "dualedit" in name:
                parameter.normal_(std=2.0)
    questions = [_question(number) for number in range(4)]
    group = active_adapter(model).group

    def answer(number: int) -> tuple[int, ...]:
        with torch.no_grad():
            return tuple(model.generate(**questions[number], max_new_tokens=4, do_sample=False)[0].tolist())

    rows = []
    for number, question in enumerate(questions):
        near = {**question, "pixel_values": question["pixel_values"] + 0.001}
        samples = {} if method == "dualedit" else {"positives": [near], "negatives": [_question(77)]}
        add_edit(model, question, torch.tensor([5 + number, 9]), **samples)
        edit_id = list_edits(model)[-1].id
        rows.append((group.rows(group.everything(), edit_id), group.first.record(edit_id)))
        group.remove(edit_id)
    # An edit may reach the other questions, too: what is allowed are the answers of all states there are.
    allowed: list[set[tuple[int, ...]]] = [set() for _ in questions]
    for stored in range(2 ** len(rows)):
        for number, row in enumerate(rows):
            if stored >> number & 1:
                group.add(*row)
        for number, answers in enumerate(allowed):
            answers.add(answer(number))
        for edit_id in group.ids():
            group.remove(edit_id)
    stop, faults, counts = threading.Event(), [], {"answers": 0, "changes": 0}

    def ask(who: int) -> None:
        rng = random.Random(seed + who)
        while not stop.is_set():
            number = rng.randrange(len(questions))
            try:
                said = answer(number)
                if said not in allowed[number]:
                    faults.append(f"question {number} is answered {said}, of no state")
                counts["answers"] += 1
            except Exception as error:
                faults.append(f"asking: {type(error).__name__}: {error}")

    def change(who: int) -> None:
        rng = random.Random(seed + 100 + who)
        mine: dict[int, int] = {}
        while not stop.is_set():
            number = 2 * rng.randrange(len(questions) // 2) + who
            try:
                if number in mine:
                    edit_id = mine.pop(number)
                    uid = uid_of(group.first.record(edit_id), edit_id)
                    inverse = apply([Change(group, edit_id, uid, None)])
                    if rng.random() < 0.5:
                        apply(inverse)  # undo
                        mine[number] = edit_id
                else:
                    mine[number] = group.add(*rows[number])
                counts["changes"] += 1
            except Exception as error:
                faults.append(f"changing: {type(error).__name__}: {error}")
            time.sleep(0.002)

    everyone = [threading.Thread(target=ask, args=(who,)) for who in range(8)]
    everyone += [threading.Thread(target=change, args=(who,)) for who in range(2)]
    for thread in everyone:
        thread.start()
    time.sleep(seconds)
    stop.set()
    for thread in everyone:
        thread.join()
    different = sum(len(each) for each in allowed)
    return {**counts, "seconds": seconds, "different answers": different, "faults": faults[:20]}
