"""What `Editor` is asked to do, in the forms in which users write it: one edit of many, samples around it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image, ImageEnhance

from .data import EditRequest
from .models.images import Picture, shown

Pictures = Picture | Sequence[Picture] | None  # what may be asked about
Words = str | Sequence[Mapping[str, Any]]  # a question or chat messages
Sample = tuple[Picture | None, str]
Question = tuple[Image.Image | None, str]
_ARGUMENTS = ("image", "prompt", "target", "rephrases", "negatives")  # of `Editor.edit`, as a triple goes on
_NAMED = ("author", "note", "tags", "expires")  # further ones, in a mapping


def brighter(image: Image.Image) -> Image.Image:
    """A picture that shows the same."""
    return ImageEnhance.Brightness(image).enhance(1.1)


def black(image: Image.Image) -> Image.Image:
    """A picture of the same size that shows nothing."""
    return Image.new("RGB", image.size)


def arguments_of(request: Any) -> dict[str, Any]:
    """One of `edit_many`'s requests as arguments of `edit`. Raises ValueError."""
    if isinstance(request, EditRequest):
        return {"image": request.image, "prompt": request.prompt, "target": request.target}
    if isinstance(request, (tuple, list)) and 3 <= len(request) <= len(_ARGUMENTS):
        return dict(zip(_ARGUMENTS, request, strict=False))
    if not isinstance(request, Mapping):
        kind = type(request).__name__
        raise ValueError(
            f"the request is a {kind}: pass an EditRequest (of an EditSample its .request), a triple (image, "
            "prompt, target), or a mapping with these keys."
        )
    lacking = [name for name in _ARGUMENTS[:3] if name not in request]
    unknown = sorted(map(str, set(request) - {*_ARGUMENTS, *_NAMED}))
    if lacking or unknown:
        raise ValueError(
            f"the request has the keys {sorted(map(str, request))}: "
            + (f"{', '.join(lacking)} is missing" if lacking else f"{', '.join(unknown)} is not known")
            + f". The keys are {', '.join((*_ARGUMENTS, *_NAMED))} (image None for an edit without one; what "
            "follows the target may be left out)."
        )
    return dict(request)


def check_samples(rephrases: Any, negatives: Any) -> None:
    """Refuse one sample where a list of them belongs: a text would be taken letter by letter."""
    for name, samples in (("rephrases", rephrases), ("negatives", negatives)):
        if isinstance(samples, (str, bytes, os.PathLike, Image.Image, Mapping)):
            what = shown(samples) if isinstance(samples, (str, bytes, Image.Image)) else repr(samples)
            raise ValueError(f"{name}={what} is one sample: pass a list with it, {name}=[...].")
        for number, sample in enumerate(samples or ()):
            pair = isinstance(sample, tuple)
            if (pair and len(sample) != 2) or not (pair or name == "negatives" or isinstance(sample, str)):
                kind = "an image" if name == "negatives" else "a text"
                raise ValueError(f"{name}[{number}]={sample!r}: pass {kind} or an (image, question) pair.")
