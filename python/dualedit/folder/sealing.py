"""Manifests of folders that were written by something else: PEFT alone, version 0.1, or by hand."""

from __future__ import annotations

import re
import uuid
from dataclasses import replace
from pathlib import Path

from ..files import clear, sync, write_new
from .journal import Damaged, read_lines
from .lock import writing_in
from .manifest import (
    CONFIG,
    MANIFEST,
    SEGMENTS,
    WEIGHTS,
    Manifest,
    check_file,
    note_of,
    read_manifest,
    write_manifest,
)
from .reading import own_edits, plain_adapters, read_folder, settings_of


def seal(folder: Path) -> None:
    """Take note that PEFT's `save_pretrained` has written in a folder; nothing, where there is no manifest.

    Where it has written the edits, too, all of them are in the adapter's own file now: manifest, journal and
    segments go, and the folder is one of plain files until `save_edits` writes there. Where it wrote settings
    alone, the manifest takes them over.
    """
    try:
        manifest = read_manifest(folder)
    except Damaged:
        manifest = None
        clear(folder / MANIFEST)
    if manifest is None or "" not in manifest.adapters.values():
        return
    try:
        check_file(folder / WEIGHTS, manifest.files[WEIGHTS], full=True)
        files = {**manifest.files, CONFIG: note_of(folder / CONFIG)}
        write_manifest(folder, replace(manifest, files=files))
    except (Damaged, FileNotFoundError):
        clear(folder / MANIFEST)
        clear(folder / manifest.journal)
        clear(folder / SEGMENTS)


def migrate(folder: Path, version: str) -> bool:
    """Give a folder a manifest of what is in it: one of version 0.1, of PEFT alone, or changed by hand.

    A journal that is there goes on.

    Args:
        version: of the library.

    Returns:
        whether there was anything to do.

    Raises:
        ValueError: no edits there, or files that cannot be read.
    """
    if not folder.is_dir():
        raise ValueError(f"folder={str(folder)!r} does not exist: pass a folder of saved edits.")
    with writing_in(folder):
        try:
            read_folder(folder, full=True)
            if read_manifest(folder) is not None:
                return False
        except Damaged:
            pass
        try:
            old = read_manifest(folder)
        except Damaged:
            old = None
        adapters = plain_adapters(folder) if old is None else old.adapters
        contents = {}
        for name, place in adapters.items():
            settings_of(folder / place / CONFIG)
            contents[name] = own_edits(folder / place / WEIGHTS, True)
        files = {
            str(Path(place, name)): note_of(folder / place / name)
            for place in adapters.values()
            for name in (CONFIG, WEIGHTS)
        }
        if old is not None:
            made = replace(old, files=files, staged="", version=version)
        else:
            highest = max((number for edits in contents.values() for number in edits), default=0)
            made = _with_journal(
                folder, Manifest(uuid.uuid4().hex, 1, 0, highest, adapters, files, "", "", version)
            )
        write_manifest(folder, made)
    read_folder(folder, full=True)  # says what is wrong with the journal
    return True


def _with_journal(folder: Path, made: Manifest) -> Manifest:
    """A new manifest with the newest journal of the folder, or an empty one."""
    found = sorted(folder.glob("journal-*.jsonl"))
    newest = re.fullmatch(r"journal-(\d{6})\.jsonl", found[-1].name) if found else None
    if newest is None:
        made = replace(made, start=uuid.uuid4().hex[:16])
        write_new(folder / made.journal, b"")
        sync(folder)
        return made
    made = replace(made, generation=int(newest[1]), start=uuid.uuid4().hex[:16])
    data = (folder / made.journal).read_bytes()
    begins = re.match(
        rb'\{"check":"[0-9a-f]{16}","entry":\{"seq":(\d+),.{0,200}?"prev":"([0-9a-f]{16})"', data
    )
    if begins is not None:
        made = replace(made, start=begins[2].decode(), seq=int(begins[1]) - 1)
    read_lines(data, made.start, made.seq, str(folder / made.journal))
    return made
