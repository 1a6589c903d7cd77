"""Gated edit attention in Triton, backward: the attention in Triton, the products around it in PyTorch.

With s = q k.T / sqrt(M/H), p = softmax(s), o = p v, and d_o the gradient of o:
    d_v = p.T d_o,  d_p = d_o v.T,  d_s = p * (d_p - rowsum(d_o * o)),  d_q = d_s k,  d_k = d_s.T q.
q, p and o are recomputed. Tokens that do not change are set to zero before the products, so nothing waits for
the GPU to count them. d_k and d_v are summed key by key in the order of the rows, without atomics: equal
inputs give equal bits.

Source: FlashAttention-2 (arXiv:2307.08691), section 3.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ..triton_support import generation, on_device, power_of_two, room
from .arguments import AttentionWeights, Slots
from .triton_gate import rows_of, slot_of, span_of
from .triton_kernel import attend

# Tokens over all rows and heads that `memory_kernel` can count: its registers are full, and offsets of 64
# bits spill some of them. The states of so many take 256 GB and more.
MOST_TOKENS = (1 << 31) - 1


def backward(
    grad: Tensor,
    hidden: Tensor,
    span: Tensor,
    route: Tensor,
    slots: Slots,
    w: AttentionWeights,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    """Gradients of (hidden, k, v, w_q, b_q, w_o, b_o); one that is not needed comes back empty."""
    changed = changed_tokens(span, route, slots.length)[:, :, None]  # [B, L, 1]
    x = torch.where(changed, hidden, 0).to(torch.float32)
    variance, mean = torch.var_mean(x, dim=-1, keepdim=True, correction=0)
    deviation = (variance + w.eps).sqrt()
    normal = ((x - mean) / deviation).to(hidden.dtype)  # zero where nothing changes
    g = torch.where(changed, grad, 0)
    q, d_o = F.linear(normal, w.w_q, w.b_q), g @ w.w_o
    o, d_q, d_k, d_v = attend_backward(q, d_o, span, route, slots, w.num_heads, needs)
    d_hidden = hidden.new_empty(0)
    if needs[0]:
        d_normal, n = (d_q @ w.w_q).to(torch.float32), normal.to(torch.float32)
        d_x = d_normal - d_normal.mean(-1, keepdim=True) - n * (d_normal * n).mean(-1, keepdim=True)
        d_hidden = torch.where(changed, g + (d_x / deviation).to(g.dtype), grad).contiguous()
    flat = (0, 1)
    return (
        d_hidden,
        d_k,
        d_v,
        d_q.flatten(*flat).t() @ normal.flatten(*flat) if needs[3] else w.w_q.new_empty(0),
        d_q.sum(flat) if needs[4] else w.b_q.new_empty(0),
        g.flatten(*flat).t() @ o.flatten(*flat) if needs[5] else w.w_o.new_empty(0),
        g.sum(flat) if needs[6] else w.b_o.new_empty(0),
    )


def changed_tokens(span: Tensor, route: Tensor, length: Tensor) -> Tensor:
    """[B, L] bool: the tokens of the span in rows whose slot holds an edit."""
    if not len(length):
        return torch.zeros_like(span)
    known = (route >= 0) & (route < len(length))
    filled = length[torch.where(known, route, 0)] > 0
    return span & (known & filled)[:, None]


def attend_backward(
    q: Tensor,
    d_o: Tensor,
    span: Tensor,
    route: Tensor,
    slots: Slots,
    num_heads: int,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(o, d_q) [B, L, M], zero where nothing changes, and (d_k, d_v) [T, M]; d_k, d_v empty if not needed."""
    rows, tokens, size = q.shape
    head = size // num_heads
    if rows * tokens * num_heads > MOST_TOKENS:
        raise ValueError(
            f"hidden has {rows} x {tokens} tokens for {num_heads} heads, the backward pass takes "
            f"{MOST_TOKENS} in one call: split the batch."
        )
    o, d_q = torch.zeros_like(q), torch.zeros_like(q)
    k, v, count = slots.k.contiguous(), slots.v.contiguous(), len(slots.start)
    d_k, d_v = (torch.zeros_like(t) if needs[i] else t.new_empty(0) for i, t in ((1, k), (2, v)))
    if not q.numel() or not k.numel():
        return o, d_q, d_k, d_v
    row = rows_of(span, route, slots)
    d_o = d_o.contiguous()
    lse = torch.empty(rows, num_heads, tokens, dtype=torch.float32, device=q.device)
    delta = torch.empty_like(lse)
    attend(q, row, slots, o, num_heads, (d_o, lse, delta))
    shared = (q, *row, k, v, d_o, lse, delta)
    sizes, memory_sizes = tiles(q.dtype, head), memory_tiles(q.dtype, head, generation(q))
    with on_device(q):
        query_kernel[(triton.cdiv(tokens, sizes["BT"]) * num_heads, rows)](
            *shared, d_q, tokens, num_heads, head, count, head**-0.5, **sizes
        )
        if needs[1] or needs[2]:
            memory_kernel[(triton.cdiv(len(k), memory_sizes["BN"]), num_heads)](
                *shared, d_k if needs[1] else d_v, d_v if needs[2] else d_k, rows, tokens, num_heads, head,
                count, len(k), head**-0.5, NEEDS_K=needs[1], NEEDS_V=needs[2], **memory_sizes,
            )  # fmt: skip
    return o, d_q, d_k, d_v


