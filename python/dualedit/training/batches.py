"""From edits to the batch of a training step: rows of questions, by what is to be computed of them."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..data import EditSample, Probe
from ..models.architectures import IMAGE_MASK
from ..models.images import ImageSource
from ..models.prompting import Prompter
from ..runtime.sequence import describe_prompt
from .losses import IGNORED, KEEP
from .packing import packed_rows
from .parts import Batch, Part
from .questions import Question, questions_of
from .recipe import TERMS


def with_answers(prompter: Prompter, probes: Sequence[Probe], eos: int | None) -> dict[str, Tensor]:
    """Model inputs of questions with their answers behind them, and labels on the answers.

    Prompts are padded on the left and answers on the right, so every answer begins in the same column.
    """
    inputs = prompter.inputs([(p.image, p.prompt) for p in probes])
    answers = [prompter.target_ids(p.image, p.prompt, p.answer or "", eos) for p in probes]
    ids = inputs["input_ids"]
    width = max(len(answer) for answer in answers)
    tail = torch.zeros((len(probes), width), dtype=ids.dtype)
    real = torch.zeros_like(tail)
    for row, answer in enumerate(answers):
        tail[row, : len(answer)] = answer
        real[row, : len(answer)] = 1
    # Token types go on with 0, text, behind the question.
    full = {}
    for name, value in inputs.items():
        per_token = value.shape == ids.shape
        full[name] = torch.cat([value, torch.zeros_like(tail).to(value)], dim=1) if per_token else value
    full["labels"] = torch.cat([torch.full_like(ids, IGNORED), tail.masked_fill(real == 0, IGNORED)], dim=1)
    full["input_ids"] = torch.cat([ids, tail], dim=1)
    full["attention_mask"] = torch.cat([inputs["attention_mask"], real], dim=1)
    return full


@dataclass(frozen=True)
class BatchMaker:
    """Makes the batch of some edits.

    Attributes:
        weights: of the loss's terms; those without one are left out.
        eos: id that ends an answer, or None.
        image_ids: ids of image content.
        pack: read an image once for all questions of an edit about it.
        one_by_one: run rows one by one and name them, so that what the frozen model makes of a row depends on
            the row alone and can be kept; else rows of a kind run together.
    """

    prompter: Prompter
    weights: Mapping[str, float]
    eos: int | None
    image_ids: Sequence[int]
    pack: bool = False
    one_by_one: bool = False

    def __call__(self, samples: Sequence[EditSample], generators: Sequence[torch.Generator]) -> Batch:
        """The questions of some edits, as the parts of a training step.

        Args:
            generators: one for each sample, for the choice of its questions.
        """
        questions: list[Question] = []
        for number, (sample, generator) in enumerate(zip(samples, generators, strict=True)):
            questions += questions_of(sample, number, self.weights, generator)
        return self.of(questions, samples)

    def of(self, questions: Sequence[Question], samples: Sequence[EditSample]) -> Batch:
        """The batch of given questions about some edits; the edits' own ones are among them.

        Args:
            questions: answers go by their places in this list.
        """
        sources = [sample.request.image_source for sample in samples]
        groups: dict[Hashable, list[int]] = {}
        for place, question in enumerate(questions):
            groups.setdefault(self._group(place, question, sources), []).append(place)
        parts = []
        for (kind, *_), places in sorted(groups.items()):
            places = sorted(places, key=lambda place: (questions[place].edit, place))
            parts += self._parts(questions, places, kind == "edit", self.pack)
        if self.one_by_one:
            parts = [replace(part, name=_content(part)) for part in parts]
        terms = torch.tensor([TERMS.index(question.term) for question in questions])
        return Batch(tuple(parts), terms, len(samples))

    def _group(self, place: int, question: Question, sources: Sequence[ImageSource]) -> tuple:
        """Questions of one group run together."""
        source = question.probe.image_source
        packed = self.pack and source is not None and _same(source, sources[question.edit])
        if question.term == "reliability" or packed:
            return "edit", source is not None, question.edit if self.one_by_one else 0
        kind = "keep" if question.term in KEEP else "change"
        return kind, source is not None, place if self.one_by_one else 0

    def _parts(
        self, questions: Sequence[Question], places: Sequence[int], holds_edits: bool, pack: bool
    ) -> list[Part]:
        """One part of the questions at some places; two where they were to be packed and cannot be."""
        rows = [questions[place] for place in places]
        inputs = with_answers(self.prompter, [row.probe for row in rows], self.eos)
        labels = inputs.pop("labels")
        if holds_edits and pack and len(rows) > len({row.edit for row in rows}):
            packed = packed_rows(inputs, labels, places, rows, self.image_ids)
            if packed is not None:
                return [packed]
            edits = [place for place in places if questions[place].term == "reliability"]
            others = [place for place in places if questions[place].term != "reliability"]
            first = self._parts(questions, edits, True, False)
            return first + self._parts(questions, others, False, False)
        ids, attended = inputs["input_ids"], inputs["attention_mask"]
        image = inputs.get(IMAGE_MASK)
        prompt = describe_prompt(
            ids, attended, labels, list(self.image_ids), tuple(ids.shape), ids.device, image
        )
        answer = torch.tensor(places)[:, None].expand_as(labels).masked_fill(labels == IGNORED, -1)
        route = torch.tensor([row.edit for row in rows])
        columns = attended != 0 if holds_edits else None
        keeps = any(row.term in KEEP for row in rows)
        return [Part(inputs, prompt, labels, answer, route, columns, keeps)]


def _same(first: ImageSource, second: ImageSource) -> bool:
    return first is second or (isinstance(first, (str, bytes)) and first == second)


def _content(part: Part) -> bytes:
    """A digest of what the frozen model's run of a part depends on."""
    digest = hashlib.sha256(repr((part.keeps, part.holds_edits)).encode())
    tensors = {**part.inputs, " labels": part.labels, " text": part.prompt.text}
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.contiguous().numpy().tobytes())
    return digest.digest()
