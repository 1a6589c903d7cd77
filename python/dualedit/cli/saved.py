"""A folder of saved edits: is there one, what is in it (without its base model), one writer at a time."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
NAMES = {"DUALEDIT": "DualEdit", "BALANCEDIT": "BalancEdit"}


@dataclass(frozen=True)
class SavedEdit:
    """One edit as a saved folder lists it."""

    id: int
    prompt: str
    target: str
    radius: float
    created: str


@dataclass(frozen=True)
class Saved:
    """What a saved folder holds.

    Attributes:
        method: "DualEdit" or "BalancEdit".
        base: the folder of the base model that the edits were made on, as PEFT noted it.
        edits: oldest first.
    """

    method: str
    base: str
    edits: list[SavedEdit]


def is_saved(folder: Path) -> bool:
    """Whether a folder holds saved edits, whole or damaged. Raises ValueError if it is a file."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--edits {folder} is a file: pass a folder.")
    return (folder / _CONFIG).exists() or (folder / _WEIGHTS).exists()


def read_config(folder: Path) -> dict:
    """The adapter's config.

    Raises:
        ValueError: no edits there, or a config that cannot be read.
    """
    if not is_saved(folder):
        raise ValueError(f"no edits are saved in {folder}: make one with 'dualedit edit' or pass --edits.")
    file = folder / _CONFIG
    if not file.is_file():
        raise ValueError(f"{folder} holds no {_CONFIG}: the folder is damaged, restore it from a copy.")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        known = config["peft_type"] in NAMES
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is damaged ({error}): restore it from a copy.") from error
    if not known:
        raise ValueError(f"{folder} holds a {config['peft_type']} adapter, not edits: pass another folder.")
    return config


def read_saved(folder: Path) -> Saved:
    """What a folder holds, read without its base model.

    Raises:
        ValueError: no edits there, or files that are damaged.
    """
    from safetensors import SafetensorError, safe_open

    config = read_config(folder)
    file = folder / _WEIGHTS
    if not file.is_file():
        raise ValueError(f"{folder} holds no {_WEIGHTS}: the folder is damaged, restore it from a copy.")
    try:
        with safe_open(str(file), framework="numpy") as tensors:
            gate = next(name for name in tensors.keys() if name.endswith(".radius")).removesuffix("radius")
            ids = tensors.get_tensor(gate + "edit_ids").tolist()
            text = tensors.get_tensor(gate + "record_bytes").tobytes().decode()
        records = json.loads(text) if text else [{} for _ in ids]
        radii = _radii(file, gate + "radius", config)
        edits = [
            SavedEdit(i, r.get("prompt", ""), r.get("target", ""), radius, r.get("created", ""))
            for i, r, radius in zip(ids, records, radii, strict=True)
        ]
    except (SafetensorError, StopIteration, ValueError) as error:
        raise ValueError(f"{file} is cut short or damaged ({error}): restore it from a copy.") from error
    return Saved(NAMES[config["peft_type"]], config.get("base_model_name_or_path") or "", edits)


def _radii(file: Path, name: str, config: dict) -> list[float]:
    """The stored radii; NaN stands for the threshold of the config (DualEdit)."""
    from safetensors import safe_open

    try:
        with safe_open(str(file), framework="numpy") as tensors:
            radii = tensors.get_tensor(name).tolist()
    except TypeError:  # numpy has no bfloat16; torch takes a second to load
        with safe_open(str(file), framework="pt") as tensors:
            radii = tensors.get_tensor(name).double().tolist()
    return [1.0 - config.get("threshold", math.nan) if math.isnan(radius) else radius for radius in radii]


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
