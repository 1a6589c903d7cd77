"""The stored edits: growing tables that a module can save, load and hand out as snapshots.

A table has one row an edit ("edit" tables: keys, radii, values) or one row a token of an edit ("token"
tables: cached keys and values of variable length). Appending never moves a row that a snapshot can see, and
removing or bringing back makes new edit tables, so a generation that holds a snapshot is untouched by edits
made meanwhile. Rows of edit tables are in the order of the edits' numbers, that of their making.
Rows of token tables stay where they are, and each edit knows where its own begin; what removed edits leave is
cleared away once it is the larger half.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from ..records import expires_at, uid_of
from .key_codes import TableCodes
from .snapshot import Snapshot

_FIRST_CAPACITY = 8
NO_RADIUS = -1.0  # of an edit that reaches as far as the adapter's settings say
_LARGEST_ID = 2**53  # further on, JSON readers round
# What changes when edits are added or removed, beside the tables and the records.
_STATE = (
    "_num_edits", "_num_tokens", "_num_removed", "_highest_id", "_snapshot", "_key_codes", "_expected",
    "_timed", "_touched",
)  # fmt: skip


def _as_bytes_tensor(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8) if text else torch.empty(0, dtype=torch.uint8)


class EditMemory(nn.Module):
    """The tables of one edited layer.

    Args:
        edit_tables: name to shape of one row, for tables with a row an edit.
        token_tables: name to width, for tables with a row a token.
        device, dtype: of the tables; the first `add` of an empty memory takes over the dtype of what it
            stores.
    """

    def __init__(
        self,
        edit_tables: Mapping[str, tuple[int, ...]],
        token_tables: Mapping[str, int],
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        self.edit_tables = {name: tuple(shape) for name, shape in edit_tables.items()}
        self.token_tables = {name: (width,) for name, width in token_tables.items()}
        for name, shape in (self.edit_tables | self.token_tables).items():
            self.register_buffer(name, torch.empty((0, *shape), device=device, dtype=dtype))
        self.register_buffer("edit_ids", torch.empty(0, dtype=torch.int64, device=device))
        self.register_buffer("edit_lengths", torch.empty(0, dtype=torch.int64, device=device))
        starts = torch.empty(0, dtype=torch.int64, device=device)
        self.register_buffer("edit_starts", starts, persistent=False)  # first rows in the token tables
        # JSON text of each edit's record, UTF-8, one after the other: it travels in the same file as the
        # tensors.
        self.register_buffer("record_bytes", torch.empty(0, dtype=torch.uint8, device=device))
        self._num_edits = 0
        self._num_tokens = 0  # rows of the token tables that are used
        self._num_removed = 0  # of these, rows of edits that are gone
        self._highest_id = 0
        self._records: dict[int, dict] = {}
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
        return dict(self._records.get(edit_id, {}))

    def silent(self, now: float) -> tuple[int, ...]:
        """Numbers of the edits that are stored and do not answer now, disabled or expired, ascending."""
        return tuple(sorted(i for i, end in self._timed.items() if end <= now)) if self._timed else ()

    def _set_record(self, edit_id: int, record: dict) -> None:
        self._records[edit_id] = record
        end = _ends(record)
        # A new mapping: forks share the old one.
        others = {i: t for i, t in self._timed.items() if i != edit_id} if self._timed else {}
        self._timed = others if end is None else {**others, edit_id: end}

    def touch(self, edit_id: int) -> None:
        """Note that an edit is about to be added, changed or removed."""
        if edit_id not in self._touched:
            known = self._records.get(edit_id)
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
        snapshot = self.snapshot()
        size = sum(table.numel() * table.element_size() for table in snapshot.tables.values())
        return size / len(snapshot) if len(snapshot) else 0.0

    # ------------------------------------------------------------------ trying

    def fork(self) -> EditMemory:
        """The same edits in a memory of its own: what is added to it or removed from it does not show here.

        Nothing is copied: new rows go behind those that this memory uses, where it does not look. So one of
        the two at a time may grow.
        """
        made = copy.copy(self)
        made._buffers = dict(self._buffers)
        made._records = dict(self._records)
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
            _records=dict(other._records),
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
            if shape != wanted[name]:
                raise ValueError(f"{name}: a row has shape {shape}, this memory stores {wanted[name]}.")
            if not _storable(row):
                raise ValueError(
                    f"{name}: NaN or infinite values cannot be stored. The forward of the edit overflowed; "
                    f"run the model in bfloat16 or float32."
                )

    def add(
        self, edit_id: int, rows: Mapping[str, Tensor], record: Mapping[str, object] | None = None
    ) -> None:
        """Store one edit.

        Args:
            edit_id: its number, not used yet.
            rows: edit tables' rows of their row shape, token tables' rows [tokens, width].
            record: anything JSON can hold.
        """
        self.check(rows)
        if edit_id in self._records:
            raise ValueError(f"edit_id={edit_id} is stored already; remove it first.")
        text = json.dumps(dict(record or {}))
        # Tables made in inference mode could be neither changed outside it nor kept for a backward pass.
        with torch.inference_mode(False), torch.no_grad():
            self._add_rows(edit_id, rows)
        self._set_record(edit_id, json.loads(text))
        self._highest_id = max(self._highest_id, edit_id)
        self._snapshot, self._expected = None, 0

    def _add_rows(self, edit_id: int, rows: Mapping[str, Tensor]) -> None:
        tokens = next((int(rows[name].shape[0]) for name in self.token_tables), 0)
        row, first = self._num_edits, self._num_tokens
        if row and edit_id < int(self.edit_ids[row - 1]):  # an edit that is brought back goes where it was
            row = int(torch.searchsorted(self.edit_ids[:row], edit_id))
        edit_rows = {name: rows[name].unsqueeze(0) for name in self.edit_tables}
        numbers = {"edit_ids": edit_id, "edit_lengths": tokens, "edit_starts": first}
        edit_rows |= {name: torch.tensor([number]) for name, number in numbers.items()}
        place = self._append if row == self._num_edits else self._insert
        for name, new in edit_rows.items():
            place(name, row, self._num_edits, new)
        for name in self.token_tables:
            self._append(name, first, first, rows[name])
        if row < self._num_edits:
            self._key_codes = TableCodes()
        self._num_edits += 1
        self._num_tokens += tokens

    def _append(self, name: str, row: int, used: int, new: Tensor) -> None:
        """Rows behind those that are used; no row that a snapshot can see moves."""
        table = getattr(self, name)
        if used == 0:
            table = table.new_empty((0, *table.shape[1:]))
            table = table.to(new.dtype) if new.is_floating_point() else table
        need = used + new.shape[0]
        if need > table.shape[0]:
            grown = table.new_zeros((max(need, 2 * table.shape[0], _FIRST_CAPACITY), *table.shape[1:]))
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
        self._set_record(edit_id, json.loads(json.dumps(dict(record))))

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
        with torch.inference_mode(False):
            for name in (*self.edit_tables, "edit_ids", "edit_lengths", "edit_starts"):
                setattr(self, name, _without(getattr(self, name)[: self._num_edits], row, 1))
        del self._records[edit_id]
        self._timed = {i: end for i, end in self._timed.items() if i != edit_id}
        self._key_codes = self._key_codes.keep(_without(torch.arange(self._num_edits), row, 1))
        self._num_edits -= 1
        self._num_removed += tokens
        self._snapshot = None
        if 2 * self._num_removed > self._num_tokens:
            self._clear_away()

    def _clear_away(self) -> None:
        """Token tables without the rows that removed edits have left, in memory of their own."""
        with torch.inference_mode(False):
            found = {name: self._live(name) for name in self.token_tables}
            for name, table in found.items():
                setattr(self, name, table)
            length = self.edit_lengths[: self._num_edits]
            self.edit_starts = length.cumsum(0) - length
        self._num_tokens -= self._num_removed
        self._num_removed = 0

    def _live(self, name: str) -> Tensor:
        """A token table's rows of the stored edits, one edit after the other, in memory of their own."""
        table, n = getattr(self, name)[: self._num_tokens], self._num_edits
        start, length = self.edit_starts[:n], self.edit_lengths[:n]
        packed = length.cumsum(0) - length
        if not self._num_removed and bool((start == packed).all()):
            return table.detach().clone()
        rows = torch.arange(int(length.sum()), device=start.device)
        rows += (start - packed).repeat_interleave(length)
        return table.detach()[rows.to(table.device)]

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
            n, t = self._num_edits, self._num_tokens
            self._snapshot = Snapshot(
                tables={name: getattr(self, name)[:n] for name in self.edit_tables}
                | {name: getattr(self, name)[:t] for name in self.token_tables},
                edit_ids=self.edit_ids[:n],
                start=self.edit_starts[:n],
                length=self.edit_lengths[:n],
                key_codes=self._key_codes,
            )
        return self._snapshot

    def _apply(self, fn, recurse: bool = True):
        self._snapshot = None  # tensors move: what was handed out stays where it was
        self._key_codes = TableCodes()
        return super()._apply(fn, recurse)

    # ------------------------------------------------------------------ saving and loading

    def sizes(self) -> dict[str, int]:
        """Rows of the tables and bytes of the records, as a saved folder's config names them."""
        tokens = self._num_tokens - self._num_removed
        return {"edits": self._num_edits, "tokens": tokens, "records": len(self._record_bytes())}

    def expect(self, edits: int) -> None:
        """Let it be known that the folder which the settings came from holds edits.

        Loading their tensors fulfils it. A loader that places the settings alone would lose the edits without
        a word; the first question refuses then, and names `load_edits`.
        """
        self._expected = edits

    def _record_bytes(self) -> bytes:
        if not self._num_edits:
            return b""
        return json.dumps([self._records.get(i, {}) for i in self.ids], ensure_ascii=False).encode()

    @property
    def saved_tables(self) -> tuple[str, ...]:
        """Names of the tensors that are saved."""
        return (*self._sizes(), "record_bytes")

    def _sizes(self) -> dict[str, int]:
        sizes = dict.fromkeys((*self.edit_tables, "edit_ids", "edit_lengths"), self._num_edits)
        return sizes | dict.fromkeys(self.token_tables, self._num_tokens - self._num_removed)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        for name, size in self._sizes().items():
            if name in self.token_tables:
                destination[prefix + name] = self._live(name)
            else:
                destination[prefix + name] = getattr(self, name)[:size].detach().clone()
        destination[prefix + "record_bytes"] = _as_bytes_tensor(self._record_bytes())

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        names = (*self._sizes(), "record_bytes")
        found = {name: state_dict[prefix + name] for name in names if prefix + name in state_dict}
        missing_keys.extend(prefix + name for name in names if name not in found)
        if len(found) != len(names):
            return
        try:
            self._adopt(found)
        except ValueError as error:
            error_msgs.append(f"{prefix[:-1]}: {error}")

    def _check_types(self, found: dict[str, Tensor]) -> None:
        """Refuse tables of a file that `add` would not have made."""
        wanted = {"edit_ids": torch.int64, "edit_lengths": torch.int64, "record_bytes": torch.uint8}
        for name, table in found.items():
            right = table.dtype == wanted[name] if name in wanted else table.dtype.is_floating_point
            if not right or (name in wanted and table.ndim != 1):
                raise ValueError(
                    f"{name} is {table.dtype} of shape {tuple(table.shape)}; the file is "
                    "damaged. Restore it from a copy."
                )
            if name not in wanted and not table.is_meta and not _storable(table):
                raise ValueError(
                    f"{name} holds values that are not finite, and no edit has such; the file is "
                    "damaged. Restore it from a copy."
                )
        ids = found["edit_ids"]
        if not ids.is_meta and len(ids) and not 0 < int(ids.min()) <= int(ids.max()) < _LARGEST_ID:
            raise ValueError(
                f"edit_ids go from {int(ids.min())} to {int(ids.max())}, and edits count from 1; the file is "
                "damaged. Restore it from a copy."
            )

    def _adopt(self, found: dict[str, Tensor]) -> None:
        radius = found.get("radius")
        if radius is not None and radius.is_floating_point() and not radius.is_meta:
            # Version 0.1 had NaN for an edit without a radius of its own.
            found["radius"] = torch.where(radius.isnan(), NO_RADIUS, radius)
        self._check_types(found)
        ids, lengths = found["edit_ids"].tolist(), found["edit_lengths"].tolist()
        counts = dict.fromkeys(self.edit_tables, len(ids)) | dict.fromkeys(self.token_tables, sum(lengths))
        for name, shape in (self.edit_tables | self.token_tables).items():
            if tuple(found[name].shape) != (counts[name], *shape):
                raise ValueError(
                    f"{name} has shape {tuple(found[name].shape)} in the file, this model needs "
                    f"{(counts[name], *shape)}; the edits belong to another model or adapter size."
                )
        text = found["record_bytes"].cpu().numpy().tobytes().decode()
        records = json.loads(text) if text else [{} for _ in ids]
        least = 1 if self.token_tables else 0
        whole = len(records) == len(lengths) == len(set(ids)) and min(lengths, default=least) >= least
        if not whole or not all(isinstance(record, dict) for record in records):
            raise ValueError(
                f"{len(ids)} edits (numbers {ids[:8]}) with {len(records)} records and lengths "
                f"{lengths[:8]} do not fit together; the file is damaged. Restore it from a copy."
            )
        device = self.edit_ids.device
        # A model being filled from a file may still be on the meta device; the file's tensors are real.
        place = found["edit_ids"].device if device.type == "meta" else device
        order = _ascending(found["edit_ids"], found["edit_lengths"])
        for name, table in found.items():
            table = table.detach()
            if order is not None and name != "record_bytes":
                table = table[order[name in self.token_tables].to(table.device)]
            # Cloned: tensors mapped from a file can be unaligned, which changes the last bit of a product.
            self._buffers[name] = table.to(place).clone()
        self._records = dict(sorted(zip(ids, records, strict=True), key=lambda each: each[0]))
        self._timed = {i: end for i, r in self._records.items() if (end := _ends(r)) is not None}
        self._num_edits, self._num_tokens, self._snapshot = len(ids), sum(lengths), None
        self._num_removed = 0
        length = self._buffers["edit_lengths"]
        self._buffers["edit_starts"] = length.cumsum(0) - length
        self._key_codes = TableCodes()
        self._expected, self._touched = 0, {}
        self._highest_id = max([self._highest_id, *ids])


def _ends(record: Mapping[str, object]) -> float | None:
    """When an edit stops to answer; 0: it is disabled; None: never."""
    return 0.0 if record.get("disabled") else expires_at(record)


def _storable(table: Tensor) -> bool:
    """Whether values can be stored: finite ones."""
    return bool(torch.isfinite(table).all())


def _without(table: Tensor, first: int, count: int) -> Tensor:
    """A table without the rows from `first` on, in memory of its own."""
    return torch.cat([table[:first], table[first + count :]])


def _ascending(ids: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor] | None:
    """Orders of the edits' rows and of their tokens by number; None where they are in order already."""
    if bool((ids.diff() > 0).all()):
        return None
    edits = ids.argsort()
    start = lengths.cumsum(0) - lengths
    pieces = [torch.arange(int(start[i]), int(start[i] + lengths[i])) for i in edits.tolist()]
    return edits, torch.cat([torch.empty(0, dtype=torch.int64), *pieces])
