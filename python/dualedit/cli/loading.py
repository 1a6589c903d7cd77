"""From command line options to a model and an editor."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import first_line, options
from .hub import local_folder
from .saved_folder import NAMES, is_saved, read_config
from .terminal import use_few_threads

if TYPE_CHECKING:
    from ..editor import Editor

METHODS = tuple(name.lower() for name in NAMES)
SMOL, EMBEDDED = "smol", ("toy", "embedded")
FALLBACKS = ("balancedit", "none")


@dataclass(frozen=True)
class Start:
    """What the first edit in a folder begins with.

    Attributes:
        method: "dualedit", "balancedit", or None for what suits the rest.
        adapter: folder of trained DualEdit adapters, for a model of the user's own.
        layer: linear layer for BalancEdit, for a model of the user's own.
        fallback: "balancedit" for what DualEdit cannot write, or "none".
        budget: how much memory the values of saved edits may take; None: all.
    """

    method: str | None = None
    adapter: Path | None = None
    layer: str | None = None
    fallback: str = "balancedit"
    budget: str | None = None

    def check(self) -> None:
        """Refuse an unknown method. Raises ValueError."""
        if self.fallback not in FALLBACKS:
            raise ValueError(f"--fallback {self.fallback}: choose one of {', '.join(FALLBACKS)}.")
        if self.method is not None and self.method not in METHODS:
            raise ValueError(f"--method {self.method}: choose one of {', '.join(METHODS)}.")


def is_smol(model: Path | None) -> bool:
    """Whether `--model` means what `dualedit fetch smol` brings: a model's folder of that name goes first."""
    return model is not None and str(model) == SMOL and not (model / "config.json").is_file()


def own_model(model: Path | None) -> Path | None:
    """`--model` without the embedded model's names, which stand for None; a folder of such a name goes
    first."""
    if model is None or str(model) not in EMBEDDED or (model / "config.json").is_file():
        return model
    return None


def model_for(folder: Path, model: Path | None) -> Path | None:
    """The model that a command on a folder of edits is about.

    Args:
        model: `--model`; None for the model that the folder's edits belong to, and where it holds none for
            `smol` if it has been fetched.

    Returns:
        as `load_base` takes it: None is the embedded model.
    """
    if model is not None:
        return own_model(model)
    if is_saved(folder):
        return Path(SMOL) if read_config(folder).get("base_model_name_or_path") == SMOL else None
    from ..smol import is_fetched

    return Path(SMOL) if is_fetched() else None


def load_base(model: Path | None, device: str | None = None) -> tuple[Any, Any]:
    """The base model in eval mode and its processor: the embedded one, the fetched `smol`, or a local Hugging
    Face folder.

    Args:
        device: where a folder's model goes; None takes the GPU if there is one.

    Raises:
        ValueError: no such folder, nothing that transformers loads as a vision-language model, or `smol`
            where it has not been fetched.
    """
    import torch

    if model is None:
        from ..toy.model import load_embedded

        use_few_threads()
        return load_embedded()
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if is_smol(model):
        from ..smol import load_smol

        loaded, processor = load_smol()
        return loaded.to(device), processor
    model = local_folder(model)
    if not (model / "config.json").is_file():
        what = "holds no config.json" if model.is_dir() else "is no folder"
        raise ValueError(f"--model {model} {what}: pass a folder with a Hugging Face vision-language model.")
    from transformers import AutoModelForImageTextToText, AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(model, local_files_only=True)
        loaded = AutoModelForImageTextToText.from_pretrained(model, dtype="auto", local_files_only=True)
    except (ValueError, OSError, ImportError, KeyError, AttributeError) as error:
        raise ValueError(f"--model {model} cannot be loaded: {first_line(error)}") from error
    return loaded.eval().to(device), processor


def open_editor(folder: Path, model: Path | None, start: Start = Start()) -> Editor:
    """The editor of a saved folder.

    Args:
        start: says whether and where a fallback may come beside the adapter, and the edits' budget.

    Raises:
        ValueError: no edits there, damaged files, or edits of another base model.
    """
    from ..editor import Editor
    from ..storage import load_edits

    kind = read_config(folder)["peft_type"]
    model = model_for(folder, model)
    base, processor = load_base(model)
    try:
        loaded = load_edits(base, folder, budget=start.budget)
        named = loaded.peft_config["default"].fallback
        return Editor(loaded, processor, fallback=named or _fallback(model, kind, start))
    except json.JSONDecodeError as error:
        raise ValueError(f"{folder} is damaged ({error}): restore it from a copy.") from error
    except (KeyError, TypeError, RuntimeError) as error:
        raise ValueError(
            f"{folder} cannot be read as edits ({type(error).__name__}: {first_line(error)})."
        ) from error


def open_or_start(folder: Path, model: Path | None, start: Start) -> Editor:
    """The editor of a saved folder, or a new one where there is none.

    Raises:
        ValueError: as `open_editor`, or options that do not fit together or do not fit the folder.
    """
    start.check()
    if not is_saved(folder):
        return start_editor(model_for(folder, model), start)
    kind = read_config(folder)["peft_type"]
    used = NAMES.get(kind, kind)
    asked = start.method or ("dualedit" if start.adapter else "balancedit" if start.layer else used.lower())
    if asked != used.lower():
        wanted = NAMES[asked.upper()]
        raise ValueError(f"{folder} holds {used} edits: pass another --edits folder for {wanted}.")
    return open_editor(folder, model, start)


def _fallback(model: Path | None, kind: str, start: Start) -> Any:
    """What takes the answers that DualEdit cannot write, or None."""
    if start.fallback == "none" or kind != "DUALEDIT":
        return None
    if model is None:
        from ..toy.editors import fallback_of

        return fallback_of(kind.lower())
    if is_smol(model) and start.layer is None:
        from ..smol.editors import fallback_of as fallback_of_smol

        return fallback_of_smol(kind.lower())
    from ..tuners import BalancEditConfig

    return None if start.layer is None else BalancEditConfig(layer=start.layer)


def start_editor(model: Path | None, start: Start) -> Editor:
    """A new editor without edits. Raises ValueError for options that do not fit together."""
    from ..editor import Editor
    from ..storage import load_edits
    from ..tuners import inject_balancedit

    if model is None:
        if start.adapter or start.layer:
            raise ValueError("--adapter and --layer are for a model of your own: pass --model too.")
        from ..toy.editors import load_editor

        use_few_threads()
        return load_editor(start.method or "dualedit", fallback=start.fallback != "none")
    if is_smol(model) and not (start.adapter or start.layer):
        from ..smol.editors import load_editor as load_smol_editor

        return load_smol_editor(start.method or "dualedit", fallback=start.fallback != "none")
    if start.method == "balancedit" or (start.method is None and start.layer and not start.adapter):
        if start.adapter or not start.layer:
            raise ValueError("--method balancedit takes --layer (as layers.20.mlp.up_proj) and no --adapter.")
        base, processor = load_base(model)
        return Editor(inject_balancedit(base, layer=start.layer), processor)
    if not start.adapter:
        raise ValueError(
            "DualEdit's adapters have to be trained for a model first: pass them with --adapter DIR, or use "
            "--method balancedit --layer NAME, which needs no training."
        )
    read_config(start.adapter, "--adapter")
    base, processor = load_base(model)
    with options(folder="--adapter"):
        loaded = load_edits(base, start.adapter)
        return Editor(loaded, processor, fallback=_fallback(model, "DUALEDIT", start))
