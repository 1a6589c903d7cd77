"""The definition of `nearest_key` in plain PyTorch: direct differences, bounded memory."""

from __future__ import annotations

import torch
from torch import Tensor

# Elements of the difference block that is alive at once (64 MB in fp32).
_BLOCK = 1 << 24


def nearest_key_reference(query: Tensor, keys: Tensor, radius: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    """See `dualedit_kernels.nearest_key`. Computes in fp32, or in fp64 if either input is fp64.

    The expansion ||q||^2 - 2 q.k + ||k||^2 is avoided on purpose: hidden states have a few activations of
    size 1e3, against which a nearest distance of about 1 drowns in rounding (even the argmin goes wrong).
    """
    dtype = torch.float64 if torch.float64 in (query.dtype, keys.dtype) else torch.float32
    # In one layout, whatever the arguments have: sums over strided rows add up in another order for some of
    # the keys, and equal keys would not be equally near.
    query = query.to(dtype).contiguous()
    query = _unit(query) if metric == "cosine" else query
    best = torch.full((query.shape[0],), torch.inf, dtype=dtype, device=query.device)
    index = torch.full((query.shape[0],), -1, dtype=torch.int64, device=query.device)
    rows = max(1, _BLOCK // max(1, query.numel()))
    for first in range(0, keys.shape[0] if query.numel() else 0, rows):
        block = keys[first : first + rows].to(dtype).contiguous()
        if metric == "cosine":
            block = _unit(block)
        squared = (query[:, None, :] - block[None, :, :]).square().sum(-1)
        smallest, position = torch.nan_to_num(squared, nan=torch.inf, posinf=torch.inf).min(dim=1)
        closer = smallest < best  # strict: the lowest index keeps a tie
        best = torch.where(closer, smallest, best)
        index = torch.where(closer, position + first, index)
    distance = best / 2 if metric == "cosine" else best.sqrt()
    return gate(index, distance, radius)


def gate(index: Tensor, distance: Tensor, radius: Tensor) -> tuple[Tensor, Tensor]:
    """Apply the radius of the nearest key: (index [B] or -1, distance [B] in fp32)."""
    distance = distance.to(torch.float32)
    if radius.shape[0] == 0:
        return index, distance
    inside = (index >= 0) & (distance <= radius[index.clamp(min=0)])
    return torch.where(inside, index, -1), distance


def _unit(rows: Tensor) -> Tensor:
    """Rows scaled to length 1; a row of length 0 has no direction and becomes NaN, which is never near."""
    return rows / torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
