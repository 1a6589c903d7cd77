"""A folder of saved edits without its base model: what is in it, and changes that need no model.

Works on the files alone, without torch: listing and removing would otherwise wait for it most of their time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..folder import View, Writer, find_folder, read_folder
from ..folder.manifest import CONFIG, WEIGHTS
from ..folder.reading import settings_of
from ..folder.sealing import migrate
from ..folder.verifying import bytes_of, bytes_of_edits
from ..folder.writing import held
from ..records import answers, uid_of

NAMES = {"DUALEDIT": "DualEdit", "BALANCEDIT": "BalancEdit"}


@dataclass(frozen=True)
class SavedEdit:
    """One edit as a saved folder lists it."""

    id: int
    prompt: str
    target: str
    radius: float
    created: str
    method: str = ""
    failed: bool = False
    answer: str | None = None
    uid: str = ""
    author: str = ""
    note: str = ""
    tags: tuple[str, ...] = ()
    expires: str | None = None
    enabled: bool = True
    image_sha256: str | None = None

    @property
    def check(self) -> str:
        """What came of asking it back, and whether it answers at all, in words."""
        if not self.enabled:
            return "off"
        if self.failed:
            return f"FAILED, answers {self.answer!r}"
        return "" if self.answer is None else "ok"

    def as_dict(self) -> dict[str, Any]:
        """Its attributes in a mapping that JSON can hold."""
        return asdict(self) | {"radius": self.radius if math.isfinite(self.radius) else None}


@dataclass(frozen=True)
class Saved:
    """What a saved folder holds.

    Attributes:
        method: "DualEdit", "BalancEdit" or the PEFT type of another method: where edits go first.
        base: the folder of the base model that the edits were made on, as PEFT noted it.
        edits: oldest first, those of the fallback beside the adapter among them.
        bytes: on the disk: "own" files of the adapters, "segments", "journal"; and of the edits' rows:
            "keys", which are in memory wherever they are loaded, and "values", which may have a budget.
        notes: what a writer that was stopped has left, in words.
    """

    method: str
    base: str
    edits: list[SavedEdit]
    bytes: Mapping[str, int] = field(default_factory=dict)
    notes: Sequence[str] = ()


def is_saved(folder: Path, option: str = "--edits") -> bool:
    """Whether a folder holds saved edits, whole or damaged. Raises ValueError if it is a file."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{option} {folder} is a file: pass a folder.")
    return (folder / CONFIG).exists() or (folder / WEIGHTS).exists() or find_folder(folder) is not None


def read_config(folder: Path, option: str = "--edits") -> dict:
    """The adapter's config.

    Args:
        option: by which the folder was passed: --edits, or --adapter for one of trained adapters.

    Raises:
        ValueError: no edits there, or a config that cannot be read.
    """
    if not is_saved(folder, option):
        if option != "--edits":
            what = "holds no adapter" if folder.is_dir() else "is no folder"
            raise ValueError(f"{option} {folder} {what}: pass a folder that 'dualedit train' has written.")
        raise ValueError(f"no edits are saved in {folder}: make one with 'dualedit edit' or pass --edits.")
    found = find_folder(folder)
    file = folder / CONFIG if found is None else read_folder(found[0], False).own_file(found[1], CONFIG)
    if not file.is_file():
        raise ValueError(f"{folder} holds no {CONFIG}: the folder is damaged, restore it from a copy.")
    return _known(file)


def _known(file: Path) -> dict:
    config = settings_of(file)
    kind = config.get("peft_type")
    if not isinstance(kind, str):
        raise ValueError(f"{file} is damaged (peft_type={kind!r}): restore it from a copy.")
    if kind not in NAMES and "memory_sizes" not in config:
        raise ValueError(f"{file.parent} holds a {kind} adapter, not edits: pass another folder.")
    return config


def _view(folder: Path) -> View:
    """A folder's files, and what they make of its edits. Raises ValueError."""
    read_config(folder)
    if not (folder / WEIGHTS).is_file() and find_folder(folder) is None:
        raise ValueError(f"{folder} holds no {WEIGHTS}: the folder is damaged, restore it from a copy.")
    return read_folder(folder)


