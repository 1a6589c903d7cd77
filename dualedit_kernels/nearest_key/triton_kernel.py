"""`nearest_key` in Triton: exact differences, the keys split over the GPU, two stages, no atomics.

Stage 1, for each tile of queries and each share of the keys:
    distance^2 = sum_d (q_d - k_d)^2, in fp32; the smallest of the share and its lowest index.
    For the cosine metric q and k are scaled to length 1 first: |q/|q| - k/|k||^2 / 2 = 1 - cos(q, k).
Stage 2, for each query: the smallest over all shares, then the radius of that key.

The same result whatever the split: minima do not depend on the order, and ties go to the lowest index.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_support import on_device, power_of_two, processors


def nearest_key(query: Tensor, keys: Tensor, radius: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    """See `dualedit_kernels.nearest_key`: query [B, D], keys [N, D], radius [N] fp32."""
    rows, dim = query.shape
    count = keys.shape[0]
    index = torch.empty(rows, dtype=torch.int64, device=query.device)
    distance = torch.empty(rows, dtype=torch.float32, device=query.device)
    if rows == 0 or count == 0 or dim == 0:
        return index.fill_(-1), distance.fill_(torch.inf)
    query, keys = (t if t.stride(1) == 1 else t.contiguous() for t in (query, keys))
    tiles = configuration(rows, dim)
    blocks = triton.cdiv(rows, tiles["BB"])
    share, parts = split(count, tiles["BN"], max(1, 4 * processors(query) // blocks))
    best = torch.empty(parts, rows, dtype=torch.float32, device=query.device)
    nearest = torch.empty(parts, rows, dtype=torch.int32, device=query.device)
    with on_device(query):
        scan_kernel[(blocks, parts)](
            query,
            keys,
            best,
            nearest,
            rows,
            count,
            dim,
            share,
            query.stride(0),
            keys.stride(0),
            COSINE=metric == "cosine",
            **tiles,
        )
        finish_kernel[(rows,)](
            best,
            nearest,
            radius.contiguous(),
            index,
            distance,
            rows,
            parts,
            COSINE=metric == "cosine",
            PARTS=power_of_two(parts),
            num_warps=1,
        )
    return index, distance


def configuration(rows: int, dim: int) -> dict[str, int]:
    """Tile sizes: BB queries by BN keys, BK elements at a time (BB * BN * BK fp32 accumulators)."""
    size = min(power_of_two(rows), 8)
    wide = 128 if dim <= 128 or size >= 4 else 256
    return {"BB": size, "BN": 16 if size <= 2 else 8, "BK": wide, "num_warps": 4, "num_stages": 3}


def split(count: int, block: int, wanted: int) -> tuple[int, int]:
    """(keys of a share, a multiple of ``block``; number of shares, at most ``wanted`` and 1024)."""
    share = triton.cdiv(triton.cdiv(count, min(wanted, 1024)), block) * block
    return share, triton.cdiv(count, share)


@triton.jit(do_not_specialize=["rows", "count", "share"])
def scan_kernel(
    query,  # [B, D], rows stride_q apart
    keys,  # [N, D], rows stride_k apart
    best,  # [parts, B] fp32 out: smallest squared distance of each share
    nearest,  # [parts, B] int32 out: its lowest index
    rows,
    count,
    dim,
    share,
    stride_q,
    stride_k,
    COSINE: tl.constexpr,
    BB: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Nearest key of each query within one share of the keys."""
    i_b, i_part = tl.program_id(0), tl.program_id(1)
    o_b = i_b * BB + tl.arange(0, BB)
    m_b = o_b < rows
    o_k = tl.arange(0, BK)
    p_q = query + o_b.to(tl.int64)[:, None] * stride_q + o_k[None, :]
    b_scale_q = tl.full([BB], 1.0, tl.float32)
    if COSINE:
        b_scale_q = 1.0 / _length(p_q, m_b, o_k, dim, BB, BK)

    b_best = tl.full([BB], float("inf"), tl.float32)
    b_nearest = tl.full([BB], -1, tl.int32)
    first = i_part * share
    last = tl.minimum(first + share, count)
    for i_n in range(first, last, BN):
        o_n = i_n + tl.arange(0, BN)
        m_n = o_n < last
        p_k = keys + o_n.to(tl.int64)[:, None] * stride_k + o_k[None, :]
        b_scale_k = tl.full([BN], 1.0, tl.float32)
        if COSINE:
            b_scale_k = 1.0 / _length(p_k, m_n, o_k, dim, BN, BK)
        b_squares = tl.zeros([BB, BN, BK], tl.float32)
        for i_k in range(0, dim, BK):
            m_k = (i_k + o_k < dim)[None, :]
            # [BB, BK]
            b_q = tl.load(p_q + i_k, mask=m_b[:, None] & m_k, other=0.0).to(tl.float32)
            # [BN, BK]
            b_k = tl.load(p_k + i_k, mask=m_n[:, None] & m_k, other=0.0).to(tl.float32)
            if COSINE:
                b_q *= b_scale_q[:, None]
                b_k *= b_scale_k[:, None]
                # 0 * inf would make the columns beyond D NaN where a vector has no length
                b_q = tl.where(m_k, b_q, 0.0)
                b_k = tl.where(m_k, b_k, 0.0)
            b_difference = b_q[:, None, :] - b_k[None, :, :]
            b_squares = tl.fma(b_difference, b_difference, b_squares)
        b_squared = tl.sum(b_squares, 2)  # [BB, BN]
        # NaN and inf compare false: such a key is never near
        b_squared = tl.where((b_squared < float("inf")) & m_n[None, :], b_squared, float("inf"))
        b_smallest = tl.min(b_squared, 1)
        b_index = tl.min(tl.where(b_squared == b_smallest[:, None], o_n[None, :], 2147483647), 1)
        closer = b_smallest < b_best  # strict: an earlier key keeps a tie
        b_best = tl.where(closer, b_smallest, b_best)
        b_nearest = tl.where(closer, b_index, b_nearest)
    p_out = i_part.to(tl.int64) * rows + o_b
    tl.store(best + p_out, b_best, mask=m_b)
    tl.store(nearest + p_out, b_nearest, mask=m_b)


