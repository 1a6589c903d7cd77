"""Writing in a folder of edits: commits to its journal, and its adapters' own files anew, all or nothing."""

from __future__ import annotations

import contextlib
import os
import stat
import uuid
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..files import append_synced, clear, cut, sync, sync_tree, write_new
from ..records import timestamp
from .journal import Entry, line_of
from .lock import HOLDER, LOCK, writing_in
from .manifest import (
    CONFIG,
    MANIFEST,
    SEGMENTS,
    WEIGHTS,
    Manifest,
    note_of,
    read_manifest,
    segment_name,
    write_manifest,
)
from .reading import View, newer, read_folder, slim


class Writer:
    """A folder held for writing; use it in a `with` block.

    Args:
        folder: made if it does not exist, and gone again if nothing was written to it.
        timeout: seconds to wait for another writer.

    Attributes:
        view: the folder as it is; None where it holds nothing yet.
        repaired: what the last writer had left undone, in words.
        news: what was committed since `known`, the folder as the caller knows it.

    Raises:
        FolderLocked: somebody else is writing. Damaged: files that are not what was written.
    """

    view: View | None

    def __init__(self, folder: Path, timeout: float = 60.0, known: View | None = None):
        self.folder, self.timeout, self._known = folder, timeout, known
        self.repaired: list[str] = []
        self.news: list[Entry] = []

    @contextmanager
    def open(self) -> Iterator[Writer]:
        """Hold the folder; what another writer left undone is repaired first, with a warning."""
        with held(self.folder, self.timeout):
            self._open()
            yield self

    def _open(self) -> None:
        manifest = read_manifest(self.folder)
        known = self._known
        if known is not None and known.manifest is not None and manifest is not None:
            found = newer(known)
            if found is not None:
                self.news, self.view = found
                if self.view.torn:
                    self._cut_tail()
                (self.folder / segment_name(self.view.seq + 1)).unlink(missing_ok=True)
                return
        if manifest is None:
            self._clear_staging("")
            for journal in self.folder.glob("journal-*.jsonl"):  # empty: of a first save that was stopped
                clear(journal)
            there = any((self.folder / name).is_file() for name in (CONFIG, WEIGHTS))
            there = there or any(self.folder.glob(f"*/{CONFIG}"))
            self.view = read_folder(self.folder, records=False) if there else None
            return
        if manifest.staged and (self.folder / manifest.staged).is_dir():
            self._finish(manifest)
            self.repaired.append("the files of the last save were not all in their places")
        self.view = read_folder(self.folder, records=False)
        if self.view.torn:
            self._cut_tail()
        if self._clear_rest():
            self.repaired.append("files of a save that was stopped were left")
        if self.repaired:
            warnings.warn(
                f"folder={str(self.folder)!r} is repaired: {', and '.join(self.repaired)}. At most the "
                "change that was being written is lost.",
                stacklevel=6,
            )

    def _cut_tail(self) -> None:
        view = self.view
        assert view is not None and view.manifest is not None
        cut(self.folder / view.manifest.journal, view.offset)
        self.repaired.append(f"the last commit was not whole ({view.torn} bytes)")
        self.view = replace(view, torn=0)

    # ------------------------------------------------------------------ a commit

    def commit(
        self, changes: Sequence[Mapping[str, Any]], rows: bytes | None = None, kind: str = "commit"
    ) -> View:
        """Add a commit: a segment where it brings edits, and one line. It is on the disk when this returns.

        Args:
            changes: as `Entry.changes`; an "add" without "from" has its rows in `rows`.
            rows: the segment, a safetensors file.

        Raises:
            OSError: the disk refused; the folder is as it was.
        """
        view = self.view
        assert view is not None and view.manifest is not None, "a folder without a journal is written whole"
        seq, note = view.seq + 1, None
        listed = [{"from": seq, **change} if change["op"] == "add" else dict(change) for change in changes]
        segment = self.folder / segment_name(seq)
        try:
            if rows is not None:
                if not segment.parent.is_dir():
                    segment.parent.mkdir()
                    sync(self.folder)
                write_new(segment, rows)
                sync(segment.parent)
                note = note_of(segment)
            entry = Entry(seq, kind, timestamp(), view.check, note, listed)
            line, check = line_of(entry)
            append_synced(self.folder / view.manifest.journal, line, view.offset)
        except BaseException:
            with contextlib.suppress(OSError):
                segment.unlink(missing_ok=True)
            raise
        added = [change["id"] for change in listed if change["op"] == "add"]
        self.view = replace(
            view, entries=[*view.entries, slim(replace(entry, check=check))], seq=seq, check=check,
            offset=view.offset + len(line), highest_id=max([view.highest_id, *added]),
        )  # fmt: skip
        return self.view

    # ------------------------------------------------------------------ the adapters' own files

    @contextmanager
    def anew(self, adapters: Mapping[str, str], highest_id: int, version: str) -> Iterator[Path]:
        """Write the adapters' own files anew, with all edits in them, and begin an empty journal.

        Args:
            adapters: adapter's name to its folder inside this one.
            highest_id: of all edits that there are or have been.
            version: of the library.

        Yields:
            the folder to write the files to, laid out as this one.

        Raises:
            OSError: the disk refused; the folder is as it was.
        """
        old = read_manifest(self.folder)
        generation = 1 if old is None else old.generation + 1
        staged = f".next-{generation:06d}"
        work, journal = self.folder / staged, None
        self._clear_staging("")
        try:
            work.mkdir()
            yield work
            files = {
                str(Path(place, name)): note_of(work / place / name)
                for place in adapters.values()
                for name in (CONFIG, WEIGHTS)
            }
            _share(work)
            sync_tree(work)
            highest = max(highest_id, 0 if self.view is None else self.view.highest_id)
            store = uuid.uuid4().hex if old is None else old.store
            seq = 0 if self.view is None else self.view.seq
            start = uuid.uuid4().hex[:16]
            made = Manifest(store, generation, seq, highest, dict(adapters), files, start, staged, version)
            journal = self.folder / made.journal
            write_new(journal, b"")
            sync(self.folder)
            write_manifest(self.folder, made)
            if old is None:
                sync(self.folder.parent)  # the folder may be new
        except BaseException:
            if self._generation() != generation:  # else it is saved, whatever went wrong behind that
                clear(work)
                if journal is not None:
                    clear(journal)
            raise
        with contextlib.suppress(OSError):  # it is saved; what is left undone, the next writer does
            self._finish(made)
            self._clear_rest()
        self.view = View(
            self.folder, made, dict(adapters), {}, [], seq, made.start, 0, 0, highest,
        )  # fmt: skip

    def _generation(self) -> int | None:
        with contextlib.suppress(OSError, ValueError):
            manifest = read_manifest(self.folder)
            return None if manifest is None else manifest.generation
        return None

    def _finish(self, manifest: Manifest) -> None:
        """Move the files of a save to their places; done again, nothing changes."""
        work = self.folder / manifest.staged
        if not work.is_dir():
            return
        places = {self.folder}
        for file in sorted(path for path in work.rglob("*") if path.is_file()):
            target = self.folder / file.relative_to(work)
            if not target.parent.is_dir():
                target.parent.mkdir(parents=True)
            os.replace(file, target)
            places.add(target.parent)
        for place in places:
            sync(place)
        clear(work)

    def _clear_staging(self, kept: str) -> bool:
        found = [path for path in self.folder.glob(".next-*") if path.name != kept]
        for path in found:
            clear(path)
        return bool(found)

    def _clear_rest(self) -> bool:
        """Remove what no manifest and no journal speaks of; whether there was any."""
        manifest = read_manifest(self.folder)
        if manifest is None:
            return False
        found = self._clear_staging(manifest.staged)
        view = read_folder(self.folder, records=False)
        named = {segment_name(seq) for seq in view.segments()}
        segments = self.folder / SEGMENTS
        there = list(segments.iterdir()) if segments.is_dir() else []
        rest = [path for path in there if f"{SEGMENTS}/{path.name}" not in named]
        rest += self.folder.glob(f".{MANIFEST}.*.part")
        # Last, as by these it is seen that there is something left.
        rest += [path for path in self.folder.glob("journal-*.jsonl") if path.name != manifest.journal]
        for path in rest:
            clear(path)
        if segments.is_dir() and not named:
            with contextlib.suppress(OSError):
                segments.rmdir()
        return bool(found or rest)


