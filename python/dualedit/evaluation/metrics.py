"""The figures of the field, from lists of right and wrong answers."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

PROBED = ("rel", "t_gen", "v_gen", "t_loc", "m_loc", "hard_image", "hard_question")
METRICS = (*PROBED, "hm", "avg")
_HM = ("t_gen", "v_gen", "hard_image")
_AVG = ("rel", "t_gen", "v_gen", "t_loc", "m_loc")


def normalise(answer: str) -> str:
    """Lower case, single spaces, no space or full stop at the ends: what exact match compares."""
    return re.sub(r"\s+", " ", answer.lower()).strip().rstrip(".").strip()


def exact_match(answer: str, expected: str) -> bool:
    """Whether two answers are the same text after `normalise`."""
    return normalise(answer) == normalise(expected)


@dataclass(frozen=True)
class Row:
    """One line of a results table.

    Attributes:
        method: the editor's name.
        n: number of edited facts.
        metrics, stderr: percentages by the names of `METRICS`; a metric nobody asked for is None.
        scoring: "free" generation with exact match, "teacher_forced", or "published" (sees the answer).
        protocol: "single" (one edit at a time), "batch" or "sequential".
        edits: how many edits were stored at once.
    """

    method: str
    n: int
    metrics: Mapping[str, float | None]
    stderr: Mapping[str, float | None]
    scoring: str = "free"
    protocol: str = "single"
    edits: int = 1

    def to_dict(self) -> dict:
        """The row as JSON holds it."""
        return {
            "method": self.method, "scoring": self.scoring, "protocol": self.protocol, "edits": self.edits,
            "n": self.n, "metrics": dict(self.metrics), "stderr": dict(self.stderr),
        }  # fmt: skip


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _harmonic(values: Sequence[float | None]) -> float | None:
    if any(value is None for value in values):
        return None
    return 0.0 if min(values) <= 0 else len(values) / sum(1 / value for value in values)


def _combined(metrics: Mapping[str, float | None]) -> dict[str, float | None]:
    parts = [metrics[name] for name in _AVG]
    avg = None if any(part is None for part in parts) else _mean(parts)
    return {**metrics, "hm": _harmonic([metrics[name] for name in _HM]), "avg": avg}


def figures_of(samples: Sequence[Mapping[str, Sequence[bool]]]) -> dict[str, float | None]:
    """The percentages of `summarise`, without standard errors."""
    means = {}
    for name in PROBED:
        # Mean over a sample's probes, then over samples: a fact with many probes counts no more than another.
        per_sample = [_mean([float(x) for x in sample[name]]) for sample in samples if sample.get(name)]
        mean = _mean([x for x in per_sample if x is not None])
        means[name] = None if mean is None else 100 * mean
    return _combined(means)


def summarise(samples: Sequence[Mapping[str, Sequence[bool]]]) -> tuple[dict, dict]:
    """Percentages and standard errors over samples.

    Args:
        samples: for each edited fact, metric name to right or wrong, one entry a probe.

    Returns:
        metrics and stderr by the names of `METRICS`. "hm" is the harmonic mean of t_gen, v_gen and
        hard_image (BalancEdit's HM, its locality being the look-alike), "avg" the mean of rel, t_gen, v_gen,
        t_loc and m_loc (DualEdit's Avg). Standard errors by the jackknife over samples, which the two means
        need.
    """
    metrics = figures_of(samples)
    n = len(samples)
    errors: dict[str, float | None] = dict.fromkeys(METRICS)
    if n < 2:
        return metrics, errors
    left_out = [figures_of([*samples[:i], *samples[i + 1 :]]) for i in range(n)]
    for name in METRICS:
        values = [figures[name] for figures in left_out]
        if None not in values:
            centre = _mean(values)
            errors[name] = math.sqrt((n - 1) / n * sum((value - centre) ** 2 for value in values))
    return metrics, errors
