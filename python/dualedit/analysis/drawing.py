"""Small drawings as inline SVG in the page's own colours; words are 12 units high in a width of 310."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

from .gate import GROUP_TITLES, GROUPS, Reach
from .wording import near

WIDTH = 310
_BINS = 8  # to a radius
_MOST = 5  # radii drawn; what lies farther away stands at the edge
_BAND, _TOP = 74, 22  # of a group in a histogram; of the words above its bars
_LEFT, _BESIDE = 86, 42  # words and figures at the sides of bars


def distances_drawing(reach: Reach, name: str) -> str:
    """Histograms of the distances to the nearest edit, one above the other, with the radius as a line.

    Args:
        name: of the method, for readers who hear the page.
    """
    radii = _radii(reach)
    bins = radii * _BINS
    step = (WIDTH - 2) / (bins + 1)  # the last one is for all that lies farther away
    shown = [group for group in GROUPS if reach.ratios[group]]
    line = 1 + _BINS * step
    parts, told, beyond = [], [], False
    for number, group in enumerate(shown):
        ratios, top = reach.ratios[group], _BAND * number
        counts = _counts(ratios, bins)
        beyond = beyond or counts[-1] > 0
        share = f"{100 * reach.fired[group] / len(ratios):.0f}% of {len(ratios)} fire"
        base = top + _BAND - 4
        parts.append(
            f'<text x="1" y="{top + 14}">{GROUP_TITLES[group]}</text>'
            f'<text x="{WIDTH - 1}" y="{top + 14}" class=end>{share}</text>'
            f"{_bars(counts, group, base, step)}"
            f'<line class=radius x1="{line:.1f}" x2="{line:.1f}" y1="{top + _TOP}" y2="{base + 3}"/>'
        )
        told.append(f"{GROUP_TITLES[group]}, {share}")
    foot = _BAND * len(shown) + 13
    parts.append(_scale(reach.threshold, radii, foot, line, 1 + bins * step, beyond))
    label = f"{name}: distances to the nearest edit. {'; '.join(told)}."
    return _svg(foot + (19 if beyond else 5), label, "".join(parts))


def _scale(threshold: float | None, radii: int, foot: float, line: float, end: float, beyond: bool) -> str:
    """What the places along the bottom mean."""
    at = "its edit's radius" if threshold is None else f"radius {near(threshold)}"
    far = f"{radii}×" if threshold is None else near(radii * threshold)
    words = f'<text x="{WIDTH - 1}" y="{foot + 14}" class="end soft">farther ↑</text>' if beyond else ""
    return (
        f'<text x="1" y="{foot}">0</text><text x="{line:.1f}" y="{foot}" class=middle>{at}</text>'
        f'<text x="{end:.1f}" y="{foot}" class=end>{far}</text>{words}'
    )


def _radii(reach: Reach) -> int:
    """How many radii wide a drawing is, at least two."""
    finite = [ratio for ratios in reach.ratios.values() for ratio in ratios if math.isfinite(ratio)]
    return min(max(math.ceil(max(finite, default=0)), 2), _MOST)


def _counts(ratios: Sequence[float], bins: int) -> list[int]:
    """How many lie in each bin, its upper end included, so that what fires is left of the line."""
    counts = [0] * (bins + 1)
    for ratio in ratios:
        place = bins if math.isinf(ratio) else max(0, math.ceil(ratio * _BINS - 1e-9) - 1)
        counts[min(place, bins)] += 1
    return counts


def _bars(counts: Sequence[int], group: str, base: float, step: float) -> str:
    room = _BAND - _TOP - 8
    most = max(counts)
    bars = [f'<line class=ground x1="1" x2="{WIDTH - 1}" y1="{base}" y2="{base}"/>']
    for place, count in enumerate(counts):
        if count:
            high = max(1.5, room * count / most)
            bars.append(
                f'<rect class={group} x="{1 + place * step + 0.5:.1f}" y="{base - high:.1f}" '
                f'width="{step - 1:.1f}" height="{high:.1f}"/>'
            )
    return "".join(bars)


def families_drawing(
    family: str, figures: Mapping[str, Mapping[str, tuple[float, float | None]]], names: Mapping[str, str]
) -> str:
    """Two bars for each method: right answers among those that must change, and among those that must stay.

    Args:
        family: for readers who hear the page.
        figures: method to "new answer" and "as before", to per cent and standard error.
        names: method to what it is called.
    """
    parts, told = [], []
    room = WIDTH - _LEFT - _BESIDE
    for number, (method, values) in enumerate(figures.items()):
        top = 4 + 36 * number
        name = f"{escape(_short(names[method]))}<title>{escape(names[method])}</title>"
        parts.append(f'<text x="1" y="{top + 18}">{name}</text>')
        for line, (kind, style) in enumerate((("new answer", "related"), ("as before", "unrelated"))):
            if kind not in values:
                continue
            value, error = values[kind]
            y = top + 14 * line
            parts.append(
                f'<rect class=track x="{_LEFT}" y="{y}" width="{room}" height="11"/>'
                f'<rect class={style} x="{_LEFT}" y="{y}" width="{room * value / 100:.1f}" height="11"/>'
                f'<text x="{WIDTH - 1}" y="{y + 10}" class=end>{value:.1f}</text>'
            )
            if error:
                low, high = (_LEFT + room * min(max(value + d, 0), 100) / 100 for d in (-error, error))
                parts.append(
                    f'<line class=error x1="{low:.1f}" x2="{high:.1f}" y1="{y + 5.5}" y2="{y + 5.5}"/>'
                )
            told.append(f"{names[method]}, {kind}: {value:.1f}")
    return _svg(4 + 36 * len(figures), f"{family}. {'; '.join(told)}.", "".join(parts))


def _short(name: str) -> str:
    return name if len(name) <= 12 else name[:11] + "…"


def _svg(height: float, told: str, inside: str) -> str:
    return (
        f'<svg class=drawing viewBox="0 0 {WIDTH} {height:g}" role=img aria-label="{escape(told)}">'
        f"{inside}</svg>"
    )