@triton.jit
def _length(p_rows, m_rows, o_k, dim, BR: tl.constexpr, BK: tl.constexpr):
    """Euclidean length [BR] of rows whose first BK elements are at p_rows [BR, BK]."""
    b_squares = tl.zeros([BR, BK], tl.float32)
    for i_k in range(0, dim, BK):
        # [BR, BK]
        b_x = tl.load(p_rows + i_k, mask=m_rows[:, None] & (i_k + o_k < dim)[None, :], other=0.0).to(
            tl.float32
        )
        b_squares += b_x * b_x
    return tl.sqrt_rn(tl.sum(b_squares, 1))


@triton.jit(do_not_specialize=["rows", "parts"])
def finish_kernel(
    best,  # [parts, B] fp32
    nearest,  # [parts, B] int32
    radius,  # [N] fp32
    index,  # [B] int64 out
    distance,  # [B] fp32 out
    rows,
    parts,
    COSINE: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Nearest key over all shares, and whether it lies inside its radius: one program a query."""
    i_b = tl.program_id(0)
    o_part = tl.arange(0, PARTS)
    m_part = o_part < parts
    p_in = o_part.to(tl.int64) * rows + i_b
    # [PARTS]
    b_best = tl.load(best + p_in, mask=m_part, other=float("inf"))
    # [PARTS]
    b_nearest = tl.load(nearest + p_in, mask=m_part, other=2147483647)
    smallest = tl.min(b_best, 0)
    winner = tl.min(tl.where(b_best == smallest, b_nearest, 2147483647), 0)
    found = smallest < float("inf")
    reached = smallest * 0.5 if COSINE else tl.sqrt_rn(smallest)
    # []
    limit = tl.load(radius + winner, mask=found, other=0.0)
    tl.store(distance + i_b, reached)
    tl.store(index + i_b, tl.where(found & (reached <= limit), winner, -1).to(tl.int64))
