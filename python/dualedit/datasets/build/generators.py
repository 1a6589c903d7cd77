"""What makes questions and pictures around a fact: one small protocol."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from ...models.images import ImageSource
from .rows import SourceRow

# In words: other wordings of the question; other questions about the picture; questions without a picture;
# other pictures of the same thing; pictures of things that look like it; pictures of other things with a
# question.
KINDS = ("rephrases", "near_questions", "texts", "other_images", "look_alikes", "unrelated_images")


@dataclass(frozen=True)
class Piece:
    """What a generator makes: a question, a picture, or both.

    Attributes:
        prompt: None: the row's own question.
        image: a path or a picture; None: the row's own (or none, for "texts").
        answer: the right answer before the edit, where the generator knows it.
    """

    prompt: str | None = None
    image: ImageSource = None
    answer: str | None = None


@dataclass(frozen=True)
class Cost:
    """What making something takes, as far as can be said before.

    Attributes:
        requests: to an endpoint or a text model.
        tokens_in, tokens_out: of those requests, estimated at four letters a token.
        pictures: drawn by a model.
    """

    requests: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    pictures: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.requests + other.requests, self.tokens_in + other.tokens_in,
            self.tokens_out + other.tokens_out, self.pictures + other.pictures,
        )  # fmt: skip


class GeneratorFailed(ValueError):
    """A generator cannot go on; what was made before is kept in the cache."""


class Generator(Protocol):
    """Makes some of the `KINDS`.

    Attributes:
        name: what reports call it; with `settings` it tells what is in a cache apart.
        settings: what its results depend on, in words.
        makes: the kinds that it makes.
    """

    name: str
    settings: str
    makes: frozenset[str]

    def cost(self, kind: str, row: SourceRow, count: int) -> Cost:
        """What `make` will take."""

    def make(self, kind: str, row: SourceRow, count: int, attempt: int) -> Sequence[Piece]:
        """Up to `count` pieces for a row; another attempt may give others.

        Raises:
            GeneratorFailed: nothing more can be made now.
        """
