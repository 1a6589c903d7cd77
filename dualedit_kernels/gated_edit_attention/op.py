"""The public `gated_edit_attention` and `fold_query`, with fake implementation, autograd and backends."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import backend, checks
from ..library import LIBRARY, NAMESPACE
from ..nearest_key.codes import METRICS
from ..nearest_key.op import nearest_key
from . import eager, triton_backend
from .arguments import AttentionWeights, Gate, Slots
from .reference import gated_edit_attention_reference


def fold_query(
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    w_in: Tensor,
    b_in: Tensor | None,
    w_query: Tensor,
    b_query: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Fold LayerNorm's affine, the input projection and the query projection into one matrix.

    The three are linear in a row, so ``query(in(LN(x))) == LN0(x) @ w_q.T + b_q`` with LN0 the LayerNorm
    without affine. Differentiable; computed in fp32 or better and returned in the dtype of ``w_query``.

    Args:
        norm_weight: [D]; norm_bias: [D] or None.
        w_in: [M, D]; b_in: [M] or None.
        w_query: [M, M]; b_query: [M] or None.

    Returns:
        w_q: [M, D] and b_q: [M].
    """
    checks.tensor("w_query", w_query, ("M", "M"), checks.FLOATS, w_query)
    size, dim = w_in.shape if w_in.ndim == 2 else ("M", "D")
    checks.tensor("w_in", w_in, (w_query.shape[1], dim), checks.FLOATS, w_query)
    checks.tensor("norm_weight", norm_weight, (dim,), checks.FLOATS, w_query)
    for name, bias, shape in (
        ("norm_bias", norm_bias, dim),
        ("b_in", b_in, size),
        ("b_query", b_query, len(w_query)),
    ):
        if bias is not None:
            checks.tensor(name, bias, (shape,), checks.FLOATS, w_query)
    out = w_query.dtype
    wide = torch.float64 if out == torch.float64 else torch.float32
    w_in, w_query = w_in.to(wide), w_query.to(wide)
    shift = w_in.new_zeros(w_in.shape[0])
    if norm_bias is not None:
        shift = w_in @ norm_bias.to(wide)
    if b_in is not None:
        shift = shift + b_in.to(wide)
    b_q = w_query @ shift
    if b_query is not None:
        b_q = b_q + b_query.to(wide)
    return (w_query @ (w_in * norm_weight.to(wide))).to(out), b_q.to(out)