def read_saved(folder: Path) -> Saved:
    """What a folder holds.

    Raises:
        ValueError: no edits there, or files that are damaged.
    """
    view = _view(folder)
    edits: list[SavedEdit] = []
    configs = {name: _known(view.own_file(name, CONFIG)) for name in view.adapters}
    for name, config in configs.items():
        method = NAMES.get(config["peft_type"], config["peft_type"])
        threshold = config.get("threshold")
        reach = 1.0 - threshold if isinstance(threshold, (int, float)) else math.nan
        for number, kept in view.contents[name].items():
            radius = reach if kept.radius is None else kept.radius
            edits.append(_saved_edit(number, kept.record, radius, method))
    edits.sort(key=lambda edit: edit.id)
    first = next(iter(configs.values()))
    base = first.get("base_model_name_or_path")
    notes = [f"the last commit is not whole ({view.torn} bytes) and is left out"] if view.torn else []
    kind = NAMES.get(first["peft_type"], first["peft_type"])
    sizes = {**bytes_of(view), **bytes_of_edits(view)}
    return Saved(kind, base if isinstance(base, str) else "", edits, sizes, notes)


def _saved_edit(number: int, r: Mapping[str, Any], radius: float, method: str) -> SavedEdit:
    """An edit out of a record, whatever stands in that."""

    def text(name: str) -> str:
        return r[name] if isinstance(r.get(name), str) else ""

    tags = r.get("tags")
    return SavedEdit(
        number, text("prompt"), text("target"), radius, text("created"), method, bool(r.get("failed", False)),
        r["answer"] if isinstance(r.get("answer"), str) else None, uid_of(r, number), text("author"),
        text("note"), tuple(tag for tag in tags if isinstance(tag, str)) if isinstance(tags, list) else (),
        text("expires") or None, answers(r), text("image_sha256") or None,
    )  # fmt: skip


def record_of(folder: Path, edit_id: int) -> dict[str, Any]:
    """All that is noted about a saved edit. Raises ValueError: no such edit, no edits there, damage."""
    view = _view(folder)
    return dict(view.contents[_holder(view, edit_id)][edit_id].record)


def records_of(folder: Path) -> list[tuple[int, Mapping[str, Any]]]:
    """Number and record of each saved edit, oldest first. Raises ValueError."""
    found = [(i, kept.record) for edits in _view(folder).contents.values() for i, kept in edits.items()]
    return sorted(found, key=lambda each: each[0])


def _holder(view: View, edit_id: int) -> str:
    """The adapter that holds an edit. Raises ValueError; names the stored ones."""
    for name, edits in view.contents.items():
        if edit_id in edits:
            return name
    numbers = sorted(i for edits in view.contents.values() for i in edits)
    stored = ", ".join(map(str, numbers[:20])) + (", ..." if len(numbers) > 20 else "")
    raise ValueError(f"no edit {edit_id} in {view.folder}; stored: {stored or 'none'}.")


def remove_saved(folder: Path, edit_id: int) -> int:
    """Take one edit out of a folder.

    Returns:
        how many edits are left.

    Raises:
        ValueError: no such edit (names the stored ones), no edits there, or files that are damaged.
        OSError: the disk refused; the folder is as it was.
    """
    return _commit(folder, edit_id, lambda record: None)


def note_saved(folder: Path, edit_id: int, changed: Mapping[str, Any]) -> None:
    """Change what is noted about a saved edit; None takes a note away. Raises as `remove_saved`."""

    def noted(record: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in {**record, **changed}.items() if value not in (None, "", [])}

    _commit(folder, edit_id, noted)


def _commit(folder: Path, edit_id: int, change: Callable[[Mapping[str, Any]], dict | None]) -> int:
    from ..version import __version__

    _holder(_view(folder), edit_id)
    with held(folder):
        migrate(folder, __version__)  # a folder of version 0.1 gets its journal
        with Writer(folder).open() as writer:
            view = _view(folder)  # records too, as they are now
            name = _holder(view, edit_id)
            before = view.contents[name][edit_id].record
            record = change(before)
            what: dict[str, Any] = {"adapter": name, "id": edit_id}
            if record is None:
                writer.commit([{**what, "op": "remove"}])
            elif record != before:
                writer.commit([{**what, "op": "note", "record": record}])
    return sum(len(edits) for edits in view.contents.values()) - int(record is None)


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Hold the folder from reading to writing: of two commands at once, neither loses the other's edit."""
    with held(folder, timeout=600.0):
        yield
