"""What a worker says in the place of an answer: which edit a question needs, or why it cannot be told.

A worker has one way out to the front, the tokens of an answer. A question that is asked among the edits of a
version (`plan.ASK`) carries the tokens that the worker may speak with: one that marks its message (an image
token, which no answer has), one that ends an answer, and sixteen for digits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

CODE = "dualedit_code"  # in a request's extra arguments
HIT, AGAIN, UNREADABLE, GONE = range(4)
WHY = {
    AGAIN: "states of the prompt came from the prefix cache, and its key cannot be made of what is left",
    UNREADABLE: "the values of the edit cannot be read",
    GONE: "the worker does not have this version of the store",
}
_DIGITS = 16


@dataclass(frozen=True)
class Code:
    """The tokens that a worker speaks with.

    Attributes:
        mark, end: begins and ends a message.
        digits: sixteen tokens.
    """

    mark: int
    end: int
    digits: tuple[int, ...]

    @classmethod
    def of(cls, mark: int, ends: Sequence[int], avoided: Sequence[int]) -> Code:
        """A code that avoids some tokens, those that end an answer among them."""
        wrong = {mark, *ends, *avoided}
        digits = [token for token in range(len(wrong) + _DIGITS) if token not in wrong][:_DIGITS]
        return cls(mark, ends[0], tuple(digits))

    @classmethod
    def parse(cls, text: object) -> Code | None:
        """What `str` of a code says; None: no code."""
        try:
            tokens = [int(part) for part in str(text).split(",")]
        except ValueError:
            return None
        if len(tokens) != 2 + _DIGITS or len(set(tokens)) != len(tokens) or min(tokens) < 0:
            return None
        return cls(tokens[0], tokens[1], tuple(tokens[2:]))

    def __str__(self) -> str:
        return ",".join(map(str, (self.mark, self.end, *self.digits)))

    def message(self, kind: int, number: int = 0) -> list[int]:
        """The tokens of a message."""
        places = [int(place, _DIGITS) for place in f"{number:x}"]
        return [self.mark, self.digits[kind], *(self.digits[place] for place in places), self.end]

    def read(self, tokens: Sequence[int], ended: bool) -> tuple[int, int] | None:
        """(kind, number) of a message, or None where it is not whole.

        Args:
            tokens: of the answer, the end's token or not.
            ended: whether the answer ended by itself (servers keep the end's token to themselves).
        """
        inside = list(tokens[1:])
        if self.end in inside:
            inside = inside[: inside.index(self.end)]
        elif not ended:
            return None
        if len(inside) < 2 or any(token not in self.digits for token in inside):
            return None
        places = [self.digits.index(token) for token in inside]
        number = int("".join(f"{place:x}" for place in places[1:]), _DIGITS)
        return places[0], number
