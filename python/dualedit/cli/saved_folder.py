"""A folder of saved edits without its base model: what is in it, taking one out, one writer at a time.

Works on the files alone, without torch: listing and removing would otherwise wait for it most of their time.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..files import replacing
from .tensor_file import TensorFile

_CONFIG, _WEIGHTS, _CARD = "adapter_config.json", "adapter_model.safetensors", "README.md"
_IDS = ".edit_ids"  # how a memory's table of numbers ends; its other tables begin alike
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

    @property
    def check(self) -> str:
        """What came of asking it back, in words."""
        if self.failed:
            return f"FAILED, answers {self.answer!r}"
        return "" if self.answer is None else "ok"


@dataclass(frozen=True)
class Saved:
    """What a saved folder holds.

    Attributes:
        method: "DualEdit", "BalancEdit" or the PEFT type of another method.
        base: the folder of the base model that the edits were made on, as PEFT noted it.
        edits: oldest first, those of the fallback beside the adapter among them.
    """

    method: str
    base: str
    edits: list[SavedEdit]


def is_saved(folder: Path, option: str = "--edits") -> bool:
    """Whether a folder holds saved edits, whole or damaged. Raises ValueError if it is a file."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{option} {folder} is a file: pass a folder.")
    return (folder / _CONFIG).exists() or (folder / _WEIGHTS).exists()


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
    file = folder / _CONFIG
    if not file.is_file():
        raise ValueError(f"{folder} holds no {_CONFIG}: the folder is damaged, restore it from a copy.")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        known = config["peft_type"] in NAMES or "memory_sizes" in config
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is damaged ({error}): restore it from a copy.") from error
    if not known:
        raise ValueError(f"{folder} holds a {config['peft_type']} adapter, not edits: pass another folder.")
    return config


def read_saved(folder: Path) -> Saved:
    """What a folder holds.

    Raises:
        ValueError: no edits there, or files that are damaged.
    """
    config = read_config(folder)
    method = NAMES.get(config["peft_type"], config["peft_type"])
    edits = _edits(folder, config, method)
    beside = _fallback(folder, config)
    if beside is not None:
        more = read_config(beside)
        edits += _edits(beside, more, NAMES.get(more["peft_type"], more["peft_type"]))
    edits.sort(key=lambda edit: edit.id)
    return Saved(method, config.get("base_model_name_or_path") or "", edits)


def _fallback(folder: Path, config: dict) -> Path | None:
    """The folder of the adapter that holds what this one could not write, or None."""
    name = config.get("fallback")
    if name is None:
        return None
    if not isinstance(name, str) or Path(name).name != name or name in ("", "..", "."):
        raise ValueError(f"{folder / _CONFIG} is damaged (fallback={name!r}): restore it from a copy.")
    return folder / name


def _edits(folder: Path, config: dict, method: str) -> list[SavedEdit]:
    with _tensors(folder) as tensors:
        gate = next(name for name in tensors.shapes if name.endswith(".radius")).removesuffix(".radius")
        ids = tensors.numbers(gate + _IDS)
        records = _records(tensors, gate, ids)
        # NaN stands for the threshold of the config (DualEdit).
        threshold = 1.0 - config.get("threshold", math.nan)
        radii = [threshold if math.isnan(r) else r for r in tensors.numbers(gate + ".radius")]
        return [
            SavedEdit(
                i, r.get("prompt", ""), r.get("target", ""), radius, r.get("created", ""), method,
                bool(r.get("failed", False)), r.get("answer"),
            )
            for i, r, radius in zip(ids, records, radii, strict=True)
        ]  # fmt: skip


def remove_saved(folder: Path, edit_id: int) -> int:
    """Take one edit out of a folder; the folder holds the old edits or the new ones, whole.

    Returns:
        how many edits are left.

    Raises:
        ValueError: no such edit (names the stored ones), no edits there, or files that are damaged.
        OSError: the disk refused; the folder is as it was.
    """
    saved = read_saved(folder)
    if edit_id not in (edit.id for edit in saved.edits):
        stored = ", ".join(str(edit.id) for edit in saved.edits) or "none"
        raise _NoEdit(f"no edit {edit_id} in {folder}; stored: {stored}.")
    for place in filter(None, (folder, _fallback(folder, read_config(folder)))):
        config = read_config(place)
        if edit_id in (edit.id for edit in _edits(place, config, "")):
            _remove(place, config, edit_id)
    return len(saved.edits) - 1


