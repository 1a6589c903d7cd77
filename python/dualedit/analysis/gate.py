"""What a gate did with the questions it was asked, and why an answer is wrong."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..evaluation.asking import CHANGES
from .settings import score_of

# The edited question itself lies at distance zero and is left out; so is what only follows from an edit.
GROUPS = {
    "related": ("t_gen", "v_gen"),
    "hard": ("hard_image", "hard_question", "same_image", "no_image"),
    "unrelated": ("t_loc", "m_loc"),
}
GROUP_TITLES = {
    "related": "related: other words or picture",
    "hard": "hard: look-alikes, other questions",
    "unrelated": "unrelated: other things, text only",
}
CAUSES = {
    "missed": "no edit fired, and one should have",
    "other": "another edit fired",
    "answer": "the right edit fired, the answer is not the wanted one",
    "caught": "an edit fired that should not have",
    "changed": "the answer changed, and no edit fired",
    "not learned": "the new answer did not come",
    "spilled": "an answer changed that should not have",
}


@dataclass(frozen=True)
class Reach:
    """Distances of questions to the nearest edit, and how far edits reach.

    Attributes:
        threshold: the radius that all edits share, or None where each has its own.
        ratios: by a name of `GROUPS`, distance / radius of each question; at most 1 fires.
        fired: by a name of `GROUPS`, for how many of them an edit fired.
    """

    threshold: float | None
    ratios: Mapping[str, Sequence[float]]
    fired: Mapping[str, int]


def must_change(probe: Mapping) -> bool:
    """Whether an edit has to answer: of what was edited, or of a look-alike that was edited as well."""
    return probe["metric"] in CHANGES or probe["expected"] != probe["before"]


def is_wrong(probe: Mapping) -> bool:
    """Whether the answer is not (wholly) what is wanted."""
    score = score_of(probe)
    return score is not None and score < 1


def has_gate(units: Sequence[Mapping]) -> bool:
    """Whether it is known which edits fired."""
    return any(probe["fired"] is not None for unit in units for probe in unit["probes"])


def reach_of(units: Sequence[Mapping]) -> Reach | None:
    """The distances of a method's questions; None where there is no gate, or it was not recorded."""
    ratios: dict[str, list[float]] = {name: [] for name in GROUPS}
    fired = dict.fromkeys(GROUPS, 0)
    radii: list[float] = []
    for unit in units:
        for probe in unit["probes"]:
            group = _group(probe)
            if group is None or probe["distance"] is None or probe["radius"] is None:
                continue
            ratios[group].append(_ratio(probe["distance"], probe["radius"]))
            fired[group] += bool(probe["fired"])
            radii.append(probe["radius"])
    if not radii:
        return None
    low, high = min(radii), max(radii)
    shared = math.isfinite(high) and high - low <= 1e-6 * abs(high)
    return Reach(high if shared else None, ratios, fired)


def _group(probe: Mapping) -> str | None:
    name = next((group for group, metrics in GROUPS.items() if probe["metric"] in metrics), None)
    return "related" if name is not None and must_change(probe) else name


def _ratio(distance: float, radius: float) -> float:
    if not math.isfinite(distance):
        return math.inf
    if radius <= 0:
        return 0.0 if distance <= radius else math.inf
    return 0.0 if math.isinf(radius) else max(0.0, distance / radius)


def cause_of(probe: Mapping, unit: Mapping, request: str | None) -> str:
    """Why an answer is wrong: a name of `CAUSES`.

    Args:
        probe: a wrong one.
        unit: the sample that it is of.
        request: the edited question, to tell the sample's own edit from others; None if it is not known.
    """
    wanted = must_change(probe)
    if probe["fired"] is None:
        return "not learned" if wanted else "spilled"
    if not wanted:
        return "caught" if probe["fired"] else "changed"
    if not probe["fired"]:
        return "missed"
    own = probe["metric"] in CHANGES
    right = unit["target"] if own else probe["expected"]
    asked = probe["edit_prompt"]
    same = not own or asked is None or request is None or asked == request
    return "answer" if probe["edit"] == right and same else "other"


def request_of(unit: Mapping) -> str | None:
    """The edited question of a sample."""
    return next((probe["prompt"] for probe in unit["probes"] if probe["metric"] == "rel"), None)


def wrong_share(unit: Mapping) -> float:
    """How much of what was asked about a sample is not as wanted, in [0, 1]."""
    scores = [score for probe in unit["probes"] if (score := score_of(probe)) is not None]
    return sum(1 - score for score in scores) / len(scores) if scores else 0.0


def worst_first(units: Sequence[Mapping]) -> list[Mapping]:
    """Samples with the most wrong answers first; those of equal worth stay in their order."""
    return sorted(units, key=lambda unit: -wrong_share(unit))


def by_family(units: Sequence[Mapping]) -> dict[str, dict[str, tuple[float, float | None]]]:
    """Figures of each family of facts: "new answer" and "as before" to per cent and its standard error.

    A mean over facts of the mean over a fact's questions; None is the error of a single fact.
    """
    shares: dict[str, dict[str, list[float]]] = {}
    for unit in units:
        parts: dict[str, list[float]] = {"new answer": [], "as before": []}
        for probe in unit["probes"]:
            score = score_of(probe)
            if score is not None:
                parts["new answer" if probe["metric"] in CHANGES else "as before"].append(score)
        family = shares.setdefault(unit["family"], {"new answer": [], "as before": []})
        for name, scores in parts.items():
            if scores:
                family[name].append(100 * sum(scores) / len(scores))
    return {
        family: {name: _mean(values) for name, values in parts.items() if values}
        for family, parts in shares.items()
    }


def _mean(values: Sequence[float]) -> tuple[float, float | None]:
    mean, n = sum(values) / len(values), len(values)
    if n < 2:
        return mean, None
    return mean, math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1) / n)
