"""One writer of a folder at a time, among processes and threads; readers never wait."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..records import timestamp

LOCK, HOLDER = ".lock", ".lock.holder"
_held = threading.local()


class FolderLocked(TimeoutError):
    """Somebody else is writing in the folder, and did not finish in time."""


def holder_of(folder: Path) -> str:
    """Who writes in a folder, in words."""
    try:
        noted = json.loads((folder / HOLDER).read_text(encoding="utf-8"))
        here = "" if noted["host"] == socket.gethostname() else f" on {noted['host']}"
        return f"process {int(noted['pid'])}{here}, since {noted['since']}"
    except (OSError, ValueError, TypeError, KeyError):
        return "another process"


@contextmanager
def writing_in(folder: Path, timeout: float = 60.0) -> Iterator[None]:
    """Hold the folder, which exists, for writing; the same thread may hold it again.

    Args:
        timeout: seconds to wait for whoever holds it.

    Raises:
        FolderLocked: names who holds it and since when.
    """
    from filelock import FileLock, Timeout

    place = str(folder.resolve())
    counts: dict[str, int] = _held.__dict__.setdefault("counts", {})
    if counts.get(place):
        counts[place] += 1
        try:
            yield
        finally:
            counts[place] -= 1
        return
    # Not a singleton: two editors of one process are two writers.
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"Waiting for {holder_of(folder)}, which writes in {folder} ...", file=sys.stderr)
        try:
            lock.acquire(timeout=timeout, poll_interval=0.02)
        except Timeout as error:
            raise FolderLocked(
                f"folder={str(folder)!r} is being written by {holder_of(folder)}. Try again when it is done; "
                "the lock goes with that process, there is nothing to delete."
            ) from error
    counts[place] = 1
    try:
        noted = {"pid": os.getpid(), "host": socket.gethostname(), "since": timestamp()}
        with contextlib.suppress(OSError):  # a full disk: the lock holds all the same
            (folder / HOLDER).write_text(json.dumps(noted), encoding="utf-8")
        yield
    finally:
        counts[place] -= 1
        with contextlib.suppress(OSError):
            (folder / HOLDER).unlink(missing_ok=True)
        lock.release()


@contextmanager
def if_nobody_writes(folder: Path) -> Iterator[bool]:
    """Hold the folder for writing if it is free; whether it is."""
    from filelock import FileLock, Timeout

    try:
        lock = FileLock(folder / LOCK)
        lock.acquire(timeout=0)
    except (Timeout, OSError):  # OSError: a folder that cannot be written
        yield False
        return
    try:
        yield True
    finally:
        lock.release()
