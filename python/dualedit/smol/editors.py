"""`smol` with an editor on it, ready to edit."""

from __future__ import annotations

from pathlib import Path

from ..editor import Editor
from ..storage import load_edits
from ..tuners import inject_balancedit, inject_dualedit
from .model import load_smol

METHODS = ("dualedit", "balancedit")  # the first one is the default
EDITORS = Path(__file__).parent / "weights" / "editors"
# Chosen on validation concepts drawn by validation artists; see recipes/smol/README.md.
BALANCEDIT = {
    "layer": "layers.21.mlp.up_proj", "key": "pooled", "key_dim": 192, "rank": 8, "learning_rate": 1e-2,
    "max_steps": 60, "stop_probability": 0.99,
}  # fmt: skip
# Where the adapters are was chosen by training each briefly: see docs/pictures.md.
DUALEDIT = {
    "text_layer": 21, "vis_layer": 21, "mid_dim": 512, "num_heads": 8, "key": "pooled", "key_dim": 192,
    "refine_steps": 40,
}  # fmt: skip


def load_editor(method: str = METHODS[0], fallback: bool = True) -> Editor:
    """The fetched model with one editor, without edits.

    Args:
        method: "dualedit" (shipped adapters, calibrated threshold) or "balancedit" (fitted key, calibrated
            alpha).
        fallback: whether what DualEdit's adapters cannot write may go to a BalancEdit adapter. It is put on
            the model when an edit first needs it.

    Raises:
        ValueError: an unknown method, or `smol` is not in the cache.
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r}: choose one of {METHODS}.")
    base, processor = load_smol()
    folder = EDITORS / method
    if (folder / "adapter_config.json").is_file():
        return Editor(load_edits(base, folder), processor, fallback=fallback_of(method) if fallback else None)
    if method == "balancedit":
        return Editor(inject_balancedit(base, **BALANCEDIT), processor)
    return Editor(inject_dualedit(base, **DUALEDIT), processor)


def fallback_of(method: str) -> Path | None:
    """The folder of the adapter that takes what a method cannot write, or None."""
    folder = EDITORS / "balancedit"
    return folder if method == "dualedit" and folder.is_dir() else None
