"""What the demo can be about: the embedded model and its drawn world, or `smol` and its pictures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from PIL import Image

from ..data import EditRequest, EditSample, Probe
from ..models.images import open_image
from .loading import EMBEDDED, SMOL

if TYPE_CHECKING:
    from ..editor import Editor

# Asked beside a picture of the user's own, where nobody wrote rewordings or other questions.
_OTHER_QUESTION = "What colours are in the picture?"
_TEXT = "What is the capital of France?"


class DemoWorld(Protocol):
    """A model with editors, and facts to edit in it.

    Attributes:
        title: the model in words.
        about: what its pictures show, as "a logo".
        edits: single edits to measure where the user does not say.
    """

    title: str
    about: str
    edits: int

    def editors(self) -> dict[str, Editor]:
        """Method to an editor without edits; the first one tells the story."""

    def samples(self, count: int, seed: int) -> list[EditSample]:
        """Facts to edit, with everything that measures them."""

    def truth(self, sample: EditSample) -> str:
        """The answer that an edit overwrites; "" where nobody knows it."""

    def own(self, picture: Path, question: str, answer: str) -> EditSample:
        """An edit of the user's own, with what can be asked about any picture."""


class EmbeddedWorld:
    """The small model that ships with the package.

    Args:
        weights: folder of a retrained model and its editors, or None for those of the package.
    """

    title, about, edits = "the embedded vision-language model", "a logo", 100

    def __init__(self, weights: Path | None = None):
        from ..toy.world import World

        self.weights = weights
        self.world = World(0)

    def editors(self) -> dict[str, Editor]:
        """DualEdit and BalancEdit."""
        from ..toy.editors import METHODS, load_editor

        vlm, editors = (
            (None, None) if self.weights is None else (self.weights / "vlm", self.weights / "editors")
        )
        return {m: load_editor(m, vlm=vlm, weights=editors, fallback=False) for m in METHODS}

    def samples(self, count: int, seed: int) -> list[EditSample]:
        """Of the world's test brands."""
        from ..toy.samples import edit_samples

        return edit_samples(self.world, "test", count, seed)

    def truth(self, sample: EditSample) -> str:
        """As the world has it."""
        return "" if sample.entity < 0 else self.world.answer(sample.entity, sample.family)

    def own(self, picture: Path, question: str, answer: str) -> EditSample:
        """Beside logos and scenes of the world."""
        from ..toy.pictures import sample_pictures

        others = [(sample.image, sample.questions[0][0]) for sample in sample_pictures()]
        alike = [image for image, _ in others[:2]]
        unrelated = [Probe(*others[-1])]
        return _own_sample(picture, question, answer, [], alike, unrelated, "4 plus 5 is what?", others[0][1])


class SmolWorld:
    """The pretrained model, and pictures that many artists drew."""

    title, about, edits = "the pretrained vision-language model smol", "a drawing", 20
    _STORY = ("country", "brand", "name")  # what a stranger understands at a glance, best first

    def __init__(self):
        from ..smol import load_concepts
        from ..smol.benchmark import Pictures

        self._pictures = Pictures
        self.concepts = load_concepts()

    def editors(self) -> dict[str, Editor]:
        """The default of those that `smol` comes with."""
        from ..smol.editors import METHODS, load_editor

        return {METHODS[0]: load_editor(METHODS[0], fallback=False)}

    def samples(self, count: int, seed: int) -> list[EditSample]:
        """Of the benchmark's test split; those that are easy to follow come first."""
        pictures = self._pictures(self.concepts, seed)
        facts = pictures.facts("test")[: max(count, 1)]
        samples = [pictures.sample("test", *fact) for fact in facts]
        ranks = {attribute: rank for rank, attribute in enumerate(self._STORY)}
        return [
            samples[i] for i in sorted(range(len(facts)), key=lambda i: ranks.get(facts[i][1], len(ranks)))
        ]

    def truth(self, sample: EditSample) -> str:
        """As the data set of the picture has it."""
        if sample.entity < 0:
            return ""
        concept, attribute = self.concepts[sample.entity], sample.id.rpartition("/")[2]
        return concept.name if attribute in ("name", "brand") else concept.facts.get(attribute, "")

    def own(self, picture: Path, question: str, answer: str) -> EditSample:
        """Beside other views of the picture, and drawings that look most like it."""
        from ..smol.views import view

        rng = np.random.default_rng(0)
        shown = open_image(picture).convert("RGB")
        side = max(shown.size)
        square = Image.new("RGB", (side, side), "white")
        square.paste(shown, ((side - shown.width) // 2, (side - shown.height) // 2))
        small = square.resize((128, 128), Image.Resampling.BICUBIC)
        views = [view(small, rng, as_card=True) for _ in range(2)]
        return _own_sample(
            picture, question, answer, views, self._nearest(small), [], _TEXT, _OTHER_QUESTION
        )

    def _nearest(self, picture: Image.Image, count: int = 2) -> list[Path]:
        """Drawings whose thumbnails are nearest, of different things."""
        here = _thumbnail(picture)
        ranked = []
        for concept in self.concepts:
            file = next(iter(concept.pictures.values()))
            with Image.open(file) as other:
                ranked.append((float(np.abs(here - _thumbnail(other)).mean()), file))
        away = [file for distance, file in sorted(ranked) if distance > 0.01]  # not the picture itself
        return away[:count]


def world_of(model: str | None, weights: Path | None) -> DemoWorld:
    """What the demo is about.

    Args:
        model: "toy" (or "embedded"), "smol", or None: `smol` where it has been fetched, the embedded one
            elsewhere.
        weights: of a retrained embedded model.

    Raises:
        ValueError: another model, or `smol` where it has not been fetched.
    """
    if model not in (None, SMOL, *EMBEDDED):
        raise ValueError(f"--model {model}: the demo is about smol or toy; others go to dualedit edit.")
    if model in EMBEDDED or weights is not None:
        return EmbeddedWorld(weights)
    if model is None:
        from ..smol import is_fetched

        if not is_fetched():
            return EmbeddedWorld()
    return SmolWorld()


def _own_sample(
    picture: Path,
    question: str,
    answer: str,
    views: list,
    alike: list,
    unrelated: list[Probe],
    text: str,
    other: str,
) -> EditSample:
    locality = {
        "t_loc": [Probe(None, text)],
        "m_loc": unrelated,
        "hard_image": [Probe(image, question) for image in alike],
        "hard_question": [Probe(picture, other)] if other != question else [],
    }
    return EditSample(
        EditRequest(picture, question, answer),
        {"v_gen": [Probe(image, question, answer) for image in views]} if views else {},
        {kind: probes for kind, probes in locality.items() if probes},
    )


def _thumbnail(image: Image.Image) -> np.ndarray:
    small = image.convert("RGB").resize((24, 24), Image.Resampling.BOX)
    return np.asarray(small, np.float32) / 255
