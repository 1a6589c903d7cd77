"""Setting tau and alpha on training facts: one pass with the gate open tells what every setting would give.

A probe's answer is the edit's where the gate opens and the unedited model's where it does not. So each edit
is stored once, every probe is asked once with the gate wide open, and its distance to the key is kept; the
figures of any threshold follow without asking again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from tqdm.auto import tqdm

from ..data import EditSample
from ..editor import Editor
from ..evaluation.method import EditorMethod
from ..evaluation.metrics import exact_match, figures_of
from ..evaluation.single import Asked, ask, ask_before, check_fresh
from ..model import active_group


@dataclass(frozen=True)
class Point:
    """One probe of one edit: what it would be worth with the gate open and with it closed.

    Attributes:
        sample, metric: whose probe it is.
        distance: from the probe to the nearest edit's key.
        open, closed: whether its answer is right with the gate open, and with it closed.
        positive, negative: distances of the nearest edit's own samples (BalancEdit), or NaN.
    """

    sample: int
    metric: str
    distance: float
    open: bool
    closed: bool
    positive: float
    negative: float


@dataclass(frozen=True)
class Curve:
    """Every probe of a set of edits, from which the figures of any threshold follow."""

    points: tuple[Point, ...]

    def figures(self, radius) -> dict[str, float | None]:
        """Percentages by metric when the gate opens at `distance <= radius(point)`."""
        samples: dict[int, dict[str, list[bool]]] = {}
        for point in self.points:
            right = point.open if point.distance <= radius(point) else point.closed
            samples.setdefault(point.sample, {}).setdefault(point.metric, []).append(right)
        return figures_of(list(samples.values()))


def measure_curve(
    editor: Editor,
    samples: Sequence[EditSample],
    together: bool = False,
    progress: bool = True,
    before: Sequence[Sequence[Asked]] | None = None,
) -> Curve:
    """Store edits with the gate wide open, ask every probe, take them back.

    Args:
        editor: with no stored edits.
        samples: training facts; thresholds fitted on test facts would flatter.
        together: store all edits at once (each fact once), so that a probe meets its nearest edit, whosever
            it is; else one edit at a time. A setting for one edit lets too much through with many.
        before: see `evaluation.evaluate_single`.
    """
    check_fresh(editor, samples)
    before = ask_before(editor, samples, progress) if before is None else before
    numbers = range(len(samples))
    points: list[Point] = []
    with tqdm(total=len(samples), desc="calibrating", unit="fact", disable=not progress) as bar:
        for stored in [list(numbers)] if together else [[number] for number in numbers]:
            points += _open_gate(editor, samples, stored, before, bar)
    return Curve(tuple(points))


def _open_gate(
    editor: Editor,
    samples: Sequence[EditSample],
    stored: list[int],
    before: Sequence[Sequence[Asked]],
    bar: tqdm,
) -> list[Point]:
    _, _, group = active_group(editor.model)
    method = EditorMethod(editor, "calibrating")
    edited = {samples[i].fact: samples[i].request.target for i in stored if samples[i].fact is not None}
    points = []
    try:
        for number in stored:
            method.edit(samples[number])
        group.first.radius.fill_(float("inf"))
        for number in stored:
            sample, asked = samples[number], before[number]
            records = ask(method, sample, asked, edited, explain=True)
            found = editor.explain_many([(a.probe.image, a.probe.prompt) for a in asked])
            for record, why in zip(records, found, strict=True):
                note = group.first.record(why.edit.id)
                points.append(
                    Point(
                        number, record["metric"], record["distance"], record["correct"],
                        exact_match(record["before"], record["expected"]),
                        note.get("d_positive", float("nan")), note.get("d_negative", float("nan")),
                    )
                )  # fmt: skip
            bar.update()
    finally:
        method.reset()
    return points


def objective(figures: dict[str, float | None]) -> float:
    """What calibration maximises: generality and hard locality, once easy locality is all but perfect."""
    wanted = ("t_gen", "v_gen", "hard_image", "hard_question")
    easy = min(figures[name] for name in ("t_loc", "m_loc") if figures.get(name) is not None)
    return sum(figures[name] or 0.0 for name in wanted) / len(wanted) - 10 * max(0.0, 99.8 - easy)


def calibrate_threshold(curve: Curve, steps: int = 200) -> tuple[float, dict[str, float | None]]:
    """The cosine threshold tau that is best for a curve, with its figures.

    The best settings often form a plateau; its middle is taken, not its edge.
    """
    highest = max(point.distance for point in curve.points)
    grid = [highest * i / steps for i in range(steps + 1)]
    scores = [objective(curve.figures(lambda point, r=r: r)) for r in grid]
    radius = _middle_of_best(grid, scores)
    return 1.0 - radius, curve.figures(lambda point: radius)


def calibrate_alpha(curve: Curve, steps: int = 100) -> tuple[float, dict[str, float | None]]:
    """The alpha that is best for a BalancEdit curve, with its figures."""
    grid = [i / steps for i in range(steps + 1)]

    def radius(point: Point, alpha: float) -> float:
        r = alpha * point.positive + (1 - alpha) * point.negative
        return min(r, point.negative * (1 - 1e-4)) if point.positive >= point.negative else r

    scores = [objective(curve.figures(lambda point, a=a: radius(point, a))) for a in grid]
    alpha = _middle_of_best(grid, scores)
    return alpha, curve.figures(lambda point: radius(point, alpha))


def _middle_of_best(grid: Sequence[float], scores: Sequence[float]) -> float:
    best = max(scores)
    good = [value for value, score in zip(grid, scores, strict=True) if score >= best - 0.25]
    return good[len(good) // 2]


def with_threshold(editor: Editor, threshold: float) -> None:
    """Set tau of the active DualEdit adapter; it is saved with it."""
    _, config, _ = active_group(editor.model)
    config.threshold = dataclasses.replace(config, threshold=threshold).threshold  # checked like any other
