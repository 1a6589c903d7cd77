"""Asking everything that measures an edit, and scoring what comes back.

Locality compares with what the *unedited* model answers to the same batch, so an answer that the model always
got wrong counts as kept when it is kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor
from tqdm.auto import tqdm

from ..data import EditSample, Probe, shown
from .forcing import token_accuracy
from .method import Method
from .metrics import PROBED, contains_match, exact_match

SCORINGS = ("free", "teacher_forced", "published")
CHANGES = ("rel", "t_gen", "v_gen", "portability")  # the others must stay as they were


@dataclass(frozen=True)
class Asked:
    """A probe of a sample, and what the unedited model says to it.

    Attributes:
        metric: which figure it belongs to.
        before: its freely generated answer.
        given: the answer that teacher forcing gives, "" for a question that is not scored so.
        forced: the ids [T] that it finds most probable at the tokens of `given`, None if nobody asked.
    """

    metric: str
    probe: Probe
    before: str
    given: str = ""
    forced: Tensor | None = None


def probes_of(sample: EditSample) -> list[tuple[str, Probe]]:
    """The questions of the seven figures that every table has; "rel" is the edited question itself.

    Raises:
        ValueError: generality or locality under a name that is no metric.
    """
    request = sample.request
    rel = ("rel", Probe(request.image, request.prompt, request.target))
    groups = (*sample.generality.items(), *sample.locality.items())
    others = [(name, probe) for name, probes in groups for probe in probes]
    unknown = {name for name, _ in others} - set(PROBED)
    if unknown:
        raise ValueError(f"sample has probes for {sorted(unknown)}: the metrics are {PROBED}.")
    return [rel, *others]


def more_probes_of(sample: EditSample) -> list[tuple[str, Probe]]:
    """Questions that every edit with an image gives rise to: random unrelated images overstate locality.

    "no_image" is the edited question asked without the image, "same_image" the sample's other questions
    (hard_question's, or m_loc's where there are none) asked about the edit's very image. Both must be
    answered as before. Source: De-VQA (arXiv:2511.13243).
    """
    request = sample.request
    if request.image_source is None:
        return []
    others = sample.locality.get("hard_question") or sample.locality.get("m_loc") or []
    prompts = dict.fromkeys(probe.prompt for probe in others if probe.prompt != request.prompt)
    facts = {probe.prompt: probe.fact for probe in sample.locality.get("hard_question", [])}
    return [
        ("no_image", Probe(None, request.prompt)),
        *(("same_image", Probe(request.image_source, prompt, fact=facts.get(prompt))) for prompt in prompts),
    ]


def portability_of(sample: EditSample) -> list[tuple[str, Probe]]:
    """Questions about what follows from the edit, where the data set says what the answer is."""
    return [
        ("portability", probe)
        for probes in sample.portability.values()
        for probe in probes
        if probe.answer is not None
    ]


class Unedited:
    """What the unedited model says to the questions of samples, for all methods on one base model.

    Questions are asked in the batches in which they will be asked again: the figures of every table, then
    the further probes, then portability.

    Args:
        samples: the facts, by their place in this list.
        more: also the further probes and portability.
        forced: also teacher forcing.
        max_new_tokens: of an answer.
    """

    def __init__(
        self,
        samples: Sequence[EditSample],
        more: bool = False,
        forced: bool = False,
        max_new_tokens: int = 20,
    ):
        self.samples = samples
        self.more = more
        self.forced = forced
        self.max_new_tokens = max_new_tokens
        self._asked: dict[int, list[list[Asked]]] = {}

    def __getitem__(self, place: int) -> list[list[Asked]]:
        """The batches of the sample at a place; the first one is always there."""
        return self._asked[place]

    def fill(self, known: Sequence[Sequence[Asked]]) -> None:
        """Take over the first batches of the first samples from an earlier time."""
        self._asked |= {place: [list(asked)] for place, asked in enumerate(known)}

    def ask(self, method: Method, places: Sequence[int], progress: bool = True) -> None:
        """Ask what has not been asked yet. The method's stored edits do not matter."""
        missing = [place for place in places if place not in self._asked]
        if not missing:
            return
        with method.unedited():
            for place in tqdm(missing, desc="asking the unedited model", unit="fact", disable=not progress):
                sample = self.samples[place]
                batches = [probes_of(sample)]
                if self.more:
                    batches += [more_probes_of(sample), portability_of(sample)]
                self._asked[place] = [self._batch(method, sample, batch) for batch in batches]

    def _batch(self, method: Method, sample: EditSample, probes: Sequence[tuple[str, Probe]]) -> list[Asked]:
        if not probes:
            return []
        questions = [(probe.image, probe.prompt) for _, probe in probes]
        answers = method.answers(questions, self.max_new_tokens)
        asked = [
            Asked(metric, probe, answer, _given(metric, probe, answer, sample))
            for (metric, probe), answer in zip(probes, answers, strict=True)
        ]
        if not self.forced:
            return asked
        scored = [i for i, one in enumerate(asked) if one.given.strip()]
        found = method.predictions([questions[i] for i in scored], [asked[i].given for i in scored])
        for i, (best, _) in zip(scored, found, strict=True):
            one = asked[i]
            asked[i] = Asked(one.metric, one.probe, one.before, one.given, best)
        return asked


