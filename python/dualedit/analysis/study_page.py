"""The analysis as one HTML file in the report's style: drawings inside, no scripts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from ..data import EditSample
from . import study_plots as plots
from .page_style import REPORT_STYLE, STYLE

_STYLE = """
.plot { display: block; width: 100%; height: auto; color: var(--ink); }
.plot text { fill: var(--ink); }
.plots { display: grid; gap: .75rem; margin-top: .75rem; }
.pair { grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); }
.maps { grid-template-columns: repeat(auto-fill, minmax(8rem, 1fr)); }
pre { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: .7rem .9rem;
  overflow-x: auto; }
"""
_METHODS = {"dualedit": "DualEdit", "balancedit": "BalancEdit"}


def render_analysis(found: Mapping[str, Any], samples: Sequence[EditSample] = ()) -> str:
    """The whole page.

    Args:
        found: of `Studies.run`, with "arguments".
        samples: the facts, for the pictures that attention is drawn over; without them the grids alone.

    Raises:
        ImportError: matplotlib is not installed.
    """
    model = str(found.get("arguments", {}).get("--model", found["model"]["type"]))
    body = "".join(
        (
            _recommendation(found), _attention(found, samples), _sensitivity(found), _grid(found),
            _gate(found), _how(found),
        )
    )  # fmt: skip
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>Layers of {escape(model)}</title><style>{STYLE}{REPORT_STYLE}{_STYLE}</style></head>"
        f"<body><main><header><p class=eyebrow>DualEdit Kernels</p><h1>Which layers of {escape(model)} to "
        f"edit</h1><p class=soft>{escape(_about(found))}</p></header>{body}</main></body></html>\n"
    )


def _about(found: Mapping[str, Any]) -> str:
    model = found["model"]
    told = [f"{model['type']}, {model['decoder_layers']} decoder layers of width {model['hidden_size']}"]
    if len(found["layers"]) < model["decoder_layers"]:
        told.append(f"layers {', '.join(map(str, found['layers']))} were looked at")
    told.append(f"{found['gate']['facts']} facts")
    if found.get("arguments", {}).get("version"):
        told.append(f"dualedit {found['arguments']['version']}")
    return "; ".join(told) + "."


def _section(title: str, *parts: str) -> str:
    return f"<section><h2>{title}</h2>{''.join(parts)}</section>"


def _figure(caption: str, svg: str) -> str:
    return f"<figure><figcaption>{caption}</figcaption>{svg}</figure>"


def _recommendation(found: Mapping[str, Any]) -> str:
    parts = []
    for method, told in found["recommendation"].items():
        inside = ", ".join(f"{name}={value!r}" for name, value in told["arguments"].items())
        call = f"<pre>model = inject_{method}(model, {escape(inside)})</pre>" if inside else ""
        reasons = "".join(f"<li>{escape(reason)}</li>" for reason in told["reasons"])
        parts.append(f"<h3>{_METHODS[method]}</h3>{call}<ul>{reasons}</ul>")
    return _section("What to begin with", *parts)


def _attention(found: Mapping[str, Any], samples: Sequence[EditSample]) -> str:
    told = found["attention"]
    if all(value is None for value in told["text"]):
        return _section("Where the answer looks", "<p class=soft>This model shows no attention.</p>")
    maps = ""
    for one in told["heat_maps"]:
        picture = samples[one["sample"]].request.image if one["sample"] < len(samples) else None
        if picture is not None:
            drawing = plots.heat_map_plot(one["grid"], picture.convert("RGB"))
            maps += _figure(f"layer {one['layer']}", drawing)
    return _section(
        "Where the answer looks",
        f"<p class=soft>Attention of the last prompt token, mean over heads and {told['questions']} "
        "questions, with one standard error.</p>",
        f"<div class=plots>{_figure('By layer', plots.attention_plot(told))}</div>",
        f"<h3>Over the picture</h3><div class='plots maps'>{maps}</div>" if maps else "",
    )


def _sensitivity(found: Mapping[str, Any]) -> str:
    told = found["sensitivity"]
    lines = []
    for peak in told["peaks"]:
        where = ", ".join(f"{plots.NAMES[group]} at layer {layer}" for group, layer in peak["peak"].items())
        apart = (
            f"; text and image apart in {100 * peak['apart']:.0f} % of resamples" if "apart" in peak else ""
        )
        lines.append(f"<li>σ = {peak['sigma']:g}: highest for {where}{apart}.</li>")
    ratio = told["layer_runs_of_a_plain_way"] / max(1, told["layer_runs"])
    return _section(
        "What the answer depends on",
        f"<p class=soft>Noise behind one layer, at text, image or all tokens, and how far the next token's "
        f"distribution moves; {told['questions']} questions, with one standard error. {ratio:.1f} times "
        "fewer layer runs than running the whole model for each.</p>",
        f"<div "
        f"class=plots>{_figure('By layer and size of noise', plots.sensitivity_plot(told, found['layers']))}"
        f"</div><ul>{''.join(lines)}</ul>",
    )


def _grid(found: Mapping[str, Any]) -> str:
    told = found["layer_grid"]
    parts = [
        "<p class=soft>Effect: a write along the new answer's gradient, found on the edit's own question, "
        f"also tried on a rephrased one and on another picture; of the sizes {_sizes(told['sizes'])} (in "
        "root mean squares of a state) the one that suits the edit's own question best; "
        f"{told['facts']} facts. What counts is the loss of the answer's worst token. A pair's proxy is its "
        f"effect plus its gate's balanced accuracy.</p>"
    ]
    drawings = [_figure("Effect of a write", plots.effects_plot(told, found["layers"]))]
    pairs = [row for row in told["pairs"] if row["vis_layer"] is not None]
    if pairs:
        drawings.append(_figure("Proxy of every pair", plots.pairs_plot(pairs, "proxy", "proxy (of 2)")))
    trained = [row for row in told["trained"] if row["score"] is not None]
    both = [row for row in trained if row["text_layer"] is not None and row["vis_layer"] is not None]
    if len(both) > 3:
        drawings.append(
            _figure("Trained adapters", plots.pairs_plot(both, "score", "must change and must stay (%)"))
        )
        drawings.append(_figure("Proxy and trained adapters", plots.agreement_plot(pairs, both)))
    parts.append(f"<div class='plots pair'>{''.join(drawings)}</div>")
    if told["agreement"]:
        agreement = told["agreement"]
        parts.append(
            f"<p>Rank correlation of the proxy with {agreement['pairs']} trained pairs: "
            f"<b>{agreement['rank_correlation']:.2f}</b>.</p>"
        )
    if trained:
        parts.append(_table(sorted(trained, key=lambda row: -row["score"])))
    return _section("Where a write works", *parts)


def _sizes(sizes: Sequence[float]) -> str:
    return " and ".join(f"{size:g}" for size in sizes)


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    columns = ("reliability", "generality", "locality", "score")
    head = "".join(f"<th scope=col>{name.capitalize()}</th>" for name in columns)
    lines = ""
    for row in rows:
        name = f"{_layer(row['text_layer'])} text, {_layer(row['vis_layer'])} image"
        cells = ""
        for column in columns:
            value, error = row[column], row[f"{column}_stderr"]
            shown = "–" if value is None else f"{value:.1f}"
            cells += f"<td>{shown}<small>{'' if error is None else f'± {error:.1f}'}</small></td>"
        lines += f"<tr><th scope=row>{name}</th>{cells}</tr>"
    return (
        "<p class=soft>% of tokens right, teacher-forced, on held-out facts, with one standard error. The "
        "score is "
        "half what must change (reliability and generality), half what must stay (locality).</p>"
        "<details><summary>All trained pairs</summary><div class=wide><table><thead><tr><td></td>"
        f"{head}</tr></thead><tbody>{lines}</tbody></table></div></details>"
    )


def _layer(number: int | None) -> str:
    return "no" if number is None else str(number)


def _gate(found: Mapping[str, Any]) -> str:
    told = found["gate"]
    drawings = "".join(
        _figure(
            f"{plots.KEY_NAMES[key]} <small>at layer {one['layer']}, its best</small>",
            plots.histogram_plot(one, key.startswith("cosine")),
        )
        for key, one in told["drawn"].items()
    )
    linear = f" Linear inputs are those of {escape(told['linear'])}." if told["linear"] else ""
    return _section(
        "What a gate sees",
        f"<p class=soft>How near questions lie to an edit's key; {told['facts']} facts. Rates are on facts "
        f"that the radius was not chosen on.{linear}</p>",
        f"<div class=plots>{_figure('By key and layer', plots.gate_plot(told, found['layers']))}</div>",
        "<h3>Distances, and the ROC</h3><p class=soft>The dashed line is the radius with the highest "
        "balanced "
        f"accuracy.</p><div class='plots pair'>{drawings}</div>",
    )


def _how(found: Mapping[str, Any]) -> str:
    return _section(
        "How to read this",
        "<ul><li>The facts are for choosing by; figures of a test belong to other facts.</li>"
        "<li>An edit at a layer writes to the states behind it. The gate decides at the earlier of the "
        "two.</li>"
        "<li>Intervals of rates are Wilson's at 95 %, as if every fact asked one question.</li>"
        "<li>Effects and distances are of the frozen model. They say where an adapter can work, not how well "
        "a "
        "trained one does.</li></ul>",
    )
