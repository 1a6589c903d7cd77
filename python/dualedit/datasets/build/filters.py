"""What cannot be used of what was made: empty or repeated questions, broken pictures, pictures that are there
already."""

from __future__ import annotations

import re
from collections.abc import Iterable

import numpy as np
from PIL import Image

from ...models.images import ImageSource, rgb
from .generators import Piece

_SIDE = 8
_SAME_BITS = 10  # of 64 that may differ between two copies of one picture
_CLOSE = 12.0  # mean difference of the thumbnails, of 255, up to which equal hashes mean equal pictures


def plain(text: str) -> str:
    """Lower case, single spaces, no mark at the end: what questions are compared by."""
    return re.sub(r"\s+", " ", text.lower()).strip().rstrip(".?! ")


def says(answer: str, wanted: str) -> bool:
    """Whether an answer holds another in whole words."""
    told = plain(wanted)
    return bool(told) and re.search(rf"(?<!\w){re.escape(told)}(?!\w)", plain(answer)) is not None


def difference_hash(image: Image.Image) -> tuple[np.ndarray, np.ndarray]:
    """64 bits [8, 8] of whether brightness falls from left to right, and a thumbnail [16, 16, 3] in colour.

    The hash survives scaling and JPEG; plain drawings share hashes, which thumbnails tell apart.
    Source: N. Krawetz, Kind of Like That, 2013.
    """
    grey = np.asarray(image.convert("L").resize((_SIDE + 1, _SIDE), Image.Resampling.BOX), np.int16)
    small = np.asarray(image.convert("RGB").resize((16, 16), Image.Resampling.BOX), np.int16)
    return grey[:, 1:] < grey[:, :-1], small


class Hashes:
    """Pictures that are there already.

    Args:
        images: the first ones.
    """

    def __init__(self, images: Iterable[ImageSource] = ()):
        self._known = [difference_hash(rgb(image)) for image in images]

    def seen(self, image: Image.Image) -> bool:
        """Whether a copy of a picture is there; if not, it is from now on."""
        bits, small = difference_hash(image)
        for other, thumb in self._known:
            if int((bits != other).sum()) <= _SAME_BITS and float(np.abs(small - thumb).mean()) <= _CLOSE:
                return True
        self._known.append((bits, small))
        return False


def why_dropped(kind: str, piece: Piece, prompts: set[str], hashes: Hashes) -> str | None:
    """Why a piece cannot be used, or None; notes what it holds, so that it does not come twice.

    Args:
        prompts: questions of the row so far, as `plain` writes them.
        hashes: its pictures so far.
    """
    if piece.image is not None:
        try:
            picture = rgb(piece.image)
        except ValueError as error:
            return str(error)
        if hashes.seen(picture):
            return "the same picture is there already"
    if piece.prompt is not None:
        told = plain(piece.prompt)
        if not told:
            return "an empty question"
        if kind in ("rephrases", "near_questions", "texts"):
            if told in prompts:
                return "the same question is there already"
            prompts.add(told)
    return None
