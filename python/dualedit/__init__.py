"""Correct what a vision-language model knows, one fact at a time, without retraining it.

    model = inject_dualedit(model, text_layer=16, vis_layer=19)
    editor = Editor(model, processor)
    editor.edit(image, "What brand is this computer?", "lenovo")
    model.generate(...)
    save_edits(model, "edits/")

Importing this package registers both editors with PEFT, so that `PeftModel.from_pretrained` knows saved
edits: at once where PEFT is imported already, or else together with PEFT. The names below are imported when
they are first used; what does without PEFT and torch, such as `dualedit list`, need not wait for them.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

from .version import __version__  # noqa: F401 (dualedit.__version__)
from .when_imported import when_imported

if TYPE_CHECKING:
    from .checking import EditFailed
    from .data import EditRequest, EditSample, Probe
    from .editing import Edit, Lookup, add_edit, list_edits, lookup, remove_edit
    from .editor import Editor, Explanation
    from .overlaps import Policies
    from .runtime.context import explicit_masks
    from .storage import load_edits, refresh_edits, save_edits
    from .tuners import BalancEditConfig, DualEditConfig, inject_balancedit, inject_dualedit
    from .tuners.adapters import disabled, lifted, remove_adapter

_MODULES = {
    "checking": ("EditFailed",),
    "data": ("EditRequest", "EditSample", "Probe"),
    "editing": ("Edit", "Lookup", "add_edit", "list_edits", "lookup", "remove_edit"),
    "editor": ("Editor", "Explanation"),
    "overlaps": ("Policies",),
    "runtime.context": ("explicit_masks",),
    "storage": ("load_edits", "refresh_edits", "save_edits"),
    "tuners": ("BalancEditConfig", "DualEditConfig", "inject_balancedit", "inject_dualedit"),
    "tuners.adapters": ("disabled", "lifted", "remove_adapter"),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "BalancEditConfig",
    "DualEditConfig",
    "Edit",
    "EditFailed",
    "EditRequest",
    "EditSample",
    "Editor",
    "Explanation",
    "Lookup",
    "Policies",
    "Probe",
    "add_edit",
    "disabled",
    "explicit_masks",
    "inject_balancedit",
    "inject_dualedit",
    "lifted",
    "list_edits",
    "load_edits",
    "lookup",
    "refresh_edits",
    "remove_adapter",
    "remove_edit",
    "save_edits",
]


if not TYPE_CHECKING:  # a type checker takes the imports above, and knows what is not there

    def __getattr__(name: str) -> Any:
        if name in _MODULE_OF:
            value = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
            globals()[name] = value
            return value
        if not name.startswith("_") and importlib.util.find_spec(f"{__name__}.{name}") is not None:
            return importlib.import_module(f"{__name__}.{name}")  # dualedit.storage, dualedit.editing, ...
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _register() -> None:
    importlib.import_module(f"{__name__}.tuners")


when_imported("peft", _register)
