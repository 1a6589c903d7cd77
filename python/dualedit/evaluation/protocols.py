"""The three ways of editing that are measured: one edit at a time, all at once, one after the other.

single      store an edit, ask everything that measures it, take it back.
batch       store all edits, or one group of them after the other, then ask. Every question can meet every
            edit of its group, so routing is measured too.
sequential  store the edits one after the other, and ask about an edit directly after it; after the last one,
            ask everything again. What is still right then is "retention".

With several edits stored, a probe about a fact that has an edit of its own (a look-alike that was edited as
well) has to get that edit's answer; all others have to get the unedited model's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from tqdm.auto import tqdm

from ..data import EditRequest, EditSample
from .asking import SCORINGS, Asked, Unedited, ask
from .method import Method

PROTOCOLS = ("single", "batch", "sequential")
_TIMED = 10  # facts of which one question is asked alone, for the latency


@dataclass(frozen=True)
class Plan:
    """What is measured, and how.

    Attributes:
        protocol: a name of `PROTOCOLS`.
        scorings: names of `SCORINGS`.
        asked: most facts whose questions are asked; None asks all. Batch takes the first ones, sequential
            takes them evenly from the first edit to the last.
        together: of a batch, how many edits are stored at once; the samples are taken in groups of so many.
            None stores all.
        more: also ask the further probes and portability, in batches of their own.
        explain: also note which edit fired and at what distance (one more forward a batch).
        costs: also measure seconds and bytes.
        max_new_tokens: of an answer.
        seed: of whatever a method draws at random while it edits, and of the bootstrap.
    """

    protocol: str = "single"
    scorings: tuple[str, ...] = ("free",)
    asked: int | None = None
    together: int | None = None
    more: bool = True
    explain: bool = False
    costs: bool = True
    max_new_tokens: int = 20
    seed: int = 0

    def __post_init__(self):
        if self.protocol not in PROTOCOLS:
            raise ValueError(f"protocol={self.protocol!r}: choose one of {PROTOCOLS}.")
        if not self.scorings or set(self.scorings) - set(SCORINGS):
            raise ValueError(f"scorings={self.scorings!r}: choose from {SCORINGS}.")
        if self.asked is not None and self.asked < 1:
            raise ValueError(f"asked={self.asked}: pass at least 1, or None for all.")
        if self.together is not None and (self.together < 1 or self.protocol != "batch"):
            raise ValueError(f"together={self.together}: pass at least 1, with protocol='batch' only.")

    def stored(self, count: int) -> int:
        """How many of so many samples are stored at once, which is what a row's `edits` says."""
        return 1 if self.protocol == "single" else min(count, self.together or count)

    def places(self, count: int) -> list[int]:
        """Which of so many samples are asked about."""
        asked = count if self.asked is None else min(self.asked, count)
        if self.protocol == "batch":
            return list(range(asked))
        if self.protocol == "single":
            return list(range(count))
        return sorted({round(i * (count - 1) / max(1, asked - 1)) for i in range(asked)})


def check_samples(plan: Plan, samples: Sequence[EditSample]) -> None:
    """Refuse samples that would not measure what they say.

    Raises:
        ValueError: no samples; several edits at once of which two are about the same fact.
    """
    if not samples:
        raise ValueError("samples is empty: pass at least one fact to edit.")
    facts = [sample.fact for sample in samples if sample.fact is not None]
    if plan.protocol != "single" and len(set(facts)) < len(facts):
        twice = next(fact for fact in facts if facts.count(fact) > 1)
        raise ValueError(f"samples edit the fact {twice} twice: the later edit would take its place.")


def measure(
    method: Method,
    samples: Sequence[EditSample],
    plan: Plan,
    unedited: Unedited,
    mine: Callable[[str, int], bool] = lambda phase, place: True,
    progress: bool = True,
) -> Iterator[dict]:
    """Edit and ask; the method is without edits afterwards.

    Args:
        method: without stored edits.
        unedited: the same samples' answers before any edit; asked here where they are missing.
        mine: whether this process is to ask the sample at a place in a phase ("after" an edit, or at the
            "end" of a sequence); the edits are stored all the same where others need them.

    Yields:
        for each sample asked: "phase", "sample" (its place), "id", "family", "target", "probes" (see
        `asking.ask`), and "costs".
    """
    check_samples(plan, samples)
    phases = ("after", "end") if plan.protocol == "sequential" else ("after",)
    places = plan.places(len(samples))
    wanted = {phase: {place for place in places if mine(phase, place)} for phase in phases}
    if not any(wanted.values()):
        return
    unedited.ask(method, sorted(set().union(*wanted.values())), progress)
    run = {"single": _single, "batch": _batch, "sequential": _sequential}[plan.protocol]
    try:
        yield from run(_Asker(method, samples, plan, unedited), wanted, progress)
    finally:
        method.reset()


