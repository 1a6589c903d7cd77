"""Gated edit attention in batched PyTorch, forward and backward, for any device.

Only the tokens that change are touched: they are gathered once, projected in one matrix product, and
attended in chunks of rows padded to a common size. Chunks bound both the padding and the memory of scores.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .arguments import AttentionWeights, Slots
from .reference import at_least_fp32

# Attention scores [rows, heads, queries, keys] that are alive at once.
_SCORES = 1 << 23


@dataclass(frozen=True)
class Plan:
    """The tokens that change: their flat positions, grouped by row, rows ordered by size."""

    tokens: Tensor  # [P] int64, positions in hidden.view(-1, D)
    counts: list[int]  # tokens of each open row
    starts: list[int]  # first K/V row of its slot
    lengths: list[int]  # K/V rows of its slot

    @classmethod
    def of(cls, span: Tensor, route: Tensor, start: Tensor, length: Tensor) -> Plan | None:
        """The plan, or None when nothing changes. Raises IndexError for a route beyond the last slot."""
        rows = (route >= 0).nonzero().squeeze(1)
        if not len(rows):
            return None
        slots = route[rows]
        if int(slots.max()) >= len(start):
            raise IndexError(
                f"route holds {int(slots.max())}, but there are {len(start)} slots: pass all slots."
            )
        flags = span[rows]
        table = torch.stack([rows, flags.sum(1), start[slots], length[slots]]).tolist()
        order = sorted((c, n, s, i) for i, (c, s, n) in enumerate(zip(*table[1:], strict=True)) if c and n)
        if not order:
            return None
        picked = torch.tensor([entry[3] for entry in order], device=span.device)
        row, column = flags[picked].nonzero().unbind(1)
        tokens = rows[picked][row] * span.shape[1] + column
        return cls(tokens, [e[0] for e in order], [e[2] for e in order], [e[1] for e in order])

    def chunks(self, num_heads: int) -> Iterator[Chunk]:
        """Rows that are attended together, within the budget for scores."""
        first, offset = 0, 0
        while first < len(self.counts):
            last, keys = first + 1, self.lengths[first]
            while last < len(self.counts):
                keys = max(keys, self.lengths[last])
                if (last + 1 - first) * num_heads * self.counts[last] * keys > _SCORES:
                    break
                last += 1
            counts = self.counts[first:last]
            yield Chunk(offset, counts, self.starts[first:last], self.lengths[first:last], self.tokens.device)
            first, offset = last, offset + sum(counts)


class Chunk:
    """Rows of a plan that are padded to one [R, queries] x [R, keys] block."""

    def __init__(
        self, offset: int, counts: list[int], starts: list[int], lengths: list[int], device: torch.device
    ):
        self.tokens = slice(offset, offset + sum(counts))
        self.rows, self.queries, self.keys = len(counts), max(counts), max(lengths)
        self.first, self.single = starts[0], len({*zip(starts, lengths, strict=True)}) == 1
        self.query_index = self.query_mask = self.key_mask = None
        if len({*counts}) > 1:
            count = torch.tensor(counts, device=device)
            column = torch.arange(self.queries, device=device)
            self.query_mask = column < count[:, None]  # [R, queries]
            self.query_index = torch.minimum(column, count[:, None] - 1) + (count.cumsum(0) - count)[:, None]
        if not self.single:
            column = torch.arange(self.keys, device=device)
            length = torch.tensor(lengths, device=device)[:, None]
            self.key_index = torch.minimum(column, length - 1) + torch.tensor(starts, device=device)[:, None]
            if len({*lengths}) > 1:
                self.key_mask = (column < length)[:, None, None, :]  # [R, 1, 1, keys]

    def pad(self, flat: Tensor, num_heads: int) -> Tensor:
        """[tokens, M] to [R, H, queries, M/H]; padding repeats a token of the row."""
        padded = (
            flat.view(self.rows, self.queries, -1) if self.query_index is None else flat[self.query_index]
        )
        return padded.unflatten(-1, (num_heads, -1)).transpose(1, 2)

    def unpad(self, padded: Tensor) -> Tensor:
        """[R, H, queries, M/H] to [tokens, M]."""
        rows = padded.transpose(1, 2).flatten(2)
        return rows.flatten(0, 1) if self.query_mask is None else rows[self.query_mask]

    def memory(self, kv: Tensor, num_heads: int) -> Tensor:
        """Rows of k or v [T, M] as [R, H, keys, M/H], without a copy when all rows read one slot."""
        if self.single:
            block = kv[self.first : self.first + self.keys].expand(self.rows, -1, -1)
        else:
            block = kv[self.key_index]
        return block.unflatten(-1, (num_heads, -1)).transpose(1, 2)

    def add_memory(self, total: Tensor, grad: Tensor) -> None:
        """Add gradients [R, H, keys, M/H] to total [T, M]; masked keys have gradient zero."""
        rows = grad.to(total.dtype).transpose(1, 2).flatten(2)
        if self.single:
            total[self.first : self.first + self.keys] += rows.sum(0)
        else:
            total.index_add_(0, self.key_index.flatten(), rows.flatten(0, 1))


def forward(hidden: Tensor, span: Tensor, route: Tensor, slots: Slots, weights: AttentionWeights) -> Tensor:
    """Out of place: see `forward_`."""
    out = hidden.clone(memory_format=torch.contiguous_format)
    forward_(out, span, route, slots, weights)
    return out


def forward_(hidden: Tensor, span: Tensor, route: Tensor, slots: Slots, weights: AttentionWeights) -> None:
    """Change the open tokens of ``hidden`` in place: see `dualedit_kernels.gated_edit_attention`."""
    plan = Plan.of(span, route, slots.start, slots.length)
    if plan is None:
        return
    flat = (
        hidden.view(-1, hidden.shape[-1]) if hidden.is_contiguous() else hidden.reshape(-1, hidden.shape[-1])
    )
    x = flat[plan.tokens]  # [P, D]
    q = F.linear(F.layer_norm(x, x.shape[-1:], eps=weights.eps), weights.w_q, weights.b_q)
    o = torch.empty_like(q)
    for chunk in plan.chunks(weights.num_heads):
        block = F.scaled_dot_product_attention(
            chunk.pad(q[chunk.tokens], weights.num_heads),
            chunk.memory(slots.k, weights.num_heads),
            chunk.memory(slots.v, weights.num_heads),
            attn_mask=chunk.key_mask,
        )
        o[chunk.tokens] = chunk.unpad(block)
    flat.index_copy_(0, plan.tokens, x.add_(F.linear(o, weights.w_o, weights.b_o)))
    if flat.data_ptr() != hidden.data_ptr():
        hidden.copy_(flat.view_as(hidden))


def backward(
    grad: Tensor,
    hidden: Tensor,
    span: Tensor,
    route: Tensor,
    slots: Slots,
    weights: AttentionWeights,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    """Gradients of (hidden, k, v, w_q, b_q, w_o, b_o); q and the softmax are recomputed.

    A gradient that is not needed comes back as an empty tensor.
    """
    w_q, b_q, w_o, b_o = weights.w_q, weights.b_q, weights.w_o, weights.b_o
    plan = Plan.of(span, route, slots.start, slots.length)
    d_hidden = grad.clone(memory_format=torch.contiguous_format) if needs[0] else hidden.new_empty(0)
    if plan is None:
        tensors = zip((slots.k, slots.v, w_q, b_q, w_o, b_o), needs[1:], strict=True)
        return d_hidden, *(torch.zeros_like(t) if need else t.new_empty(0) for t, need in tensors)
    wide = at_least_fp32(hidden.dtype)
    g = grad.reshape(-1, grad.shape[-1])[plan.tokens]  # [P, D]
    x = hidden.reshape(-1, hidden.shape[-1])[plan.tokens].to(wide)
    normal, mean, scale = torch.native_layer_norm(x, x.shape[-1:], None, None, weights.eps)
    normal = normal.to(g.dtype)
    q = F.linear(normal, w_q, b_q)
    d_o = g @ w_o
    o, d_q, d_k, d_v = _attention_backward(plan, q, d_o, slots, weights.num_heads, needs)
    if needs[0]:
        d_normal = (d_q @ w_q).to(wide)
        d_x = torch.ops.aten.native_layer_norm_backward(
            d_normal, x, x.shape[-1:], mean, scale, None, None, [True, False, False]
        )[0]
        d_hidden.view(-1, x.shape[-1]).index_copy_(0, plan.tokens, g + d_x.to(g.dtype))
    return (
        d_hidden,
        d_k,
        d_v,
        d_q.t() @ normal if needs[3] else w_q.new_empty(0),
        d_q.sum(0) if needs[4] else b_q.new_empty(0),
        g.t() @ o if needs[5] else w_o.new_empty(0),
        g.sum(0) if needs[6] else b_o.new_empty(0),
    )


def _attention_backward(
    plan: Plan,
    q: Tensor,
    d_o: Tensor,
    slots: Slots,
    num_heads: int,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(o [P, M], d_q [P, M], d_k [T, M], d_v [T, M]) of q, d_o [P, M]; d_k, d_v are empty if not needed."""
    k, v = slots.k, slots.v
    wide = at_least_fp32(q.dtype)
    o, d_q = torch.empty_like(q), torch.empty_like(q)
    d_k = torch.zeros_like(k, dtype=wide) if needs[1] else k.new_empty(0)
    d_v = torch.zeros_like(v, dtype=wide) if needs[2] else v.new_empty(0)
    q = q * (q.shape[1] // num_heads) ** -0.5
    for chunk in plan.chunks(num_heads):
        # Contiguous once: every batched product would copy a strided operand again. [R, H, *, M/H]
        q_c, d_o_c = (chunk.pad(t[chunk.tokens], num_heads).contiguous() for t in (q, d_o))
        k_c, v_c = (chunk.memory(t, num_heads).contiguous() for t in (k, v))
        if chunk.query_mask is not None:
            d_o_c.mul_(chunk.query_mask[:, None, :, None])
        o_c, d_q_c, d_k_c, d_v_c = _chunk_backward(q_c, k_c, v_c, d_o_c, chunk.key_mask, needs)
        if needs[1]:
            chunk.add_memory(d_k, d_k_c)
        if needs[2]:
            chunk.add_memory(d_v, d_v_c)
        o[chunk.tokens], d_q[chunk.tokens] = chunk.unpad(o_c), chunk.unpad(d_q_c)
    return o, d_q.mul_((q.shape[1] // num_heads) ** -0.5), d_k.to(k.dtype), d_v.to(v.dtype)


def _chunk_backward(
    q: Tensor, k: Tensor, v: Tensor, d_o: Tensor, mask: Tensor | None, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """(o, d_q [R, H, P, K], d_k, d_v [R, H, S, K]) of q (scaled), d_o [R, H, P, K] and k, v [R, H, S, K].

    mask: [R, 1, 1, S] bool or None. d_k and d_v are None if not needed.
    """
    wide = at_least_fp32(q.dtype)
    scores = (q @ k.transpose(-1, -2)).to(wide)
    if mask is not None:
        scores.masked_fill_(~mask, -torch.inf)
    p = torch.softmax(scores, -1)  # [R, H, P, S]
    narrow = p.to(q.dtype)
    d_p = (d_o @ v.transpose(-1, -2)).to(wide)
    d_s = torch.ops.aten._softmax_backward_data(d_p, p, -1, wide).to(q.dtype)
    d_k = d_s.transpose(-1, -2) @ q if needs[1] else None
    d_v = narrow.transpose(-1, -2) @ d_o if needs[2] else None
    return narrow @ v, d_s @ k, d_k, d_v
