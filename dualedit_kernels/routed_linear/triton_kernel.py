"""Routed linear in Triton, forward and backward: each row reads the weights of its slot in place.

LowRank: ``y = base + (x @ down[i].T) @ up[i].T``, a shrink to the rank (the input split over the GPU when
there are few tokens) and an expansion that adds the base. Full: ``y = x @ weight[i].T + bias``. Rows without
a slot exit at once, or copy the base bit for bit where something must be written. Gradients of the values are
summed slot by slot in the order of the rows, without atomics: equal inputs give equal bits.

The slots are read on the device, nothing waits for the GPU, and grids depend on shapes alone: a CUDA graph
can capture every call. A slot beyond the last value cannot raise here: its row is treated as -1.

Source: BalancEdit (arXiv:2505.01343); products of many small weights as in Punica (arXiv:2310.18547).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_support import generation, on_device, power_of_two, processors, room


def low_rank(base: Tensor, x: Tensor, down: Tensor, up: Tensor, index: Tensor) -> Tensor:
    """`routed_linear` with LowRank: x [B, L, I], down [N, R, I], up [N, O, R], base [B, L, O]."""
    base = base.contiguous()
    inner = _shrink(x.contiguous(), down, index, parts=_parts(x, down.shape[1]))
    return _expand(base, inner, up, index, torch.empty_like(base))


def low_rank_backward(
    grad: Tensor, x: Tensor, down: Tensor, up: Tensor, index: Tensor, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of (x, down, up); one that is not needed comes back empty."""
    x, g = x.contiguous(), grad.to(x.dtype).contiguous()
    d_x = d_down = d_up = x.new_empty(0)
    if needs[0] or needs[1]:
        inner = _shrink(g, up.transpose(1, 2), index, parts=1)
        if needs[0]:
            d_x = _expand(None, inner, down.transpose(1, 2), index, torch.empty_like(x))
        if needs[1]:
            d_down = _outer(inner[0], x, index, torch.empty_like(down, memory_format=torch.contiguous_format))
    if needs[2]:
        inner = _shrink(x, down, index, parts=1)
        d_up = _outer(g, inner[0], index, torch.empty_like(up, memory_format=torch.contiguous_format))
    return d_x, d_down, d_up


def full(base: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor) -> Tensor:
    """`routed_linear` with Full: x [B, L, I], weight [N, O, I], bias [O], base [B, L, O]."""
    base, bias = base.contiguous(), None if bias is None else bias.contiguous()
    return _project(base, x.contiguous(), weight, bias, index, torch.empty_like(base))


