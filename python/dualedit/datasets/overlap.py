"""How much of a test split also occurs in a training split.

Every (m_loc, m_loc_q) pair of the evaluation files of E-VQA and E-IC also occurs in their training files, and
so do many images: locality measured there is measured on questions that training has seen. Reports should say
so.
"""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from ..data import EditSample
from ..models.images import ImageSource
from .images import pixel_digest, sources_of


@dataclass(frozen=True)
class Overlap:
    """Counts of a test split's parts that occur in a training split: name to (shared, of how many).

    Attributes:
        counts: "facts" (the edit's image, prompt and target), "questions" (image and prompt), "images" (the
            edit's image, against the training edits' images), "images_anywhere" (against every image of the
            training split), "m_loc" (image and question), "m_loc_images", "t_loc" (question). Each counted
            once a sample or probe of the test split.
    """

    counts: dict[str, tuple[int, int]]

    def to_dict(self) -> dict[str, dict[str, int]]:
        """The counts as JSON holds them."""
        return {name: {"shared": shared, "of": total} for name, (shared, total) in self.counts.items()}

    def __str__(self) -> str:
        parts = [f"{name} {shared}/{total}" for name, (shared, total) in self.counts.items()]
        return "also in train: " + ", ".join(parts)


def overlap(train: Sequence[EditSample], test: Sequence[EditSample], by: str = "path") -> Overlap:
    """What a test split shares with a training split.

    Args:
        by: "path": images are the same when their files are (images without a path: when their bytes or
            pixels are); opens nothing. "content": images are the same when their pixels are; opens every
            image.

    Raises:
        ValueError: another `by`, or an image that cannot be opened.
    """
    if by not in ("path", "content"):
        raise ValueError(f"by={by!r}: choose 'path' or 'content'.")
    keys = _Keys(by == "content")
    seen: dict[str, set[Hashable]] = {}
    for sample in train:
        for name, key in keys.of(sample):
            seen.setdefault(name, set()).add(key)
        seen.setdefault("images_anywhere", set()).update(
            keys.images(source for _, source in sources_of(sample))
        )
    counts: dict[str, tuple[int, int]] = {name: (0, 0) for name in _Keys.NAMES}
    for sample in test:
        for name, key in keys.of(sample):
            shared, total = counts[name]
            counts[name] = (shared + (key in seen.get(name, ())), total + 1)
    return Overlap(counts)


class _Keys:
    """What of a sample is compared."""

    NAMES = ("facts", "questions", "images", "images_anywhere", "m_loc", "m_loc_images", "t_loc")

    def __init__(self, content: bool):
        self.content = content
        self._known: dict[str, Hashable] = {}

    def image(self, source: ImageSource) -> Hashable:
        if not isinstance(source, str):
            return None if source is None else pixel_digest(source)
        if source not in self._known:
            self._known[source] = pixel_digest(source) if self.content else os.path.realpath(source)
        return self._known[source]

    def images(self, sources: Iterable[ImageSource]) -> Iterator[Hashable]:
        return (self.image(source) for source in sources if source is not None)

    def of(self, sample: EditSample) -> Iterator[tuple[str, Hashable]]:
        """Name and key of everything that is counted."""
        request = sample.request
        image, prompt = self.image(request.image_source), request.prompt.strip()
        yield "facts", (image, prompt, request.target.strip())
        yield "questions", (image, prompt)
        if image is not None:
            yield "images", image
            yield "images_anywhere", image
        for probe in sample.locality.get("m_loc", []):
            yield "m_loc", (self.image(probe.image_source), probe.prompt.strip())
            yield "m_loc_images", self.image(probe.image_source)
        for probe in sample.locality.get("t_loc", []):
            yield "t_loc", probe.prompt.strip()
