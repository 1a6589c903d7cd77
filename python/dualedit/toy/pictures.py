"""Pictures of the demo world for a newcomer to ask about. Needs no model."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from .samples import chosen_facts, counterfactual
from .world import ATTRIBUTES, QUESTIONS, World


@dataclass(frozen=True)
class SamplePicture:
    """A picture of the world to try things on.

    Attributes:
        file: name to save it under.
        shows: what it is, in words.
        questions: pairs of question and true answer.
        other_answer: an answer to the first question that is not true, to edit with.
    """

    file: str
    shows: str
    image: Image.Image
    questions: list[tuple[str, str]]
    other_answer: str


def sample_pictures(seed: int = 0) -> list[SamplePicture]:
    """Six pictures: one logo twice, a look-alike of it, another logo, a scene, a digit.

    The digit is scikit-learn's; without it there are five.
    """
    world = World(0)
    rng = np.random.default_rng([seed, 2025])
    entity = chosen_facts(world, "test", 1, seed)[0][0]
    alike = world.look_alikes(entity)[0]
    stranger = next(e for e in world.entities("test") if world.family[e] != world.family[entity])
    pictures = []
    for file, shows, which in (
        ("logo.png", "a brand's logo", entity),
        ("logo-again.png", "the same brand in a new picture", entity),
        ("look-alike.png", "another brand whose logo differs in one detail", alike),
        ("another.png", "an unrelated brand's logo", stranger),
    ):
        asks = [(QUESTIONS[name].canonical, world.answer(which, name)) for name in ATTRIBUTES[1:]]
        other = counterfactual(world, which, ATTRIBUTES[1], np.random.default_rng([seed, 7]))
        pictures.append(SamplePicture(file, shows, world.render(which, rng), asks, other))
    others = [("shapes.png", "coloured shapes", world.scene(rng))]
    try:
        others.append(("digit.png", "a handwritten digit", world.digit(rng, held_out=True)))
    except ImportError:
        pass  # of the extra "toy"; the others do without
    for file, shows, (image, asks) in others:
        pictures.append(SamplePicture(file, shows, image, [(a.question, a.answer) for a in asks], ""))
    return pictures
