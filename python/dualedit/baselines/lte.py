"""LTE (Jiang et al., ACL 2024): the model learns once to follow notes of edits; notes are retrieved at use.

In the alignment phase the model is trained on questions with the note of an edit in front: to answer with the
edit where it concerns the question, and as before where it does not, with a note and without one. At use the
note of the most similar stored edit stands in front, above a threshold of similarity. Departures: low-rank
adapters of the decoder's linear layers are trained in place of the whole model (the paper has both); one note
is told; similarity is that of the model's own states, which see the picture, in place of a sentence
encoder's. The adapters are on as long as edits are stored, so that questions which no edit concerns are
answered by another model than before.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..models.architectures import find_decoder_layers
from .baseline import Question
from .lessons import Lessons, Passed, rows_of, written_and_kept
from .network_settings import LTESettings
from .notes import GatedNotes
from .retrieval import QuestionKey
from .trained import Trained


class LowRank(nn.Module):
    """What an adapted linear layer adds, for inputs [..., I]."""

    def __init__(self, inputs: int, outputs: int, rank: int, scale: float):
        super().__init__()
        self.down = nn.Parameter(torch.randn(rank, inputs) * inputs**-0.5)
        self.up = nn.Parameter(torch.zeros(outputs, rank))
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * (x @ self.down.T) @ self.up.T


class LTE(GatedNotes, Trained):
    """Adapters that follow notes, and the notes."""

    name = "lte"
    settings: LTESettings

    def _build(self) -> nn.Module:
        model, settings = self.model, self.settings
        self._key = QuestionKey(model, None, settings.layer)
        self._checked = False
        path, _ = find_decoder_layers(model)
        self._linear = {
            name: module
            for name, module in model.named_modules()
            if name.startswith(path + ".") and isinstance(module, nn.Linear)
        }
        if not self._linear:
            raise ValueError(
                f"{path} has no torch.nn.Linear, which LTE adapts: load the model without quantisation."
            )
        return nn.ModuleDict(
            {
                name.replace(".", "-"): LowRank(m.in_features, m.out_features, settings.rank, settings.scale)
                for name, m in self._linear.items()
            }
        )

    def _keys(self, questions: Sequence[Question]) -> Tensor:
        return self._key(self.prompter, questions)

    @contextmanager
    def _adapted(self) -> Iterator[None]:
        handles = []
        for name, module in self._linear.items():
            adapter = self.network[name.replace(".", "-")]

            def add(module: nn.Module, args: tuple, output: Tensor, adapter: LowRank = adapter) -> Tensor:
                return output + adapter(args[0].float()).to(output)

            handles.append(module.register_forward_hook(add))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def training_loss(self, lessons: Lessons, keep_weight: float) -> Tensor:
        model, settings = self.model, self.settings
        plain = Passed(model, rows_of(model, self.prompter, lessons.questions, lessons.answers), 0,
                       check=not self._checked)  # fmt: skip
        self._checked = True
        noted = []
        for (image, prompt), owner in zip(lessons.questions, lessons.owner.tolist(), strict=True):
            request = lessons.samples[owner].request
            told = settings.fact.format(prompt=request.prompt, target=request.target)
            noted.append((image, told + settings.question.format(prompt=prompt)))
        passed = Passed(model, rows_of(model, self.prompter, noted, lessons.answers), 0)
        passed.before = plain.before
        stay = lessons.only(~lessons.change)
        again = Passed(model, rows_of(model, self.prompter, stay.questions, stay.answers), 0)
        with self._adapted():
            written, kept = written_and_kept(passed.logits(), passed, lessons)
            _, alone = written_and_kept(again.logits(), again, stay)
        return written + keep_weight * (kept + alone) / 2

    @contextmanager
    def _applied(self, questions: Sequence[Question] = ()) -> Iterator[None]:
        if self._off or not self._facts:
            yield
        else:
            with self._adapted():
                yield
