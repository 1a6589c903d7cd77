"""What is noted about each stored edit: a mapping that many forks share, and that may stay in a file."""

from __future__ import annotations

import json
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from math import isqrt
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..records import expires_at

if TYPE_CHECKING:
    from .values import SavedTable, Spill

Record = dict[str, Any]
_NOTHING: Record = {}
_PIECE, _OVERLAP = 1 << 20, 16  # bytes of a file that are looked through at a time
_FEWEST = 256  # changes that are kept apart before they are put together with the others


class Notes:
    """Number of an edit to its record. A copy costs as much as what changed lately, not as much as all.

    Args:
        base: numbers to records, or to anything else that says the same for a number; never changed.
        write: keeps a record somewhere else and returns what reads it; None: records stay in memory.
    """

    def __init__(self, base: Mapping[int, Any] | None = None, write: Any = None):
        self._base: Mapping[int, Any] = {} if base is None else base
        self._changed: dict[int, Any] = {}  # None: it is gone
        self._count = len(self._base)
        self._write = write

    def copy(self) -> Notes:
        """The same, to be changed by itself."""
        made = Notes.__new__(Notes)
        made.__dict__.update(self.__dict__, _changed=dict(self._changed))
        return made

    __copy__ = copy

    def __len__(self) -> int:
        return self._count

    def __contains__(self, edit_id: object) -> bool:
        if edit_id in self._changed:
            return self._changed[edit_id] is not None  # type: ignore[index]
        return edit_id in self._base

    def __getitem__(self, edit_id: int) -> Record:
        """What is noted. Raises KeyError: no such edit. ValueError: a file that is damaged."""
        found = self._changed[edit_id] if edit_id in self._changed else self._base[edit_id]
        if found is None:
            raise KeyError(edit_id)
        return found if isinstance(found, dict) else found()

    def ending(self) -> dict[int, float]:
        """Of the edits that do not always answer, when they stop, in seconds since 1970; 0: disabled."""
        may = getattr(self._base, "may_end", None)
        numbers = list(self) if may is None else [*may(), *self._changed]
        found = {i: ends_at(self[i]) for i in numbers if i in self}
        return {i: end for i, end in found.items() if end is not None}

    def get(self, edit_id: int) -> Record:
        """What is noted; nothing for an unknown number."""
        return self[edit_id] if edit_id in self else {}

    def __iter__(self) -> Iterator[int]:
        yield from (number for number in self._base if number not in self._changed)
        yield from (number for number, record in self._changed.items() if record is not None)

    def __setitem__(self, edit_id: int, record: Record) -> None:
        self._count += edit_id not in self
        kept = record or _NOTHING
        self._changed[edit_id] = kept if self._write is None or not record else self._write(record)
        self._tidy()

    def __delitem__(self, edit_id: int) -> None:
        self._count -= edit_id in self
        self._changed[edit_id] = None
        self._tidy()

    def _tidy(self) -> None:
        """Put changes together with the rest once they are many; other copies keep theirs."""
        if len(self._changed) <= max(_FEWEST, 4 * isqrt(len(self._base))) or not isinstance(self._base, dict):
            return
        joined = {**self._base, **self._changed}
        self._base = {number: record for number, record in joined.items() if record is not None}
        self._changed = {}


def ends_at(record: Mapping[str, Any]) -> float | None:
    """When an edit stops to answer, in seconds since 1970; 0: it is disabled; None: never."""
    return 0.0 if record.get("disabled") else expires_at(record)


def notes_in(text: bytes, ids: list[int]) -> Notes:
    """Records of a saved table of bytes, by number. Raises ValueError."""
    records = json.loads(text.decode()) if text else [_NOTHING] * len(ids)
    if not isinstance(records, list) or len(records) != len(ids):
        raise ValueError(f"{len(ids)} edits with other records")
    if not all(isinstance(record, dict) for record in records):
        raise ValueError("records that are no mappings")
    return Notes({i: record or _NOTHING for i, record in zip(ids, records, strict=True)})


