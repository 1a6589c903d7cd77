"""Batches of training edits for the baselines that are trained: what changes with an edit, and what stays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..data import EditSample
from ..evaluation.forcing import forced_batch
from ..models.architectures import image_token_ids
from ..models.placement import to_device
from ..models.prompting import Prompter
from ..runtime.partial import PartialForward
from ..training.losses import token_losses
from ..training.questions import questions_of
from ..training.recipe import TERMS
from .baseline import Question, end_token
from .watching import image_columns

CHANGE = TERMS[:3]
_ALL = dict.fromkeys(TERMS, 1.0)


@dataclass
class Rows:
    """R questions with their answers behind them, padded on the right.

    Attributes:
        inputs: of the model, without labels.
        labels: [R, L] int64, the answer's ids with the end token, -100 elsewhere.
        prompt, image: [R, L] bool, columns of the prompt, and of image features.
    """

    inputs: dict[str, Tensor]
    labels: Tensor
    prompt: Tensor
    image: Tensor

    @property
    def at(self) -> Tensor:
        """[R, L] bool, the columns in front of the answers' tokens: their logits count."""
        return nn.functional.pad(self.labels[:, 1:] != -100, (0, 1))

    @property
    def wanted(self) -> Tensor:
        """[K] int64, the answers' tokens, in the order of `at`."""
        return self.labels[:, 1:][self.labels[:, 1:] != -100]

    @property
    def row(self) -> Tensor:
        """[K] int64, the row that each of them belongs to."""
        return self.at.nonzero()[:, 0]

    @property
    def last(self) -> Tensor:
        """[R] int64, the column of each prompt's last token."""
        return (self.prompt * torch.arange(self.prompt.shape[1], device=self.prompt.device)).argmax(1)


def rows_of(
    model: nn.Module, prompter: Prompter, questions: Sequence[Question], answers: Sequence[str]
) -> Rows:
    """Rows of questions and answers, on the model's device."""
    batch = to_device(forced_batch(prompter, questions, answers, end=end_token(model)), model)
    labels = batch.pop("labels")
    prompt = batch["attention_mask"].bool() & (labels == -100)
    image = image_columns(batch["input_ids"], torch.tensor(image_token_ids(model), dtype=torch.int64))
    return Rows(batch, labels, prompt, image & prompt)


@dataclass
class Lessons:
    """E edits and R questions about them.

    Attributes:
        samples: E.
        questions, answers: R each; of what has to stay, the data set's answers, at which it is compared.
        owner: [R] int64, the edit that a question was drawn for.
        change: [R] bool, whether its answer is the edit's new one, or has to stay.
        terms: R names of `TERMS`.
    """

    samples: list[EditSample]
    questions: list[Question]
    answers: list[str]
    owner: Tensor
    change: Tensor
    terms: list[str]

    def edits(self) -> tuple[list[Question], list[str]]:
        """The edits' own questions and new answers."""
        requests = [sample.request for sample in self.samples]
        return [(r.image, r.prompt) for r in requests], [r.target for r in requests]

    def only(self, keep: Tensor) -> Lessons:
        """The questions for which `keep` [R] bool is True."""
        numbers = keep.nonzero()[:, 0].tolist()
        return Lessons(
            self.samples, [self.questions[i] for i in numbers], [self.answers[i] for i in numbers],
            self.owner[keep], self.change[keep], [self.terms[i] for i in numbers],
        )  # fmt: skip


def lessons_of(samples: Sequence[EditSample], generator: torch.Generator) -> Lessons:
    """One question of each kind that the samples have, as the editors themselves are trained with."""
    found = [q for e, sample in enumerate(samples) for q in questions_of(sample, e, _ALL, generator)]
    return Lessons(
        list(samples), [(q.probe.image, q.probe.prompt) for q in found], [q.probe.answer for q in found],
        torch.tensor([q.edit for q in found]), torch.tensor([q.term in CHANGE for q in found]),
        [q.term for q in found],
    )  # fmt: skip


class Passed:
    """One forward of the frozen model over `Rows`, of which the layers from `first` on can run again.

    Args:
        check: compare these layers on their own with the whole model.

    Attributes:
        states: [R, L, D] in front of layer `first`.
        before: [K, V] logits of the unedited model in front of the answers' tokens.

    Raises:
        ValueError: the layers on their own are not the model.
    """

    def __init__(self, model: nn.Module, rows: Rows, first: int, check: bool = False):
        with torch.no_grad():
            self._partial = PartialForward(model, rows.inputs, first)
        self.rows, self.states = rows, self._partial.states
        logits, self._partial.logits = self._partial.logits, None
        if check and not self._partial.reproduces(logits, rows.at):
            raise ValueError(
                f"{type(model).__name__}'s decoder layers on their own do not give the model's logits, so "
                f"what works on them cannot be trained here."
            )
        self.before = logits[rows.at]

    def logits(self, states: Tensor | None = None) -> Tensor:
        """[K, V] with what is bound to the layers now, from other states in front of them if given."""
        end = self._partial.run(self.states if states is None else states)
        return self._partial.head(end[self.rows.at])


def written_and_kept(logits: Tensor, passed: Passed, lessons: Lessons) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy over tokens of new answers, and mean KL(before || now) over those that stay."""
    change = lessons.change.to(logits.device)[passed.rows.row]
    losses = token_losses(logits, passed.before, passed.rows.wanted, change)
    parts = [losses[kept].mean() if bool(kept.any()) else losses.sum() * 0 for kept in (change, ~change)]
    return parts[0], parts[1]
