"""From a folder of edits to a store that any number of machines read."""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor

from ..folder import View, read_folder
from ..folder.journal import Kept
from ..folder.manifest import CONFIG, WEIGHTS
from ..folder.reading import settings_of
from ..memory.rows import IDS, LENGTHS, RECORDS, Rows, memories_in, records_tensor
from ..records import expires_at, timestamp, uid_of
from ..version import __version__
from .codebook import SHARD_EDITS, Entry, read_shard, shard_bytes
from .manifest import ADAPTERS, CODEBOOK, Shard, StoreManifest, commit, edit_name, forget_old, read_manifest
from .places import Place, place_of

_TRIES = 20  # of a publisher that others overtake


@dataclass(frozen=True)
class Published:
    """What a publication did.

    Attributes:
        version: of the store now.
        edits: in it now.
        added, changed, removed: how many edits; all 0: the store was as the folder is, and its version stays.
    """

    version: int
    edits: int
    added: int
    changed: int
    removed: int


def publish(folder: str | os.PathLike[str], store: str | os.PathLike[str]) -> Published:
    """Bring a store to what a folder of edits holds.

    Files of edits are written first and never changed; then the codebook's changed shards; then the manifest,
    in one step. Whoever is stopped in between leaves the store as it was, with files that the next
    publication takes up. Only what changed is written.

    Args:
        folder: as `save_edits` writes it.
        store: a folder, or an address that fsspec knows (s3://bucket/path).

    Raises:
        ValueError: no edits there; edits in several adapters; a store of another folder or model; damage.
        FileExistsError: others kept publishing into this store.
        OSError: the place refused.
    """
    place = place_of(store)
    for _ in range(_TRIES):
        view = read_folder(Path(folder))
        before = read_manifest(place)
        try:
            return _Publication(view, place, before).run()
        except FileExistsError as error:
            lost = error
    raise lost


def _mark(edit_id: int, kept: Kept) -> int:
    """What tells an edit of a folder from another of the same number: rows never change under one uid."""
    text = json.dumps([uid_of(kept.record, edit_id), kept.record], sort_keys=True)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big", signed=True)


