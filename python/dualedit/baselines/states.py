"""What one decoder layer sees of a batch of questions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..models.placement import to_device
from ..models.prompting import Prompter, open_questions
from ..runtime.partial import leaving


def entering(args: tuple, kwargs: dict) -> Tensor:
    """The hidden states [R, L, D] that a decoder layer is called with."""
    return args[0] if args else kwargs["hidden_states"]


def last_states(model: nn.Module, layer: nn.Module, prompter: Prompter, questions: Sequence) -> Tensor:
    """[R, D] the last prompt token's state as it enters a layer; what lies above does not run."""
    inputs = to_device(prompter.inputs(open_questions(questions)), model)
    seen: list[Tensor] = []

    def note(module: nn.Module, args: tuple, kwargs: dict) -> None:
        seen.append(entering(args, kwargs)[:, -1])  # prompts are padded on the left

    handle = layer.register_forward_pre_hook(note, with_kwargs=True)
    try:
        with torch.no_grad(), leaving(layer, before=True):
            model(**inputs, use_cache=False)
    finally:
        handle.remove()
    return seen[0].detach().clone()
