"""Which edit answers which sequence: decided once, at prefill, from prompt tokens only."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dualedit_kernels import nearest_key

from ..runtime.sequence import mean_state
from . import Snapshot


@dataclass(frozen=True)
class Decision:
    """What was decided for a sequence, kept until it ends.

    Attributes:
        route: [B] int64, row of each sequence's edit in the snapshots, -1 for none; None when no edit is
            stored.
        snapshots: memory name to the edits as they were when the decision was made.
    """

    route: Tensor | None
    snapshots: dict[str, Snapshot]

    @property
    def nothing(self) -> bool:
        """Whether it is known, without asking the device, that no edit applies."""
        return self.route is None or (self.route.device.type == "cpu" and not bool((self.route >= 0).any()))


def cosine_radius(radius: Tensor, threshold: float) -> Tensor:
    """Radii [N] in cosine distance: an edit's own, and 1 - threshold where it has none (NaN)."""
    return torch.where(radius.isnan(), torch.full_like(radius, 1.0 - threshold), radius).float()


def last_state(hidden: Tensor, position: Tensor) -> Tensor:
    """States [B, D] at positions [B] of hidden [B, L, D]."""
    return hidden[torch.arange(hidden.shape[0], device=hidden.device), position.to(hidden.device)]


def pool_key(hidden: Tensor, key: str, prompt: Tensor, last: Tensor) -> Tensor:
    """The codebook key [B, D] in float32 of a layer input [B, L, D].

    Args:
        key: "mean" over the prompt tokens [B, L] bool, or the "last" prompt token at positions [B].
    """
    return mean_state(hidden, prompt) if key == "mean" else last_state(hidden, last).float()


def route_codebook(query: Tensor, prompt: Tensor, metric: str, edits: Snapshot) -> tuple[Tensor, Tensor]:
    """BalancEdit's lookup: the nearest key, and only inside its radius.

    Args:
        query: [B, D], keys of the rows.
        prompt: [B, L] bool, prompt tokens.

    Returns:
        route [B] int64 (-1 outside), distance to the nearest key [B] float32.
    """
    # Keys as they are stored: widening ten thousand at every prompt takes longer than to look among them, and
    # the codes are of the stored ones.
    keys, radius = edits.tables["key"], edits.tables["radius"].float()
    index, distance = nearest_key(query, keys, radius, metric, edits.codes(keys, metric))
    return torch.where(
        prompt.any(dim=1).to(index.device), index, -1
    ), distance  # no prompt, no question, no edit
