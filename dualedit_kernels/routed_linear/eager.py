"""Routed linear in batched PyTorch, forward and backward, for any device: only routed rows are touched."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor


def low_rank(base: Tensor, x: Tensor, down: Tensor, up: Tensor, index: Tensor) -> Tensor:
    """See `dualedit_kernels.routed_linear` (LowRank)."""
    if base.device.type == "cpu" and base.dtype == x.dtype:
        return _low_rank_runs(base, x, down, up, index)
    out = base.clone(memory_format=torch.contiguous_format)
    rows, slots = _open(index, len(down))
    if len(rows):
        inner = torch.bmm(x[rows], down[slots].transpose(1, 2))  # [R, L, rank]
        delta = torch.bmm(inner, up[slots].transpose(1, 2)).to(out.dtype)  # [R, L, O]
        out.index_copy_(0, rows, base[rows] + delta)
    return out


def _low_rank_runs(base: Tensor, x: Tensor, down: Tensor, up: Tensor, index: Tensor) -> Tensor:
    """On the CPU, where calls are cheap and copies are not: one product for each run of equal routes."""
    routes = index.tolist()
    if max(routes, default=-1) >= len(down):
        raise IndexError(_beyond(max(routes), len(down)))
    out = base.clone(memory_format=torch.contiguous_format)
    first = 0
    for last in range(1, len(routes) + 1):
        if last < len(routes) and routes[last] == routes[first]:
            continue
        slot, rows = routes[first], slice(first, last)
        if slot >= 0:
            inner = x[rows].flatten(0, 1) @ down[slot].t()  # [rows * L, rank]
            out[rows].flatten(0, 1).addmm_(inner, up[slot].t())
        first = last
    return out


def low_rank_backward(
    grad: Tensor, x: Tensor, down: Tensor, up: Tensor, index: Tensor, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of (x, down, up); one that is not needed comes back empty."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    d_x = torch.zeros_like(x, memory_format=torch.contiguous_format) if needs[0] else x.new_empty(0)
    d_down = torch.zeros_like(down, dtype=wide) if needs[1] else down.new_empty(0)
    d_up = torch.zeros_like(up, dtype=wide) if needs[2] else up.new_empty(0)
    rows, slots = _open(index, len(down))
    if len(rows):
        g, x = grad[rows].to(x.dtype), x[rows]
        inner = torch.bmm(g, up[slots])  # [R, L, rank]
        if needs[0]:
            d_x.index_copy_(0, rows, torch.bmm(inner, down[slots]))
        if needs[1]:
            d_down.index_add_(0, slots, torch.bmm(inner.transpose(1, 2), x).to(wide))
        if needs[2]:
            hidden = torch.bmm(x, down[slots].transpose(1, 2))
            d_up.index_add_(0, slots, torch.bmm(g.transpose(1, 2), hidden).to(wide))
    return d_x, d_down.to(down.dtype), d_up.to(up.dtype)


def full(base: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor) -> Tensor:
    """See `dualedit_kernels.routed_linear` (Full)."""
    out = base.clone(memory_format=torch.contiguous_format)
    for slot, rows in _groups(index, len(weight)):
        y = F.linear(x[rows].flatten(0, 1), weight[slot], bias)
        out.index_copy_(0, rows, y.unflatten(0, (len(rows), -1)).to(out.dtype))
    return out


def full_backward(
    grad: Tensor, x: Tensor, weight: Tensor, index: Tensor, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of (base, x, weight, bias); one that is not needed comes back empty."""
    rows, _ = _open(index, len(weight))
    d_base = grad.index_fill(0, rows, 0) if needs[0] else grad.new_empty(0)
    d_x = torch.zeros_like(x, memory_format=torch.contiguous_format) if needs[1] else x.new_empty(0)
    d_weight = torch.zeros_like(weight) if needs[2] else weight.new_empty(0)
    d_bias = grad[rows].to(x.dtype).sum((0, 1)) if needs[3] else x.new_empty(0)
    for slot, group in _groups(index, len(weight)):
        g = grad[group].to(x.dtype).flatten(0, 1)
        if needs[1]:
            d_rows = g @ weight[slot]
            d_x.index_copy_(0, group, d_rows.unflatten(0, (len(group), -1)))
        if needs[2]:
            d_weight[slot] = g.t() @ x[group].flatten(0, 1)
    return d_base, d_x, d_weight, d_bias


def _open(index: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Rows that are routed, and their slots. Raises IndexError for a route beyond the last slot."""
    rows = (index >= 0).nonzero().squeeze(1)
    slots = index[rows]
    if len(rows) and int(slots.max()) >= count:
        raise IndexError(_beyond(int(slots.max()), count))
    return rows, slots


def _beyond(slot: int, count: int) -> str:
    return f"index holds {slot}, but there are {count} values: route to a stored value or to -1."


def _groups(index: Tensor, count: int) -> Iterator[tuple[int, Tensor]]:
    """Each slot that is routed to, with its rows."""
    rows, slots = _open(index, count)
    for slot in slots.unique().tolist():
        yield slot, rows[slots == slot]
