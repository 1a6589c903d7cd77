"""The definition of gated edit attention in plain PyTorch: row by row, differentiable by autograd."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .arguments import AttentionWeights, Slots


def gated_edit_attention_reference(
    hidden: Tensor,
    span: Tensor,
    route: Tensor,
    slots: Slots,
    weights: AttentionWeights,
) -> Tensor:
    """See `dualedit_kernels.gated_edit_attention`; the gate has been evaluated already (``route``)."""
    out = hidden.clone()
    for row, slot in enumerate(route.tolist()):
        if slot < 0 or not int(slots.length[slot]):
            continue
        first = int(slots.start[slot])
        last = first + int(slots.length[slot])
        positions = span[row].nonzero().squeeze(1)  # [P]
        x = hidden[row, positions]  # [P, D]
        q = F.linear(normalise(x, weights.eps), weights.w_q, weights.b_q)  # [P, M]
        o = attend(q, slots.k[first:last], slots.v[first:last], weights.num_heads)  # [P, M]
        out[row, positions] = x + F.linear(o, weights.w_o, weights.b_o)
    return out


def normalise(x: Tensor, eps: float) -> Tensor:
    """LayerNorm without affine over the last dimension, in fp32 or better, in the dtype of ``x``."""
    wide = x.to(at_least_fp32(x.dtype))
    return F.layer_norm(wide, wide.shape[-1:], eps=eps).to(x.dtype)


def attend(q: Tensor, k: Tensor, v: Tensor, num_heads: int) -> Tensor:
    """Attention of q [P, M] over k, v [S, M] by head, scale 1/sqrt(M/num_heads), softmax in fp32 at least."""
    q, k, v = (t.unflatten(-1, (num_heads, -1)).transpose(0, 1) for t in (q, k, v))  # [H, *, M/H]
    scores = (q @ k.transpose(1, 2)).to(at_least_fp32(q.dtype)) * q.shape[-1] ** -0.5  # [H, P, S]
    return (scores.softmax(-1).to(v.dtype) @ v).transpose(0, 1).flatten(1)


def at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which statistics and softmax are computed."""
    return torch.float64 if dtype == torch.float64 else torch.float32
