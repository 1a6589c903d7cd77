"""The demo's page: one HTML file, pictures inside, for a phone or a desk, light or dark, no scripts."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from html import escape

from PIL import Image

from dualedit.analysis.page_style import STYLE
from dualedit.evaluation import Row, SingleResult

from .demo_story import KINDS, MEANINGS, NAMES, TITLES, Moment, Story, brief, near, untouched

_MORE_STORIES = 5
_FAILURES = 12
_DRAWN = 96  # pixels of a picture's longer side up to which it is taken to be drawn pixel by pixel
GROUPS = {
    "new answer": ("These must change", "One picture and wording made the edit; it must hold for others."),
    "as before": ("These must stay", "Look-alikes, other questions, and all that the edit is not about."),
}


def render_page(opening: Story, stories: Sequence[Story], results: Mapping[str, SingleResult]) -> str:
    """The whole page.

    Args:
        opening: the story that is told in full.
        stories: of all measured edits; a few more are shown, and the failures among them.
        results: method to its figures, the methods in the order of the columns.
    """
    others = [story for story in stories if story is not opening][:_MORE_STORIES]
    parts = [
        _opening(opening, results),
        *(_group(opening, wanted) for wanted in GROUPS),
        _figures(results),
        _others(others),
        *(_failures(method, stories) for method in results),
        _measured(results),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>DualEdit Kernels: an edit before and after</title><style>{STYLE}</style></head>"
        f"<body><main>{''.join(parts)}</main></body></html>\n"
    )


def picture(image: Image.Image | None, alt: str, size: str = "") -> str:
    """An image as an inline element; a placeholder for a question without one.

    Args:
        alt: what the picture is, for people who do not see it.
    """
    if image is not None and max(image.size) <= _DRAWN:
        size = f"{size} drawn".strip()  # enlarged pixel by pixel, so that it stays sharp
    if image is None:
        return f'<div class="picture none {size}">no picture</div>'
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img class="picture {size}" alt="{escape(alt)}" src="data:image/png;base64,{data}">'


def _headline(results: Mapping[str, SingleResult]) -> str:
    """The figure that sums each method up, above all else."""
    told = ""
    for result in results.values():
        row = result.row
        pair = (row.interval or {}).get("avg")
        sure = "" if pair is None else f"; 95% interval {pair[0]:.1f} to {pair[1]:.1f}"
        value = row.metrics["avg"]
        told += (
            f"<p><b>{'–' if value is None else f'{value:.1f} %'}</b> {NAMES[row.method]}, {row.n} edits: "
            f"average of what must change and what must stay{sure}</p>"
        )
    return f"<div class=headline>{told}</div>"


def _opening(story: Story, results: Mapping[str, SingleResult]) -> str:
    moments = next(iter(story.moments.values()))
    knew = moments[0].before
    return (
        "<header><p class=eyebrow>DualEdit Kernels</p>"
        f"<h1>One fact edited: what changes, what stays</h1>{_headline(results)}</header>"
        f"<section class=edit>{picture(story.request.image, 'the picture of the edit', 'large')}<div>"
        f"<p class=question>{escape(story.request.prompt)}</p>"
        f"<p>The unedited model answers <b class=old>{escape(knew)}</b>"
        f"{', which is true' if knew == story.truth else ''}.</p>"
        f"<p>Told once, with this picture: answer <b class=new>{escape(story.request.target)}</b>.</p>"
        "<p class=soft>Then it is asked again, with each method. An edit fires when a question is no farther "
        "from it than its radius: the mark in the middle of each bar. The dot is the question.</p>"
        "<ul class=legend><li><i></i>the unedited model's answer; no edit fires</li>"
        "<li><i class=in></i>an edit's answer; it fires</li></ul></div></section>"
    )


def _group(story: Story, wanted: str) -> str:
    title, text = GROUPS[wanted]
    cards = _cards(story, wanted)
    return f"<section><h2>{title}</h2><p class=soft>{text}</p><div class=cards>{cards}</div></section>"


def _cards(story: Story, wanted: str) -> str:
    per_method = {method: brief(moments) for method, moments in story.moments.items()}
    first = next(iter(per_method.values()))
    return "".join(
        _card({method: moments[i] for method, moments in per_method.items()})
        for i, moment in enumerate(first)
        if KINDS[moment.metric][1] == wanted
    )


def _card(moments: Mapping[str, Moment]) -> str:
    any_one = next(iter(moments.values()))
    answers = "".join(_answer(method, moment) for method, moment in moments.items())
    return (
        f"<article>{picture(any_one.image, f'asked about: {KINDS[any_one.metric][0]}')}"
        f"<div class=body><p class=kind>{KINDS[any_one.metric][0]}</p>"
        f"<p class=question>{escape(any_one.prompt)}</p>"
        f"<p class=before>before: <b class=old>{escape(any_one.before)}</b></p>{answers}</div></article>"
    )


def _answer(method: str, moment: Moment) -> str:
    good, word = ("good", "as wanted") if moment.right else ("bad", "wrong")
    return (
        f"<div class=answer><p><span class=method>{NAMES[method]}</span> "
        f"<b class={'new' if moment.fired else 'old'}>{escape(moment.after) or '(nothing)'}</b> "
        f'<span class="mark {good}">{word}</span></p>'
        f"{_gate(moment)}</div>"
    )


def _gate(moment: Moment) -> str:
    """The distance to the edit's key against its radius, drawn to scale with the radius in the middle."""
    share = 100.0 if not math.isfinite(moment.distance) else 50 * moment.distance / max(moment.radius, 1e-12)
    words = "the edit fires" if moment.fired else "no edit fires"
    relation = "≤" if moment.fired else ">"
    return (
        f'<div class=gate aria-hidden=true><i style="left:{min(share, 98):.1f}%" '
        f"class={'in' if moment.fired else 'out'}></i></div>"
        f"<p class=why>{words}: distance {escape(near(moment.distance))} {relation} "
        f"radius {escape(near(moment.radius))}</p>"
    )


