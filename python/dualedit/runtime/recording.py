"""What the wrapped layers of the frozen model see of an input."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from ..models.architectures import unwrap
from ..models.placement import to_device
from .context import recording, runtime_of
from .frames import States
from .partial import leaving
from .sequence import Prompt


def record_states(
    model: nn.Module, inputs: Mapping[str, Tensor], until: nn.Module | None = None
) -> tuple[States, Prompt]:
    """What the wrapped layers of the frozen model see of an input, by layer name, and its prompt.

    Args:
        model: with an edit adapter.
        inputs: what a processor returns; with labels, the prompt ends before them.
        until: a module of the model behind which nothing is needed: the forward ends there.

    Raises:
        ValueError: no input ids.
    """
    base = unwrap(model)
    inputs = to_device(inputs, base)
    ids = inputs.get("input_ids")
    if ids is None:
        raise ValueError(
            f"inputs={sorted(inputs)}: input_ids are missing, so image and text cannot be told apart."
        )
    prompt = runtime_of(base).describe(inputs, tuple(ids.shape), ids.device)
    call = {name: value for name, value in inputs.items() if name != "labels"}
    ending = nullcontext() if until is None else leaving(until)
    with torch.no_grad(), recording(base) as states, ending:
        base(**call, use_cache=False)
    return states, prompt
