"""Whether all files of a folder are what was written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..tensor_file import TensorFile
from .journal import Damaged
from .manifest import CONFIG, SEGMENTS, WEIGHTS, segment_name
from .reading import View, read_folder


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
