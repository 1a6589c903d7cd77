"""A page to look through what was built, and its decisions read back."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import io
import json
import os
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ...data import EditSample, Probe
from ...models.images import ImageSource, rgb, shown
from .building import Drop

MARK = "dualedit_decisions"
_SIDE = 160
NAMES = {
    "t_gen": "other words: new answer", "v_gen": "other picture: new answer",
    "hard_image": "look-alike: as before", "hard_question": "other question: as before",
    "m_loc": "unrelated picture: as before",
    "t_loc": "no picture: as before",
}  # fmt: skip
_STYLE = """
:root { --page: #fbfaf8; --card: #fff; --ink: #1d1b18; --soft: #6b665e; --line: #e4e0d8; --new: #b4450c;
  --old: #1f5fa8; --bad: #c0252d; }
@media (prefers-color-scheme: dark) { :root { --page: #161513; --card: #201e1b; --ink: #ece8e1; --soft:
#a39d92;
  --line: #37332d; --new: #ff9a5c; --old: #7fb4f2; --bad: #ff7b7b; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 1.25rem 1rem 6rem; }
h1 { font-size: clamp(1.5rem, 5vw, 2.2rem); line-height: 1.2; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 1rem; padding: 1rem; margin:
1rem 0; } .fact { display: flex; gap: 1rem; flex-wrap: wrap; }
.pieces { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 15rem), 1fr)); gap: .6rem;
  margin-top: .8rem; }
label { display: flex; gap: .6rem; border: 1px solid var(--line); border-radius: .7rem; padding: .6rem;
  overflow-wrap: anywhere; cursor: pointer; }
label:has(input:not(:checked)) { opacity: .45; text-decoration: line-through; }
input { width: 1.25rem; height: 1.25rem; flex: none; }
img { width: 5.5rem; height: 5.5rem; object-fit: contain; border-radius: .4rem; flex: none; background:
var(--line); } .fact img { width: 9rem; height: 9rem; }
small { color: var(--soft); display: block; } .new { color: var(--new); } .old { color: var(--old); }
footer { position: fixed; inset: auto 0 0 0; background: var(--card); border-top: 1px solid var(--line);
  padding: .6rem 1rem; display: flex; gap: 1rem; align-items: center; justify-content: center; }
button { font: inherit; padding: .5rem 1.2rem; border-radius: .6rem; border: 0; background: var(--old);
  color: var(--page); cursor: pointer; }
.bad { color: var(--bad); } :focus-visible { outline: 3px solid var(--old); outline-offset: 2px; }
"""
_SCRIPT = """
const build = document.body.dataset.build, key = 'dualedit ' + build;
const boxes = [...document.querySelectorAll('input[type=checkbox]')];
const told = document.querySelector('#told');
const rejected = () => boxes.filter(b => !b.checked).map(b => b.name);
const note = () => { told.textContent = rejected().length + ' of ' + boxes.length + ' rejected'; };
const kept = JSON.parse(localStorage.getItem(key) || '[]');
for (const box of boxes) {
  box.checked = !kept.includes(box.name);
  box.onchange = () => { localStorage.setItem(key, JSON.stringify(rejected())); note(); };
}
document.querySelector('#save').onclick = () => {
  const text = JSON.stringify({dualedit_decisions: 1, build, rejected: rejected()}, null, 1);
  const link = document.createElement('a');
  link.href = URL.createObjectURL(new Blob([text], {type: 'application/json'}));
  link.download = 'decisions.json';
  link.click();
};
note();
"""


def _parts(sample: EditSample) -> Iterator[tuple[str, Probe]]:
    for name, probes in (*sample.generality.items(), *sample.locality.items()):
        for probe in probes:
            yield name, probe


def name_of(sample: EditSample, kind: str, probe: Probe) -> str:
    """What a decision calls a question: it changes with the row, the question and the picture's path."""
    source = probe.image_source if isinstance(probe.image_source, str) else shown(probe.image_source)
    told = json.dumps([kind, probe.prompt, os.path.basename(source)])
    return f"{sample.id}/{kind}/{hashlib.sha256(told.encode()).hexdigest()[:12]}"


def build_of(samples: Sequence[EditSample]) -> str:
    """Tells the decisions about these samples from others."""
    names = [name_of(sample, *part) for sample in samples for part in _parts(sample)]
    return hashlib.sha256("\n".join([*(s.id for s in samples), *names]).encode()).hexdigest()[:16]


