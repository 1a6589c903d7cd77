"""Drawings of the studies, in colours that colour-blind readers tell apart (Okabe and Ito), as SVG."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

TEXT, IMAGE, ALL, TOP, INK = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#777777"
_COLOURS = {"text": TEXT, "image": IMAGE, "all": ALL, "related": IMAGE, "hard": TOP, "unrelated": TEXT}
_KEYS = {"last": TEXT, "text": ALL, "image": IMAGE, "pooled": TOP, "mean": "#E69F00"}
NAMES = {"text": "text tokens", "image": "image tokens", "all": "all tokens"}
KEY_NAMES = {
    "cosine/last": "last token", "cosine/text": "mean text token", "cosine/image": "mean image token",
    "cosine/pooled": "pooled, not fitted", "l2/last": "linear input, last token", "l2/mean": "linear input, "
    "mean",
}  # fmt: skip


def drawn(draw: Callable[[Any], None], width: float = 5.2, height: float = 3.1, columns: int = 1) -> str:
    """An SVG of what `draw` puts on matplotlib axes (a list of them where there are several columns).

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "The page's drawings need matplotlib: pip install 'dualedit-kernels[analyze]'."
        ) from error
    # Text stays text, in the page's font; the same figures give the same file.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "dualedit", "font.size": 9}):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.subplots(1, columns, squeeze=False)[0]
        for one in axes:
            one.spines[["top", "right"]].set_visible(False)
        draw(axes[0] if columns == 1 else axes)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', "", svg, count=1)
    return svg.replace("<svg", '<svg class="plot" role="img"', 1).replace("#000000", "currentColor")


def _band(
    axes: Any, x: Sequence, y: Sequence, error: Sequence | None, colour: str, label: str, **more: Any
) -> None:
    errors = [0.0] * len(y) if error is None else [e or 0.0 for e in error]
    there = [(a, b, e) for a, b, e in zip(x, y, errors, strict=True) if b is not None]
    if not there:
        return
    xs, ys, es = zip(*there, strict=True)
    axes.plot(xs, ys, color=colour, label=label, marker="o", markersize=3, linewidth=1.4, **more)
    if error is not None:
        low, high = ([b + s * e for b, e in zip(ys, es, strict=True)] for s in (-1, 1))
        axes.fill_between(xs, low, high, color=colour, alpha=0.18, linewidth=0)


def _layers(axes: Any) -> None:
    axes.set_xlabel("decoder layer")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.25)


def attention_plot(told: Mapping[str, Any]) -> str:
    """Shares of attention by layer, and what one token gets."""
    layers = list(range(len(told["text"])))

    def draw(axes: Sequence[Any]) -> None:
        for name, label in (
            ("text", "text tokens"),
            ("image", "image tokens"),
            ("first", "first token alone"),
        ):
            style = {"linestyle": ":"} if name == "first" else {}
            colour = _COLOURS.get(name, INK)
            _band(
                axes[0], layers, _percent(told[name]), _percent(told["stderr"][name]), colour, label, **style
            )
        axes[0].set_ylabel("share of attention (%)")
        for name, label, colour in (
            ("text_token", "a text token", TEXT), ("image_token", "an image token", IMAGE),
            ("top_image_tokens", "one of the top 3 image tokens", TOP),
        ):  # fmt: skip
            _band(axes[1], layers, _percent(told[name]), _percent(told["stderr"][name]), colour, label)
        axes[1].set_ylabel("attention to one token (%)")
        for one in axes:
            _layers(one)
            one.set_ylim(bottom=0)
            one.legend(frameon=False, fontsize=8)

    return drawn(draw, 9.0, 3.1, 2)


def _percent(values: Sequence[float | None]) -> list[float | None]:
    return [None if v is None else 100 * v for v in values]


def heat_map_plot(grid: Sequence[Sequence[float]], picture: Any) -> str:
    """Attention over a picture."""

    def draw(axes: Any) -> None:
        high, wide = len(grid), len(grid[0])
        axes.imshow(picture, extent=(0, wide, high, 0), interpolation="nearest")
        axes.imshow(grid, extent=(0, wide, high, 0), cmap="viridis", alpha=0.65, interpolation="nearest")
        axes.set_axis_off()

    return drawn(draw, 1.5, 1.5)


def sensitivity_plot(told: Mapping[str, Any], layers: Sequence[int]) -> str:
    """KL by layer for every size of noise."""
    sigmas = told["sigmas"]

    def draw(axes: Any) -> None:
        for place, sigma in enumerate(sigmas):
            one = axes if len(sigmas) == 1 else axes[place]
            for group in ("text", "image", "all"):
                values = [row[place] for row in told[group]]
                errors = [row[place] for row in told[f"{group}_stderr"]]
                if values:
                    _band(one, layers, values, errors, _COLOURS[group], NAMES[group])
            one.set_title(f"σ = {sigma:g} of a state's root mean square", fontsize=9)
            _layers(one)
            one.set_ylim(bottom=0)
            if place == 0:
                one.set_ylabel("KL, clean to disturbed (nats)")
                one.legend(frameon=False, fontsize=8)

    return drawn(draw, 3.4 * len(sigmas), 3.0, len(sigmas))


