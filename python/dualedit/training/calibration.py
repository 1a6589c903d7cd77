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
from ..evaluation.metrics import exact_match, figures_of
from ..evaluation.single import Asked, ask_before
from ..model import active_group


@dataclass(frozen=True)
class Point:
    """One probe of one edit: what it would be worth with the gate open and with it closed.

    Attributes:
        sample, metric: whose probe it is.
        distance: from the probe to the edit's key.
        open, closed: whether its answer is right with the gate open, and with it closed.
        positive, negative: distances of the edit's own samples (BalancEdit), or NaN.
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
    progress: bool = True,
    before: Sequence[Sequence[Asked]] | None = None,
) -> Curve:
    """Store each sample's edit with its gate wide open, ask every probe, take it back.

    Args:
        editor: with no stored edits.
        samples: training facts; thresholds fitted on test facts would flatter.
        before: see `evaluation.evaluate_single`.
    """
    before = ask_before(editor, samples, progress) if before is None else before
    _, _, group = active_group(editor.model)
    points: list[Point] = []
    for number, sample in enumerate(tqdm(samples, desc="calibrating", unit="fact", disable=not progress)):
        request = sample.request
        edit = editor.edit(
            request.image, request.prompt, request.target, rephrases=sample.rephrases[:1] or None
        )
        try:
            record = group.first.record(edit.id)
            group.first.radius.fill_(float("inf"))
            questions = [(a.probe.image, a.probe.prompt) for a in before[number]]
            answers, found = editor.answer_many(questions), editor.explain_many(questions)
        finally:
            editor.remove(edit.id)
        for asked, answer, why in zip(before[number], answers, found, strict=True):
            kept = asked.metric in sample.locality
            expected = asked.before if kept else request.target
            points.append(
                Point(
                    number, asked.metric, why.distance, exact_match(answer, expected),
                    exact_match(asked.before, expected),
                    record.get("d_positive", float("nan")), record.get("d_negative", float("nan")),
                )
            )  # fmt: skip
    return Curve(tuple(points))


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