def tiles(dtype: torch.dtype, head: int) -> dict[str, int]:
    """Tile sizes: BT tokens by BN keys, heads padded to BH."""
    size = max(16, power_of_two(head))
    if dtype == torch.float32 or size > 128:
        few = 16 if dtype == torch.float32 and size > 32 else 32
        return {"BT": few, "BN": few, "BH": size, "num_warps": 4 if size <= 32 else 8, "num_stages": 1}
    return {"BT": 64, "BN": 64, "BH": size, "num_warps": 4 if size <= 32 else 8, "num_stages": 2}


def memory_tiles(dtype: torch.dtype, head: int, generation: int) -> dict[str, int]:
    """The same for d_k and d_v, whose two accumulators leave less room for tokens."""
    sizes = tiles(dtype, head)
    if sizes["BH"] > 64:
        return sizes | {"BT": min(32, sizes["BT"])}
    return sizes | room(generation) if sizes["BH"] == 64 else sizes


@triton.jit(do_not_specialize=["tokens", "slots", "heads"])
def query_kernel(
    q,  # [B, L, M]
    span,  # [B, L] bytes
    route,  # [B] int64
    start,  # [N] int64
    length,  # [N] int64
    k,  # [T, M]
    v,  # [T, M]
    d_o,  # [B, L, M]
    lse,  # [B, H, L] fp32, log2
    delta,  # [B, H, L] fp32, rowsum(d_o * o)
    d_q,  # [B, L, M] out
    tokens,
    heads,
    head,
    slots,
    scale,
    BT: tl.constexpr,
    BN: tl.constexpr,
    BH: tl.constexpr,
):
    """Gradient of the projected queries: one program a row, head and block of its tokens."""
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
    p_l = (i_b * heads + i_h) * tokens + o_t
    # [BT, BH]
    b_q = tl.load(q + p_q, mask=m_q, other=0.0)
    # [BT, BH]
    b_do = tl.load(d_o + p_q, mask=m_q, other=0.0)
    # [BT]
    b_lse = tl.load(lse + p_l, mask=m_t, other=0.0)
    # [BT]
    b_delta = tl.load(delta + p_l, mask=m_t, other=0.0)
    b_dq = tl.zeros([BT, BH], tl.float32)
    p_k = (first + o_n)[:, None] * size + i_h * head + o_h[None, :]
    for i_n in range(0, count, BN):
        m_n = i_n + o_n < count
        m_k = m_n[:, None] & m_h[None, :]
        # [BN, BH]
        b_k = tl.load(k + p_k, mask=m_k, other=0.0)
        # [BN, BH]
        b_v = tl.load(v + p_k, mask=m_k, other=0.0)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * (scale * 1.4426950408889634)
        b_p = tl.where(m_n[None, :], tl.exp2(b_s - b_lse[:, None]), 0.0)
        b_dp = tl.dot(b_do, tl.trans(b_v), input_precision="ieee")
        b_ds = b_p * (b_dp - b_delta[:, None]) * scale
        b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision="ieee")
        p_k += BN * size
    tl.store(d_q + p_q, b_dq.to(d_q.dtype.element_ty), mask=m_q)


