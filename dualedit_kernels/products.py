"""Matrix products of the CPU implementations.

PyTorch hands fp32 products to its BLAS. The one it ships with (MKL) leaves half of the speed of AMD
processors unused; oneDNN, which PyTorch ships too and uses for bf16, does not: 576 x 4096 x 1024 took 40 ms
in place of 92 on one core of an EPYC. `ONEDNN` is that second road, used by the implementations of that name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# Below this many multiply-adds the call costs more than it gains.
_WORTH_IT = 1 << 21


@dataclass(frozen=True)
class Products:
    """How an implementation multiplies.

    linear: x [P, I], weight [O, I], bias [O] or None -> x @ weight.T + bias.
    attend: q [R, H, P, K], k and v [R, H, S, K], mask [R, 1, 1, S] bool or None -> [R, H, P, K].
    by_head: whether attention's backward goes head by head too.
    """

    linear: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    attend: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
    by_head: bool = False


def onednn_refuses(device: str, dtype: torch.dtype) -> str | None:
    """The reason why `ONEDNN` cannot run there, or None. Only fp32 and bf16 differ from `PLAIN`."""
    if device != "cpu":
        return "it is for the CPU"
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return "this PyTorch was built without oneDNN"
    return None


def _onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if x.dtype != torch.float32 or x.numel() * weight.shape[0] < _WORTH_IT:
        return F.linear(x, weight, bias)
    # The operator that torch.compile emits for a linear layer on the CPU.
    return torch.ops.mkldnn._linear_pointwise(_plain(x), _plain(weight), bias, "none", [], "")


def _plain(matrix: Tensor) -> Tensor:
    """The matrix, copied unless it or its transpose is contiguous: other strides crawl."""
    return matrix if matrix.is_contiguous() or matrix.t().is_contiguous() else matrix.contiguous()


def _onednn_attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    # Head by head: PyTorch's fused attention took three times as long in bf16, twice in fp32.
    rows, heads, queries, size = q.shape
    if q.dtype not in (torch.float32, torch.bfloat16) or queries * k.shape[2] * size < _WORTH_IT:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    for row in range(rows):
        for head in range(heads):
            scores = _onednn_linear(q[row, head], k[row, head]).float().mul_(size**-0.5)  # [P, S]
            if mask is not None:
                scores.masked_fill_(~mask[row, 0], -torch.inf)
            out[row, head] = _onednn_linear(
                torch.softmax(scores, -1).to(v.dtype), v[row, head].contiguous().t()
            )
    return out


PLAIN = Products(F.linear, F.scaled_dot_product_attention)
ONEDNN = Products(_onednn_linear, _onednn_attend, by_head=True)