def gated_edit_attention(
    hidden: Tensor,
    span: Tensor,
    slots: Slots,
    weights: AttentionWeights,
    route: Tensor | None = None,
    gate: Gate | None = None,
    inplace: bool = False,
) -> tuple[Tensor, Tensor]:
    """Let the tokens of routed rows attend to the cached keys and values of their edit, and add the result.

    ``out[b, t] = hidden[b, t] + MHA(LN0(hidden[b, t]) @ w_q.T + b_q, k[slot], v[slot]) @ w_o.T + b_o`` where
    ``span[b, t]`` and ``route[b] >= 0``, with slot = start[route[b]] .. start[route[b]] + length[route[b]].
    Every other element is bit-identical to ``hidden``. A slot of length 0 holds no edit: its rows stay.

    Args:
        hidden: [B, L, D], the residual stream.
        span: [B, L] bool, the tokens an edit may change.
        slots: cached keys and values of all edits (k, v [T, M]), and which rows belong to each (start,
            length [N]).
        weights: folded query projection (w_q [M, D], b_q [M]; see `fold_query`), output projection
            (w_o [D, M], b_o [D]), num_heads and eps. The scale is 1/sqrt(M/num_heads).
        route: [B] int64, the edit of each row or -1; exactly one of ``route`` and ``gate`` is given.
        gate: routes row b by ``nearest_key(hidden[b, gate.last[b]], ...)``, to the bit. On a GPU the first
            kernel decides it among up to 8 keys; among more, a lookup of one launch does.
        inplace: change ``hidden`` itself and return it; refused where a gradient is recorded.

    Returns:
        hidden: [B, L, D] and route: [B] int64. Where no gradient is recorded and, on the CPU, no row is
        routed, the tensor that was passed comes back itself, not a copy.

    The compute dtype is that of ``hidden`` (k, v and weights of another dtype are converted, so keep
    them in it for speed), with LayerNorm and softmax in fp32 or better. Differentiable once with respect
    to hidden, k, v, w_q, b_q, w_o and b_o, not through the route.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device or value.
        IndexError: on the CPU, a route beyond the last slot.

    Source: DualEdit (arXiv:2506.13638), edit cross-attention with a last-token gate, evaluated with cached
    K/V and folded weights.
    """
    _check(hidden, span, slots, weights)
    if (route is None) == (gate is None):
        raise ValueError(
            "exactly one of route and gate must be given: pass route=[B] int64, or gate=Gate(...)."
        )
    memory = (slots.k, slots.v)
    projections = (weights.w_q, weights.b_q, weights.w_o, weights.b_o)
    recording = torch.is_grad_enabled() and any(
        tensor.requires_grad for tensor in (hidden, *memory, *projections)
    )
    if recording and inplace:
        raise ValueError("inplace=True cannot record a gradient: use torch.no_grad() or inplace=False.")
    fused = gate if gate is not None and _check_gate(hidden, gate, slots) else None
    if fused is None:
        route = route if gate is None else look_up(hidden, gate)
        checks.tensor("route", route, (hidden.shape[0],), (torch.int64,), hidden)
        assert route is not None
        if not recording and checks.nothing_routed(route):
            return hidden, route
    k, v, w_q, b_q, w_o, b_o = (tensor.to(hidden.dtype) for tensor in (*memory, *projections))
    args = (k, v, slots.start, slots.length, w_q, b_q, w_o, b_o, weights.num_heads, float(weights.eps))
    ops = torch.ops.dualedit_kernels
    if fused is not None:
        decide = (fused.last, fused.keys.detach(), fused.radius.detach(), fused.metric)
        if inplace:
            return hidden, ops.gated_edit_attention_gate_(hidden, span, *decide, *args)
        out, opened = ops.gated_edit_attention_gate(hidden, span, *decide, *args)
        return (out if recording or not checks.nothing_routed(opened) else hidden), opened
    assert route is not None
    if not inplace:
        return ops.gated_edit_attention(hidden, span, route, *args), route
    ops.gated_edit_attention_(hidden, span, route, *args)
    return hidden, route


def _check(hidden: Tensor, span: Tensor, slots: Slots, weights: AttentionWeights) -> None:
    checks.tensor("hidden", hidden, ("B", "L", "D"), checks.FLOATS, hidden)
    rows, tokens, dim = hidden.shape
    checks.tensor("weights.w_q", weights.w_q, ("M", dim), checks.FLOATS, hidden)
    size = weights.w_q.shape[0]
    checks.tensor("span", span, (rows, tokens), (torch.bool,), hidden)
    checks.tensor("slots.k", slots.k, ("T", size), checks.FLOATS, hidden)
    checks.tensor("slots.v", slots.v, (slots.k.shape[0], size), checks.FLOATS, hidden)
    checks.tensor("slots.start", slots.start, ("N",), (torch.int64,), hidden)
    checks.tensor("slots.length", slots.length, (slots.start.shape[0],), (torch.int64,), hidden)
    checks.tensor("weights.b_q", weights.b_q, (size,), checks.FLOATS, hidden)
    checks.tensor("weights.w_o", weights.w_o, (dim, size), checks.FLOATS, hidden)
    checks.tensor("weights.b_o", weights.b_o, (dim,), checks.FLOATS, hidden)
    heads = weights.num_heads
    if heads < 1 or size % heads:
        raise ValueError(
            f"weights.num_heads={heads} does not divide M={size}: choose a divisor of w_q.shape[0]."
        )


