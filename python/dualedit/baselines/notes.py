"""Methods that tell the model its stored edits, in front of the question."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..data import EditSample
from ..editing import Edit
from ..editor import Explanation
from .baseline import Baseline, Question, stored_edit


@dataclass(frozen=True)
class Fact:
    """A stored edit in words, and the key [D] that it is found by."""

    key: Tensor
    prompt: str
    target: str
    edit: Edit


class Notes(Baseline):
    """Stored facts with keys; an heir says how keys are made and how a question is asked."""

    def __init__(self, *arguments) -> None:
        super().__init__(*arguments)
        self._facts: list[Fact] = []
        self._stored = 0

    @abstractmethod
    def _keys(self, questions: Sequence[Question]) -> Tensor:
        """[R, D] what questions are looked up by."""

    def edit(self, sample: EditSample) -> None:
        """Note the fact; one with the same question about the same image takes the old one's place."""
        request = sample.request
        if not request.target.strip():
            raise ValueError(f"target={request.target!r}: an edit needs an answer. Pass it as text.")
        key = self._keys([(request.image, request.prompt)])[0]
        self._facts = [
            fact for fact in self._facts if fact.prompt != request.prompt or not torch.equal(fact.key, key)
        ]
        self._stored += 1
        note = stored_edit(self._stored, sample, self._radius())
        self._facts.append(Fact(key, request.prompt, request.target.strip(), note))

    def _radius(self) -> float:
        """How far a question may lie from a fact that it is told."""
        return float("inf")

    def reset(self) -> None:
        """Forget the facts."""
        self._facts = []

    def memory_bytes(self) -> int:
        """Keys and texts of the stored facts; demonstrations belong to no edit."""
        return sum(f.key.nbytes + len(f.prompt.encode()) + len(f.target.encode()) for f in self._facts)


class GatedNotes(Notes):
    """The nearest fact alone is told, and only to a question inside its radius.

    Attributes:
        settings: with "fact" and "question", how they are written, and "radius", a distance between keys of
            length 1.
    """

    def _radius(self) -> float:
        return self.settings.radius

    def _nearest(self, questions: Sequence[Question]) -> tuple[Tensor, Tensor]:
        """Number of the nearest fact and distance, [R] each; an earlier fact wins a tie."""
        keys = torch.stack([fact.key for fact in self._facts])
        # Between vectors of length 1; from the difference, because 2 - 2 cos loses what is near 0.
        apart = (self._keys(questions)[:, None] - keys).norm(dim=-1)
        distance, index = apart.min(dim=1)
        return index, distance

    def asked(self, questions: Sequence[Question]) -> list[Question]:
        """The questions, each with the note of the fact that it is near enough to."""
        if self._off or not self._facts:
            return list(questions)
        index, distance = self._nearest(questions)
        found = []
        for (image, prompt), i, far in zip(questions, index.tolist(), distance.tolist(), strict=True):
            if far <= self.settings.radius:
                fact = self._facts[i]
                told = self.settings.fact.format(prompt=fact.prompt, target=fact.target)
                prompt = told + self.settings.question.format(prompt=prompt)
            found.append((image, prompt))
        return found

    def explain(self, questions: Sequence[Question]) -> list[Explanation | None]:
        """Which fact each question is told, or is nearest, with its distance."""
        radius = self.settings.radius
        if self._off or not self._facts:
            return [Explanation(False, None, float("inf"), 0.0) for _ in questions]
        index, distance = self._nearest(questions)
        return [
            Explanation(far <= radius, self._facts[i].edit, far, radius)
            for i, far in zip(index.tolist(), distance.tolist(), strict=True)
        ]
