"""Saving and loading edits so that a crash, a full disk or a wrong folder loses nothing.

The files are PEFT's (`adapter_config.json`, `adapter_model.safetensors`), so that `PeftModel.from_pretrained` reads
them; they are written beside the old ones and put in their place only when they are whole.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from peft import PeftModel
from torch import nn

from .config import check_adapter_file

_CONFIG = "adapter_config.json"


def save_edits(model: PeftModel, folder: str | os.PathLike[str]) -> None:
    """Save a model's edit adapters with their edits; the folder holds the old edits or the new ones, whole.

    Args:
        model: from `inject_dualedit`, `inject_balancedit` or `load_edits`.
        folder: made if it does not exist; other files in it are left alone.

    Raises:
        ValueError: not a PeftModel, or `folder` is a file.
        OSError: the disk refused; the folder is as it was.
    """
    if not isinstance(model, PeftModel):
        raise ValueError(f"model is a {type(model).__name__}: pass the PeftModel that inject_dualedit returned.")
    target = Path(folder)
    if target.exists() and not target.is_dir():
        raise ValueError(f"folder={str(target)!r} is a file: pass a folder.")
    target.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        model.save_pretrained(made)
        _sync(made)
        _swap(made, target)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _sync(folder: Path) -> None:
    for file in folder.rglob("*"):
        if file.is_file():
            with open(file, "rb") as opened:
                os.fsync(opened.fileno())


def _swap(made: Path, target: Path) -> None:
    """Move the new files over the old ones: the weights first, so that a config never announces missing edits."""
    files = sorted((f for f in made.rglob("*") if f.is_file()), key=lambda f: (f.name == _CONFIG, str(f)))
    for file in files:
        place = target / file.relative_to(made)
        place.parent.mkdir(parents=True, exist_ok=True)
        os.replace(file, place)


def load_edits(base: nn.Module, folder: str | os.PathLike[str], is_trainable: bool = False) -> PeftModel:
    """Put saved edits on a base model: `PeftModel.from_pretrained` with the folder checked first.

    Raises:
        ValueError: no such folder, no adapter in it, a file cut short, or edits of another base model. The base
            model is left as it was.
    """
    path = Path(folder)
    if not (path / _CONFIG).is_file():
        what = "holds no adapter_config.json" if path.is_dir() else "does not exist"
        raise ValueError(f"folder={str(path)!r} {what}: pass a folder that save_edits or save_pretrained has written.")
    if not (path / "adapter_model.safetensors").is_file():
        raise ValueError(f"folder={str(path)!r} holds no adapter_model.safetensors: its edits are missing.")
    check_adapter_file(path)
    return PeftModel.from_pretrained(base, str(path), is_trainable=is_trainable)
