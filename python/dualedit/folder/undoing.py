"""Taking a folder's last commits back, and making them again: commits of their own, on the files alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .journal import Contents, replay
from .manifest import WEIGHTS
from .reading import View, own_edits
from .writing import Writer


def stacks(view: View) -> tuple[list[list[dict[str, Any]]], list[list[dict[str, Any]]]]:
    """The changes that undo the commits of a journal, and that make undone ones again, oldest first."""
    contents: Contents = {name: own_edits(view.own_file(name, WEIGHTS), True) for name in view.adapters}
    done: list[list[dict[str, Any]]] = []
    undone: list[list[dict[str, Any]]] = []
    for entry in view.entries:
        inverse = replay(contents, entry, str(view.folder))
        if entry.kind == "undo" and done:
            done.pop()
            undone.append(inverse)
            continue
        if entry.kind == "redo" and undone:
            undone.pop()
        else:
            undone.clear()
        done.append(inverse)
    return done, undone


def step(folder: Path, kind: str) -> list[dict[str, Any]]:
    """Take the last commit back, or make the one that was undone last again.

    Args:
        kind: "undo" or "redo".

    Returns:
        the changes that were made, as `Entry.changes`.

    Raises:
        ValueError: nothing to undo or redo. FolderLocked, OSError: as `Writer`.
    """
    with Writer(folder).open() as writer:
        done, undone = (
            ([], []) if writer.view is None or writer.view.manifest is None else stacks(writer.view)
        )
        stack = done if kind == "undo" else undone
        if not stack:
            reason = (
                "no change is noted in its journal (compacting, and PEFT's own saving, begin a new one)"
                if kind == "undo"
                else "nothing was undone, or something was done since"
            )
            raise ValueError(f"Nothing to {kind} in {folder}: {reason}.")
        changes = stack[-1]
        writer.commit(changes, kind=kind)
        return changes
