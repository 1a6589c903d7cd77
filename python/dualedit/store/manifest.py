"""The manifest of a store: which adapter, which edits, which files; one version after the other."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ..folder import Damaged
from ..folder.journal import is_file_note
from .places import Place

MANIFEST, VERSIONS, EDITS, CODEBOOK, ADAPTERS = "manifest.json", "manifests", "edits", "codebook", "adapters"
FORMAT = 1
KEPT = 16  # versions that are not removed: answers that began with them still read them
_REMEDY = "Publish the folder again (dualedit publish), or restore the store from a copy."


@dataclass(frozen=True)
class Shard:
    """The keys of the edits whose numbers lie in one block of `StoreManifest.shard_edits`.

    Attributes:
        block: number of the block: id // shard_edits.
        file: its name in the store, which has the digest in it and so never gets other contents.
        bytes, sha256: of the file.
        edits: how many are in it.
    """

    block: int
    file: str
    bytes: int
    sha256: str
    edits: int


@dataclass(frozen=True)
class StoreManifest:
    """What a store holds at one version.

    Attributes:
        store: id of the store, kept for life.
        version: counts up from 1, one for each change.
        folder: id of the folder that it is published from ("" for one without a manifest).
        adapter: PEFT's name of the adapter in that folder.
        settings: the adapter's settings (`adapter_config.json`), sizes of memories aside.
        files: "adapter_config.json" and "adapter_model.safetensors" to {"at", "bytes", "sha256"}; PEFT's own
            files, without edits.
        memories: in front of what names the tables of each edited layer begin; the one with the keys first.
        edits: how many edits there are, silent ones included.
        highest_id: of all edits that the store has or has had.
        shards: the codebook, by blocks in ascending order.
        shard_edits: how many numbers a block has.
        time: ISO 8601, UTC.
        library: version of the library that wrote it.
        format: of the store.
    """

    store: str
    version: int
    folder: str
    adapter: str
    settings: dict[str, Any]
    files: dict[str, dict[str, Any]]
    memories: list[str]
    edits: int
    highest_id: int
    shards: tuple[Shard, ...]
    shard_edits: int
    time: str
    library: str
    format: int = field(default=FORMAT)

    def bytes(self) -> bytes:
        """The file's contents."""
        content = asdict(self)
        return json.dumps({**content, "check": _check(content)}, indent=1, sort_keys=True).encode() + b"\n"


def version_name(version: int) -> str:
    """Name of the file of one version."""
    return f"{VERSIONS}/{version:010d}.json"


def edit_name(edit_id: int, version: int) -> str:
    """Name of an edit's file."""
    return f"{EDITS}/{edit_id}-v{version}.safetensors"


def _check(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def parse_manifest(data: bytes, name: str) -> StoreManifest:
    """A manifest's contents.

    Raises:
        Damaged: not what was written. ValueError: a format of the future.
    """
    try:
        content = json.loads(data)
        number = content["format"]
        check = content.pop("check")
        if type(number) is int and number > FORMAT:
            future = f"{name} has format {number}, and this version of dualedit reads up to {FORMAT}."
        else:
            future = ""
            if check != _check(content):
                raise ValueError("its checksum does not fit")
            shards = tuple(Shard(**shard) for shard in content.pop("shards"))
            made = StoreManifest(**content, shards=shards)
            _check_types(made)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Damaged(f"{name} is damaged ({error}). {_REMEDY}") from error
    if future:
        raise ValueError(f"{future} Install a newer version.")
    return made


def _check_types(made: StoreManifest) -> None:
    numbers = [made.version, made.edits, made.highest_id, made.shard_edits - 1]
    numbers += [shard.block for shard in made.shards]
    right = all(type(number) is int and number >= 0 for number in numbers)
    right = right and set(made.files) == {"adapter_config.json", "adapter_model.safetensors"}
    right = right and all(is_file_note(note) and isinstance(note["at"], str) for note in made.files.values())
    right = right and all(is_file_note(asdict(shard)) for shard in made.shards)
    right = right and all(re.fullmatch(rf"{CODEBOOK}/[\w.-]+", s.file) is not None for s in made.shards)
    right = right and isinstance(made.settings, dict) and len(made.memories) > 0
    blocks = [shard.block for shard in made.shards]
    if not right or blocks != sorted(set(blocks)):
        raise ValueError("its entries have other types than were written")


def read_manifest(place: Place) -> StoreManifest | None:
    """The newest version of a store; None where there is no store yet.

    Raises:
        Damaged: the manifest is not what was written. ValueError: a format of the future.
    """
    try:
        data = place.read(MANIFEST)
    except (FileNotFoundError, NotADirectoryError):
        versions = place.names(VERSIONS)
        if not versions:
            return None
        # A first publication that was stopped between its version and the copy of it that readers start at.
        return parse_manifest(place.read(versions[-1]), f"{place}/{versions[-1]}")
    found = parse_manifest(data, f"{place}/{MANIFEST}")
    # A publisher that was stopped there has committed the next one, and not yet said so.
    while place.exists(version_name(found.version + 1)):
        name = version_name(found.version + 1)
        found = parse_manifest(place.read(name), f"{place}/{name}")
    return found


def commit(place: Place, before: StoreManifest | None, after: StoreManifest) -> StoreManifest:
    """Make a version the newest one, if it follows the newest one.

    Its own file is created, which only one of several publishers can do: that is the commit. Then the copy is
    replaced at which readers begin.

    Raises:
        FileExistsError: somebody else has published meanwhile; begin again with their version.
    """
    after = replace(after, version=1 if before is None else before.version + 1)
    data = after.bytes()
    place.create(version_name(after.version), data)
    place.replace(MANIFEST, data)
    return after


def forget_old(place: Place, newest: int) -> None:
    """Remove versions that nobody reads any more, with the shards that they alone name."""
    versions = place.names(VERSIONS)
    old = [name for name in versions if int(name.rpartition("/")[2].removesuffix(".json")) <= newest - KEPT]
    if not old:
        return
    used: set[str] = set()
    for name in versions:
        if name not in old:
            used |= {shard.file for shard in parse_manifest(place.read(name), name).shards}
    gone: set[str] = set()
    for name in old:
        gone |= {shard.file for shard in parse_manifest(place.read(name), name).shards}
    for name in (*old, *sorted(gone - used)):
        place.remove(name)
