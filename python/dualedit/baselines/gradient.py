"""Fitting parameters of a frozen model to one answer, by next-token loss."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .settings import FitSettings


def fit(
    parameters: Sequence[Tensor],
    logits_of: Callable[[], Tensor],
    labels: Tensor,
    settings: FitSettings,
    after_step: Callable[[], None] | None = None,
    penalty: Callable[[], tuple[Tensor, bool]] | None = None,
) -> tuple[int, float]:
    """Adam on the labelled tokens until each of them is likely enough.

    Args:
        parameters: what is tuned, in place; they require a gradient meanwhile and not afterwards.
        logits_of: logits [1, L, V] with the parameters as they are.
        labels: [1, L] int64, -100 outside the answer.
        after_step: called after each step, to keep parameters where they may be.
        penalty: called behind `logits_of`: a further loss, and whether it is low enough to stop.

    Returns:
        steps taken, and the probability of the answer's least likely token.
    """
    target = labels[:, 1:] != -100
    wanted = labels[:, 1:][target]
    optimizer = torch.optim.Adam(parameters, lr=settings.learning_rate)
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        for step in range(settings.max_steps + 1):
            with torch.inference_mode(False), torch.enable_grad():
                logits = logits_of()[:, :-1][target].float()
                loss = nn.functional.cross_entropy(logits, wanted)
                further, fine = (0.0, True) if penalty is None else penalty()
                loss = loss + further
            probability = float(logits.detach().softmax(-1).gather(1, wanted[:, None]).min())
            if (probability >= settings.stop_probability and fine) or step == settings.max_steps:
                break
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()
            if after_step is not None:
                after_step()
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)
            parameter.grad = None
    if probability < 0.5:
        warnings.warn(
            f"The edit did not take: after {step} steps the least likely target token has probability "
            f"{probability:.2f}. Raise max_steps ({settings.max_steps}) or learning_rate "
            f"({settings.learning_rate}).",
            stacklevel=3,
        )
    return step, probability