def _check_gate(hidden: Tensor, gate: Gate, slots: Slots) -> bool:
    """Raise unless the gate is right; whether attention decides it too, in place of a lookup before it."""
    checks.tensor("gate.last", gate.last, (hidden.shape[0],), (torch.int64,), hidden)
    checks.tensor("gate.keys", gate.keys, ("N", hidden.shape[2]), checks.FLOATS, hidden)
    checks.tensor("gate.radius", gate.radius, (gate.keys.shape[0],), (torch.float32,), hidden)
    checks.choice("gate.metric", gate.metric, METRICS)
    stored = slots.start.shape[0]
    if gate.keys.shape[0] != stored:
        raise ValueError(
            f"gate.keys has {gate.keys.shape[0]} keys, there are {stored} slots: pass one per slot."
        )
    if torch.compiler.is_compiling():
        return gate.codes is None  # the operator itself looks which implementation there is
    return decides_gate(hidden, gate)


def look_up(hidden: Tensor, gate: Gate) -> Tensor:
    """The route [B] int64 of a gate, by `nearest_key` alone; hidden: [B, L, D]."""
    rows = torch.arange(hidden.shape[0], device=hidden.device)
    query = hidden.detach()[rows, gate.last]
    return nearest_key(query, gate.keys, gate.radius, gate.metric, gate.codes)[0]


def decides_gate(hidden: Tensor, gate: Gate) -> bool:
    """Whether `gated_edit_attention` decides a gate itself, as the `nearest_key` that runs would.

    On a GPU it does. Elsewhere it calls `look_up` first, which one may as well do oneself.
    """
    keys, device = gate.keys, hidden.device.type
    wide = torch.float64 in (hidden.dtype, keys.dtype)
    attention = backend.explain("gated_edit_attention", device, hidden.dtype).implementation
    if "gate" not in attention.functions:
        return False
    dtype = torch.float64 if wide else keys.dtype
    return backend.explain("nearest_key", device, dtype).implementation.name == attention.name


# A registered operator takes every tensor for itself, these ten last:
# k, v, start, length, w_q, b_q, w_o, b_o, num_heads, eps.
def _grouped(args: tuple) -> tuple[Slots, AttentionWeights]:
    return Slots(*args[:4]), AttentionWeights(*args[4:10])


def _forward(hidden: Tensor, span: Tensor, route: Tensor, *args: Any) -> Tensor:
    return backend.run("gated_edit_attention", "forward", hidden, hidden, span, route, *_grouped(args))


def _forward_(hidden: Tensor, span: Tensor, route: Tensor, *args: Any) -> None:
    backend.run("gated_edit_attention", "forward_", hidden, hidden, span, route, *_grouped(args))


def _gate(
    hidden: Tensor, span: Tensor, last: Tensor, keys: Tensor, radius: Tensor, metric: str, *args: Any
) -> tuple[Tensor, Tensor]:
    gate = Gate(last, keys, radius, metric)
    if decides_gate(hidden, gate):
        return backend.run("gated_edit_attention", "gate", hidden, hidden, span, gate, *_grouped(args))
    route = look_up(hidden, gate)
    return _forward(hidden, span, route, *args), route


def _gate_(
    hidden: Tensor, span: Tensor, last: Tensor, keys: Tensor, radius: Tensor, metric: str, *args: Any
) -> Tensor:
    gate = Gate(last, keys, radius, metric)
    if decides_gate(hidden, gate):
        return backend.run("gated_edit_attention", "gate_", hidden, hidden, span, gate, *_grouped(args))
    route = look_up(hidden, gate)
    _forward_(hidden, span, route, *args)
    return route


