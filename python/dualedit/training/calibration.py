"""Setting tau and alpha on training facts: one pass with the gate open tells what every setting would give.

A probe's answer is the edit's where the gate opens and the unedited model's where it does not. So each edit
is stored once, every probe is put once with the gate wide open, and its distance to the key is kept; the
figures of any threshold follow without asking again.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm.auto import tqdm

from ..data import EditSample
from ..editor import Editor
from ..evaluation.method import EditorMethod
from ..evaluation.metrics import PROBED, exact_match, figures_of
from ..evaluation.single import Asked, ask, ask_before, check_fresh
from ..tuners.adapter import active_adapter

CALIBRATION = "calibration.json"


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
    together: bool | int = False,
    progress: bool = True,
    before: Sequence[Sequence[Asked]] | None = None,
) -> Curve:
    """Store edits with the gate wide open, ask every probe, take them back.

    Args:
        editor: with no stored edits.
        samples: training facts; thresholds fitted on test facts would flatter.
        together: store all edits at once (each fact once), so that a probe meets its nearest edit, whosever
            it is, or so many at a time; else one edit at a time. A setting for one edit lets too much through
            with many.
        before: see `evaluation.evaluate_single`.

    Raises:
        ValueError: ``together`` is negative, the editor holds edits, or the edits change no answer at all.
    """
    check_fresh(editor, samples)
    before = ask_before(editor, samples, progress) if before is None else before
    numbers = range(len(samples))
    if together < 0:
        raise ValueError(f"together={together} is not a number of edits: pass True, False, or 1 and more.")
    size = len(samples) if together is True else max(1, int(together))
    points: list[Point] = []
    changed = False
    with tqdm(total=len(samples), desc="calibrating", unit="fact", disable=not progress) as bar:
        for first in range(0, len(samples), size or 1):
            found, other = _open_gate(editor, samples, numbers[first : first + size], before, bar)
            points += found
            changed |= other
    if not changed:
        raise ValueError(
            f"The edits of {len(samples)} facts change no answer, even with the gate wide open, so any "
            "threshold would do. DualEdit's adapters write nothing until they are trained: run dualedit "
            "train, and pass its folder as the adapter."
        )
    return Curve(tuple(points))


def _open_gate(
    editor: Editor,
    samples: Sequence[EditSample],
    stored: Sequence[int],
    before: Sequence[Sequence[Asked]],
    bar: tqdm,
) -> tuple[list[Point], bool]:
    """The points of some facts, and whether any answer differs from the unedited model's."""
    group = active_adapter(editor.model).group
    method = EditorMethod(editor, "calibrating")
    edited = {samples[i].fact: samples[i].request.target for i in stored if samples[i].fact is not None}
    points, changed = [], False
    try:
        for number in stored:
            method.edit(samples[number])
        group.first.radius.fill_(float("inf"))
        for number in stored:
            records = ask(method, samples[number], before[number], edited, explain=True)
            found = editor.explain_many([(each.probe.image, each.probe.prompt) for each in before[number]])
            for record, why in zip(records, found, strict=True):
                changed |= record["answer"] != record["before"]
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
    return points, changed


def objective(figures: dict[str, float | None]) -> float:
    """What calibration maximises: generality and hard locality, once easy locality is all but perfect.

    Of the facts' questions, the kinds that there are count; without hard ones, easy locality does so instead.

    Raises:
        ValueError: no question must change, or none must stay; any setting would do.
    """
    there = {name: value for name, value in figures.items() if value is not None}
    changes = [there[name] for name in ("t_gen", "v_gen") if name in there]
    changes = changes or [there[name] for name in ("rel",) if name in there]
    easy = [there[name] for name in ("t_loc", "m_loc") if name in there]
    stays = [there[name] for name in ("hard_image", "hard_question") if name in there] or easy
    if not changes or not stays:
        lacking = "changes" if not changes else "must stay as it is"
        raise ValueError(f"The facts ask nothing that {lacking}: add such questions to calibrate by.")
    wanted = changes + stays
    return sum(wanted) / len(wanted) - 10 * max(0.0, 99.8 - min(easy, default=100.0))


@dataclass(frozen=True)
class Sweep:
    """What every value of a setting would give, and the one that was chosen.

    Attributes:
        setting: "threshold" (tau) or "alpha".
        values: what was tried, from one end to the other.
        figures: percentages by metric, one mapping a value.
        scores: `objective` of each.
        chosen: the middle of the values that are as good as the best.
        chosen_figures: the percentages it gives.
    """

    setting: str
    values: tuple[float, ...]
    figures: tuple[dict[str, float | None], ...]
    scores: tuple[float, ...]
    chosen: float
    chosen_figures: dict[str, float | None]

    def to_dict(self) -> dict:
        """The sweep as JSON holds it."""
        return dataclasses.asdict(self)


def sweep_threshold(curve: Curve, steps: int = 200) -> Sweep:
    """Every cosine threshold tau from the edit itself to the farthest probe of a curve."""
    highest = max(point.distance for point in curve.points)
    radii = [highest * i / steps for i in range(steps + 1)]
    found = [curve.figures(lambda point, r=r: r) for r in radii]
    return _sweep("threshold", [1.0 - r for r in radii], found)


def sweep_alpha(curve: Curve, steps: int = 100, max_radius: float | None = None) -> Sweep:
    """Every alpha of a BalancEdit curve, from 0 (as far as the negative sample) to 1 (the positive one).

    Args:
        max_radius: as in `BalancEditConfig`.
    """
    most = math.inf if max_radius is None else max_radius

    def radius(point: Point, alpha: float) -> float:
        between = alpha * point.positive + (1 - alpha) * point.negative
        return min(between, point.negative * (1 - 1e-4), most)  # as an edit is stored

    alphas = [i / steps for i in range(steps + 1)]
    return _sweep("alpha", alphas, [curve.figures(lambda point, a=a: radius(point, a)) for a in alphas])


