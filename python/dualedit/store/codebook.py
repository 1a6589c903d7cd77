"""The codebook of a store: keys, radii and digests of its edits, in shards that are files."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from ..folder import Damaged
from ..memory.rows import IDS, LENGTHS, Rows, memories_in
from .manifest import Shard
from .places import Place

SHARD_EDITS = 4096  # numbers to a shard: one that changes is written and read anew as a whole


@dataclass(frozen=True)
class Entry:
    """What the codebook says of one edit.

    Attributes:
        id, version: which file has its values.
        key: [P], by what it is looked up.
        radius: as stored (negative: as the adapter's settings say).
        bytes, sha256: of the file.
        ends: when it stops to answer, in seconds since 1970; 0: it is disabled, inf: never.
        mark: tells whether the folder has the same edit.
    """

    id: int
    version: int
    key: Tensor
    radius: float
    bytes: int
    sha256: str
    ends: float
    mark: int


@dataclass(frozen=True)
class ShardTables:
    """The tables of a shard of N edits.

    Attributes:
        ids, versions, sizes, marks: [N] int64.
        keys: [N, P]; radius: [N].
        digests: [N, 32] uint8.
        ends: [N] float64.
    """

    ids: Tensor
    versions: Tensor
    keys: Tensor
    radius: Tensor
    sizes: Tensor
    digests: Tensor
    ends: Tensor
    marks: Tensor

    def entries(self) -> dict[int, Entry]:
        """Number of edit to what the shard says of it."""
        numbers = (self.ids, self.versions, self.sizes, self.ends, self.marks, self.radius)
        lists = [table.tolist() for table in numbers]
        return {
            i: Entry(i, v, self.keys[row], r, size, bytes(self.digests[row].tolist()).hex(), end, mark)
            for row, (i, v, size, end, mark, r) in enumerate(zip(*lists, strict=True))
        }

    @cached_property
    def row(self) -> dict[int, int]:
        """Number of edit to its row."""
        return {number: row for row, number in enumerate(self.ids.tolist())}


def shard_bytes(memory: str, entries: Sequence[Entry]) -> bytes:
    """A shard's file: a segment without values, and what is known of each edit's file beside the keys."""
    tables = {
        IDS: torch.tensor([entry.id for entry in entries]),
        LENGTHS: torch.zeros(len(entries), dtype=torch.int64),
        "key": torch.stack([entry.key for entry in entries]),
        "radius": torch.tensor([entry.radius for entry in entries], dtype=torch.float32),
        "version": torch.tensor([entry.version for entry in entries]),
        "size": torch.tensor([entry.bytes for entry in entries]),
        "sha256": torch.tensor([list(bytes.fromhex(e.sha256)) for e in entries], dtype=torch.uint8),
        "ends": torch.tensor([entry.ends for entry in entries], dtype=torch.float64),
        "mark": torch.tensor([entry.mark for entry in entries]),
    }
    named = {f"{memory}.{name}": table for name, table in tables.items()}
    return safetensors.torch.save(named, {"format": "pt"})


def read_shard(place: Place, shard: Shard) -> ShardTables:
    """A shard's tables, checked; keys are mapped from the file where it is one of this machine.

    Raises:
        Damaged: not what was written. FileNotFoundError: it is not there.
    """
    file = place.local(shard.file, shard.sha256)
    data = file.read_bytes()
    if len(data) != shard.bytes or hashlib.sha256(data).hexdigest() != shard.sha256:
        raise Damaged(
            f"{place}/{shard.file} is damaged or cut short: it has {len(data)} bytes, {shard.bytes} were "
            "written. Publish the folder again (dualedit publish)."
        )
    try:
        state = safetensors.torch.load_file(str(file))
        rows = Rows(state, memories_in(list(state))[0])
        t = rows.tables
        return ShardTables(
            torch.tensor(rows.ids), t["version"], t["key"], t["radius"].float(), t["size"], t["sha256"],
            t["ends"], t["mark"],
        )  # fmt: skip
    except (SafetensorError, KeyError, IndexError) as error:
        raise Damaged(f"{place}/{shard.file} is damaged ({error}).") from error
