"""Edits of the demo world with everything that measures them: ``edit_samples(world, split, count, seed)``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from dualedit.data import EditRequest, EditSample, Probe
from dualedit.toy.world import ATTRIBUTES, QUESTIONS, World, answer_vocabulary

_PROBES = 2  # of each kind at least


def edit_samples(
    world: World, split: str, count: int, seed: int = 0, only: Callable[[int, str], bool] | None = None
) -> list[EditSample]:
    """Counterfactual edits of facts about logos, drawn without repeating a fact until all have been used.

    Parameters
    ----------
    world : the world to edit.
    split : ``"train"`` or ``"test"``; entities (and with them look-alikes) never cross.
    count : how many samples, at least 1.
    seed : the same seed gives the same samples, pictures included.
    only : leaves out, of the ``count`` samples, those of which it says False to (entity, attribute); nothing
        is drawn for them.

    Returns
    -------
    Samples whose ``family`` is the attribute and whose ``entity`` numbers the logo. The request asks the
    canonical question; its target is another answer of the same attribute, never the true one. Probes:
    ``t_gen`` the request's picture in the two wordings kept for testing; ``v_gen`` new pictures of the logo
    (the last one in a test wording); ``t_loc`` text-only facts; ``m_loc`` digits, scenes and other
    families' logos; ``hard_image`` the same question about look-alikes; ``hard_question`` other attributes
    of the same logo, in new pictures. Locality answers are the world's.

    Raises
    ------
    ValueError : unknown split, or ``count`` below 1.
    """
    if count < 1:
        raise ValueError(f"count={count} is too small; ask for at least 1 sample")
    chosen = chosen_facts(world, split, count, seed)
    return [
        _sample(world, split, *fact, _random(world, split, i, seed))
        for i, fact in enumerate(chosen)
        if only is None or only(*fact)
    ]


def edit_sample(world: World, split: str, place: int, seed: int = 0) -> EditSample:
    """The one at a place of `edit_samples`, counted from 0, without drawing the others."""
    fact = chosen_facts(world, split, place + 1, seed)[place]
    return _sample(world, split, *fact, _random(world, split, place, seed))


def renumbered(sample: EditSample, by: int) -> EditSample:
    """The sample with the numbers of its entities raised, to store samples of several worlds together."""

    def raised(probe: Probe) -> Probe:
        return probe if probe.fact is None else replace(probe, fact=(probe.fact[0] + by, probe.fact[1]))

    locality = {kind: [raised(probe) for probe in probes] for kind, probes in sample.locality.items()}
    return replace(sample, entity=sample.entity + by, locality=locality)


def chosen_facts(world: World, split: str, count: int, seed: int) -> list[tuple[int, str]]:
    """Which facts are edited; asking for more does not change the first ones."""
    facts = [(entity, attribute) for entity in world.entities(split) for attribute in ATTRIBUTES]
    order = np.random.default_rng([seed, 7])
    chosen: list[int] = []
    while len(chosen) < count:
        chosen.extend(order.permutation(len(facts)).tolist())
    return [facts[fact] for fact in chosen[:count]]


def _random(world: World, split: str, place: int, seed: int) -> np.random.Generator:
    number = {"train": 0, "test": 1}[split]
    return np.random.default_rng([seed, world.seed, number, place, 11])


def counterfactual(world: World, entity: int, attribute: str, rng: np.random.Generator) -> str:
    """A random answer of the attribute's vocabulary that is not the true one."""
    options = [answer for answer in answer_vocabulary(attribute) if answer != world.answer(entity, attribute)]
    return options[int(rng.integers(len(options)))]


def _sample(world: World, split: str, entity: int, attribute: str, rng: np.random.Generator) -> EditSample:
    wordings = QUESTIONS[attribute]
    target = counterfactual(world, entity, attribute, rng)
    request = EditRequest(world.render(entity, rng), wordings.canonical, target)
    generality = {
        "t_gen": [Probe(request.image, wording, target) for wording in wordings.test],
        "v_gen": [
            Probe(world.render(entity, rng), wording, target)
            for wording in (wordings.canonical, wordings.canonical, wordings.test[0])
        ],
    }
    locality = {
        "t_loc": _text_probes(world, rng),
        "m_loc": _image_probes(world, split, entity, rng),
        "hard_image": _look_alike_probes(world, entity, attribute, rng),
        "hard_question": _other_questions(world, entity, attribute, rng),
    }
    return EditSample(request, generality, locality, list(wordings.rephrases), attribute, entity)


def _pick(options: list | tuple, rng: np.random.Generator) -> object:
    return options[int(rng.integers(len(options)))]


def _text_probes(world: World, rng: np.random.Generator) -> list[Probe]:
    facts = [world.text_facts[int(i)] for i in rng.permutation(len(world.text_facts))[:_PROBES]]
    return [Probe(None, _pick(fact.questions, rng), fact.answer) for fact in facts]


def _image_probes(world: World, split: str, entity: int, rng: np.random.Generator) -> list[Probe]:
    """One digit or scene picture, and one logo of another family with any question about it."""
    image, asks = world.digit(rng, held_out=True) if rng.random() < 0.5 else world.scene(rng)
    ask = _pick(asks, rng)
    others = [e for e in world.entities(split) if world.family[e] != world.family[entity]]
    other, attribute = _pick(others, rng), _pick(ATTRIBUTES, rng)
    return [
        Probe(image, ask.question, ask.answer),
        _logo_probe(world, int(other), attribute, rng),
    ]


def _look_alike_probes(world: World, entity: int, attribute: str, rng: np.random.Generator) -> list[Probe]:
    """The canonical question about look-alikes, as different ones as there are."""
    alike = rng.permutation(world.look_alikes(entity)).tolist()
    chosen = [alike[i % len(alike)] for i in range(_PROBES)]
    return [_logo_probe(world, one, attribute, rng) for one in chosen]


def _other_questions(world: World, entity: int, attribute: str, rng: np.random.Generator) -> list[Probe]:
    others = rng.permutation([a for a in ATTRIBUTES if a != attribute]).tolist()[:_PROBES]
    return [_logo_probe(world, entity, other, rng) for other in others]


def _logo_probe(world: World, entity: int, attribute: str, rng: np.random.Generator) -> Probe:
    """The canonical question about a new picture of a logo."""
    answer = world.answer(entity, attribute)
    return Probe(world.render(entity, rng), QUESTIONS[attribute].canonical, answer, (entity, attribute))
