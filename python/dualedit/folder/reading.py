"""Reading a folder of edits while others may write in it: all of one moment, checked before it is used."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from ..tensor_file import TensorFile
from .journal import Contents, Damaged, Entry, Kept, read_lines, replay
from .manifest import CONFIG, MANIFEST, WEIGHTS, Manifest, check_file, is_plain, read_manifest, segment_name

_TRIES, _PAUSE = 50, 0.02  # of a reader whose files were replaced meanwhile
_IDS = ".edit_ids"  # how a memory's table of numbers ends; its other tables begin alike
UNREAD: dict[str, Any] = {}  # in the place of a record that stands in an adapter's own file
_T = TypeVar("_T")


@dataclass
class View:
    """A folder as it was at one moment.

    Attributes:
        folder: where it is.
        manifest: None for a folder of version 0.1 or of PEFT alone.
        adapters: adapter's name to its folder inside this one.
        contents: the edits of each adapter.
        entries: the commits since the adapters' own files were written.
        seq, check, offset: of the last commit: its number, its check, and where its line ends.
        torn: bytes behind it, of a line whose writer was stopped.
        highest_id: of all edits that the folder has or has had.
        moving: whether some of the adapters' own files were not in their places yet; what anybody else reads
            there may be of the save before.
    """

    folder: Path
    manifest: Manifest | None
    adapters: dict[str, str]
    contents: Contents
    entries: list[Entry] = field(default_factory=list)
    seq: int = 0
    check: str = ""
    offset: int = 0
    torn: int = 0
    highest_id: int = 0
    moving: bool = False

    def slim(self) -> View:
        """The same without what was noted about edits, pictures among it: to be held for long."""
        contents: Contents = {} if self.manifest is not None else {
            name: dict.fromkeys(edits, Kept(0, UNREAD)) for name, edits in self.contents.items()
        }  # fmt: skip
        return replace(self, contents=contents, entries=[slim(entry) for entry in self.entries])

    def place(self, name: str) -> Path:
        """Where a file of the folder is."""
        return self.folder / name if self.manifest is None else self.manifest.place(self.folder, name)

    def own_file(self, adapter: str, name: str) -> Path:
        """One of an adapter's own files, its settings or its weights."""
        return self.place(str(Path(self.adapters[adapter], name)))

    def segments(self) -> dict[int, dict[str, Any]]:
        """Number of commit to size and digest of its segment, for those that brought edits."""
        return {entry.seq: entry.segment for entry in self.entries if entry.segment is not None}

    def segment(self, seq: int, full: bool = False) -> Path:
        """A commit's segment, checked. Raises Damaged, FileNotFoundError."""
        note = self.segments().get(seq)
        if note is None:
            raise Damaged(f"{self.folder}: commit {seq} has no segment, and edits are said to be in it.")
        path = self.folder / segment_name(seq)
        check_file(path, note, full)
        return path


def slim(entry: Entry) -> Entry:
    """A commit without its changes, once they are made: what is left names its segment."""
    return replace(entry, changes=[]) if entry.changes else entry


def find_folder(path: Path) -> tuple[Path, str] | None:
    """The folder whose manifest speaks of an adapter's folder, and the adapter's name; None: none does."""
    for folder, place in ((path, ""), (path.parent, path.name)):
        # A folder around it may be anybody's, with a manifest.json of something else.
        ours = folder is path or all(word in _mark(folder) for word in (b'"generation"', b'"store"'))
        manifest = read_manifest(folder) if ours else None
        for name, where in ({} if manifest is None else manifest.adapters).items():
            if where == place:
                return folder, name
    return None


def steadily(folder: Path, read: Callable[[], _T]) -> _T:
    """Read a folder, again where it was written anew meanwhile.

    Raises:
        Damaged: what is wrong with it. FileNotFoundError: a file is missing.
    """
    for attempt in range(_TRIES):
        before = _mark(folder)
        try:
            return read()
        except (Damaged, FileNotFoundError) as error:
            # Moving files to their places changes no manifest: look twice before it is called damage.
            if attempt + 1 == _TRIES or (attempt > 1 and _mark(folder) == before):
                if isinstance(error, FileNotFoundError):
                    raise Damaged(f"{error.filename} is missing. Restore the folder from a copy.") from error
                raise
            time.sleep(_PAUSE if attempt else 0.0)
    raise AssertionError


def _mark(folder: Path) -> bytes:
    try:
        return (folder / MANIFEST).read_bytes()
    except OSError:
        return b""


def read_folder(folder: Path, records: bool = True, full: bool = False) -> View:
    """A folder's manifest and journal, and what they make of its edits.

    Args:
        records: read what is noted in the adapters' own files, too, with their radii.
        full: digest every file, however large, and every segment.

    Raises:
        ValueError: no adapter there, or a format of the future.
        Damaged: files that are not what was written.
    """
    return steadily(folder, lambda: _read(folder, records, full))


