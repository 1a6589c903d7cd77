"""What the implementations are given, in groups. Operators themselves take every tensor for itself."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..nearest_key.codes import KeyCodes


@dataclass(frozen=True, eq=False)
class Gate:
    """The last-token gate: row b is routed by its hidden state at position last[b].

    last: [B] int64, position of the token that asks (the last token of the prompt).
    keys, radius, metric, codes: as in `nearest_key`; slot i of the memory belongs to keys[i].
    """

    last: Tensor
    keys: Tensor
    radius: Tensor
    metric: str = "cosine"
    codes: KeyCodes | None = None


@dataclass(frozen=True, eq=False)
class Slots:
    """Cached keys and values of all edits, one after the other.

    k, v: [T, M]. start, length: [N] int64, the rows of k and v that belong to each edit.
    """

    k: Tensor
    v: Tensor
    start: Tensor
    length: Tensor


@dataclass(frozen=True, eq=False)
class AttentionWeights:
    """Folded query projection w_q [M, D], b_q [M], output projection w_o [D, M], b_o [D], and their sizes."""

    w_q: Tensor
    b_q: Tensor
    w_o: Tensor
    b_o: Tensor
    num_heads: int
    eps: float

    @property
    def head(self) -> int:
        """Width of a head."""
        return self.w_q.shape[0] // self.num_heads


def grouped(args: tuple) -> tuple[Slots, AttentionWeights]:
    """The last arguments of the operators: k, v, start, length, w_q, b_q, w_o, b_o, num_heads, eps."""
    return Slots(*args[:4]), AttentionWeights(*args[4:])
