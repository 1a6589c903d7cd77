"""Pictures around a fact: the user's own, nearest neighbours from a pile without labels, or drawn by
diffusion."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .answering import Answerer
from .cache import Cache
from .generators import Cost, GeneratorFailed, Piece
from .rows import SourceRow

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif"})
SHOWN = "What is shown in this picture?"
_SAME = 0.9999  # cosine from which on two pictures are the same one


def pictures_in(folder: Path) -> list[Path]:
    """The files below a folder that are named like pictures, sorted."""
    return sorted(file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())


def _contents(files: Sequence[Path]) -> str:
    return Cache.key(*((file, file.stat().st_size, file.stat().st_mtime_ns) for file in files))


class PictureFolder:
    """The user's own pictures: FOLDER/ID/same and FOLDER/ID/alike for a row, FOLDER/unrelated for all.

    Args:
        folder: where they lie; ID is the row's id.

    Raises:
        ValueError: no such folder.
    """

    makes = frozenset({"other_images", "look_alikes", "unrelated_images"})

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = Path(folder).resolve()
        if not self.folder.is_dir():
            raise ValueError(f"folder={os.fspath(folder)!r} is no folder: pass one with pictures by row.")
        self.name, self.settings = "own pictures", _contents(pictures_in(self.folder))

    def cost(self, kind: str, row: SourceRow, count: int) -> Cost:
        """Nothing."""
        return Cost()

    def make(self, kind: str, row: SourceRow, count: int, attempt: int) -> Sequence[Piece]:
        """Pictures of the row's folder, in the order of their names; the next ones at another attempt."""
        part = {"other_images": Path(row.id, "same"), "look_alikes": Path(row.id, "alike")}
        place = (self.folder / part.get(kind, Path("unrelated"))).resolve()
        if not place.is_relative_to(self.folder):
            raise GeneratorFailed(f"{row.place}: the id {row.id!r} leads out of {self.folder}.")
        found = pictures_in(place)[attempt * count : (attempt + 1) * count]
        prompt = SHOWN if kind == "unrelated_images" else None
        return [Piece(prompt, str(file)) for file in found]


