"""From what was asked to rows of a table; `evaluate` is the one call that does all of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..data import EditSample
from .asking import Unedited
from .journal import Journal
from .method import Method
from .metrics import MORE_PROBED, Row, Scores, figures_of, intervals, retention, summarise
from .processes import Alone, Processes
from .protocols import Plan, measure

_SCORE = {"free": "correct", "teacher_forced": "teacher_forced", "published": "published"}
COSTS = ("training_seconds", "edit_seconds", "edit_bytes", "answer_seconds", "answer_seconds_unedited")


@dataclass(frozen=True)
class SingleResult:
    """What an evaluation measured, in one scoring.

    Attributes:
        row: the figures.
        records: one dict a probe: "sample" and what `asking.ask` says; a sequential evaluation's hold "phase"
            too.
    """

    row: Row
    records: list[dict]


def evaluate(
    method: Method,
    samples: Sequence[EditSample],
    plan: Plan | None = None,
    unedited: Unedited | None = None,
    journal: Journal | None = None,
    processes: Processes | None = None,
    progress: bool = True,
) -> list[SingleResult]:
    """Measure one method on samples: a result for each of the plan's scorings, in their order.

    Args:
        method: without stored edits; it has none afterwards either.
        unedited: shared between methods on one base model, so that it is asked once; made with the same
            samples, and with `more` and `forced` as the plan needs them.
        journal: keeps each sample's records as soon as they are there, and has those of a stopped run.
        processes: others that ask a share of the samples each; all get the whole result.

    Raises:
        ValueError: no samples, edits in the method already, or facts that are edited twice.
    """
    plan = Plan() if plan is None else plan
    processes = Alone() if processes is None else processes
    if method.memory_bytes():
        raise ValueError(f"{method.name} holds edits already: call reset() first, or pass a fresh one.")
    forced = bool({"teacher_forced", "published"} & set(plan.scorings))
    unedited = unedited or Unedited(samples, plan.more, forced, plan.max_new_tokens)
    # A row of single edits is named by how many there are, one of a batch by how many are stored at once.
    count = len(samples) if plan.protocol == "single" else plan.stored(len(samples))
    key = (method.name, plan.protocol, count)
    known = {} if journal is None else journal.known(key)

    turn = {place: number % processes.count for number, place in enumerate(plan.places(len(samples)))}

    def mine(phase: str, place: int) -> bool:
        return (phase, place) not in known and turn[place] == processes.index

    found = []
    for unit in measure(method, samples, plan, unedited, mine, progress and processes.index == 0):
        if journal is not None:
            journal.write(key, unit)
        found.append(unit)
    units = [*known.values(), *processes.gather(found)]
    return results_of(units, method.name, plan, count)


def results_of(units: Sequence[Mapping], name: str, plan: Plan, count: int) -> list[SingleResult]:
    """The results of all samples' records, as `measure` yields them, in any order; `count` edits in all."""
    ordered = sorted(units, key=lambda unit: (unit["phase"], unit["sample"]))
    after = [unit for unit in ordered if unit["phase"] == "after"]
    end = [unit for unit in ordered if unit["phase"] == "end"]
    return [_result(after, end, name, plan, count, scoring) for scoring in plan.scorings]


def _result(
    after: list[Mapping], end: list[Mapping], name: str, plan: Plan, count: int, scoring: str
) -> SingleResult:
    field = _SCORE[scoring]
    more = (*(MORE_PROBED if plan.more else ()), *_kinds(after))
    scores = [_scores(unit, field) for unit in after]
    contains = [_scores(unit, "contains") for unit in after] if scoring == "free" else None
    kinder = None if contains is None else figures_of(contains, more)
    kinder_interval = None if contains is None else intervals(contains, more, plan.seed)
    last = None
    if end:
        late = [_scores(unit, field) for unit in end]
        metrics, stderr = summarise(late, more)
        last = {"metrics": metrics, "stderr": stderr, "interval": intervals(late, more, plan.seed)}
        shares = retention(scores, late)
        scores = [
            one if share is None else {**one, "retention": [share]}
            for one, share in zip(scores, shares, strict=True)
        ]
        more = (*more, "retention")
    metrics, stderr = summarise(scores, more)
    row = Row(
        name, len(after), metrics, stderr, scoring, plan.protocol, 1 if plan.protocol == "single" else count,
        interval=intervals(scores, more, plan.seed), contains=kinder, contains_interval=kinder_interval,
        end=last, costs=_costs(after) if plan.costs else None,
    )  # fmt: skip
    return SingleResult(row, _records(after, end))


def _scores(unit: Mapping, field: str) -> Scores:
    scores: dict[str, list[float]] = {}
    for probe in unit["probes"]:
        if probe[field] is not None:
            for name in _figures(probe):
                scores.setdefault(name, []).append(probe[field])
    return scores


def _figures(probe: Mapping) -> list[str]:
    """What a probe counts for: its metric, and the finer figure of its kind, such as "v_gen_artist"."""
    kind = probe.get("kind")
    return [probe["metric"], *([f"{probe['metric']}_{kind}"] if kind else [])]


def _kinds(units: Sequence[Mapping]) -> list[str]:
    """The finer figures that there are, in the order in which they were asked."""
    found = (name for unit in units for probe in unit["probes"] for name in _figures(probe)[1:])
    return list(dict.fromkeys(found))


def _costs(after: list[Mapping]) -> dict[str, float | None]:
    """Means over the facts that each was measured on."""
    found: dict[str, float | None] = {}
    for name in COSTS:
        values = [unit["costs"][name] for unit in after if name in unit["costs"]]
        if values or name != "training_seconds":  # most methods are not trained
            found[name] = sum(values) / len(values) if values else None
    return found


def _records(after: list[Mapping], end: list[Mapping]) -> list[dict]:
    phases = ("phase",) if end else ()
    return [
        {**{name: unit[name] for name in ("sample", *phases)}, **probe}
        for unit in (*after, *end)
        for probe in unit["probes"]
    ]
