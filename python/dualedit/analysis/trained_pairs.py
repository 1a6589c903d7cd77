"""Adapters trained briefly on chosen layers, and what they reach: DualEdit's Table 1 in small.

Every pair is trained with the same edits in the same order and asked the same held-out questions,
teacher-forced. The gate is DualEdit's: the last token's key behind the earlier layer, with one radius for
all, chosen on one half of the held-out facts for the other half.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..data import EditSample, Probe
from ..datasets.build import Answerer
from ..models.architectures import unwrap
from ..models.prompting import Prompter
from ..training.losses import IGNORED, answer_positions
from ..training.optimise import take_step
from ..training.questions import Question
from ..training.recipe import Recipe
from ..training.setup import Setup, open_accelerator, set_up
from ..training.step import on_device
from .asking_layers import questions_from
from .gate_study import Reached, best_radius, read_distances

_CHANGES = ("t_gen", "v_gen")
_RELATION = {"t_gen": 0, "v_gen": 0, "hard_image": 1, "hard_question": 1, "t_loc": 2, "m_loc": 2}


def with_model_answers(
    answerer: Answerer | None, samples: Sequence[EditSample], each: int = 1
) -> list[EditSample]:
    """Samples with fewer questions of each kind, those that must stay with an answer: the data set's, or what
    the unedited model says.

    Args:
        answerer: asks the model; not needed where the data set says every answer.
        each: most questions of a kind.
    """
    found = []
    for sample in samples:
        asked = [p for probes in sample.locality.values() for p in probes[:each] if not p.answer]
        said = iter(answerer.answers([(p.image_source, p.prompt) for p in asked]) if asked else [])
        locality = {
            kind: [p if p.answer else _answered(p, next(said)) for p in probes[:each]]
            for kind, probes in sample.locality.items()
        }
        generality = {kind: probes[-each:] for kind, probes in sample.generality.items()}
        found.append(dataclasses.replace(sample, locality=locality, generality=generality))
    return found


def _answered(probe: Probe, answer: str) -> Probe:
    return Probe(probe.image_source, probe.prompt, answer.strip() or None)


@contextmanager
def as_it_was(model: nn.Module) -> Iterator[None]:
    """Behind the block, a model's weights, their dtype and its attention are what they were before."""
    base = unwrap(model)
    weights = {name: parameter.data for name, parameter in base.named_parameters()}
    grads = {name: parameter.requires_grad for name, parameter in base.named_parameters()}
    configs = {id(m.config): m.config for m in base.modules() if isinstance(m, PreTrainedModel)}
    attention = [(config, config._attn_implementation) for config in configs.values()]
    try:
        yield
    finally:
        for name, parameter in base.named_parameters():
            parameter.data = weights[name]
            parameter.requires_grad_(grads[name])
        for config, implementation in attention:
            config._attn_implementation = implementation


def train_pair(
    model: nn.Module,
    processor: Any,
    training: Sequence[EditSample],
    held_out: Sequence[EditSample],
    recipe: Recipe,
    seconds: float | None = None,
) -> dict[str, Any]:
    """Train fresh adapters on a pair of layers, ask the held-out questions, take the adapters off again.

    Args:
        model: without adapters; it is as before afterwards.
        training, held_out: facts apart from each other, of `with_model_answers`.
        recipe: layers, width, steps and the rest.
        seconds: of training at most; the steps that were taken are told.

    Returns:
        "reliability" (the edit's question), "generality" (others that must change) and "locality" (those that
        must stay), each a list of shares of right tokens, a number a fact, with the gate; "open": the first
        two as they are with the gate wide open; "steps", "seconds".
    """
    began = time.monotonic()
    with as_it_was(model):
        setup = set_up(model, processor, training, [], recipe, open_accelerator())
        try:
            steps = _train(setup, seconds)
            told = _measure(setup, processor, held_out)
        finally:
            setup.model.unload()
    return {**told, "steps": steps, "seconds": round(time.monotonic() - began, 1)}


def _train(setup: Setup, seconds: float | None) -> int:
    began, done = time.monotonic(), 0
    batches = setup.feed.ahead(0, setup.recipe.steps)
    try:
        for number, made in enumerate(batches):
            take_step(setup, made, number)
            done += 1
            if seconds is not None and time.monotonic() - began > seconds:
                break
    finally:
        batches.close()
    return done


