"""What a training step runs: questions as rows, and what is to be computed of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..runtime.sequence import Prompt
from .recipe import TERMS


@dataclass(frozen=True)
class Part:
    """R rows of questions that go through the model together.

    Attributes:
        inputs: the model's keyword arguments, answers behind the questions.
        prompt: text and image columns; in a packed row those of all its questions.
        labels: [R, L] int64, the answers' tokens, -100 elsewhere.
        answer: [R, L] int64, number of the answer in the batch that a label belongs to, -1 elsewhere.
        route: [R] int64, the edit of each row.
        edit_columns: [R, L] bool, the columns that are the edit itself, in the part that holds the edits.
        keeps: whether some of its answers must stay.
        name: stands for what the rows hold, where the frozen model's run of them may be kept; None: it may
            not.
    """

    inputs: dict[str, Tensor]
    prompt: Prompt
    labels: Tensor
    answer: Tensor
    route: Tensor
    edit_columns: Tensor | None
    keeps: bool
    name: bytes | None = None

    @property
    def holds_edits(self) -> bool:
        """Whether some of its columns are edits."""
        return self.edit_columns is not None


@dataclass(frozen=True)
class Batch:
    """Some edits with their questions.

    Attributes:
        parts: rows by what is to be computed of them.
        terms: [A] int64, the number of the term that each answer belongs to.
        edits: how many edits.
    """

    parts: tuple[Part, ...]
    terms: Tensor
    edits: int

    def counts(self) -> Tensor:
        """[6] float64: answers of each term."""
        return torch.bincount(self.terms, minlength=len(TERMS)).double()


def count_edits(batches: Sequence[Batch]) -> Counter:
    """Edits, rows and tokens of some batches, for reports."""
    total = Counter()
    for batch in batches:
        total["edits"] += batch.edits
        total["rows"] += sum(len(part.route) for part in batch.parts)
        total["tokens"] += sum(part.labels.numel() for part in batch.parts)
    return total
