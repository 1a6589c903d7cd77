"""The figures of the field, from lists of scores: right or wrong, or shares of right tokens."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

PROBED = ("rel", "t_gen", "v_gen", "t_loc", "m_loc", "hard_image", "hard_question")
METRICS = (*PROBED, "hm", "avg")
MORE_PROBED = ("no_image", "same_image", "portability")
# Figures of one kind of a metric's probes, where a benchmark tells kinds apart (`Probe.kind`).
BY_KIND = (
    "v_gen_view", "v_gen_artist", "hard_image_random", "hard_image_nearest", "hard_image_same_artist",
    "portability_in_words",
)  # fmt: skip
_HM = ("t_gen", "v_gen", "hard_image")
_AVG = ("rel", "t_gen", "v_gen", "t_loc", "m_loc")

Scores = Mapping[str, Sequence[float]]


def normalise(answer: str) -> str:
    """Lower case, single spaces, no space or full stop at the ends: what exact match compares."""
    return re.sub(r"\s+", " ", answer.lower()).strip().rstrip(".").strip()


def exact_match(answer: str, expected: str) -> bool:
    """Whether two answers are the same text after `normalise`."""
    return normalise(answer) == normalise(expected)


def contains_match(answer: str, expected: str) -> bool:
    """Whether the expected answer stands somewhere in the answer, in whole words, after `normalise`.

    Kinder than `exact_match` to models that answer in sentences, and to those that hedge.
    """
    wanted = normalise(expected)
    if not wanted:
        return exact_match(answer, expected)
    return re.search(rf"(?<!\w){re.escape(wanted)}(?!\w)", normalise(answer)) is not None


@dataclass(frozen=True)
class Row:
    """One line of a results table.

    Attributes:
        method: the editor's name.
        n: number of edited facts whose questions were asked.
        metrics, stderr: percentages by the names of `METRICS` (and of what else was asked); a metric nobody
            asked for is None.
        scoring: "free" generation with exact match; "teacher_forced" token accuracy with a gate that reads
            the question; "published" token accuracy with a gate that sees the answer.
        protocol: "single" (one edit at a time), "batch" or "sequential".
        edits: how many edits were stored at once.
        interval: 95% intervals [low, high] of `metrics`, see `intervals`.
        contains, contains_interval: the figures with `contains_match` in place of `exact_match` (free
            generation), and their intervals.
        end: of the sequential protocol, the figures asked again after the last edit: "metrics", "stderr",
            "interval".
        costs: "training_seconds" (before the first edit, where a method says so), "edit_seconds" (an edit),
            "edit_bytes" (what a stored edit occupies), "answer_seconds" (one question asked alone),
            "answer_seconds_unedited". They differ from run to run.
    """

    method: str
    n: int
    metrics: Mapping[str, float | None]
    stderr: Mapping[str, float | None]
    scoring: str = "free"
    protocol: str = "single"
    edits: int = 1
    interval: Mapping[str, Sequence[float] | None] | None = None
    contains: Mapping[str, float | None] | None = None
    contains_interval: Mapping[str, Sequence[float] | None] | None = None
    end: Mapping[str, Mapping] | None = None
    costs: Mapping[str, float | None] | None = None

    @property
    def sees_answer(self) -> bool:
        """Whether the gate was shown the answer: such figures say nothing about generation."""
        return self.scoring == "published"

    def to_dict(self) -> dict:
        """The row as JSON holds it; what was not measured is left out."""
        row = {
            "method": self.method, "scoring": self.scoring, "protocol": self.protocol, "edits": self.edits,
            "n": self.n, "metrics": dict(self.metrics), "stderr": dict(self.stderr),
        }  # fmt: skip
        if self.sees_answer:
            row["sees_answer"] = True
        for name in ("interval", "contains", "contains_interval", "end", "costs"):
            if getattr(self, name) is not None:
                row[name] = dict(getattr(self, name))
        return row


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


def figures_of(samples: Sequence[Scores], more: Sequence[str] = ()) -> dict[str, float | None]:
    """The percentages of `summarise`, without standard errors."""
    means = {}
    for name in (*PROBED, *more):
        # Mean over a sample's probes, then over samples: a fact with many probes counts no more than another.
        per_sample = [_mean([float(x) for x in sample[name]]) for sample in samples if sample.get(name)]
        mean = _mean([x for x in per_sample if x is not None])
        means[name] = None if mean is None else 100 * mean
    return _combined(means)


def summarise(samples: Sequence[Scores], more: Sequence[str] = ()) -> tuple[dict, dict]:
    """Percentages and standard errors over samples.

    Args:
        samples: for each edited fact, metric name to scores in [0, 1] (right or wrong, or a share of right
            tokens), one entry a probe.
        more: further metrics beside those of `METRICS`.

    Returns:
        metrics and stderr by the names of `METRICS` and `more`. "hm" is the harmonic mean of t_gen, v_gen and
        hard_image (BalancEdit's HM, its locality being the look-alike), "avg" the mean of rel, t_gen, v_gen,
        t_loc and m_loc (DualEdit's Avg). Standard errors by the jackknife over samples, which the two means
        need.
    """
    metrics = figures_of(samples, more)
    n = len(samples)
    errors: dict[str, float | None] = dict.fromkeys(metrics)
    if n < 2:
        return metrics, errors
    names = (*PROBED, *more)
    left_out = _weighted(_per_sample(samples, names), 1.0 - np.eye(n), names)
    for name, values in left_out.items():
        if not np.isnan(values).any():
            errors[name] = float(np.sqrt((n - 1) / n * np.square(values - values.mean()).sum()))
    return metrics, errors


def intervals(
    samples: Sequence[Scores], more: Sequence[str] = (), seed: int = 0, resamples: int = 1000
) -> dict[str, list[float] | None]:
    """95% intervals [low, high] of the figures of `summarise`.

    Proportions have Wilson's score interval (`wilson`), so that 100 of 100 is not certain. Probes of one fact
    stand or fall together, so what counts is facts: a figure is worth as many independent answers as its
    variance between facts says, at least the number of facts and at most the number of probes. "hm" and
    "avg", which are no proportions, have bootstrap percentiles over facts; where every fact is right these
    would be a point, and they have Wilson's interval of that many facts.

    Args:
        samples, more: as in `summarise`.
        seed: the same one draws the same facts for every method.

    Returns:
        [low, high] in per cent by name; None for a figure that nobody asked for, or fewer than two facts.
    """
    names = (*PROBED, *more)
    figures = figures_of(samples, more)
    n = len(samples)
    if n < 2:
        return dict.fromkeys(figures)
    table = _per_sample(samples, names)
    drawn = _weighted(table, _draws(n, seed, resamples), names)
    found: dict[str, list[float] | None] = {}
    for name, value in figures.items():
        if value is None:
            found[name] = None
        elif name in names:
            probes = sum(len(sample.get(name) or ()) for sample in samples)
            found[name] = wilson(value, _worth(table[:, names.index(name)], probes))
        else:
            pair = _percentiles(drawn[name])
            found[name] = pair if pair[0] < pair[1] else wilson(value, n)
    return found


def wilson(percent: float, count: float, z: float = 1.959964) -> list[float]:
    """Wilson's score interval [low, high] of a proportion, in per cent.

    Args:
        percent: the proportion in per cent.
        count: independent answers behind it, more than 0.
        z: deviations of a normal distribution; the default gives 95 %.

    Source: E. B. Wilson, Probable inference, the law of succession, and statistical inference, 1927.
    """
    share = min(max(percent / 100, 0.0), 1.0)
    scale = 1 + z * z / count
    middle = share + z * z / (2 * count)
    spread = z * (share * (1 - share) / count + z * z / (4 * count * count)) ** 0.5
    low, high = (middle - spread) / scale, (middle + spread) / scale
    return [100 * min(max(low, 0.0), share), 100 * max(min(high, 1.0), share)]


def _worth(means: np.ndarray, probes: int) -> float:
    """How many independent answers a mean over facts is worth, from the facts' own means (NaN: not asked)."""
    means = means[~np.isnan(means)]
    share, facts = float(means.mean()), len(means)
    variance = float(means.var(ddof=1)) / facts if facts > 1 else 0.0
    if variance <= 0 or not 0 < share < 1:
        return facts
    return min(max(share * (1 - share) / variance, facts), max(probes, facts))


def difference(
    first: Sequence[Scores], second: Sequence[Scores], metric: str, seed: int = 0, resamples: int = 1000
) -> tuple[float, list[float]]:
    """How much better `first` is than `second` on one metric, in points, with its paired 95% interval.

    Args:
        first, second: the scores of two methods on the same facts, in the same order, at least two.
        metric: a name of `METRICS` or `MORE_PROBED` that both have.

    Raises:
        ValueError: different numbers of facts, fewer than two, or a metric that one of them lacks.
    """
    if len(first) != len(second) or len(first) < 2:
        raise ValueError(f"first has {len(first)} facts, second {len(second)}: pass the same two or more.")
    more = () if metric in METRICS else (metric,)
    whole = [figures_of(scores, more)[metric] for scores in (first, second)]
    if None in whole:
        raise ValueError(f"metric={metric!r} was not measured for both.")
    names, draws = (*PROBED, *more), _draws(len(first), seed, resamples)
    one, other = (_weighted(_per_sample(scores, names), draws, names)[metric] for scores in (first, second))
    return whole[0] - whole[1], _percentiles(one - other)


def retention(after: Sequence[Scores], end: Sequence[Scores]) -> list[float | None]:
    """How much of what an edit taught is still there at the end, a share in [0, 1] for each fact.

    Of a fact's probes of rel, t_gen and v_gen: the sum of min(score right after the edit, score at the end)
    over the sum of the scores right after it; for right and wrong answers, the share of the right ones that
    are still right. None for a fact of which nothing was right: it has nothing to lose.
    """
    shares: list[float | None] = []
    for early, late in zip(after, end, strict=True):
        pairs = [
            (float(a), float(b))
            for name in ("rel", "t_gen", "v_gen")
            for a, b in zip(early.get(name, ()), late.get(name, ()), strict=True)
        ]
        learned = sum(a for a, _ in pairs)
        shares.append(sum(min(a, b) for a, b in pairs) / learned if learned > 0 else None)
    return shares


def _draws(n: int, seed: int, resamples: int) -> np.ndarray:
    """How often each of n facts is in each redrawn set: [resamples, n]."""
    return np.random.default_rng([seed, n]).multinomial(n, np.full(n, 1 / n), size=resamples).astype(float)


def _percentiles(values: np.ndarray) -> list[float]:
    return [float(x) for x in np.nanpercentile(values, [2.5, 97.5])]


def _per_sample(samples: Sequence[Scores], names: Sequence[str]) -> np.ndarray:
    """Mean of each sample's probes by metric, [samples, names], NaN where there are none."""
    table = np.full((len(samples), len(names)), np.nan)
    for i, sample in enumerate(samples):
        for j, name in enumerate(names):
            if sample.get(name):
                table[i, j] = np.mean([float(x) for x in sample[name]])
    return table


def _weighted(table: np.ndarray, weights: np.ndarray, names: Sequence[str]) -> dict[str, np.ndarray]:
    """The figures [sets] of reweighted samples: table [samples, names], weights [sets, samples]."""
    there = ~np.isnan(table)
    with np.errstate(invalid="ignore", divide="ignore"):
        means = 100 * (weights @ np.where(there, table, 0.0)) / (weights @ there.astype(float))
        found = dict(zip(names, means.T, strict=True))
        parts = np.stack([found[name] for name in _HM])
        harmonic = len(_HM) / (1 / parts).sum(axis=0)  # a zero makes this zero, as it should
    found["hm"] = np.where(np.isnan(parts).any(axis=0), np.nan, harmonic)
    found["avg"] = np.mean([found[name] for name in _AVG], axis=0)
    return found
