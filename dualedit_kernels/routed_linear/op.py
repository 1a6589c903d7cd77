"""The public `routed_linear`, with fake implementations, autograd and backends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backend, checks
from ..library import LIBRARY, NAMESPACE
from . import eager, triton_backend
from .reference import routed_full_reference, routed_low_rank_reference


@dataclass(frozen=True, eq=False)
class LowRank:
    """Low-rank updates of a linear layer, one per edit: down [N, R, I] and up [N, O, R]."""

    down: Tensor
    up: Tensor


@dataclass(frozen=True, eq=False)
class Full:
    """Full weights that replace a linear layer's own, one per edit: weight [N, O, I]."""

    weight: Tensor


def routed_linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    values: LowRank | Full,
    index: Tensor,
    base: Tensor | None = None,
) -> Tensor:
    """A linear layer in which each row of the batch uses the value of the edit it is routed to.

    Rows with ``index[b] = i >= 0`` give ``base[b] + (x[b] @ down[i].T) @ up[i].T`` (LowRank) or
    ``x[b] @ weight[i].T + bias`` (Full). Rows with -1 return ``base`` bit for bit.

    Args:
        x: [B, L, I].
        weight: [O, I], the layer's own; may be None when ``base`` is given.
        bias: [O] or None; with Full values it is added to routed rows too.
        values: LowRank(down [N, R, I], up [N, O, R]) or Full(weight [N, O, I]).
        index: [B] int64, the edit of each row or -1 (from `nearest_key`).
        base: [B, L, O], the layer's own output if the caller has it (e.g. from a quantised layer);
            ``linear(x, weight, bias)`` otherwise.

    Returns:
        y: [B, L, O] in the dtype of base; base itself where no gradient is recorded and, on the CPU, no row
        is routed. Products are computed in the dtype of x, values converted to it.

    Differentiable once with respect to x, weight, bias, values and base, not through the index.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device or value.
        IndexError: on the CPU, an index beyond the last value.

    Source: BalancEdit (arXiv:2505.01343), a codebook of layer weights chosen by nearest key.
    """
    checks.tensor("x", x, ("B", "L", "I"), checks.FLOATS, x)
    if weight is not None:
        checks.tensor("weight", weight, ("O", x.shape[2]), checks.FLOATS, x)
        out = weight.shape[0]
    elif base is not None:
        out = base.shape[-1]
    else:
        raise ValueError("weight and base are both None: pass the layer's weight, or its output as base.")
    if bias is not None:
        checks.tensor("bias", bias, (out,), checks.FLOATS, x)
    checks.tensor("index", index, (x.shape[0],), (torch.int64,), x)
    edits = _check_values(values, x, out)
    if base is None:
        assert weight is not None
        base = _base(x, weight, bias, values, index)
    checks.tensor("base", base, (*x.shape[:2], out), checks.FLOATS, x)
    recording = torch.is_grad_enabled() and any(t.requires_grad for t in (x, base, *edits))
    if not recording and checks.nothing_routed(index):
        return base
    edits = [t.to(x.dtype) for t in edits]
    if isinstance(values, LowRank):
        return torch.ops.dualedit_kernels.routed_low_rank(base, x, *edits, index)
    bias = None if bias is None else bias.to(x.dtype)
    return torch.ops.dualedit_kernels.routed_full(base, x, *edits, bias, index)


def _check_values(values: LowRank | Full, x: Tensor, out: int) -> list[Tensor]:
    """The tensors of the values, once their shapes are right."""
    if isinstance(values, LowRank):
        down, up = values.down, values.up
        checks.tensor("values.down", down, ("N", "R", x.shape[2]), checks.FLOATS, x)
        checks.tensor("values.up", up, (down.shape[0], out, down.shape[1]), checks.FLOATS, x)
        return [down, up]
    if isinstance(values, Full):
        checks.tensor("values.weight", values.weight, ("N", out, x.shape[2]), checks.FLOATS, x)
        return [values.weight]
    raise TypeError(f"values is {type(values).__name__}: pass LowRank(down, up) or Full(weight).")


