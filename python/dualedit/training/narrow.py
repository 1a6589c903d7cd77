"""A model's last layer, at the few positions whose next token counts.

Nobody reads the other positions behind it; they matter to it as keys and values alone. So it is entered
twice: with all positions, as far as its keys and values, and with the few, whose queries look at those. The
door is the cache that a decoder layer takes: it hands the layer's keys and values over and takes back those
to be looked at. Where a layer has no such door, or is told something that cannot be cut to the few
positions, it runs whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


class _Noted(Exception):
    """Leaves a layer when its keys and values have been noted."""


class _Door:
    """Stands where a layer expects its cache.

    Empty, it notes keys and values [R, H, L, K] and leaves the layer; then it gives them in place of others.
    """

    def __init__(self):
        self.kept: tuple[Tensor, Tensor] | None = None

    def update(self, keys: Tensor, values: Tensor, *more: Any, **named: Any) -> tuple[Tensor, Tensor]:
        if self.kept is not None:
            return self.kept
        self.kept = keys, values
        raise _Noted


def can_narrow(module: nn.Module, args: tuple, kwargs: Mapping[str, Any], at: Tensor) -> bool:
    """Whether a decoder layer, called with these arguments, can be entered at some positions.

    Args:
        module: the layer; args, kwargs: what it is called with besides its states.
        at: [R, L] bool.
    """
    if args or "past_key_values" not in kwargs or kwargs["past_key_values"] is not None:
        return False
    # Leaving a layer early would skip what FSDP, offloading or a compiled graph do at its end.
    whole = all(not hasattr(weight, "placements") for weight in module.parameters())
    hooked = any(hasattr(each, "_hf_hook") for each in module.modules())
    if not whole or hooked or getattr(module, "_compiled_call_impl", None) is not None:
        return False
    # Without a mask what a query sees depends on where it stands among all.
    return isinstance(kwargs.get("attention_mask"), Tensor) and all(
        _cuttable(name, value, *at.shape) for name, value in kwargs.items()
    )


def _cuttable(name: str, value: Any, rows: int, length: int) -> bool:
    if name == "attention_mask":
        return value.dim() == 4 and value.shape[0] in (1, rows) and value.shape[2] == length
    if name == "position_embeddings":
        return isinstance(value, tuple) and all(
            isinstance(t, Tensor) and t.dim() > 2 and t.shape[-3] in (1, rows) and t.shape[-2] == length
            for t in value
        )
    if name == "position_ids" and value is not None:
        return value.dim() > 1 and value.shape[-2] in (1, rows) and value.shape[-1] == length
    return value is None or isinstance(value, (bool, int, float, str))


def run_narrow(module: nn.Module, states: Tensor, kwargs: Mapping[str, Any], at: Tensor) -> Tensor:
    """What a decoder layer makes of some positions: [K, D], row by row.

    Args:
        states: [R, L, D] in front of the layer; at: [R, L] bool, K of them.
    """
    door = _Door()
    try:
        module(states, **{**kwargs, "past_key_values": door})
    except _Noted:
        pass
    row, places, wanted = places_of(at)
    few = {name: cut(name, value, row, places) for name, value in kwargs.items()}
    output = module(states[row, places], **{**few, "past_key_values": door})
    return (output[0] if isinstance(output, tuple) else output)[wanted]


def places_of(at: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Positions [R, L] bool as indices: rows [R, 1], columns [R, W], and which of these are wanted [R, W]."""
    count = at.sum(1)
    width = int(count.max())
    places = at.int().argsort(dim=1, descending=True, stable=True)[:, :width]
    wanted = torch.arange(width, device=at.device) < count[:, None]
    # Rows with fewer repeat their first: padding might see nothing, and its gradient would not be a number.
    places = torch.where(wanted, places, places[:, :1])
    return torch.arange(len(at), device=at.device)[:, None], places, wanted


def cut(name: str, value: Any, row: Tensor, places: Tensor) -> Any:
    """An argument of a layer that `can_narrow` allows, at the places [R, W] only."""
    if name == "attention_mask":
        return value.expand(len(places), -1, -1, -1).transpose(1, 2)[row, places].transpose(1, 2)
    if name == "position_embeddings":
        return tuple(_at(t, -3, row, places) for t in value)
    if name == "position_ids" and value is not None:
        return _at(value, -2, row, places)
    return value


def _at(value: Tensor, dim: int, row: Tensor, places: Tensor) -> Tensor:
    """value [.., R or 1, L, ..] with its rows in dimension `dim` -> [.., R, W, ..]."""
    shape = list(value.shape)
    shape[dim] = len(places)
    return value.expand(shape)[(..., row, places) + (slice(None),) * (-dim - 2)]
