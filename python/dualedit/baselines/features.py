"""What the frozen model knows of questions in front of one of its layers, for networks that compare them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..models.architectures import find_decoder_layers, image_token_ids
from ..models.placement import to_device
from ..models.prompting import Prompter, open_questions
from ..runtime.partial import leaving
from .baseline import Question
from .lessons import Rows
from .states import entering
from .watching import image_columns, mean_over


def asked_rows(model: nn.Module, prompter: Prompter, questions: Sequence[Question]) -> Rows:
    """Rows of questions alone, without answers, padded on the left."""
    inputs = to_device(prompter.inputs(open_questions(questions)), model)
    ids, prompt = inputs["input_ids"], inputs["attention_mask"].bool()
    image = image_columns(ids, torch.tensor(image_token_ids(model), dtype=torch.int64)) & prompt
    return Rows(inputs, torch.full_like(ids, -100), prompt, image)


@dataclass
class Features:
    """R rows as one layer sees them.

    Attributes:
        states: [R, L, D] float32, as they enter the layer.
        rows: what they are states of.
        image: [R, D] float32, the mean image token as it enters the decoder; zero without one.
    """

    states: Tensor
    rows: Rows
    image: Tensor

    @property
    def question(self) -> Tensor:
        """[R, 2 D], the last prompt token and the mean image token, each at the length sqrt(D)."""
        last = self.states[torch.arange(len(self.states)), self.rows.last]
        return torch.cat([_scaled(last), _scaled(self.image)], dim=-1)

    @property
    def fact(self) -> Tensor:
        """[R, 5 D], the same and the mean, largest and smallest states over the answer's tokens."""
        answer = (self.rows.labels != -100)[..., None]
        low, high = (self.states.masked_fill(~answer, float(sign)) for sign in ("-inf", "inf"))
        pools = (mean_over(self.states, answer[..., 0]), low.amax(1), high.amin(1))
        return torch.cat([self.question, *map(_scaled, pools)], dim=-1)


def _scaled(states: Tensor) -> Tensor:
    return nn.functional.normalize(states, dim=-1) * states.shape[-1] ** 0.5


@torch.no_grad()
def features_of(model: nn.Module, rows: Rows, number: int) -> Features:
    """What decoder layer `number` sees of rows; it and the layers above do not run."""
    layers = find_decoder_layers(model)[1]
    seen: dict[str, Tensor] = {}

    def at_entry(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        seen["image"] = mean_over(entering(args, kwargs), rows.image)

    def at_layer(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        seen["states"] = entering(args, kwargs).float()

    handles = [
        layers[0].register_forward_pre_hook(at_entry, with_kwargs=True),
        layers[number].register_forward_pre_hook(at_layer, with_kwargs=True),
    ]
    try:
        with leaving(layers[number], before=True):
            model(**rows.inputs, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return Features(seen["states"], rows, seen["image"])
