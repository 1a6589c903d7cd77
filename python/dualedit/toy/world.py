"""A small rendered world with facts to edit: ``World(seed)`` decides its logos and all that is known of them.

A world has 520 made-up logos in look-alike families: 320 for training editing methods, 200 for testing them,
no family in both.  Each has five facts (brand, country, product, mascot, founder); members of a family never
share one.  Scenes, handwritten digits and text-only facts are there for locality.  numpy and PIL only
(scikit-learn's bundled digits are read when a digit is asked for); the same seed gives the same world and the
same pictures.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from dualedit.toy import scenes as world_scenes
from dualedit.toy.logos import Logo, draw_families, look_alike, render_logo
from dualedit.toy.scenes import Ask
from dualedit.toy.words import (
    ATTRIBUTES,
    LOOK_QUESTIONS,
    QUESTIONS,
    TextFact,
    Wordings,
    answer_vocabulary,
    draw_facts,
    text_facts,
)

__all__ = ["ATTRIBUTES", "QUESTIONS", "Ask", "Logo", "TextFact", "Wordings", "World", "answer_vocabulary"]

SPLITS = {"train": 320, "test": 200}
_FAMILY_SIZES = (3, 4, 5)


def _family_sizes(total: int, rng: np.random.Generator) -> list[int]:
    """Family sizes of 3 to 5 that add up to ``total``, in random order."""
    sizes: list[int] = []
    while (left := total - sum(sizes)) > 5:
        sizes.append(int(rng.choice([s for s in _FAMILY_SIZES if left - s == 0 or left - s >= 3])))
    sizes.append(left)
    return [int(s) for s in rng.permutation(sizes)]


class World:
    """The demo world of one seed.

    Attributes
    ----------
    logos : list[Logo]
        What each entity looks like; an entity is an index into this list.
    family : list[int]
        Look-alike family of each entity.
    text_facts : list[TextFact]
        Facts asked without an image (the same in every world).
    """

    def __init__(self, seed: int = 0) -> None:
        rng = np.random.default_rng([seed, 48])
        self.seed = seed
        sizes = {split: _family_sizes(total, rng) for split, total in SPLITS.items()}
        all_sizes = [size for split in SPLITS for size in sizes[split]]
        families = draw_families(all_sizes, rng)
        self.logos: list[Logo] = [logo for family in families for logo in family]
        self.family: list[int] = [i for i, family in enumerate(families) for _ in family]
        self._facts = draw_facts(all_sizes, rng)
        self.text_facts: list[TextFact] = text_facts()

    def entities(self, split: str) -> range:
        """Entities of ``"train"`` or ``"test"``; raises ``ValueError`` for any other split."""
        if split not in SPLITS:
            raise ValueError(f"split={split!r} is unknown; choose one of {tuple(SPLITS)}")
        return range(SPLITS["train"]) if split == "train" else range(SPLITS["train"], len(self.logos))

    def answer(self, entity: int, attribute: str) -> str:
        """What is true of an entity, e.g. ``answer(3, "country") == "peru"``."""
        return self._facts[entity][attribute]

    def look_alikes(self, entity: int) -> list[int]:
        """Entities that differ in a colour, the badge's shape or one moved stroke (at least one)."""
        first = entity
        while first > 0 and self.family[first - 1] == self.family[entity]:
            first -= 1
        found = []
        for other in range(first, len(self.logos)):
            if self.family[other] != self.family[entity]:
                break
            if other != entity and look_alike(self.logos[entity], self.logos[other]):
                found.append(other)
        return found

    def render(self, entity: int, rng: np.random.Generator) -> Image.Image:
        """A new 48x48 RGB picture of an entity's logo; ``rng`` decides everything that varies."""
        return render_logo(self.logos[entity], rng)

    def look_asks(self, entity: int, rng: np.random.Generator) -> list[Ask]:
        """Questions about what can be seen of a logo (badge colour, badge shape, line colour)."""
        return [
            Ask(name, wordings[int(rng.integers(len(wordings)))], getattr(self.logos[entity], name))
            for name, wordings in LOOK_QUESTIONS.items()
        ]

    def scene(self, rng: np.random.Generator, held_out: bool = False) -> tuple[Image.Image, list[Ask]]:
        """One to three like shapes and questions about them; held out = combinations not trained on."""
        things = world_scenes.draw_scene(rng, held_out)
        return world_scenes.render_scene(things, rng), world_scenes.scene_asks(things, rng)

    def digit(self, rng: np.random.Generator, held_out: bool = False) -> tuple[Image.Image, list[Ask]]:
        """A picture of a real handwritten digit and questions about it; held out = digits not trained on."""
        index = world_scenes.draw_digit(rng, held_out)
        return world_scenes.render_digit(index, rng), world_scenes.digit_asks(index, rng)