def _remove(folder: Path, config: dict, edit_id: int) -> None:
    """Take an edit out of the files of one adapter."""
    with _tensors(folder) as tensors, replacing(folder, last=_CONFIG) as made:
        cuts: dict[str, tuple[int, int]] = {}
        texts: dict[str, bytes] = {}
        left = 0
        for memory in (name.removesuffix(_IDS) for name in tensors.shapes if name.endswith(_IDS)):
            ids, lengths = tensors.numbers(memory + _IDS), tensors.numbers(memory + ".edit_lengths")
            row, left = ids.index(edit_id), len(ids) - 1
            first = sum(lengths[:row])
            records = _records(tensors, memory, ids)
            del records[row]
            name = memory + ".record_bytes"
            texts[name] = json.dumps(records, ensure_ascii=False).encode() if records else b""
            for table in tensors.shapes:
                if table.startswith(memory + ".") and table != name:
                    # A table has a row for each edit or for each of its tokens. Where there are as many
                    # tokens as edits, each edit has one, and both come to the same.
                    rows = tensors.shapes[table][0]
                    if rows not in (len(ids), sum(lengths)):
                        raise ValueError(f"{table} has {rows} rows for {len(ids)} edits")
                    cuts[table] = (row, row + 1) if rows == len(ids) else (first, first + lengths[row])
            sizes = {"edits": left, "tokens": sum(lengths) - lengths[row], "records": len(texts[name])}
            _shrink(config, memory, sizes)
        tensors.write_without(made / _WEIGHTS, cuts, texts)
        (made / _CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
        if (folder / _CARD).is_file():
            card = (folder / _CARD).read_text(encoding="utf-8")
            plural = "" if left == 1 else "s"
            card = re.sub(r"( adapter with )\d+( stored edit)s?", rf"\g<1>{left}\g<2>{plural}", card)
            (made / _CARD).write_text(card, encoding="utf-8")


class _NoEdit(ValueError):
    """An edit that is not stored; no fault of the file."""


@contextmanager
def _tensors(folder: Path) -> Iterator[TensorFile]:
    """The weights of a folder, opened. What goes wrong with their contents is said to be damage."""
    file = folder / _WEIGHTS
    if not file.is_file():
        raise ValueError(f"{folder} holds no {_WEIGHTS}: the folder is damaged, restore it from a copy.")
    try:
        with TensorFile(file) as tensors:
            yield tensors
    except _NoEdit:
        raise
    except (StopIteration, KeyError, IndexError, ValueError) as error:
        raise ValueError(f"{file} is cut short or damaged ({error}): restore it from a copy.") from error


def _records(tensors: TensorFile, memory: str, ids: list[int]) -> list[dict]:
    """What was noted about each edit."""
    text = tensors.data(memory + ".record_bytes").decode()
    records = json.loads(text) if text else [{} for _ in ids]
    if len(records) != len(ids):
        raise ValueError(f"{len(ids)} edits with {len(records)} records")
    return records


def _shrink(config: dict, memory: str, sizes: dict[str, int]) -> None:
    """Note the new sizes of a memory in the config, under its layer's name."""
    layer = memory.rpartition(".")[0].removeprefix("base_model.model.")
    noted = (config.get("memory_sizes") or {}).get(layer, {})
    noted.update({name: size for name, size in sizes.items() if name in noted})


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Hold the folder from reading to writing: of two commands at once, neither loses the other's edit."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:  # not a Unix
        yield
        return
    place = os.open(folder.parent, os.O_RDONLY)
    try:
        try:
            fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"Waiting for another dualedit that writes in {folder.parent} ...", file=sys.stderr)
            fcntl.flock(place, fcntl.LOCK_EX)
        yield
    finally:
        os.close(place)
