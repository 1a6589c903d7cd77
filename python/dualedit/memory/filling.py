"""Edits of a folder put into a memory whose values stay in the folder's files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
    own_ids, own_lengths = (saved[name].rows(0, saved[name].shape[0]) for name in (IDS, LENGTHS))
    _check(memory, saved, own_ids, own_lengths)
    ids = torch.tensor(sorted(edits), dtype=torch.int64)
    added = {i: rows_of(kept.source, i) for i, kept in edits.items() if kept.source != 0}
    for rows in added.values():
        memory.check(rows)
    is_own = ~torch.isin(ids, torch.tensor(list(added), dtype=torch.int64))
    rows_own = _rows_of(own_ids, ids[is_own])
    places = {int(i): place for place, i in enumerate(ids.tolist()) if i in added} if added else {}
    spread = {places[i]: rows for i, rows in added.items()}
    slots, lengths = torch.empty_like(ids), torch.zeros_like(ids)
    slots[is_own] = torch.arange(len(rows_own))
    lengths[is_own] = own_lengths[rows_own]
    store = _store(memory, saved, rows_own, own_lengths, spread, tiers, spill)
    for place, rows in spread.items():
        tokens = next((len(rows[name]) for name in memory.token_tables), 0)
        slots[place], lengths[place] = store.put(memory.as_stored(rows), tokens), tokens
    tables = {
        name: _table(saved[name], len(ids), is_own, rows_own, {p: r[name] for p, r in spread.items()})
        for name in RESIDENT
        if name in memory.edit_tables
    }
    gone = own_ids[~torch.isin(own_ids, ids[is_own])]
    notes = _notes(memory, saved, own_ids, gone, edits, unread, spill)
    memory.adopt_stored(ids, lengths, tables, notes, store, slots)


def _rows_of(own: Tensor, wanted: Tensor) -> Tensor:
    """In which rows of the own file edits are. Raises KeyError."""
    order, by = own.sort()
    place = torch.searchsorted(order, wanted).clamp(max=max(len(own) - 1, 0))
    if len(wanted) and (not len(own) or not torch.equal(order[place], wanted)):
        raise KeyError("an edit is not in its file")
    return by[place]


def _check(memory: EditMemory, saved: Mapping[str, SavedTable], ids: Tensor, lengths: Tensor) -> None:
    shapes = {name: table.shape for name, table in saved.items()}
    for name in (*memory.edit_tables, *memory.token_tables):
        packed = name in memory.token_tables and packing.is_packed(memory.kind)
        dtype = saved[name].dtype
        if (dtype != torch.uint8) if packed else not dtype.is_floating_point:
            raise ValueError(f"{name} is {dtype} in the file; it is damaged. Restore it from a copy.")
    if ids.dtype != torch.int64 or lengths.dtype != torch.int64 or ids.ndim != 1:
        raise ValueError(f"edit_ids are {ids.dtype}; the file is damaged. Restore it from a copy.")
    memory.check_lengths(ids, lengths)
    memory.check_shapes(shapes, len(ids), int(lengths.sum()))


def _store(
    memory: EditMemory, saved: Mapping[str, SavedTable], rows: Tensor, own_lengths: Tensor,
    added: Mapping[int, Mapping[str, Tensor]], tiers: Tiers, spill: Spill,
) -> ValueStore:  # fmt: skip
    """Where the values are, with a slot for each of the own file's edits in these rows, from 0 on."""
    shapes = memory.edit_tables | memory.token_tables
    shapes = {name: shape for name, shape in shapes.items() if name not in RESIDENT}
    # An empty table says nothing about the type: the first edits bring it.
    first = next(iter(added.values()), None)
    dtypes = {
        name: saved[name].dtype if saved[name].shape[0] or first is None else first[name].dtype
        for name in shapes
    }
    store = ValueStore(shapes, memory.token_tables, dtypes, memory.kind, tiers, saved, spill)
    starts = own_lengths.cumsum(0) - own_lengths
    store.own(rows, starts[rows], own_lengths[rows])
    return store


def _table(
    saved: SavedTable, count: int, is_own: Tensor, rows: Tensor, added: Mapping[int, Tensor]
) -> Tensor:
    """A resident table: the own file's rows at their places, those of segments at theirs, and some room."""
    shape, dtype = saved.shape[1:], saved.dtype
    if not saved.shape[0] and added:
        dtype = next(iter(added.values())).dtype
    table = torch.empty((count + count // 8 + 8, *shape), dtype=dtype)
    whole = len(rows) == saved.shape[0] and bool(is_own[: len(rows)].all())
    if whole and torch.equal(rows, torch.arange(len(rows))):
        saved.file.read_into(table[: len(rows)], saved.begin)
    elif len(rows):
        table[:count][is_own] = saved.rows(0, saved.shape[0])[rows]
    for place, row in added.items():
        table[place] = row
    if not shape:  # version 0.1 had NaN for an edit without a radius of its own
        table[:count] = torch.where(table[:count].isnan(), NO_RADIUS, table[:count])
    return table


def _notes(
    memory: EditMemory, saved: Mapping[str, SavedTable], own_ids: Tensor, gone: Tensor,
    edits: Mapping[int, KeptEdit], unread: object, spill: Spill,
) -> Notes:  # fmt: skip
    """The records: of the own file where they are not noted anew."""
    if "key" not in memory.edit_tables:
        return Notes(dict.fromkeys(edits, {}))
    table = saved[RECORDS]
    try:
        notes = Notes(SavedNotes(table, own_ids), spilled(spill))  # no list: a hundred thousand numbers weigh
    except ValueError:  # of an older version, or damaged: reading all of it says which
        text = table.file.bytes_at(table.begin, table.shape[0])
        notes = notes_in(text, own_ids.tolist())
    for number in gone.tolist():
        del notes[number]
    for number, kept in edits.items():
        if kept.record is not unread:
            notes[number] = dict(kept.record)
    return notes
