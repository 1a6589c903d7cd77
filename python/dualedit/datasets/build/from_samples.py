"""A world that knows its facts as a generator: for trying the builder out, and for its tests."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from ...data import EditSample, Probe
from ...models.images import ImageSource, rgb
from ..images import pixel_digest
from .generators import KINDS, Cost, Piece
from .rows import SourceRow

_PARTS = {
    "rephrases": ("generality", "t_gen"), "other_images": ("generality", "v_gen"),
    "near_questions": ("locality", "hard_question"), "look_alikes": ("locality", "hard_image"),
    "texts": ("locality", "t_loc"), "unrelated_images": ("locality", "m_loc"),
}  # fmt: skip


def write_source(samples: Sequence[EditSample], folder: str | os.PathLike[str]) -> Path:
    """The samples' edits as rows of a file, with their pictures beside it.

    Returns:
        FOLDER/rows.jsonl; ids are the samples' own, or their numbers.
    """
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, sample in enumerate(samples):
        request = sample.request
        row = {
            "id": sample.id or str(number), "image": _stored(request.image_source, place),
            "question": request.prompt, "new_answer": request.target, "answer": sample.base_answer,
        }  # fmt: skip
        lines.append(json.dumps({k: v for k, v in row.items() if v is not None}, ensure_ascii=False) + "\n")
    file = place / "rows.jsonl"
    file.write_text("".join(lines), encoding="utf-8")
    return file


def _stored(source: ImageSource, folder: Path) -> str:
    file = folder / f"{pixel_digest(source)[:24]}.png"
    if not file.is_file():
        rgb(source).save(file, format="PNG")
    return file.name


class FromSamples:
    """What samples know of a row's fact, by the row's id.

    Args:
        samples: of the world; ids are their own, or their numbers.
        folder: where pictures are written that are no files.
    """

    makes = frozenset(KINDS)

    def __init__(self, samples: Sequence[EditSample], folder: str | os.PathLike[str]):
        self.samples: Mapping[str, EditSample] = {s.id or str(n): s for n, s in enumerate(samples)}
        self.folder = Path(folder)
        self.name, self.settings = "world", str(len(samples))

    def cost(self, kind: str, row: SourceRow, count: int) -> Cost:
        """Nothing."""
        return Cost()

    def make(self, kind: str, row: SourceRow, count: int, attempt: int) -> Sequence[Piece]:
        """The sample's own questions, the next ones at another attempt; nothing for a row of no sample."""
        sample = self.samples.get(row.id)
        if sample is None:
            return []
        if kind == "rephrases":
            wordings = [*(p.prompt for p in sample.generality.get("t_gen", [])), *sample.rephrases]
            return [Piece(w) for w in wordings[attempt * count : (attempt + 1) * count]]
        part, name = _PARTS[kind]
        probes: list[Probe] = getattr(sample, part).get(name, [])
        return [self._piece(kind, probe) for probe in probes[attempt * count : (attempt + 1) * count]]

    def _piece(self, kind: str, probe: Probe) -> Piece:
        image: ImageSource = None
        if kind != "near_questions" and probe.image_source is not None:
            source = probe.image_source
            self.folder.mkdir(parents=True, exist_ok=True)
            stored = source if isinstance(source, str) else str(self.folder / _stored(source, self.folder))
            image = os.path.abspath(stored)
        prompt = None if kind in ("other_images", "look_alikes") else probe.prompt
        return Piece(prompt, image, None if kind == "other_images" else probe.answer)