@triton.jit(do_not_specialize=["rows", "tokens", "slots", "heads", "total"])
def memory_kernel(
    q,  # [B, L, M]
    span,  # [B, L] bytes
    route,  # [B] int64
    start,  # [N] int64
    length,  # [N] int64
    k,  # [T, M]
    v,  # [T, M]
    d_o,  # [B, L, M]
    lse,  # [B, H, L] fp32, log2
    delta,  # [B, H, L] fp32, rowsum(d_o * o)
    d_k,  # [T, M] out if NEEDS_K
    d_v,  # [T, M] out if NEEDS_V
    rows,
    tokens,
    heads,
    head,
    slots,
    total,
    scale,
    NEEDS_K: tl.constexpr,
    NEEDS_V: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
    BH: tl.constexpr,
):
    """Gradients of an edit's keys and values: one program an edit, head and block of its tokens."""
    i_h = tl.program_id(1)
    size = heads * head
    i_n = tl.program_id(0).to(tl.int64) * BN
    o_n, o_h = i_n + tl.arange(0, BN), tl.arange(0, BH)
    m_h = o_h < head
    m_k = (o_n < total)[:, None] & m_h[None, :]
    p_k = o_n[:, None] * size + i_h * head + o_h[None, :]
    # [BN, BH]
    b_k = tl.load(k + p_k, mask=m_k, other=0.0)
    # [BN, BH]
    b_v = tl.load(v + p_k, mask=m_k, other=0.0)
    b_dk = tl.zeros([BN, BH], tl.float32)
    b_dv = tl.zeros([BN, BH], tl.float32)
    for i_b in range(0, rows):
        first, count = slot_of(i_b, route, start, length, slots)
        last = first + count
        if (count > 0) & (first < i_n + BN) & (last > i_n):
            m_n = (o_n >= first) & (o_n < last)
            for i_t in range(0, tokens, BT):
                o_t = i_t + tl.arange(0, BT)
                m_t = span_of(span, i_b, o_t, tokens)
                if tl.max(m_t.to(tl.int32), 0) > 0:
                    o_row = i_b * tokens + o_t.to(tl.int64)
                    p_q = o_row[:, None] * size + i_h * head + o_h[None, :]
                    p_l = (i_b * heads + i_h) * tokens + o_t
                    m_q = m_t[:, None] & m_h[None, :]
                    # [BT, BH]
                    b_q = tl.load(q + p_q, mask=m_q, other=0.0)
                    # [BT, BH]
                    b_do = tl.load(d_o + p_q, mask=m_q, other=0.0)
                    # [BT]
                    b_lse = tl.load(lse + p_l, mask=m_t, other=0.0)
                    b_s = tl.dot(b_k, tl.trans(b_q), input_precision="ieee") * (scale * 1.4426950408889634)
                    b_p = tl.where(m_n[:, None] & m_t[None, :], tl.exp2(b_s - b_lse[None, :]), 0.0)
                    if NEEDS_V:
                        b_dv = tl.dot(b_p.to(b_do.dtype), b_do, b_dv, input_precision="ieee")
                    if NEEDS_K:
                        # [BT]
                        b_delta = tl.load(delta + p_l, mask=m_t, other=0.0)
                        b_dp = tl.dot(b_v, tl.trans(b_do), input_precision="ieee")
                        b_ds = b_p * (b_dp - b_delta[None, :]) * scale
                        b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision="ieee")
    if NEEDS_K:
        tl.store(d_k + p_k, b_dk.to(d_k.dtype.element_ty), mask=m_k)
    if NEEDS_V:
        tl.store(d_v + p_k, b_dv.to(d_v.dtype.element_ty), mask=m_k)
