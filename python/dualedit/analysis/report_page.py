"""The report's page: one HTML file, pictures inside, for a phone or a desk, light or dark, no scripts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from ..data import EditSample
from ..evaluation import Row
from .drawing import distances_drawing, families_drawing
from .examples import examples_of
from .gate import by_family, reach_of
from .markdown import figure
from .page_style import REPORT_STYLE, STYLE
from .pictures import Gallery
from .reading import Results
from .settings import Setting, columns_of, settings_of
from .wording import IN_ORDER, MEANINGS, SCORING_NOTES, SCORINGS, TITLES, method_name

_FAMILIES = 12  # drawn at most
_NARROW = 2  # methods of a table on a phone
Samples = Callable[[Mapping[str, Any]], "Sequence[EditSample] | str"]


def render_report(results: Results, samples: Samples | None = None, examples: int = 6) -> str:
    """The whole page.

    Args:
        results: from `read_results`.
        samples: from a run's arguments to the samples that it asked about, in its order, for their pictures;
            or one sentence that says why there are none. None: paths in the records are what is left.
        examples: how many facts are shown for each method, worst first; 0 shows none.
    """
    gallery = Gallery()
    settings = settings_of(results)
    body = "".join(_setting(setting, samples, examples, gallery) for setting in settings)
    notes = "".join(f"<p class=note>{escape(note)}</p>" for note in results.notes)
    methods = list(dict.fromkeys(row.method for s in settings for rows in s.rows.values() for row in rows))
    names = ", ".join(escape(method_name(method)) for method in methods)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>Editing methods: {names}</title><style>{STYLE}{REPORT_STYLE}{gallery.rules()}</style></head>"
        "<body><main><header><p class=eyebrow>DualEdit Kernels</p>"
        f"<h1>What the edits changed, and what they left alone</h1><p class=soft>{names}</p>{notes}</header>"
        f"{body}{_measured(settings)}</main></body></html>\n"
    )


def _setting(setting: Setting, samples: Samples | None, examples: int, gallery: Gallery) -> str:
    parts = [f"<h2>{escape(setting.title)}</h2><p class=soft>{escape(_about(setting))}</p>"]
    parts += [f"<p class=note>{escape(note)}</p>" for note in setting.notes]
    parts += [_table(scoring, rows) for scoring, rows in setting.rows.items()]
    parts.append(_further([row for rows in setting.rows.values() for row in rows]))
    if setting.units:
        parts += [_distances(setting), _families(setting)]
        if examples:
            parts.append(_examples(setting, samples, examples, gallery))
    else:
        parts.append(
            "<p class=soft>Only rows of figures were given; the records of the run (dualedit eval --records) "
            "also show distances, families of facts and examples.</p>"
        )
    return f"<section>{''.join(parts)}</section>"


def _about(setting: Setting) -> str:
    """Which facts, on which model, from which files."""
    told, arguments = [], setting.arguments
    if arguments.get("--data"):
        told.append(f"facts of {arguments['--data']}")
    elif arguments.get("--benchmark"):
        told.append(f"{arguments['--benchmark']} benchmark, world {arguments.get('--world-seed', 0)}")
    if "--seed" in arguments:
        told.append(f"seed {arguments['--seed']}")
    if arguments.get("--model"):
        told.append(f"model {arguments['--model']}")
    if arguments.get("version"):
        told.append(f"dualedit {arguments['version']}")
    told.append(f"from {', '.join(setting.source)}")
    return "; ".join(told) + "."


# ---------------------------------------------------------------------- tables


def _table(scoring: str, rows: Sequence[Row]) -> str:
    """A line a metric, a column a method; the highest figure of a line is bold."""
    seen = " class=sees" if scoring == "published" else ""
    return (
        f"<h3{seen}>{SCORINGS[scoring]}</h3><p class=soft>{SCORING_NOTES[scoring]}</p>"
        f"{_figures_table(SCORINGS[scoring], rows)}"
    )


def _figures_table(label: str, rows: Sequence[Row]) -> str:
    """The metrics that some row has, one a line. On a narrow screen there are few methods to a table."""
    whole = _metric_lines(label, rows, rows)
    if len(rows) <= _NARROW:
        return whole
    parts = [rows[first : first + _NARROW] for first in range(0, len(rows), _NARROW)]
    narrow = "".join(_metric_lines(label, part, rows) for part in parts)
    return f"<div class=on-wide>{whole}</div><div class=on-narrow>{narrow}</div>"


def _metric_lines(label: str, rows: Sequence[Row], everything: Sequence[Row]) -> str:
    several = len({row.n for row in everything}) > 1
    head = "".join(
        f"<th scope=col>{escape(method_name(row.method))}"
        f"{f'<small>{row.n} facts</small>' if several else ''}</th>"
        for row in rows
    )
    body = ""
    for name in columns_of(everything, IN_ORDER):
        best = _best(everything, name)
        cells = "".join(_cell(row, name, _shown(row, name) == best) for row in rows)
        sums = " class=sums" if name in ("avg", "hm") else ""
        title = f"{TITLES[name]}<small>{escape(MEANINGS[name])}</small>"
        body += f"<tr{sums}><th scope=row>{title}</th>{cells}</tr>"
    return _wide(label, f"<tr><td></td>{head}</tr>", body)


def _best(rows: Sequence[Row], name: str) -> float | None:
    """The highest figure as it is shown; None where all are the same."""
    values = {_shown(row, name) for row in rows}
    return max(values) if len(values) > 1 else None


def _shown(row: Row, name: str) -> float:
    value = row.metrics.get(name)
    return -1.0 if value is None else round(value, 1)


def _cell(row: Row, name: str, best: bool) -> str:
    value, sure = figure(row, name)
    if row.metrics.get(name) is None:
        return "<td>–</td>"
    told = f"<b>{value}</b>" if best else value
    return f"<td>{told}<small>{sure}</small></td>"


def _wide(label: str, head: str, body: str) -> str:
    """A table that scrolls inside its own box, its first column staying in sight."""
    return (
        f'<div class=wide role=region tabindex=0 aria-label="{escape(label)}"><table><thead>{head}</thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _further(rows: Sequence[Row]) -> str:
    """What stands beside the figures: the kinder comparison, the end of a sequence, what edits cost."""
    parts = []
    for row in rows:
        if row.end is not None:
            end = Row(row.method, row.n, row.end["metrics"], row.end["stderr"], interval=row.end["interval"])
            parts.append((row.scoring, end))
    told = "".join(
        f"<h3>Asked again after the last edit: {SCORINGS[scoring].lower()}</h3>"
        + _figures_table(SCORINGS[scoring], [row for other, row in parts if other == scoring])
        for scoring in dict.fromkeys(scoring for scoring, _ in parts)
    )
    contains = [Row(row.method, row.n, row.contains, {}) for row in rows if row.contains is not None]
    if contains:
        told += _folded(
            "Right where the wanted answer stands somewhere in the answer",
            "Kinder than exact match to models that answer in sentences, and to those that hedge.",
            _figures_table("figures", contains),
        )
    costs: dict[str, Row] = {}
    for row in rows:
        if row.costs is not None:
            costs.setdefault(row.method, row)
    if costs:
        text = "Means over the facts; they differ from run to run."
        told += _folded("What an edit costs", text, _costs(costs))
    return told


def _costs(rows: Mapping[str, Row]) -> str:
    titles = ("Training", "Edit", "Memory of an edit", "Answer", "Answer, unedited", "Slower by")
    names = ("training_seconds", "edit_seconds", "edit_bytes", "answer_seconds", "answer_seconds_unedited")
    head = "".join(f"<th scope=col>{title}</th>" for title in titles)
    body = ""
    for method, row in rows.items():
        values = [(row.costs or {}).get(name) for name in names]
        cells = (
            "–" if value is None else f"{value / 1024:,.0f} KiB" if name == "edit_bytes" else f"{value:.3g} s"
            for name, value in zip(names, values, strict=True)
        )  # fmt: skip
        line = "".join(f"<td>{cell}</td>" for cell in (*cells, _slower(*values[-2:])))
        body += f"<tr><th scope=row>{escape(method_name(method))}</th>{line}</tr>"
    return _wide("costs", f"<tr><td></td>{head}</tr>", body)


def _slower(answer: float | None, unedited: float | None) -> str:
    """How many times as long a question takes."""
    return "–" if not answer or not unedited else f"{answer / unedited:.2f} x"


def _folded(title: str, text: str, inside: str) -> str:
    return f"<details><summary><span>{title}</span></summary><p class=soft>{text}</p>{inside}</details>"


# ---------------------------------------------------------------------- drawings


def _distances(setting: Setting) -> str:
    drawn, without = [], []
    for method, units in setting.units.items():
        reach, name = reach_of(units), method_name(method)
        if reach is None:
            without.append(escape(name))
        else:
            title = f"<figcaption>{escape(name)}</figcaption>"
            drawn.append(f"<figure>{title}{distances_drawing(reach, name)}</figure>")
    if not drawn:
        return ""
    rest = f" No gate, or none recorded: {', '.join(without)}." if without else ""
    return (
        "<h3>How near questions lie to the nearest edit</h3><p class=soft>An edit fires left of the line, "
        "its radius. Related questions belong there, the others to the right. The edited question itself is "
        "left out: its distance is nothing. A look-alike that was edited as well counts as related."
        f"{rest}</p><div class=figures>{''.join(drawn)}</div>"
    )


def _families(setting: Setting) -> str:
    figures = {method: by_family(units) for method, units in setting.units.items()}
    counts: dict[str, int] = {}
    for unit in max(setting.units.values(), key=len):
        counts[unit["family"]] = counts.get(unit["family"], 0) + 1
    if len(counts) < 2:
        return ""

    def worth(family: str) -> float:
        values = [value for own in figures.values() for value, _ in own.get(family, {}).values()]
        return sum(values) / len(values) if values else 0.0

    names = {method: method_name(method) for method in figures}
    drawn = ""
    for family in sorted(counts, key=worth)[:_FAMILIES]:
        title = family or "without a family"
        asked = f"{counts[family]} fact{'' if counts[family] == 1 else 's'}"
        own = {method: values[family] for method, values in figures.items() if family in values}
        drawing = families_drawing(title, own, names)
        drawn += f"<figure><figcaption>{escape(title)} <small>{asked}</small></figcaption>{drawing}</figure>"
    more = f" The {_FAMILIES} worst of {len(counts)}." if len(counts) > _FAMILIES else ""
    return (
        "<h3>By family of facts</h3><p class=soft>% right, worst family first, with one standard error: "
        "<b class=new>upper bar</b> what must give the new answer, <b class=old>lower bar</b> what must stay "
        f"as before.{more}</p><div class=figures>{drawn}</div>"
    )


# ---------------------------------------------------------------------- examples


def _examples(setting: Setting, samples: Samples | None, count: int, gallery: Gallery) -> str:
    found: Sequence[EditSample] | str = () if samples is None else samples(setting.arguments)
    why = ""
    if isinstance(found, str):
        why, found = f"<p class=note>{escape(found)}</p>", ()

    def sample_of(place: int) -> EditSample | None:
        return found[place] if 0 <= place < len(found) else None

    late = " As it is after the last edit of the sequence." if setting.late else ""
    parts = "".join(
        examples_of(units, method_name(method), count, sample_of, gallery)
        for method, units in setting.units.items()
    )
    return (
        "<h3>What went wrong, and why</h3><p class=soft>In each bar the mark in the middle is the radius of "
        f"the nearest edit, the dot the question.{late}</p>{why}{parts}"
    )


def _measured(settings: Sequence[Setting]) -> str:
    rows = [row for setting in settings for own in setting.rows.values() for row in own]
    lines = "".join(
        f"<dt>{TITLES[name]}</dt><dd>{escape(MEANINGS[name])}</dd>"
        for name in columns_of(rows, IN_ORDER)
    )
    return (
        f"<section><h2>How to read this</h2><dl>{lines}</dl><ul>"
        "<li>Figures are per cent right: a mean over facts of the mean over a fact's questions.</li>"
        "<li>Below each is its 95% interval, Wilson's for proportions (or ± one standard error where the "
        "rows hold none). Bold is the highest of a line; where intervals overlap, that may be chance.</li>"
        "<li>What must stay is compared with the unedited model's answer, right or wrong. A look-alike that "
        "was edited as well has to give its own new answer.</li></ul></section>"
    )