class Neighbours:
    """Look-alikes and unrelated pictures from a folder of pictures without labels, by the model's vision
    tower.

    A neighbour may show the very same thing: look through them before they become facts (`render_review`).

    Args:
        answerer: holds the model.
        folder: of the pictures; broken ones are left out.
        avoid: pictures of the rows, which are no neighbours.

    Raises:
        ValueError: no such folder, or no picture in it.
    """

    makes = frozenset({"look_alikes", "unrelated_images"})

    def __init__(self, answerer: Answerer, folder: str | os.PathLike[str], avoid: Sequence[str] = ()):
        from ...models.images import open_image

        place = Path(folder)
        files = (
            [f for f in pictures_in(place) if str(f.resolve()) not in set(avoid)] if place.is_dir() else []
        )
        if not files:
            raise ValueError(f"folder={os.fspath(folder)!r} holds no pictures: pass one with pictures.")
        self.name, self.settings = "neighbours", _contents(files) + answerer.settings
        self.answerer = answerer
        self.broken: list[str] = []
        self.files: list[Path] = []
        for file in files:
            try:
                open_image(file)
                self.files.append(file.resolve())
            except ValueError as error:
                self.broken.append(str(error))
        self._index: Index | None = None

    def cost(self, kind: str, row: SourceRow, count: int) -> Cost:
        """Nothing that is paid for."""
        return Cost()

    def make(self, kind: str, row: SourceRow, count: int, attempt: int) -> Sequence[Piece]:
        """The nearest pictures that are not the row's own; or some of the farther half at random."""
        if self._index is None:
            self._index = Index(self.answerer.vectors([str(file) for file in self.files]))
        own = self.answerer.vectors([row.image])
        order, cosine = self._index.search(own, len(self.files))
        ranked = [n for n, c in zip(order, cosine, strict=True) if c < _SAME]
        if kind == "look_alikes":
            chosen = ranked[attempt * count : (attempt + 1) * count]
            return [Piece(None, str(self.files[n])) for n in chosen]
        far = ranked[len(ranked) // 2 :]
        random.Random(f"{row.id} {attempt}").shuffle(far)
        return [Piece(SHOWN, str(self.files[n])) for n in far[:count]]


class Index:
    """Nearest vectors by the cosine of what tells them from their mean: faiss where it is installed, else a
    product in PyTorch.

    Args:
        vectors: [N, D] unit vectors.
    """

    def __init__(self, vectors: Tensor):
        # A model's image tokens have much in common, whatever they show.
        self.centre = vectors.float().mean(0) if len(vectors) > 1 else torch.zeros(vectors.shape[1])
        self.vectors = self._apart(vectors)
        try:
            import faiss
        except ImportError:
            self._faiss = None
        else:
            self._faiss = faiss.IndexFlatIP(vectors.shape[1])
            self._faiss.add(self.vectors.numpy())

    def _apart(self, vectors: Tensor) -> Tensor:
        return torch.nn.functional.normalize(vectors.float() - self.centre, dim=-1).contiguous()

    def search(self, query: Tensor, count: int) -> tuple[list[int], list[float]]:
        """Numbers and cosines of the nearest vectors to one query [1, D], nearest first."""
        count = min(count, len(self.vectors))
        query = self._apart(query)
        if self._faiss is not None:
            cosine, order = self._faiss.search(query.numpy(), count)
            return [int(n) for n in order[0]], [float(c) for c in cosine[0]]
        found = torch.topk(query @ self.vectors.T, count)
        return [int(n) for n in found.indices[0]], [float(c) for c in found.values[0]]


class DiffusersPictures:
    """Other pictures of a row's thing, drawn by a local diffusers pipeline.

    Args:
        pipeline: a folder of a text-to-image pipeline, or such a pipeline.
        folder: where pictures are written.
        template: the prompt, with {thing}: the row's `thing`, or its answer.

    Raises:
        ImportError: a folder is passed, and diffusers is not installed.
    """

    makes = frozenset({"other_images"})

    def __init__(self, pipeline: Any, folder: str | os.PathLike[str], template: str = "a photo of {thing}"):
        self.folder, self.template = Path(folder), template
        self.settings = (
            f"{pipeline if isinstance(pipeline, (str, os.PathLike)) else type(pipeline).__name__} {template}"
        )
        if isinstance(pipeline, (str, os.PathLike)):
            try:
                from diffusers import DiffusionPipeline
            except ImportError as error:
                raise ImportError("Drawn pictures need diffusers: pip install diffusers.") from error
            pipeline = DiffusionPipeline.from_pretrained(os.fspath(pipeline), local_files_only=True)
        self.pipeline, self.name = pipeline, "diffusion"

    def cost(self, kind: str, row: SourceRow, count: int) -> Cost:
        """So many pictures."""
        return Cost(pictures=count)

    def make(self, kind: str, row: SourceRow, count: int, attempt: int) -> Sequence[Piece]:
        """Pictures that were not there, each with a seed of its own."""
        thing = row.thing or row.answer
        if not thing:
            raise GeneratorFailed(f"{row.place} says neither thing nor answer, so there is nothing to draw.")
        prompt = self.template.replace("{thing}", thing)
        self.folder.mkdir(parents=True, exist_ok=True)
        found = []
        for number in range(count):
            file = self.folder / f"{Cache.key(self.settings, row.id, prompt, attempt, number)}.png"
            if not file.is_file():
                seed = int(file.stem[:8], 16)
                image = self.pipeline(prompt, generator=torch.Generator().manual_seed(seed)).images[0]
                part = file.with_suffix(".part")
                image.save(part, format="PNG")
                os.replace(part, file)
            found.append(Piece(None, str(file.resolve())))
        return found
