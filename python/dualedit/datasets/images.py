"""Finding missing and broken images before a model runs."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence

from ..data import EditSample
from ..models.images import ImageSource, open_image, rgb
from .loading import LoadedSamples
from .rows import Problem


def sources_of(sample: EditSample) -> Iterator[tuple[str, ImageSource]]:
    """Every image of a sample as it was given, with where it stands ("locality.m_loc[0].image")."""
    yield "request.image", sample.request.image_source
    for part in ("generality", "locality", "portability"):
        for name, probes in getattr(sample, part).items():
            for i, probe in enumerate(probes):
                yield f"{part}.{name}[{i}].image", probe.image_source
    for i, request in enumerate(sample.companions):
        yield f"companions[{i}].image", request.image_source


def pixel_digest(source: ImageSource) -> str:
    """A fingerprint of what an image shows, whatever file it comes in.

    Raises:
        ValueError: it cannot be opened.
    """
    picture = rgb(source)
    return hashlib.sha256(repr(picture.size).encode() + picture.tobytes()).hexdigest()


def missing_images(samples: Sequence[EditSample], decode: bool = False) -> list[Problem]:
    """Images that are not there: (file, index, field, reason), one entry a place.

    Args:
        samples: as loaded, or put together by hand (the index is then the place in the list).
        decode: also open every image, to find broken ones; each distinct file once.
    """
    loaded = samples if isinstance(samples, LoadedSamples) else None
    reasons: dict[str | bytes, str | None] = {}
    problems = []
    for number, sample in enumerate(samples):
        for field, source in sources_of(sample):
            if not isinstance(source, (str, bytes)):
                continue
            if source not in reasons:
                reasons[source] = _reason(source, decode)
            reason = reasons[source]
            if reason is not None:
                file, index = ("samples", number) if loaded is None else (loaded.source, loaded.rows[number])
                problems.append(Problem(file, index, field, reason))
    return problems


def _reason(source: str | bytes, decode: bool) -> str | None:
    if isinstance(source, str) and not os.path.isfile(source):
        return f"image {source!r} is not there"
    if decode:
        try:
            open_image(source)
        except ValueError as error:
            return str(error)
    return None


def check_images(samples: Sequence[EditSample], decode: bool = False) -> None:
    """Raise ValueError if an image is missing (or, with decode, cannot be opened); names the first places.

    `load_samples` has looked for the files already; call this for samples made by hand, after moving files,
    or with decode=True to find broken files before a long run.
    """
    problems = missing_images(samples, decode)
    if problems:
        first = "\n  ".join(map(str, problems[:5]))
        more = f"\n  and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(
            f"{len(problems)} images cannot be used:\n  {first}{more}\nMend the paths or the files."
        )