def _read(folder: Path, records: bool, full: bool) -> View:
    manifest = read_manifest(folder)
    if manifest is None:
        adapters = plain_adapters(folder)
        contents = {n: own_edits(folder / p / WEIGHTS, records) for n, p in adapters.items()}
        return View(folder, None, adapters, contents, highest_id=_highest(contents))
    for name, note in manifest.files.items():
        check_file(manifest.place(folder, name), note, full)
    contents = {
        name: own_edits(manifest.place(folder, str(Path(place, WEIGHTS))), records)
        for name, place in manifest.adapters.items()
    }
    journal = folder / manifest.journal
    data = journal.read_bytes()
    entries, end = read_lines(data, manifest.start, manifest.seq, str(journal))
    highest = max(manifest.highest_id, _highest(contents))
    for entry in entries:
        replay(contents, entry, str(journal))
        highest = max([highest, *(change["id"] for change in entry.changes if change["op"] == "add")])
    check = entries[-1].check if entries else manifest.start
    view = View(
        folder, manifest, dict(manifest.adapters), contents, entries, manifest.seq + len(entries), check, end,
        len(data) - end, highest,
        moving=any(manifest.place(folder, name) != folder / name for name in manifest.files),
    )  # fmt: skip
    for seq in view.segments():
        path = folder / segment_name(seq)
        if full:
            view.segment(seq, full)
        elif not path.is_file():
            raise FileNotFoundError(2, "No such file", str(path))
    return view


def plain_adapters(folder: Path) -> dict[str, str]:
    """The adapters of a folder without a manifest: itself and its fallback, or else the folders in it."""
    if not (folder / CONFIG).is_file():
        inside = sorted(file.parent.name for file in folder.glob(f"*/{CONFIG}"))
        if not inside:
            raise ValueError(
                f"folder={str(folder)!r} holds no {CONFIG}: pass a folder that save_edits has written."
            )
        return {name: name for name in inside}
    found = {"default": ""}
    name = settings_of(folder / CONFIG).get("fallback")
    if is_plain(name) and (folder / name / CONFIG).is_file():
        found[name] = name
    return found


def settings_of(file: Path) -> dict[str, Any]:
    """An adapter's settings. Raises Damaged."""
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(settings, dict):
            raise ValueError("it holds no settings")
        return settings
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{file} is damaged ({error}): restore it from a copy.") from error


def own_edits(file: Path, records: bool) -> dict[int, Kept]:
    """The edits in an adapter's own file, oldest first. Raises Damaged."""
    if not file.is_file():
        raise FileNotFoundError(2, "No such file", str(file))
    try:
        with TensorFile(file) as tensors:
            gate = next((n for n in tensors.shapes if n.endswith(".radius")), None)
            if gate is None:
                return {}
            memory = gate.removesuffix(".radius")
            ids = tensors.numbers(memory + _IDS)
            if not all(type(number) is int and number > 0 for number in ids) or len(set(ids)) != len(ids):
                raise ValueError(f"its edits have the numbers {ids[:5]}, and edits count from 1")
            if not records:
                return dict.fromkeys(sorted(ids), Kept(0, UNREAD))
            text = tensors.data(memory + ".record_bytes").decode()
            noted = json.loads(text) if text else [{} for _ in ids]
            radii = tensors.numbers(gate)
            if not (len(noted) == len(ids) == len(radii)) or not all(isinstance(r, dict) for r in noted):
                raise ValueError(f"{len(ids)} edits with {len(noted)} records and {len(radii)} radii")
            rows = sorted(zip(ids, noted, radii, strict=True), key=lambda row: row[0])
            return {i: Kept(0, record, own_radius(radius)) for i, record, radius in rows}
    except (KeyError, IndexError, ValueError, TypeError, RecursionError) as error:
        raise Damaged(f"{file} is cut short or damaged ({error}): restore it from a copy.") from error


def own_radius(stored: float) -> float | None:
    """A radius as stored; None for an edit without one of its own, which is a negative number (0.1: NaN)."""
    return None if math.isnan(stored) or stored < 0 else stored


def _highest(contents: Contents) -> int:
    return max((number for edits in contents.values() for number in edits), default=0)


def newer(view: View) -> tuple[list[Entry], View] | None:
    """What was committed since a view, and the view as it is then, which holds the new commits without their
    changes; None where the journal is another one."""
    manifest = read_manifest(view.folder)
    if manifest is None or view.manifest is None or (manifest.store, manifest.generation) != (
        view.manifest.store, view.manifest.generation,
    ):  # fmt: skip
        return None
    journal = view.folder / manifest.journal
    with open(journal, "rb") as opened:
        opened.seek(view.offset)
        data = opened.read()
    entries, taken = read_lines(data, view.check, view.seq, str(journal))
    check = entries[-1].check if entries else view.check
    highest = max(
        [view.highest_id, *(c["id"] for entry in entries for c in entry.changes if c["op"] == "add")]
    )
    after = replace(
        view, manifest=manifest, entries=[*view.entries, *map(slim, entries)],
        seq=view.seq + len(entries), check=check, offset=view.offset + taken, torn=len(data) - taken,
        highest_id=highest,
    )  # fmt: skip
    return entries, after
