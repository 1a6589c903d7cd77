"""Matrix products of the CPU implementations.

PyTorch hands fp32 products to its BLAS. The one it ships with (MKL) leaves half of the speed of AMD
processors unused; oneDNN, which PyTorch ships too and uses for bf16, does not: 576 x 4096 x 1024 took 40 ms
in place of 92 on one core of an EPYC. `ONEDNN` is that second road, used by the implementations of that name.
`COMPILED` is the same with the compiled library's attention, where the processor multiplies bf16.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from . import library

# Below this many multiply-adds the call costs more than it gains.
_WORTH_IT = 1 << 21
_FASTER = (torch.float32, torch.bfloat16)
_DENSE = torch.contiguous_format


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


def compiled_refuses(device: str, dtype: torch.dtype) -> str | None:
    """The reason why `COMPILED` cannot run there, or None."""
    reason = onednn_refuses(device, dtype)
    if reason is not None:
        return reason
    if library.COMPILED is None:
        return f"the compiled library is {library.COMPILED_REASON}"
    if dtype != torch.bfloat16:
        return f"it has no {str(dtype).removeprefix('torch.')}"
    able = ctypes.CDLL(str(library.COMPILED)).dualedit_has_bf16_products
    able.restype = ctypes.c_bool
    return None if able() else "this processor lacks AVX512-BF16"


def by_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether `ONEDNN` hands x [P, I] @ weight [O, I].T to oneDNN, not to what PyTorch would choose."""
    return x.dtype in _FASTER and x.numel() * weight.shape[0] >= _WORTH_IT


def _onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if not by_onednn(x, weight):
        return F.linear(x, weight, bias)
    # The operator that torch.compile emits for a linear layer on the CPU. In bf16, too, where PyTorch's own
    # writes the bias into every row before oneDNN adds the product: a tenth more for 576 x 1024 x 4096.
    bias = None if bias is None else bias.contiguous()  # the operator does not look at its stride
    return torch.ops.mkldnn._linear_pointwise(_plain(x), _plain(weight), bias, "none", [], "")


def _plain(matrix: Tensor) -> Tensor:
    """The matrix, copied unless it or its transpose is contiguous: other strides crawl."""
    return matrix if matrix.is_contiguous() or matrix.t().is_contiguous() else matrix.contiguous()


def _onednn_attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    # Head by head: PyTorch's fused attention took three times as long in bf16, twice in fp32.
    rows, heads, queries, size = q.shape
    if q.dtype not in _FASTER or queries * k.shape[2] * size < _WORTH_IT:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    out = q.new_empty(rows, queries, heads, size)  # heads side by side, as the next product wants them
    for row in range(rows):
        for head in range(heads):
            scores = _scores(q[row, head], k[row, head])  # [P, S]
            if mask is not None:
                scores.masked_fill_(~mask[row, 0], -torch.inf)
            out[row, :, head] = _onednn_linear(torch.softmax(scores, -1), v[row, head].contiguous().t())
    return out.transpose(1, 2)


def _scores(q: Tensor, k: Tensor) -> Tensor:
    """q [P, K] @ k [S, K].T / sqrt(K), in one pass where oneDNN has the operands' dtype for it."""
    scale = q.shape[1] ** -0.5
    if q.dtype == torch.bfloat16:
        return torch.addmm(q.new_empty(len(k)), q, k.t(), beta=0, alpha=scale)
    return _onednn_linear(q * scale, k)


def _compiled_attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    rows, heads, queries, size = q.shape
    if queries * k.shape[2] * size < _WORTH_IT:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    out = []
    for row in range(rows):
        side_by_side = [t[row].transpose(0, 1).flatten(1) for t in (q, k, v)]  # [*, M], without a copy mostly
        if mask is not None:
            kept = mask[row, 0, 0]
            side_by_side[1:] = [t[kept] for t in side_by_side[1:]]
        rows_whole = [t if t.stride(1) == 1 else t.clone(memory_format=_DENSE) for t in side_by_side]
        out.append(torch.ops.dualedit_kernels.attend_bf16_cpp(*rows_whole, heads))
    one = out[0][None] if rows == 1 else torch.stack(out)
    return one.unflatten(-1, (heads, size)).transpose(1, 2)


PLAIN = Products(F.linear, F.scaled_dot_product_attention)
ONEDNN = Products(_onednn_linear, _onednn_attend, by_head=True)
COMPILED = Products(_onednn_linear, _compiled_attend, by_head=True)
