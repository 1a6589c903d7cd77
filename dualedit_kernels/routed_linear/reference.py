"""The definition of routed linear in plain PyTorch: one row after the other, differentiable by autograd."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def routed_low_rank_reference(base: Tensor, x: Tensor, down: Tensor, up: Tensor, index: Tensor) -> Tensor:
    """``base[b] + (x[b] @ down[i].T) @ up[i].T`` for rows with i = index[b] >= 0, base[b] for the others."""
    out = base.clone()
    for row, slot in enumerate(index.tolist()):
        if slot >= 0:
            out[row] = base[row] + F.linear(F.linear(x[row], down[slot]), up[slot]).to(base.dtype)
    return out


def routed_full_reference(
    base: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor
) -> Tensor:
    """``x[b] @ weight[i].T + bias`` for rows with i = index[b] >= 0, base[b] for the others."""
    out = base.clone()
    for row, slot in enumerate(index.tolist()):
        if slot >= 0:
            out[row] = F.linear(x[row], weight[slot], bias).to(base.dtype)
    return out