class _Asker:
    """One method, one plan: edits and asks by a sample's place."""

    def __init__(self, method: Method, samples: Sequence[EditSample], plan: Plan, unedited: Unedited):
        self.method = method
        self.samples = samples
        self.plan = plan
        self.unedited = unedited
        self._seconds: dict[int, float] = {}
        self._timed = 0

    def edit(self, place: int) -> None:
        sample = self.samples[place]
        began = time.perf_counter()
        try:
            with _seeded(self.plan.seed, place):
                self.method.edit(sample)
        except ValueError as error:
            name = sample.id or place
            raise ValueError(f"sample {name}, with {self.method.name}: {error}") from error
        self._seconds[place] = time.perf_counter() - began

    def ask(self, place: int, phase: str, stored: int, edited: dict) -> dict:
        """Everything about one sample, with `stored` edits in the method."""
        sample, plan, batches = self.samples[place], self.plan, self.unedited[place]
        costs = self._costs(place, stored) if phase == "after" and plan.costs else {}
        probes: list[dict] = []
        # The last batch is portability: what it presumes beside the edit is stored for it alone.
        for batch in batches[:2]:
            probes += self._batch(sample, batch, edited)
        for batch in batches[2:]:
            if not sample.companions:
                probes += self._batch(sample, batch, edited)
            elif plan.protocol == "single":
                for companion in sample.companions:
                    self.method.edit(_alone(companion))
                probes += self._batch(sample, batch, edited)
        return {
            "phase": phase, "sample": place, "id": sample.id or str(place), "family": sample.family,
            "target": sample.request.target, "costs": costs, "probes": probes,
        }  # fmt: skip

    def _batch(self, sample: EditSample, batch: Sequence[Asked], edited: dict) -> list[dict]:
        plan = self.plan
        return ask(self.method, sample, batch, edited, plan.scorings, plan.explain, plan.max_new_tokens)

    def _costs(self, place: int, stored: int) -> dict[str, float]:
        costs = {"edit_seconds": self._seconds[place], "edit_bytes": self.method.memory_bytes() / stored}
        trained = getattr(self.method, "training_seconds", None)  # of the methods that say so
        if trained is not None:
            costs["training_seconds"] = trained
        if self._timed < _TIMED:
            self._timed += 1
            request = self.samples[place].request
            question = [(request.image, request.prompt)]
            costs["answer_seconds"] = self._latency(question)
            with self.method.unedited():
                costs["answer_seconds_unedited"] = self._latency(question)
        return costs

    def _latency(self, question: list) -> float:
        began = time.perf_counter()
        self.method.answers(question, self.plan.max_new_tokens)
        return time.perf_counter() - began


def _alone(request: EditRequest) -> EditSample:
    return EditSample(request, {}, {})


@contextmanager
def _seeded(seed: int, place: int) -> Iterator[None]:
    """What an edit draws at random depends on the seed and the edit alone, not on what ran before it."""
    with torch.random.fork_rng():
        torch.manual_seed(1_000_003 * seed + place)
        yield


def _targets(samples: Sequence[EditSample]) -> dict:
    return {sample.fact: sample.request.target for sample in samples if sample.fact is not None}


def _single(asker: _Asker, wanted: dict, progress: bool) -> Iterator[dict]:
    bar = tqdm(
        sorted(wanted["after"]), desc=f"editing with {asker.method.name}", unit="fact", disable=not progress
    )
    for place in bar:
        try:
            asker.edit(place)
            unit = asker.ask(place, "after", 1, {})
        finally:
            asker.method.reset()
        yield unit


def _batch(asker: _Asker, wanted: dict, progress: bool) -> Iterator[dict]:
    name, count = asker.method.name, len(asker.samples)
    size = asker.plan.stored(count)
    groups = [range(begin, min(begin + size, count)) for begin in range(0, count, size)]
    groups = [group for group in groups if wanted["after"].intersection(group)]
    with (
        tqdm(
            total=sum(map(len, groups)), desc=f"storing {size} edits", unit="edit", disable=not progress
        ) as storing,
        tqdm(total=len(wanted["after"]), desc=f"asking {name}", unit="fact", disable=not progress) as asking,
    ):
        for group in groups:
            try:
                for place in group:
                    asker.edit(place)
                    storing.update()
                edited = _targets(asker.samples[group.start : group.stop])
                for place in sorted(wanted["after"].intersection(group)):
                    yield asker.ask(place, "after", len(group), edited)
                    asking.update()
            finally:
                asker.method.reset()


def _sequential(asker: _Asker, wanted: dict, progress: bool) -> Iterator[dict]:
    samples = asker.samples
    bar = tqdm(
        range(len(samples)),
        desc=f"editing in sequence with {asker.method.name}",
        unit="edit",
        disable=not progress,
    )
    for place in bar:
        asker.edit(place)
        if place in wanted["after"]:
            yield asker.ask(place, "after", place + 1, _targets(samples[: place + 1]))
    edited = _targets(samples)
    for place in tqdm(sorted(wanted["end"]), desc="asking again", unit="fact", disable=not progress):
        yield asker.ask(place, "end", len(samples), edited)
