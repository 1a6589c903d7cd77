"""From edits to what a training step runs: questions by loss term, rows by what is to be computed of them.

A batch is made from its step number alone (and the seed): which edits, which of their questions, in which
order. So a run that is resumed, or spread over other processes, sees what it would have seen.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..data import EditSample, ImageSource, Probe
from ..models.prompting import Prompter
from ..runtime.sequence import Prompt, describe_prompt, last_true
from .dualedit import teacher_forced
from .recipe import TERMS

CHANGE, KEEP = TERMS[:3], TERMS[3:]
IGNORED = -100
# A processor that returns more than this states image positions in ways that packing does not know.
_PACKABLE = {"input_ids", "attention_mask", "pixel_values"}
# The least number that both float32 and bfloat16 hold.
_CLOSED = torch.finfo(torch.bfloat16).min


@dataclass(frozen=True)
class Question:
    """One question of a batch: which term of the loss it belongs to, and which edit it is bound to."""

    probe: Probe
    term: str
    edit: int


@dataclass(frozen=True)
class Part:
    """R rows of questions that go through the model together.

    Attributes:
        inputs: the model's keyword arguments, answers behind the questions.
        prompt: text and image columns; in a packed row those of all its questions.
        labels: [R, L] int64, the answers' tokens, -100 elsewhere.
        answer: [R, L] int64, number of the answer in the batch that a label belongs to, -1 elsewhere.
        route: [R] int64, the edit of each row.
        edit_columns: [R, L] bool, the columns that are the edit itself, in the part that holds the edits.
        keeps: whether some of its answers must stay.
    """

    inputs: dict[str, Tensor]
    prompt: Prompt
    labels: Tensor
    answer: Tensor
    route: Tensor
    edit_columns: Tensor | None
    keeps: bool


@dataclass(frozen=True)
class Batch:
    """Some edits with their questions.

    Attributes:
        parts: rows by what is to be computed of them.
        terms: [A] int64, the number of the term that each answer belongs to.
        edits: how many edits.
    """

    parts: tuple[Part, ...]
    terms: Tensor
    edits: int

    def counts(self) -> Tensor:
        """[6] float64: answers of each term."""
        return torch.bincount(self.terms, minlength=len(TERMS)).double()


def _pick(options: Sequence, generator: torch.Generator):
    return options[int(torch.randint(len(options), (1,), generator=generator))]


def questions_of(
    sample: EditSample, edit: int, weights: Mapping[str, float], generator: torch.Generator
) -> list[Question]:
    """One question for each term that has a weight and that the sample has a question for.

    Where a sample has wordings of its own for editing (`rephrases`), its generality probes are a test's and
    their wordings are left alone. A locality question without an answer has no position to compare at.
    """
    request = sample.request
    here = request.image_source
    found = {"reliability": [Probe(here, request.prompt, request.target)]}
    own = [Probe(here, wording, request.target) for wording in sample.rephrases]
    found["text_generality"] = own or list(sample.generality.get("t_gen", ()))
    found["image_generality"] = [
        Probe(probe.image_source, request.prompt if own else probe.prompt, request.target)
        for probe in sample.generality.get("v_gen", ())
    ]
    locality = {kind: [p for p in probes if p.answer] for kind, probes in sample.locality.items()}
    found["text_locality"] = locality.get("t_loc", [])
    found["image_locality"] = locality.get("m_loc", [])
    hard = [probes for kind in ("hard_image", "hard_question") if (probes := locality.get(kind))]
    found["hard_locality"] = _pick(hard, generator) if hard else []
    # The edit itself is always read: its keys and values are what the other questions attend to.
    chosen = [term for term in TERMS if found[term] and (weights[term] > 0 or term == "reliability")]
    return [Question(_pick(found[term], generator), term, edit) for term in chosen]


def untrained_terms(samples: Sequence[EditSample], weights: Mapping[str, float]) -> list[str]:
    """The terms that have a weight and no question in any of the samples."""
    generator = torch.Generator().manual_seed(0)
    wanted = {term for term in TERMS if weights[term] > 0}
    for sample in samples:
        wanted -= {question.term for question in questions_of(sample, 0, weights, generator)}
        if not wanted:
            break
    return [term for term in TERMS if term in wanted]


def make_batch(
    prompter: Prompter,
    samples: Sequence[EditSample],
    generators: Sequence[torch.Generator],
    weights: Mapping[str, float],
    eos: int | None,
    image_ids: list[int],
    pack: bool,
) -> Batch:
    """The questions of some edits, as the parts of a training step.

    Args:
        generators: one for each sample, for the choice of its questions.
        image_ids: ids of image content.
        pack: read an image once for all questions of an edit about it.
    """
    asked: list[Question] = []
    for number, (sample, generator) in enumerate(zip(samples, generators, strict=True)):
        asked += questions_of(sample, number, weights, generator)
    sources = {number: sample.request.image_source for number, sample in enumerate(samples)}
    together: dict[tuple[str, bool], list[int]] = {}
    for place, question in enumerate(asked):
        source = question.probe.image_source
        if question.term == "reliability":
            kind = "edit"
        elif pack and source is not None and _same(source, sources[question.edit]):
            kind = "edit"
        else:
            kind = "keep" if question.term in KEEP else "change"
        together.setdefault((kind, source is not None), []).append(place)
    parts = []
    for (kind, _), places in sorted(together.items()):
        places = sorted(places, key=lambda place: (asked[place].edit, place))
        parts += _parts(prompter, asked, places, kind == "edit", eos, image_ids, pack)
    terms = torch.tensor([TERMS.index(question.term) for question in asked])
    return Batch(tuple(parts), terms, len(samples))


def _same(first: ImageSource, second: ImageSource) -> bool:
    return first is second or (isinstance(first, (str, bytes)) and first == second)


def _parts(prompter, asked, places, holds_edits, eos, image_ids, pack) -> list[Part]:
    """One part of the given questions; two where they were to be packed and cannot be."""
    inputs = teacher_forced(prompter, [asked[place].probe for place in places], eos)
    labels = inputs.pop("labels")
    rows = [asked[place] for place in places]
    if holds_edits and pack and len(rows) > len({row.edit for row in rows}):
        packed = _packed(inputs, labels, places, rows, image_ids)
        if packed is not None:
            return [packed]
        edits = [place for place in places if asked[place].term == "reliability"]
        others = [place for place in places if asked[place].term != "reliability"]
        first = _parts(prompter, asked, edits, True, eos, image_ids, False)
        return first + _parts(prompter, asked, others, False, eos, image_ids, False)
    prompt = describe_prompt(
        inputs["input_ids"], inputs["attention_mask"], labels, image_ids, tuple(labels.shape), labels.device
    )
    answer = torch.tensor(places)[:, None].expand_as(labels).masked_fill(labels == IGNORED, -1)
    route = torch.tensor([row.edit for row in rows])
    columns = inputs["attention_mask"] != 0 if holds_edits else None
    return [Part(inputs, prompt, labels, answer, route, columns, any(row.term in KEEP for row in rows))]


def _packed(
    inputs: dict[str, Tensor], labels: Tensor, places: list[int], rows: list[Question], image_ids: list[int]
) -> Part | None:
    """One row for each edit: what its questions begin with, once, and their endings one behind the other.

    Each ending sees the beginning and itself, at the positions that it would have alone. None where the
    processor's outputs are of another kind, or the image does not lie in the common beginning.
    """
    pixels = inputs.get("pixel_values")
    if not set(inputs) <= _PACKABLE or pixels is None or len(pixels) != len(rows):
        return None
    ids, attended = inputs["input_ids"], inputs["attention_mask"] != 0
    edits = sorted({row.edit for row in rows})
    built = []
    for edit in edits:
        members = [number for number, row in enumerate(rows) if row.edit == edit]
        members.sort(key=lambda number: rows[number].term != "reliability")
        prompts = [ids[m][attended[m] & (labels[m] == IGNORED)] for m in members]
        answers = [labels[m][labels[m] != IGNORED] for m in members]
        shared = _common(prompts)
        image = torch.isin(prompts[0], torch.tensor(image_ids))
        if not bool(image.any()) or bool(image[shared:].any()):
            return None
        built.append(_packed_row(prompts, answers, [places[m] for m in members], shared))
    length = max(len(row["ids"]) for row in built)
    stacked = {name: _pad(built, name, length) for name in built[0]}
    segment, column = stacked["segment"], torch.arange(length)
    seen = (segment[:, None, :] == 0) | (segment[:, None, :] == segment[:, :, None])
    seen = seen & (column <= column[:, None]) & (segment >= 0)[:, None, :]
    seen = seen | torch.eye(length, dtype=torch.bool)  # padding sees itself, or its softmax would be empty
    real = segment >= 0
    packed_labels = stacked["labels"]
    asks = real & (packed_labels == IGNORED)
    image = torch.isin(stacked["ids"], torch.tensor(image_ids)) & asks
    first = [next(n for n, row in enumerate(rows) if row.edit == edit) for edit in edits]
    call = {
        "input_ids": stacked["ids"],
        "attention_mask": torch.zeros(seen.shape).masked_fill(~seen, _CLOSED)[:, None],
        "position_ids": stacked["positions"],
        "pixel_values": pixels[first],
    }
    return Part(
        call,
        Prompt(asks & ~image, image, last_true(asks), last_true(real)),
        packed_labels,
        stacked["answer"],
        torch.tensor(edits),
        (segment == 0) | (segment == 1),
        any(row.term in KEEP for row in rows),
    )


def _common(prompts: list[Tensor]) -> int:
    """Tokens that all prompts begin with; at least one of each is left over, to foretell the answer."""
    shortest = min(len(prompt) for prompt in prompts) - 1
    same = torch.ones(shortest, dtype=torch.bool)
    for prompt in prompts[1:]:
        same &= prompt[:shortest] == prompts[0][:shortest]
    return int(same.int().cumprod(0).sum())


_EMPTY = {"ids": 0, "labels": IGNORED, "answer": -1, "segment": -1, "positions": 0}


def _packed_row(prompts, answers, places, shared: int) -> dict[str, Tensor]:
    pieces: dict[str, list[Tensor]] = {name: [] for name in _EMPTY}

    def add(ids: Tensor, label: Tensor, answer: int, segment: int, begin: int) -> None:
        pieces["ids"].append(ids)
        pieces["labels"].append(label)
        pieces["answer"].append(torch.full_like(ids, answer))
        pieces["segment"].append(torch.full_like(ids, segment))
        pieces["positions"].append(torch.arange(begin, begin + len(ids)))

    head = prompts[0][:shared]
    add(head, torch.full_like(head, IGNORED), -1, 0, 0)
    for number, (prompt, answer, place) in enumerate(zip(prompts, answers, places, strict=True)):
        rest = prompt[shared:]
        add(rest, torch.full_like(rest, IGNORED), -1, number + 1, shared)
        add(answer, answer, place, number + 1, len(prompt))
    return {name: torch.cat(values) for name, values in pieces.items()}


def _pad(rows: list[dict[str, Tensor]], name: str, length: int) -> Tensor:
    padded = [
        torch.nn.functional.pad(row[name], (0, length - len(row[name])), value=_EMPTY[name]) for row in rows
    ]
    return torch.stack(padded)


@dataclass(frozen=True)
class Feed:
    """Batches by step number, for one of `processes` processes.

    Attributes:
        make: samples and their generators to a batch.
        batch_size: edits in a step, over all processes; accumulate: batches of a step in this process.
        ordered: take the samples in their order (held-out edits), not shuffled.
    """

    samples: Sequence[EditSample]
    make: Callable[[Sequence[EditSample], Sequence[torch.Generator]], Batch]
    batch_size: int
    accumulate: int = 1
    seed: int = 0
    process: int = 0
    processes: int = 1
    ordered: bool = False

    def __post_init__(self):
        share = self.processes * self.accumulate
        if self.batch_size % share:
            raise ValueError(
                f"batch_size={self.batch_size} cannot be divided by {self.processes} processes times "
                f"accumulate={self.accumulate}: pass a multiple of {share}."
            )

    def numbers(self, step: int) -> list[int]:
        """The samples of a step, all processes together."""
        count = len(self.samples)
        places = range(step * self.batch_size, (step + 1) * self.batch_size)
        if self.ordered:
            return [place for place in places if place < count]
        orders = {epoch: self._order(epoch) for epoch in {place // count for place in places}}
        return [int(orders[place // count][place % count]) for place in places]

    def _order(self, epoch: int) -> Tensor:
        return torch.randperm(len(self.samples), generator=self._generator(-1 - epoch))

    def _generator(self, number: int) -> torch.Generator:
        return torch.Generator().manual_seed((self.seed * 1_000_000_007 + number) % 2**63)

    def steps_of_all(self) -> int:
        """Steps in which every sample comes once."""
        return -(-len(self.samples) // self.batch_size)

    def batches(self, step: int) -> list[Batch]:
        """This process's batches of a step; fewer, or none, where an ordered feed runs out."""
        numbers = self.numbers(step)
        mine = [
            (numbers[i], step * self.batch_size + i)
            for i in range(self.process, len(numbers), self.processes)
        ]
        size = self.batch_size // (self.processes * self.accumulate)
        made = []
        for begin in range(0, len(mine), size):
            chosen = mine[begin : begin + size]
            generators = [self._generator(place) for _, place in chosen]
            made.append(self.make([self.samples[number] for number, _ in chosen], generators))
        return made

    def ahead(self, start: int, stop: int, depth: int = 2) -> Iterator[list[Batch]]:
        """The batches of the steps from `start` to `stop`, made in the background a few steps ahead."""
        with closing(_Ahead(self.batches, start, stop, depth)) as made:
            yield from made

    def alone(self) -> Feed:
        """The same samples for one process."""
        return replace(self, process=0, processes=1)


class _Ahead:
    """A thread that opens pictures and tokenizes while the model computes."""

    def __init__(self, make: Callable[[int], list[Batch]], start: int, stop: int, depth: int):
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="dualedit-batches")
        self.make, self.step, self.stop = make, start, stop
        self.coming = []
        for _ in range(depth):
            self._order()

    def _order(self) -> None:
        if self.step < self.stop:
            self.coming.append(self.pool.submit(self.make, self.step))
            self.step += 1

    def __iter__(self):
        return self

    def __next__(self) -> list[Batch]:
        if not self.coming:
            raise StopIteration
        made = self.coming.pop(0).result()
        self._order()
        return made

    def close(self) -> None:
        self.pool.shutdown(wait=True, cancel_futures=True)


def count_edits(batches: Sequence[Batch]) -> Counter:
    """Edits and rows of some batches, for reports."""
    total = Counter()
    for batch in batches:
        total["edits"] += batch.edits
        total["rows"] += sum(len(part.route) for part in batch.parts)
        total["tokens"] += sum(part.labels.numel() for part in batch.parts)
    return total
