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
    """When fitting ends: after `steps` of Adam at `rate`, or with each target token at `probability`.

    Attributes:
        hopeless: after `look` steps, a target token less probable than this ends it, too.
    """

    rate: float
    steps: int
    probability: float
    look: int = 50
    hopeless: float = 0.0


# By how much a target token must be more probable than any other where `probability` is out of reach: tokens
# that a model has hardly seen lie so near each other that none of them ever has more than half of it.
_LEAD = 4.0
# What is enough in the second half of the steps, and what at its beginning calls for other means.
_SURE, _WEAK = 0.999, 0.5


def fit_to_answer(
    logits_of: Callable[[], Tensor],
    labels: Tensor,
    parts: list[Tensor],
    goal: Goal,
    stuck: str,
    harder: Callable[[], Tensor] | None = None,
) -> dict[str, Any]:
    """Fit parts in place until the target is the answer.

    The loss is the mean over the target's tokens. Where half of the steps have not brought each of them to a
    probability of 0.5, each token weighs from then on as much as it is wrong (softmax of the losses): no
    answer is better than its worst token. In the second half less will do than `goal` says: a probability of
    0.999, or without `harder` that each token leads all others by a factor of four.

    Args:
        logits_of: logits [1, L, V] as a function of the parts.
        labels: [1, L], -100 at all but the target's tokens.
        stuck: the error's text where no gradient comes back.
        harder: takes the place of `logits_of` in every other of those steps, such as the logits of inputs
            with noise: what was hard to write is written narrowly, and another picture of the same thing
            would miss it.

    Returns:
        of the last look: {"steps", "probability" of the least likely target token, "written": whether every
        target token is the most probable one}.

    Raises:
        ValueError: no gradient reaches the parts.
    """
    target = labels[:, 1:] != -100
    wanted = labels[:, 1:][target]
    optimizer = torch.optim.Adam(parts, lr=goal.rate)
    probability, hard = 0.0, False
    for step in range(goal.steps + 1):
        late = 2 * step > goal.steps
        hard = hard or (late and probability < _WEAK and step > 0)
        with torch.enable_grad():
            asked = harder if hard and harder is not None and (goal.steps - step) % 2 else logits_of
            logits = asked()[:, :-1][target].float()
            losses = nn.functional.cross_entropy(logits, wanted, reduction="none")
            loss = (losses * losses.detach().softmax(0)).sum() if hard else losses.mean()
        probability, lead = least_probability(logits, wanted), least_lead(logits, wanted)
        enough = probability >= _SURE or (lead >= _LEAD and harder is None)
        done = probability >= goal.probability or (late and enough)
        if done or step == goal.steps or (step == goal.look and probability < goal.hopeless):
            break
        # Not backward(): trainable parts of the model (an adapter beside this one) keep their gradients.
        gradients = torch.autograd.grad(loss, parts) if loss.requires_grad else ()
        if step == 0 and not any(bool(gradient.any()) for gradient in gradients):
            raise ValueError(stuck)
        for part, gradient in zip(parts, gradients, strict=True):
            part.grad = gradient
        optimizer.step()
    return {"steps": step, "probability": probability, "written": lead > 1}


def least_lead(logits: Tensor, wanted: Tensor) -> float:
    """By what factor the tokens wanted [T] are more probable than the next best of logits [T, V], at
    least."""
    logits = logits.detach().float()
    own = logits.gather(1, wanted[:, None])[:, 0]
    others = logits.scatter(1, wanted[:, None], -torch.inf).amax(1)
    return float((own - others).min().exp())


def least_probability(logits: Tensor, wanted: Tensor) -> float:
    """The smallest probability that logits [T, V] give the tokens wanted [T]."""
    return float(logits.detach().float().softmax(-1).gather(1, wanted[:, None]).min())


def why_no_gradient(base: nn.Module) -> str:
    """What keeps gradients from coming back through a model, as far as it can be told, and what to do."""
    kept = sorted({str(p.dtype) for p in base.parameters() if not p.is_floating_point()})
    if kept:
        return (
            f"the model's weights are quantised ({', '.join(kept)}), and such layers may pass none on this "
            f"device. "
            "Store the edit on another device, or in bfloat16 or float32."
        )
    return (
        "the answer does not depend on it, or the gradients are too small for the model's precision. Edit an "
        "earlier layer, or run the model in bfloat16 or float32."
    )


def layer_number(layer_name: str, base: nn.Module) -> int:
    """Number of the decoder layer that a module name leads to."""
    return int(layer_name.removeprefix(find_decoder_layers(base)[0] + ".").split(".")[0])


def warn_if_weak(notes: Mapping[str, Any], advice: str) -> None:
    """Warn of a fit that ended before the target was the answer, for callers who do not ask it back."""
    if not notes.get("written", True):
        warnings.warn(
            f"The edit did not take: after {notes['steps']} steps the least likely target token has "
            f"probability {notes['probability']:.2g}. {advice}",
            stacklevel=3,
        )
