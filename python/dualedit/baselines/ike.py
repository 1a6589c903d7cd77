"""In-context editing (IKE, Zheng et al. 2023): the model is not changed, it is told.

The stored edits nearest to a question are written in front of it. As published there is no gate: whatever is
asked, some edit is told, so an obedient model answers unrelated questions with it. Demonstrations of how to
use a fact (copy it, recognise it reworded, leave other questions alone) come from training edits where they
are given. Departures: similarity is taken between the model's own states, which see image and question,
where the paper embeds the text with a sentence encoder; demonstrations are text, images being the question's
own (as EasyEdit does).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..models.architectures import find_decoder_layers, resolve_layer
from .baseline import Question
from .notes import Notes
from .settings import IKESettings
from .states import last_states


class IKE(Notes):
    """Retrieval of stored edits, and of demonstrations, into the prompt."""

    name = "ike"

    def __init__(self, model: nn.Module, processor: Any, template: str | None, settings: IKESettings):
        super().__init__(model, processor, template)
        self.settings = settings
        _, layers = find_decoder_layers(self.model)
        layer = len(layers) // 2 if settings.layer is None else settings.layer
        self._layer = self.model.get_submodule(resolve_layer(self.model, layer, "layer"))
        self._shown = self._demonstrations()

    def _keys(self, questions: Sequence[Question]) -> Tensor:
        states = last_states(self.model, self._layer, self.prompter, questions)
        return nn.functional.normalize(states.float(), dim=-1)

    def _demonstrations(self) -> list[tuple[Tensor, str]]:
        """Keys [D] and texts: each training edit is shown copied, reworded or left alone, in turn."""
        shown = []
        for number, sample in enumerate(self.settings.demonstrations):
            request = sample.request
            prompt, answer = request.prompt, request.target
            kept = [probe for probe in sample.locality.get("t_loc", ()) if probe.answer]
            if number % 3 == 1 and sample.rephrases:
                prompt = sample.rephrases[0]
            elif number % 3 == 2 and kept:
                prompt, answer = kept[0].prompt, kept[0].answer
            told = self.settings.fact.format(prompt=request.prompt, target=request.target)
            text = f"{told}{self.settings.question.format(prompt=prompt)} {answer}\n\n"
            shown.append((self._keys([(request.image, request.prompt)])[0], text))
        return shown

    def asked(self, questions: Sequence[Question]) -> list[Question]:
        if self._off or not self._facts:
            return list(questions)
        queries = self._keys(questions)
        nearest = _nearest(queries, [fact.key for fact in self._facts], self.settings.retrieved)
        shown = _nearest(queries, [key for key, _ in self._shown], self.settings.shown)
        asked = []
        for row, (image, prompt) in enumerate(questions):
            told = "".join(
                self.settings.fact.format(prompt=fact.prompt, target=fact.target)
                for fact in (self._facts[i] for i in nearest[row])
            )
            before = "".join(self._shown[i][1] for i in shown[row])
            asked.append((image, before + told + self.settings.question.format(prompt=prompt)))
        return asked


def _nearest(queries: Tensor, keys: Sequence[Tensor], count: int) -> list[list[int]]:
    """For each query the numbers of the most similar keys, the most similar last."""
    if not keys:
        return [[] for _ in queries]
    similar = queries @ torch.stack(list(keys)).T
    # Stable: where two are as similar, the one stored first counts as the nearer.
    order = similar.argsort(dim=1, descending=True, stable=True)[:, :count]
    return [row[::-1] for row in order.tolist()]
