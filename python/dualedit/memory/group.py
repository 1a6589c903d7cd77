"""The memories of all layers of an adapter as one."""

from __future__ import annotations

import threading
from collections.abc import Mapping

from torch import Tensor

from .snapshot import Snapshot
from .tables import EditMemory


class MemoryGroup:
    """The memories of one adapter on all its layers, changed and read together.

    An edit is in all of them or in none, and a snapshot of the group is of one moment. Plain object: it holds
    references to modules that live on the layers.
    """

    def __init__(self):
        self.memories: dict[str, EditMemory] = {}
        self._lock = threading.RLock()

    def __getstate__(self):
        return {"memories": self.memories}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._lock = threading.RLock()

    @property
    def gate_name(self) -> str:
        """Name of the layer that looks edits up."""
        return next(name for name, memory in self.memories.items() if "key" in memory.edit_tables)

    @property
    def first(self) -> EditMemory:
        """The memory that keeps the keys and the records."""
        return self.memories[self.gate_name]

    def __len__(self) -> int:
        return len(self.first) if self.memories else 0

    def ids(self) -> list[int]:
        """Numbers of the stored edits, oldest first."""
        return self.first.ids

    def records(self) -> dict[int, dict]:
        """What was noted about each edit."""
        return {i: self.first.record(i) for i in self.ids()}

    def rows(self, snapshots: Mapping[str, Snapshot], edit_id: int) -> dict[str, dict[str, Tensor]]:
        """An edit of an earlier moment, as `add` takes it."""
        return {
            name: snapshots[name].rows(edit_id, memory.token_tables) for name, memory in self.memories.items()
        }

    def next_id(self) -> int:
        """A number that no edit of this memory has or has had."""
        return max((memory.highest_id for memory in self.memories.values()), default=0) + 1

    def add(
        self,
        rows: Mapping[str, Mapping[str, Tensor]],
        record: Mapping[str, object],
        edit_id: int | None = None,
    ) -> int:
        """Store one edit in every memory, or in none.

        Args:
            rows: memory name to the rows of its tables.
            record: anything JSON can hold.
            edit_id: the number of an edit that is brought back; None takes a new one.

        Returns:
            the edit's number.
        """
        with self._lock:
            if set(rows) != set(self.memories):
                raise ValueError(
                    f"rows={sorted(rows)}: this adapter has memories on {sorted(self.memories)}."
                )
            for name, memory in self.memories.items():
                memory.check(rows[name])
            if edit_id is not None and edit_id in self.first:
                raise ValueError(f"edit_id={edit_id} is stored already; remove it first.")
            edit_id = self.next_id() if edit_id is None else edit_id
            try:
                for name, memory in self.memories.items():
                    memory.add(edit_id, rows[name], record if memory is self.first else None)
            except BaseException:  # a record that is no JSON, no memory left, Ctrl-C
                for memory in self.memories.values():
                    if edit_id in memory:
                        memory.remove(edit_id)
                raise
            return edit_id

    def remove(self, edit_id: int) -> None:
        """Forget one edit everywhere. Raises KeyError for an unknown number."""
        with self._lock:
            self.first.row_of(edit_id)
            for memory in self.memories.values():
                memory.remove(edit_id)

    def snapshot(self) -> dict[str, Snapshot]:
        """Memory name to snapshot, all of one moment."""
        with self._lock:
            return {name: memory.snapshot() for name, memory in self.memories.items()}