@torch.no_grad()
def _measure(setup: Setup, processor: Any, held_out: Sequence[EditSample]) -> dict[str, Any]:
    layers = [n for n in (setup.recipe.text_layer, setup.recipe.vis_layer) if n is not None]
    asked = [_ask(setup, Prompter(processor, setup.recipe.template), s, min(layers)) for s in held_out]
    reach = [
        (distance, _RELATION[kind], number)
        for number, rows in enumerate(asked)
        for kind, distance, _, _ in rows
        if kind != "rel"
    ]
    table = np.array(reach, dtype=float).reshape(-1, 3)
    found = Reached(table[:, 0], table[:, 1].astype(int), table[:, 2].astype(int))
    radius = []
    for half in (0, 1):  # for facts of this half, chosen on the other
        other = found.fact % 2 != half
        radius.append(best_radius(Reached(found.ratio[other], found.relation[other], found.fact[other]))[0])
    told: dict[str, Any] = {"reliability": [], "generality": [], "locality": [], "open": []}
    for number, rows in enumerate(asked):
        right: dict[str, list[float]] = {"rel": [], "changes": [], "stays": [], "open": []}
        for kind, distance, opened, closed in rows:
            score = opened if kind == "rel" or distance <= radius[number % 2] else closed
            right["rel" if kind == "rel" else "changes" if kind in _CHANGES else "stays"].append(score)
            if kind == "rel" or kind in _CHANGES:
                right["open"].append(opened)
        for name, part in zip(told, ("rel", "changes", "stays", "open"), strict=True):
            told[name].append(round(sum(right[part]) / len(right[part]), 5) if right[part] else None)
    return told


def _ask(
    setup: Setup, prompter: Prompter, sample: EditSample, gate: int
) -> list[tuple[str, float, float, float]]:
    """Of each question: its metric, its distance to the edit's key, and the shares of right tokens with the
    gate open and closed."""
    request = sample.request
    kinds = ["rel"]
    probes = [Probe(request.image_source, request.prompt, request.target)]
    for kind, each in {**sample.generality, **sample.locality}.items():
        for probe in each:
            if probe.answer and kind in _RELATION:
                kinds.append(kind)
                probes.append(Probe(probe.image_source, probe.prompt, probe.answer))
    # Only the edit itself is a "change" to the batch maker: of the others it keeps the unedited answer, too.
    terms = ["reliability"] + ["hard_locality"] * (len(probes) - 1)
    questions = [Question(probe, term, 0) for probe, term in zip(probes, terms, strict=True)]
    maker = dataclasses.replace(setup.feed.make, eos=None, pack=False, one_by_one=False)
    batch = on_device(maker.of(questions, [sample]), setup.step.base)
    shares: dict[int, tuple[float, float]] = {}
    for part, (now, before) in zip(batch.parts, setup.step.logits(batch), strict=True):
        at = answer_positions(part.labels)
        tokens, owner = part.labels[part.labels != IGNORED], part.answer[part.labels != IGNORED]
        best, old = now.argmax(-1), None if before is None else before.argmax(-1)
        for number in owner.unique().tolist():
            own = owner == number
            if kinds[number] == "rel" or kinds[number] in _CHANGES:
                opened = _share(best[own] == tokens[own])
                closed = 0.0 if old is None else _share(old[own] == tokens[own])
            else:
                opened, closed = 0.0 if old is None else _share(best[own] == old[own]), 1.0
            shares[number] = (opened, closed)
        assert int(at.sum()) == len(tokens)
    inputs = prompter.inputs([(probe.image, probe.prompt) for probe in probes])
    with setup.model.disable_adapter():
        far = read_distances(setup.step.base, questions_from(setup.step.base, inputs), [gate])["cosine/last"][
            0
        ]
    return [(kind, far[n], *shares[n]) for n, kind in enumerate(kinds)]


def _share(right: Tensor) -> float:
    return float(right.float().mean())


def pair_summary(unit: Mapping[str, Any]) -> dict[str, float | None]:
    """Means and standard errors over facts, in per cent, and "score": half what must change, half what must
    stay.

    What must change is the mean of reliability and generality.
    """
    columns = {n: [v for v in unit[n] if v is not None] for n in ("reliability", "generality", "locality")}
    told: dict[str, float | None] = {}
    for name, values in columns.items():
        told[name] = round(100 * float(np.mean(values)), 2) if values else None
        told[f"{name}_stderr"] = _error(values)
    scores = [score for score in map(_score, *(unit[n] for n in columns)) if score is not None]
    told["score"] = round(100 * float(np.mean(scores)), 2) if scores else None
    told["score_stderr"] = _error(scores)
    return told


def _score(reliability: float | None, generality: float | None, locality: float | None) -> float | None:
    changes = [value for value in (reliability, generality) if value is not None]
    halves = [sum(changes) / len(changes)] if changes else []
    halves += [locality] if locality is not None else []
    return sum(halves) / len(halves) if halves else None


def _error(values: Sequence[float]) -> float | None:
    return round(100 * float(np.std(values, ddof=1)) / len(values) ** 0.5, 2) if len(values) > 1 else None
