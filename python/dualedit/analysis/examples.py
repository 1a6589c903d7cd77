"""The examples of a report: facts with their questions, what fired and why, worst failures first."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from html import escape

from ..data import EditSample
from .gate import CAUSES, cause_of, has_gate, is_wrong, must_change, request_of, worst_first
from .pictures import Gallery, sources_of
from .settings import score_of
from .wording import KINDS, near

SampleOf = Callable[[int], EditSample | None]


def examples_of(
    units: Sequence[Mapping], name: str, count: int, sample_of: SampleOf, gallery: Gallery
) -> str:
    """What a method got wrong, in numbers and in pictures, as HTML.

    Args:
        units: the samples that it was asked about.
        name: of the method.
        count: how many facts to show.
        sample_of: from a unit's place to the sample with its pictures, or None.
        gallery: takes the pictures.
    """
    wrong = [(probe, unit) for unit in units for probe in unit["probes"] if is_wrong(probe)]
    asked = sum(score_of(probe) is not None for unit in units for probe in unit["probes"])
    parts = [f"<h4>{escape(name)}</h4>", _summary(wrong, asked, units)]
    shown = worst_first(units)[:count]
    cards = [_fact(unit, sample_of(unit["sample"]), gallery) for unit in shown]
    label = f"Show {_facts(len(cards), '')}"
    if wrong and cards:
        parts.append(cards.pop(0))  # the worst one is seen at once
        label = f"Show {_facts(len(cards), ' more')}, worst first"
    if cards:
        parts.append(f"<details><summary><span>{label}</span></summary>{''.join(cards)}</details>")
    return "".join(parts)


def _facts(count: int, more: str) -> str:
    return f"{count}{more} fact{'' if count == 1 else 's'}"


def _summary(wrong: Sequence[tuple[Mapping, Mapping]], asked: int, units: Sequence[Mapping]) -> str:
    gate = "" if has_gate(units) else " It has no gate: an edit changes the model for every question."
    if not wrong:
        return f"<p>Nothing wrong in these {asked} questions.{gate}</p>"
    causes = Counter(cause_of(probe, unit, request_of(unit)) for probe, unit in wrong)
    most = max(causes.values())
    bars = "".join(
        f'<li><span class=count>{causes[cause]}</span>'
        f'<span class=cause style="--share:{causes[cause] / most:.3f}">{CAUSES[cause]}</span></li>'
        for cause in CAUSES
        if causes[cause]
    )
    return f"<p>{len(wrong)} of {asked} answers are wrong.{gate}</p><ul class=causes>{bars}</ul>"


def _fact(unit: Mapping, sample: EditSample | None, gallery: Gallery) -> str:
    """One edit and everything that was asked about it: what is wrong first, the rest folded."""
    pictures = [gallery.add(source) for source in sources_of(unit, sample)]
    order = list(KINDS)
    pairs = sorted(
        zip(unit["probes"], pictures, strict=True), key=lambda pair: order.index(pair[0]["metric"])
    )
    bad = [_question(probe, image, unit) for probe, image in pairs if is_wrong(probe)]
    good = [_question(probe, image, unit) for probe, image in pairs if not is_wrong(probe)]
    rel = next(((probe, image) for probe, image in pairs if probe["metric"] == "rel"), None)
    head = _head(unit, rel, len(bad), len(pairs))
    rest = ""
    if good:
        label = f"{len(good)} as wanted" if bad else f"All {len(good)} as wanted"
        inside = f"<div class=questions>{''.join(good)}</div>"
        rest = f"<details><summary><span>{label}</span></summary>{inside}</details>"
    return f"<div class=fact>{head}<div class=questions>{''.join(bad)}</div>{rest}</div>"


def _head(unit: Mapping, rel: tuple[Mapping, str | None] | None, wrong: int, asked: int) -> str:
    family = f"{escape(unit['family'])}, " if unit["family"] else ""
    mark = f'<b class={"bad" if wrong else "good"}>{wrong} of {asked} wrong</b>'
    about = f"<p class=kind>edit {escape(unit['id'])}: {family}{mark}</p>"
    if rel is None:
        said = f"<p>new answer {_said(unit['target'], 'new')}</p>"
        return f"<div class=head><div class=body>{about}{said}</div></div>"
    probe, image = rel
    return (
        f"<div class=head>{_picture(image, probe)}<div class=body>{about}"
        f"<p class=question>{escape(probe['prompt'])}</p>"
        f"<p>before {_said(probe['before'], 'old')}, to be {_said(unit['target'], 'new')}</p></div></div>"
    )


def _question(probe: Mapping, image: str | None, unit: Mapping) -> str:
    wrong = is_wrong(probe)
    kind, wanted = KINDS[probe["metric"]]
    wanted = "new answer" if must_change(probe) else wanted
    mark = '<span class="mark bad">wrong</span>' if wrong else '<span class="mark good">as wanted</span>'
    cause = ""
    if wrong:
        cause = f"<p class=cause-why>{CAUSES[cause_of(probe, unit, request_of(unit))].capitalize()}.</p>"
    return (
        f"<article>{_picture(image, probe)}<div class=body><p class=kind>{kind}: {wanted}{mark}</p>"
        f"<p class=question>{escape(probe['prompt'])}</p>{_answer(probe, wrong)}{cause}{_gate(probe)}"
        "</div></article>"
    )


def _answer(probe: Mapping, wrong: bool) -> str:
    wanted = f"wanted {_said(probe['expected'])}, " if wrong else ""
    before = "" if probe["before"] == probe["expected"] else f", before {_said(probe['before'], 'old')}"
    if probe["answer"] is None:
        score = score_of(probe)
        told = "not scored" if score is None else f"{100 * score:.0f}% of its tokens right"
        return f"<p>wanted {_said(probe['expected'])}, {told}{before}</p>"
    return f"<p>{wanted}answers {_said(probe['answer'], 'new' if probe['fired'] else 'old')}{before}</p>"


def _said(text: str, style: str = "") -> str:
    return f"<b{f' class={style}' if style else ''}>{escape(text) or '(nothing)'}</b>"


def _gate(probe: Mapping) -> str:
    """The nearest edit, its distance and its radius, to scale with the radius in the middle."""
    if probe["fired"] is None:
        return ""
    distance, radius = probe["distance"], probe["radius"]
    if distance is None or radius is None:
        return f"<p class=why>{'an edit fires' if probe['fired'] else 'no edit is near'}</p>"
    share = 100.0 if not math.isfinite(distance) else 50 * distance / max(radius, 1e-12)
    words = "fires" if probe["fired"] else "does not fire"
    relation = "≤" if probe["fired"] else ">"
    asked = f"{escape(probe['edit_prompt'])} " if probe["edit_prompt"] else ""
    return (
        f'<div class=gate aria-hidden=true><i style="left:{min(share, 98):.1f}%" '
        f"class={'in' if probe['fired'] else 'out'}></i></div>"
        f"<p class=why>nearest edit: {asked}<b>{escape(probe['edit'] or '')}</b></p>"
        f"<p class=why>{words}: distance {escape(near(distance))} {relation} "
        f"radius {escape(near(radius))}</p>"
    )


def _picture(name: str | None, probe: Mapping) -> str:
    if name is not None:
        return f'<div class="picture {name}" role=img aria-label="the picture asked about"></div>'
    told = "no picture" if probe["image"] is None else "picture not at hand"
    return f'<div class="picture none">{told}</div>'
