"""Taking changes of the stored edits back, and doing them again."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .memory import MemoryGroup
from .records import uid_of

Rows = dict[str, dict[str, Tensor]]


@dataclass(frozen=True)
class Change:
    """What is to become of one number of a memory.

    Attributes:
        group: the memory.
        edit_id: the number.
        uid: id of the edit that has this number now, None for no edit; where it is another one, somebody else
            has changed it meanwhile, and the change is left out.
        record: what is noted about the edit that is to have it; None: no edit is to have it.
        rows: its rows; None: those of the edit that is there.
    """

    group: MemoryGroup
    edit_id: int
    uid: str | None
    record: dict[str, Any] | None
    rows: Rows | None = None

    @property
    def due(self) -> bool:
        """Whether the memory is as the change expects it."""
        return self.uid == uid_now(self.group, self.edit_id)


def uid_now(group: MemoryGroup, edit_id: int) -> str | None:
    """Id of the edit that has a number; None where there is none."""
    return uid_of(group.first.record(edit_id), edit_id) if edit_id in group else None


def apply(changes: Sequence[Change]) -> list[Change]:
    """Make changes: all that are due or, after an exception, none.

    Returns:
        the changes that take them back, in the order in which they are to be made.
    """
    inverse: list[Change] = []
    with ExitStack() as stack:
        groups = list(dict.fromkeys(change.group for change in changes))
        trials = [stack.enter_context(group.trial()) for group in groups]
        for change in changes:
            if change.due:
                inverse.append(_make(change))
        for trial in trials:
            trial.kept = True
    return inverse[::-1]


def _make(change: Change) -> Change:
    group, edit_id = change.group, change.edit_id
    if change.record is None:
        before = group.first.record(edit_id)
        rows = group.rows(group.everything(), edit_id)
        group.remove(edit_id)
        return Change(group, edit_id, None, before, rows)
    if change.uid is None:
        assert change.rows is not None
        group.add(change.rows, change.record, edit_id)
        return Change(group, edit_id, uid_of(change.record, edit_id), None)
    before = group.first.record(edit_id)
    group.note(edit_id, change.record)
    return Change(group, edit_id, uid_of(change.record, edit_id), before)
