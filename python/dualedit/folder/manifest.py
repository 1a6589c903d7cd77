"""The manifest of a folder of edits: which files belong to it, their sizes and digests."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..files import replace_whole, sha256_of
from .journal import Damaged, is_file_note

MANIFEST = "manifest.json"
CONFIG, WEIGHTS, CARD = "adapter_config.json", "adapter_model.safetensors", "README.md"
SEGMENTS = "segments"
FORMAT = 1
_CHECKED = 256 * 2**20  # bytes: larger files are digested by `dualedit verify` alone, not at every opening
_JOURNAL = re.compile(r"journal-\d{6}\.jsonl")
_REMEDY = "Restore it from a copy; if you changed it yourself, let 'dualedit migrate' accept it."


@dataclass(frozen=True)
class Manifest:
    """What a folder holds.

    Attributes:
        store: an id that the folder keeps for life.
        generation: how often its adapters' own files were written; names the journal.
        seq: number of the last commit before this journal.
        highest_id: of the edits stored before this journal, so that no number is used again.
        adapters: adapter's name to its folder inside this one ("" for itself).
        files: path inside the folder to {"bytes", "sha256"} of the adapters' files.
        start: what the journal's first line names as the check of the line before it.
        staged: folder inside this one where these files are until they are moved to their places.
        version: of the library that wrote it.
        format: of the folder.
    """

    store: str
    generation: int
    seq: int
    highest_id: int
    adapters: dict[str, str]
    files: dict[str, dict[str, Any]]
    start: str
    staged: str = ""
    version: str = ""
    format: int = field(default=FORMAT)

    @property
    def journal(self) -> str:
        """Name of the journal's file."""
        return f"journal-{self.generation:06d}.jsonl"

    def place(self, folder: Path, name: str) -> Path:
        """Where one of its files is: where it belongs, or still where it was made."""
        staged = folder / self.staged / name
        return staged if self.staged and staged.is_file() else folder / name


def segment_name(seq: int) -> str:
    """Path of a commit's segment inside the folder."""
    return f"{SEGMENTS}/{seq:08d}.safetensors"


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Put a manifest in the place of the folder's, in one step. Raises OSError."""
    content = asdict(manifest)
    text = json.dumps({**content, "check": _check(content)}, indent=1, sort_keys=True)
    replace_whole(folder / MANIFEST, text.encode() + b"\n")


def _check(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: Path) -> Manifest | None:
    """A folder's manifest; None where it has none, as folders of version 0.1 and of PEFT alone.

    Raises:
        Damaged: a manifest that is not as it was written.
        ValueError: a format of the future.
    """
    file = folder / MANIFEST
    try:
        data = file.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        # An empty journal is that of a first save which was stopped.
        journals = (path for path in folder.glob("journal-*.jsonl") if _JOURNAL.fullmatch(path.name))
        if any(journal.stat().st_size for journal in journals):
            raise Damaged(
                f"{file} is missing, and the folder has a journal. Restore it from a copy, or let 'dualedit "
                "migrate' make it anew."
            ) from None
        return None
    try:
        content = json.loads(data)
        if type(content["format"]) is int and content["format"] > FORMAT:
            raise _Future(
                f"{file} has format {content['format']}, and this version of dualedit reads up to {FORMAT}. "
                "Install a newer version."
            )
        check = content.pop("check")
        if check != _check(content):
            raise ValueError("its checksum does not fit")
        manifest = Manifest(**content)
        _check_types(manifest)
        return manifest
    except _Future:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Damaged(
            f"{file} is damaged ({error}). Restore it from a copy; or, if the other files are whole, let "
            "'dualedit migrate' make it anew."
        ) from error


class _Future(ValueError):
    pass


def _check_types(made: Manifest) -> None:
    numbers = (made.generation, made.seq, made.highest_id, made.format)
    right = all(type(number) is int and number >= 0 for number in numbers) and isinstance(made.store, str)
    right = right and isinstance(made.adapters, dict) and isinstance(made.files, dict)
    right = (
        right
        and isinstance(made.version, str)
        and isinstance(made.start, str)
        and re.fullmatch(r"(\.next-\d{6})?", made.staged) is not None
    )
    right = right and all(is_plain(place) or place == "" for place in made.adapters.values())
    names = {str(Path(place, name)) for place in made.adapters.values() for name in (CONFIG, WEIGHTS)}
    right = right and set(made.files) == names and all(is_file_note(note) for note in made.files.values())
    if not right:
        raise ValueError("its entries have other types than were written")


def is_plain(name: object) -> bool:
    """Whether something is the name of a file or folder, and no path to elsewhere."""
    return (
        isinstance(name, str) and name not in ("", ".", "..") and Path(name).name == name and "\\" not in name
    )


def check_file(path: Path, note: dict[str, Any], full: bool = False) -> None:
    """See that a file is as it was written.

    Args:
        full: digest it however large it is.

    Raises:
        Damaged: another size or digest. FileNotFoundError: it is not there.
    """
    size = path.stat().st_size
    if size != note["bytes"]:
        raise Damaged(
            f"{path} is cut short or damaged: it has {size} bytes, and {note['bytes']} were written. "
            f"{_REMEDY}"
        )
    if (full or size <= _CHECKED) and sha256_of(path) != note["sha256"]:
        raise Damaged(f"{path} is damaged: its contents are not what was written. {_REMEDY}")


def note_of(path: Path) -> dict[str, Any]:
    """Size and digest of a file."""
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
