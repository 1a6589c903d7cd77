"""Another look at the same drawing: other ground, place, size, turn and light."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageEnhance

_NEAR_WHITE = 248  # of 255, in every channel: what counts as white


def view(image: Image.Image, rng: np.random.Generator, as_card: bool) -> bytes:
    """A picture of the same size, as the bytes of a PNG.

    Args:
        image: a drawing on white, RGB, square.
        rng: decides everything that varies.
        as_card: keep the white around the drawing and lay it on the new ground as a card, for flags and
            logos, whose own white would be taken for the ground.
    """
    side = image.width
    ground = tuple(int(x) for x in rng.integers(40, 256, 3))
    turn = float(rng.uniform(-14, 14))
    if as_card:
        zoom = rng.uniform(0.7, 1.0)
        drawing = image.convert("RGBA")
    else:
        zoom = rng.uniform(0.75, 1.2)
        drawing = _on_nothing(image)
    wide = round(side * zoom)
    drawing = drawing.resize((wide, wide), Image.Resampling.BICUBIC)
    drawing = drawing.rotate(turn, Image.Resampling.BICUBIC, expand=True)
    free = side - drawing.width
    left, top = (round(free / 2 + rng.uniform(-0.06, 0.06) * side) for _ in range(2))
    canvas = Image.new("RGBA", (side, side), (*ground, 255))
    layer = Image.new("RGBA", (side, side))
    layer.paste(drawing, (left, top))
    canvas.alpha_composite(layer)
    shown = ImageEnhance.Brightness(canvas.convert("RGB")).enhance(float(rng.uniform(0.75, 1.2)))
    shown = ImageEnhance.Contrast(shown).enhance(float(rng.uniform(0.85, 1.15)))
    file = io.BytesIO()
    shown.save(file, "PNG", compress_level=1)
    return file.getvalue()


def _on_nothing(image: Image.Image) -> Image.Image:
    """The drawing with the white around it, as far as that reaches from the edge, made transparent."""
    white = (np.asarray(image) >= _NEAR_WHITE).all(-1)
    around = np.zeros_like(white)
    around[[0, -1]], around[:, [0, -1]] = white[[0, -1]], white[:, [0, -1]]
    count = -1
    while count != (count := int(around.sum())):  # grow into the neighbouring white until nothing is left
        around[1:] |= around[:-1] & white[1:]
        around[:-1] |= around[1:] & white[:-1]
        around[:, 1:] |= around[:, :-1] & white[:, 1:]
        around[:, :-1] |= around[:, 1:] & white[:, :-1]
    alpha = Image.fromarray(np.where(around, 0, 255).astype(np.uint8))
    shown = image.convert("RGBA")
    shown.putalpha(alpha)
    return shown