def full_backward(
    grad: Tensor, x: Tensor, weight: Tensor, index: Tensor, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of (base, x, weight, bias); one that is not needed comes back empty."""
    x, g = x.contiguous(), grad.to(x.dtype).contiguous()
    d_base, d_x, d_weight, d_bias = grad.new_empty(0), *(x.new_empty(0) for _ in range(3))
    routed = ((index >= 0) & (index < len(weight)))[:, None, None]
    if needs[0]:
        d_base = torch.where(routed, 0, grad).contiguous()
    if needs[1]:
        d_x = _project(None, g, weight.transpose(1, 2), None, index, torch.empty_like(x))
    if needs[2]:
        d_weight = _outer(g, x, index, torch.empty_like(weight, memory_format=torch.contiguous_format))
    if needs[3]:
        d_bias = torch.where(routed, g, 0).sum((0, 1))
    return d_base, d_x, d_weight, d_bias


def tiles(dtype: torch.dtype, tokens: int, generation: int) -> dict[str, int]:
    """Tile sizes of the products: BT tokens by BO outputs, BK elements at a time.

    generation: major compute capability; see `triton_support.room`.
    """
    if tokens <= 16:  # decoding
        # Reading the weight is all there is to it: narrow tiles make programs for every processor of a GPU.
        exact = dtype == torch.float32
        stages = 2 if exact and generation >= 10 else 3  # a third spills there
        return {"BT": 16, "BO": 64, "BK": 32 if exact else 128, "num_warps": 4, "num_stages": stages}
    if dtype == torch.float32:
        return {"BT": 64, "BO": 64, "BK": 32, "num_warps": 8, "num_stages": 3}
    if tokens <= 64:
        return {"BT": 64, "BO": 64, "BK": 64, "num_warps": 4, "num_stages": 4}
    return {"BT": 128, "BO": 128, "BK": 64, "num_warps": 8, "num_stages": 3}


def shrink_tiles(dtype: torch.dtype, tokens: int, rank: int) -> dict[str, int]:
    """Tile sizes of the shrink: BT tokens by BR ranks, BK elements at a time."""
    few = tokens <= 16
    if dtype == torch.float32:
        size = {"BK": 64, "num_warps": 4} if few else {"BK": 32, "num_warps": 8}
    else:
        size = {"BK": 128, "num_warps": 4}
    return {"BT": 16 if few else 64, "BR": rank_tile(rank), **size, "num_stages": 3}


def expand_tiles(dtype: torch.dtype, tokens: int, rank: int, generation: int) -> dict[str, int]:
    """Tile sizes of the expansion: BT tokens by BO outputs, BR ranks at a time."""
    few, size = tokens <= 16, rank_tile(rank)
    wide = 64 if dtype == torch.float32 or size > 32 else 128
    ranks = min(32, size) if dtype == torch.float32 else size
    warps = 4 if few else 8
    sizes = {"BT": 16 if few else 64, "BO": wide, "BR": ranks, "num_warps": warps, "num_stages": 1}
    return sizes | room(generation) if dtype == torch.float32 and not few else sizes


def outer_tiles(dtype: torch.dtype, left: int, right: int) -> dict[str, int]:
    """Tile sizes of the sums of outer products: BL by BR elements of a slot, BT tokens at a time."""
    limit = 64 if dtype == torch.float32 else 128
    size = {"BL": min(limit, max(16, power_of_two(left))), "BR": min(limit, max(16, power_of_two(right)))}
    many = size["BL"] * size["BR"] >= (32 * 64 if dtype == torch.float32 else 64 * 128)
    return {**size, "BT": 32, "num_warps": 8 if many else 4, "num_stages": 3}


def rank_tile(rank: int) -> int:
    """Ranks at a time: a tensor core takes at least 16."""
    return min(64, max(16, power_of_two(rank)))


def _parts(x: Tensor, rank: int) -> int:
    """Into how many parts the input of a shrink is split, so that few tokens still fill the GPU.

    The expansion adds the parts up in registers, so large tiles and ranks allow fewer.
    """
    rows, tokens, size = x.shape
    few = tokens <= 16
    blocks = rows * triton.cdiv(tokens, 16 if few else 64)
    return max(1, min(8 if few and rank <= 32 else 4, processors(x) // max(1, blocks), size // 256))


def _shrink(x: Tensor, down: Tensor, index: Tensor, parts: int) -> Tensor:
    """[parts, B, L, R] fp32: x [B, L, I] @ down[i].T by parts of I; rows without a slot stay."""
    index = index.contiguous()
    rows, tokens, size = x.shape
    slots, rank, _ = down.shape
    inner = torch.empty(parts, rows, tokens, rank, dtype=torch.float32, device=x.device)
    if not inner.numel():
        return inner
    sizes = shrink_tiles(x.dtype, tokens, rank)
    share = triton.cdiv(triton.cdiv(size, parts), sizes["BK"]) * sizes["BK"]
    grid = (triton.cdiv(tokens, sizes["BT"]) * triton.cdiv(rank, sizes["BR"]), rows, parts)
    with on_device(x):
        shrink_kernel[grid](
            x, down, index, inner, rows, tokens, size, rank, slots, share, *down.stride(), **sizes
        )
    return inner


def _expand(base: Tensor | None, inner: Tensor, up: Tensor, index: Tensor, out: Tensor) -> Tensor:
    """out [B, L, O] = base + inner.sum(0) @ up[i].T; rows without a slot are the base or zero."""
    if not out.numel():
        return out
    index = index.contiguous()
    rows, tokens, outputs = out.shape
    slots, _, rank = up.shape
    sizes = expand_tiles(up.dtype, tokens, rank, generation(out))
    grid = (triton.cdiv(tokens, sizes["BT"]) * triton.cdiv(outputs, sizes["BO"]), rows)
    base_or_none = out if base is None else base
    with on_device(out):
        expand_kernel[grid](
            base_or_none, inner, up, index, out, rows, tokens, outputs, rank, slots, *up.stride(),
            HAS_BASE=base is not None, PARTS=inner.shape[0], **sizes,
        )  # fmt: skip
    return out


def _project(
    base: Tensor | None, x: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor, out: Tensor
) -> Tensor:
    """out [B, L, O] = x @ weight[i].T + bias; rows without a slot are the base or zero."""
    if not out.numel():
        return out
    index = index.contiguous()
    rows, tokens, size = x.shape
    slots, outputs, _ = weight.shape
    sizes = tiles(x.dtype, tokens, generation(x))
    grid = (triton.cdiv(tokens, sizes["BT"]) * triton.cdiv(outputs, sizes["BO"]), rows)
    absent = out  # a pointer that is not read
    with on_device(x):
        project_kernel[grid](
            absent if base is None else base, x, weight, absent if bias is None else bias, index, out,
            tokens, size, outputs, slots, *weight.stride(),
            HAS_BASE=base is not None, HAS_BIAS=bias is not None, **sizes,
        )  # fmt: skip
    return out


def _outer(left: Tensor, right: Tensor, index: Tensor, out: Tensor) -> Tensor:
    """out [N, I, J]: left[b].T @ right[b] summed by slot; left [B, L, I], right [B, L, J]."""
    if not out.numel():
        return out
    index = index.contiguous()
    slots, height, width = out.shape
    rows, tokens, _ = left.shape
    sizes = outer_tiles(out.dtype, height, width)
    grid = (triton.cdiv(height, sizes["BL"]) * triton.cdiv(width, sizes["BR"]), slots)
    with on_device(out):
        outer_kernel[grid](left, right, index, out, rows, tokens, height, width, **sizes)
    return out


@triton.jit(do_not_specialize=["rows", "tokens", "slots"])
def shrink_kernel(
    x,  # [B, L, I]
    down,  # [N, R, I] with strides
    index,  # [B] int64
    inner,  # [parts, B, L, R] fp32 out
    rows,
    tokens,
    size,
    rank,
    slots,
    share,
    stride_n,
    stride_r,
    stride_i,
    BT: tl.constexpr,
    BR: tl.constexpr,
    BK: tl.constexpr,
):
    """The way down of routed rows' low-rank values, in parts of the inputs."""
    i_b, i_part = tl.program_id(1).to(tl.int64), tl.program_id(2)
    # []
    slot = tl.load(index + i_b)
    if (slot < 0) | (slot >= slots):
        return
    count_r = tl.cdiv(rank, BR)
    i_t, i_r = tl.program_id(0) // count_r, tl.program_id(0) % count_r
    o_t = i_t * BT + tl.arange(0, BT)
    o_r = i_r * BR + tl.arange(0, BR)
    o_k = tl.arange(0, BK)
    m_t, m_r = o_t < tokens, o_r < rank
    p_x = x + (i_b * tokens + o_t)[:, None] * size + o_k[None, :]
    p_d = down + slot * stride_n + o_r.to(tl.int64)[None, :] * stride_r
    p_d += (i_part * share + o_k).to(tl.int64)[:, None] * stride_i
    b_inner = tl.zeros([BT, BR], tl.float32)
    for i_k in range(i_part * share, tl.minimum((i_part + 1) * share, size), BK):
        m_k = i_k + o_k < size
        # [BT, BK]
        b_x = tl.load(p_x + i_k, mask=m_t[:, None] & m_k[None, :], other=0.0)
        # [BK, BR]
        b_d = tl.load(p_d, mask=m_k[:, None] & m_r[None, :], other=0.0)
        b_inner = tl.dot(b_x, b_d, b_inner, input_precision="ieee")
        p_d += tl.cast(stride_i, tl.int64) * BK
    p_out = ((i_part.to(tl.int64) * rows + i_b) * tokens + o_t)[:, None] * rank + o_r[None, :]
    tl.store(inner + p_out, b_inner, mask=m_t[:, None] & m_r[None, :])


@triton.jit(do_not_specialize=["rows", "tokens", "slots"])
def expand_kernel(
    base,  # [B, L, O]
    inner,  # [PARTS, B, L, R] fp32
    up,  # [N, O, R] with strides
    index,  # [B] int64
    out,  # [B, L, O] out
    rows,
    tokens,
    outputs,
    rank,
    slots,
    stride_n,
    stride_o,
    stride_r,
    HAS_BASE: tl.constexpr,
    PARTS: tl.constexpr,
    BT: tl.constexpr,
    BO: tl.constexpr,
    BR: tl.constexpr,
):
    """The way up of routed rows' low-rank values, added to the base output."""
    i_b = tl.program_id(1).to(tl.int64)
    count_o = tl.cdiv(outputs, BO)
    i_t, i_o = tl.program_id(0) // count_o, tl.program_id(0) % count_o
    o_t = i_t * BT + tl.arange(0, BT)
    o_o = i_o * BO + tl.arange(0, BO)
    o_r = tl.arange(0, BR)
    m_t, m_o = o_t < tokens, o_o < outputs
    m_out = m_t[:, None] & m_o[None, :]
    p_out = (i_b * tokens + o_t)[:, None] * outputs + o_o[None, :]
    # []
    slot = tl.load(index + i_b)
    if (slot < 0) | (slot >= slots):
        if HAS_BASE:
            # [BT, BO], the same bits
            tl.store(out + p_out, tl.load(base + p_out, mask=m_out), mask=m_out)
        else:
            tl.store(out + p_out, tl.zeros([BT, BO], out.dtype.element_ty), mask=m_out)
        return
    p_u = up + slot * stride_n + o_o.to(tl.int64)[None, :] * stride_o
    b_delta = tl.zeros([BT, BO], tl.float32)
    for i_r in range(0, rank, BR):
        m_r = i_r + o_r < rank
        b_inner = tl.zeros([BT, BR], tl.float32)
        for i_part in tl.static_range(PARTS):
            p_inner = ((i_part * rows + i_b) * tokens + o_t)[:, None] * rank + (i_r + o_r)[None, :]
            # [BT, BR]
            b_inner += tl.load(inner + p_inner, mask=m_t[:, None] & m_r[None, :], other=0.0)
        # [BR, BO]
        b_u = tl.load(
            p_u + (i_r + o_r.to(tl.int64))[:, None] * stride_r, mask=m_r[:, None] & m_o[None, :], other=0.0
        )
        b_delta = tl.dot(b_inner.to(b_u.dtype), b_u, b_delta, input_precision="ieee")
    if HAS_BASE:
        # [BT, BO]
        b_delta += tl.load(base + p_out, mask=m_out, other=0.0).to(tl.float32)
    tl.store(out + p_out, b_delta.to(out.dtype.element_ty), mask=m_out)


@triton.jit(do_not_specialize=["tokens", "slots"])
def project_kernel(
    base,  # [B, L, O]
    x,  # [B, L, I]
    weight,  # [N, O, I] with strides
    bias,  # [O]
    index,  # [B] int64
    out,  # [B, L, O] out
    tokens,
    size,
    outputs,
    slots,
    stride_n,
    stride_o,
    stride_i,
    HAS_BASE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BT: tl.constexpr,
    BO: tl.constexpr,
    BK: tl.constexpr,
):
    """A whole weight of its own for each routed row; the base output where there is none."""
    i_b = tl.program_id(1).to(tl.int64)
    count_o = tl.cdiv(outputs, BO)
    i_t, i_o = tl.program_id(0) // count_o, tl.program_id(0) % count_o
    o_t = i_t * BT + tl.arange(0, BT)
    o_o = i_o * BO + tl.arange(0, BO)
    o_k = tl.arange(0, BK)
    m_t, m_o = o_t < tokens, o_o < outputs
    m_out = m_t[:, None] & m_o[None, :]
    p_out = (i_b * tokens + o_t)[:, None] * outputs + o_o[None, :]
    # []
    slot = tl.load(index + i_b)
    if (slot < 0) | (slot >= slots):
        if HAS_BASE:
            # [BT, BO], the same bits
            tl.store(out + p_out, tl.load(base + p_out, mask=m_out), mask=m_out)
        else:
            tl.store(out + p_out, tl.zeros([BT, BO], out.dtype.element_ty), mask=m_out)
        return
    p_x = x + (i_b * tokens + o_t)[:, None] * size + o_k[None, :]
    p_w = (
        weight + slot * stride_n + o_o.to(tl.int64)[None, :] * stride_o + o_k.to(tl.int64)[:, None] * stride_i
    )
    b_out = tl.zeros([BT, BO], tl.float32)
    for i_k in range(0, size, BK):
        m_k = i_k + o_k < size
        # [BT, BK]
        b_x = tl.load(p_x + i_k, mask=m_t[:, None] & m_k[None, :], other=0.0)
        # [BK, BO]
        b_w = tl.load(p_w, mask=m_k[:, None] & m_o[None, :], other=0.0)
        b_out = tl.dot(b_x, b_w, b_out, input_precision="ieee")
        p_w += tl.cast(stride_i, tl.int64) * BK
    if HAS_BIAS:
        # [BO]
        b_out += tl.load(bias + o_o, mask=m_o, other=0.0).to(tl.float32)[None, :]
    tl.store(out + p_out, b_out.to(out.dtype.element_ty), mask=m_out)


@triton.jit(do_not_specialize=["rows", "tokens"])
def outer_kernel(
    left,  # [B, L, I]
    right,  # [B, L, J]
    index,  # [B] int64
    out,  # [N, I, J] out
    rows,
    tokens,
    height,
    width,
    BL: tl.constexpr,
    BR: tl.constexpr,
    BT: tl.constexpr,
):
    """Gradient of the routed weights: outer products summed over each one's rows and tokens."""
    i_n = tl.program_id(1)
    count_r = tl.cdiv(width, BR)
    i_l, i_r = tl.program_id(0) // count_r, tl.program_id(0) % count_r
    o_l = i_l * BL + tl.arange(0, BL)
    o_r = i_r * BR + tl.arange(0, BR)
    m_l, m_r = o_l < height, o_r < width
    dtype = out.dtype.element_ty
    wide = tokens.to(tl.int64)  # offsets of rows: all rows together may hold more than 2^31 tokens
    b_out = tl.zeros([BL, BR], tl.float32)
    for i_b in range(0, rows):
        # []
        slot = tl.load(index + i_b)
        if slot == i_n:
            for i_t in range(0, tokens, BT):
                o_t = i_t + tl.arange(0, BT)
                m_t = o_t < tokens
                o_row = i_b * wide + o_t
                # [BL, BT]
                b_left = tl.load(
                    left + o_row[None, :] * height + o_l[:, None], mask=m_l[:, None] & m_t[None, :], other=0.0
                )
                # [BT, BR]
                b_right = tl.load(
                    right + o_row[:, None] * width + o_r[None, :], mask=m_t[:, None] & m_r[None, :], other=0.0
                )
                b_out = tl.dot(b_left.to(dtype), b_right.to(dtype), b_out, input_precision="ieee")
    p_out = out + i_n.to(tl.int64) * height * width + o_l.to(tl.int64)[:, None] * width + o_r[None, :]
    tl.store(p_out, b_out.to(dtype), mask=m_l[:, None] & m_r[None, :])
