"""The memories of all layers of an adapter as one."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from ..runtime.frames import find, framed
from .budget import Tiers
from .snapshot import Snapshot
from .tables import EditMemory
from .values import Spill


@dataclass
class Trial:
    """Changes of a memory group that have not happened yet.

    Attributes:
        memories: the group's memories with the changes.
        kept: whether the changes are to happen when the trial's block ends.
    """

    memories: dict[str, EditMemory]
    kept: bool = False


class MemoryGroup:
    """The memories of one adapter on all its layers, changed and read together.

    An edit is in all of them or in none, and a snapshot of the group is of one moment. Plain object: it holds
    references to modules that live on the layers.
    """

    def __init__(self):
        self.memories: dict[str, EditMemory] = {}
        self.tiers: Tiers | None = None  # of an adapter that was loaded with a budget
        self.spill: Spill | None = None
        self._make_locks()
        self._answering: tuple[dict[str, Snapshot], tuple[int, ...], dict[str, Snapshot]] | None = None

    def _make_locks(self) -> None:
        self._lock = threading.RLock()  # held while the memories change from one state to the next
        self._writing = threading.RLock()  # held by the one who changes them, trials included

    def __getstate__(self):
        return {"memories": self.memories, "tiers": self.tiers, "spill": self.spill}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._make_locks()
        self._answering = None

    @contextmanager
    def trial(self) -> Iterator[Trial]:
        """Inside the block, changes show in this thread alone; they happen at its end if `kept` is set.

        Otherwise, and after any exception (Ctrl-C included), nothing has happened: the memories were never
        touched. Other threads go on reading them meanwhile, and wait before they change them.
        """
        with self._writing:
            with self._lock:
                trial = Trial({name: memory.fork() for name, memory in self._memories().items()})
            with framed(self, "trial", trial):
                yield trial
            if trial.kept:
                self._take(trial.memories)

    def _memories(self) -> dict[str, EditMemory]:
        """The memories as this thread sees them."""
        frame = find(self, "trial")
        return self.memories if frame is None else frame.content.memories

    def _take(self, changed: Mapping[str, EditMemory]) -> None:
        memories = self._memories()
        with self._lock:
            before = {name: memory.fork() for name, memory in memories.items()}
            try:
                for name, memory in memories.items():
                    memory.take(changed[name])
            except BaseException:  # Ctrl-C between two layers
                for name, memory in memories.items():
                    memory.take(before[name])
                raise

    @property
    def gate_name(self) -> str:
        """Name of the layer that looks edits up."""
        return next(name for name, memory in self._memories().items() if "key" in memory.edit_tables)

    @property
    def first(self) -> EditMemory:
        """The memory that keeps the keys and the records."""
        return self._memories()[self.gate_name]

    def __len__(self) -> int:
        return len(self.first) if self.memories else 0

    def __contains__(self, edit_id: int) -> bool:
        return bool(self.memories) and edit_id in self.first

    def sizes(self) -> dict[str, dict[str, int]]:
        """Rows of each memory's tables and bytes of its records, as a saved folder's config names them."""
        with self._lock:
            return {name: memory.sizes() for name, memory in self._memories().items()}

    def bytes_used(self) -> dict[str, int]:
        """Bytes of the stored edits: "keys" (always in memory), "values" of all of them, and of the values
        those on the "device", in the "host"'s memory, and on the "disk" alone."""
        with self._lock:
            memories = list(self._memories().values())
            parts = [memory.bytes_used() for memory in memories]
            keys, values = (sum(part[name] for part in parts) for name in ("keys", "values"))
        found = {"keys": keys, "values": values, "device": 0, "host": 0, "disk": 0}
        if self.tiers is not None:
            used = self.tiers.used()
            return {**found, **used, "disk": max(values - used["host"], 0)}
        on_host = not memories or memories[0].edit_ids.device.type == "cpu"
        return {**found, "host" if on_host else "device": values}

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Each memory's tensors as they are saved, as this thread sees them; all of one moment."""
        with self._lock:
            return {name: memory.state_dict() for name, memory in self._memories().items()}

    def ids(self) -> list[int]:
        """Numbers of the stored edits, oldest first."""
        with self._lock:
            return self.first.ids

    def records(self) -> dict[int, dict]:
        """What was noted about each edit."""
        return self.listed()[1]

    def listed(self) -> tuple[dict[str, Snapshot], dict[int, dict]]:
        """All edits and what was noted about each of them, both of one moment."""
        with self._lock:
            return self.everything(), {i: self.first.record(i) for i in self.first.ids}

    def noted(self, edit_id: int) -> tuple[Snapshot, dict]:
        """All edits of the memory with the records, and one edit's record, of one moment.

        Raises:
            KeyError: an unknown number.
        """
        with self._lock:
            self.first.row_of(edit_id)
            return self.first.snapshot(), self.first.record(edit_id)

    def rows(self, snapshots: Mapping[str, Snapshot], edit_id: int) -> dict[str, dict[str, Tensor]]:
        """An edit of an earlier moment, as `add` takes it."""
        return {name: snapshots[name].rows(edit_id) for name in self._memories()}

    def next_id(self) -> int:
        """A number that no edit of this memory has or has had."""
        return max((memory.highest_id for memory in self._memories().values()), default=0) + 1

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
        with self._writing, self._lock:
            memories = self._memories()
            if set(rows) != set(memories):
                raise ValueError(f"rows={sorted(rows)}: this adapter has memories on {sorted(memories)}.")
            for name, memory in memories.items():
                memory.check(rows[name])
            if edit_id is not None and edit_id in self.first:
                raise ValueError(f"edit_id={edit_id} is stored already; remove it first.")
            edit_id = self.next_id() if edit_id is None else edit_id
            self.first.touch(edit_id)
            try:
                for name, memory in memories.items():
                    memory.add(edit_id, rows[name], record if memory is self.first else None)
            except BaseException:  # a record that is no JSON, no memory left, Ctrl-C
                for memory in memories.values():
                    if edit_id in memory:
                        memory.remove(edit_id)
                raise
            return edit_id

    def note(self, edit_id: int, record: Mapping[str, object]) -> None:
        """Put another record in the place of a stored edit's. Raises KeyError for an unknown number."""
        with self._writing, self._lock:
            self.first.row_of(edit_id)
            self.first.touch(edit_id)
            self.first.note(edit_id, record)

    def remove(self, edit_id: int) -> None:
        """Forget one edit everywhere. Raises KeyError for an unknown number."""
        with self._writing, self._lock:
            self.first.row_of(edit_id)
            self.first.touch(edit_id)
            for memory in self._memories().values():
                memory.remove(edit_id)

    def everything(self) -> dict[str, Snapshot]:
        """Memory name to snapshot of all edits, those that do not answer included; all of one moment."""
        with self._lock:
            return {name: memory.snapshot() for name, memory in self._memories().items()}

    def snapshot(self) -> dict[str, Snapshot]:
        """Memory name to snapshot of the edits that may answer now (not disabled, not expired)."""
        with self._lock:
            memories = self._memories()
            now = {name: memory.snapshot() for name, memory in memories.items()}
            silent = self.first.silent(time.time()) if memories else ()
            if not silent:
                return now
            known = self._answering
            if known is None or known[1] != silent or any(now[n] is not known[0].get(n) for n in now):
                made = {n: now[n].without(silent) for n in now}
                known = self._answering = (now, silent, made)
            return known[2]
