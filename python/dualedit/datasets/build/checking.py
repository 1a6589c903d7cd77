"""What is missing or wrong in a file of facts, and what is in it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...data import EditSample
from ..images import missing_images, sources_of
from ..loading import LoadedSamples
from ..overlap import overlap
from .filters import plain

SCHEMA = Path(__file__).parents[1] / "facts.schema.json"
_NEEDED = {
    "t_gen": "rephrases: nothing tests other wordings",
    "v_gen": "other_images: nothing tests other pictures",
    "hard_image": "a look-alike in keep: nothing tests that it keeps its answer",
    "hard_question": "another question about the picture in keep",
    "m_loc": "an unrelated picture in keep: training and calibration need one",
    "t_loc": "a question without a picture in keep: training and calibration need one",
}


@dataclass(frozen=True)
class Finding:
    """Something about a file.

    Attributes:
        wrong: whether figures would be wrong with it; else something is only missing.
        place: the rows it is about, in words.
        what: in words.
    """

    wrong: bool
    place: str
    what: str

    def __str__(self) -> str:
        return f"{'WRONG' if self.wrong else 'missing'}  {self.place}: {self.what}"


def facts_schema() -> dict[str, Any]:
    """The JSON Schema of one line of a file of facts."""
    found: dict[str, Any] = json.loads(SCHEMA.read_text(encoding="utf-8"))
    return found


def check_facts(samples: Sequence[EditSample], test: Sequence[EditSample] | None = None) -> list[Finding]:
    """What is wrong first, then what is missing.

    Args:
        samples: of a file, for training or for a test.
        test: of another file, which must share no fact, question or picture with the first.
    """
    found = [
        Finding(True, f"row {p.index}", f"{p.field}: {p.reason}")
        for p in missing_images(samples, decode=True)
    ]
    numbers = samples.rows if isinstance(samples, LoadedSamples) else range(len(samples))
    targets: dict[tuple[Any, str], tuple[int, str]] = {}
    lacking: dict[str, list[int]] = {}
    for number, sample in zip(numbers, samples, strict=True):
        found += [Finding(True, f"row {number}", what) for what in _wrong(sample)]
        request = sample.request
        key = (_known(request.image_source), plain(request.prompt))
        other = targets.setdefault(key, (number, plain(request.target)))
        if other[0] != number:
            same = "again" if other[1] == plain(request.target) else "with another target"
            found.append(Finding(True, f"row {number}", f"asks what row {other[0]} asks, {same}"))
        there = {
            name for part in (sample.generality, sample.locality) for name, probes in part.items() if probes
        }
        for name, what in _NEEDED.items():
            blind = request.image_source is None and name != "t_gen" and name != "t_loc"
            if name not in there and not blind:
                lacking.setdefault(what, []).append(number)
        silent = [p for probes in sample.locality.values() for p in probes if not p.answer]
        if silent:
            lacking.setdefault("answer of questions in keep: training leaves those out", []).append(number)
        if not sample.rephrases:
            lacking.setdefault("edit_rephrases: editors have no wordings but those of the test", []).append(
                number
            )
    found += [Finding(False, _rows(rows, len(samples)), what) for what, rows in lacking.items()]
    if test is not None:
        shared = overlap(samples, test, "content").counts
        for name, (both, total) in shared.items():
            if both:
                serious = name in ("facts", "questions", "images")
                found.append(
                    Finding(serious, "training and test", f"{both} of {total} {name} of the test are in both")
                )
    return sorted(found, key=lambda one: not one.wrong)


def _known(source: Any) -> Any:
    return source if isinstance(source, (str, bytes, type(None))) else id(source)


def _wrong(sample: EditSample) -> list[str]:
    request, found = sample.request, []
    asked = plain(request.prompt)
    if sample.base_answer is not None and plain(sample.base_answer) == plain(request.target):
        found.append(f"the target {request.target!r} is what the model answers before")
    tests = [
        plain(p.prompt) for p in sample.generality.get("t_gen", []) if p.image_source == request.image_source
    ]
    if asked in tests:
        found.append("a rephrase is the question itself")
    repeated = [wording for wording, count in Counter(tests).items() if count > 1]
    if repeated:
        found.append(f"the rephrase {repeated[0]!r} comes twice")
    leaked = {plain(wording) for wording in sample.rephrases} & set(tests)
    if leaked:
        found.append(f"{sorted(leaked)[0]!r} is among edit_rephrases and rephrases: the test would be known")
    for name, probes in sample.locality.items():
        for probe in probes:
            if probe.image_source == request.image_source and plain(probe.prompt) in {asked, *tests}:
                found.append(
                    f"{name} asks {probe.prompt!r} about the edit's own picture, and it must not stay"
                )
    return found


def _rows(rows: Sequence[int], total: int) -> str:
    if len(rows) == total:
        return "all rows" if total > 1 else "the row"
    shown = ", ".join(map(str, rows[:6]))
    return (
        f"{'rows' if len(rows) > 1 else 'row'} {shown}{f' and {len(rows) - 6} more' if len(rows) > 6 else ''}"
    )


def stats_of(samples: Sequence[EditSample]) -> dict[str, Any]:
    """Counts of what is in a file, as JSON holds them."""
    kinds: dict[str, list[int]] = {}
    for sample in samples:
        parts = (*sample.generality.items(), *sample.locality.items(), *sample.portability.items())
        for name, probes in parts:
            kinds.setdefault(name, []).append(len(probes))
    sources = [source for sample in samples for _, source in sources_of(sample) if source is not None]
    words = [len(sample.request.target.split()) for sample in samples]
    questions = Counter(plain(sample.request.prompt) for sample in samples)
    return {
        "facts": len(samples),
        "with a picture": sum(sample.request.image_source is not None for sample in samples),
        "pictures": len({_known(source) for source in sources}),
        "questions": len(questions),
        "most common question": list(questions.most_common(1)[0]) if questions else None,
        "families": dict(Counter(sample.family for sample in samples if sample.family).most_common()),
        "words of a target": {"mean": sum(words) / len(words), "most": max(words)} if words else None,
        "new answers": len({plain(sample.request.target) for sample in samples}),
        "with what the model answers before": sum(sample.base_answer is not None for sample in samples),
        "edit_rephrases": sum(len(sample.rephrases) for sample in samples),
        "probes": {
            name: {"facts": len(counts), "all": sum(counts), "least": min(counts), "most": max(counts)}
            for name, counts in kinds.items()
        },
    }
