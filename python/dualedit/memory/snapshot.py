"""The stored edits as they were at one moment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dualedit_kernels import KeyCodes

from .key_codes import TableCodes


@dataclass(frozen=True)
class Snapshot:
    """The edits of one memory at one moment.

    Attributes:
        tables: name to tensor; N rows for an edit table, T rows (all edits' tokens, one after the other) for
            a token table.
        edit_ids: the edits' numbers [N] int64, in the order of the rows, which is ascending.
        start, length: first row and number of rows [N] (int64) of each edit in the token tables.
        key_codes: what is known of the table "key".
    """

    tables: dict[str, Tensor]
    edit_ids: Tensor
    start: Tensor
    length: Tensor
    key_codes: TableCodes = field(default_factory=TableCodes, repr=False, compare=False)

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

    def without(self, edit_ids: Sequence[int], token_tables: Mapping[str, object]) -> Snapshot:
        """The same moment without some of its edits; token tables stay as they are, other rows are copied."""
        gone = torch.isin(self.edit_ids, torch.tensor(edit_ids, device=self.edit_ids.device))
        kept = (~gone).nonzero()[:, 0]
        with torch.inference_mode(False):
            return Snapshot(
                tables={
                    name: table if name in token_tables else table[kept.to(table.device)]
                    for name, table in self.tables.items()
                },
                edit_ids=self.edit_ids[kept], start=self.start[kept], length=self.length[kept],
            )  # fmt: skip

    def codes(self, keys: Tensor, metric: str) -> KeyCodes | None:
        """Codes with which `nearest_key` looks among ``keys``; None where it is as well off without.

        Args:
            keys: the table "key", or a conversion of it (for which there are none).
        """
        return self.key_codes.of(keys, metric) if keys is self.tables["key"] else None

    def rows(self, edit_id: int, token_tables: Mapping[str, object]) -> dict[str, Tensor]:
        """Copies of one edit's rows, as `EditMemory.add` takes them."""
        row = self.row_of(edit_id)
        first = int(self.start[row])
        tokens = slice(first, first + int(self.length[row]))
        return {
            name: table[tokens if name in token_tables else row].clone()
            for name, table in self.tables.items()
        }
