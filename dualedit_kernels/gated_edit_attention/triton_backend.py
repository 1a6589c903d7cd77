"""The entry of the Triton `gated_edit_attention`; the kernels are imported on the first call."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import triton_support
from ..backend import Implementation
from . import eager

# Wider heads do not fit the registers of a tile: 16-bit, and fp32, whose exact products take twice the room.
LARGEST_HEAD, LARGEST_HEAD_FP32 = 256, 128


def implementations() -> list[Implementation]:
    """The one entry."""
    return [
        Implementation(
            "triton",
            {"forward": _forward, "forward_": _forward_, "backward": _backward},
            triton_support.refuses,
            "Triton skips closed rows on the device, without a host synchronisation"
            f" (heads wider than {LARGEST_HEAD}, in fp32 {LARGEST_HEAD_FP32}, go to eager)",
        )
    ]


def _forward(hidden: Tensor, *args: object) -> Tensor:
    if _too_wide(hidden, args):
        return eager.forward(hidden, *args)
    from . import triton_kernel

    return triton_kernel.forward(hidden, *args)


def _forward_(hidden: Tensor, *args: object) -> None:
    if _too_wide(hidden, args):
        return eager.forward_(hidden, *args)
    from . import triton_kernel

    return triton_kernel.forward_(hidden, *args)


def _backward(grad: Tensor, hidden: Tensor, *args: object) -> tuple[Tensor, ...]:
    if _too_wide(hidden, args[:-1]):
        return eager.backward(grad, hidden, *args)
    from . import triton_backward

    return triton_backward.backward(grad, hidden, *args)


def _too_wide(hidden: Tensor, args: tuple) -> bool:
    """args of the operator after hidden: span, route, k, v, start, length, w_q, ..., num_heads, eps."""
    limit = LARGEST_HEAD_FP32 if hidden.dtype == torch.float32 else LARGEST_HEAD
    return args[6].shape[0] // args[-2] > limit
