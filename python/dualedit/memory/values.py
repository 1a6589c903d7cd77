"""Values of edits that stay in files: read an edit at a time, and kept in memory as far as a budget goes.

Rows are read, not mapped: the pages of a mapping count as the process's memory, and a file that is cut short
would end the process (SIGBUS) where a reading says so.
"""

from __future__ import annotations

import os
import tempfile
import threading
from array import array
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..tensor_file import TensorFile
from . import packing
from .budget import Rows, Tiers

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "U8": torch.uint8, "I64": torch.int64,
}  # fmt: skip


class OpenFile:
    """A file that is held open and read in pieces; its contents are those of the moment it was opened.

    A file that another takes the place of (`os.replace`) stays readable as it was. One that is written over
    in place is noticed, and refused.
    """

    def __init__(self, path: Path):
        self.path = path
        self._number = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        self._was = self._mark()

    def _mark(self) -> tuple[int, int]:
        state = os.fstat(self._number)
        return state.st_size, state.st_mtime_ns

    def __del__(self) -> None:
        if hasattr(self, "_number"):
            os.close(self._number)

    def __deepcopy__(self, memo) -> OpenFile:
        return self

    def read_into(self, table: Tensor, offset: int) -> None:
        """Fill a tensor with the file's bytes from `offset` on. Raises ValueError: they are not there."""
        if not table.numel():
            return
        left, place = memoryview(table.view(-1).view(torch.uint8).numpy()), offset
        while left:
            done = os.preadv(self._number, [left], place)
            if done <= 0:
                raise ValueError(
                    f"{self.path} is cut short. Restore it from a copy, and load the edits again."
                )
            left, place = left[done:], place + done
        if self._mark() != self._was:
            raise ValueError(
                f"{self.path} was written over while its edits were in use. Load them again; save_edits, and "
                "not PEFT's save_pretrained, writes in a folder that is in use."
            )

    def bytes_at(self, offset: int, count: int) -> bytes:
        """Some of the file's bytes. Raises ValueError."""
        found = torch.empty(count, dtype=torch.uint8)
        self.read_into(found, offset)
        return found.numpy().tobytes()


class SavedTable:
    """A tensor of an open safetensors file, by rows.

    Attributes:
        dtype, shape: of the tensor.
        begin: its first byte in the file.
    """

    def __init__(self, file: OpenFile, dtype: str, shape: Sequence[int], begin: int):
        if dtype not in _DTYPES:
            raise ValueError(f"{file.path}: a table of {dtype} is none of edits")
        self.file, self.dtype, self.shape, self.begin = file, _DTYPES[dtype], tuple(shape), begin
        values = 1
        for size in self.shape[1:]:
            values *= size
        self.row_bytes = values * torch.empty(0, dtype=self.dtype).element_size()

    def rows(self, first: int, count: int) -> Tensor:
        """Rows from `first` on, in memory of their own. Raises ValueError."""
        found = torch.empty((count, *self.shape[1:]), dtype=self.dtype)
        self.file.read_into(found, self.begin + first * self.row_bytes)
        return found

    def row(self, row: int) -> Tensor:
        """One row, without the first dimension: no view, which would weigh as much as a small row."""
        found = torch.empty(self.shape[1:], dtype=self.dtype)
        self.file.read_into(found, self.begin + row * self.row_bytes)
        return found


def saved_tables(path: Path) -> dict[str, SavedTable]:
    """The tensors of a safetensors file by name, none of them read. Raises ValueError, OSError."""
    opened = OpenFile(path)
    with TensorFile(path) as header:
        return {
            name: SavedTable(opened, dtype, shape, begin)
            for name, (dtype, shape, begin) in header.places().items()
        }


class Spill:
    """A file without a name for rows that are in no other one; it is gone with the process.

    It lies where `tempfile` puts files (the environment's TMPDIR).
    """

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(prefix="dualedit-", buffering=0)
        self._end = 0
        self._lock = threading.Lock()

    def __deepcopy__(self, memo) -> Spill:
        return self

    def append(self, data: bytes | memoryview) -> int:
        """Where these bytes are now. Raises OSError."""
        with self._lock:
            place, left = self._end, memoryview(data)
            while left:
                done = os.pwrite(self._file.fileno(), left, self._end)
                self._end, left = self._end + done, left[done:]
            return place

    def read_into(self, table: Tensor, offset: int) -> None:
        """Fill a tensor with what was appended. Raises OSError."""
        if table.numel():
            os.preadv(self._file.fileno(), [memoryview(table.view(-1).view(torch.uint8).numpy())], offset)

    @property
    def size(self) -> int:
        """Its bytes."""
        return self._end


