"""Which of an edit's image tokens are worth storing: those that its own question reads."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from dualedit_kernels.gated_edit_attention.reference import normalise

from .modules import EditCrossAttention


def attention_mass(adapter: EditCrossAttention, hidden: Tensor, k: Tensor) -> Tensor:
    """How much of an adapter's attention goes to each token of an edit, mean over heads and positions.

    Args:
        hidden: [P, D], states of the positions that the adapter writes to.
        k: [T, M], the edit's keys.

    Returns:
        [T] float32, of sum 1; zeros where there are no positions.
    """
    if not len(hidden):
        return torch.zeros(len(k), device=k.device)
    w_q, b_q = adapter.query_weights()
    q = F.linear(normalise(hidden.to(w_q.dtype), adapter.query_norm.eps), w_q, b_q)
    q, k = (t.float().unflatten(-1, (adapter.num_heads, -1)).transpose(0, 1) for t in (q, k))
    scores = q @ k.transpose(1, 2) * q.shape[-1] ** -0.5  # [H, P, T]
    return scores.softmax(-1).mean(dim=(0, 1))


def most_read(mass: Tensor, image: Tensor, share: float) -> Tensor:
    """The fewest image tokens to which a share of the image tokens' attention goes, and all other tokens.

    Args:
        mass: [T], attention to each token.
        image: [T] bool, which of them are image tokens.
        share: of the attention to image tokens, above 0; 1 keeps all of them.

    Returns:
        [T] bool, the tokens to keep.
    """
    kept = ~image
    of_image = torch.where(image, mass, -1.0)
    order = of_image.argsort(descending=True)[: int(image.sum())]
    before = of_image[order].cumsum(0) - of_image[order]  # what those in front of each have
    kept[order[before < share * of_image[order].sum()]] = True
    return kept


def keep_most_read(
    adapters: Mapping[str, EditCrossAttention],
    rows: Mapping[str, Tensor],
    hidden: Tensor,
    positions: Mapping[str, Tensor],
    image: Tensor,
    share: float,
) -> dict[str, Tensor]:
    """A layer's rows of an edit without the image tokens that its own question hardly reads.

    Args:
        adapters: by part ("text", "vision").
        rows: "k_text", "v_text", "k_vision", "v_vision" [T, M].
        hidden: [L, D], states at the layer.
        positions: by part, [L] bool, those that the adapter writes to when the question is asked.
        image: [T] bool, which of the edit's tokens are image tokens.
        share: see `most_read`; with two adapters on a layer, a token stays that one of them reads.
    """
    kept = torch.zeros_like(image)
    for part, adapter in adapters.items():
        mass = attention_mass(adapter, hidden[positions[part].to(hidden.device)], rows[f"k_{part}"])
        kept |= most_read(mass, image, share)
    return {name: row[kept] for name, row in rows.items()}
