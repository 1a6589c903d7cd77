"""Gated edit attention in Triton, forward: four kernels that a row without an edit leaves at once.

    statistics   the gate, if there is one; mean and 1/std of the tokens of open rows, in fp32 (`triton_gate`)
    project      q = ((x - mean) / std) @ w_q.T + b_q, normalised as it is loaded
    attend       o = softmax(q k.T / sqrt(M/H)) v over the slot of the row, read in place (streaming softmax)
    output       out = x + o @ w_o.T + b_o for the tokens of the span, the same bits for all others

The route is read on the device, nothing waits for the GPU, and grids depend on shapes alone: a CUDA graph can
capture every call. A tile without a token of the span is left like a closed row. A route beyond the last slot
cannot raise here: its row is closed.

Source: DualEdit (arXiv:2506.13638); streaming softmax as in FlashAttention-2 (arXiv:2307.08691).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_support import generation, on_device, power_of_two, room
from .arguments import AttentionWeights, Gate, Slots
from .triton_gate import open_rows, slot_of, span_of


def forward(
    hidden: Tensor, span: Tensor, route: Tensor | None, gate: Gate | None, slots: Slots, w: AttentionWeights
) -> tuple[Tensor, Tensor]:
    """(out, route), see `dualedit_kernels.gated_edit_attention`; one of route and gate is None."""
    hidden = hidden.contiguous()
    out = torch.empty_like(hidden)
    return out, _forward(hidden, out, span, route, gate, slots, w)


def forward_(
    hidden: Tensor, span: Tensor, route: Tensor | None, gate: Gate | None, slots: Slots, w: AttentionWeights
) -> Tensor:
    """The route; changes ``hidden`` itself."""
    if hidden.is_contiguous():
        return _forward(hidden, hidden, span, route, gate, slots, w)
    out, route = forward(hidden, span, route, gate, slots, w)
    hidden.copy_(out)
    return route


def _forward(
    hidden: Tensor,
    out: Tensor,
    span: Tensor,
    route: Tensor | None,
    gate: Gate | None,
    slots: Slots,
    w: AttentionWeights,
) -> Tensor:
    rows, tokens, dim = hidden.shape
    if not hidden.numel():
        return hidden.new_full((rows,), -1, dtype=torch.int64) if route is None else route
    size, count = w.w_q.shape[0], len(slots.start)
    row, mean, rstd = open_rows(hidden, span, route, gate, slots, w.eps)
    q = hidden.new_empty(rows, tokens, size)
    with on_device(hidden):
        sizes = product_tiles(hidden.dtype, rows * tokens, size, generation(hidden))
        project_kernel[(triton.cdiv(tokens, sizes["BT"]) * triton.cdiv(size, sizes["BO"]), rows)](
            hidden, *row, mean, rstd, w.w_q.contiguous(), w.b_q.contiguous(), q, tokens, dim, size, count,
            **sizes,
        )  # fmt: skip
        attend(q, row, slots, q, w.num_heads)
        sizes = product_tiles(hidden.dtype, rows * tokens, dim, generation(hidden))
        output_kernel[(triton.cdiv(tokens, sizes["BT"]) * triton.cdiv(dim, sizes["BO"]), rows)](
            hidden, *row, q, w.w_o.contiguous(), w.b_o.contiguous(), out, tokens, size, dim, count,
            INPLACE=out is hidden, **sizes,
        )  # fmt: skip
    return row[1]


def attend(
    q: Tensor,
    row: tuple[Tensor, ...],
    slots: Slots,
    o: Tensor,
    num_heads: int,
    for_backward: tuple[Tensor, Tensor, Tensor] | None = None,
) -> None:
    """Attention of q [B, L, M] over the slots, into o [B, L, M], which may be q.

    for_backward: d_o [B, L, M], the gradient of o; and to be written lse [B, H, L] (log2 of the sums of
    exponentials) and delta [B, H, L] (rowsum(d_o * o)), both fp32.
    """
    rows, tokens, size = q.shape
    head = size // num_heads
    sizes = attention_tiles(q.dtype, head, tokens, generation(q))
    with on_device(q):
        attend_kernel[(triton.cdiv(tokens, sizes["BT"]) * num_heads, rows)](
            q, *row, slots.k.contiguous(), slots.v.contiguous(), o, *(for_backward or (q, q, q)), tokens,
            num_heads, head, len(slots.start), head**-0.5, BACKWARD=for_backward is not None, **sizes,
        )  # fmt: skip


def product_tiles(dtype: torch.dtype, tokens: int, outputs: int, generation: int) -> dict[str, int]:
    """Tile sizes of the two matrix products: BT tokens by BO outputs, BK elements at a time."""
    if dtype == torch.float32:
        return {"BT": 64, "BO": 64, "BK": 32, "num_warps": 8, "num_stages": 3}
    if triton.cdiv(tokens, 128) * triton.cdiv(outputs, 128) < 64:  # too few tiles to fill a GPU
        return {"BT": 64, "BO": 32, "BK": 128, "num_warps": 4, "num_stages": 4}
    return {"BT": 128, "BO": 128, "BK": 64, "num_warps": 8, "num_stages": 3} | room(generation)


def attention_tiles(dtype: torch.dtype, head: int, tokens: int, generation: int) -> dict[str, int]:
    """Tile sizes of the attention: BT tokens, BN keys at a time, heads padded to BH.

    generation: major compute capability. Before 9 the accumulators of a tile leave fewer registers.
    """
    size = max(16, power_of_two(head))
    if dtype == torch.float32:
        few = 16 if size > 64 else 32
        return {"BT": few, "BN": few, "BH": size, "num_warps": 4 if size <= 32 else 8, "num_stages": 1}
    if size > 128:
        return {"BT": 64, "BN": 32, "BH": size, "num_warps": 8, "num_stages": 2}
    keys = 32 if size > 64 and generation < 9 else 64
    if tokens <= 64:
        return {"BT": 64, "BN": keys, "BH": size, "num_warps": 4, "num_stages": 2}
    tiles = {"BT": 128, "BN": keys, "BH": size, "num_warps": 8, "num_stages": 3}
    return tiles | room(generation) if size == 64 else tiles


@triton.jit(do_not_specialize=["tokens", "slots"])
def project_kernel(
    hidden,  # [B, L, D]
    span,  # [B, L] bytes
    route,  # [B] int64
    start,  # [N] int64
    length,  # [N] int64
    mean,  # [B, L] fp32
    rstd,  # [B, L] fp32
    weight,  # [M, D]
    bias,  # [M]
    q,  # [B, L, M] out
    tokens,
    dim,
    size,
    slots,
    BT: tl.constexpr,
    BO: tl.constexpr,
    BK: tl.constexpr,
):
    """Folded query projection of the normalised span tokens of routed rows."""
    i_b = tl.program_id(1).to(tl.int64)
    _, count = slot_of(i_b, route, start, length, slots)
    if count <= 0:
        return
    count_o = tl.cdiv(size, BO)
    i_t, i_o = tl.program_id(0) // count_o, tl.program_id(0) % count_o
    o_t = i_t * BT + tl.arange(0, BT)
    m_t = span_of(span, i_b, o_t, tokens)
    if tl.max(m_t.to(tl.int32), 0) == 0:
        return
    o_o = i_o * BO + tl.arange(0, BO)
    o_k = tl.arange(0, BK)
    m_o = o_o < size
    # [BT]
    b_mean = tl.load(mean + i_b * tokens + o_t, mask=m_t, other=0.0)
    # [BT]
    b_rstd = tl.load(rstd + i_b * tokens + o_t, mask=m_t, other=0.0)
    p_x = hidden + (i_b * tokens + o_t)[:, None] * dim + o_k[None, :]
    p_w = weight + o_o.to(tl.int64)[None, :] * dim + o_k[:, None]
    b_q = tl.zeros([BT, BO], tl.float32)
    for i_k in range(0, dim, BK):
        m_k = i_k + o_k < dim
        # [BT, BK]
        b_x = tl.load(p_x + i_k, mask=m_t[:, None] & m_k[None, :], other=0.0)
        # [BK, BO]
        b_w = tl.load(p_w + i_k, mask=m_k[:, None] & m_o[None, :], other=0.0)
        b_x = ((b_x.to(tl.float32) - b_mean[:, None]) * b_rstd[:, None]).to(b_x.dtype)
        b_q = tl.dot(b_x, b_w, b_q, input_precision="ieee")
    # [BO]
    b_q += tl.load(bias + o_o, mask=m_o, other=0.0).to(tl.float32)[None, :]
    p_q = q + (i_b * tokens + o_t)[:, None] * size + o_o[None, :]
    tl.store(p_q, b_q.to(q.dtype.element_ty), mask=m_t[:, None] & m_o[None, :])


@triton.jit(do_not_specialize=["tokens", "slots", "heads"])
def attend_kernel(
    q,  # [B, L, M]
    span,  # [B, L] bytes
    route,  # [B] int64
    start,  # [N] int64
    length,  # [N] int64
    k,  # [T, M]
    v,  # [T, M]
    o,  # [B, L, M] out, may be q
    d_o,  # [B, L, M] if BACKWARD
    lse,  # [B, H, L] fp32 out if BACKWARD: log2 of the sum of exponentials
    delta,  # [B, H, L] fp32 out if BACKWARD: rowsum(d_o * o)
    tokens,
    heads,
    head,
    slots,
    scale,
    BACKWARD: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
    BH: tl.constexpr,
):
    """Softmax attention of a routed row's queries over its edit's cached keys and values."""
    i_b = tl.program_id(1).to(tl.int64)
    first, count = slot_of(i_b, route, start, length, slots)
    if count <= 0:
        return
    i_t, i_h = tl.program_id(0) // heads, tl.program_id(0) % heads
    o_t = i_t * BT + tl.arange(0, BT)
    m_t = span_of(span, i_b, o_t, tokens)
    if tl.max(m_t.to(tl.int32), 0) == 0:
        return
    size = heads * head
    o_h, o_n = tl.arange(0, BH), tl.arange(0, BN)
    m_h = o_h < head
    m_q = m_t[:, None] & m_h[None, :]
    p_q = (i_b * tokens + o_t)[:, None] * size + i_h * head + o_h[None, :]
    # [BT, BH]
    b_q = tl.load(q + p_q, mask=m_q, other=0.0)
    b_top = tl.full([BT], float("-inf"), tl.float32)
    b_sum = tl.zeros([BT], tl.float32)
    b_o = tl.zeros([BT, BH], tl.float32)
    p_k = k + (first + o_n)[None, :] * size + i_h * head + o_h[:, None]
    p_v = v + (first + o_n)[:, None] * size + i_h * head + o_h[None, :]
    for i_n in range(0, count, BN):
        m_n = i_n + o_n < count
        # [BH, BN]
        b_k = tl.load(p_k, mask=m_n[None, :] & m_h[:, None], other=0.0)
        b_s = tl.dot(b_q, b_k, input_precision="ieee") * (scale * 1.4426950408889634)  # log2(e)
        b_s = tl.where(m_n[None, :], b_s, float("-inf"))
        b_higher = tl.maximum(b_top, tl.max(b_s, 1))
        b_p = tl.exp2(b_s - b_higher[:, None])
        b_fade = tl.exp2(b_top - b_higher)
        b_sum = b_sum * b_fade + tl.sum(b_p, 1)
        # [BN, BH]
        b_v = tl.load(p_v, mask=m_n[:, None] & m_h[None, :], other=0.0)
        b_o = tl.dot(b_p.to(b_v.dtype), b_v, b_o * b_fade[:, None], input_precision="ieee")
        b_top = b_higher
        p_k += BN * size
        p_v += BN * size
    b_o = b_o / b_sum[:, None]
    tl.store(o + p_q, b_o.to(o.dtype.element_ty), mask=m_q)
    if BACKWARD:
        p_l = (i_b * heads + i_h) * tokens + o_t
        tl.store(lse + p_l, b_top + tl.log2(b_sum), mask=m_t)
        # [BT, BH]
        b_do = tl.load(d_o + p_q, mask=m_q, other=0.0).to(tl.float32)
        tl.store(delta + p_l, tl.sum(b_do * b_o, 1), mask=m_t)


@triton.jit(do_not_specialize=["tokens", "slots"])
def output_kernel(
    hidden,  # [B, L, D]
    span,  # [B, L] bytes
    route,  # [B] int64
    start,  # [N] int64
    length,  # [N] int64
    o,  # [B, L, M]
    weight,  # [D, M]
    bias,  # [D]
    out,  # [B, L, D] out, hidden itself if INPLACE
    tokens,
    size,
    dim,
    slots,
    INPLACE: tl.constexpr,
    BT: tl.constexpr,
    BO: tl.constexpr,
    BK: tl.constexpr,
):
    """Output projection, with the residual added in place on span tokens of routed rows."""
    i_b = tl.program_id(1).to(tl.int64)
    count_o = tl.cdiv(dim, BO)
    i_t, i_o = tl.program_id(0) // count_o, tl.program_id(0) % count_o
    o_t = i_t * BT + tl.arange(0, BT)
    o_o = i_o * BO + tl.arange(0, BO)
    m_o = o_o < dim
    m_out = (o_t < tokens)[:, None] & m_o[None, :]
    p_out = (i_b * tokens + o_t)[:, None] * dim + o_o[None, :]
    _, count = slot_of(i_b, route, start, length, slots)
    m_t = span_of(span, i_b, o_t, tokens)
    if (count <= 0) | (tl.max(m_t.to(tl.int32), 0) == 0):
        if not INPLACE:
            # [BT, BO], the same bits
            tl.store(out + p_out, tl.load(hidden + p_out, mask=m_out), mask=m_out)
        return
    o_k = tl.arange(0, BK)
    p_o = o + (i_b * tokens + o_t)[:, None] * size + o_k[None, :]
    p_w = weight + o_o.to(tl.int64)[None, :] * size + o_k[:, None]
    b_y = tl.zeros([BT, BO], tl.float32)
    for i_k in range(0, size, BK):
        m_k = i_k + o_k < size
        # [BT, BK]
        b_o = tl.load(p_o + i_k, mask=m_t[:, None] & m_k[None, :], other=0.0)
        # [BK, BO]
        b_w = tl.load(p_w + i_k, mask=m_k[:, None] & m_o[None, :], other=0.0)
        b_y = tl.dot(b_o, b_w, b_y, input_precision="ieee")
    # [BO]
    b_y += tl.load(bias + o_o, mask=m_o, other=0.0).to(tl.float32)[None, :]
    # [BT, BO]
    b_x = tl.load(hidden + p_out, mask=m_out, other=0.0)
    b_y = (b_x.to(tl.float32) + b_y).to(b_x.dtype)
    if INPLACE:
        tl.store(out + p_out, b_y, mask=m_out & m_t[:, None])
    else:
        tl.store(out + p_out, tl.where(m_t[:, None], b_y, b_x), mask=m_out)
