"""Reading a store: one moment of it, edits by number and version, and a replica that follows by itself."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from ..folder import Damaged
from ..memory.rows import RECORDS, Rows, records_in
from .codebook import ShardTables, read_shard
from .manifest import KEPT, Shard, StoreManifest, edit_name, parse_manifest, read_manifest, version_name
from .places import Place, place_of

log = logging.getLogger("dualedit.store")


@dataclass(frozen=True)
class EditFile:
    """Which file holds an edit's values.

    Attributes:
        id, version: of the edit.
        bytes, sha256: of the file.
    """

    id: int
    version: int
    bytes: int
    sha256: str

    @property
    def name(self) -> str:
        """As requests carry it: "3-v1"."""
        return f"{self.id}-v{self.version}"


@dataclass(frozen=True)
class StoredEdit:
    """An edit read from its file.

    Attributes:
        tables: memory to table to rows: token tables [T, M], edit tables' one row.
        record: what is noted about it.
    """

    tables: dict[str, dict[str, Tensor]]
    record: dict[str, Any]


class Moment:
    """A store at one version; nothing in it changes."""

    def __init__(self, place: Place, manifest: StoreManifest, shards: Mapping[Shard, ShardTables]):
        self.place, self.manifest, self.shards = place, manifest, dict(shards)
        self._blocks = {shard.block: tables for shard, tables in shards.items()}

    @property
    def version(self) -> int:
        """Of the store."""
        return self.manifest.version

    @cached_property
    def ids(self) -> Tensor:
        """Numbers [N] of all edits, ascending: the rows of the tables below."""
        return _join([s.ids for s in self.shards.values()], torch.empty(0, dtype=torch.int64))

    @cached_property
    def keys(self) -> Tensor:
        """[N, P], by what edits are looked up."""
        return _join([s.keys for s in self.shards.values()], torch.empty(0, 1))

    @cached_property
    def radius(self) -> Tensor:
        """[N] float32, as stored: negative means as the settings say."""
        return _join([s.radius for s in self.shards.values()], torch.empty(0))

    @cached_property
    def ends(self) -> Tensor:
        """[N] float64: when each edit stops to answer, in seconds since 1970."""
        return _join([s.ends for s in self.shards.values()], torch.empty(0, dtype=torch.float64))

    def file_of(self, edit_id: int) -> EditFile:
        """The file of an edit. Raises KeyError where this version has none of this number."""
        shard = self._blocks.get(edit_id // self.manifest.shard_edits)
        row = None if shard is None else shard.row.get(edit_id)
        if shard is not None and row is not None:
            digest = bytes(shard.digests[row].tolist()).hex()
            return EditFile(edit_id, int(shard.versions[row]), int(shard.sizes[row]), digest)
        raise KeyError(f"edit_id={edit_id!r}: the store has no such edit at version {self.version}.")

    def answering(self, now: float | None = None) -> Tensor:
        """[N] bool: the edits that are neither disabled nor expired."""
        return self.ends > (time.time() if now is None else now)


def _join(parts: list[Tensor], empty: Tensor) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts) if parts else empty


class Store:
    """A store that others publish into, as one process reads it. All methods may be called by any thread.

    Args:
        store: a folder, or an address of fsspec.
        cache: where copies of remote files are kept; None: in the folder for temporary files.
        newest: how many edits are kept in memory; older ones are read again when they are asked for.

    Raises:
        FileNotFoundError: there is no store. Damaged: it is not what was written.
    """

    def __init__(self, store: str | os.PathLike[str], cache: Path | None = None, newest: int = 256):
        self.place = place_of(store, cache)
        self._newest = newest
        self._edits: OrderedDict[tuple[int, int], StoredEdit] = OrderedDict()
        self._moments: OrderedDict[int, Moment] = OrderedDict()
        self._lock = threading.Lock()
        self._reading = threading.Lock()  # held by the one who reads a new version
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        if not self.refresh():
            raise FileNotFoundError(2, "No store (publish a folder with dualedit publish)", str(self.place))

    # ------------------------------------------------------------------ versions

    def now(self) -> Moment:
        """The newest version that was read."""
        with self._lock:
            return next(reversed(self._moments.values()))

    def at(self, version: int) -> Moment:
        """A version that an answer began with; it is read where this process has not read it yet.

        Raises:
            KeyError: it is too old, or not there.
        """
        with self._lock:
            found = self._moments.get(version)
        if found is not None:
            return found
        if version > self.now().version:
            self.refresh()
        with self._lock:
            found = self._moments.get(version)
        if found is not None:
            return found
        try:
            name = version_name(version)
            manifest = parse_manifest(self.place.read(name), f"{self.place}/{name}")
            return self._moment(manifest)
        except FileNotFoundError as error:
            raise KeyError(f"version={version}: the store {self.place} has no such version.") from error

    def refresh(self) -> bool:
        """Read the newest version; whether it is another one than before.

        Raises:
            Damaged: the store is not what was written. OSError: it cannot be reached.
        """
        with self._reading:
            manifest = read_manifest(self.place)
            if manifest is None:
                return False
            with self._lock:
                if self._moments and next(reversed(self._moments)) >= manifest.version:
                    return False
            made = self._moment(manifest)
            with self._lock:
                self._moments[made.version] = made
                while len(self._moments) > KEPT:
                    self._moments.popitem(last=False)
            return True

    def _moment(self, manifest: StoreManifest) -> Moment:
        with self._lock:
            known = {shard: tables for m in self._moments.values() for shard, tables in m.shards.items()}
        shards = {s: known[s] if s in known else read_shard(self.place, s) for s in manifest.shards}
        return Moment(self.place, manifest, shards)

    def follow(self, seconds: float = 0.5, told: Callable[[Moment], None] | None = None) -> None:
        """Read new versions as they come, in a thread of its own, until `close`.

        What cannot be read (a place that is not reached, a damaged file) is logged; the version before stays.

        Args:
            told: called with each new version.
        """

        def run() -> None:
            while not self._stop.wait(seconds):
                try:
                    if self.refresh() and told is not None:
                        told(self.now())
                except Exception as error:
                    log.warning("%s: version %d stays (%s)", self.place, self.now().version, error)

        self._thread = threading.Thread(target=run, name="dualedit-store", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End following."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    # ------------------------------------------------------------------ files

    def adapter(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The adapter's settings and weights, checked; without edits. Raises Damaged."""
        manifest = self.now().manifest
        data = {name: self._checked(note["at"], note) for name, note in manifest.files.items()}
        state = safetensors.torch.load(data["adapter_model.safetensors"])
        return json.loads(data["adapter_config.json"]), state

    def _checked(self, name: str, note: Mapping[str, Any]) -> bytes:
        """The bytes that were compared, and no others: a file may change behind a reader's back."""
        file = self.place.local(name, note["sha256"])
        data = file.read_bytes()
        if len(data) != note["bytes"] or hashlib.sha256(data).hexdigest() != note["sha256"]:
            raise Damaged(
                f"{self.place}/{name} is damaged or cut short: it has {len(data)} bytes, {note['bytes']} "
                "were written. Publish the folder again (dualedit publish), or restore the store from a copy."
            )
        return data

    def edit(self, file: EditFile) -> StoredEdit:
        """An edit's values, checked against the digest in the codebook; those asked for last stay in memory.

        Raises:
            Damaged: the file is not what was written. FileNotFoundError: it is not there.
        """
        key = (file.id, file.version)
        with self._lock:
            found = self._edits.get(key)
            if found is not None:
                self._edits.move_to_end(key)
                return found
        name = edit_name(*key)
        data = self._checked(name, {"bytes": file.bytes, "sha256": file.sha256})
        made = edit_in(data, self.now().manifest.memories, file.id, name)
        with self._lock:
            self._edits[key] = made
            while len(self._edits) > self._newest:
                self._edits.popitem(last=False)
        return made


def edit_in(data: bytes, memories: list[str], edit_id: int, name: str) -> StoredEdit:
    """The one edit of a file's contents; `name`: of the file. Raises Damaged."""
    try:
        state = safetensors.torch.load(data)
        tables, record = {}, {}
        for memory in memories:
            rows = Rows(state, memory)
            tables[memory] = rows.edit(edit_id)
            if f"{memory}.{RECORDS}" in state:
                record = records_in(state[f"{memory}.{RECORDS}"], 1)[0]
        return StoredEdit(tables, record)
    except (SafetensorError, KeyError, ValueError, IndexError) as error:
        raise Damaged(f"{name} is damaged ({error}). Publish the folder again (dualedit publish).") from error
