"""The before-and-after story of the demo, as data: the terminal and the page render it.

Everything shown is measured by `evaluation.evaluate_single`, so the story and the table cannot disagree.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from PIL import Image

from dualedit.analysis import wording
from dualedit.analysis.wording import NAMES, near
from dualedit.data import EditRequest, EditSample
from dualedit.editor import Editor
from dualedit.evaluation import METRICS, SingleResult, ask_before, evaluate_single, exact_match
from dualedit.evaluation.single import probes_of

from .demo_worlds import DemoWorld

__all__ = [
    "KINDS", "MEANINGS", "NAMES", "TITLES", "Moment", "Story", "brief", "known_sample", "measure",
    "moments_of", "near", "stories_of", "untouched",
]  # fmt: skip

KINDS = {name: kind for name, kind in wording.KINDS.items() if name in METRICS}
TITLES = {name: wording.TITLES[name] for name in METRICS}
MEANINGS = {name: wording.MEANINGS[name] for name in METRICS}


@dataclass(frozen=True)
class Moment:
    """One question before and after an edit.

    Attributes:
        metric: a name of `KINDS`.
        image, prompt: what was asked; image None for a question without a picture.
        before, after: the unedited and the edited model's answers.
        wanted: what the edited model is to answer.
        right: whether it does.
        fired: whether the edit applied; decided at distance <= radius.
        distance, radius: from the question to the edit's key, and how far the edit reaches.
    """

    metric: str
    image: Image.Image | None
    prompt: str
    before: str
    after: str
    wanted: str
    right: bool
    fired: bool
    distance: float
    radius: float


@dataclass(frozen=True)
class Story:
    """One edit and what it did, under each method.

    Attributes:
        request: the edit.
        truth: the fact that it overwrites.
        moments: method to the questions asked, the same questions in the same order for every method.
    """

    request: EditRequest
    truth: str
    moments: dict[str, list[Moment]]


def moments_of(sample: EditSample, records: Sequence[Mapping]) -> list[Moment]:
    """The records of one sample with their pictures, in the order of `KINDS`."""
    found = [
        Moment(
            metric, probe.image, probe.prompt, record["before"], record["answer"], record["expected"],
            record["correct"], record["fired"], record["distance"], record["radius"],
        )
        for (metric, probe), record in zip(probes_of(sample), records, strict=True)
    ]  # fmt: skip
    return sorted(found, key=lambda moment: list(KINDS).index(moment.metric))


def stories_of(
    world: DemoWorld, samples: Sequence[EditSample], results: Mapping[str, SingleResult]
) -> list[Story]:
    """A story for every sample that all methods were measured on."""
    records: dict[str, list[list[Mapping]]] = {}
    for method, result in results.items():
        records[method] = [[] for _ in samples]
        for record in result.records:
            records[method][record["sample"]].append(record)
    return [
        Story(
            sample.request,
            world.truth(sample),
            {method: moments_of(sample, own[number]) for method, own in records.items()},
        )
        for number, sample in enumerate(samples)
    ]


def known_sample(editor: Editor, world: DemoWorld, samples: Sequence[EditSample]) -> EditSample:
    """The first sample whose fact the unedited model knows, so that the edit overwrites something true."""
    for sample in samples:
        answer = editor.answer(sample.request.image, sample.request.prompt)
        if exact_match(answer, world.truth(sample)):
            return sample
    return samples[0]


def measure(
    editors: Mapping[str, Editor], samples: Sequence[EditSample], progress: bool = True
) -> dict[str, SingleResult]:
    """Single-edit figures of every method on the same samples.

    Args:
        editors: method to an editor without edits, all on the same base model's weights.
    """
    before = ask_before(next(iter(editors.values())), samples, progress)
    return {
        method: evaluate_single(editor, samples, method, progress, before=before, explain=True)
        for method, editor in editors.items()
    }


def brief(moments: Sequence[Moment]) -> list[Moment]:
    """The first question of each kind, and of the generality kinds the last one too.

    Of new pictures these are the same drawing seen otherwise and, where others drew the thing, another
    artist's.
    """
    of_kind: dict[str, list[Moment]] = {}
    for moment in moments:
        of_kind.setdefault(moment.metric, []).append(moment)
    kept = [found[0] for found in of_kind.values()]
    kept += [of_kind[name][-1] for name in ("t_gen", "v_gen") if len(of_kind.get(name, ())) > 1]
    return [moment for moment in moments if any(moment is one for one in kept)]


def untouched(results: Mapping[str, SingleResult]) -> tuple[int, int]:
    """No gate, no change: (answers that equal the unedited model's, questions for which no edit fired)."""
    closed = [r for result in results.values() for r in result.records if not r["fired"]]
    return sum(r["answer"] == r["before"] for r in closed), len(closed)
