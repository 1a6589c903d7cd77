"""The entry of the Triton `gated_edit_attention`; the kernels are imported on the first call."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import triton_support
from ..backend import Implementation
from . import eager
from .arguments import AttentionWeights, Gate, Slots

# Wider heads do not fit the registers of a tile: 16-bit, and fp32, whose exact products take twice the room.
LARGEST_HEAD, LARGEST_HEAD_FP32 = 256, 128


def implementations() -> list[Implementation]:
    """The one entry."""
    return [
        Implementation(
            "triton",
            {
                "forward": _forward,
                "forward_": _forward_,
                "gate": _gate,
                "gate_": _gate_,
                "backward": _backward,
            },
            triton_support.refuses,
            "Triton decides the gate and skips closed rows on the device, without a host synchronisation"
            f" (heads wider than {LARGEST_HEAD}, in fp32 {LARGEST_HEAD_FP32}, go to eager)",
        )
    ]


def _forward(hidden: Tensor, span: Tensor, route: Tensor, slots: Slots, weights: AttentionWeights) -> Tensor:
    if _too_wide(hidden, weights):
        return eager.forward(hidden, span, route, slots, weights)
    from . import triton_kernel

    return triton_kernel.forward(hidden, span, route, None, slots, weights)[0]


def _forward_(hidden: Tensor, span: Tensor, route: Tensor, slots: Slots, weights: AttentionWeights) -> None:
    if _too_wide(hidden, weights):
        return eager.forward_(hidden, span, route, slots, weights)
    from . import triton_kernel

    triton_kernel.forward_(hidden, span, route, None, slots, weights)


def _gate(
    hidden: Tensor, span: Tensor, gate: Gate, slots: Slots, weights: AttentionWeights
) -> tuple[Tensor, Tensor]:
    if _too_wide(hidden, weights):
        route = _looked_up(hidden, gate)
        return eager.forward(hidden, span, route, slots, weights), route
    from . import triton_kernel

    return triton_kernel.forward(hidden, span, None, gate, slots, weights)


def _gate_(hidden: Tensor, span: Tensor, gate: Gate, slots: Slots, weights: AttentionWeights) -> Tensor:
    if _too_wide(hidden, weights):
        route = _looked_up(hidden, gate)
        eager.forward_(hidden, span, route, slots, weights)
        return route
    from . import triton_kernel

    return triton_kernel.forward_(hidden, span, None, gate, slots, weights)


def _backward(
    grad: Tensor,
    hidden: Tensor,
    span: Tensor,
    route: Tensor,
    slots: Slots,
    weights: AttentionWeights,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    if _too_wide(hidden, weights):
        return eager.backward(grad, hidden, span, route, slots, weights, needs)
    from . import triton_backward

    return triton_backward.backward(grad, hidden, span, route, slots, weights, needs)


def _looked_up(hidden: Tensor, gate: Gate) -> Tensor:
    from ..nearest_key.triton_kernel import nearest_key_at

    return nearest_key_at(hidden, gate.last, gate.keys, gate.radius, gate.metric)[0]


def _too_wide(hidden: Tensor, weights: AttentionWeights) -> bool:
    return weights.head > (LARGEST_HEAD_FP32 if hidden.dtype == torch.float32 else LARGEST_HEAD)