def _given(metric: str, probe: Probe, before: str, sample: EditSample) -> str:
    """The answer that teacher forcing gives: the wanted one, or for locality the data set's, or else what the
    unedited model says."""
    if metric == "portability":
        return probe.answer or ""
    if metric in CHANGES:
        return sample.request.target
    return probe.answer or before


def ask(
    method: Method,
    sample: EditSample,
    asked: Sequence[Asked],
    edited: Mapping[tuple, str],
    scorings: Sequence[str] = ("free",),
    explain: bool = False,
    max_new_tokens: int = 20,
) -> list[dict]:
    """Ask one batch of a sample's probes again, of the edited model, and score.

    Args:
        edited: answers of the edits that are stored, by fact: a probe about one of them has to get that.
        scorings: names of `SCORINGS`.

    Returns:
        a record a probe, as JSON holds it: "metric", "kind", "prompt", "image" (in words), "expected",
        "before", "answer", "correct" (exact match), "contains", "fired", "edit" and "edit_prompt"
        (target and question of the nearest edit), "distance", "radius", and the token accuracies
        "teacher_forced" and "published"; None for what was not measured.
    """
    if not asked:
        return []
    questions = [(a.probe.image, a.probe.prompt) for a in asked]
    free = "free" in scorings
    answers = method.answers(questions, max_new_tokens) if free else [None] * len(asked)
    found = method.explain(questions) if explain else [None] * len(asked)
    records = []
    for a, answer, why in zip(asked, answers, found, strict=True):
        expected = _expected(a, sample, edited)
        records.append(
            {
                "metric": a.metric,
                "kind": a.probe.kind,
                "prompt": a.probe.prompt,
                "image": None if a.probe.image_source is None else shown(a.probe.image_source),
                "expected": expected,
                "before": a.before,
                "answer": answer,
                "correct": exact_match(answer, expected) if free else None,
                "contains": contains_match(answer, expected) if free else None,
                "fired": None if why is None else why.fired,
                "edit": None if why is None or why.edit is None else why.edit.target,
                "edit_prompt": None if why is None or why.edit is None else why.edit.prompt,
                "distance": None if why is None or why.edit is None else why.distance,
                "radius": None if why is None else why.radius,
                "teacher_forced": None,
                "published": None,
            }
        )
    for scoring in ("teacher_forced", "published"):
        if scoring in scorings:
            _force(method, sample, asked, edited, scoring, records)
    return records


def _expected(a: Asked, sample: EditSample, edited: Mapping[tuple, str]) -> str:
    if a.metric == "portability":
        return a.probe.answer or ""
    return sample.request.target if a.metric in CHANGES else edited.get(a.probe.fact, a.before)


def _force(method, sample, asked, edited, scoring: str, records: list[dict]) -> None:
    """Token accuracy: of what must change against the wanted answer; of what must stay, at the tokens of the
    data set's answer, against what the unedited model finds most probable there."""
    scored = [i for i, a in enumerate(asked) if a.given.strip()]
    own = {i: edited[asked[i].probe.fact] for i in scored if _has_own_edit(asked[i], edited)}
    given = [own.get(i, asked[i].given) for i in scored]
    questions = [(asked[i].probe.image, asked[i].probe.prompt) for i in scored]
    found = method.predictions(questions, given, sees_answer=scoring == "published")
    for i, (best, target) in zip(scored, found, strict=True):
        wanted = target if asked[i].metric in CHANGES or i in own else asked[i].forced
        records[i][scoring] = token_accuracy(best, wanted)


def _has_own_edit(a: Asked, edited: Mapping[tuple, str]) -> bool:
    return a.metric not in CHANGES and a.probe.fact in edited
