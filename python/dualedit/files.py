"""Files that appear whole or not at all: what they replace stays until they are written."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_whole(file: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    try:
        mode = _file_mode(file.parent)
        with os.fdopen(handle, "w", encoding="utf-8") as opened:
            opened.write(text)
        os.chmod(name, mode)
        os.replace(name, file)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


@contextmanager
def replacing(folder: Path, last: str) -> Iterator[Path]:
    """A folder to write to, whose files take the places of those of the same names in `folder` at the end.

    Args:
        folder: made if it does not exist; other files in it are left alone.
        last: name of the file that is moved last, such as a config that announces the others.

    Raises:
        OSError: the disk refused. After this or any other exception `folder` is as it was.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    # In the same directory, so that moving files in is a rename within one file system.
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        made = work / "new"
        made.mkdir()
        yield made
        files = sorted((f for f in made.rglob("*") if f.is_file()), key=lambda f: (f.name == last, str(f)))
        mode = _file_mode(work)
        for file in files:
            file.chmod(mode)  # safetensors writes files that nobody else can read
            _sync(file)
        if folder.exists():
            _move([file.relative_to(made) for file in files], made, folder, work / "old")
        else:
            os.replace(made, folder)
        _sync(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _file_mode(folder: Path) -> int:
    """What a new file may be used for here.

    Seen from a file that is made for it: the process's mask could only be read by setting it, for every
    thread.
    """
    with tempfile.TemporaryDirectory(prefix=".mode.", dir=folder) as place:
        made = os.open(Path(place, "file"), os.O_CREAT | os.O_WRONLY, 0o666)
        try:
            return stat.S_IMODE(os.fstat(made).st_mode)
        finally:
            os.close(made)


def _sync(path: Path) -> None:
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def _move(files: list[Path], made: Path, target: Path, kept: Path) -> None:
    """Move the new files over the old ones, each in one step; if one move fails, all the old ones come back.

    Only a power cut between two moves can leave new weights beside an old config. Where the two do not fit,
    loading says so, and the old files are still in `kept`.
    """
    for file in files:
        if (target / file).is_file():
            (kept / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(target / file, kept / file)
    moved: list[Path] = []
    try:
        for file in files:
            (target / file).parent.mkdir(parents=True, exist_ok=True)
            os.replace(made / file, target / file)
            moved.append(file)
    except BaseException:
        for file in moved:
            if (kept / file).is_file():
                shutil.move(kept / file, target / file)
            else:
                (target / file).unlink()
        raise
