"""Draws benchmark rows: one panel per operator, the time of every implementation, and the floor below them.

python -m benchmarks.plots benchmarks/results/<machine>.json plot.png
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def draw(rows: list[dict], floors: list[dict], path: Path) -> None:
    """Draw the rows of one or more operators into a PNG file; needs matplotlib."""
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install matplotlib") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    operators = list(dict.fromkeys(row["op"] for row in rows))
    size = (14, 6 * len(operators))
    figure, panels = pyplot.subplots(len(operators), 1, figsize=size, squeeze=False, layout="constrained")
    for panel, op in zip(panels[:, 0], operators, strict=True):
        _panel(panel, op, [r for r in rows if r["op"] == op], [f for f in floors if f["op"] == op])
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    print(f"wrote {path}")


def _said(name: str, value: object) -> str:
    if isinstance(value, bool):
        return name if value else ""
    return f"{name} {value}"


def _panel(panel, op: str, rows: list[dict], floors: list[dict]) -> None:
    shapes = list(dict.fromkeys(json.dumps(row["shape"]) for row in rows))
    varying = [name for name in rows[0]["shape"] if len({json.loads(s).get(name) for s in shapes}) > 1]
    many = len(shapes) > 8
    labels = [
        (", " if many else "\n").join(filter(None, (_said(n, json.loads(shape).get(n)) for n in varying)))
        for shape in shapes
    ]
    series = list(dict.fromkeys((row["impl"], row["dtype"]) for row in rows))
    for number, (impl, dtype) in enumerate(series):
        points = [
            (shapes.index(json.dumps(r["shape"])), r)
            for r in rows
            if (r["impl"], r["dtype"]) == (impl, dtype)
        ]
        offset = 0.7 * (number / max(1, len(series) - 1) - 0.5)
        ours = impl.startswith(op)
        panel.errorbar(
            [x + offset for x, _ in points],
            [r["median_ms"] for _, r in points],
            yerr=[
                [r["median_ms"] - r["min_ms"] for _, r in points],
                [r["max_ms"] - r["median_ms"] for _, r in points],
            ],
            fmt="D" if ours else "o",
            markersize=7 if ours else 5,
            capsize=2,
            label=f"{impl}, {dtype}",
        )
    for number, name in enumerate(dict.fromkeys(floor["name"] for floor in floors)):
        line = [(shapes.index(json.dumps(f["shape"])), f["ms"]) for f in floors if f["name"] == name]
        style = ("-", "--", ":")[number % 3]
        for x, ms in line:
            panel.hlines(
                ms, x - 0.42, x + 0.42, "black", style, label=f"floor: {name}" if x == line[0][0] else None
            )
    panel.set_yscale("log")
    panel.set_ylabel("milliseconds (median, min to max)")
    panel.set_xticks(range(len(shapes)), labels, fontsize=7 if many else 8, rotation=90 if many else 0)
    panel.set_title(f"{op} ({rows[0]['device']}, {rows[0]['threads']} threads)")
    panel.grid(True, axis="y", which="both", alpha=0.25)
    panel.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))


if __name__ == "__main__":
    _content = json.loads(Path(sys.argv[1]).read_text())
    draw(_content["rows"], _content["floors"], Path(sys.argv[2]))
