"""Edits of a folder put into a memory whose values stay in the folder's files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from . import packing
from .budget import Tiers
from .notes import Notes, SavedNotes, notes_in, spilled
from .rows import IDS, LENGTHS, RECORDS
from .saving import NO_RADIUS
from .tables import EditMemory
from .values import SavedTable, Spill, ValueStore

RESIDENT = ("key", "radius")  # always in memory: by these an edit is found


class KeptEdit(Protocol):
    """What a folder says of an edit: the commit whose segment has its rows (0: the own file), its record."""

    @property
    def source(self) -> int: ...

    @property
    def record(self) -> Mapping[str, Any]: ...


def fill(
    memory: EditMemory,
    saved: Mapping[str, SavedTable],
    edits: Mapping[int, KeptEdit],
    unread: object,
    rows_of: Callable[[int, int], Mapping[str, Tensor]],
    tiers: Tiers,
    spill: Spill,
) -> None:
    """Put edits into an empty memory.

    Args:
        saved: the memory's tables in the adapter's own file, by their own names.
        edits: number to edit.
        unread: the record of an edit whose record stands in the own file.
        rows_of: (source, number) to the rows of an edit that is in a segment.
        tiers, spill: shared by the adapter's memories.

    Raises:
        ValueError: tables that do not fit the memory or each other.
    """
    own_ids, own_lengths = (saved[name].rows(0, saved[name].shape[0]).tolist() for name in (IDS, LENGTHS))
    _check(memory, saved, own_ids, own_lengths)
    row_of = {number: row for row, number in enumerate(own_ids)}
    ids = sorted(edits)
    own = [(place, i) for place, i in enumerate(ids) if edits[i].source == 0]
    added = {
        place: rows_of(edits[i].source, i) for place, i in enumerate(ids) if edits[i].source != 0
    }
    for rows in added.values():
        memory.check(rows)
    rows_own = [row_of[i] for _, i in own]
    places_own = [place for place, _ in own]
    store, slots = _values(memory, saved, rows_own, own_lengths, added, tiers, spill)
    of_slots = torch.empty(len(ids), dtype=torch.int64)
    of_slots[places_own] = torch.arange(len(own))
    for place, slot in slots.items():
        of_slots[place] = slot
    lengths = [0] * len(ids)
    for place, row in zip(places_own, rows_own, strict=True):
        lengths[place] = own_lengths[row]
    for place, rows in added.items():
        lengths[place] = next((len(rows[name]) for name in memory.token_tables), 0)
    tables = {
        name: _table(saved[name], len(ids), places_own, rows_own, {p: r[name] for p, r in added.items()})
        for name in RESIDENT
        if name in memory.edit_tables
    }
    notes = _notes(memory, saved, own_ids, edits, unread, spill)
    memory.adopt_stored(ids, lengths, tables, notes, store, of_slots)


def _check(
    memory: EditMemory, saved: Mapping[str, SavedTable], ids: Sequence[int], lengths: Sequence[int]
) -> None:
    shapes = {name: table.shape for name, table in saved.items()}
    for name in (*memory.edit_tables, *memory.token_tables):
        packed = name in memory.token_tables and packing.is_packed(memory.kind)
        dtype = saved[name].dtype
        if (dtype != torch.uint8) if packed else not dtype.is_floating_point:
            raise ValueError(f"{name} is {dtype} in the file; it is damaged. Restore it from a copy.")
    memory._check_lengths(ids, lengths)
    memory._check_shapes(shapes, len(ids), sum(lengths))


def _values(
    memory: EditMemory, saved: Mapping[str, SavedTable], rows_own: Sequence[int], own_lengths: Sequence[int],
    added: Mapping[int, Mapping[str, Tensor]], tiers: Tiers, spill: Spill,
) -> tuple[ValueStore, dict[int, int]]:  # fmt: skip
    """The values: slots from 0 on for the own file's edits in their order, and slots of the others by place."""
    shapes = memory.edit_tables | memory.token_tables
    shapes = {name: shape for name, shape in shapes.items() if name not in RESIDENT}
    # An empty table says nothing about the type: the first edits bring it.
    first = next(iter(added.values()), None)
    dtypes = {
        name: saved[name].dtype if saved[name].shape[0] or first is None else first[name].dtype
        for name in shapes
    }
    store = ValueStore(shapes, memory.token_tables, dtypes, memory.kind, tiers, saved, spill)
    starts = [0]
    for length in own_lengths:
        starts.append(starts[-1] + length)
    store.own(rows_own, [starts[row] for row in rows_own], [own_lengths[row] for row in rows_own])
    slots = {}
    for place, rows in added.items():
        slots[place] = store.put(rows, next((len(rows[name]) for name in memory.token_tables), 0))
    return store, slots


def _table(
    saved: SavedTable, count: int, places: Sequence[int], rows: Sequence[int], added: Mapping[int, Tensor]
) -> Tensor:
    """A resident table: the own file's rows at their places, those of segments at theirs, and some room."""
    shape, dtype = saved.shape[1:], saved.dtype
    if not saved.shape[0] and added:
        dtype = next(iter(added.values())).dtype
    table = torch.empty((count + count // 8 + 8, *shape), dtype=dtype)
    if list(rows) == list(range(saved.shape[0])) and list(places) == list(range(len(places))):
        saved.file.read_into(table[: len(rows)], saved.begin)
    elif len(rows):
        table[torch.tensor(places)] = saved.rows(0, saved.shape[0])[torch.tensor(rows)]
    for place, row in added.items():
        table[place] = row
    if not shape:  # version 0.1 had NaN for an edit without a radius of its own
        table[:count] = torch.where(table[:count].isnan(), NO_RADIUS, table[:count])
    return table


def _notes(
    memory: EditMemory, saved: Mapping[str, SavedTable], own_ids: Sequence[int],
    edits: Mapping[int, KeptEdit], unread: object, spill: Spill,
) -> Notes:  # fmt: skip
    """The records: of the own file where they are not noted anew."""
    if "key" not in memory.edit_tables:
        return Notes(dict.fromkeys(edits, {}))
    table = saved[RECORDS]
    try:
        notes = Notes(SavedNotes(table, own_ids), spilled(spill))
    except ValueError:  # of an older version, or damaged: reading all of it says which
        text = table.file.bytes_at(table.begin, table.shape[0])
        notes = notes_in(text, list(own_ids))
    for number in own_ids:
        if number not in edits:
            del notes[number]
    for number, kept in edits.items():
        if kept.record is not unread:
            notes[number] = dict(kept.record)
    return notes
