"""The layers between the two edited ones, at the positions only that the first edit can reach.

What stands in front of the first edited token never sees it: where an image comes before the question, its
states are the same with the edit and without until the image itself is edited. So between the two edited
layers an edited run needs the positions behind only; keys and values of those in front are taken from the run
without the edit, and no gradient goes through them. What sees what is read from the attention mask.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .narrow import cut, places_of

# An edited run is worth cutting where it needs at most this share of the positions.
_WORTH_IT = 0.5


@dataclass
class Reach:
    """Where an edit arrives, and what the run without it leaves for the other positions.

    Attributes:
        at: [R, L] bool, the positions that it reaches by the last of the layers.
        kept: keys and values [R, H, L, K] of each of the layers, once they have run without the edit.
        states: [R, L, D] behind the last of them, then too.
    """

    at: Tensor
    kept: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    states: Tensor | None = None


def reached(written: Tensor, masks: list[Tensor]) -> Tensor:
    """[R, L] bool: the positions whose states depend on what is written, behind some layers.

    Args:
        written: [R, L] bool, positions that are written to in front of the layers.
        masks: [R or 1, H or 1, L, L] of each layer, True or added to the scores. A position that sees nothing
            is padding: its states differ by what the attention makes of no scores, and nobody reads them.
    """
    for mask in masks:
        written = written | (seen(mask) & written[:, None]).any(-1)
    return written


def seen(mask: Tensor) -> Tensor:
    """[R or 1, L, L] bool: which positions some head sees, of a mask [R or 1, H or 1, L, L]."""
    if mask.dtype != torch.bool:
        # "Closed" is the lowest number of some dtype, not always of the mask's own.
        mask = mask > max(torch.finfo(mask.dtype).min / 2, -1e30)
    return mask.any(1)


def worth_it(at: Tensor) -> bool:
    """Whether so few positions [R, L] are reached that the others are left out."""
    return int(at.sum(1).max()) <= _WORTH_IT * at.shape[1]


class Listening:
    """Stands where a layer expects its cache: notes its keys and values [R, H, L, K], changes nothing."""

    def __init__(self):
        self.kept: tuple[Tensor, Tensor] | None = None

    def update(self, keys: Tensor, values: Tensor, *more: Any, **named: Any) -> tuple[Tensor, Tensor]:
        self.kept = keys, values
        return keys, values


class _Joining:
    """Stands there for the reached positions: adds their keys and values to those kept of all others."""

    def __init__(self, kept: tuple[Tensor, Tensor], at: Tensor, wanted: Tensor):
        self.kept, self.at, self.wanted = kept, at, wanted

    def update(self, keys: Tensor, values: Tensor, *more: Any, **named: Any) -> tuple[Tensor, Tensor]:
        return tuple(
            old.transpose(1, 2).index_put((self.at,), new.transpose(1, 2)[self.wanted]).transpose(1, 2)
            for old, new in zip(self.kept, (keys, values), strict=True)
        )


def run_reached(calls: list[tuple[nn.Module, Mapping[str, Any]]], states: Tensor, reach: Reach) -> Tensor:
    """What some decoder layers make of the reached positions: [K, D], row by row.

    Args:
        calls: the layers and what each is called with besides its states.
        states: [R, L, D] in front of the first.
        reach: with keys and values of every layer, for all positions.

    Raises:
        ValueError: a layer's keys and values are missing: it did not hand them to its cache.
    """
    if len(reach.kept) != len(calls):
        raise ValueError(f"{len(reach.kept)} of {len(calls)} layers have handed out their keys and values.")
    row, places, wanted = places_of(reach.at)
    hidden = states[row, places]  # [R, W, D]
    for (module, kwargs), kept in zip(calls, reach.kept, strict=True):
        few = {name: cut(name, value, row, places) for name, value in kwargs.items()}
        output = module(hidden, **{**few, "past_key_values": _Joining(kept, reach.at, wanted)})
        hidden = output[0] if isinstance(output, tuple) else output
    return hidden[wanted]
