"""Correct what a vision-language model knows, one fact at a time, without retraining it.

    model = inject_dualedit(model, text_layer=16, vis_layer=19)
    editor = Editor(model, processor)
    editor.edit(image, "What brand is this computer?", "lenovo")
    model.generate(...)
    save_edits(model, "edits/")

Importing this package registers both editors with PEFT, so that `PeftModel.from_pretrained` knows saved
edits.
"""

from .data import EditRequest, EditSample, Probe
from .editing import Edit, Lookup, add_edit, list_edits, lookup, remove_edit
from .editor import Editor, Explanation
from .runtime.context import explicit_masks
from .storage import load_edits, save_edits
from .tuners import BalancEditConfig, DualEditConfig, inject_balancedit, inject_dualedit
from .tuners.adapters import disabled, lifted, remove_adapter

__version__ = "0.1.0"

__all__ = [
    "BalancEditConfig",
    "DualEditConfig",
    "Edit",
    "EditRequest",
    "EditSample",
    "Editor",
    "Explanation",
    "Lookup",
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
    "remove_adapter",
    "remove_edit",
    "save_edits",
]