def gate_plot(told: Mapping[str, Any], layers: Sequence[int]) -> str:
    """Balanced accuracy and the area under the ROC against look-alikes, by key and layer."""

    def draw(axes: Sequence[Any]) -> None:
        for key, rows in told["keys"].items():
            colour = _KEYS[key.partition("/")[2]]
            style = {"linestyle": "--"} if key.startswith("l2") else {}
            _band(axes[0], layers, _percent(rows["balanced"]), None, colour, KEY_NAMES[key], **style)
            _band(axes[1], layers, rows["auc_hard"], None, colour, KEY_NAMES[key], **style)
        axes[0].set_ylabel("balanced accuracy of one radius (%)")
        axes[1].set_ylabel("area under the ROC, against hard questions")
        for one in axes:
            _layers(one)
        axes[0].legend(frameon=False, fontsize=7)

    return drawn(draw, 9.0, 3.3, 2)


def histogram_plot(drawn_key: Mapping[str, Any], cosine: bool) -> str:
    """Distances of related, hard and unrelated questions, with the radius, and the ROC."""
    found = drawn_key["histogram"]

    def draw(axes: Sequence[Any]) -> None:
        edges = found["edges"]
        for name in ("related", "hard", "unrelated"):
            axes[0].stairs(
                [100 * v for v in found[name]], edges, color=_COLOURS[name], label=name, linewidth=1.4
            )
        if drawn_key["radius"] is not None:
            axes[0].axvline(drawn_key["radius"], color=INK, linestyle="--", linewidth=1)
        axes[0].set_xlabel("1 - cosine to the edit's key" if cosine else "L2 distance to the edit's key")
        axes[0].set_ylabel("questions (%)")
        axes[0].legend(frameon=False, fontsize=8)
        if drawn_key["roc"]:
            x, y = zip(*drawn_key["roc"], strict=True)
            axes[1].plot([100 * v for v in x], [100 * v for v in y], color=INK, linewidth=1.4)
        axes[1].set_xlabel("others let in (%)")
        axes[1].set_ylabel("related let in (%)")
        axes[1].set_xlim(-2, 102)
        axes[1].set_ylim(-2, 102)
        axes[1].grid(alpha=0.25)

    return drawn(draw, 6.4, 2.6, 2)


def effects_plot(told: Mapping[str, Any], layers: Sequence[int]) -> str:
    """The effect of writes at text, image and all tokens, by layer."""

    def draw(axes: Any) -> None:
        for group in ("text", "image", "all"):
            rows = told["effects"][group]
            _band(axes, layers, rows["effect"], rows["stderr"], _COLOURS[group], f"written to {NAMES[group]}")
        axes.set_ylabel("share of the worst token's loss removed")
        _layers(axes)
        axes.legend(frameon=False, fontsize=8)

    return drawn(draw)


def pairs_plot(rows: Sequence[Mapping[str, Any]], value: str, label: str) -> str:
    """A number for every pair of layers, as squares."""
    text = sorted({row["text_layer"] for row in rows if row["text_layer"] is not None})
    vision = sorted({row["vis_layer"] for row in rows if row["vis_layer"] is not None})
    by = {(row["text_layer"], row["vis_layer"]): row[value] for row in rows}

    def draw(axes: Any) -> None:
        grid = [[_or_nan(by.get((t, v))) for v in vision] for t in text]
        shown = axes.imshow(grid, cmap="viridis", origin="lower", aspect="auto")
        axes.set_xticks(range(len(vision)), [str(v) for v in vision], fontsize=8)
        axes.set_yticks(range(len(text)), [str(t) for t in text], fontsize=8)
        axes.set_xlabel("layer whose image tokens are written to")
        axes.set_ylabel("layer whose text tokens\nare written to")
        axes.figure.colorbar(shown, ax=axes, label=label)

    return drawn(draw, 4.6, 3.4)


def _or_nan(value: float | None) -> float:
    return float("nan") if value is None else value


def agreement_plot(pairs: Sequence[Mapping[str, Any]], trained: Sequence[Mapping[str, Any]]) -> str:
    """Trained pairs against the proxy."""
    proxy = {(row["text_layer"], row["vis_layer"]): row["proxy"] for row in pairs}
    both = [
        (proxy[key], row["score"], row["score_stderr"] or 0.0)
        for row in trained
        if (key := (row["text_layer"], row["vis_layer"])) in proxy and row["score"] is not None
    ]

    def draw(axes: Any) -> None:
        x, y, e = zip(*both, strict=True)
        axes.errorbar(x, y, yerr=e, fmt="o", color=TEXT, markersize=4, linewidth=0.8, capsize=2)
        axes.set_xlabel("proxy (effect + gate, of 2)")
        axes.set_ylabel("trained adapters: mean of what\nmust change and must stay (%)")
        axes.grid(alpha=0.25)

    return drawn(draw, 4.4, 3.2)
