"""The journal of a folder of edits: one line of JSON for each commit, each with its own checksum.

A line is {"check": C, "entry": E}. C is the beginning of the SHA-256 of E's bytes as they stand in the line;
E names the check of the line before it ("prev"), so that no line is lost or moved from the middle unseen. A
last line without its newline is one whose writer was stopped: it is left out, and the next writer cuts it
off. Anything else that does not fit is damage.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_HEAD, _MIDDLE, _END = b'{"check":"', b'","entry":', b"}"
_DIGITS = 16
OPERATIONS = ("add", "remove", "note")
KINDS = ("commit", "undo", "redo")


class Damaged(ValueError):
    """Files that are not what was written."""


@dataclass(frozen=True)
class Entry:
    """One commit.

    Attributes:
        seq: its number; numbers go on over the folder's life, and name the segments.
        kind: "commit", "undo" or "redo".
        time: ISO 8601, UTC.
        prev: check of the line before, or the journal's start.
        segment: {"bytes", "sha256"} of the file with the rows of the edits that it adds; None: there is none.
        changes: mappings with "adapter", "op", "id" and, by operation, "from" (number of the commit whose
            segment has the rows; 0: the adapter's own file), "radius", "record".
        check: of its own line.
    """

    seq: int
    kind: str
    time: str
    prev: str
    segment: dict[str, Any] | None
    changes: list[dict[str, Any]]
    check: str = ""


def line_of(entry: Entry) -> tuple[bytes, str]:
    """A journal line with its newline, and its check."""
    content = {
        "seq": entry.seq, "kind": entry.kind, "time": entry.time, "prev": entry.prev,
        "segment": entry.segment, "changes": entry.changes,
    }  # fmt: skip
    data = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    check = _check(data)
    return _HEAD + check.encode() + _MIDDLE + data + _END + b"\n", check


def _check(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:_DIGITS]


def read_lines(data: bytes, start: str, seq: int, name: str) -> tuple[list[Entry], int]:
    """The commits of a journal, or of what was added to one.

    Args:
        data: bytes from a line's beginning on.
        start: check of the line before.
        seq: number of the commit before.
        name: of the file, for errors.

    Returns:
        the commits, and how many bytes their lines take; what is behind is a line that was not finished.

    Raises:
        Damaged: names the line.
    """
    entries: list[Entry] = []
    place = 0
    while (end := data.find(b"\n", place)) >= 0:
        try:
            entry = _entry(data[place:end])
            if entry.prev != start or entry.seq != seq + 1:
                raise ValueError(
                    f"it is number {entry.seq} behind {entry.prev}, not {seq + 1} behind {start}"
                )
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise Damaged(
                f"{name}, commit {seq + 1}: the line is damaged ({error}). Restore the folder from a copy."
            ) from error
        entries.append(entry)
        start, seq, place = entry.check, entry.seq, end + 1
    return entries, place


def _entry(line: bytes) -> Entry:
    cut = len(_HEAD) + _DIGITS
    if not (line.startswith(_HEAD) and line[cut:].startswith(_MIDDLE) and line.endswith(_END)):
        raise ValueError("it is no line of a journal")
    check, data = line[len(_HEAD) : cut].decode("ascii"), line[cut + len(_MIDDLE) : -len(_END)]
    if _check(data) != check:
        raise ValueError("its checksum does not fit")
    content = json.loads(data)
    entry = Entry(
        content["seq"], content["kind"], content["time"], content["prev"], content["segment"],
        content["changes"], check,
    )  # fmt: skip
    _check_types(entry)
    return entry


def _check_types(entry: Entry) -> None:
    right = type(entry.seq) is int and entry.kind in KINDS and isinstance(entry.changes, list)
    right = right and isinstance(entry.time, str) and isinstance(entry.prev, str)
    right = right and (entry.segment is None or is_file_note(entry.segment))
    if not right or not all(_is_change(change) for change in entry.changes):
        raise ValueError("its entries have other types than were written")


def is_file_note(note: object) -> bool:
    """Whether something is the size and digest of a file."""
    return (
        isinstance(note, dict)
        and type(note.get("bytes")) is int
        and note["bytes"] >= 0
        and isinstance(note.get("sha256"), str)
        and len(note["sha256"]) == 64
    )


def _is_change(change: Any) -> bool:
    if not isinstance(change, dict) or change.get("op") not in OPERATIONS:
        return False
    if type(change.get("id")) is not int or change["id"] < 1 or not isinstance(change.get("adapter"), str):
        return False
    if change["op"] == "remove":
        return True
    if not isinstance(change.get("record"), dict):
        return False
    radius = change.get("radius")
    number = radius is None or (isinstance(radius, (int, float)) and not isinstance(radius, bool))
    return change["op"] == "note" or (type(change.get("from")) is int and change["from"] >= 0 and number)


@dataclass(frozen=True)
class Kept:
    """An edit of a folder.

    Attributes:
        source: number of the commit whose segment has its rows; 0: the adapter's own file.
        record: what is noted about it.
        radius: as stored; None: none of its own, or it stands in the adapter's own file.
    """

    source: int
    record: Mapping[str, Any]
    radius: float | None = None


Contents = dict[str, dict[int, Kept]]  # adapter to number to edit


def replay(contents: Contents, entry: Entry, name: str) -> list[dict[str, Any]]:
    """Make a commit's changes.

    Returns:
        the changes that would take it back, in their order.

    Raises:
        Damaged: a change that cannot be: an edit that is stored already, or none to remove.
    """
    inverse: list[dict[str, Any]] = []
    for change in entry.changes:
        edits, number = contents.get(change["adapter"]), change["id"]
        there = None if edits is None else edits.get(number)
        what: dict[str, Any] = {"adapter": change["adapter"], "id": number}
        if edits is None or (there is None) != (change["op"] == "add") or change.get("from", 0) > entry.seq:
            raise Damaged(
                f"{name}, commit {entry.seq}: it is to {change['op']} edit {number} of "
                f"{change['adapter']!r}, and that cannot be. Restore the folder from a copy."
            )
        if change["op"] == "add":
            edits[number] = Kept(change["from"], change["record"], change["radius"])
            inverse.append({**what, "op": "remove"})
            continue
        assert there is not None
        if change["op"] == "remove":
            del edits[number]
            back = {"op": "add", "from": there.source, "radius": there.radius, "record": dict(there.record)}
        else:
            edits[number] = Kept(there.source, change["record"], there.radius)
            back = {"op": "note", "record": dict(there.record)}
        inverse.append({**what, **back})
    return inverse[::-1]