class _Publication:
    def __init__(self, view: View, place: Place, before: StoreManifest | None):
        self.view, self.place, self.before = view, place, before
        self.adapter = _one_adapter(view)
        self.contents = view.contents[self.adapter]
        own = view.own_file(self.adapter, WEIGHTS)
        with safe_open(str(own), framework="pt") as tensors:
            memories = memories_in(list(tensors.keys()))
            keyed = [m for m in memories if f"{m}.key" in tensors.keys()]
        self.memories = [*keyed, *(m for m in memories if m not in keyed)]
        if len(keyed) != 1:
            raise ValueError(f"{own} has {len(keyed)} tables of keys, and an adapter has one.")
        self.settings = settings_of(view.own_file(self.adapter, CONFIG))
        self.settings.pop("memory_sizes", None)
        self._check_store()

    def _check_store(self) -> None:
        before = self.before
        if before is None:
            return
        ours = "" if self.view.manifest is None else self.view.manifest.store
        if before.folder != ours:
            raise ValueError(
                f"store={str(self.place)!r} is published from another folder of edits: publish to another "
                "place, or remove it first."
            )
        known, now = (s.get("base_fingerprint") for s in (before.settings, self.settings))
        if known != now:
            raise ValueError(
                f"store={str(self.place)!r} holds edits of another base model ({known}, not {now}): publish "
                "to another place."
            )

    def run(self) -> Published:
        """Write what is missing, then the manifest. Raises FileExistsError where others were faster."""
        before = self.before
        was = {} if before is None else {shard.block: shard for shard in before.shards}
        each = SHARD_EDITS if before is None else before.shard_edits
        blocks: dict[int, list[int]] = {}
        for number in sorted(self.contents):
            blocks.setdefault(number // each, []).append(number)
        shards, added, changed, removed = [], 0, 0, 0
        reader = _FolderRows(self.view, self.adapter, self.memories)
        highest = 0 if before is None else before.highest_id
        for block in sorted(set(blocks) | set(was)):
            known = {}
            if block in was:
                known = read_shard(self.place, was[block]).entries()
            entries, new = {}, 0
            for number in blocks.get(block, ()):
                kept, mark = self.contents[number], _mark(number, self.contents[number])
                old = known.get(number)
                if old is not None and old.mark == mark:
                    entries[number] = old
                    continue
                new += 1
                added, changed = added + (old is None), changed + (old is not None)
                entries[number] = self._write_edit(reader, number, kept, mark, old, number <= highest)
            gone = len(set(known) - set(entries))
            removed += gone
            if not entries:
                continue
            same = block in was and not new and not gone
            shards.append(was[block] if same else self._write_shard(block, list(entries.values())))
        files = self._write_adapter()
        if before is not None and not (added or changed or removed) and files == before.files:
            return Published(before.version, before.edits, 0, 0, 0)
        after = StoreManifest(
            store=uuid.uuid4().hex if before is None else before.store, version=0,
            folder="" if self.view.manifest is None else self.view.manifest.store, adapter=self.adapter,
            settings=self.settings, files=files, memories=self.memories, edits=len(self.contents),
            highest_id=max([highest, self.view.highest_id, *self.contents]), shards=tuple(shards),
            shard_edits=each, time=timestamp(), library=__version__,
        )  # fmt: skip
        made = commit(self.place, before, after)
        forget_old(self.place, made.version)
        return Published(made.version, made.edits, added, changed, removed)

    def _write_edit(
        self, reader: _FolderRows, number: int, kept: Kept, mark: int, old: Entry | None, taken: bool
    ) -> Entry:
        rows = reader.edit(number, kept.source)
        data = edit_bytes(number, rows, kept.record)
        digest = hashlib.sha256(data).hexdigest()
        version = 1 if old is None else old.version + 1
        while True:
            # A number that was used before, or a publication that was stopped: the file may be there already.
            try:
                self.place.create(edit_name(number, version), data)
                break
            except FileExistsError:
                if hashlib.sha256(self.place.read(edit_name(number, version))).hexdigest() == digest:
                    break
                version += 1
        gate = rows[self.memories[0]][1]
        ends = 0.0 if kept.record.get("disabled") else expires_at(kept.record)
        return Entry(
            number, version, gate["key"][0], float(gate["radius"]), len(data), digest,
            float("inf") if ends is None else ends, mark,
        )  # fmt: skip

    def _write_shard(self, block: int, entries: list[Entry]) -> Shard:
        data = shard_bytes(self.memories[0], entries)
        digest = hashlib.sha256(data).hexdigest()
        file = f"{CODEBOOK}/{block:08d}-{digest[:16]}.safetensors"
        self._create(file, data)
        return Shard(block, file, len(data), digest, len(entries))

    def _create(self, file: str, data: bytes) -> None:
        """Write a file whose name says what is in it. One that is damaged is written anew."""
        try:
            self.place.create(file, data)
        except FileExistsError:
            if self.place.read(file) != data:
                self.place.replace(file, data)

    def _write_adapter(self) -> dict[str, dict[str, Any]]:
        """PEFT's two files of the adapter without edits."""
        state = {}
        with safe_open(str(self.view.own_file(self.adapter, WEIGHTS)), framework="pt") as own:
            tables = {f"{memory}." for memory in self.memories}
            for name in own.keys():
                edits = any(name.startswith(table) for table in tables)
                state[name] = own.get_slice(name)[:0].clone() if edits else own.get_tensor(name)
        empty = {"edits": 0, "records": 0, "tokens": 0}
        layers = [m.rpartition(".")[0].removeprefix("base_model.model.") for m in self.memories]
        settings = {**self.settings, "memory_sizes": {layer: empty for layer in layers}}
        contents = {
            CONFIG: json.dumps(settings, indent=2, sort_keys=True).encode(),
            WEIGHTS: safetensors.torch.save(state, {"format": "pt"}),
        }
        digests = {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()}
        folder = hashlib.sha256("".join(sorted(digests.values())).encode()).hexdigest()[:16]
        files = {}
        for name, data in contents.items():
            at = f"{ADAPTERS}/{folder}/{name}"
            self._create(at, data)
            files[name] = {"at": at, "bytes": len(data), "sha256": digests[name]}
        return files


def _one_adapter(view: View) -> str:
    holding = [name for name, edits in view.contents.items() if edits]
    if len(holding) > 1:
        raise ValueError(
            f"folder={str(view.folder)!r} holds edits in {len(holding)} adapters ({', '.join(holding)}), and "
            "a store has one, because a request is routed once. Keep what the first could not write (its "
            "fallback) in a folder and a store of its own."
        )
    return holding[0] if holding else next(iter(view.adapters))


class _FolderRows:
    """The rows of a folder's edits; the file that was read last stays open."""

    def __init__(self, view: View, adapter: str, memories: list[str]):
        self._view, self._adapter, self._memories = view, adapter, memories
        self._source: int | None = None
        self._rows: dict[str, Rows] = {}

    def edit(self, number: int, source: int) -> dict[str, tuple[int, dict[str, Tensor]]]:
        """Memory to how many tokens one edit has there, and its rows of the tables."""
        if source != self._source:
            own = source == 0
            file = self._view.own_file(self._adapter, WEIGHTS) if own else self._view.segment(source)
            state = safetensors.torch.load_file(str(file))  # mapped: only what is used is read
            prefix = "" if own else f"{self._adapter}:"
            self._rows = {memory: Rows(state, prefix + memory) for memory in self._memories}
            self._source = source
        found = {}
        for memory, rows in self._rows.items():
            row = rows.row[number]
            found[memory] = (rows.lengths[row], rows.slices(row, row + 1))
        return found


def edit_bytes(
    number: int, rows: Mapping[str, tuple[int, Mapping[str, Tensor]]], record: Mapping[str, Any]
) -> bytes:
    """The file of one edit: an adapter's own file with this edit alone in it, weights aside."""
    tensors: dict[str, Tensor] = {}
    for memory, (tokens, tables) in rows.items():
        tensors[f"{memory}.{IDS}"] = torch.tensor([number])
        tensors[f"{memory}.{LENGTHS}"] = torch.tensor([tokens])
        tensors |= {f"{memory}.{name}": table.contiguous() for name, table in tables.items()}
    tensors[f"{next(iter(rows))}.{RECORDS}"] = records_tensor([record])
    return safetensors.torch.save(tensors, {"format": "pt"})
