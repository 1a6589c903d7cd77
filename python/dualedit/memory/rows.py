"""Rows of saved edits: taken out of the tensors of files, put together, and put into a file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from .notes import text_of

IDS, LENGTHS, RECORDS = "edit_ids", "edit_lengths", "record_bytes"
State = Mapping[str, Tensor]


def memories_in(names: Sequence[str]) -> list[str]:
    """The memories whose tables these are: what stands in front of ".edit_ids"."""
    return sorted(name.removesuffix(f".{IDS}") for name in names if name.endswith(f".{IDS}"))


def tables_of(state: State, memory: str) -> dict[str, Tensor]:
    """A memory's tables by their own names, numbers and lengths included, records not."""
    start = f"{memory}."
    return {n[len(start) :]: t for n, t in state.items() if n.startswith(start) and n != start + RECORDS}


def without_edits(state: State) -> dict[str, Tensor]:
    """An adapter's tensors with its memories' tables emptied."""
    memories = tuple(f"{memory}." for memory in memories_in(list(state)))
    return {name: tensor[:0] if name.startswith(memories) else tensor for name, tensor in state.items()}


class Rows:
    """The edits of one memory in one file.

    Raises:
        ValueError: numbers, lengths and rows that do not fit together.
    """

    def __init__(self, state: State, memory: str):
        self.tables = tables_of(state, memory)
        if IDS not in self.tables or LENGTHS not in self.tables:
            raise ValueError(f"{memory} lacks the numbers or the lengths of its edits")
        self.ids, lengths = self.tables.pop(IDS).tolist(), self.tables.pop(LENGTHS)
        if lengths.ndim != 1 or len(lengths) != len(self.ids) or len(set(self.ids)) != len(self.ids):
            raise ValueError(f"{memory} has {len(self.ids)} edits and {tuple(lengths.shape)} lengths")
        if lengths.dtype != torch.int64 or (len(lengths) and int(lengths.min()) < 0):
            raise ValueError(f"{memory} has lengths that are none")
        self.lengths = lengths.tolist()
        self.first = [0, *lengths.cumsum(0).tolist()]
        self.row = {number: row for row, number in enumerate(self.ids)}
        # A table has a row for each edit or for each of its tokens. Where there are as many tokens as edits,
        # each edit has one, and both come to the same.
        self.by_token = {}
        for name, table in self.tables.items():
            if table.ndim == 0 or table.shape[0] not in (len(self.ids), self.first[-1]):
                raise ValueError(f"{memory}.{name} has shape {tuple(table.shape)} for {len(self.ids)} edits")
            self.by_token[name] = table.shape[0] != len(self.ids)

    def slices(self, first: int, last: int) -> dict[str, Tensor]:
        """The tables' rows of the edits from row `first` to before row `last`."""
        return {
            name: table[self.first[first] : self.first[last]] if self.by_token[name] else table[first:last]
            for name, table in self.tables.items()
        }

    def edit(self, number: int) -> dict[str, Tensor]:
        """One edit's rows, as `EditMemory.add` takes them. Raises KeyError."""
        row = self.row[number]
        return {n: t if self.by_token[n] else t[0] for n, t in self.slices(row, row + 1).items()}


def together(
    sources: Mapping[int, Rows], wanted: Sequence[tuple[int, int]]
) -> tuple[dict[str, Tensor], list[int]]:
    """Tables of edits out of several files.

    Args:
        sources: the files' rows; number 0 is there, and names the tables and their types.
        wanted: (source, number of the edit), in the order that is wanted.

    Returns:
        tables, and the number of tokens of each edit.

    Raises:
        ValueError: tables that are not the same in all files. KeyError: an edit that is not in its file.
    """
    own = sources[0]
    runs: list[tuple[int, int, int]] = []  # source, first row, row behind the last
    lengths = []
    for source, number in wanted:
        rows = sources[source]
        row = rows.row[number]
        lengths.append(rows.lengths[row])
        if runs and runs[-1][0] == source and runs[-1][2] == row:
            runs[-1] = (source, runs[-1][1], row + 1)
        else:
            runs.append((source, row, row + 1))
    pieces: dict[str, list[Tensor]] = {name: [table[:0]] for name, table in own.tables.items()}
    for source, first, last in runs:
        found = sources[source].slices(first, last)
        if set(found) != set(pieces):
            raise ValueError(f"the tables {sorted(found)} are not {sorted(pieces)}")
        for name, table in found.items():
            if table.shape[1:] != own.tables[name].shape[1:]:
                raise ValueError(
                    f"{name} has rows of {tuple(table.shape[1:])}, not {own.tables[name].shape[1:]}"
                )
            # An empty table says nothing about the type: the first edits bring it.
            pieces[name].append(table.to(own.tables[name].dtype) if len(own.ids) else table)
    joined = {}
    for name, parts in pieces.items():
        full = [part for part in parts if len(part)] or parts[:1]
        joined[name] = full[0] if len(full) == 1 else torch.cat(full)
    return joined, lengths


def records_tensor(records: Sequence[Mapping[str, Any]]) -> Tensor:
    """Records as memories store them: JSON in UTF-8, [bytes] uint8; empty where there are none."""
    text = text_of(list(records))
    return torch.frombuffer(bytearray(text), dtype=torch.uint8) if text else torch.empty(0, dtype=torch.uint8)


def records_in(table: Tensor, count: int) -> list[dict[str, Any]]:
    """Records of `records_tensor`. Raises ValueError."""
    text = table.cpu().numpy().tobytes().decode()
    records = json.loads(text) if text else [{} for _ in range(count)]
    if not isinstance(records, list) or len(records) != count:
        raise ValueError(f"{count} edits with other records")
    return records


def file_of(
    edits: Mapping[str, Mapping[int, Mapping[str, Tensor]]], token_tables: Mapping[str, set[str]]
) -> bytes:
    """A safetensors file of edits.

    Args:
        edits: memory to number to rows, as `EditMemory.add` takes them.
        token_tables: memory to the names of its tables with a row a token.
    """
    tensors: dict[str, Tensor] = {}
    for memory, rows in edits.items():
        by_token = token_tables[memory]
        lengths = [
            max((len(table) for n, table in row.items() if n in by_token), default=0) for row in rows.values()
        ]
        tensors[f"{memory}.{IDS}"] = torch.tensor(list(rows), dtype=torch.int64)
        tensors[f"{memory}.{LENGTHS}"] = torch.tensor(lengths, dtype=torch.int64)
        for name in next(iter(rows.values()), {}):
            parts = [row[name] if name in by_token else row[name][None] for row in rows.values()]
            tensors[f"{memory}.{name}"] = torch.cat([part.detach().cpu() for part in parts]).contiguous()
    return safetensors.torch.save(tensors, {"format": "pt"})
