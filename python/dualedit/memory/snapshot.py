"""The stored edits as they were at one moment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from dualedit_kernels import KeyCodes

from .key_codes import TableCodes


@dataclass(frozen=True)
class Snapshot:
    """The edits of one memory at one moment.

    Attributes:
        tables: name to tensor; N rows for an edit table, T rows (all edits' tokens, one after the other) for
            a token table.
        ids: the edits' numbers [N], in the order of the rows.
        start, length: first row and number of rows [N] (int64) of each edit in the token tables.
        key_codes: what is known of the table "key".
    """

    tables: dict[str, Tensor]
    ids: tuple[int, ...]
    start: Tensor
    length: Tensor
    key_codes: TableCodes = field(default_factory=TableCodes, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.ids)

    def codes(self, keys: Tensor, metric: str) -> KeyCodes | None:
        """Codes with which `nearest_key` looks among ``keys``; None where it is as well off without.

        Args:
            keys: the table "key", or a conversion of it (for which there are none).
        """
        return self.key_codes.of(keys, metric) if keys is self.tables["key"] else None

    def rows(self, edit_id: int, token_tables: Mapping[str, object]) -> dict[str, Tensor]:
        """Copies of one edit's rows, as `EditMemory.add` takes them."""
        row = self.ids.index(edit_id)
        first = int(self.start[row])
        tokens = slice(first, first + int(self.length[row]))
        return {
            name: table[tokens if name in token_tables else row].clone()
            for name, table in self.tables.items()
        }
