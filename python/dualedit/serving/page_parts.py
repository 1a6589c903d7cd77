"""Pieces of the page as HTML: an answer, a comparison, the list of edits, who changed what."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from PIL import Image

from ..analysis.wording import near
from ..editing import Edit
from ..editor import Explanation
from .history import Change

STYLE = """
.gradio-container { max-width: min(72rem, 100%) !important; min-width: 0; margin: 0 auto !important; }
.de { --new: #b4450c; --old: #1f5fa8; --good: #157347; --inside: #f6ddcc; --track: #e4e1da; --line: #d9d5cc;
  --soft: #5f5a52; font-size: 1rem; line-height: 1.45; }
.dark .de { --new: #ff9a5c; --old: #8fbef5; --good: #5ecb92; --inside: #6b4128; --track: #3a3731;
  --line: #45413a; --soft: #b4aea3; }
.de h1 { font-size: clamp(1.5rem, 5vw, 2.1rem); margin: 0; letter-spacing: -.02em; line-height: 1.2; }
.de p { margin: .2rem 0; } .de .soft { color: var(--soft); } .de small { color: var(--soft); }
.de .says { font-size: clamp(1.6rem, 6vw, 2.3rem); font-weight: 650; line-height: 1.2; margin: .1rem 0 .4rem;
  overflow-wrap: anywhere; }
.de .new { color: var(--new); } .de .old { color: var(--old); } .de .good { color: var(--good); }
.de .gate { position: relative; height: .7rem; margin: .7rem 0 .3rem; border-radius: .35rem;
  background: linear-gradient(90deg, var(--inside) 50%, var(--track) 50%); }
.de .gate::after { content: ""; position: absolute; left: 50%; top: -.2rem; bottom: -.2rem; width: 2px;
  background: var(--soft); }
.de .gate i { position: absolute; top: 50%; width: 1rem; height: 1rem; margin: -.5rem 0 0 -.5rem;
  border-radius: 50%; border: 2px solid var(--background-fill-primary); background: var(--old); z-index: 1; }
.de .gate i.in { background: var(--new); }
.de .cards { display: grid; gap: .7rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); }
.de .card { display: flex; gap: .8rem; border: 1px solid var(--line); border-radius: .8rem; padding: .75rem;
  min-width: 0; }
.de .card > div { flex: 1; min-width: 0; overflow-wrap: anywhere; }
.de img.thumb { width: 4.5rem; height: 4.5rem; object-fit: contain; border-radius: .5rem; flex: none;
  margin: 0; border: 1px solid var(--line); background: #fff; }
.de .none { width: 4.5rem; height: 4.5rem; border: 1px dashed var(--line); border-radius: .5rem; flex: none;
  display: grid; place-items: center; font-size: .75rem; color: var(--soft); text-align: center; }
.de .q { font-weight: 600; }
.de .note { border-left: .3rem solid var(--old); padding: .35rem .75rem; }
.de .note.good { border-color: var(--good); color: inherit; } .de .note.bad { border-color: var(--new); }
.de table { border-collapse: collapse; width: 100%; }
.de td, .de th { text-align: left; padding: .35rem .6rem .35rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top; overflow-wrap: anywhere; }
.de .off { opacity: .6; }
#examples .caption-label { white-space: normal; max-width: none; left: 0; right: 0; bottom: 0; margin: 0;
  border-radius: 0; font-size: .8rem; line-height: 1.25; text-align: center; }
#examples { min-height: 0 !important; }
#examples .grid-wrap { min-height: 0 !important; max-height: none; overflow: visible; }
#examples .grid-container { height: auto; grid-auto-rows: auto; }
.edit-row { align-items: center; }
@media (max-width: 640px) { .edit-row { flex-direction: column; align-items: stretch; }
  .edit-row > * { width: 100%; } .gradio-container { padding: .5rem !important; } }
button:focus-visible, input:focus-visible, textarea:focus-visible, [tabindex]:focus-visible {
  outline: 3px solid #1f6feb !important; outline-offset: 2px; }
@media (prefers-reduced-motion: reduce) { * { transition: none !important; animation: none !important; } }
"""


@dataclass(frozen=True)
class Compared:
    """A question to the model without its edits and with them.

    Attributes:
        image, prompt: what was asked.
        before, after: the answers.
        why: which edit answers, or which is nearest.
        shows: what the picture shows, in words; "" where nobody said.
    """

    image: Image.Image | None
    prompt: str
    before: str
    after: str
    why: Explanation
    shows: str = ""


def block(inner: str, live: bool = False) -> str:
    """A part of the page; `live`: read out by screen readers when it changes."""
    return f'<div class="de"{" role=status aria-live=polite" if live else ""}>{inner}</div>'


def data_url(image: Image.Image, side: int = 320) -> str:
    """A picture inside the page, at most `side` pixels wide and high; small ones are enlarged sharply."""
    small = image.convert("RGB")
    small.thumbnail((side, side))
    if max(small.size) <= 96:  # drawn pixel by pixel
        factor = 192 // max(small.size)
        small = small.resize((small.width * factor, small.height * factor), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    small.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def thumb(image: Image.Image | None, alt: str) -> str:
    """A small picture, or a box that says there is none."""
    if image is None:
        return '<div class="none">no picture</div>'
    return f'<img class="thumb" alt="{escape(alt)}" src="{data_url(image)}">'


def gate(found: Explanation) -> str:
    """The distance to the nearest edit against its radius: a bar with the radius in the middle, and words."""
    if found.edit is None:
        return '<p class="soft">No edit is stored, so the model answers as it is.</p>'
    far, radius = found.distance, found.radius
    share = 50 * far / max(radius, 1e-12) if math.isfinite(far) else 100.0
    reach = "reaches" if found.fired else "is nearest and reaches"
    words = escape(f"distance {near(far)}; edit {found.edit.id} {reach} {near(radius)}")
    return (
        f'<div class="gate" role="img" aria-label="{words}"><i style="left:{min(share, 98):.1f}%" '
        f'class="{"in" if found.fired else "out"}"></i></div><small>{words}</small>'
    )


def answer_card(question: str, answer: str, found: Explanation) -> str:
    """What the model answers, and who made the edit that answers, if one does."""
    if found.fired and found.edit is not None:
        by = f" by {escape(found.edit.author)}" if found.edit.author else ""
        source = f"<b class=new>Edit {found.edit.id}{by}</b> answers."
    else:
        source = "<b class=old>The model itself</b> answers, unchanged."
    return block(
        f"<p class=soft>{escape(question)}</p><p class='says {'new' if found.fired else 'old'}'>"
        f"{escape(answer) or '(nothing)'}</p><p>{source}</p>{gate(found)}",
        live=True,
    )


def note(text: str, kind: str = "") -> str:
    """A message about what was done."""
    return block(f'<p class="note {kind}">{escape(text)}</p>', live=True) if text else block("", live=True)


def comparison(rows: Sequence[Compared]) -> str:
    """Cards of questions before and after the edits."""
    if not rows:
        return block("<p class=soft>Nothing is compared yet.</p>")
    legend = (
        "<p class=soft><b class=old>Blue</b>: the model without edits. <b class=new>Orange</b>: an edit "
        "answers. The line in the middle of a bar is the edit's radius, the dot is the question.</p>"
    )
    return block(legend + f"<div class=cards>{''.join(map(_card, rows))}</div>", live=True)


def _card(row: Compared) -> str:
    changed = row.before != row.after
    colour = "new" if row.why.fired else "old"
    verdict = "changed" if changed else "as before"
    shows = f"<small>{escape(row.shows)}</small>" if row.shows else ""
    return (
        f"<div class=card>{thumb(row.image, row.shows or 'the picture that was asked about')}<div>{shows}"
        f"<p class=q>{escape(row.prompt)}</p>"
        f"<p>before: <b class=old>{escape(row.before) or '(nothing)'}</b></p>"
        f"<p>after: <b class={colour}>{escape(row.after) or '(nothing)'}</b> <small>{verdict}</small></p>"
        f"{gate(row.why)}</div></div>"
    )


def edit_card(edit: Edit, image: Image.Image | None) -> str:
    """A stored edit in the list."""
    who = escape(edit.author) or "somebody"
    more = " (switched off)" * (not edit.enabled) + " (the model does not obey)" * edit.failed
    return block(
        f"<div class='card{'' if edit.enabled else ' off'}'>{thumb(image, f'the picture of edit {edit.id}')}"
        f"<div><p class=q>{escape(edit.prompt)}</p><p><b class=new>{escape(edit.target)}</b>{more}</p>"
        f"<small>edit {edit.id}, by {who}, {moment(edit.created)}</small></div></div>"
    )


def history(changes: Sequence[Change], shown: int = 30) -> str:
    """Who changed what and when, newest first."""
    if not changes:
        return block("<p class=soft>Nobody has changed anything yet.</p>")
    lines = "".join(
        f"<tr><td>{moment(c.when)}</td><td>{escape(c.who) or 'somebody'}</td><td>{_DID.get(c.what, c.what)} "
        f"edit {c.edit}: {escape(c.prompt)} <b>{escape(c.target)}</b></td></tr>"
        for c in list(changes)[::-1][:shown]
    )
    head = "<thead><tr><th scope=col>When</th><th scope=col>Who</th><th scope=col>What</th></tr></thead>"
    return block(f"<table>{head}<tbody>{lines}</tbody></table>")


_DID = {
    "add": "made", "remove": "removed", "undo": "took back", "redo": "brought back",
    "disable": "switched off", "enable": "switched on",
}  # fmt: skip


def moment(when: str) -> str:
    """A time as people read it, in UTC."""
    return escape(when.replace("T", " ").replace("Z", "")[:16]) + " UTC"
