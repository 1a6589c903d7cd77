"""VisEdit (Chen et al. 2025): an adapter that writes an edit into the image positions of one layer, no gate.

It is this library's DualEdit adapter for image positions, with a threshold of -1, which every question
passes. Text-only questions have no image positions, so they are answered as before. Departures: the published
adapter also weighs image positions by an "influence mapper", and its evaluation binds a question to one edit;
here the stored edit that is nearest at the last prompt token is taken.

The adapter should have been trained by itself (`text_layer=None`). Of one that was trained for text and image
positions together, the image half is taken and the row says so: it was never asked to do the work alone.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors import safe_open
from torch import nn

from ..data import EditSample
from ..editor import Editor
from ..models.architectures import check_fingerprint
from ..tuners import DualEditConfig, inject_dualedit
from ..tuners.adapter import active_adapter
from ..tuners.model import saved_config
from .baseline import Baseline
from .settings import VisEditSettings


def inject_image_adapter(model: nn.Module, folder: str | os.PathLike[str]) -> tuple[PeftModel, bool]:
    """The model with the image adapter of a saved DualEdit adapter, frozen, and whether it was trained alone.

    Raises:
        ValueError: no adapter in the folder, or one that edits no image positions.
    """
    remedy = "Train DualEdit with text_layer=None and pass VisEditSettings(adapters=FOLDER)"
    file = Path(folder) / "adapter_model.safetensors"
    if not os.fspath(folder) or not file.is_file():
        raise ValueError(
            f"adapters={os.fspath(folder)!r} holds no adapter, and VisEdit's has to be trained. {remedy}."
        )
    config = saved_config(folder, DualEditConfig)
    if config.vis_layer is None:
        raise ValueError(f"adapters={os.fspath(folder)!r} edits no image positions. {remedy}.")
    check_fingerprint(model, config.base_fingerprint)
    peft_model = inject_dualedit(
        model, text_layer=None, vis_layer=config.vis_layer, mid_dim=config.mid_dim,
        num_heads=config.num_heads, threshold=-1.0, norm_eps=config.norm_eps,
        image_token_ids=config.image_token_ids,
    )  # fmt: skip
    adapter = active_adapter(peft_model)
    name = adapter.name
    (layer_name, layer), *_ = adapter.layers.items()
    marker = f"{layer_name}.dualedit_adapter.vision."
    with safe_open(str(file), framework="pt") as tensors:
        # Cloned: tensors mapped from a file can be unaligned, and then the last bit of a product differs.
        found = {
            key.partition(marker)[2]: tensors.get_tensor(key).clone()
            for key in tensors.keys()
            if marker in key
        }
    layer.dualedit_adapter[name]["vision"].load_state_dict(found)
    return peft_model.eval().requires_grad_(False), config.text_layer is None


class VisEdit(Baseline):
    """A trained image adapter behind an open gate.

    The model stays wrapped after `reset` (which leaves its bits as they were); `method.editor.model.unload()`
    unwraps it.

    Raises:
        ValueError: no adapter in the folder, or one that edits no image positions.
    """

    def __init__(self, model: nn.Module, processor: Any, template: str | None, settings: VisEditSettings):
        super().__init__(model, processor, template)
        self.model, alone = inject_image_adapter(self.model, settings.adapters)
        self.editor = Editor(self.model, processor, template)
        self.name = "visedit" if alone else "visedit (image half of dualedit)"

    def edit(self, sample: EditSample) -> None:
        """Store an edit: one forward. Raises ValueError where it has no image."""
        request = sample.request
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The edit answers everything")  # it has no gate
            self.editor.edit(request.image, request.prompt, request.target, keep_failed=True)

    def reset(self) -> None:
        """Remove every edit."""
        for edit in self.editor.edits:
            self.editor.remove(edit.id)

    @contextmanager
    def unedited(self) -> Iterator[None]:
        """The adapter is off inside."""
        try:
            with self.model.disable_adapter():
                yield
        finally:
            self.model.requires_grad_(False)  # peft makes an adapter that it enables trainable

    def memory_bytes(self) -> int:
        """Keys, values and lookup keys of the stored edits."""
        group = active_adapter(self.model).group
        return sum(
            table.nbytes for memory in group.memories.values() for table in memory.snapshot().tables.values()
        )
