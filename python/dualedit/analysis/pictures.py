"""The pictures of a page: found again for each question asked, kept once each, small."""

from __future__ import annotations

import ast
import base64
import hashlib
import io
from collections.abc import Mapping

from PIL import Image, features

from ..data import EditSample, Probe
from ..evaluation.asking import more_probes_of, portability_of, probes_of
from ..models.images import ImageSource, open_image

_PLAIN = 96  # pixels a side up to which a picture stays as it is
_LARGE = 224


class Gallery:
    """Pictures as rules of a style sheet, so that one that is shown often is in the page once."""

    def __init__(self) -> None:
        self._data: dict[str, str] = {}

    def add(self, source: ImageSource) -> str | None:
        """The class that shows a picture; None for one that is not there or cannot be read."""
        try:
            image = open_image(source)
        except ValueError:
            return None
        if image is None:
            return None
        kind, data = _encoded(image)
        name = "i" + hashlib.sha256(data).hexdigest()[:12]
        self._data[name] = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
        return name

    def rules(self) -> str:
        """The style sheet."""
        return "".join(f'div.{name}{{background-image:url("{data}")}}\n' for name, data in self._data.items())


def _encoded(image: Image.Image) -> tuple[str, bytes]:
    buffer = io.BytesIO()
    image = image.convert("RGB")
    if max(image.size) <= _PLAIN or not features.check("webp"):
        image.thumbnail((_LARGE, _LARGE))
        image.save(buffer, format="PNG", optimize=True)
        return "png", buffer.getvalue()
    image.thumbnail((_LARGE, _LARGE))
    image.save(buffer, format="WEBP", quality=80)
    return "webp", buffer.getvalue()


def sources_of(unit: Mapping, sample: EditSample | None) -> list[ImageSource]:
    """The pictures of a unit's probes, in their order; None where there is none.

    Args:
        sample: the sample that was asked, drawn or loaded again; where it is not the one that the unit tells
            of, or None, paths in the records are what is left.
    """
    found = [_path(probe["image"]) for probe in unit["probes"]]
    if sample is None or sample.request.target != unit["target"]:
        return found
    asked = iter([*probes_of(sample), *more_probes_of(sample), *portability_of(sample)])
    again: list[ImageSource] = []
    for record in unit["probes"]:
        probe = _next(asked, record)
        if probe is None or (probe.image_source is None) != (record["image"] is None):
            return found  # another sample after all
        again.append(probe.image_source)
    return again


def _next(asked, record: Mapping) -> Probe | None:
    for metric, probe in asked:
        if (metric, probe.prompt) == (record["metric"], record["prompt"]):
            return probe
    return None


def _path(told: str | None) -> str | None:
    """The path in a record's words for a picture, which are a quoted path or a description in <>."""
    if told is None or told[:1] not in "'\"":
        return None
    try:
        path = ast.literal_eval(told)
    except (ValueError, SyntaxError):
        return None
    return path if isinstance(path, str) else None