def _base(x: Tensor, weight: Tensor, bias: Tensor | None, values: LowRank | Full, index: Tensor) -> Tensor:
    """The layer's own output, left unwritten where Full values are seen to replace all of it."""
    if isinstance(values, Full) and index.numel() and checks.nothing_routed(-1 - index):
        return x.new_empty(*x.shape[:2], weight.shape[0])  # every index is at least 0
    return F.linear(x, weight, bias)


def _low_rank(base: Tensor, x: Tensor, *args: Any) -> Tensor:
    return backend.run("routed_linear", "low_rank", x, base, x, *args)


def _low_rank_backward(grad: Tensor, x: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return backend.run("routed_linear", "low_rank_backward", x, grad, x, *args)


def _full(base: Tensor, x: Tensor, *args: Any) -> Tensor:
    return backend.run("routed_linear", "full", x, base, x, *args)


def _full_backward(grad: Tensor, x: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return backend.run("routed_linear", "full_backward", x, grad, x, *args)


def _fake(base: Tensor, *args: Any) -> Tensor:
    return torch.empty_like(base, memory_format=torch.contiguous_format)


def _fake_low_rank_backward(
    grad: Tensor, x: Tensor, down: Tensor, up: Tensor, index: Tensor, needs: list[bool]
) -> tuple[Tensor, ...]:
    return tuple(t.new_empty(t.shape if need else (0,)) for t, need in zip((x, down, up), needs, strict=True))


def _fake_full_backward(
    grad: Tensor, x: Tensor, weight: Tensor, index: Tensor, needs: list[bool]
) -> tuple[Tensor, ...]:
    shapes = (grad.shape, x.shape, weight.shape, grad.shape[2:])
    likes = (grad, x, weight, x)
    return tuple(t.new_empty(s if need else (0,)) for t, s, need in zip(likes, shapes, needs, strict=True))


def _setup_low_rank(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _autograd_low_rank(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[1:4])
    grads = torch.ops.dualedit_kernels.routed_low_rank_backward(grad, *ctx.saved_tensors, needs)
    return grad, *(g if need else None for g, need in zip(grads, needs, strict=True)), None


def _setup_full(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _, x, weight, _, index = inputs
    ctx.save_for_backward(x, weight, index)


def _autograd_full(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:4])
    grads = torch.ops.dualedit_kernels.routed_full_backward(grad, *ctx.saved_tensors, needs)
    return *(g if need else None for g, need in zip(grads, needs, strict=True)), None


for _name, _run, _fake_run in (
    ("routed_low_rank", _low_rank, _fake),
    ("routed_low_rank_backward", _low_rank_backward, _fake_low_rank_backward),
    ("routed_full", _full, _fake),
    ("routed_full_backward", _full_backward, _fake_full_backward),
):
    LIBRARY.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{_name}", _fake_run, lib=LIBRARY)
torch.library.register_autograd(
    f"{NAMESPACE}::routed_low_rank", _autograd_low_rank, setup_context=_setup_low_rank, lib=LIBRARY
)
torch.library.register_autograd(
    f"{NAMESPACE}::routed_full", _autograd_full, setup_context=_setup_full, lib=LIBRARY
)
_BACKWARD: dict[str, Callable] = {
    "low_rank_backward": eager.low_rank_backward,
    "full_backward": eager.full_backward,
}
backend.register(
    "routed_linear",
    *triton_backend.implementations(),
    backend.Implementation(
        "eager",
        {"low_rank": eager.low_rank, "full": eager.full, **_BACKWARD},
        backend.anywhere,
        "batched PyTorch runs everywhere and touches routed rows only",
    ),
    backend.Implementation(
        "reference",
        {"low_rank": routed_low_rank_reference, "full": routed_full_reference, **_BACKWARD},
        backend.anywhere,
        "row by row, the definition",
    ),
)