def _backward(grad: Tensor, hidden: Tensor, span: Tensor, route: Tensor, *args: Any) -> tuple[Tensor, ...]:
    slots, weights = _grouped(args)
    return backend.run(
        "gated_edit_attention", "backward", hidden, grad, hidden, span, route, slots, weights, args[10]
    )


def _fake_forward(hidden: Tensor, *args: Any) -> Tensor:
    return torch.empty_like(hidden, memory_format=torch.contiguous_format)


def _fake_forward_(hidden: Tensor, *args: Any) -> None:
    return None


def _fake_gate(hidden: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return _fake_forward(hidden), _fake_gate_(hidden)


def _fake_gate_(hidden: Tensor, *args: Any) -> Tensor:
    return hidden.new_empty((hidden.shape[0],), dtype=torch.int64)


def _fake_backward(
    grad: Tensor, hidden: Tensor, span: Tensor, route: Tensor, *args: Any
) -> tuple[Tensor, ...]:
    k, v, _, _, w_q, b_q, w_o, b_o, _, _, needs = args
    grads = [
        t.new_empty(t.shape if need else (0,))
        for t, need in zip((hidden, k, v, w_q, b_q, w_o, b_o), needs, strict=True)
    ]
    return tuple(grads)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:11])
    ctx.num_heads, ctx.eps = inputs[11:]


def _setup_gate_context(
    ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]
) -> None:
    _setup_context(ctx, (*inputs[:2], output[1], *inputs[6:]), output[0])
    ctx.mark_non_differentiable(output[1])


def _autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _gradients(ctx, grad, 3)


def _gate_autograd(ctx: Any, grad: Tensor, _: Tensor) -> tuple:
    return _gradients(ctx, grad, 6)


def _gradients(ctx: Any, grad: Tensor, memory: int) -> tuple:
    """Gradients of an operator's arguments, of which the one at ``memory`` is k."""
    wanted = (0, memory, *(memory + i for i in (1, 4, 5, 6, 7)))  # hidden, k, v, w_q, b_q, w_o, b_o
    needs = [ctx.needs_input_grad[i] for i in wanted]
    grads = torch.ops.dualedit_kernels.gated_edit_attention_backward(
        grad, *ctx.saved_tensors, ctx.num_heads, ctx.eps, needs
    )
    result: list[Tensor | None] = [None] * (memory + 10)
    for i, need, value in zip(wanted, needs, grads, strict=True):
        result[i] = value if need else None
    return tuple(result)


def _reference_(hidden: Tensor, span: Tensor, route: Tensor, slots: Slots, weights: AttentionWeights) -> None:
    hidden.copy_(gated_edit_attention_reference(hidden, span, route, slots, weights))


for _name, _run, _fake in (
    ("gated_edit_attention", _forward, _fake_forward),
    ("gated_edit_attention_", _forward_, _fake_forward_),
    ("gated_edit_attention_gate", _gate, _fake_gate),
    ("gated_edit_attention_gate_", _gate_, _fake_gate_),
    ("gated_edit_attention_backward", _backward, _fake_backward),
):
    LIBRARY.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{_name}", _fake, lib=LIBRARY)
torch.library.register_autograd(
    f"{NAMESPACE}::gated_edit_attention", _autograd, setup_context=_setup_context, lib=LIBRARY
)
torch.library.register_autograd(
    f"{NAMESPACE}::gated_edit_attention_gate",
    _gate_autograd,
    setup_context=_setup_gate_context,
    lib=LIBRARY,
)
backend.register(
    "gated_edit_attention",
    *triton_backend.implementations(),
    backend.Implementation(
        "eager",
        {"forward": eager.forward, "forward_": eager.forward_, "backward": eager.backward},
        backend.anywhere,
        "batched PyTorch runs everywhere and touches open tokens only",
    ),
    backend.Implementation(
        "reference",
        {"forward": gated_edit_attention_reference, "forward_": _reference_, "backward": eager.backward},
        backend.anywhere,
        "row by row, the definition",
    ),
)
