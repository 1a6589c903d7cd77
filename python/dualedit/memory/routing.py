"""Which edit answers which sequence: decided once, at prefill, from prompt tokens only."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dualedit_kernels import nearest_key

from .snapshot import Snapshot


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
    """Radii [N] in cosine distance: an edit's own, and 1 - threshold where it has none (negative)."""
    return torch.where(radius < 0, torch.full_like(radius, 1.0 - threshold), radius).float()


def last_state(hidden: Tensor, position: Tensor) -> Tensor:
    """States [B, D] at positions [B] of hidden [B, L, D]."""
    return hidden[torch.arange(hidden.shape[0], device=hidden.device), position.to(hidden.device)]


def nearest_edit(
    query: Tensor, stored: Snapshot, metric: str, radius: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The stored edit nearest to each query, and only inside its radius.

    Args:
        query: [B, P], routing keys of the rows, any floating dtype.
        metric: "l2" or "cosine".
        radius: [N] float32; None: however far it is.

    Returns:
        row of the edit [B] int64 (-1: none within its radius), distance to the nearest key [B] float32.
    """
    # Keys as they are stored: widening ten thousand at every prompt takes longer than to look among them, and
    # the codes are of the stored ones.
    keys = stored.tables["key"]
    if radius is None:
        radius = torch.full((keys.shape[0],), float("inf"), device=keys.device)
    return nearest_key(query, keys, radius, metric, stored.codes(keys, metric))
