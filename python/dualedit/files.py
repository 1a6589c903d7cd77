"""Writing files so that they are there after a power cut: whole or not at all, synced with their folders."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from pathlib import Path

_PIECE = 1 << 20  # bytes read at a time


def sync(path: Path) -> None:
    """Have the disk keep what was written to a file, or the names in a folder."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def write_new(file: Path, data: bytes) -> None:
    """Write a file in place and sync it; after an exception there is none. Nobody may be reading it."""
    try:
        with open(file, "wb", buffering=0) as opened:
            view = memoryview(data)
            while view:
                view = view[opened.write(view) :]
            os.fsync(opened.fileno())
    except BaseException:
        with contextlib.suppress(OSError):
            file.unlink(missing_ok=True)
        raise


def replace_whole(file: Path, data: bytes) -> None:
    """Put new contents in the place of a file's in one step; after an exception the old ones are there."""
    # The process id keeps two writers apart; who dies half way leaves a file that begins with a dot.
    part = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        write_new(part, data)
        os.replace(part, file)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise
    sync(file.parent)


def write_whole(file: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    replace_whole(file, text.encode("utf-8"))


def append_synced(file: Path, data: bytes, end: int) -> None:
    """Add to a file of `end` bytes and sync it; after an exception it has its old length.

    Raises:
        OSError: the disk refused.
    """
    opened = os.open(file, os.O_WRONLY)
    try:
        try:
            view, place = memoryview(data), end
            while view:
                done = os.pwrite(opened, view, place)
                view, place = view[done:], place + done
            os.fsync(opened)
        except BaseException:
            with contextlib.suppress(OSError):
                os.ftruncate(opened, end)
            raise
    finally:
        os.close(opened)


def cut(file: Path, end: int) -> None:
    """Shorten a file and sync it."""
    os.truncate(file, end)
    sync(file)


def sha256_of(file: Path) -> str:
    """Digest of a file's contents. Raises OSError."""
    digest = hashlib.sha256()
    with open(file, "rb", buffering=0) as opened:
        while piece := opened.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()


def sync_tree(folder: Path) -> None:
    """Sync all files of a folder and the folders in it."""
    for path in sorted(folder.rglob("*")):
        sync(path)
    sync(folder)


def clear(path: Path) -> None:
    """Remove a file or a folder with all that is in it; nothing happens where there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
