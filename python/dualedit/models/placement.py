"""Where a module computes, and inputs brought there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def place_of(module: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Device that a module computes on and floating dtype of its weights.

    Weights that accelerate keeps on the disk, or on the CPU beside a GPU, show as "meta"; its hook knows.
    """
    parameters = list(module.parameters())
    floating = [p for p in parameters if p.is_floating_point()]
    device = parameters[0].device if parameters else torch.device("cpu")
    if device.type == "meta":
        hooks = (getattr(part, "_hf_hook", None) for part in module.modules())
        places = (getattr(one, "execution_device", None) for hook in hooks for one in _each_hook(hook))
        device = torch.device(next((place for place in places if place is not None), device))
    return device, floating[0].dtype if floating else torch.float32


def _each_hook(hook: Any) -> tuple:
    return tuple(getattr(hook, "hooks", (hook,)))


def to_device(inputs: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """Inputs where the model takes them: on its device, floating ones in its dtype."""
    device, _ = place_of(model.get_input_embeddings())
    moved = {}
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            value = value.to(device)
            value = value.to(model.dtype) if value.is_floating_point() else value
            value = value.clone() if value.is_inference() else value  # autograd refuses those
        moved[name] = value
    return moved
