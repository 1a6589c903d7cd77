"""The retrieval note: the fact of the nearest edit is put in front of the question, if it is near enough.

What a user would try without any of this library's editors: no weight changes, nothing is fitted to an edit.
A question is found by BalancEdit's pooled key (`memory.routing_keys.PooledKey`), which was fitted to training
facts; without a folder that holds one, by the last prompt token's state and the mean image token as they are.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ..memory.routing_keys import PooledKey
from ..models.architectures import find_decoder_layers, hidden_size
from ..models.placement import place_of, to_device
from ..models.prompting import Prompter, open_questions
from ..runtime.partial import leaving
from .baseline import Question
from .layers import decoder_layer, named_module
from .notes import GatedNotes
from .settings import RetrievalSettings
from .states import entering
from .watching import mean_over, watching

_MARK = ".balancedit_adapter."


class QuestionKey:
    """Keys of length 1 of questions, from the frozen model's states.

    Args:
        adapter: folder of a saved BalancEdit adapter with a pooled key, or None for none: then a key is the
            last token's state as it enters `layer` and the mean image token as it enters the decoder, each at
            length 1, side by side.
        layer: decoder layer, without an adapter; None takes the one at two thirds of the depth.

    Raises:
        ValueError: the folder holds no such key.
    """

    def __init__(self, model: nn.Module, adapter: str | os.PathLike[str] | None, layer: int | str | None):
        self.model = model
        self._first = find_decoder_layers(model)[1][0]
        self.pooled: PooledKey | None = None
        if adapter is None:
            number = decoder_layer(model, layer, 2 / 3)
            self.module = find_decoder_layers(model)[1][number]
            return
        where, tensors = _saved_key(Path(adapter))
        name = where.removeprefix("base_model.model.")
        self.module = model.get_submodule(named_module(model, name, "adapter"))
        half, width = tensors["question.map"].shape
        self.pooled = PooledKey(hidden_size(model), 2 * half, state_size=width)
        self.pooled.load_state_dict(tensors)
        self.pooled.requires_grad_(False).to(place_of(self.module)[0])

    @torch.no_grad()
    def __call__(self, prompter: Prompter, questions: Sequence[Question]) -> Tensor:
        """[R, P] float32; the layers above the one that is read do not run."""
        inputs = to_device(prompter.inputs(open_questions(questions)), self.model)
        seen: dict[str, Tensor] = {}

        def at_entry(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            seen["image"] = mean_over(entering(args, kwargs), watch.image)

        def at_gate(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            seen["last"] = entering(args, kwargs)[:, -1].float()  # prompts are padded on the left

        handles = [
            self._first.register_forward_pre_hook(at_entry, with_kwargs=True),
            self.module.register_forward_pre_hook(at_gate, with_kwargs=True),
        ]
        try:
            with watching(self.model) as watch, leaving(self.module, before=True):
                self.model(**inputs, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        if self.pooled is not None:
            return self.pooled(seen["last"], seen["image"])
        halves = [nn.functional.normalize(seen[name], dim=-1) for name in ("last", "image")]
        return nn.functional.normalize(torch.cat(halves, dim=-1), dim=-1)


def _saved_key(folder: Path) -> tuple[str, dict[str, Tensor]]:
    file = folder / "adapter_model.safetensors"
    found: dict[str, Tensor] = {}
    where = ""
    if file.is_file():
        with safe_open(str(file), framework="pt") as tensors:
            for name in tensors.keys():
                before, mark, inside = name.partition(_MARK)
                if mark:
                    where, found[inside] = before, tensors.get_tensor(name).clone()
    if not found:
        raise ValueError(
            f"adapter={os.fspath(folder)!r} holds no pooled key: pass a folder that save_edits wrote of "
            f"BalancEdit with key='pooled', or None."
        )
    return where, found


class Retrieval(GatedNotes):
    """The nearest fact in the prompt, by a gate of one radius for all."""

    name = "retrieval"

    def __init__(self, model: nn.Module, processor: Any, template: str | None, settings: RetrievalSettings):
        super().__init__(model, processor, template)
        self.settings = settings
        self._key = QuestionKey(self.model, settings.adapter, settings.layer)

    def _keys(self, questions: Sequence[Question]) -> Tensor:
        return self._key(self.prompter, questions)
