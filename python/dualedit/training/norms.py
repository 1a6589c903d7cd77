"""RMSNorm of a frozen model on a CPU, a few rows at a time.

Written as models write it, RMSNorm takes seven passes over memory, most of them in fp32: cast, square, mean,
scale, cast back, weigh. Done for as many rows as fit into the cache the passes stay there, and the backward
pass keeps the input and one number for each row instead of three copies in fp32. Measured on one core (EPYC,
Zen 5) for 1,222 rows of 1,024 in bf16: forward 0.8 ms in place of 1.2, with the backward pass 2.1 in place of
9.4. The forward pass gives the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .forwards import forwards

# Numbers of a piece; in fp32 and twice, they fit into a core's second-level cache.
_PIECE = 1 << 16
# Below this many numbers the calls cost more than the memory.
_WORTH_IT = 1 << 16


class _RMSNorm(torch.autograd.Function):
    """x / sqrt(mean(x^2) + eps), computed in fp32 and rounded, times a weight [D] that is not trained.

    x [.., D] and weight in fp32 or bf16, of one dtype.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        out, rate = torch.empty_like(rows), torch.empty(len(rows), 1)
        for part, to, each in _pieces(rows, out, rate):
            wide = part.to(torch.float32, copy=True)
            torch.mean(wide * wide, 1, keepdim=True, out=each)
            each.add_(eps).rsqrt_()
            to.copy_(wide.mul_(each)).mul_(weight)
        ctx.save_for_backward(rows, weight, rate)
        return out.view(x.shape)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        rows, weight, rate = ctx.saved_tensors
        out = torch.empty_like(rows)
        for part, to, each, above in _pieces(rows, out, rate, grad.reshape(rows.shape)):
            wide, above = part.float(), (above * weight).to(torch.float32, copy=True)
            along = (above * wide).sum(1, keepdim=True).mul_(each).mul_(each).div_(-rows.shape[1])
            to.copy_(above.addcmul_(wide, along).mul_(each))
        return out.view(grad.shape), None, None


def _pieces(rows: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    return zip(*(t.split(max(1, _PIECE // rows.shape[1])) for t in (rows, *others)), strict=True)


def _forward_of(norm: nn.Module, eps: float) -> Callable[..., Tensor]:
    plain = norm.forward

    def forward(x: Tensor, *more: object, **named: object) -> Tensor:
        if more or named or x.dtype != norm.weight.dtype or x.numel() < _WORTH_IT:
            return plain(x, *more, **named)
        return _RMSNorm.apply(x, norm.weight, eps)

    return forward


def _eps_of(norm: nn.Module) -> float | None:
    """The eps of an RMSNorm that can be done in pieces, or None."""
    weight = getattr(norm, "weight", None)
    eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    if not type(norm).__name__.endswith("RMSNorm") or "forward" in norm.__dict__ or type(eps) is not float:
        return None
    if type(weight) is not nn.Parameter or weight.dim() != 1 or weight.requires_grad:
        return None
    if weight.device.type != "cpu" or weight.dtype not in (torch.float32, torch.bfloat16):
        return None
    return eps if _does_the_same(norm, eps) else None


@torch.no_grad()
def _does_the_same(norm: nn.Module, eps: float) -> bool:
    """Whether a norm gives the bits that are computed here: some add 1 to the weight, or round elsewhere."""
    size = len(norm.weight)
    x = torch.randn(3, size, generator=torch.Generator().manual_seed(0))
    # One row as large as usual, one where eps counts as much as the row does, one where it alone does.
    x = (x * torch.tensor([[1.0], [eps**0.5], [0.0]])).to(norm.weight.dtype)
    try:
        return torch.equal(norm(x), _RMSNorm.apply(x, norm.weight, eps))
    except (TypeError, ValueError, RuntimeError):
        return False


@contextmanager
def quick_norms(base: nn.Module) -> Iterator[int]:
    """Inside the block, a frozen model's RMSNorms on the CPU take a few rows at a time.

    Yields:
        how many do: none on a GPU, and none that compute something else.
    """
    found = {module: _eps_of(module) for module in base.modules()}
    with forwards({m: _forward_of(m, eps) for m, eps in found.items() if eps is not None}) as count:
        yield count
