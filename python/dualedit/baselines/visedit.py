"""VisEdit (Chen et al. 2025): an adapter that writes an edit into the image positions of one layer, no gate.

It is this library's DualEdit adapter with `text_layer=None`, trained by itself, with a threshold of -1, which
every question passes. Text-only questions have no image positions, so they are answered as before.
Departures: the published adapter also weighs image positions by an "influence mapper", and its evaluation
binds a question to one edit; here the stored edit that is nearest at the last prompt token is taken.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..config import DualEditConfig
from ..data import EditSample
from ..editor import Editor
from ..model import active_group
from ..storage import load_edits
from .baseline import Baseline
from .settings import VisEditSettings


class VisEdit(Baseline):
    """A trained image adapter behind an open gate.

    The model stays wrapped after `reset` (which leaves its bits as they were); `method.editor.model.unload()`
    unwraps it.

    Raises:
        ValueError: no folder, or an adapter that edits text, too.
    """

    name = "visedit"

    def __init__(self, model: nn.Module, processor: Any, template: str | None, settings: VisEditSettings):
        super().__init__(model, processor, template)
        if not settings.adapters or not Path(settings.adapters).is_dir():
            raise ValueError(
                f"adapters={str(settings.adapters)!r} is no folder: VisEdit's adapter has to be trained for "
                f"a model. Train DualEdit with text_layer=None and pass VisEditSettings(adapters=FOLDER)."
            )
        peft_model = load_edits(self.model, settings.adapters)
        self.editor = Editor(peft_model, processor, template)
        _, config, _ = active_group(peft_model)
        dual = isinstance(config, DualEditConfig)
        if not dual or config.text_layer is not None or config.vis_layer is None:
            peft_model.unload()
            raise ValueError(
                f"adapters={str(settings.adapters)!r} edits more than image positions: VisEdit takes a "
                f"DualEdit adapter trained with text_layer=None."
            )
        config.threshold = -1.0
        self.model = peft_model
        self.reset()

    def edit(self, sample: EditSample) -> None:
        """Store an edit: one forward. Raises ValueError where it has no image."""
        self.editor.edit(sample.request.image, sample.request.prompt, sample.request.target)

    def reset(self) -> None:
        """Remove every edit."""
        for edit in self.editor.edits:
            self.editor.remove(edit.id)

    def unedited(self) -> AbstractContextManager[None]:
        """The adapter is off inside."""
        return self.model.disable_adapter()

    def _logits(self, inputs: dict[str, Tensor]) -> Tensor:
        # The labels tell where the prompt ends, which is where the nearest edit is looked up.
        return self.model(**inputs, use_cache=False).logits

    def memory_bytes(self) -> int:
        """Keys, values and lookup keys of the stored edits."""
        _, _, group = active_group(self.model)
        snapshots = group.snapshot().values()
        return sum(table.nbytes for snapshot in snapshots for table in snapshot.tables.values())
