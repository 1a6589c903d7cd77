"""Noting what a module is given on questions of training facts, for methods that must leave those alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..data import EditSample
from ..models.prompting import Prompter
from .lessons import lessons_of, rows_of
from .states import entering

_BATCH = 4  # edits


@torch.no_grad()
def noted_inputs(
    model: nn.Module, prompter: Prompter, module: nn.Module, samples: Sequence[EditSample], count: int,
    last: bool, generator: torch.Generator,
) -> Tensor:  # fmt: skip
    """Inputs [N, D] of a module on questions about training edits, their own and unrelated ones.

    Args:
        count: N at most.
        last: of each prompt the last token only; else any of its tokens.
    """
    seen: list[Tensor] = []
    found: list[Tensor] = []

    def note(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        seen.append(entering(args, kwargs))

    handle = module.register_forward_pre_hook(note, with_kwargs=True)
    try:
        for begin in range(0, len(samples), _BATCH):
            lessons = lessons_of(samples[begin : begin + _BATCH], generator)
            rows = rows_of(model, prompter, lessons.questions, lessons.answers)
            seen.clear()
            model(**rows.inputs, use_cache=False)
            states = seen[-1]
            if last:
                found.append(states[torch.arange(len(states)), rows.last].float())
            else:
                tokens = states[rows.prompt].float()
                found.append(tokens[torch.randperm(len(tokens), generator=generator)[: 8 * len(states)]])
            if last and sum(map(len, found)) >= count:
                break
    finally:
        handle.remove()
    whole = torch.cat(found)
    return whole[torch.randperm(len(whole), generator=generator)[:count]]
