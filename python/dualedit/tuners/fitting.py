"""Fitting tensors of one edit to its answer by gradient descent; the model stays as it is."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..models.architectures import find_decoder_layers


@dataclass(frozen=True)
class Goal:
    """When fitting ends: after `steps` of Adam at `rate`, or with each target token at `probability`."""

    rate: float
    steps: int
    probability: float


def fit_to_answer(
    logits_of: Callable[[], Tensor], labels: Tensor, parts: list[Tensor], goal: Goal, stuck: str
) -> dict[str, Any]:
    """Fit parts in place until the target is the answer; {"steps", "probability"} of the last look.

    Args:
        logits_of: logits [1, L, V] as a function of the parts.
        labels: [1, L], -100 at all but the target's tokens.
        stuck: the error's text where no gradient comes back.

    Raises:
        ValueError: no gradient reaches the parts.
    """
    target = labels[:, 1:] != -100
    wanted = labels[:, 1:][target]
    optimizer = torch.optim.Adam(parts, lr=goal.rate)
    for step in range(goal.steps + 1):
        with torch.enable_grad():
            logits = logits_of()[:, :-1][target].float()
            loss = nn.functional.cross_entropy(logits, wanted)
        probability = least_probability(logits, wanted)
        if probability >= goal.probability or step == goal.steps:
            break
        # Not backward(): trainable parts of the model (an adapter beside this one) keep their gradients.
        gradients = torch.autograd.grad(loss, parts) if loss.requires_grad else ()
        if step == 0 and not any(bool(gradient.any()) for gradient in gradients):
            raise ValueError(stuck)
        for part, gradient in zip(parts, gradients, strict=True):
            part.grad = gradient
        optimizer.step()
    return {"steps": step, "probability": probability}


def least_probability(logits: Tensor, wanted: Tensor) -> float:
    """The smallest probability that logits [T, V] give the tokens wanted [T]."""
    return float(logits.detach().float().softmax(-1).gather(1, wanted[:, None]).min())


def layer_number(layer_name: str, base: nn.Module) -> int:
    """Number of the decoder layer that a module name leads to."""
    return int(layer_name.removeprefix(find_decoder_layers(base)[0] + ".").split(".")[0])


def warn_if_weak(fit: Mapping[str, Any], raise_what: str) -> None:
    """Warn of a fit that ended before the target was the answer."""
    if fit["probability"] < 0.5:
        warnings.warn(
            f"The edit did not take: after {fit['steps']} steps the least likely target token has "
            f"probability {fit['probability']:.2f}. Raise {raise_what}.",
            stacklevel=5,
        )