def _sweep(setting: str, values: list[float], figures: list[dict[str, float | None]]) -> Sweep:
    """The best settings often form a plateau; its middle is taken, not its edge."""
    scores = [objective(one) for one in figures]
    best = max(scores)
    good = [i for i, score in enumerate(scores) if score >= best - 0.25]
    chosen = good[len(good) // 2]
    return Sweep(setting, tuple(values), tuple(figures), tuple(scores), values[chosen], figures[chosen])


def sweep_reach(curve: Curve, alphas: int = 10, steps: int = 60) -> tuple[Sweep, float | None]:
    """The alpha and the largest radius of a BalancEdit curve that are best together.

    Returns:
        the sweep over alpha at the best largest radius, and that radius; None where a limit gains less than
        half a point.
    """
    farthest = max(point.distance for point in curve.points)
    free = sweep_alpha(curve, alphas)
    limits = [farthest * i / steps for i in range(1, steps + 1)]
    sweeps = [sweep_alpha(curve, alphas, limit) for limit in limits]
    scores = [max(sweep.scores) for sweep in sweeps]
    best = max(scores)
    if best < max(free.scores) + 0.5:
        return free, None
    good = [i for i, score in enumerate(scores) if score >= best - 0.25]
    middle = good[len(good) // 2]
    return sweeps[middle], limits[middle]


def calibrate_threshold(curve: Curve, steps: int = 200) -> tuple[float, dict[str, float | None]]:
    """The cosine threshold tau that is best for a curve, with its figures."""
    sweep = sweep_threshold(curve, steps)
    return sweep.chosen, sweep.chosen_figures


def calibrate_alpha(curve: Curve, steps: int = 100) -> tuple[float, dict[str, float | None]]:
    """The alpha that is best for a BalancEdit curve, with its figures."""
    sweep = sweep_alpha(curve, steps)
    return sweep.chosen, sweep.chosen_figures


def with_threshold(editor: Editor, threshold: float) -> None:
    """Set tau of the active DualEdit adapter to what calibration found; both are saved with it.

    Should `threshold` be changed later, `threshold="calibrated"` brings this one back.
    """
    config = active_adapter(editor.model).config
    checked = dataclasses.replace(config, threshold=threshold)  # checked like any other
    config.threshold = config.calibrated_threshold = checked.threshold


def with_alpha(editor: Editor, alpha: float, max_radius: float | None = None) -> None:
    """Set alpha and the largest radius of the active BalancEdit adapter; edits stored from now on get their
    radius by them."""
    config = active_adapter(editor.model).config
    checked = dataclasses.replace(config, alpha=alpha, max_radius=max_radius)  # checked like any other
    config.alpha, config.max_radius = checked.alpha, checked.max_radius


def save_calibration(folder: str | os.PathLike[str], sweep: Sweep, curve: Curve) -> Path:
    """Write what a calibration measured beside the adapter: "calibration.json" in its folder.

    Args:
        folder: where `save_edits` puts the adapter; made if it is not there. An older file is replaced whole.

    Returns:
        the file: {"version", "sweep" (see `Sweep`), "points" (see `Point`, null for NaN)}.
    """
    points = [
        {
            name: None if isinstance(value, float) and math.isnan(value) else value
            for name, value in dataclasses.asdict(point).items()
        }
        for point in curve.points
    ]
    file = Path(folder) / CALIBRATION
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{file.name}.part")
    text = json.dumps({"version": 1, "sweep": sweep.to_dict(), "points": points}, allow_nan=False)
    part.write_text(text + "\n", encoding="utf-8")
    os.replace(part, file)
    return file


def load_calibration(folder: str | os.PathLike[str]) -> tuple[Sweep, Curve]:
    """What `save_calibration` wrote.

    Raises:
        ValueError: no such file in the folder, or one that is damaged.
    """
    file = Path(folder) / CALIBRATION
    if not file.is_file():
        raise ValueError(f"folder={os.fspath(folder)!r} holds no {CALIBRATION}: calibrate the adapter first.")
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        sweep = {
            name: tuple(value) if isinstance(value, list) else value for name, value in found["sweep"].items()
        }
        points = [
            Point(**{name: math.nan if value is None else value for name, value in point.items()})
            for point in found["points"]
        ]
        return Sweep(**sweep), Curve(tuple(points))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is damaged ({error}): calibrate the adapter again.") from error


def plot_calibration(sweep: Sweep, file: str | os.PathLike[str]) -> Path:
    """Draw each figure against the setting, with the chosen value, as a PNG.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plot_calibration draws with matplotlib: pip install matplotlib.") from error
    # Figure and canvas by hand: pyplot would keep state and look for a screen.
    drawing = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    FigureCanvasAgg(drawing)
    axes = drawing.add_subplot()
    for name in PROBED:
        line = [figures.get(name) for figures in sweep.figures]
        if None not in line:
            changes = name in ("rel", "t_gen", "v_gen")
            axes.plot(sweep.values, line, label=name, linestyle="-" if changes else "--")
    axes.axvline(sweep.chosen, color="black", linewidth=1, label=f"chosen: {sweep.chosen:.3f}", linestyle=":")
    axes.set_xlabel({"threshold": "tau: cosine similarity that opens the gate"}.get(sweep.setting, "alpha"))
    axes.set_ylabel("% right on training facts")
    axes.set_ylim(-2, 102)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower left", ncols=2, title="dashed: must stay as before")
    drawing.savefig(Path(file), format="png")
    return Path(file)
