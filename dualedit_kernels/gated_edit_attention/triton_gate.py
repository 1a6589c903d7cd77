"""The first kernel of gated edit attention in Triton: which rows are open, and what their LayerNorms need.

Given a gate of few keys each block decides the gate of its row itself, and the first block of a row writes
the route for the later kernels (and layers). A row's block reads its query and the keys for that, so there
are fewer blocks, of more tokens each, than without a gate. Among more keys `nearest_key` is launched first.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..nearest_key.triton_kernel import (
    FEW_KEYS,
    configuration,
    nearest_key_at,
    nearest_of,
    position_of,
    rows_together,
    within,
)
from ..triton_support import on_device, processors
from .arguments import Gate, Slots

_BLOCKS = 6  # of a gate to each multiprocessor
_TOKENS = 4  # at a time
# Left alone, the assembler spills a few to fit one block more to a multiprocessor.
_REGISTERS = 128


def open_rows(
    hidden: Tensor, span: Tensor, route: Tensor | None, gate: Gate | None, slots: Slots, eps: float
) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
    """(`rows_of` the route that is given or decided, mean [B, L] and 1/std [B, L], both fp32).

    Mean and 1/std are those of the span's tokens in open rows, and not written elsewhere.
    """
    rows, tokens, dim = hidden.shape
    if gate is not None and len(gate.keys) > FEW_KEYS:
        route, gate = nearest_key_at(hidden, gate.last, gate.keys, gate.radius, gate.metric)[0], None
    decide = gate is not None
    # Few tokens at a time, so that a short span still fills the GPU.
    share = _TOKENS
    if decide:
        route = torch.empty(rows, dtype=torch.int64, device=hidden.device)
        blocks = max(1, _BLOCKS * processors(hidden) // rows)
        share = triton.cdiv(triton.cdiv(tokens, blocks), _TOKENS) * _TOKENS
    row = rows_of(span, route, slots)
    mean = torch.empty(rows, tokens, dtype=torch.float32, device=hidden.device)
    rstd = torch.empty_like(mean)
    keys = rows_together(gate.keys) if decide else hidden
    tiles = configuration(rows, len(keys), dim) if decide else configuration(1, 1, 1)
    with on_device(hidden):
        statistics_kernel[(triton.cdiv(tokens, share), rows)](
            hidden,
            *row,
            gate.last.contiguous() if decide else route,
            keys,
            gate.radius.contiguous() if decide else mean,
            mean,
            rstd,
            tokens,
            dim,
            len(slots.start),
            share,
            keys.stride(0),
            eps,
            GATE=decide,
            COSINE=decide and gate.metric == "cosine",
            BN=tiles["BN"],
            BG=tiles["BK"],
            BT=_TOKENS,
            BK=1024,
            num_warps=tiles["num_warps"],
            maxnreg=_REGISTERS,
        )
    return row, mean, rstd


def rows_of(span: Tensor, route: Tensor, slots: Slots) -> tuple[Tensor, ...]:
    """What every kernel reads to know its row: span as bytes, route, start, length, all contiguous."""
    return (
        span.contiguous().view(torch.uint8),
        route.contiguous(),
        slots.start.contiguous(),
        slots.length.contiguous(),
    )


@triton.jit
def rows_of_slot(slot, start, length, slots):
    """(first row of k and v, number of rows) of a slot; the number is 0 where there is no such slot."""
    known = (slot >= 0) & (slot < slots)
    # []
    first = tl.load(start + slot, mask=known, other=0)
    # []
    count = tl.load(length + slot, mask=known, other=0)
    return first, count.to(tl.int32)


@triton.jit
def slot_of(i_b, route, start, length, slots):
    """(first row of k and v, number of rows) of row i_b; the number is 0 where the row is closed."""
    # []
    slot = tl.load(route + i_b)
    return rows_of_slot(slot, start, length, slots)


@triton.jit
def span_of(span, i_b, o_t, tokens):
    """[BT] bool: the tokens o_t of row i_b that are in the span."""
    # [BT]
    return tl.load(span + i_b * tokens + o_t, mask=o_t < tokens, other=0).to(tl.int32) != 0


@triton.jit(do_not_specialize=["tokens", "slots", "share"])
def statistics_kernel(
    hidden,  # [B, L, D]
    span,  # [B, L] bytes
    route,  # [B] int64, out if GATE
    start,  # [N] int64
    length,  # [N] int64
    last,  # [B] int64 if GATE
    keys,  # [N, D] if GATE, rows stride_k apart
    radius,  # [N] fp32 if GATE
    mean,  # [B, L] fp32 out
    rstd,  # [B, L] fp32 out
    tokens,
    dim,
    slots,
    share,
    stride_k,
    eps,
    GATE: tl.constexpr,
    COSINE: tl.constexpr,
    BN: tl.constexpr,
    BG: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
):
    """The gate, and LayerNorm statistics of the span tokens of open rows: one program a row and its share."""
    i_b = tl.program_id(1).to(tl.int64)
    if GATE:
        slot = _gate(hidden, last, keys, radius, i_b, tokens, dim, slots, stride_k, COSINE, BN, BG)
        if tl.program_id(0) == 0:
            tl.store(route + i_b, slot)
    else:
        # []
        slot = tl.load(route + i_b)
    _, count = rows_of_slot(slot, start, length, slots)
    if count <= 0:
        return
    begin = tl.program_id(0) * share
    for i_t in range(begin, tl.minimum(begin + share, tokens), BT):
        _statistics(hidden, span, mean, rstd, i_b, i_t + tl.arange(0, BT), tokens, dim, eps, BT, BK)


@triton.jit
def _gate(
    hidden, last, keys, radius, i_b, tokens, dim, slots, stride_k, COSINE: tl.constexpr, BN: tl.constexpr,
    BG: tl.constexpr,
):  # fmt: skip
    """The slot of row i_b or -1, int64: `nearest_key` of few keys to the bit, in the same tiles."""
    # [1]
    b_at, m_q = position_of(tl.load(last + i_b + tl.arange(0, 1)), tokens)
    p_q = hidden + ((i_b * tokens + b_at) * dim)[:, None] + tl.arange(0, BG)[None, :]
    b_best, b_nearest = nearest_of(p_q, m_q, keys, 0, slots, dim, stride_k, COSINE, 1, BN, BG)
    _, b_slot = within(b_best, b_nearest, radius, COSINE)
    return tl.max(b_slot, 0).to(tl.int64)


@triton.jit
def _statistics(
    hidden, span, mean, rstd, i_b, o_t, tokens, dim, eps, BT: tl.constexpr, BK: tl.constexpr
):  # fmt: skip
    m_t = span_of(span, i_b, o_t, tokens)
    if tl.max(m_t.to(tl.int32), 0) != 0:
        o_k = tl.arange(0, BK)
        p_x = hidden + (i_b * tokens + o_t)[:, None] * dim + o_k[None, :]
        b_sum = tl.zeros([BT, BK], tl.float32)
        for i_k in range(0, dim, BK):
            m_x = m_t[:, None] & (i_k + o_k < dim)[None, :]
            # [BT, BK]
            b_sum += tl.load(p_x + i_k, mask=m_x, other=0.0).to(tl.float32)
        b_mean = tl.sum(b_sum, 1) / dim
        # A second pass: the difference of squares would drown in a massive activation.
        b_squares = tl.zeros([BT, BK], tl.float32)
        for i_k in range(0, dim, BK):
            m_x = m_t[:, None] & (i_k + o_k < dim)[None, :]
            # [BT, BK]
            b_x = tl.load(p_x + i_k, mask=m_x, other=0.0).to(tl.float32)
            b_x = tl.where(m_x, b_x - b_mean[:, None], 0.0)
            b_squares += b_x * b_x
        b_rstd = 1.0 / tl.sqrt_rn(tl.sum(b_squares, 1) / dim + eps)
        tl.store(mean + i_b * tokens + o_t, b_mean, mask=m_t)
        tl.store(rstd + i_b * tokens + o_t, b_rstd, mask=m_t)
