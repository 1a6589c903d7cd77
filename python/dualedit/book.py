"""The stored edits as people keep them: listed, filtered, annotated, switched off, taken back, merged."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import date
from typing import Any

from torch import nn

from .editing import Edit, edit_of, edits_of
from .history import Change, apply
from .memory import MemoryGroup
from .models.architectures import unwrap
from .overlaps import Conflict, conflicts_in
from .records import moment, noted, uid_of
from .runtime.context import runtime_of
from .tuners.adapter import EditAdapter


@dataclass(frozen=True)
class Merged:
    """What came of merging other edits into these.

    Attributes:
        added: the edits that are new here, with the numbers that they have here.
        known: how many were here already.
        older: edits that were left out, because one of the same picture and question that is here is newer.
        replaced: edits that were here and made room for newer ones.
    """

    added: list[Edit]
    known: int
    older: list[Edit]
    replaced: list[Edit]


class EditBook(ABC):
    """What can be done with stored edits without asking the model anything.

    Attributes:
        model: the model that they are on.
        remembered: how many actions can be undone; what was removed is kept in memory that long.
    """

    model: nn.Module

    def __init__(self) -> None:
        self.remembered = 1000
        self._done: list[list[Change]] = []  # changes that take back what was done, oldest first
        self._undone: list[list[Change]] = []

    @property
    @abstractmethod
    def adapters(self) -> list[EditAdapter]:
        """The adapters that hold the edits, the one that edits go to first in front."""

    @contextmanager
    def _changing(self, kind: str = "commit") -> Iterator[None]:
        """A change of the stored edits: all of the block happens, or nothing; it is saved before it counts.

        Args:
            kind: of the commit, where there is a folder.
        """
        with ExitStack() as stack:
            self._hold(stack)
            trials = [stack.enter_context(each.group.trial()) for each in self.adapters]
            yield
            self._commit(kind)
            for trial in trials:
                trial.kept = True

    @abstractmethod
    def _hold(self, stack: ExitStack) -> None:
        """Hold the folder, and bring what others have saved."""

    @abstractmethod
    def _commit(self, kind: str = "commit") -> None:
        """Save what has changed."""

    # ------------------------------------------------------------------ reading

    @property
    def edits(self) -> list[Edit]:
        """The stored edits, oldest first."""
        return sorted((edit for each in self.adapters for edit in edits_of(each)), key=lambda edit: edit.id)

    def get(self, edit_id: int) -> Edit:
        """One edit. Raises KeyError for an unknown number; names the stored ones."""
        return edit_of(self._holder(edit_id), edit_id)

    def record(self, edit_id: int) -> dict[str, Any]:
        """All that is noted about an edit, its picture and thumbnail in base64 included. Raises KeyError."""
        group = self._holder(edit_id).group
        group.first.row_of(edit_id)
        return group.first.record(edit_id)

    def filter(
        self,
        text: str | None = None,
        tag: str | None = None,
        author: str | None = None,
        method: str | None = None,
        image: str | None = None,
        failed: bool | None = None,
        enabled: bool | None = None,
        since: str | date | None = None,
        until: str | date | None = None,
        where: Callable[[Edit], bool] | None = None,
    ) -> list[Edit]:
        """The edits that fit all that is asked for, oldest first.

        Args:
            text: occurs in the question, the answer or the note, in capitals or not.
            tag, author, method: one of its tags; its author; "DualEdit" or "BalancEdit", in capitals or not.
            image: its picture's digest, or the digest's beginning.
            failed, enabled: whether it failed when it was asked back; whether it may answer.
            since, until: stored at or after the one point in time, before the other (ISO 8601).
            where: any other condition.

        Raises:
            ValueError: no point in time.
        """
        first, last = moment(since, "since"), moment(until, "until")
        wanted = None if text is None else text.casefold()

        def fits(edit: Edit) -> bool:
            words = f"{edit.prompt}\n{edit.target}\n{edit.note}".casefold()
            return (
                (wanted is None or wanted in words)
                and (tag is None or tag in edit.tags)
                and (author is None or edit.author == author)
                and (method is None or edit.method.casefold() == method.casefold())
                and (image is None or (edit.image_sha256 or "").startswith(image.lower()))
                and (failed is None or edit.failed == failed)
                and (enabled is None or edit.enabled == enabled)
                and (first is None or edit.created >= first)
                and (last is None or edit.created < last)
                and (where is None or where(edit))
            )

        return [edit for edit in self.edits if fits(edit)]

    def memory_use(self) -> dict[str, int]:
        """Bytes of the stored edits: "keys", which are always in memory; "values" of all edits; and of the
        values those on the "device", in the "host"'s memory, and on the "disk" alone (`load_edits(budget=)`).
        """
        parts = [each.group.bytes_used() for each in self.adapters]
        return {name: sum(part[name] for part in parts) for name in parts[0]}

    def conflicts(self) -> list[Conflict]:
        """Pairs of edits with near keys (one reaches the other's) and different answers, oldest first."""
        return [found for each in self.adapters for found in conflicts_in(each)]

    def _holder(self, edit_id: int) -> EditAdapter:
        adapters = self.adapters
        return next((each for each in adapters if edit_id in each.group), adapters[0])

    # ------------------------------------------------------------------ changing

    def remove(self, edit_id: int) -> None:
        """Forget one edit. Raises KeyError for an unknown number; names the stored ones."""
        with self._changing():
            group = self._holder(edit_id).group
            group.first.row_of(edit_id)
            uid = uid_of(group.first.record(edit_id), edit_id)
            self._did(apply([Change(group, edit_id, uid, None)]))

    def enable(self, edit_id: int) -> Edit:
        """Let a disabled edit answer again. Raises KeyError for an unknown number."""
        return self._note(edit_id, {"disabled": None})

    def disable(self, edit_id: int) -> Edit:
        """Keep an edit, and let it answer nothing until it is enabled. Raises KeyError."""
        return self._note(edit_id, {"disabled": True})

    def annotate(
        self,
        edit_id: int,
        author: str | None = None,
        note: str | None = None,
        tags: Iterable[str] | None = None,
        expires: str | date | None = None,
    ) -> Edit:
        """Change what people noted about an edit; what is None stays, and "" (or []) takes it away.

        Raises:
            KeyError: an unknown number.
            ValueError: what cannot be noted.
        """
        if expires == "":
            return self._note(edit_id, {**noted(author, note, tags), "expires": None})
        return self._note(edit_id, noted(author, note, tags, expires))

    def _note(self, edit_id: int, changed: dict[str, Any]) -> Edit:
        with self._changing():
            group = self._holder(edit_id).group
            group.first.row_of(edit_id)
            before = group.first.record(edit_id)
            record = {name: value for name, value in {**before, **changed}.items() if value is not None}
            if record != before:
                self._did(apply([Change(group, edit_id, uid_of(before, edit_id), record)]))
        return self.get(edit_id)

    def merge(self, other: EditBook) -> Merged:
        """Take over another model's edits, bit for bit. The base models must be the same.

        An edit that is here already (the same id) is passed over. Of two edits of the same picture and
        question, the newer one stays.

        Raises:
            ValueError: the other's adapters do not fit these. Nothing is taken over.
        """
        pairs = _pairs(self.adapters, other.adapters)
        added: list[tuple[EditAdapter, int]] = []
        older: list[Edit] = []
        replaced: list[Edit] = []
        inverse: list[Change] = []
        known = 0
        with self._changing():
            here = {edit.uid for edit in self.edits}
            for own, theirs in pairs:
                mine = {_question(edit): edit for edit in edits_of(own) if edit.image_sha256 is not None}
                for edit in edits_of(theirs):
                    if edit.uid in here:
                        known += 1
                        continue
                    rival = mine.get(_question(edit))
                    if rival is not None and (rival.created, rival.uid) > (edit.created, edit.uid):
                        older.append(edit)
                        continue
                    if rival is not None:
                        inverse = apply([Change(own.group, rival.id, rival.uid, None)]) + inverse
                        replaced.append(rival)
                    group = theirs.group
                    rows, record = group.rows(group.everything(), edit.id), group.first.record(edit.id)
                    number = max(each.group.next_id() for each in self.adapters)
                    new = Change(own.group, number, None, {**record, "uid": edit.uid}, rows)
                    inverse = apply([new]) + inverse
                    added.append((own, number))
            if inverse:
                self._did(inverse)
        return Merged([edit_of(*each) for each in added], known, older, replaced)

    # ------------------------------------------------------------------ taking back

    def _did(self, inverse: Sequence[Change]) -> None:
        self._done.append(list(inverse))
        del self._done[: -self.remembered]
        self._undone.clear()

    def undo(self) -> Edit:
        """Take back what was done last here: an edit, a removal, a merge, an annotation, a switch.

        An edit that had made room comes back under its number. What somebody else has changed meanwhile
        stays as they left it.

        Returns:
            the edit that was taken back, or that is back.

        Raises:
            ValueError: nothing (left) to undo.
        """
        reason = "this editor has made no edit that is still stored"
        return self._step(self._done, self._undone, "undo", reason)

    def redo(self) -> Edit:
        """Do again what was undone last. As `undo`.

        Raises:
            ValueError: nothing (left) to do again.
        """
        return self._step(self._undone, self._done, "redo", "nothing was undone, or something was done since")

    def _step(self, stack: list, other: list, kind: str, reason: str) -> Edit:
        runtime = runtime_of(unwrap(self.model))
        groups: list[MemoryGroup] = [] if runtime is None else list(runtime.groups.values())
        with self._changing(kind):
            while stack:
                changes = [change for change in stack[-1] if change.group in groups]
                main = changes[-1 if kind == "redo" else 0] if changes else None
                if main is not None and main.due:
                    break
                stack.pop()  # removed by hand, or with its adapter
            else:
                raise ValueError(f"Nothing to {kind}: {reason}.")
            before = self._find(main)
            inverse = apply(changes)
            found = self._find(main) or before
        stack.pop()
        other.append(inverse)
        assert found is not None
        return found

    def _find(self, change: Change) -> Edit | None:
        holder = next((each for each in self.adapters if each.group is change.group), None)
        if holder is None or change.edit_id not in change.group:
            return None
        return edit_of(holder, change.edit_id)


def _question(edit: Edit) -> tuple[str | None, str]:
    return edit.image_sha256, " ".join(edit.prompt.split())


def _pairs(
    own: Sequence[EditAdapter], theirs: Sequence[EditAdapter]
) -> list[tuple[EditAdapter, EditAdapter]]:
    """Which of the other's adapters goes into which. Raises ValueError where one has no place."""
    pairs = []
    for other in theirs:
        if not len(other.group):
            continue
        place = next((each for each in own if _fits(each, other)), None)
        if place is None:
            held = ", ".join(f"{each.name!r} ({each.method.title})" for each in own)
            raise ValueError(
                f"other: its adapter {other.name!r} ({other.method.title}) fits none of these: {held}. Edits "
                "merge where base model, method, layers and sizes are the same, and trained adapters too."
            )
        pairs.append((place, other))
    return pairs


def _fits(one: EditAdapter, other: EditAdapter) -> bool:
    def shape(adapter: EditAdapter) -> Any:
        tables = {n: (m.edit_tables, m.token_tables, m.kind) for n, m in adapter.group.memories.items()}
        prints = adapter.config.base_fingerprint or {}
        return adapter.method.name, tables, {n: v for n, v in prints.items() if v is not None}

    return shape(one) == shape(other)