@contextmanager
def held(folder: Path, timeout: float = 60.0) -> Iterator[None]:
    """Hold a folder for writing; it is made if it does not exist, and gone again if nothing was written."""
    made = not folder.exists()
    with _there(folder, timeout):
        try:
            yield
        finally:
            # Still held: who waits for a lock file that is gone sees that, and begins anew.
            names = {path.name for path in folder.iterdir()} if made and folder.is_dir() else {""}
            if names <= {LOCK, HOLDER}:
                for name in names:
                    clear(folder / name)
                with contextlib.suppress(OSError):
                    folder.rmdir()


@contextmanager
def _there(folder: Path, timeout: float) -> Iterator[None]:
    """Hold a folder that is made first, again where another writer takes it away meanwhile."""
    with ExitStack() as stack:
        for attempt in range(100):
            folder.mkdir(parents=True, exist_ok=True)
            try:
                stack.enter_context(writing_in(folder, timeout))
                break
            except FileNotFoundError:
                if attempt == 99:
                    raise
        yield


def _share(folder: Path) -> None:
    """Let others use the files of a folder as far as the process's mask allows; safetensors lets nobody."""
    probe = folder / ".mode"
    write_new(probe, b"")  # the mask could only be read by setting it, for every thread
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)


def needs_repair(view: View) -> bool:
    """Whether a writer was stopped in a folder."""
    manifest = view.manifest
    if manifest is None:
        return False
    parts = (".next-*", f".{MANIFEST}.*.part")
    if view.torn or any(path for name in parts for path in view.folder.glob(name)):
        return True
    if (view.folder / segment_name(view.seq + 1)).exists():
        return True
    return any(path.name != manifest.journal for path in view.folder.glob("journal-*.jsonl"))