def _figures(results: Mapping[str, SingleResult]) -> str:
    rows = [result.row for result in results.values()]
    head = "".join(f"<th scope=col>{NAMES[row.method]}</th>" for row in rows)
    lines = []
    for name, title in TITLES.items():
        cells = "".join(_cell(row, name) for row in rows)
        lines.append(f"<tr><th scope=row>{title}<small>{escape(MEANINGS[name])}</small></th>{cells}</tr>")
    same, closed = untouched(results)
    return (
        f"<section><h2>The same over {rows[0].n} edits</h2>"
        "<p class=soft>Per cent right and its 95% interval (Wilson's). Each edit is stored, asked about and "
        "taken back.</p>"
        f"<table><thead><tr><td></td>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
        f"<p><b>No gate, no change:</b> where no edit fired, {same} of {closed} answers are exactly the "
        "unedited model's.</p></section>"
    )


def _cell(row: Row, name: str) -> str:
    value = row.metrics[name]
    if value is None:
        return "<td>–</td>"
    pair = (row.interval or {}).get(name)
    small = "" if pair is None else f"<small>{pair[0]:.1f} to {pair[1]:.1f}</small>"
    return f'<td><span class=bar style="--share:{value / 100:.3f}"></span>{value:.1f}{small}</td>'


def _others(stories: Sequence[Story]) -> str:
    if not stories:
        return ""
    items = []
    for story in stories:
        scores = ", ".join(
            f"{NAMES[method]} {sum(m.right for m in moments)} of {len(moments)}"
            for method, moments in story.moments.items()
        )
        items.append(
            f"<details><summary>{picture(story.request.image, 'the picture of the edit', 'small')}"
            f"<span>{escape(story.request.prompt)} "
            f"<b class=new>{escape(story.request.target)}</b><small>right: {scores}</small></span></summary>"
            f"<div class=cards>{_cards(story, 'new answer')}{_cards(story, 'as before')}</div></details>"
        )
    return (
        "<section><h2>More edits</h2><p class=soft>The next ones of the same run, not chosen.</p>"
        f"{''.join(items)}</section>"
    )


def _failures(method: str, stories: Sequence[Story]) -> str:
    """What a method got wrong: the first of each kind in turn, so that no frequent kind fills the list."""
    queues: dict[str, list[tuple[Story, Moment]]] = {kind: [] for kind in KINDS}
    for story in stories:
        for moment in story.moments[method]:
            if not moment.right:
                queues[moment.metric].append((story, moment))
    wrong = sum(map(len, queues.values()))
    asked = sum(len(story.moments[method]) for story in stories)
    heading = f"<section><h2>Where {NAMES[method]} goes wrong</h2>"
    if not wrong:
        return f"{heading}<p>Nowhere in these {asked} questions.</p></section>"
    chosen = [pair for turn in range(wrong) for queue in queues.values() for pair in queue[turn : turn + 1]]
    cards = "".join(_failure(method, story, moment) for story, moment in chosen[:_FAILURES])
    counts = ", ".join(f"{len(queue)} {KINDS[kind][0]}" for kind, queue in queues.items() if queue)
    return (
        f"{heading}<p class=soft>{wrong} of {asked} questions: {counts}. The first ones of each kind:</p>"
        f"<details><summary>Show {min(wrong, _FAILURES)}</summary><div class=cards>{cards}</div></details>"
        "</section>"
    )


def _failure(method: str, story: Story, moment: Moment) -> str:
    return (
        f"<article><div>{picture(story.request.image, 'the picture of the edit')}"
        f"{picture(moment.image, f'asked about: {KINDS[moment.metric][0]}')}</div><div class=body>"
        f"<p class=kind>{KINDS[moment.metric][0]}</p>"
        f"<p class=soft>edit: {escape(story.request.prompt)} "
        f"<b class=new>{escape(story.request.target)}</b></p>"
        f"<p class=question>{escape(moment.prompt)}</p>"
        f"<p>wanted <b>{escape(moment.wanted)}</b>, got <b>{escape(moment.after) or '(nothing)'}</b></p>"
        f"{_gate(moment)}</div></article>"
    )


def _measured(results: Mapping[str, SingleResult]) -> str:
    count = len(next(iter(results.values())).records)
    return (
        "<section><h2>How this was measured</h2><ul>"
        f"<li>Each method was asked {count} questions, none of which it was trained or calibrated on.</li>"
        "<li>The edit told at the top is the first of them whose fact the unedited model knows.</li>"
        "<li>Answers are generated token by token until the model stops, and compared as whole strings.</li>"
        "<li>Questions that must stay are compared with what the unedited model answers, right or wrong.</li>"
        "<li>The model is small and lives in a drawn world, so that anybody can repeat this on a laptop. The "
        "figures say how the methods work, not how a large model would do.</li></ul></section>"
    )
