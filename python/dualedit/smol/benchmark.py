"""The benchmark `pictures`: facts about things that several artists drew, and what measures them.

Facts are counterfactual: the new answer is another thing's or a few words of everyday life. A concept belongs
to one split for each seed. Pictures of the edits themselves are by artists of the split's own role, so that a
test edit shows a drawing that neither the model nor an editor has seen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ..data import EditRequest, EditSample, Probe
from .pictures import FAMILIES, SETS, Concept
from .views import view
from .wordings import ABOUT_NAMES, ATTRIBUTES, EVERYDAY, KINDS, OF_THINGS, QUESTIONS, TEXT

SPLITS = ("training", "validation", "test", "unseen")
_TEST, _VALIDATION = 300, 100  # concepts, at least; the others are for training
# Who draws the picture of an edit, and who draws the others, those first that are asked first.
_OWN = {"training": "training", "validation": "validation", "test": "test", "unseen": "test"}
_OTHERS = {
    "training": ("validation", "training"), "validation": ("training", "training"),
    "test": ("validation", "training"), "unseen": ("validation", "training"),
}  # fmt: skip
_THUMB = 24  # pixels of a side where pictures are compared
# Mean difference of two thumbnails, of 1, below which two pictures are taken for the same: in a round cut,
# the flags of Jordan and Palestine.
_TWINS = 0.012
_CARDS = ("flags", "logos")


class Pictures:
    """The benchmark of one seed.

    Args:
        concepts: all concepts (`dualedit.smol.load_concepts()`).
        seed: which concepts are in which split, which facts are drawn, and everything that varies in them.
        families: facts are about these alone; which split a concept is in does not depend on it.

    Attributes:
        concepts: an entity is an index into this list.
    """

    def __init__(self, concepts: Sequence[Concept], seed: int = 0, families: Sequence[str] = FAMILIES):
        unknown = set(families) - set(FAMILIES)
        if unknown or not families:
            raise ValueError(f"families={tuple(families)!r}: choose from {', '.join(FAMILIES)}.")
        self.concepts, self.seed, self.families = list(concepts), seed, tuple(families)
        self._split = self._draw_splits()
        self._thumbs: dict[Path, np.ndarray] = {}
        self._alike: dict[str, list[int]] = {}
        for entity, concept in enumerate(self.concepts):
            if concept.seen:
                self._alike.setdefault(concept.subgroup, []).append(entity)

    def entities(self, split: str) -> list[int]:
        """The concepts of a split: "training" (600 and more), "validation" (100), "test" (300), or "unseen",
        which the model's training did not see. Raises ValueError for another name."""
        if split not in SPLITS:
            raise ValueError(f"split={split!r}: choose one of {SPLITS}.")
        return [e for e in self._split[split] if self.concepts[e].family in self.families]

    def facts(self, split: str) -> list[tuple[int, str]]:
        """All (entity, attribute) of a split in the order in which they are edited."""
        facts = [(e, a) for e in self.entities(split) for a in attributes_of(self.concepts[e])]
        order = np.random.default_rng([self.seed, SPLITS.index(split), 7]).permutation(len(facts))
        return [facts[i] for i in order]

    def samples(self, split: str, count: int | None = None) -> list[EditSample]:
        """The first `count` edits of a split, or all of them.

        generality: "t_gen"; "v_gen" of kind "view" (the same drawing) and "artist" (another's). locality:
        "hard_image" of kind "random" (another thing of the subgroup), "nearest" (by pixels, by the artist of
        the first other picture) and "same_artist" (by pixels, by the edit's own artist); "hard_question",
        "m_loc", "t_loc". portability: "in_words", the same question about the thing's name, with no picture.
        Whether that has to change is open; it counts where it does.

        Raises:
            ValueError: an unknown split, or one with fewer facts.
        """
        facts = self.facts(split)
        count = len(facts) if count is None else count
        if not 1 <= count <= len(facts):
            raise ValueError(f"count={count}: the split {split!r} has {len(facts)} facts.")
        return [self.sample(split, *fact) for fact in facts[:count]]

    def sample(self, split: str, entity: int, attribute: str) -> EditSample:
        """The edit of one fact; it does not depend on the others."""
        concept, words = self.concepts[entity], QUESTIONS[attribute]
        number = OF_ALL.index(attribute)
        rng = np.random.default_rng([self.seed, SPLITS.index(split), entity, number, 11])
        own = _pick(sorted(concept.by_role(_OWN[split])), rng)
        picture, others = concept.pictures[own], self._others(split, concept, own, rng)
        target = self._target(entity, attribute, rng)
        generality = {
            "t_gen": [Probe(picture, text, target) for text in _some(words.test, 2, rng)],
            "v_gen": [
                *(Probe(self._view(entity, own, rng), words.question, target, kind="view") for _ in range(2)),
                *(Probe(concept.pictures[s], words.question, target, kind="artist") for s in others),
            ],
        }
        locality = {
            "t_loc": self._texts(entity, rng),
            "m_loc": [self._unrelated(split, entity, rng) for _ in range(2)],
            "hard_image": self._look_alikes(entity, attribute, own, others, rng),
            "hard_question": [
                Probe(self._view(entity, own, rng), QUESTIONS[a].question, None, (entity, a))
                for a in _some([a for a in attributes_of(concept) if a != attribute], 2, rng)
            ],
        }
        portability = {}
        if words.in_words:
            asked = words.in_words.format(concept.name)
            portability["in_words"] = [Probe(None, asked, target, kind="in_words")]
        return EditSample(
            EditRequest(picture, words.question, target), generality, locality, list(words.rephrases),
            attribute, entity, portability, id=f"{concept.family}/{concept.name}/{attribute}",
        )  # fmt: skip

    # ------------------------------------------------------------------ what is drawn

    def _draw_splits(self) -> dict[str, list[int]]:
        """Each family is shared out in the same proportions."""
        rng = np.random.default_rng([self.seed, 31])
        testable = {f: [] for f in FAMILIES}
        result = {split: [] for split in SPLITS}
        for entity, concept in enumerate(self.concepts):
            drawn = len(concept.pictures) > 1
            if not concept.seen:
                if concept.by_role("test") and drawn:
                    result["unseen"].append(entity)
            elif concept.by_role("test") and drawn:
                testable[concept.family].append(entity)
            elif concept.by_role("training"):
                result["training"].append(entity)
        total = sum(map(len, testable.values()))
        test, validation = min(_TEST, 0.3 * total), min(_VALIDATION, 0.1 * total)
        for found in testable.values():
            order = [found[i] for i in rng.permutation(len(found))]
            share = len(order) / max(1, total)
            count = math.ceil(test * share)
            result["test"] += order[:count]
            rest = order[count:]
            known = [e for e in rest if self.concepts[e].by_role("validation")]
            chosen = set(known[: math.ceil(validation * share)])
            result["validation"] += sorted(chosen)
            result["training"] += [
                e for e in rest if e not in chosen and self.concepts[e].by_role("training")
            ]
        return {split: sorted(entities) for split, entities in result.items()}

    def _others(self, split: str, concept: Concept, own: str, rng) -> list[str]:
        """Two sets by other artists that draw the same thing, or fewer."""
        chosen: list[str] = []
        for role in _OTHERS[split]:
            artists = {SETS[own].artist, *(SETS[s].artist for s in chosen)}
            free = [s for s in sorted(concept.by_role(role)) if SETS[s].artist not in artists]
            if not free:
                free = [s for s in sorted(concept.pictures) if SETS[s].artist not in artists]
                free = [s for s in free if SETS[s].role in ("training", "validation")]
            if free:
                chosen.append(_pick(free, rng))
        return chosen

    def _target(self, entity: int, attribute: str, rng) -> str:
        concept = self.concepts[entity]
        everyday = EVERYDAY.get(attribute, EVERYDAY[""])
        if attribute == "kind":
            others = sorted(set(KINDS.values()))
        elif attribute in ("owner", "keeping"):
            others = list(everyday)
        else:
            key = "name" if attribute == "brand" else attribute
            alike = [c for c in self.concepts if c.family == concept.family and key in c.facts]
            others = sorted({c.facts[key] for c in alike})
        true = {text.lower() for texts in concept.accepted.values() for text in texts}
        true |= {concept.name.lower(), KINDS.get(concept.subgroup, "")}
        options = everyday if rng.random() < 0.5 else others
        return _pick([text for text in options if text.lower() not in true], rng)

    def _view(self, entity: int, own: str, rng) -> bytes:
        concept = self.concepts[entity]
        with Image.open(concept.pictures[own]) as image:
            return view(image.convert("RGB"), rng, concept.family in _CARDS)

    def _look_alikes(self, entity: int, attribute: str, own: str, others: list[str], rng) -> list[Probe]:
        """One picture of each kind; fewer where no artist has drawn another thing of the subgroup."""
        concept, question = self.concepts[entity], QUESTIONS[attribute].question
        alike = [e for e in self._alike.get(concept.subgroup, ()) if e != entity]
        if len(alike) < 3:
            alike = [
                e
                for e, c in enumerate(self.concepts)
                if c.family == concept.family and c.seen and e != entity
            ]
        first = others[0] if others else own
        found: list[tuple[str, int, str]] = []
        drawn = {name: [e for e in alike if name in self.concepts[e].pictures] for name in (first, own)}
        apart = [e for e in drawn[first] if self._apart(entity, e, own, first)]
        if apart:
            found.append(("random", _pick(apart, rng), first))
        for kind, name in (("nearest", first), ("same_artist", own)):
            nearest = self._nearest(entity, own, drawn[name], name)
            if nearest is not None:
                found.append((kind, nearest, name))
        return [
            Probe(self.concepts[e].pictures[name], question, None, (e, attribute), kind)
            for kind, e, name in found
        ]

    def _nearest(self, entity: int, own: str, among: list[int], name: str) -> int | None:
        here = self._thumb(self.concepts[entity].pictures[own])
        ranked = []
        for other in among:
            away = float(np.abs(here - self._thumb(self.concepts[other].pictures[name])).mean())
            if self._apart(entity, other, own, name):
                ranked.append((away, other))
        return min(ranked)[1] if ranked else None

    def _apart(self, entity: int, other: int, own: str, name: str) -> bool:
        """Whether two things can be told apart: by the edit's picture, or as one artist draws both."""
        one, two = self.concepts[entity].pictures, self.concepts[other].pictures
        pairs = [(one[own], two[name])]
        pairs += [(one[s], two[s]) for s in (own, name) if s in one and s in two]
        return all(np.abs(self._thumb(a) - self._thumb(b)).mean() > _TWINS for a, b in pairs)

    def _thumb(self, path: Path) -> np.ndarray:
        if path not in self._thumbs:
            with Image.open(path) as image:
                small = image.convert("RGB").resize((_THUMB, _THUMB), Image.Resampling.BOX)
            self._thumbs[path] = np.asarray(small, np.float32) / 255
        return self._thumbs[path]

    def _unrelated(self, split: str, entity: int, rng) -> Probe:
        """Any question about a thing of another family."""
        role = _OWN[split]
        others = [
            e
            for e, c in enumerate(self.concepts)
            if c.seen and c.family != self.concepts[entity].family and c.by_role(role)
        ]
        other = others[int(rng.integers(len(others)))]
        concept = self.concepts[other]
        attribute = _pick(attributes_of(concept), rng)
        picture = concept.pictures[_pick(sorted(concept.by_role(role)), rng)]
        return Probe(picture, QUESTIONS[attribute].question, None, (other, attribute))

    def _texts(self, entity: int, rng) -> list[Probe]:
        others = [c.name for e, c in enumerate(self.concepts) if e != entity and c.family != "logos"]
        asked = _pick(ABOUT_NAMES, rng).format(_pick(others, rng))
        return [Probe(None, asked), Probe(None, _pick(TEXT, rng))]


OF_ALL = tuple(QUESTIONS)


def attributes_of(concept: Concept) -> tuple[str, ...]:
    """What is asked about a concept: of a flag what is known of its country."""
    wanted = ATTRIBUTES.get(concept.family, OF_THINGS)
    return tuple(a for a in wanted if concept.family != "flags" or a in concept.facts)


def _pick(options: Sequence, rng: np.random.Generator):
    return options[int(rng.integers(len(options)))]


def _some(options: Sequence, count: int, rng: np.random.Generator) -> list:
    return [options[i] for i in rng.permutation(len(options))[:count]]