def render_review(samples: Sequence[EditSample], drops: Sequence[Drop] = ()) -> str:
    """The page: a tick before everything that was built; without a tick it is rejected.

    Its only script counts, remembers the ticks in the browser and saves them as decisions.json.
    """
    body = "".join(_fact(sample) for sample in samples)
    left = "".join(f"<li>{escape(str(drop))}</li>" for drop in drops)
    out = (
        f"<details><summary>{len(drops)} left out by the filters</summary><ul>{left}</ul></details>"
        if drops
        else ""
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>Facts to look through</title><style>{_STYLE}</style></head>"
        f'<body data-build="{build_of(samples)}">'
        f"<main><h1>{len(samples)} facts to look through</h1><p>Take away the tick of what is wrong: a "
        "rephrased question that asks for something else, a look-alike that is the very same thing. Then "
        "save the decisions, and build again with <code>--decisions decisions.json</code>.</p><noscript>"
        f"<p class=bad>Without scripts nothing can be saved here.</p></noscript>{body}{out}</main><footer>"
        "<span id=told aria-live=polite></span>"
        f"<button id=save>Save decisions</button></footer><script>{_SCRIPT}</script></body></html>\n"
    )


def _fact(sample: EditSample) -> str:
    request = sample.request
    before = f"<span class=old>{escape(sample.base_answer)}</span> → " if sample.base_answer else ""
    pieces = "".join(_piece(sample, kind, probe) for kind, probe in _parts(sample))
    own = ", ".join(escape(wording) for wording in sample.rephrases)
    wordings = f"<small>while editing: {own}</small>" if own else ""
    return (
        f"<section><div class=fact>{_picture(request.image_source)}<div><label>"
        f'<input type=checkbox checked name="{escape(sample.id)}"><span><b>{escape(request.prompt)}</b><br>'
        f"{before}<b class=new>{escape(request.target)}</b><small>{escape(sample.id)}</small></span></label>"
        f"{wordings}</div></div><div class=pieces>{pieces}</div></section>"
    )


def _piece(sample: EditSample, kind: str, probe: Probe) -> str:
    own = probe.image_source == sample.request.image_source
    picture = "" if own or probe.image_source is None else _picture(probe.image_source)
    said = (
        f"<span class=old>{escape(probe.answer)}</span>"
        if probe.answer and kind not in ("t_gen", "v_gen")
        else ""
    )
    return (
        f'<label><input type=checkbox checked name="{escape(name_of(sample, kind, probe))}">{picture}'
        f"<span><small>{NAMES[kind]}</small>{escape(probe.prompt)} {said}</span></label>"
    )


def _picture(source: ImageSource) -> str:
    if source is None:
        return ""
    image = rgb(source)
    image.thumbnail((_SIDE, _SIDE))
    file = io.BytesIO()
    image.save(file, format="PNG")
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}">'


def read_decisions(file: str | os.PathLike[str], samples: Sequence[EditSample]) -> set[str]:
    """The names of what was rejected.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is no decisions file, or one about something that was not built now; names the first.
    """
    try:
        found: Any = json.loads(Path(file).read_text(encoding="utf-8"))
        rejected = set(found["rejected"]) if found[MARK] == 1 else None
    except FileNotFoundError:
        raise
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{os.fspath(file)} is no file of decisions ({error}): save one from the page."
        ) from error
    known = {sample.id for sample in samples} | {
        name_of(sample, *part) for sample in samples for part in _parts(sample)
    }
    unknown = sorted((rejected or set()) - known)
    if rejected is None or unknown:
        what = unknown[0] if unknown else "another version"
        raise ValueError(
            f"{os.fspath(file)} decides about {what!r}, which is not what was built now: build with the same "
            "rows and generators as for the page, or look through the new page."
        )
    return rejected


def without_rejected(samples: Sequence[EditSample], rejected: set[str]) -> list[EditSample]:
    """The samples that were accepted, with the questions that were."""

    def kept(sample: EditSample, parts: dict[str, list[Probe]]) -> dict[str, list[Probe]]:
        left = {
            name: [probe for probe in probes if name_of(sample, name, probe) not in rejected]
            for name, probes in parts.items()
        }
        return {name: probes for name, probes in left.items() if probes}

    return [
        dataclasses.replace(
            sample, generality=kept(sample, sample.generality), locality=kept(sample, sample.locality)
        )
        for sample in samples
        if sample.id not in rejected
    ]
