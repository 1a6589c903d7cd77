"""Made-up logos of the demo world: how they look, how look-alike families are drawn, how one is rendered."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw

IMAGE_SIZE = 48
_SUPER = 3  # drawn three times larger, then averaged: the cheapest decent antialiasing

BADGE_SHAPES = ("circle", "square", "diamond", "hexagon", "shield", "star")
BADGE_COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (205, 30, 40),
    "green": (40, 150, 50),
    "blue": (40, 80, 215),
    "yellow": (240, 205, 40),
    "purple": (125, 50, 165),
    "orange": (245, 125, 20),
    "pink": (245, 140, 190),
    "gray": (125, 125, 125),
}
LINE_COLOURS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "black": (10, 10, 10),
    "cyan": (70, 235, 245),
    "yellow": (250, 240, 60),
}
_MIN_CONTRAST = 130.0  # RGB distance below which lines would vanish in their badge

# Unit segments between neighbouring points of the 3x3 grid: 6 horizontal, 6 vertical, 8 diagonal.
STROKES: tuple[tuple[tuple[int, int], tuple[int, int]], ...] = tuple(
    ((x, y), (x + dx, y + dy))
    for y in range(3)
    for x in range(3)
    for dx, dy in ((1, 0), (0, 1), (1, 1), (-1, 1))
    if 0 <= x + dx < 3 and 0 <= y + dy < 3
)
CHANGES = ("badge_shape", "badge_colour", "line_colour", "strokes")


@dataclass(frozen=True)
class Logo:
    """What a logo looks like; two equal ``Logo`` look the same. ``strokes`` indexes ``STROKES``."""

    badge_shape: str
    badge_colour: str
    line_colour: str
    strokes: frozenset[int]


def has_contrast(logo: Logo) -> bool:
    """Whether the lines can be told from the badge."""
    return math.dist(BADGE_COLOURS[logo.badge_colour], LINE_COLOURS[logo.line_colour]) >= _MIN_CONTRAST


def differences(a: Logo, b: Logo) -> tuple[str, ...]:
    """Names of the fields (of ``CHANGES``) in which two logos differ."""
    return tuple(name for name in CHANGES if getattr(a, name) != getattr(b, name))


def look_alike(a: Logo, b: Logo) -> bool:
    """Whether two logos differ in exactly one field, and if that is the strokes, in one stroke moved."""
    return len(differences(a, b)) == 1 and len(a.strokes ^ b.strokes) in (0, 2)


def _draw_strokes(rng: np.random.Generator) -> frozenset[int]:
    """Four to six strokes that hang together."""
    count = int(rng.integers(4, 7))
    chosen = [int(rng.integers(len(STROKES)))]
    while len(chosen) < count:
        points = {p for s in chosen for p in STROKES[s]}
        free = [i for i, ends in enumerate(STROKES) if i not in chosen and points.intersection(ends)]
        chosen.append(int(rng.choice(free)))
    return frozenset(chosen)


def _changed(logo: Logo, change: str, rng: np.random.Generator) -> Logo:
    """The logo with one field drawn anew; for strokes, one stroke is moved."""
    if change == "strokes":
        gone = int(rng.choice(sorted(logo.strokes)))
        new = int(rng.choice([i for i in range(len(STROKES)) if i not in logo.strokes]))
        return replace(logo, strokes=(logo.strokes - {gone}) | {new})
    values = {"badge_shape": BADGE_SHAPES, "badge_colour": BADGE_COLOURS, "line_colour": LINE_COLOURS}[change]
    value = str(rng.choice([v for v in values if v != getattr(logo, change)]))
    return replace(logo, **{change: value})


def draw_families(
    sizes: list[int], rng: np.random.Generator, changes: tuple[str, ...] = CHANGES
) -> list[list[Logo]]:
    """Draw look-alike families; each member but the first is a look-alike of an earlier member.

    What a look-alike differs in is drawn from ``changes``, in which a name may stand more than once. Logos
    of different families differ by more than one moved stroke, whatever their colours and shapes, so
    look-alikes are found within a family only.
    """
    taken: list[frozenset[int]] = []
    families = []
    for size in sizes:
        family: list[Logo] = []
        while not family:
            family = _draw_family(size, rng, changes)
            if any(len(m.strokes ^ t) <= 2 for m in family for t in taken):
                family = []
        taken.extend({m.strokes for m in family})
        families.append(family)
    return families


def _draw_family(size: int, rng: np.random.Generator, changes: tuple[str, ...]) -> list[Logo]:
    first = None
    while first is None or not has_contrast(first):
        first = Logo(
            str(rng.choice(BADGE_SHAPES)),
            str(rng.choice(list(BADGE_COLOURS))),
            str(rng.choice(list(LINE_COLOURS))),
            _draw_strokes(rng),
        )
    family = [first]
    while len(family) < size:
        parent = family[int(rng.integers(len(family)))]
        member = _changed(parent, str(rng.choice(changes)), rng)
        if has_contrast(member) and member not in family:
            family.append(member)
    return family


def _outline(shape: str) -> list[tuple[float, float]]:
    """Corners of a badge, in pixels around its centre, roomy enough for the glyph."""
    if shape == "square":
        return [(-15.5, -15.5), (15.5, -15.5), (15.5, 15.5), (-15.5, 15.5)]
    if shape == "diamond":
        return [(0, -21), (21, 0), (0, 21), (-21, 0)]
    if shape == "shield":
        return [(-15, -15), (15, -15), (15, 6), (0, 21), (-15, 6)]
    if shape == "hexagon":
        return [(19 * math.cos(math.pi * k / 3), 19 * math.sin(math.pi * k / 3)) for k in range(6)]
    if shape == "star":
        radii = (21.5, 14.0)
        return [
            (radii[k % 2] * math.sin(math.pi * k / 8), -radii[k % 2] * math.cos(math.pi * k / 8))
            for k in range(16)
        ]
    return [(17 * math.cos(math.pi * k / 16), 17 * math.sin(math.pi * k / 16)) for k in range(32)]


_OUTLINES = {shape: _outline(shape) for shape in BADGE_SHAPES}


def background(rng: np.random.Generator) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    """A pale or dark canvas with a little clutter, ``_SUPER`` times the image size."""
    size = IMAGE_SIZE * _SUPER
    base = rng.integers(150, 246) if rng.random() < 0.7 else rng.integers(20, 70)
    tint = base + rng.integers(-20, 21, size=3)
    canvas = Image.new("RGB", (size, size), tuple(int(c) for c in np.clip(tint, 0, 255)))
    draw = ImageDraw.Draw(canvas)
    for _ in range(int(rng.integers(0, 4))):
        colour = tuple(int(c) for c in np.clip(tint + rng.integers(-40, 41, size=3), 0, 255))
        x0, y0, x1, y1 = (int(v) for v in rng.integers(0, size, size=4))
        if rng.random() < 0.5:
            draw.line((x0, y0, x1, y1), fill=colour, width=int(rng.integers(3, 10)))
        else:
            draw.ellipse((x0, y0, x0 + y1 // 4, y0 + y1 // 4), fill=colour)
    return canvas, draw


def finish(canvas: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Shrink a canvas to 48x48, change its brightness and add pixel noise."""
    pixels = np.asarray(canvas.reduce(_SUPER), dtype=np.float32)
    pixels = pixels * np.float32(rng.uniform(0.85, 1.1)) + np.float32(rng.uniform(-8, 8))
    pixels += rng.standard_normal(pixels.shape, dtype=np.float32) * np.float32(rng.uniform(1, 7))
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def render_logo(logo: Logo, rng: np.random.Generator) -> Image.Image:
    """A new 48x48 RGB picture of a logo: place, scale, rotation, thickness, light and noise vary."""
    canvas, draw = background(rng)
    angle, scale = rng.uniform(-0.16, 0.16), rng.uniform(0.86, 1.08) * _SUPER
    centre = IMAGE_SIZE / 2 * _SUPER + rng.uniform(-2.5, 2.5, size=2) * _SUPER
    cos, sin = math.cos(angle) * scale, math.sin(angle) * scale

    def place(x: float, y: float) -> tuple[float, float]:
        return float(centre[0] + cos * x - sin * y), float(centre[1] + sin * x + cos * y)

    shade = rng.uniform(-10, 10, size=3)
    badge = tuple(int(c) for c in np.clip(np.add(BADGE_COLOURS[logo.badge_colour], shade), 0, 255))
    draw.polygon([place(x, y) for x, y in _OUTLINES[logo.badge_shape]], fill=badge)
    width = rng.uniform(2.3, 3.3) * scale
    radius = width / 2
    colour = LINE_COLOURS[logo.line_colour]
    for stroke in sorted(logo.strokes):
        ends = [place((x - 1) * 8.6, (y - 1) * 8.6) for x, y in STROKES[stroke]]
        draw.line(ends, fill=colour, width=round(width))
        for x, y in ends:
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
    return finish(canvas, rng)
