"""`nearest_key` in Triton: exact differences, the keys split over the GPU, one launch.

Each block, for a tile of queries and a share of the keys:
    distance^2 = sum_d (q_d - k_d)^2, in fp32; the smallest of the share and its lowest index.
    For the cosine metric q and k are scaled to length 1 first: |q/|q| - k/|k||^2 / 2 = 1 - cos(q, k).
The block of a tile that is done last takes the smallest over all shares, and asks for the radius of that key.

The same result whatever the split and the order: minima do not depend on it, and ties go to the lowest index.
Up to `FEW_KEYS` keys have one share and one query to a block. `gated_edit_attention` then decides its gate by
the same functions and tiles, so both give the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_support import counters, on_device, power_of_two, processors

FEW_KEYS = 8
_MOST_PARTS = 1024
_AT_ONCE = 2048  # minima of shares that the last block compares at a time


def nearest_key(query: Tensor, keys: Tensor, radius: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    """See `dualedit_kernels.nearest_key`: query [B, D], keys [N, D], radius [N] fp32."""
    return _launch(query if query.stride(1) == 1 else query.contiguous(), None, keys, radius, metric)


def nearest_key_at(
    hidden: Tensor, last: Tensor, keys: Tensor, radius: Tensor, metric: str
) -> tuple[Tensor, Tensor]:
    """The same for the queries hidden[b, last[b]] of hidden [B, L, D], read where they are.

    last: [B] int64, negative from the end; one that is no token of its row finds nothing.
    """
    return _launch(hidden if hidden.stride(2) == 1 else hidden.contiguous(), last, keys, radius, metric)


def _launch(
    query: Tensor, last: Tensor | None, keys: Tensor, radius: Tensor, metric: str
) -> tuple[Tensor, Tensor]:
    rows, dim = query.shape[0], query.shape[-1]
    count = keys.shape[0]
    index = torch.empty(rows, dtype=torch.int64, device=query.device)
    distance = torch.empty(rows, dtype=torch.float32, device=query.device)
    if rows == 0 or count == 0 or dim == 0:
        return index.fill_(-1), distance.fill_(torch.inf)
    keys = rows_together(keys)
    tiles = configuration(rows, count, dim)
    blocks = triton.cdiv(rows, tiles["BB"])
    share, parts = count, 1
    if count > FEW_KEYS:
        share, parts = split(count, tiles["BN"], max(1, 4 * processors(query) // blocks))
    alone = parts == 1
    best, nearest, counter = distance, index, index  # nobody looks at them where a block is alone
    if not alone:
        best = torch.empty(parts, rows, dtype=torch.float32, device=query.device)
        nearest = torch.empty(parts, rows, dtype=torch.int32, device=query.device)
    with on_device(query):
        if not alone:
            counter = counters(query, blocks)
        scan_kernel[(blocks, parts)](
            query,
            index if last is None else last.contiguous(),
            keys,
            radius.contiguous(),
            best,
            nearest,
            counter,
            index,
            distance,
            rows,
            1 if last is None else query.shape[1],
            count,
            dim,
            share,
            query.stride(0),
            0 if last is None else query.stride(1),
            keys.stride(0),
            LAST=last is not None,
            COSINE=metric == "cosine",
            ALONE=alone,
            BP=min(power_of_two(parts), _MOST_PARTS, _AT_ONCE // tiles["BB"]),
            **tiles,
        )
    return index, distance


def rows_together(keys: Tensor) -> Tensor:
    """Keys [N, D] whose rows are each in one piece."""
    return keys if keys.stride(1) == 1 else keys.contiguous()


def configuration(rows: int, count: int, dim: int) -> dict[str, int]:
    """Tile sizes: BB queries by BN keys, BK elements at a time (BB * BN * BK fp32 accumulators).

    maxnreg: where the assembler, left alone, spills eight bytes to fit one block more to a multiprocessor.
    """
    fixed = {"num_warps": 4, "num_stages": 3}
    if count <= FEW_KEYS:  # does not depend on ``rows``: see the top of this file
        return fixed | {"BB": 1, "BN": power_of_two(count), "BK": 128 if dim <= 128 else 256, "maxnreg": 96}
    size = min(power_of_two(rows), 8)
    wide = 128 if dim <= 128 or size >= 4 else 256
    tiles = fixed | {"BB": size, "BN": 16 if size <= 2 else 8, "BK": wide}
    return tiles | {"maxnreg": 168} if size == 2 else tiles


def split(count: int, block: int, wanted: int) -> tuple[int, int]:
    """(keys of a share, a multiple of ``block``; number of shares, at most ``wanted`` and 1024)."""
    share = triton.cdiv(triton.cdiv(count, min(wanted, _MOST_PARTS)), block) * block
    return share, triton.cdiv(count, share)


@triton.jit(do_not_specialize=["rows", "tokens", "count", "share"])
def scan_kernel(
    query,  # [B, D], rows stride_b apart; [B, L, D] with tokens stride_t apart if LAST
    last,  # [B] int64 if LAST
    keys,  # [N, D], rows stride_k apart
    radius,  # [N] fp32
    best,  # [parts, B] fp32 out unless ALONE: smallest squared distance of each share
    nearest,  # [parts, B] int32 out unless ALONE: its lowest index
    counter,  # [blocks] int32 unless ALONE: zeros before and after, the shares that are done in between
    index,  # [B] int64 out
    distance,  # [B] fp32 out
    rows,
    tokens,
    count,
    dim,
    share,
    stride_b,
    stride_t,
    stride_k,
    LAST: tl.constexpr,
    COSINE: tl.constexpr,
    ALONE: tl.constexpr,
    BP: tl.constexpr,
    BB: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Nearest key of each query within one share of the keys; the last share's block answers for all."""
    i_b, i_part = tl.program_id(0), tl.program_id(1)
    o_b = i_b * BB + tl.arange(0, BB)
    m_b = o_b < rows
    # [BB]
    b_at = tl.zeros([BB], tl.int64)
    if LAST:
        b_at, m_known = position_of(tl.load(last + o_b, mask=m_b, other=0), tokens)
        m_q = m_b & m_known
    else:
        m_q = m_b
    p_q = query + (o_b.to(tl.int64) * stride_b + b_at * stride_t)[:, None] + tl.arange(0, BK)[None, :]
    first = i_part * share
    until = tl.minimum(first + share, count)
    b_best, b_nearest = nearest_of(p_q, m_q, keys, first, until, dim, stride_k, COSINE, BB, BN, BK)
    if ALONE:
        _answer(b_best, b_nearest, radius, index, distance, o_b, m_b, COSINE)
    else:
        p_out = i_part.to(tl.int64) * rows + o_b
        tl.store(best + p_out, b_best, mask=m_b)
        tl.store(nearest + p_out, b_nearest, mask=m_b)
        # All threads have written before one counts: what it releases, the block that counts last acquires.
        tl.debug_barrier()
        parts = tl.num_programs(1)
        if tl.atomic_add(counter + i_b, 1, sem="acq_rel", scope="gpu") == parts - 1:
            b_best = tl.full([BB], float("inf"), tl.float32)
            b_nearest = tl.full([BB], -1, tl.int32)
            for i_p in range(0, parts, BP):
                o_p = i_p + tl.arange(0, BP)
                m_p = m_b[:, None] & (o_p < parts)[None, :]
                p_in = o_p.to(tl.int64)[None, :] * rows + o_b[:, None]
                # [BB, BP], past the cache of this processor, which does not see the others' writes
                b_each = tl.load(best + p_in, mask=m_p, other=float("inf"), cache_modifier=".cg")
                # [BB, BP]
                b_which = tl.load(nearest + p_in, mask=m_p, other=2147483647, cache_modifier=".cg")
                b_smallest = tl.min(b_each, 1)
                b_index = tl.min(tl.where(b_each == b_smallest[:, None], b_which, 2147483647), 1)
                closer = b_smallest < b_best  # strict: an earlier share keeps a tie
                b_best = tl.where(closer, b_smallest, b_best)
                b_nearest = tl.where(closer, b_index, b_nearest)
            _answer(b_best, b_nearest, radius, index, distance, o_b, m_b, COSINE)
            tl.store(counter + i_b, 0)  # for the next launch, be it a replay of a CUDA graph


