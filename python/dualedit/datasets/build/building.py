"""From rows to samples: make, filter, ask the unedited model, put together."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...data import EditRequest, EditSample, Probe
from ..images import pixel_digest
from .answering import Answerer
from .cache import Cache
from .filters import Hashes, plain, says, why_dropped
from .generators import KINDS, Cost, Generator, GeneratorFailed, Piece
from .rows import SourceRow

_ATTEMPTS = 2  # a generator is asked again for what the filters dropped
# What becomes of a kind that must stay: the name of the locality.
STAYS = {
    "near_questions": "hard_question", "look_alikes": "hard_image", "unrelated_images": "m_loc",
    "texts": "t_loc",
}  # fmt: skip


@dataclass(frozen=True)
class Wanted:
    """How much is made for every row; 0 leaves a kind out.

    Attributes:
        edit_rephrases: wordings that an editor may use while it edits, apart from `rephrases`, which test it.
        answered: leave out what the unedited model does not answer (as is right, where that is known).
    """

    rephrases: int = 4
    edit_rephrases: int = 2
    near_questions: int = 2
    texts: int = 2
    other_images: int = 3
    look_alikes: int = 2
    unrelated_images: int = 2
    answered: bool = True

    def __post_init__(self) -> None:
        for kind in (*KINDS, "edit_rephrases"):
            if getattr(self, kind) < 0:
                raise ValueError(f"{kind}={getattr(self, kind)}: pass a number from 0 up.")

    def count(self, kind: str) -> int:
        """How many pieces of a kind."""
        return int(getattr(self, kind)) + (self.edit_rephrases if kind == "rephrases" else 0)


@dataclass(frozen=True)
class Drop:
    """A piece that was left out, and why."""

    row: str
    place: str
    kind: str
    what: str
    reason: str

    def __str__(self) -> str:
        return f"{self.place} ({self.row}), {self.kind}: {self.what}: {self.reason}"


@dataclass
class Built:
    """What came of the rows.

    Attributes:
        samples: one for each row, in their order.
        drops: pieces that were left out.
        short: "row, kind: made of wanted" where fewer were made.
    """

    samples: list[EditSample] = field(default_factory=list)
    drops: list[Drop] = field(default_factory=list)
    short: list[str] = field(default_factory=list)


def _key(generator: Generator, kind: str, row: SourceRow, count: int, attempt: int) -> str:
    known = (row.id, row.image, row.question, row.answer, row.thing)
    return Cache.key("piece", generator.name, generator.settings, kind, *known, count, attempt)


def estimate(
    rows: Sequence[SourceRow], generators: Sequence[Generator], wanted: Wanted, cache: Cache
) -> tuple[dict[str, Cost], int]:
    """What a build will take by generator, what is cached left out, and how many calls are cached.

    What the filters drop is asked for again: up to twice as much.
    """
    costs: dict[str, Cost] = {}
    cached = 0
    for row in rows:
        for kind in KINDS:
            count = wanted.count(kind)
            for generator in generators:
                if count and kind in generator.makes:
                    if _key(generator, kind, row, count, 0) in cache:
                        cached += 1
                    else:
                        own = generator.cost(kind, row, count)
                        costs[generator.name] = costs.get(generator.name, Cost()) + own
                    break
    return costs, cached


def build(
    rows: Sequence[SourceRow],
    generators: Sequence[Generator],
    wanted: Wanted,
    answerer: Answerer | None,
    cache: Cache,
    show: Callable[[Iterable[SourceRow]], Iterable[SourceRow]] = iter,
) -> Built:
    """Samples of the rows. A stopped build, run again with the same cache, goes on where it was.

    Args:
        generators: of each kind the first that makes it is asked first, the next for what is still missing.
        answerer: the unedited model, which says what must stay and what cannot be used; None: nothing is
            asked, and what must stay has the generators' answers alone.
        show: takes the rows one by one; a progress bar, for instance.

    Raises:
        GeneratorFailed: names the row; what was made before is in the cache.
    """
    built = Built()
    for row in show(rows):
        built.samples.append(_Row(row, generators, wanted, answerer, cache, built).sample())
    return built


class _Row:
    """One row on its way to a sample."""

    def __init__(
        self,
        row: SourceRow,
        generators: Sequence[Generator],
        wanted: Wanted,
        answerer: Answerer | None,
        cache: Cache,
        built: Built,
    ):
        self.row, self.generators, self.wanted = row, generators, wanted
        self.answerer, self.cache, self.built = answerer, cache, built
        self.hashes = Hashes([row.image])
        self.prompts = {plain(row.question)}
        self.before = self.answers([(row.image, row.question)])[0]
        # What the unedited model has to say: the right answer where it knows it, else what it says.
        known = row.answer is not None and self.before is not None and says(self.before, row.answer)
        self.same = row.answer if known else self.before

    def sample(self) -> EditSample:
        row, made = self.row, {kind: self.pieces(kind) for kind in KINDS}
        wordings = [piece.prompt or "" for piece in made["rephrases"]]
        tests, own = wordings[: self.wanted.rephrases], wordings[self.wanted.rephrases :]
        generality = {
            "t_gen": [Probe(row.image, wording, row.new_answer) for wording in tests],
            "v_gen": [Probe(piece.image, row.question, row.new_answer) for piece in made["other_images"]],
        }
        locality = {
            name: [self.probe(kind, piece) for piece in made[kind]]
            for kind, name in STAYS.items()
            if made[kind]
        }
        request = EditRequest(row.image, row.question, row.new_answer)
        return EditSample(
            request, {name: probes for name, probes in generality.items() if probes}, locality, own,
            id=row.id, base_answer=self.before,
        )  # fmt: skip

    def probe(self, kind: str, piece: Piece) -> Probe:
        image = None if kind == "texts" else self.row.image if piece.image is None else piece.image
        return Probe(image, piece.prompt or self.row.question, piece.answer)

    def pieces(self, kind: str) -> list[Piece]:
        """What passes the filters, as many as are wanted or as there are."""
        count = self.wanted.count(kind)
        found: list[Piece] = []
        for generator in self.generators:
            if not count or kind not in generator.makes:
                continue
            for attempt in range(_ATTEMPTS):
                if len(found) < count:
                    found += self.passed(kind, self.made(generator, kind, count, attempt))
        if len(found) < count:
            self.built.short.append(f"{self.row.place} ({self.row.id}), {kind}: {len(found)} of {count}")
        return found[:count]

    def made(self, generator: Generator, kind: str, count: int, attempt: int) -> list[Piece]:
        def make() -> list[dict[str, Any]]:
            try:
                pieces = generator.make(kind, self.row, count, attempt)
            except GeneratorFailed as error:
                raise GeneratorFailed(
                    f"{self.row.place} ({self.row.id}), {kind}: {error} What was made before is kept: run "
                    "the same again to go on."
                ) from error
            return [{"prompt": p.prompt, "image": p.image, "answer": p.answer} for p in pieces]

        key = _key(generator, kind, self.row, count, attempt)
        return [Piece(**piece) for piece in self.cache.get(key, make)]

    def passed(self, kind: str, pieces: Sequence[Piece]) -> list[Piece]:
        """The pieces that can be used, with the unedited model's answers."""
        usable = []
        for piece in pieces:
            reason = why_dropped(kind, piece, self.prompts, self.hashes)
            if reason is None:
                usable.append(piece)
            else:
                self.drop(kind, piece, reason)
        said = self.answers([self._question(kind, piece) for piece in usable])
        found = []
        for piece, answer in zip(usable, said, strict=True):
            reason = self._unanswered(kind, piece, answer)
            if reason is not None:
                self.drop(kind, piece, reason)
                continue
            stays = kind in STAYS
            found.append(dataclasses.replace(piece, answer=piece.answer or answer) if stays else piece)
        return found

    def _question(self, kind: str, piece: Piece) -> tuple[Any, str]:
        probe = self.probe(kind, piece)
        return probe.image_source, probe.prompt

    def _unanswered(self, kind: str, piece: Piece, answer: str | None) -> str | None:
        if answer is None or not self.wanted.answered:
            return None
        if not answer.strip():
            return "the unedited model answers nothing"
        wanted = piece.answer if kind in STAYS else self.same
        if wanted and not (says(answer, wanted) or says(wanted, answer)):
            return f"the unedited model answers {answer!r}, not {wanted!r}"
        return None

    def answers(self, questions: Sequence[tuple[Any, str]]) -> list[str | None]:
        """The unedited model's answers, from the cache where they are; None without a model."""
        if self.answerer is None:
            return [None] * len(questions)
        keys = [
            Cache.key("answer", self.answerer.settings, None if i is None else pixel_digest(i), p)
            for i, p in questions
        ]
        missing = [n for n, key in enumerate(keys) if key not in self.cache]
        if missing:
            said = self.answerer.answers([questions[n] for n in missing])
            for n, answer in zip(missing, said, strict=True):
                self.cache.get(keys[n], lambda a=answer: a)  # type: ignore[misc]
        return [self.cache.get(key, str) for key in keys]

    def drop(self, kind: str, piece: Piece, reason: str) -> None:
        shown = piece.prompt if piece.image is None else os.path.basename(str(piece.image))
        self.built.drops.append(Drop(self.row.id, self.row.place, kind, str(shown), reason))


def counts_of(samples: Sequence[EditSample]) -> Mapping[str, int]:
    """Probes by name over all samples."""
    found: dict[str, int] = {}
    for sample in samples:
        for name, probes in (*sample.generality.items(), *sample.locality.items()):
            found[name] = found.get(name, 0) + len(probes)
    return found
