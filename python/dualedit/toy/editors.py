"""The embedded model with an editor on it, ready to edit: what the demo and the command line start from."""

from __future__ import annotations

import json
import os
from pathlib import Path

from dualedit.editor import Editor
from dualedit.storage import load_edits

from .model import WEIGHTS as VLM
from .model import load_embedded

METHODS = ("dualedit", "balancedit")
EDITORS = Path(__file__).parent / "weights" / "editors"


def editor_settings(weights: str | os.PathLike | None = None) -> dict:
    """The calibrated settings that `train_editors` wrote (alpha, layers, figures on training facts)."""
    file = Path(weights or EDITORS) / "editors.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"{os.fspath(file)!r} is missing: train the editors with python -m recipes.toy.train_editors"
        )
    return json.loads(file.read_text())


def load_editor(
    method: str = "dualedit",
    vlm: str | os.PathLike | None = None,
    weights: str | os.PathLike | None = None,
    fallback: bool = True,
) -> Editor:
    """The embedded model with one editor, without edits.

    Args:
        method: "dualedit" (shipped adapters, calibrated threshold) or "balancedit" (fitted key, calibrated
            alpha).
        vlm, weights: folders of the model and of the editors, as `train_vlm` and `train_editors` write them;
            those shipped with the package if not given.
        fallback: whether what DualEdit's adapters cannot write may go to a BalancEdit adapter, where the
            folder has one. It is put on the model when an edit first needs it.

    Raises:
        ValueError: an unknown method.
        FileNotFoundError: a folder without a model or editors.
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r} is unknown: choose one of {METHODS}.")
    editor_settings(weights)  # says what to do where there are no editors
    base, processor = load_embedded(vlm)
    folder = Path(weights or EDITORS)
    second = fallback_of(method, folder, fallback)
    return Editor(load_edits(base, folder / method), processor, fallback=second)


def fallback_of(method: str, weights: Path = EDITORS, allowed: bool = True) -> Path | None:
    """The folder of the adapter that takes what a method of the embedded model cannot write, or None."""
    folder = weights / "balancedit"
    return folder if allowed and method == "dualedit" and folder.is_dir() else None


__all__ = ["EDITORS", "METHODS", "VLM", "editor_settings", "fallback_of", "load_editor"]