class ValueStore:
    """The values of one memory's edits, in files; an edit's are found by its slot, a number that it keeps.

    Args:
        shapes: name of each table to the shape of one row.
        by_token: names of those with a row a token.
        dtypes: of the tables as they are stored.
        kind: how the token tables' rows are stored (`packing.KINDS`).
        tiers: what is in memory, shared by all memories of an adapter.
        saved: tables of the adapter's own file, by name.
        spill: for rows that are added.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        by_token: Collection[str],
        dtypes: Mapping[str, torch.dtype],
        kind: str,
        tiers: Tiers,
        saved: Mapping[str, SavedTable],
        spill: Spill,
    ):
        self.names = tuple(shapes)
        self.shapes, self.by_token, self.dtypes = dict(shapes), frozenset(by_token), dict(dtypes)
        self.kind, self.tiers, self.saved, self.spill = kind, tiers, dict(saved), spill
        self._number = tiers.new_number()
        self._lock = threading.Lock()
        # Of each slot: row in the own file (-1: in the spill), first token there or first byte, tokens.
        self._row, self._first, self._count = array("q"), array("q"), array("q")

    def __deepcopy__(self, memo) -> ValueStore:
        return self  # slots are only added

    def own(self, rows: Tensor, first: Tensor, counts: Tensor) -> None:
        """Slots, one behind the other, for edits of the adapter's own file.

        Args:
            rows, first, counts: [n] int64, their rows, first tokens and numbers of tokens.
        """
        with self._lock:
            for known, new in ((self._row, rows), (self._first, first), (self._count, counts)):
                known.frombytes(new.numpy().tobytes())

    def put(self, rows: Mapping[str, Tensor], tokens: int) -> int:
        """A slot for an edit that is added: its rows as they are to be stored. Raises OSError."""
        parts = [rows[name].detach().cpu().to(self.dtypes[name]).contiguous() for name in self.names]
        data = b"".join(part.view(-1).view(torch.uint8).numpy().tobytes() for part in parts)
        return self._slot(-1, self.spill.append(data), tokens)

    def _slot(self, row: int, first: int, count: int) -> int:
        with self._lock:
            self._row.append(row)
            self._first.append(first)
            self._count.append(count)
            return len(self._row) - 1

    def read(self, slot: int) -> Rows:
        """An edit's rows as they are stored: of an edit table without the first dimension.

        Do not change them.

        Raises:
            ValueError: the file is damaged, or was written over.
        """
        key = (self._number, slot)
        found = self.tiers.get("host", key)
        if found is None:
            found = self._load(slot)
            self.tiers.put("host", key, found)
        return found

    def _load(self, slot: int) -> Rows:
        row, first, count = self._row[slot], self._first[slot], self._count[slot]
        found: Rows = {}
        for name in self.names:
            tokens = name in self.by_token
            if row >= 0:
                saved = self.saved[name]
                table = saved.rows(first, count) if tokens else saved.row(row)
                kind = self.kind if tokens else "native"
                if not packing.are_storable(table, kind):
                    raise ValueError(
                        f"{saved.file.path}: {name} of an edit holds values that are not finite, and no edit "
                        "has such; the file is damaged. Restore it from a copy."
                    )
            else:
                shape = (count, *self.shapes[name]) if tokens else self.shapes[name]
                table = torch.empty(shape, dtype=self.dtypes[name])
                self.spill.read_into(table, first)
                first += table.numel() * table.element_size()
            found[name] = table
        return found

    def rows(self, slots: Sequence[int], device: torch.device) -> Rows:
        """Edits' rows on a device, as tables: a row an edit, or its tokens one edit after the other."""
        parts = [self._on(slot, device) for slot in slots]
        found = {}
        for name in self.names:
            empty = torch.empty((0, *self.shapes[name]), dtype=self.dtypes[name], device=device)
            if name in self.by_token:
                found[name] = torch.cat([empty, *(part[name] for part in parts)])
            else:
                found[name] = torch.stack([part[name] for part in parts]) if parts else empty
        return found

    def _on(self, slot: int, device: torch.device) -> Rows:
        if device.type == "cpu":
            return self.read(slot)
        key = (self._number, slot, str(device))
        found = self.tiers.get("device", key)
        if found is None:
            found = {name: table.to(device) for name, table in self.read(slot).items()}
            self.tiers.put("device", key, found)
        return found

    def table(self, name: str, slots: Sequence[int]) -> Tensor:
        """One table of some edits, in memory as a whole: for saving, and for who asks for it."""
        parts, place = [torch.empty((0, *self.shapes[name]), dtype=self.dtypes[name])], 0
        by_token = name in self.by_token
        while place < len(slots):
            row, first, end = self._row[slots[place]], self._first[slots[place]], place + 1
            if row < 0:
                found = self._load(slots[place])[name]
                parts.append(found if by_token else found[None])
                place = end
                continue
            # Rows that lie one behind the other in the file are read at once.
            count = self._count[slots[place]]
            while end < len(slots) and self._row[slots[end]] == row + end - place and (
                not by_token or self._first[slots[end]] == first + count
            ):  # fmt: skip
                count += self._count[slots[end]]
                end += 1
            saved = self.saved[name]
            parts.append(saved.rows(first, count) if by_token else saved.rows(row, end - place))
            place = end
        return torch.cat(parts)
