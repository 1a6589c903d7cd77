"""A frozen model's layers on a CPU, at the speed that the processor has.

A training step is mostly products with the frozen model's weights. In fp32 PyTorch hands them to MKL, which
on AMD processors runs at half of what oneDNN reaches (see `dualedit_kernels.products`). In bf16 PyTorch takes
oneDNN by itself. What is left is attention and the norms; see `attention.py` and `norms.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dualedit_kernels.products import ONEDNN, onednn_refuses

from .attention import attention_by_head
from .forwards import forwards
from .norms import quick_norms


class _FrozenLinear(torch.autograd.Function):
    """x [P, I] times a weight [O, I] that is not trained."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return ONEDNN.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return ONEDNN.linear(grad.contiguous(), weight.t(), None), None, None


def _forward_of(linear: nn.Linear) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        return _FrozenLinear.apply(flat, linear.weight, linear.bias).view(*x.shape[:-1], -1)

    return forward


@contextmanager
def quick_products(base: nn.Module) -> Iterator[int]:
    """Inside the block, frozen fp32 linear layers of a model on the CPU multiply with oneDNN.

    Yields:
        how many layers do; 0 on a GPU, in bf16, or where PyTorch has no oneDNN.
    """
    with forwards({m: _forward_of(m) for m in base.modules() if _multiplies(m)}) as count:
        yield count


def _multiplies(module: nn.Module) -> bool:
    """Whether a module is a linear layer that oneDNN can take over."""
    if type(module) is not nn.Linear or "forward" in module.__dict__:
        return False
    if module.weight.requires_grad or module.weight.dtype != torch.float32:
        return False
    whole = not hasattr(module.weight, "placements")  # FSDP has not cut it up
    return whole and onednn_refuses(module.weight.device.type, torch.float32) is None


@contextmanager
def quick_layers(base: nn.Module) -> Iterator[None]:
    """Inside the block, a frozen model's linear layers, norms and eager attention are quick on the CPU.

    The training loop runs in it. Results differ by rounding at most; another model is not touched.
    """
    with quick_products(base), quick_norms(base), attention_by_head(base):
        yield
