"""Fitting the pooled routing key to training facts: the same fact close, other facts apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..data import EditSample, Probe
from ..models.architectures import hidden_size, unwrap
from ..models.placement import to_device
from ..models.prompting import Prompter
from ..runtime.context import recording
from ..runtime.partial import leaving
from ..tuners.adapter import active_adapter
from ..tuners.layer import EditLayer


@dataclass
class Questions:
    """R questions as a pooled key sees them.

    Attributes:
        last: [R, D] state of the last prompt token where the gate reads it.
        pictured: [R, D] mean image token as it enters the decoder; zero where there is none.
    """

    last: Tensor
    pictured: Tensor


def questions_about(sample: EditSample) -> list[Probe]:
    """Questions about a sample's fact, the edit first.

    Wordings come from the request and its rephrases, never from "t_gen" (the test's); of "v_gen" only the
    images are used.
    """
    request = sample.request
    wordings = [request.prompt, *sample.rephrases]
    same = [Probe(request.image_source, wording) for wording in wordings]
    for number, probe in enumerate(sample.generality.get("v_gen", ())):
        same.append(Probe(probe.image_source, wordings[number % len(wordings)]))
    return same


@torch.no_grad()
def read_questions(model: nn.Module, prompter: Prompter, probes: Sequence[Probe]) -> Questions:
    """What the pooled key sees of some questions; only the frozen layers below the gate run."""
    base, layer = unwrap(model), _gated_layer(model)
    inputs = prompter.inputs([(probe.image, probe.prompt) for probe in probes])
    with recording(base) as states, leaving(layer):
        base(**to_device(inputs, base), use_cache=False)
    last = states[layer.layer_name][:, -1]  # prompts are padded on the left
    none = last.new_zeros(len(last), hidden_size(base))
    return Questions(last, none if states.mean_image is None else states.mean_image)


def _gated_layer(model: nn.Module) -> EditLayer:
    adapter = active_adapter(model)
    for layer in adapter.layers.values():
        if layer.router(adapter.name) is not None:
            return layer
    raise ValueError(
        f"adapter {adapter.name!r} ({type(adapter.config).__name__}) has no pooled routing key: inject it "
        f"with key='pooled'."
    )


def fit_pooled_key(
    model: nn.Module,
    prompter: Prompter,
    samples: Sequence[EditSample],
    shrinkage: float = 0.1,
    image_weight: float = 3.0,
    progress: bool = True,
) -> dict[str, int]:
    """Fit the pooled key of the active adapter in place, in closed form; nothing else changes.

    Linear discriminant analysis (Fisher 1936; Rao 1948), of the last token's state and of the mean image
    token on their own: the covariance of what differs between an edit and its own rephrases and other images
    is made the unit matrix, and of the directions left those are kept in which the edits differ most.

    Args:
        model: from `inject_dualedit(..., key="pooled")` or `inject_balancedit(..., key="pooled")`, with no
            stored edits (their keys would go stale).
        samples: training facts with rephrases or other images; entities that the test uses must not be
            among them. As many as the key has dimensions, or more: with fewer, directions nobody varied
            decide.
        shrinkage: share of the mean variance that is added to each direction, above 0: more trusts the
            samples less.
        image_weight: how many times the cosine of the pictures counts that of the questions, at least 0.

    Returns:
        {"facts", "pairs"} that it was fitted on.

    Raises:
        ValueError: no samples or none with another question about its fact, a model that holds edits, an
            adapter without a pooled key, a shrinkage that is not above 0, an image weight below 0.
    """
    adapter = active_adapter(model)
    router = _gated_layer(model).router(adapter.name)
    if len(adapter.group):
        raise ValueError(f"model holds {len(adapter.group)} edits: fit the key of an adapter without any.")
    if not shrinkage > 0:
        raise ValueError(f"shrinkage={shrinkage}: pass a number above 0, such as 0.1.")
    if not image_weight >= 0:
        raise ValueError(f"image_weight={image_weight}: pass a number from 0 on, such as 3.")
    halves: dict[nn.Module, tuple[list, list]] = {router.question: ([], []), router.picture: ([], [])}
    own: list[int] = []
    shown = tqdm(samples, desc="reading questions", unit="fact", disable=not progress, mininterval=5)
    for place, sample in enumerate(shown):
        read = read_questions(model, prompter, questions_about(sample))
        for (edits, others), states in zip(halves.values(), (read.last, read.pictured), strict=True):
            unit = nn.functional.normalize(states.double(), dim=-1)
            edits.append(unit[:1])
            others.append(unit[1:])
        own += [place] * (len(read.last) - 1)
    if not own:
        raise ValueError(
            f"samples: none of {len(samples)} has a rephrase or another image, so nothing tells what varies "
            "within a fact. Pass facts that have."
        )
    with torch.no_grad():
        router.image_weight.fill_(image_weight)
        for half, found in halves.items():
            edits, others = (torch.cat(states) for states in found)
            apart = (others - edits[own]) / 2**0.5
            known, moved = (states[(states != 0).any(1)] for states in (edits, apart))
            centre = known.mean(0) if len(known) else torch.zeros_like(edits[0])
            half.centre.copy_(centre)
            if len(moved):  # else nothing varies in it: its map stays as it was
                half.map.copy_(discriminants(known - centre, moved, shrinkage)[: len(half.map)])
    return {"facts": len(samples), "pairs": len(own)}


def discriminants(edits: Tensor, apart: Tensor, shrinkage: float) -> Tensor:
    """Directions [D, D], best first, for centred edits [N, D] and differences [R, D] within a fact."""
    within = apart.T @ apart / len(apart)
    within += shrinkage * within.trace() / len(within) * torch.eye(len(within), dtype=within.dtype)
    spread, axes = torch.linalg.eigh(within)
    whitened = axes * spread.rsqrt()
    between = edits @ whitened
    return (whitened @ torch.linalg.eigh(between.T @ between)[1].flip(1)).T
