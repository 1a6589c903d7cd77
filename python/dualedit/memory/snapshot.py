"""The stored edits as they were at one moment."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dualedit_kernels import KeyCodes

from . import packing
from .key_codes import TableCodes

if TYPE_CHECKING:
    from .values import ValueStore


@dataclass(frozen=True)
class Fired:
    """What a layer needs of the edits that answer a batch.

    Attributes:
        tables: name to tensor: rows of all edits, or of those that answer.
        start, length: first row and number of rows [n] (int64) of each of these edits in the token tables.
        route: [B] int64, each sequence's edit among these, -1 for none; None: nothing is stored.
    """

    tables: Mapping[str, Tensor]
    start: Tensor
    length: Tensor
    route: Tensor | None


class Tables(Mapping[str, Tensor]):
    """The tables of a snapshot, a row an edit. What removed edits have left is taken out when one asks.

    Args:
        kept: the tables as the memory keeps them, rows of removed edits included.
        places: [N] int64, which rows of the wide ones are the snapshot's; None: all.
        wide: names of the tables for which that is so.
        apart: the values that are in no table, and where each edit's are [N]; None: there are none such.
    """

    def __init__(
        self,
        kept: Mapping[str, Tensor],
        places: Tensor | None = None,
        wide: Sequence[str] = (),
        apart: tuple[ValueStore, Tensor] | None = None,
    ):
        self.kept, self.places, self.wide, self.apart = dict(kept), places, frozenset(wide), apart
        self._made: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        if self.apart is not None and name in self.apart[0].names:
            store, slots = self.apart
            return store.table(name, slots.tolist())
        table = self.kept[name]
        if self.places is None or name not in self.wide:
            return table
        if name not in self._made:
            with torch.inference_mode(False):
                self._made[name] = table[self.places.to(table.device)]
        return self._made[name]

    def __iter__(self) -> Iterator[str]:
        yield from self.kept
        if self.apart is not None:
            yield from self.apart[0].names

    def __len__(self) -> int:
        return sum(1 for _ in self)


@dataclass(frozen=True)
class Snapshot:
    """The edits of one memory at one moment.

    Attributes:
        tables: name to tensor; N rows for an edit table, T rows (all edits' tokens, one after the other) for
            a token table.
        edit_ids: the edits' numbers [N] int64, in the order of the rows, which is ascending.
        start, length: first row and number of rows [N] (int64) of each edit in the token tables.
        key_codes: what is known of the table "key" as the memory keeps it.
        token_tables: names of the token tables.
        kind: how their rows are stored (`packing.KINDS`).
        dtype: of their values when they are used.
    """

    tables: Tables
    edit_ids: Tensor
    start: Tensor
    length: Tensor
    key_codes: TableCodes = field(default_factory=TableCodes, repr=False, compare=False)
    token_tables: frozenset[str] = frozenset()
    kind: str = "native"
    dtype: torch.dtype = torch.float32

    def __len__(self) -> int:
        return len(self.edit_ids)

    @property
    def ids(self) -> tuple[int, ...]:
        """The edits' numbers, in the order of the rows."""
        return tuple(self.edit_ids.tolist())

    def id_of(self, row: int) -> int:
        """Number of the edit in a row."""
        return int(self.edit_ids[row])

    def row_of(self, edit_id: int) -> int:
        """Row of an edit. Raises KeyError where it was not stored then."""
        row = int(torch.searchsorted(self.edit_ids, edit_id))
        if row == len(self) or self.id_of(row) != edit_id:
            raise KeyError(f"edit_id={edit_id!r}: no such edit in this snapshot.")
        return row

    def without(self, edit_ids: Sequence[int]) -> Snapshot:
        """The same moment without some of its edits; keys and values stay where they are."""
        gone = torch.isin(self.edit_ids, torch.tensor(edit_ids, device=self.edit_ids.device))
        kept = (~gone).nonzero()[:, 0]
        tables = self.tables
        with torch.inference_mode(False):
            own = {
                name: table if name in tables.wide or name in self.token_tables else table[kept]
                for name, table in tables.kept.items()
            }
            places = kept if tables.places is None else tables.places[kept]
            apart = None if tables.apart is None else (tables.apart[0], tables.apart[1][kept])
            return Snapshot(
                Tables(own, places, tables.wide, apart), self.edit_ids[kept], self.start[kept],
                self.length[kept], self.key_codes, self.token_tables, self.kind, self.dtype,
            )  # fmt: skip

    # ------------------------------------------------------------------ looking up

    @property
    def whole(self) -> bool:
        """Whether every table is what an operator takes: a row an edit, in memory, unpacked."""
        return self.tables.places is None and self.tables.apart is None and self._plain

    @property
    def _plain(self) -> bool:
        return packing.stored_dtype(self.dtype, self.kind) == self.dtype

    def codes(self, keys: Tensor, metric: str) -> KeyCodes | None:
        """Codes with which `nearest_key` looks among ``keys``; None where it is as well off without.

        Args:
            keys: the table "key" as the memory keeps it, or a conversion of it (for which there are none).
        """
        return self.key_codes.of(keys, metric) if keys is self.tables.kept["key"] else None

    # ------------------------------------------------------------------ values

    def fetch(self, route: Tensor | None) -> Fired:
        """The values of the edits that answer a batch, wherever they lie.

        Args:
            route: [B] int64, row of each sequence's edit, -1 for none.
        """
        tables = self.tables
        if route is None or self.whole:
            return Fired(tables, self.start, self.length, route)
        if tables.apart is None and (self._plain or not self.token_tables):
            if tables.wide <= {"key"} or tables.places is None:
                return Fired(tables.kept, self.start, self.length, route)
            places = tables.places.to(route.device)
            return Fired(
                tables.kept, self.start, self.length,
                torch.where(route >= 0, places[route.clamp(min=0)], -1),
            )  # fmt: skip
        wanted = sorted(set(route.tolist()) - {-1})
        found = self._values(wanted)
        among = torch.full_like(route, -1)
        for number, row in enumerate(wanted):
            among[route == row] = number
        length = self.length[wanted]
        return Fired(found, length.cumsum(0) - length, length, among)

    def everything(self) -> Fired:
        """The values of all edits."""
        if self.whole:
            return Fired(self.tables, self.start, self.length, None)
        return Fired(
            self._values(list(range(len(self)))), self.length.cumsum(0) - self.length, self.length, None
        )

    def _values(self, rows: list[int]) -> dict[str, Tensor]:
        """Values of the edits in some rows, unpacked: a row an edit, or its tokens, edit after edit."""
        tables = self.tables
        with torch.inference_mode(False):
            if tables.apart is not None:
                store, slots = tables.apart
                device = self.edit_ids.device
                found = store.rows([int(slots[row]) for row in rows], device)
            else:
                found = {name: self._rows_of(name, rows) for name in tables.kept if name != "key"}
            return {
                name: packing.unpack(table, self.kind, self.dtype) if name in self.token_tables else table
                for name, table in found.items()
            }

    def _rows_of(self, name: str, rows: list[int]) -> Tensor:
        table = self.tables.kept[name]
        if name not in self.token_tables:
            return self.tables[name][rows]
        first, count = self.start[rows].tolist(), self.length[rows].tolist()
        return torch.cat([table[:0], *(table[a : a + n] for a, n in zip(first, count, strict=True))])

    def rows(self, edit_id: int) -> dict[str, Tensor]:
        """Copies of one edit's rows as they are stored, as `EditMemory.add` takes them."""
        row = self.row_of(edit_id)
        first, tables = int(self.start[row]), self.tables
        tokens = slice(first, first + int(self.length[row]))
        place = row if tables.places is None else int(tables.places[row])
        own = {
            name: table[tokens if name in self.token_tables else place if name in tables.wide else row]
            for name, table in tables.kept.items()
        }
        if tables.apart is not None:
            store, slots = tables.apart
            own |= store.read(int(slots[row]))
        return {name: table.clone() for name, table in own.items()}