def text_of(records: list[Record]) -> bytes:
    """Records as memories save them: a list in JSON, UTF-8, each on a line of its own; b"" for none."""
    if not records:
        return b""
    lines = (json.dumps(record, ensure_ascii=False) for record in records)
    return b"[" + ",\n".join(lines).encode() + b"]"


class SavedNotes(Mapping[int, Record]):
    """The records of a file, each read when somebody asks for it.

    Args:
        table: the records as memories save them (`text_of`).
        ids: numbers of the edits [N] int64, in the order of the records.

    Raises:
        ValueError: the records are not on lines of their own, as older versions saved them, or are damaged.
    """

    def __init__(self, table: SavedTable, ids: Tensor):
        self._table, self._end = table, table.shape[0]
        self._ids = array("q", ids.numpy().tobytes())
        ordered = bool((ids.diff() > 0).all())
        self._rows = None if ordered else {i: row for row, i in enumerate(self._ids)}
        self._breaks = array("q")
        self._ending: set[int] = set()
        self._scan()
        if len(self._breaks) != max(len(ids) - 1, 0):
            raise ValueError(f"{len(ids)} edits with {len(self._breaks) + 1} lines of records")

    def _scan(self) -> None:
        """Note where lines end, and which tell of an end (expiry, disabled)."""
        begin, words = 0, (b'"disabled"', b'"expires"')
        found: list[int] = []
        while begin < self._end:
            size = min(_PIECE, self._end - begin)
            piece = torch.empty(size, dtype=torch.uint8)
            self._table.file.read_into(piece, self._table.begin + begin)
            breaks = (piece == 10).nonzero()[:, 0] + begin
            self._breaks.frombytes(breaks.numpy().tobytes())
            data = piece.numpy().tobytes()
            for word in words:
                place = data.find(word)
                while place >= 0:
                    found.append(begin + place)
                    place = data.find(word, place + 1)
            if begin + size >= self._end:
                break
            begin += size - _OVERLAP
            while self._breaks and self._breaks[-1] >= begin:
                self._breaks.pop()
        self._ending = {bisect_left(self._breaks, place) for place in found}

    def may_end(self) -> list[int]:
        """Numbers of the edits whose records tell when they stop to answer."""
        return [self._ids[row] for row in sorted(self._ending)]

    def __deepcopy__(self, memo) -> SavedNotes:
        return self

    def _row(self, edit_id: object) -> int:
        if self._rows is not None:
            return self._rows.get(edit_id, -1)  # type: ignore[call-overload]
        row = bisect_left(self._ids, edit_id) if isinstance(edit_id, int) else len(self._ids)
        return row if row < len(self._ids) and self._ids[row] == edit_id else -1

    def __contains__(self, edit_id: object) -> bool:
        return self._row(edit_id) >= 0

    def __getitem__(self, edit_id: int) -> Record:
        row = self._row(edit_id)
        if row < 0:
            raise KeyError(edit_id)
        first = 1 if row == 0 else self._breaks[row - 1] + 1  # behind the bracket, or behind the line before
        # Up to its comma, or to the bracket.
        last = self._breaks[row] - 1 if row < len(self._breaks) else self._end - 1
        text = self._table.file.bytes_at(self._table.begin + first, last - first)
        try:
            record = json.loads(text)
            if not isinstance(record, dict):
                raise ValueError("no mapping")
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{self._table.file.path}: what is noted about edit {edit_id} is damaged ({error}). Restore "
                "the file from a copy."
            ) from error
        return record

    def __iter__(self) -> Iterator[int]:
        return iter(self._ids)

    def __len__(self) -> int:
        return len(self._ids)


def spilled(spill: Spill) -> Callable[[Record], Callable[[], Record]]:
    """Keep records in a spill file: what `Notes` takes as `write`."""

    def write(record: Record) -> Callable[[], Record]:
        text = json.dumps(record, ensure_ascii=False).encode()
        return partial(_read_spilled, spill, spill.append(text), len(text))

    return write


def _read_spilled(spill: Spill, place: int, size: int) -> Record:
    data = torch.empty(size, dtype=torch.uint8)
    spill.read_into(data, place)
    return json.loads(data.numpy().tobytes())
