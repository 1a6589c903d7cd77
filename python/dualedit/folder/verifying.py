"""Whether all files of a folder are what was written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..tensor_file import TensorFile
from .journal import Damaged
from .manifest import CONFIG, SEGMENTS, WEIGHTS, segment_name
from .reading import View, read_folder

_IDS = ".edit_ids"


def verify(folder: Path) -> dict[str, Any]:
    """Read every byte of a folder and compare it with what was written.

    Returns:
        "format" (0 without a manifest), "generation", "commits" of the journal, "edits" (adapter to number),
        "bytes" ("own", "segments", "journal"), and "notes": what a stopped writer has left, in words.

    Raises:
        ValueError: no edits there. Damaged: names the first file that is not what was written.
    """
    view = read_folder(folder, full=True)
    _check_segments(view)
    notes = []
    if view.torn:
        notes.append(f"the last commit is not whole ({view.torn} bytes); the next writer cuts it off")
    if view.manifest is None:
        notes.append("no manifest: nothing is known of the files' digests (dualedit migrate makes one)")
    elif view.manifest.staged and (folder / view.manifest.staged).is_dir():
        notes.append("files of the last save are not in their places; the next writer moves them")
    if view.manifest is not None and (folder / segment_name(view.seq + 1)).exists():
        notes.append("a commit was stopped before its line was written; the next writer removes its segment")
    return {
        "folder": str(folder),
        "format": 0 if view.manifest is None else view.manifest.format,
        "generation": 0 if view.manifest is None else view.manifest.generation,
        "commits": len(view.entries),
        "edits": {name: len(edits) for name, edits in view.contents.items()},
        "bytes": bytes_of(view),
        "notes": notes,
    }


def bytes_of(view: View) -> dict[str, int]:
    """Sizes on the disk: the adapters' own files, the segments, the journal."""
    own = sum(view.own_file(n, f).stat().st_size for n in view.adapters for f in (CONFIG, WEIGHTS))
    segments = sum(note["bytes"] for note in view.segments().values())
    journal = 0 if view.manifest is None else (view.folder / view.manifest.journal).stat().st_size
    return {"own": own, "segments": segments, "journal": journal}


def bytes_of_edits(view: View) -> dict[str, int]:
    """Bytes of the stored edits' rows: "keys" with their radii, which are always in memory where they are
    loaded, and "values", which a budget may leave on the disk. Raises Damaged."""
    found = {"keys": 0, "values": 0}
    for adapter, edits in view.contents.items():
        by_source: dict[int, set[int]] = {}
        for number, kept in edits.items():
            by_source.setdefault(kept.source, set()).add(number)
        for source, numbers in by_source.items():
            file = view.own_file(adapter, WEIGHTS) if source == 0 else view.folder / segment_name(source)
            try:
                with TensorFile(file) as tensors:
                    _count(tensors, "" if source == 0 else f"{adapter}:", numbers, found)
            except (ValueError, KeyError, IndexError) as error:
                raise Damaged(f"{file} is damaged ({error}). Restore the folder from a copy.") from error
    return found


def _count(tensors: TensorFile, start: str, numbers: set[int], found: dict[str, int]) -> None:
    for memory in [n.removesuffix(_IDS) for n in tensors.shapes if n.startswith(start) and n.endswith(_IDS)]:
        ids = tensors.numbers(memory + _IDS)
        lengths = tensors.numbers(f"{memory}.edit_lengths")
        tokens = sum(length for number, length in zip(ids, lengths, strict=True) if number in numbers)
        for name, size in tensors.sizes().items():
            table = name.removeprefix(f"{memory}.")
            if table == name or table in ("edit_ids", "edit_lengths", "record_bytes"):
                continue
            rows = tensors.shapes[name][0]
            wanted = len(numbers) if rows == len(ids) else tokens
            found["keys" if table in ("key", "radius") else "values"] += size * wanted // max(rows, 1)


def _check_segments(view: View) -> None:
    """See that the edits of each commit are in its segment."""
    for entry in view.entries:
        for adapter in {c["adapter"] for c in entry.changes if c["op"] == "add" and c["from"] == entry.seq}:
            wanted = {c["id"] for c in entry.changes if c["op"] == "add" and c["adapter"] == adapter}
            path = view.folder / segment_name(entry.seq)
            try:
                with TensorFile(path) as tensors:
                    memories = [
                        n for n in tensors.shapes if n.startswith(f"{adapter}:") and n.endswith(".edit_ids")
                    ]
                    found = [set(tensors.numbers(memory)) for memory in memories]
            except (ValueError, KeyError) as error:
                raise Damaged(f"{SEGMENTS}/{path.name} is damaged ({error}). Restore the folder.") from error
            if not found or any(not wanted <= ids for ids in found):
                raise Damaged(f"{SEGMENTS}/{path.name} lacks edits that commit {entry.seq} brought.")
