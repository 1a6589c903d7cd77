"""The arguments of gated edit attention, in groups."""

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

    k, v: [T, M], of the hidden states' dtype, or cast to it.
    start, length: [N] int64, the rows of k and v that belong to each edit. They are trusted:
        start + length <= T.
    """

    k: Tensor
    v: Tensor
    start: Tensor
    length: Tensor


@dataclass(frozen=True, eq=False)
class AttentionWeights:
    """The adapter's weights.

    w_q [M, D], b_q [M]: query projection with LayerNorm's affine and the input projection folded in, see
        `fold_query`.
    w_o [D, M], b_o [D]: output projection.
    num_heads: must divide M. eps: of the LayerNorm.
    """

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
