"""One edit at a time: store it, ask everything, take it back.

Answers are generated freely; the gate decides from the prompt alone. Locality compares with what the
*unedited* model answers to the same batch, so an answer that the model always got wrong counts as kept when
it is kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tqdm.auto import tqdm

from ..data import EditSample, Probe
from ..editing import Edit
from ..editor import Editor
from .metrics import PROBED, Row, exact_match, summarise


@dataclass(frozen=True)
class Asked:
    """A probe of a sample, and what the unedited model answers to it."""

    metric: str
    probe: Probe
    before: str


@dataclass(frozen=True)
class SingleResult:
    """What `evaluate_single` measured.

    Attributes:
        row: the figures.
        records: one dict a probe: "sample", "metric", "prompt", "expected", "before", "answer", "correct",
            "fired", "distance", "radius".
    """

    row: Row
    records: list[dict]


def probes_of(sample: EditSample) -> list[tuple[str, Probe]]:
    """Every question that measures an edit, by metric; "rel" is the edited question itself."""
    request = sample.request
    rel = ("rel", Probe(request.image, request.prompt, request.target))
    groups = (*sample.generality.items(), *sample.locality.items())
    others = [(name, probe) for name, probes in groups for probe in probes]
    unknown = {name for name, _ in others} - set(PROBED)
    if unknown:
        raise ValueError(f"sample has probes for {sorted(unknown)}: the metrics are {PROBED}.")
    return [rel, *others]


def ask_before(editor: Editor, samples: Sequence[EditSample], progress: bool = True) -> list[list[Asked]]:
    """What the unedited model answers to every probe, in the batches that `evaluate_single` asks later.

    The editor's adapters are switched off meanwhile, so its stored edits do not matter.
    """
    asked = []
    with editor.model.disable_adapter():
        for sample in tqdm(samples, desc="asking the unedited model", unit="fact", disable=not progress):
            probes = probes_of(sample)
            answers = editor.answer_many([(p.image, p.prompt) for _, p in probes])
            asked.append([Asked(m, p, a) for (m, p), a in zip(probes, answers, strict=True)])
    return asked


def evaluate_single(
    editor: Editor,
    samples: Sequence[EditSample],
    method: str,
    progress: bool = True,
    before: Sequence[Sequence[Asked]] | None = None,
    explain: bool = False,
) -> SingleResult:
    """Free-generation figures of an editor, one edit at a time.

    Args:
        editor: with no stored edits; it has none afterwards either.
        samples: the facts.
        method: name for the row.
        before: from `ask_before` on the same samples and base model, to share it between methods.
        explain: also note whether an edit fired and at what distance (one more forward a sample).

    Raises:
        ValueError: no samples, or an editor that holds edits already (locality would be measured against
            them).
    """
    check_fresh(editor, samples)
    before = ask_before(editor, samples, progress) if before is None else before
    bar = tqdm(samples, desc=f"editing with {method}", unit="fact", disable=not progress)
    return result(method, [_one(editor, sample, before[i], explain) for i, sample in enumerate(bar)])


def _one(editor: Editor, sample: EditSample, asked: Sequence[Asked], explain: bool) -> list[dict]:
    edit = store(editor, sample)
    try:
        return ask(editor, sample, asked, explain, {})
    finally:
        editor.remove(edit.id)


def store(editor: Editor, sample: EditSample) -> Edit:
    """Make a sample's edit as a user would: its image, question and answer, and one other wording."""
    request = sample.request
    return editor.edit(request.image, request.prompt, request.target, rephrases=sample.rephrases[:1] or None)


def ask(
    editor: Editor, sample: EditSample, asked: Sequence[Asked], explain: bool, edited: Mapping[tuple, str]
) -> list[dict]:
    """Ask every probe of a sample, in one batch, and compare.

    Args:
        edited: answers of the edits that are stored, by fact: a probe about one of them has to get that.

    Returns:
        the records of `SingleResult`, without "sample".
    """
    questions = [(a.probe.image, a.probe.prompt) for a in asked]
    answers = editor.answer_many(questions)
    found = editor.explain_many(questions) if explain else [None] * len(asked)
    records = []
    for a, answer, why in zip(asked, answers, found, strict=True):
        kept = edited.get(a.probe.fact, a.before)
        expected = kept if a.metric in sample.locality else sample.request.target
        records.append(
            {
                "metric": a.metric,
                "prompt": a.probe.prompt,
                "expected": expected,
                "before": a.before,
                "answer": answer,
                "correct": exact_match(answer, expected),
                "fired": None if why is None else why.fired,
                "distance": None if why is None else why.distance,
                "radius": None if why is None else why.radius,
            }
        )
    return records


def check_fresh(editor: Editor, samples: Sequence[EditSample]) -> None:
    """Refuse an evaluation that would not measure what it says.

    Raises:
        ValueError: no samples, or an editor that holds edits already (locality would be measured against
            them).
    """
    if not samples:
        raise ValueError("samples is empty: pass at least one fact to edit.")
    if editor.edits:
        raise ValueError(f"editor holds {len(editor.edits)} edits: remove them, or pass a fresh one.")


def result(
    method: str, records: Sequence[list[dict]], protocol: str = "single", edits: int = 1
) -> SingleResult:
    """The figures of the records of each sample, in order."""
    scores: list[dict[str, list[bool]]] = []
    for own in records:
        scores.append({})
        for record in own:
            scores[-1].setdefault(record["metric"], []).append(record["correct"])
    metrics, stderr = summarise(scores)
    row = Row(method, len(scores), metrics, stderr, protocol=protocol, edits=edits)
    numbered = [{"sample": number, **record} for number, own in enumerate(records) for record in own]
    return SingleResult(row, numbered)
