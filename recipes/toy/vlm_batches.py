"""Training batches of the embedded model: pictures for the vision stage, packed question rows for the
language stage.

A packed row holds one picture and as many questions about it as fit, or text-only questions.  Questions of a
row do not see each other: the attention mask is block-diagonal and positions start anew behind the picture.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from dualedit.toy.logos import (
    BADGE_COLOURS,
    BADGE_SHAPES,
    CHANGES,
    LINE_COLOURS,
    STROKES,
    Logo,
    draw_families,
    render_logo,
)
from dualedit.toy.model import AGAIN, IMAGE_TOKENS, NOTE
from dualedit.toy.scenes import (
    SCENE_COLOURS,
    SCENE_PLACES,
    SCENE_SHAPES,
    SCENE_SIZES,
    digit_images,
    draw_digit,
    draw_scene,
    render_digit,
    render_scene,
    scene_asks,
)
from dualedit.toy.words import BRAND_ENDINGS, BRAND_OPENINGS
from dualedit.toy.world import ATTRIBUTES, QUESTIONS, SPLITS, World, answer_vocabulary
from transformers import LlavaProcessor

ROW_LENGTH = 128
# Strangers: three questions of at most twelve tokens behind the picture's 36.
STRANGE_QUESTIONS, STRANGE_LENGTH = 3, 72
IGNORE = -100
# Worlds whose logos are never drawn as strangers, so that they stay unseen for evaluation.
UNSEEN_WORLDS = range(1, 6)
_STRANGE_CHANGES = (*CHANGES, *("strokes",) * 6)
# For comparing pictures, when strokes are seen well: of look-alikes that were taken for the same logo two in
# three then had another outline, the others another badge colour.
_FAMILY_CHANGES = ("badge_shape",) * 4 + ("badge_colour",) * 2 + ("line_colour", "strokes", "strokes")
FAMILY = 4


class Strangers:
    """Logos of no world: nothing is known of them, so they teach looking and comparing, not facts."""

    def __init__(self, world: World) -> None:
        self._known = {logo for seed in UNSEEN_WORLDS for logo in World(seed).logos} | set(world.logos)

    def family(
        self, rng: np.random.Generator, size: int = 2, changes: tuple[str, ...] = _STRANGE_CHANGES
    ) -> list[Logo]:
        """Look-alikes; most differ in one stroke, which is what is hardest to see."""
        while True:
            family = draw_families([size], rng, changes)[0]
            if self._known.isdisjoint(family):
                return family


def stroke_bits(logo: Logo) -> np.ndarray:
    """Which strokes a logo has, float32 [20] of 0 and 1."""
    bits = np.zeros(len(STROKES), dtype=np.float32)
    bits[sorted(logo.strokes)] = 1
    return bits


def pixels(images: list) -> torch.Tensor:
    """PIL images -> float32 [B, 3, 48, 48] as the processor makes it (mean 0.5, std 0.25)."""
    stacked = np.stack([np.asarray(image) for image in images]).transpose(0, 3, 1, 2)
    return (torch.from_numpy(np.ascontiguousarray(stacked)).float() / 255 - 0.5) / 0.25


def _vision_heads() -> dict[str, int]:
    """Number of classes of every label a picture can have."""
    heads = {"entity": sum(SPLITS.values()), "opening": len(BRAND_OPENINGS), "ending": len(BRAND_ENDINGS)}
    heads |= {a: len(answer_vocabulary(a)) for a in ATTRIBUTES if a != "brand"}
    heads |= {
        "shape": len(BADGE_SHAPES),
        "colour": len(BADGE_COLOURS),
        "line": len(LINE_COLOURS),
        "digit": 10,
    }
    for place in SCENE_PLACES:  # class 0: nothing there
        heads[f"{place}_shape"] = len(SCENE_SHAPES) + 1
        heads[f"{place}_colour"] = len(SCENE_COLOURS) + 1
        heads[f"{place}_size"] = len(SCENE_SIZES) + 1
    return heads


class VisionBatches:
    """Pictures with labels for every vision head; ``IGNORE`` where a head does not apply.

    ``shares`` of the pictures are logos of the world, strangers and scenes; the rest are digits.
    """

    heads = _vision_heads()

    def __init__(self, world: World, seed: int, shares: tuple[float, float, float]) -> None:
        self.world, self.rng = world, np.random.default_rng([seed, 1])
        self.strangers = Strangers(world)
        self._names = list(self.heads)
        self._kinds = np.cumsum(shares)

    def _look(self, logo: Logo) -> tuple[dict[str, int], np.ndarray]:
        """Labels of what can be seen of a logo, whoever's it is."""
        labels = {
            "shape": BADGE_SHAPES.index(logo.badge_shape),
            "colour": list(BADGE_COLOURS).index(logo.badge_colour),
            "line": list(LINE_COLOURS).index(logo.line_colour),
        }
        return labels, stroke_bits(logo)

    def _facts(self, entity: int) -> dict[str, int]:
        """Labels of what is known of a world's logo."""
        brand = self.world.answer(entity, "brand")
        labels = {
            "entity": entity,
            "opening": BRAND_OPENINGS.index(brand[:3]),
            "ending": BRAND_ENDINGS.index(brand[3:]),
        }
        for attribute in ATTRIBUTES:
            if attribute != "brand":
                labels[attribute] = answer_vocabulary(attribute).index(self.world.answer(entity, attribute))
        return labels

    def _scene(self) -> tuple[object, dict[str, int]]:
        things = draw_scene(self.rng, alike=False)
        at = {thing.place: thing for thing in things}
        labels = {}
        for place in SCENE_PLACES:
            thing = at.get(place)
            labels[f"{place}_shape"] = SCENE_SHAPES.index(thing.shape) + 1 if thing else 0
            labels[f"{place}_colour"] = SCENE_COLOURS.index(thing.colour) + 1 if thing else 0
            labels[f"{place}_size"] = SCENE_SIZES.index(thing.size) + 1 if thing else 0
        return render_scene(things, self.rng), labels

    def draw(self, size: int, families: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Pixels [B, 3, 48, 48], labels int64 [B, heads] and stroke bits float32 [B, 20] (-1: not a logo).

        ``families`` of four strangers come first, every logo in two pictures, one after the other; ``size``
        pictures behind them.
        """
        compared = [
            logo
            for _ in range(families)
            for logo in self.strangers.family(self.rng, FAMILY, _FAMILY_CHANGES)
            for _ in range(2)
        ]
        size += len(compared)
        images, labels = [], np.full((size, len(self._names)), IGNORE)
        bits = np.full((size, len(STROKES)), -1, dtype=np.float32)
        for i in range(size):
            kind = int(np.searchsorted(self._kinds, self.rng.random(), side="right"))
            if i < len(compared):
                found, bits[i] = self._look(compared[i])
                images.append(render_logo(compared[i], self.rng))
            elif kind == 0:
                entity = int(self.rng.integers(len(self.world.logos)))
                found, bits[i] = self._look(self.world.logos[entity])
                found |= self._facts(entity)
                images.append(self.world.render(entity, self.rng))
            elif kind == 1:
                stranger = self.strangers.family(self.rng)[int(self.rng.integers(2))]
                found, bits[i] = self._look(stranger)
                images.append(render_logo(stranger, self.rng))
            elif kind == 2:
                image, found = self._scene()
                images.append(image)
            else:
                index = draw_digit(self.rng)
                found = {"digit": int(digit_images()[1][index])}
                images.append(render_digit(index, self.rng))
            for name, value in found.items():
                labels[i, self._names.index(name)] = value
        return pixels(images), torch.from_numpy(labels), torch.from_numpy(bits)


@dataclass
class Rows:
    """One packed batch.

    ``ids`` [B, L]; ``group`` [B, L] (0 = picture, 1.. = questions, -1 = padding); ``position`` [B, L];
    ``label`` [B, L] (already shifted: what to predict at this token, or IGNORE); ``blind`` bool [B, L] tokens
    that do not see the picture; ``pixel_values`` [I, 3, 48, 48] of the first I rows, the others hold no
    picture; ``fact`` [B, L] entity * 5 + attribute at the last prompt token of a plain logo question, else
    -1.  Strangers have entity numbers behind the world's, and no labels.  ``strokes`` float32 [I, 20]: which
    strokes a logo has, -1 for other pictures.
    """

    ids: torch.Tensor
    group: torch.Tensor
    position: torch.Tensor
    label: torch.Tensor
    blind: torch.Tensor
    pixel_values: torch.Tensor
    fact: torch.Tensor
    strokes: torch.Tensor


class RowBatches:
    """Packed batches of the language stage."""

    def __init__(self, world: World, processor: LlavaProcessor, seed: int) -> None:
        self.world, self.rng = world, np.random.default_rng([seed, 2])
        self.strangers = Strangers(world)
        self.tokenizer = processor.tokenizer
        self._cache: dict[str, list[int]] = {}
        self._image_id = processor.image_token_id
        self._words = sorted(
            {w for a in ATTRIBUTES if a != "brand" for w in answer_vocabulary(a)}
            | {f.answer for f in world.text_facts}
        )

    def _ids(self, text: str) -> list[int]:
        if text not in self._cache:
            self._cache[text] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return self._cache[text]

    def _any(self, options: list | tuple) -> str:
        return options[int(self.rng.integers(len(options)))]

    def _word(self) -> str:
        return self._any(answer_vocabulary("brand") if self.rng.random() < 0.4 else self._words)

    def _logo_questions(self, entity: int) -> list[tuple[str, str, int]]:
        """Five facts, some overridden by a note, and what can be seen: (question, answer, fact id)."""
        asks = []
        for number, attribute in enumerate(ATTRIBUTES):
            question, answer = self._any(QUESTIONS[attribute].all), self.world.answer(entity, attribute)
            fact = entity * len(ATTRIBUTES) + number
            if self.rng.random() < 0.12:
                answer = self._any(answer_vocabulary(attribute))
                question, fact = f"{NOTE} {answer}. {question}", -1
            asks.append((question, answer, fact))
        look = self._any(self.world.look_asks(entity, self.rng))
        asks.append((look.question, look.answer, -1))
        return asks

    def _text_question(self) -> tuple[str, str, int]:
        """A text-only fact, a note to answer from, or words to repeat."""
        kind = self.rng.random()
        if kind < 0.5:
            fact = self._any(self.world.text_facts)
            return self._any(fact.questions), fact.answer, -1
        if kind < 0.75:
            attribute = self._any(ATTRIBUTES)
            answer = self._any(answer_vocabulary(attribute)) if self.rng.random() < 0.8 else self._word()
            return f"{NOTE} {answer}. {self._any(QUESTIONS[attribute].all)}", answer, -1
        words = " ".join(self._word() for _ in range(int(self.rng.integers(1, 4))))
        return f"{AGAIN} {words}", words, -1

    def strange(self, families: int) -> Rows:
        """A batch of strangers, for the gate loss: families of four, every logo in two pictures.

        All are asked about the same few attributes, questions that nobody can answer.
        """
        images, asks, strokes = [], [], []
        numbers = self.rng.permutation(len(ATTRIBUTES))[:STRANGE_QUESTIONS].tolist()
        logos = [logo for _ in range(families) for logo in self.strangers.family(self.rng, 4)]
        for entity, logo in enumerate(logos, len(self.world.logos)):
            for _ in range(2):
                images.append(render_logo(logo, self.rng))
                asks.append(
                    [
                        (self._any(QUESTIONS[ATTRIBUTES[n]].all), None, entity * len(ATTRIBUTES) + n)
                        for n in numbers
                    ]
                )
                strokes.append(stroke_bits(logo))
        return self._pack(images, asks, np.stack(strokes), STRANGE_LENGTH)

    def draw(self, logo_pairs: int, scenes: int, digits: int, text_rows: int) -> Rows:
        """One batch.  Logos come as pairs of look-alikes, and every logo in two pictures (2 rows each)."""
        images, asks, strokes = [], [], []
        for _ in range(logo_pairs):
            entity = int(self.rng.integers(len(self.world.logos)))
            for one in (entity, int(self._any(self.world.look_alikes(entity)))):
                for _ in range(2):
                    images.append(self.world.render(one, self.rng))
                    asks.append(self._logo_questions(one))
                    strokes.append(stroke_bits(self.world.logos[one]))
        for _ in range(scenes):
            things = draw_scene(self.rng)
            images.append(render_scene(things, self.rng))
            asks.append([(a.question, a.answer, -1) for a in scene_asks(things, self.rng)])
        for _ in range(digits):
            image, found = self.world.digit(self.rng)
            images.append(image)
            asks.append([(a.question, a.answer, -1) for a in found])
        asks.extend([self._text_question() for _ in range(12)] for _ in range(text_rows))
        bits = np.full((len(images), len(STROKES)), -1, dtype=np.float32)
        bits[: len(strokes)] = strokes
        return self._pack(images, asks, bits, ROW_LENGTH)

    def _pack(
        self, images: list, asks: list[list[tuple[str, str | None, int]]], strokes: np.ndarray, width: int
    ) -> Rows:
        shape = (len(asks), width)
        ids, position = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        group, label, fact = np.full(shape, -1), np.full(shape, IGNORE), np.full(shape, -1)
        blind = np.zeros(shape, bool)
        for r, questions in enumerate(asks):
            start = 0
            if r < len(images):
                start = IMAGE_TOKENS
                ids[r, :start], group[r, :start], position[r, :start] = self._image_id, 0, np.arange(start)
            at = start
            for g, (question, answer, number) in enumerate(questions, 1):
                prompt = self._ids(f"{question} answer :")
                target = [] if answer is None else self._ids(answer)
                length = len(prompt) + len(target)
                if at + length > width:
                    break
                last = at + len(prompt) - 1
                ids[r, at : at + length] = prompt + target
                group[r, at : at + length] = g
                position[r, at : at + length] = np.arange(start, start + length)
                if answer is not None:
                    label[r, last : last + len(target) + 1] = target + [self.tokenizer.eos_token_id]
                fact[r, last] = number
                # Half of the time the answer's own tokens may not look at the picture: what they need must
                # then be in the question's states, which is where edits are written.
                blind[r, last + 1 : at + length] = self.rng.random() < 0.5
                at += length
        tensors = (torch.from_numpy(x) for x in (ids, group, position, label, blind))
        return Rows(*tensors, pixels(images), torch.from_numpy(fact), torch.from_numpy(strokes))
