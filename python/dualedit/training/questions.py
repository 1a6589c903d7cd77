"""The questions of an edit that a training step asks, by the term of the loss that they belong to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ..data import EditSample, Probe
from .recipe import TERMS


@dataclass(frozen=True)
class Question:
    """One question of a batch: which term of the loss it belongs to, and which edit it is bound to."""

    probe: Probe
    term: str
    edit: int


def _pick(options: Sequence, generator: torch.Generator):
    return options[int(torch.randint(len(options), (1,), generator=generator))]


def questions_of(
    sample: EditSample, edit: int, weights: Mapping[str, float], generator: torch.Generator
) -> list[Question]:
    """One question for each term that has a weight and that the sample has a question for.

    Where a sample has wordings of its own for editing (`rephrases`), its generality probes are a test's and
    their wordings are left alone. A locality question without an answer has no position to compare at.
    """
    request = sample.request
    here = request.image_source
    found = {"reliability": [Probe(here, request.prompt, request.target)]}
    own = [Probe(here, wording, request.target) for wording in sample.rephrases]
    found["text_generality"] = own or list(sample.generality.get("t_gen", ()))
    found["image_generality"] = [
        Probe(probe.image_source, request.prompt if own else probe.prompt, request.target)
        for probe in sample.generality.get("v_gen", ())
    ]
    locality = {kind: [p for p in probes if p.answer] for kind, probes in sample.locality.items()}
    found["text_locality"] = locality.get("t_loc", [])
    found["image_locality"] = locality.get("m_loc", [])
    hard = [probes for kind in ("hard_image", "hard_question") if (probes := locality.get(kind))]
    found["hard_locality"] = _pick(hard, generator) if hard else []
    # The edit itself is always read: its keys and values are what the other questions attend to.
    chosen = [term for term in TERMS if found[term] and (weights[term] > 0 or term == "reliability")]
    return [Question(_pick(found[term], generator), term, edit) for term in chosen]


def untrained_terms(samples: Sequence[EditSample], weights: Mapping[str, float]) -> list[str]:
    """The terms that have a weight and no question in any of the samples."""
    generator = torch.Generator().manual_seed(0)
    wanted = {term for term in TERMS if weights[term] > 0}
    for sample in samples:
        wanted -= {question.term for question in questions_of(sample, 0, weights, generator)}
        if not wanted:
            break
    return [term for term in TERMS if term in wanted]
