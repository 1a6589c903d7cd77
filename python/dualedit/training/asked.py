"""The first layer above the edit, backward at the positions that the edit writes to.

Nothing below that layer is trained but the adapter, and it writes to a few positions only: of the layer's own
states no other gradient is read. Attention needs all gradients down to queries, keys and values; from there
to the states each position is on its own, and the products of the backward pass go through the few. So do
those of the forward pass where a run without the edit has left queries, keys and values of the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dualedit_kernels.products import ONEDNN

from .forwards import forwards

# Positions are left out where at most this share of them is asked for.
_WORTH_IT = 0.5


class _Asked(torch.autograd.Function):
    """out [R, L, O] = x [R, L, I] times a weight [O, I] that is not trained, with gradients at some rows.

    places [K] int64: those among R * L whose gradient is computed; it is zero at the others.
    """

    @staticmethod
    def forward(ctx, x: Tensor, out: Tensor, weight: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(weight, places)
        ctx.like = x.shape, x.dtype
        return out.view_as(out)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        weight, places = ctx.saved_tensors
        shape, dtype = ctx.like
        few = grad.reshape(-1, grad.shape[-1])[places]  # [K, O]
        few = ONEDNN.linear(few, weight.to(few.dtype).t(), None).to(dtype)
        return (
            few.new_zeros(shape).view(-1, shape[-1]).index_copy_(0, places, few).view(shape),
            None,
            None,
            None,
        )


def _forward_of(
    linear: nn.Linear, inputs: list[Tensor], places: Tensor, known: Tensor | None
) -> Callable[[Tensor], Tensor]:
    plain = linear.forward

    def forward(x: Tensor) -> Tensor:
        if not any(x is each for each in inputs) or not x.requires_grad or not torch.is_grad_enabled():
            return plain(x)
        with torch.no_grad():
            if known is None or known.dtype != x.dtype:
                out = plain(x)
            else:
                few = plain(x.flatten(0, 1)[places])  # [K, O]
                out = known.flatten(0, 1).index_copy(0, places, few).view_as(known)
        return _Asked.apply(x, out, linear.weight, places)

    return forward


def _can(linear: nn.Module) -> bool:
    if type(linear) is not nn.Linear or any(each.requires_grad for each in linear.parameters()):
        return False
    # FSDP has the whole of a weight while the layer runs only; accelerate may bring it for that time.
    return (
        linear.weight.device.type == "cpu"
        and not hasattr(linear.weight, "placements")
        and not hasattr(linear, "_hf_hook")
    )


def _norms(layer: nn.Module) -> list[nn.Module]:
    """A layer's norms; they take each position on its own."""
    return [c for c in layer.children() if type(c).__name__.endswith(("RMSNorm", "LayerNorm"))]


@contextmanager
def _normed_states(layer: nn.Module, shape: torch.Size) -> Iterator[list[Tensor]]:
    """Inside the block, a list of what a layer's norms make of its own states [*shape, D], while it runs."""
    states: list[Tensor] = []
    normed: list[Tensor] = []

    def enter(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        found = args[0] if args else kwargs.get("hidden_states")
        states[:] = [found] if isinstance(found, Tensor) and found.shape[:-1] == shape else []
        normed.clear()

    def note(module: nn.Module, args: tuple, output: Any) -> None:
        if args and any(args[0] is each for each in states) and isinstance(output, Tensor):
            normed.append(output)

    handles = [layer.register_forward_pre_hook(enter, with_kwargs=True)]
    handles += [norm.register_forward_hook(note) for norm in _norms(layer)]
    try:
        yield normed
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def left_by(layer: nn.Module, at: Tensor) -> Iterator[dict[nn.Module, Tensor]]:
    """Inside the block, what a decoder layer's run without an edit leaves for one with it, see `asked_at`.

    Yields:
        outputs [R, L, O] of the linear parts that read the layer's normed states, filled while it runs.
    """
    left: dict[nn.Module, Tensor] = {}
    linears = _cut(layer, at)
    with _normed_states(layer, at.shape) as normed:

        def note(module: nn.Module, args: tuple, output: Tensor) -> None:
            if args and any(args[0] is each for each in normed):
                left[module] = output.detach()

        handles = [linear.register_forward_hook(note) for linear in linears]
        try:
            yield left
        finally:
            for handle in handles:
                handle.remove()


def _cut(layer: nn.Module, at: Tensor) -> list[nn.Linear]:
    """The linear parts that go through some places [R, L]: none on a GPU, or where most are asked for."""
    few = at.device.type == "cpu" and int(at.sum()) <= _WORTH_IT * at.numel()
    return [module for module in layer.modules() if _can(module)] if few and _norms(layer) else []


@contextmanager
def asked_at(layer: nn.Module, at: Tensor, known: Mapping[nn.Module, Tensor] | None = None) -> Iterator[int]:
    """Inside the block, what a decoder layer's states get as gradient is right at some positions only.

    Of the layer's linear parts those count that read its normed states as they are; they are told by the
    tensor itself, which passes from the layer through its norm to them. Where a model does otherwise, nothing
    changes.

    Args:
        layer: a decoder layer whose weights are not trained.
        at: [R, L] bool, the positions whose gradient is read.
        known: from `left_by`, if the layer's states differ from those of that run at `at` only.

    Yields:
        how many linear parts may be cut: none on a GPU, or where most positions are asked for.
    """
    linears, known = _cut(layer, at), known or {}
    if not linears:
        yield 0
        return
    places = at.flatten().nonzero()[:, 0]
    with _normed_states(layer, at.shape) as normed:
        instead = {linear: _forward_of(linear, normed, places, known.get(linear)) for linear in linears}
        with forwards(instead) as count:
            yield count
