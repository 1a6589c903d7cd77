"""Pictures of the demo world that are not logos: coloured shapes, and real handwritten digits."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image

from dualedit.toy.logos import BADGE_COLOURS, IMAGE_SIZE, background, finish
from dualedit.toy.words import DIGIT_QUESTIONS, SCENE_QUESTIONS

SCENE_SHAPES = ("disc", "box", "triangle", "ring", "cross", "bar")
SCENE_COLOURS = ("red", "green", "blue", "yellow", "purple", "orange")
SCENE_PLACES = ("left", "right", "top", "bottom")
SCENE_SIZES = ("small", "large")
# What training never shows.
HELD_OUT = frozenset(
    {
        ("disc", "green", "small"),
        ("box", "purple", "large"),
        ("triangle", "red", "small"),
        ("ring", "blue", "large"),
        ("cross", "orange", "small"),
        ("bar", "yellow", "large"),
    }
)
_CENTRES = {"left": (10, 24), "right": (38, 24), "top": (24, 10), "bottom": (24, 38)}
_SUPER = 3


@dataclass(frozen=True)
class Thing:
    """One object of a scene."""

    shape: str
    colour: str
    place: str
    size: str


@dataclass(frozen=True)
class Ask:
    """One question about one picture; ``family`` groups questions of a kind."""

    family: str
    question: str
    answer: str


def draw_scene(rng: np.random.Generator, held_out: bool = False, alike: bool = True) -> tuple[Thing, ...]:
    """One to three things in different places, ``alike`` in all else or (to train seeing) in nothing.

    With ``held_out`` at least one thing is a combination of ``HELD_OUT``; without, none is.
    """
    while True:
        count = int(rng.integers(1, 4))
        shapes, colours = rng.permutation(SCENE_SHAPES)[:count], rng.permutation(SCENE_COLOURS)[:count]
        places, sizes = rng.permutation(SCENE_PLACES)[:count], rng.choice(SCENE_SIZES, size=count)
        if alike:
            shapes, colours, sizes = ([kind[0]] * count for kind in (shapes, colours, sizes))
        looks = zip(shapes, colours, places, sizes, strict=True)
        things = tuple(Thing(*map(str, look)) for look in looks)
        if any((t.shape, t.colour, t.size) in HELD_OUT for t in things) == held_out:
            return things


def render_scene(things: tuple[Thing, ...], rng: np.random.Generator) -> Image.Image:
    """A new 48x48 RGB picture of a scene."""
    canvas, draw = background(rng)
    for thing in things:
        shade = rng.uniform(-10, 10, size=3)
        fill = tuple(int(c) for c in np.clip(np.add(BADGE_COLOURS[thing.colour], shade), 0, 255))
        radius = (4.7 if thing.size == "small" else 8.3) * rng.uniform(0.95, 1.06) * _SUPER
        cx, cy = (c * _SUPER + rng.uniform(-1.5, 1.5) * _SUPER for c in _CENTRES[thing.place])
        box = (cx - radius, cy - radius, cx + radius, cy + radius)
        if thing.shape == "disc":
            draw.ellipse(box, fill=fill)
        elif thing.shape == "ring":
            draw.ellipse(box, outline=fill, width=round(radius * 0.42))
        elif thing.shape == "box":
            draw.rectangle(
                (cx - radius * 0.9, cy - radius * 0.9, cx + radius * 0.9, cy + radius * 0.9), fill=fill
            )
        elif thing.shape == "triangle":
            corners = [
                (cx + 1.15 * radius * math.sin(a), cy - 1.15 * radius * math.cos(a))
                for a in (0, 2 * math.pi / 3, 4 * math.pi / 3)
            ]
            draw.polygon(corners, fill=fill)
        elif thing.shape == "cross":
            arm = radius * 0.32
            draw.rectangle((cx - radius, cy - arm, cx + radius, cy + arm), fill=fill)
            draw.rectangle((cx - arm, cy - radius, cx + arm, cy + radius), fill=fill)
        else:
            draw.rectangle((cx - radius, cy - radius * 0.38, cx + radius, cy + radius * 0.38), fill=fill)
    return finish(canvas, rng)


def scene_asks(things: tuple[Thing, ...], rng: np.random.Generator) -> list[Ask]:
    """Questions about a scene of like things, one of each family (the place only of a single thing)."""
    thing = things[int(rng.integers(len(things)))]
    answers = {
        "scene_shape": thing.shape,
        "scene_shape_at": thing.shape,
        "scene_colour": thing.colour,
        "scene_count": str(len(things)),
        "scene_size": thing.size,
    }
    if len(things) == 1:
        answers["scene_place"] = thing.place
    words = {"shape": thing.shape, "colour": thing.colour, "place": thing.place}
    asks = []
    for family, answer in answers.items():
        wordings = SCENE_QUESTIONS[family]
        asks.append(Ask(family, wordings[int(rng.integers(len(wordings)))].format(**words), answer))
    return asks


@lru_cache(maxsize=1)
def digit_images() -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's 1,797 handwritten digits: uint8 [N, 8, 8] in 0..255 and labels [N]."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "scikit-learn is missing, whose handwritten digits some questions of the embedded world show: "
            "pip install 'dualedit-kernels[toy]' (make setup does)."
        ) from error
    data = load_digits()
    return (data.images * (255 / 16)).astype(np.uint8), data.target


def draw_digit(rng: np.random.Generator, held_out: bool = False) -> int:
    """Index of a random digit image, from the held-out fifth or from the rest."""
    count = len(digit_images()[1])
    while True:
        index = int(rng.integers(count))
        if (index % 5 == 0) == held_out:
            return index


def render_digit(index: int, rng: np.random.Generator) -> Image.Image:
    """A new 48x48 RGB picture of one handwritten digit: place, size, slant, colours and noise vary."""
    canvas, draw = background(rng)
    ink_is_dark = sum(canvas.getpixel((0, 0))) > 330
    mask = Image.fromarray(digit_images()[0][index])
    side = int(rng.uniform(32, 42) * _SUPER)
    mask = mask.resize((side, side), Image.Resampling.BICUBIC).rotate(
        rng.uniform(-9, 9), resample=Image.Resampling.BILINEAR
    )
    mask = mask.point(lambda v: min(255, int(v * 1.25)))
    low, high = (0, 80) if ink_is_dark else (190, 256)
    ink = tuple(int(c) for c in rng.integers(low, high, size=3))
    free = IMAGE_SIZE * _SUPER - side
    x, y = (free // 2 + int(rng.integers(-9, 10)) for _ in range(2))
    canvas.paste(ink, (x, y), mask)
    return finish(canvas, rng)


def digit_asks(index: int, rng: np.random.Generator) -> list[Ask]:
    """Questions about a digit picture, one of each family, in random wordings."""
    digit = int(digit_images()[1][index])
    answers = {"digit": str(digit), "digit_next": str(digit + 1)}
    return [Ask(f, w[int(rng.integers(len(w)))], answers[f]) for f, w in DIGIT_QUESTIONS.items()]
