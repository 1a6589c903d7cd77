"""The stored edits: growing tables that a module can save, load and hand out as snapshots.

A table has one row an edit ("edit" tables: keys, radii, values) or one row a token of an edit ("token"
tables: cached keys and values of variable length). Appending never moves a row that a snapshot can see, and
removing or bringing back makes new tables of numbers, so a generation that holds a snapshot is untouched by
edits made meanwhile. Edits are in the order of their numbers, that of their making.

Wide rows (keys, values) stay where they are when an edit goes: copying a hundred megabytes for each removal
would take longer than the removal. Each edit knows its place, and what removed edits leave is cleared away
once it is a 64th (of token tables: the larger half). With a budget, values are in no table but in files
(`ValueStore`).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from ..records import uid_of
from . import packing
from .key_codes import TableCodes
from .notes import Notes, ends_at
from .saving import NO_RADIUS, SavedTables
from .snapshot import Snapshot, Tables
from .values import ValueStore

_FIRST_CAPACITY = 8
_SMALL = 8 << 20  # bytes of wide rows that are copied at once when an edit goes
_CLEARED_AT = 64  # of so many edits, one that is gone may leave its rows
__all__ = ["NO_RADIUS", "EditMemory"]
_NUMBERS = ("edit_ids", "edit_lengths", "edit_starts", "edit_places", "edit_slots")
# What changes when edits are added or removed, beside the tables and the records.
_STATE = (
    "_num_edits", "_num_rows", "_num_tokens", "_num_removed", "_highest_id", "_snapshot", "_key_codes",
    "_expected", "_timed", "_touched", "_gone",
)  # fmt: skip


class EditMemory(SavedTables, nn.Module):
    """The tables of one edited layer.

    Args:
        edit_tables: name to shape of one row, for tables with a row an edit.
        token_tables: name to width, for tables with a row a token.
        device, dtype: of the tables; the first `add` of an empty memory takes over the dtype of what it
            stores.
        kind: how the token tables' rows are stored (`packing.KINDS`).
    """

    def __init__(
        self,
        edit_tables: Mapping[str, tuple[int, ...]],
        token_tables: Mapping[str, int],
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        kind: str = "native",
    ):
        super().__init__()
        self.kind = kind
        self.edit_tables = {name: tuple(shape) for name, shape in edit_tables.items()}
        self.token_tables = {
            name: (packing.stored_width(width, kind),) for name, width in token_tables.items()
        }
        for name, shape in (self.edit_tables | self.token_tables).items():
            stored = packing.stored_dtype(dtype, kind) if name in self.token_tables else dtype
            self.register_buffer(name, torch.empty((0, *shape), device=device, dtype=stored))
        # Of what device and dtype values are when they are used.
        self.register_buffer("like", torch.empty(0, device=device, dtype=dtype), persistent=False)
        for name in _NUMBERS:
            # Saved: numbers and lengths. Not saved: first rows in the token tables, rows in the wide edit
            # tables, and slots of values in files.
            saved = name in ("edit_ids", "edit_lengths")
            self.register_buffer(
                name, torch.empty(0, dtype=torch.int64, device=device), persistent=saved
            )
        # JSON text of each edit's record, UTF-8, one after the other: it travels in the same file as the
        # tensors.
        self.register_buffer("record_bytes", torch.empty(0, dtype=torch.uint8, device=device))
        self.values: ValueStore | None = None  # where the values are, if they are in files
        self._num_edits = 0
        self._num_rows = 0  # rows of the wide edit tables that are used
        self._num_tokens = 0  # rows of the token tables that are used
        self._num_removed = 0  # of these, rows of edits that are gone
        self._highest_id = 0
        self._records = Notes()
        self._gone: dict[int, int] = {}  # edits that are gone, and their rows in the wide edit tables
        self._snapshot: Snapshot | None = None
        self._key_codes = TableCodes()
        self._expected = 0  # edits that the saved folder holds and that have not been loaded
        # Of the edits that do not always answer: number to when they stop (0: they are disabled).
        self._timed: dict[int, float] = {}
        # Since the edits were last saved or loaded: number to the id that the saved edit of this number has,
        # None where no edit of this number is saved.
        self._touched: dict[int, str | None] = {}

    def __len__(self) -> int:
        return self._num_edits

    @property
    def highest_id(self) -> int:
        """The highest number that an edit of this memory has or has had; 0 if there was none."""
        return self._highest_id

    @property
    def ids(self) -> list[int]:
        """Numbers of the stored edits, oldest first."""
        return self.edit_ids[: self._num_edits].tolist()

    def __contains__(self, edit_id: int) -> bool:
        return edit_id in self._records

    def record(self, edit_id: int) -> dict:
        """What was noted about an edit when it was stored (empty if nothing was)."""
        return dict(self._records.get(edit_id))

    def silent(self, now: float) -> tuple[int, ...]:
        """Numbers of the edits that are stored and do not answer now, disabled or expired, ascending."""
        return tuple(sorted(i for i, end in self._timed.items() if end <= now)) if self._timed else ()

    def _set_record(self, edit_id: int, record: dict) -> None:
        self._records[edit_id] = record
        end = ends_at(record)
        if end is not None or edit_id in self._timed:  # a new mapping: forks share the old one
            others = {i: t for i, t in self._timed.items() if i != edit_id}
            self._timed = others if end is None else {**others, edit_id: end}

    def touch(self, edit_id: int) -> None:
        """Note that an edit is about to be added, changed or removed."""
        if edit_id not in self._touched:
            known = self._records[edit_id] if edit_id in self._records else None
            self._touched[edit_id] = None if known is None else uid_of(known, edit_id)

    @property
    def touched(self) -> dict[int, str | None]:
        """What has changed since the edits were last saved: number to id of the saved edit, or None."""
        return dict(self._touched)

    def settled(self, edit_ids: Iterable[int] | None = None) -> None:
        """Take note that edits (None: all) are saved as they are."""
        for edit_id in list(self._touched) if edit_ids is None else edit_ids:
            self._touched.pop(edit_id, None)

    def reserve(self, highest_id: int) -> None:
        """Let no new edit have a number up to this one."""
        self._highest_id = max(self._highest_id, highest_id)

    def bytes_per_edit(self) -> float:
        """Mean size of an edit's rows, in bytes; 0.0 when there is none."""
        sizes = self.bytes_used()
        return (sizes["keys"] + sizes["values"]) / len(self) if len(self) else 0.0

    def bytes_used(self) -> dict[str, int]:
        """Bytes of the stored edits' "keys" (with radii and numbers' tables left out) and "values", in
        memory or on the disk."""
        tokens = int(self.edit_lengths[: self._num_edits].sum()) if self.token_tables else 0
        found = {"keys": 0, "values": 0}
        for name, shape in (self.edit_tables | self.token_tables).items():
            values = torch.Size(shape).numel() * (tokens if name in self.token_tables else self._num_edits)
            apart = self.values is not None and name in self.values.names
            dtype = self.values.dtypes[name] if apart else getattr(self, name).dtype
            what = "keys" if name in ("key", "radius") else "values"
            found[what] += values * dtype.itemsize
        return found

    # ------------------------------------------------------------------ trying

    def fork(self) -> EditMemory:
        """The same edits in a memory of its own: what is added to it or removed from it does not show here.

        Nothing is copied: new rows go behind those that this memory uses, where it does not look. So one of
        the two at a time may grow.
        """
        made = copy.copy(self)
        made._buffers = dict(self._buffers)
        made._records = self._records.copy()
        made._touched = dict(self._touched)
        # Codes of rows that may never be stored would be wrong for those that come in their place.
        made._key_codes = self._key_codes.fork()
        made._snapshot = None
        return made

    def take(self, other: EditMemory) -> None:
        """Become what a fork of this memory has become."""
        self.__dict__.update(
            {name: value for name, value in vars(other).items() if name in _STATE},
            _buffers=dict(other._buffers),
            _records=other._records.copy(),
        )

    # ------------------------------------------------------------------ changing

    def check(self, rows: Mapping[str, Tensor]) -> None:
        """Refuse rows that do not fit, before anything is stored.

        Raises:
            ValueError: a table without a row or of another shape, token rows of different lengths, or values
                that are not finite (a key with NaN would never match and would hide its neighbours).
        """
        wanted = self.edit_tables | self.token_tables
        if set(rows) != set(wanted):
            raise ValueError(
                f"rows={sorted(rows)}: this memory has the tables {sorted(wanted)}; pass one row for each."
            )
        lengths = {int(rows[name].shape[0]) for name in self.token_tables}
        if len(lengths) > 1:
            raise ValueError(
                f"rows: the token tables {sorted(self.token_tables)} got {sorted(lengths)} rows; pass equal."
            )
        if 0 in lengths:
            raise ValueError(
                "rows: an edit without tokens cannot be stored; its prompt and target are empty."
            )
        for name, row in rows.items():
            shape = tuple(row.shape) if name in self.edit_tables else tuple(row.shape[1:])
            if shape != self._shape_of(name, row):
                raise ValueError(
                    f"{name}: a row has shape {shape}, this memory stores {self._shape_of(name, row)}."
                )
            if not packing.are_storable(row, self.kind if self._is_packed(row) else "native"):
                raise ValueError(
                    f"{name}: NaN or infinite values cannot be stored. The forward of the edit overflowed; "
                    f"run the model in bfloat16 or float32."
                )

    def _is_packed(self, row: Tensor) -> bool:
        return packing.is_packed(self.kind) and row.dtype == torch.uint8

    def _shape_of(self, name: str, row: Tensor) -> tuple[int, ...]:
        """Shape of a row that is added: as it is stored or, of a packed table, not packed yet."""
        if name not in self.token_tables:
            return self.edit_tables[name]
        (width,) = self.token_tables[name]
        packed = packing.is_packed(self.kind) and not self._is_packed(row)
        return (width - packing.stored_width(0, self.kind),) if packed else (width,)

    def add(
        self, edit_id: int, rows: Mapping[str, Tensor], record: Mapping[str, object] | None = None
    ) -> None:
        """Store one edit.

        Args:
            edit_id: its number, not used yet.
            rows: edit tables' rows of their row shape, token tables' rows [tokens, width], as they are stored
                or not packed yet.
            record: anything JSON can hold.
        """
        self.check(rows)
        if edit_id in self._records:
            raise ValueError(f"edit_id={edit_id} is stored already; remove it first.")
        kept = self.checked_record(record)
        # Tables made in inference mode could be neither changed outside it nor kept for a backward pass.
        with torch.inference_mode(False), torch.no_grad():
            if not self._num_edits:
                plain = next((r for r in rows.values() if r.is_floating_point()), None)
                self.like = self.like if plain is None else self.like.to(plain.dtype)
            self._add_rows(edit_id, self.as_stored(rows))
        self._set_record(edit_id, kept)
        self._highest_id = max(self._highest_id, edit_id)
        self._snapshot, self._expected = None, 0

    def as_stored(self, rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rows as they are stored, token tables' packed if that is their kind."""
        if self.kind == "native":
            return dict(rows)
        return {
            name: packing.pack(row, self.kind)
            if name in self.token_tables and not self._is_packed(row)
            else row
            for name, row in rows.items()
        }

    @property
    def _wide(self) -> list[str]:
        """Edit tables whose rows stay where they are when an edit goes."""
        apart = () if self.values is None else self.values.names
        return [name for name, shape in self.edit_tables.items() if shape and name not in apart]

    @property
    def _narrow(self) -> list[str]:
        """Edit tables of single numbers."""
        return [name for name, shape in self.edit_tables.items() if not shape]

    def _add_rows(self, edit_id: int, rows: Mapping[str, Tensor]) -> None:
        tokens = next((int(rows[name].shape[0]) for name in self.token_tables), 0)
        n, first = self._num_edits, self._num_tokens
        row = n
        if n and edit_id < int(self.edit_ids[n - 1]):  # an edit that is brought back goes where it was
            row = int(torch.searchsorted(self.edit_ids[:n], edit_id))
        place = self._place_for(edit_id, row, rows)
        slot = -1 if self.values is None else self.values.put(rows, tokens)
        new = {name: rows[name].reshape(1) for name in self._narrow}
        for name, number in zip(_NUMBERS, (edit_id, tokens, first, place, slot), strict=True):
            new[name] = torch.tensor([number])
        for name, value in new.items():
            if row == n:
                self._append(name, n, n, value)
            else:
                self._insert(name, row, n, value)
        if self.values is None:
            for name in self.token_tables:
                self._append(name, first, first, rows[name])
            self._num_tokens += tokens
        self._num_edits += 1

    def _place_for(self, edit_id: int, row: int, rows: Mapping[str, Tensor]) -> int:
        """Put the wide rows of a new edit in their tables; where they are."""
        there = self._gone.get(edit_id)
        if there is not None and self._lies_there(there, row, rows):
            self._gone = {i: place for i, place in self._gone.items() if i != edit_id}
            return there  # where it was, as nothing has taken its place
        if row < self._num_edits:
            self._clear_rows()
            for name in self._wide:
                self._insert(name, row, self._num_rows, rows[name].unsqueeze(0))
            later = self.edit_places[: self._num_edits].clone()
            later[row:] += 1
            self.edit_places, self._key_codes = later, TableCodes()
            self._num_rows += 1
            return row
        place = self._num_rows
        for name in self._wide:
            self._append(name, place, place, rows[name].unsqueeze(0))
        self._num_rows += 1
        return place

    def _lies_there(self, place: int, row: int, rows: Mapping[str, Tensor]) -> bool:
        """Whether a place holds the wide rows of an edit, and is between those of the edits beside it."""
        n, places = self._num_edits, self.edit_places
        if (row > 0 and int(places[row - 1]) > place) or (row < n and int(places[row]) < place):
            return False
        return all(
            torch.equal(getattr(self, name)[place], rows[name].to(getattr(self, name))) for name in self._wide
        )

    def _append(self, name: str, row: int, used: int, new: Tensor) -> None:
        """Rows behind those that are used; no row that a snapshot can see moves."""
        table = getattr(self, name)
        if used == 0:
            table = table.new_empty((0, *table.shape[1:]))
            table = table.to(new.dtype) if new.is_floating_point() else table
        need = used + new.shape[0]
        if need > table.shape[0]:
            # Not zeros: room that nobody has written to takes no memory.
            grown = table.new_empty((max(need, 2 * table.shape[0], _FIRST_CAPACITY), *table.shape[1:]))
            grown[:used] = table[:used]
            table = grown
        table[used:need] = new.to(table)
        setattr(self, name, table)

    def _insert(self, name: str, row: int, used: int, new: Tensor) -> None:
        """Rows in front of row `row`, in a new table."""
        table = getattr(self, name)[:used]
        setattr(self, name, torch.cat([table[:row], new.to(table), table[row:]]))

    def note(self, edit_id: int, record: Mapping[str, object]) -> None:
        """Put another record in the place of a stored edit's."""
        self.row_of(edit_id)
        self._set_record(edit_id, self.checked_record(record))

    def row_of(self, edit_id: int) -> int:
        """Row of an edit in the edit tables.

        Raises:
            KeyError: no such edit; names the stored ones.
        """
        if edit_id not in self._records:
            ids = self.ids
            stored = ", ".join(map(str, ids[:8])) + (", ..." if len(ids) > 8 else "")
            raise KeyError(f"edit_id={edit_id!r}: no such edit. Stored: {stored or 'none'}.")
        return int(torch.searchsorted(self.edit_ids[: self._num_edits], edit_id))

    def remove(self, edit_id: int) -> None:
        """Forget one edit; the others keep their order.

        Raises:
            KeyError: no such edit; names the stored ones.
        """
        row = self.row_of(edit_id)
        tokens = int(self.edit_lengths[row])
        self._gone = {**self._gone, edit_id: int(self.edit_places[row])}
        with torch.inference_mode(False):
            for name in (*self._narrow, *_NUMBERS):
                setattr(self, name, _without(getattr(self, name)[: self._num_edits], row))
        del self._records[edit_id]
        if edit_id in self._timed:
            self._timed = {i: end for i, end in self._timed.items() if i != edit_id}
        self._num_edits -= 1
        self._snapshot = None
        wide = [getattr(self, name) for name in self._wide]
        size = sum(table[: self._num_rows].numel() * table.element_size() for table in wide)
        # A GPU copies a table in less time than it takes to ask it whether an edit is gone.
        many = (self._num_rows - self._num_edits) * _CLEARED_AT > self._num_edits
        if size <= _SMALL or many or self.edit_ids.device.type != "cpu":
            self._clear_rows()
        if self.values is None:
            self._num_removed += tokens
            if 2 * self._num_removed > self._num_tokens:
                self._clear_tokens()

    def _clear_rows(self) -> None:
        """Wide edit tables without the rows that removed edits have left, in memory of their own."""
        self._gone = {}
        if self._num_rows == self._num_edits:
            return
        places = self.edit_places[: self._num_edits]
        with torch.inference_mode(False):
            for name in self._wide:
                table = getattr(self, name)
                setattr(self, name, table[places.to(table.device)])
            self._key_codes = self._key_codes.keep(places.cpu())
            self.edit_places = torch.arange(self._num_edits, device=places.device)
        self._num_rows = self._num_edits

    def _clear_tokens(self) -> None:
        """Token tables without the rows that removed edits have left, in memory of their own."""
        with torch.inference_mode(False):
            found = {name: self.live(name) for name in self.token_tables}
            for name, table in found.items():
                setattr(self, name, table)
            length = self.edit_lengths[: self._num_edits]
            self.edit_starts = length.cumsum(0) - length
        self._num_tokens -= self._num_removed
        self._num_removed = 0

    # ------------------------------------------------------------------ reading

    def snapshot(self) -> Snapshot:
        """The edits as they are now; later changes of the memory do not show in it."""
        if self._expected:
            raise ValueError(
                f"The saved folder holds {self._expected} edits, and none of them was loaded: transformers' "
                f"load_adapter and a config by itself do not load edits. Use dualedit.load_edits(model, "
                f"folder) or PeftModel.from_pretrained."
            )
        if self._snapshot is None:
            n, rows, t = self._num_edits, self._num_rows, self._num_tokens
            wide = self._wide
            kept = {name: getattr(self, name)[:rows] for name in wide}
            kept |= {name: getattr(self, name)[:n] for name in self._narrow}
            if self.values is None:
                kept |= {name: getattr(self, name)[:t] for name in self.token_tables}
            apart = None if self.values is None else (self.values, self.edit_slots[:n])
            places = None if rows == n else self.edit_places[:n]
            self._snapshot = Snapshot(
                Tables({name: kept[name] for name in self._order if name in kept}, places, wide, apart),
                edit_ids=self.edit_ids[:n],
                start=self.edit_starts[:n],
                length=self.edit_lengths[:n],
                key_codes=self._key_codes,
                token_tables=frozenset(self.token_tables),
                kind=self.kind,
                dtype=self.like.dtype,
            )
        return self._snapshot

    @property
    def _order(self) -> list[str]:
        return [*self.edit_tables, *self.token_tables]

    def _apply(self, fn, recurse: bool = True):
        self._snapshot = None  # tensors move: what was handed out stays where it was
        self._key_codes = TableCodes()
        return super()._apply(fn, recurse)


def _without(table: Tensor, row: int) -> Tensor:
    """A table without a row, in memory of its own."""
    return torch.cat([table[:row], table[row + 1 :]])
