"""The stored edits as tensors that are saved: out of a memory, and into one after they were checked."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import packing
from .key_codes import TableCodes
from .notes import Notes, notes_in, text_of

if TYPE_CHECKING:
    from .values import ValueStore

NO_RADIUS = -1.0  # of an edit that reaches as far as the adapter's settings say
_LARGEST_ID = 2**53  # further on, JSON readers round
_RECORDS = "record_bytes"


class SavedTables:
    """The part of an `EditMemory` that a module saves and loads."""

    def sizes(self) -> dict[str, int]:
        """Rows of the tables and bytes of the records, as a saved folder's config names them."""
        tokens = int(self.edit_lengths[: self._num_edits].sum()) if self.token_tables else 0
        return {"edits": self._num_edits, "tokens": tokens, "records": len(self._record_bytes())}

    def expect(self, edits: int) -> None:
        """Let it be known that the folder which the settings came from holds edits.

        Loading their tensors fulfils it. A loader that places the settings alone would lose the edits without
        a word; the first question refuses then, and names `load_edits`.
        """
        self._expected = edits

    @staticmethod
    def checked_record(record: Mapping[str, object] | None) -> dict:
        """A record as JSON brings it back. Raises TypeError, ValueError: JSON cannot hold it."""
        return json.loads(json.dumps(dict(record or {})))

    def _record_bytes(self) -> bytes:
        return text_of([self._records.get(i) for i in self.ids])

    @property
    def saved_tables(self) -> tuple[str, ...]:
        """Names of the tensors that are saved."""
        return (*self.edit_tables, "edit_ids", "edit_lengths", *self.token_tables, _RECORDS)

    def live(self, name: str) -> Tensor:
        """A table's rows of the stored edits, one edit after the other, in memory of their own."""
        n = self._num_edits
        if self.values is not None and name in self.values.names:
            return self.values.table(name, self.edit_slots[:n].tolist())
        if name not in self.token_tables:
            table = getattr(self, name).detach()
            if name not in self._wide or self._num_rows == n:
                return table[:n].clone()
            return table[self.edit_places[:n].to(table.device)]
        table = getattr(self, name)[: self._num_tokens]
        start, length = self.edit_starts[:n], self.edit_lengths[:n]
        packed = length.cumsum(0) - length
        if not self._num_removed and bool((start == packed).all()):
            return table.detach().clone()
        rows = torch.arange(int(length.sum()), device=start.device)
        rows += (start - packed).repeat_interleave(length)
        return table.detach()[rows.to(table.device)]

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        for name in self.saved_tables[:-1]:
            destination[prefix + name] = self.live(name)
        text = self._record_bytes()
        destination[prefix + _RECORDS] = torch.frombuffer(bytearray(text), dtype=torch.uint8) if text else (
            torch.empty(0, dtype=torch.uint8)
        )  # fmt: skip

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        names = self.saved_tables
        found = {name: state_dict[prefix + name] for name in names if prefix + name in state_dict}
        missing_keys.extend(prefix + name for name in names if name not in found)
        if len(found) != len(names):
            return
        try:
            self._adopt(found)
        except ValueError as error:
            error_msgs.append(f"{prefix[:-1]}: {error}")

    # ------------------------------------------------------------------ checks

    def _check_types(self, found: Mapping[str, Tensor]) -> None:
        """Refuse tables of a file that `add` would not have made."""
        wanted = {"edit_ids": torch.int64, "edit_lengths": torch.int64, _RECORDS: torch.uint8}
        for name, table in found.items():
            packed = name in self.token_tables and packing.is_packed(self.kind)
            if name in wanted:
                right = table.dtype == wanted[name] and table.ndim == 1
            else:
                right = table.dtype == torch.uint8 if packed else table.dtype.is_floating_point
            if not right:
                raise ValueError(
                    f"{name} is {table.dtype} of shape {tuple(table.shape)}; the file is "
                    "damaged. Restore it from a copy."
                )
            kind = self.kind if packed else "native"
            if name not in wanted and not table.is_meta and table.numel():
                if not packing.are_storable(table, kind):
                    raise ValueError(
                        f"{name} holds values that are not finite, and no edit has such; the file is "
                        "damaged. Restore it from a copy."
                    )
        ids = found["edit_ids"]
        if not ids.is_meta:
            check_ids(ids)

    def check_shapes(self, shapes: Mapping[str, Sequence[int]], edits: int, tokens: int) -> None:
        """Refuse tables of other shapes than so many edits and tokens have here. Raises ValueError."""
        counts = dict.fromkeys(self.edit_tables, edits) | dict.fromkeys(self.token_tables, tokens)
        for name, shape in (self.edit_tables | self.token_tables).items():
            if tuple(shapes[name]) != (counts[name], *shape):
                raise ValueError(
                    f"{name} has shape {tuple(shapes[name])} in the file, this model needs "
                    f"{(counts[name], *shape)}; the edits belong to another model or adapter size."
                )

    def check_lengths(self, ids: Tensor, lengths: Tensor) -> None:
        """Refuse numbers twice, and edits without tokens. Raises ValueError."""
        least = 1 if self.token_tables else 0
        if len(lengths) != len(ids) or len(ids.unique()) != len(ids) or bool((lengths < least).any()):
            raise ValueError(
                f"{len(ids)} edits (numbers {ids[:8].tolist()}) with lengths {lengths[:8].tolist()} do not "
                "fit together; the file is damaged. Restore it from a copy."
            )

    # ------------------------------------------------------------------ loading

    def _adopt(self, found: dict[str, Tensor]) -> None:
        radius = found.get("radius")
        if radius is not None and radius.is_floating_point() and not radius.is_meta:
            # Version 0.1 had NaN for an edit without a radius of its own.
            found["radius"] = torch.where(radius.isnan(), NO_RADIUS, radius)
        if not found["edit_ids"].is_meta and not len(found["edit_ids"]):
            for name in self.token_tables:  # an empty table may have been made for another kind of rows
                if found[name].ndim == 2 and not len(found[name]) and packing.is_packed(self.kind):
                    found[name] = found[name].new_empty((0, *self.token_tables[name]), dtype=torch.uint8)
        self._check_types(found)
        ids, lengths = found["edit_ids"].tolist(), found["edit_lengths"].tolist()
        self.check_shapes({name: table.shape for name, table in found.items()}, len(ids), sum(lengths))
        self.check_lengths(found["edit_ids"], found["edit_lengths"])
        try:
            notes = notes_in(found[_RECORDS].cpu().numpy().tobytes(), ids)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{error}; the file is damaged. Restore it from a copy.") from error
        device = self.edit_ids.device
        # A model being filled from a file may still be on the meta device; the file's tensors are real.
        place = found["edit_ids"].device if device.type == "meta" else device
        order = _ascending(found["edit_ids"], found["edit_lengths"])
        for name, table in found.items():
            table = table.detach()
            if order is not None and name != _RECORDS:
                table = table[order[name in self.token_tables].to(table.device)]
            # Cloned: tensors mapped from a file can be unaligned, which changes the last bit of a product.
            self._buffers[name] = table.to(place).clone()
        self._buffers[_RECORDS] = torch.empty(0, dtype=torch.uint8, device=place)
        values = next((t for n, t in found.items() if n not in ("radius",) and t.is_floating_point()), None)
        self._set_like(self.like.dtype if values is None or not ids else values.dtype, place)
        self.values = None
        length = self._buffers["edit_lengths"]
        self._buffers["edit_starts"] = length.cumsum(0) - length
        self._num_tokens = sum(lengths)
        self._begin(len(ids), notes, place)
        self._highest_id = max([self._highest_id, *ids])

    def adopt_stored(
        self, ids: Tensor, lengths: Tensor, tables: Mapping[str, Tensor], notes: Notes, values: ValueStore,
        slots: Tensor,
    ) -> None:  # fmt: skip
        """Take over edits whose values stay in files.

        Args:
            ids: numbers [N] int64, ascending.
            lengths: numbers of tokens [N] int64.
            tables: the edit tables that are not in `values`, with some room behind the rows that count.
            notes: records.
            values: where the values are.
            slots: [N] int64, of each edit there.

        Raises:
            ValueError: what `add` would have refused.
        """
        n = len(ids)
        check_ids(ids)
        self.check_lengths(ids, lengths)
        shown = {name: table[:n] for name, table in tables.items()}
        for name, table in shown.items():
            if tuple(table.shape[1:]) != self.edit_tables.get(name) or not table.dtype.is_floating_point:
                raise ValueError(f"{name} has shape {tuple(table.shape)}; the edits belong to another model.")
            if not packing.are_storable(table, "native"):
                raise ValueError(
                    f"{name} holds values that are not finite, and no edit has such; the file is damaged. "
                    "Restore it from a copy."
                )
        place = self.edit_ids.device
        for name, table in tables.items():
            self._buffers[name] = table.to(place)
        for name, table in (("edit_ids", ids), ("edit_lengths", lengths), ("edit_slots", slots)):
            self._buffers[name] = table.to(place)
        self._buffers["edit_starts"] = torch.zeros(n, dtype=torch.int64, device=place)
        plain = [values.dtypes[name] for name in values.names if values.dtypes[name].is_floating_point]
        if self.kind == "native" and plain:
            self._set_like(plain[0], place)
        self.values, self._num_tokens = values, 0
        self._begin(n, notes, place)
        self._highest_id = max([self._highest_id, *ids[-1:].tolist()])

    def _set_like(self, dtype: torch.dtype, place: torch.device) -> None:
        self._buffers["like"] = torch.empty(0, dtype=dtype, device=place)

    def _begin(self, edits: int, notes: Notes, place: torch.device) -> None:
        """Start anew with so many edits, whose tables are in place."""
        self._records = notes
        self._timed = notes.ending()
        self._num_edits = self._num_rows = edits
        self._num_removed, self._snapshot = 0, None
        self._buffers["edit_places"] = torch.arange(edits, device=place)
        if "edit_slots" not in self._buffers or self.values is None:
            self._buffers["edit_slots"] = torch.full((edits,), -1, dtype=torch.int64, device=place)
        self._gone = {}
        self._key_codes = TableCodes()
        self._expected, self._touched = 0, {}


def check_ids(ids: Tensor) -> None:
    """Refuse numbers that no edit has. Raises ValueError."""
    if len(ids) and not 0 < int(ids.min()) <= int(ids.max()) < _LARGEST_ID:
        raise ValueError(
            f"edit_ids go from {int(ids.min())} to {int(ids.max())}, and edits count from 1; the file is "
            "damaged. Restore it from a copy."
        )


def _ascending(ids: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor] | None:
    """Orders of the edits' rows and of their tokens by number; None where they are in order already."""
    if bool((ids.diff() > 0).all()):
        return None
    edits = ids.argsort()
    start = lengths.cumsum(0) - lengths
    pieces = [torch.arange(int(start[i]), int(start[i] + lengths[i])) for i in edits.tolist()]
    return edits, torch.cat([torch.empty(0, dtype=torch.int64), *pieces])