@triton.jit
def position_of(last, tokens):
    """(position among ``tokens``, whether there is one) of positions that may count from the end."""
    last = tl.where(last < 0, last + tokens, last)
    known = (last >= 0) & (last < tokens)
    return tl.where(known, last, 0), known


@triton.jit
def nearest_of(
    p_q, m_q, keys, first, until, dim, stride_k, COSINE: tl.constexpr, BB: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    """(smallest squared distance [BB], its lowest index [BB]) among keys first .. until.

    p_q: [BB, BK], where the first BK elements of each query are. m_q: [BB] bool; the others find nothing.
    """
    o_k = tl.arange(0, BK)
    b_scale_q = tl.full([BB], 1.0, tl.float32)
    if COSINE:
        b_scale_q = 1.0 / _length(p_q, m_q, o_k, dim, BB, BK)
    b_best = tl.full([BB], float("inf"), tl.float32)
    b_nearest = tl.full([BB], -1, tl.int32)
    for i_n in range(first, until, BN):
        o_n = i_n + tl.arange(0, BN)
        m_n = o_n < until
        p_k = keys + o_n.to(tl.int64)[:, None] * stride_k + o_k[None, :]
        b_scale_k = tl.full([BN], 1.0, tl.float32)
        if COSINE:
            b_scale_k = 1.0 / _length(p_k, m_n, o_k, dim, BN, BK)
        b_squares = tl.zeros([BB, BN, BK], tl.float32)
        for i_k in range(0, dim, BK):
            m_k = (i_k + o_k < dim)[None, :]
            # [BB, BK]
            b_q = tl.load(p_q + i_k, mask=m_q[:, None] & m_k, other=0.0).to(tl.float32)
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
        m_near = (b_squared < float("inf")) & m_n[None, :] & m_q[:, None]
        b_squared = tl.where(m_near, b_squared, float("inf"))
        b_smallest = tl.min(b_squared, 1)
        b_index = tl.min(tl.where(b_squared == b_smallest[:, None], o_n[None, :], 2147483647), 1)
        closer = b_smallest < b_best  # strict: an earlier key keeps a tie
        b_best = tl.where(closer, b_smallest, b_best)
        b_nearest = tl.where(closer, b_index, b_nearest)
    return b_best, b_nearest


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


@triton.jit
def within(b_best, b_nearest, radius, COSINE: tl.constexpr):
    """(distance, index or -1) of the nearest keys, from their squared distances and their radii."""
    found = b_best < float("inf")
    b_distance = b_best * 0.5 if COSINE else tl.sqrt_rn(b_best)
    b_limit = tl.load(radius + b_nearest, mask=found, other=0.0)
    return b_distance, tl.where(found & (b_distance <= b_limit), b_nearest, -1)


@triton.jit
def _answer(b_best, b_nearest, radius, index, distance, o_b, m_b, COSINE: tl.constexpr):
    b_distance, b_index = within(b_best, b_nearest, radius, COSINE)
    tl.store(distance + o_b, b_distance, mask=m_b)
    tl.store(index + o_b, b_index.to(tl.int64), mask=m_b)
