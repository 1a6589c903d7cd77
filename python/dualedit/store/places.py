"""Where a store lies: a folder of this machine, or any place that fsspec knows (s3://, gs://, memory://)."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
import uuid
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from ..files import replace_whole, sync, write_new

_FSSPEC = "A store at {} needs fsspec (pip install fsspec, and what it needs there, such as s3fs)."


class Place(ABC):
    """The files of a store, by their names inside it ("edits/3-v1.safetensors")."""

    @abstractmethod
    def read(self, name: str) -> bytes:
        """A file's contents. Raises FileNotFoundError."""

    @abstractmethod
    def create(self, name: str, data: bytes) -> None:
        """Write a new file, whole or not at all. Raises FileExistsError where there is one already."""

    @abstractmethod
    def replace(self, name: str, data: bytes) -> None:
        """Put new contents in a file's place in one step."""

    @abstractmethod
    def exists(self, name: str) -> bool:
        """Whether there is such a file."""

    @abstractmethod
    def names(self, folder: str) -> list[str]:
        """Names of the files in a folder of the store, sorted; empty where there is no such folder."""

    @abstractmethod
    def remove(self, name: str) -> None:
        """Remove a file; nothing happens where there is none."""

    @abstractmethod
    def local(self, name: str, digest: str) -> Path:
        """A file of this machine with the contents of a file that never changes.

        Args:
            digest: SHA-256 of the contents, by which a copy is kept.

        Raises:
            FileNotFoundError: there is none.
        """


class LocalPlace(Place):
    """A folder, of this machine or of a file system that several machines mount."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __str__(self) -> str:
        return str(self.folder)

    def read(self, name: str) -> bytes:
        return (self.folder / name).read_bytes()

    def create(self, name: str, data: bytes) -> None:
        file = self.folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        part = self._written(file, data)
        try:
            os.link(part, file)  # unlike a rename, it fails where there is a file already
        finally:
            part.unlink(missing_ok=True)
        sync(file.parent)

    def replace(self, name: str, data: bytes) -> None:
        file = self.folder / name
        os.replace(self._written(file, data), file)
        sync(file.parent)

    @staticmethod
    def _written(file: Path, data: bytes) -> Path:
        """A synced file beside another, of a name that no thread and no machine has used."""
        part = file.with_name(f".{file.name}.{uuid.uuid4().hex}.part")
        write_new(part, data)
        return part

    def exists(self, name: str) -> bool:
        return (self.folder / name).is_file()

    def names(self, folder: str) -> list[str]:
        place = self.folder / folder
        if not place.is_dir():
            return []
        return sorted(f"{folder}/{p.name}" for p in place.iterdir() if p.is_file() and p.name[0] != ".")

    def remove(self, name: str) -> None:
        (self.folder / name).unlink(missing_ok=True)

    def local(self, name: str, digest: str) -> Path:
        file = self.folder / name
        if not file.is_file():
            raise FileNotFoundError(2, "No such file", str(file))
        return file


class RemotePlace(Place):
    """A folder of a file system of fsspec.

    `create` is its conditional put ("create"), which object stores answer with an error where the name is
    taken, and a put is whole or not there at all. Copies of files that never change are kept in `cache`.

    Raises:
        ImportError: no fsspec, or not what this address needs.
    """

    def __init__(self, address: str, cache: Path | None = None, **options: Any):
        try:
            import fsspec
        except ImportError as error:
            raise ImportError(_FSSPEC.format(address)) from error
        self.address = address.rstrip("/")
        self.system, self.root = fsspec.core.url_to_fs(self.address, **options)
        self.root = self.root.rstrip("/")
        self.cache = cache or Path(tempfile.gettempdir()) / f"dualedit-store-{os.getuid()}"

    def __str__(self) -> str:
        return self.address

    def _at(self, name: str) -> str:
        return f"{self.root}/{name}"

    def read(self, name: str) -> bytes:
        return self.system.cat_file(self._at(name))

    def create(self, name: str, data: bytes) -> None:
        self.system.makedirs(self._at(name).rpartition("/")[0], exist_ok=True)
        try:
            self.system.pipe_file(self._at(name), data, mode="create")
        except FileExistsError:
            raise
        except OSError as error:
            # What a refused condition is called differs between stores; that the name is taken does not.
            if self.exists(name):
                raise FileExistsError(17, "File exists", self._at(name)) from error
            raise

    def replace(self, name: str, data: bytes) -> None:
        self.system.makedirs(self._at(name).rpartition("/")[0], exist_ok=True)
        self.system.pipe_file(self._at(name), data)

    def exists(self, name: str) -> bool:
        self.system.invalidate_cache()
        return self.system.isfile(self._at(name))

    def names(self, folder: str) -> list[str]:
        self.system.invalidate_cache()
        with contextlib.suppress(FileNotFoundError):
            found = self.system.ls(self._at(folder), detail=False)
            return sorted(f"{folder}/{str(path).rpartition('/')[2]}" for path in found)
        return []

    def remove(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.system.rm_file(self._at(name))

    def local(self, name: str, digest: str) -> Path:
        file = self.cache / digest[:2] / digest
        if not file.is_file():
            data = self.read(name)
            if hashlib.sha256(data).hexdigest() == digest:
                file.parent.mkdir(parents=True, exist_ok=True)
                replace_whole(file, data)
            else:  # the caller says what is wrong with it
                file = file.with_name(f"{digest}.damaged")
                file.parent.mkdir(parents=True, exist_ok=True)
                replace_whole(file, data)
        return file


def place_of(store: str | os.PathLike[str], cache: Path | None = None) -> Place:
    """A store by its address: a folder, or anything with a scheme that fsspec reads."""
    address = os.fspath(store)
    if address.startswith("file://"):
        address = address.removeprefix("file://")
    return RemotePlace(address, cache) if "://" in address else LocalPlace(Path(address))
