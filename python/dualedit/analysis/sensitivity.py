"""How much the answer depends on a layer's states: noise on image, text or all tokens, and the KL that
follows.

DualEdit (COLM 2025), Figure 2. Gaussian noise is added to the states behind one decoder layer, where an edit
at that layer would write; its size is `sigma` times each state's own root mean square. Layers below are not
run again: all variants go on from the clean states behind the layer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .asking_layers import GROUPS, LayerStates, last_positions

SIGMAS = (0.5, 1.0, 2.0)


def noise_for(shape: torch.Size, seed: int, batch: int, layer: int) -> Tensor:
    """Unit noise [B, L, D], the same for every group and sigma of a batch and layer."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + batch) * 1_009 + layer)
    return torch.randn(shape, generator=generator)


def disturbed(states: Tensor, noise: Tensor, at: Tensor, sigma: float) -> Tensor:
    """States [B, L, D] with noise at some positions [B, L], in each state's own root mean square."""
    size = states.float().square().mean(-1, keepdim=True).sqrt()
    return torch.where(at[..., None], states + (sigma * size * noise.to(size)).to(states.dtype), states)


def divergence(clean: Tensor, other: Tensor) -> Tensor:
    """KL(clean || other) [K] float64, in nats, of logits [K, V]."""
    first, second = clean.double().log_softmax(-1), other.double().log_softmax(-1)
    return (first.exp() * (first - second)).sum(-1)


@torch.no_grad()
def sensitivity_at(
    known: LayerStates, layer: int, seed: int, batch: int, sigmas: tuple[float, ...] = SIGMAS
) -> dict[str, list[list[float]]]:
    """KL in nats between the clean next-token distribution and that with noise behind a layer.

    Args:
        known: the batch's clean states.
        seed, batch: what the noise is drawn from, with the layer.

    Returns:
        group ("text", "image", "all") to a row a sigma, a KL a question; NaN where a question has no such
        token.
    """
    questions, states = known.questions, known.behind[layer]
    at = last_positions(questions)
    clean = known.last
    noise = noise_for(states.shape, seed, batch, layer)
    found: dict[str, list[list[float]]] = {}
    for group in GROUPS:
        where = questions.positions(group).to(states.device)
        there = where.any(1)
        found[group] = []
        for sigma in sigmas:
            values = torch.full((questions.size,), torch.nan, dtype=torch.float64)
            if bool(there.any()):
                apart = divergence(
                    clean, known.logits(layer, disturbed(states, noise, where, sigma), at)
                ).cpu()
                values = torch.where(there.cpu(), apart, values)
            found[group].append([float(v) for v in values])
    return found


def runs_of_a_plain_way(depth: int, layers: int, variants: int) -> int:
    """Layer runs of a batch when every variant, and the clean forward, runs the whole model."""
    return depth * (1 + layers * variants)
