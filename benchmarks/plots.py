"""Draws benchmark rows: time against every size that was varied, on two logarithmic axes, with the roofline.

python -m benchmarks.plots benchmarks/results/<machine>.json plot.png

One panel for each size and setting of the others: the lookup against N (keys) for each B (batch), and against
B for each N. A line is an implementation; black ones are what the machine allows. Reading keys from memory
takes a time in proportion to their bytes, so one measured speed gives that line for all N; it is dotted where
caches may hold the keys, which is then faster than memory. Lookups that give keys up early, or that read
codes in place of keys, read less and may lie below it.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common import BEYOND_CACHES

AXES = {"keys": "N (keys)", "tokens": "tokens", "batch": "B (rows)"}
COLUMNS = 3
_READ = {"read fp32 keys once": 4, "read bf16 keys once": 2}  # floors by the bytes of a value


@dataclass
class Panel:
    """The rows of one operator that differ in one size, ``axis``, alone."""

    op: str
    axis: str
    setting: str
    rows: list[dict]


def draw(rows: list[dict], floors: list[dict], path: Path) -> None:
    """Draw the rows of one or more operators into a PNG file; needs matplotlib."""
    from PIL import Image

    picture = figure(rows, floors)
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = io.BytesIO()
    picture.savefig(whole, dpi=100)
    colours = Image.open(whole).convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE)
    colours.save(path, optimize=True)  # a third of the bytes
    print(f"wrote {path}")


def figure(rows: list[dict], floors: list[dict]):
    """A matplotlib figure of the rows: the panels of each operator and size, three in a line."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install matplotlib") from error

    blocks: dict[tuple[str, str], list[Panel]] = {}
    for panel in panels(rows):
        blocks.setdefault((panel.op, panel.axis), []).append(panel)
    lines = [part for block in blocks.values() for part in _in_lines(block)]
    result = Figure(figsize=(4.8 * COLUMNS + 4.2, 4.2 * len(lines)), layout="constrained")
    widths = [1.0] * COLUMNS + [0.7]  # the last column is for what the colours mean
    grid = result.subplots(len(lines), COLUMNS + 1, squeeze=False, width_ratios=widths)
    entries: dict[str, dict[str, object]] = {}
    beside = {}
    for places, line in zip(grid, lines, strict=True):
        op = line[0].op
        of_op = [row for row in rows if row["op"] == op]
        beside.setdefault(op, places[COLUMNS])
        for place, panel in zip(places, line, strict=False):
            _draw_panel(place, panel, _names(of_op), [f for f in floors if f["op"] == op])
            handles, labels = place.get_legend_handles_labels()
            entries.setdefault(op, {}).update(zip(labels, handles, strict=True))
        for place in places[len(line) :]:
            place.set_axis_off()
    for op, place in beside.items():
        place.legend(entries[op].values(), entries[op].keys(), fontsize=8.5, loc="upper left")
    return result


def panels(rows: list[dict]) -> Iterator[Panel]:
    """All panels of the rows; one that differs from the others in no size is drawn as points of its own."""
    for op in dict.fromkeys(row["op"] for row in rows):
        of_op = [row for row in rows if row["op"] == op]
        drawn: list[dict] = []
        for axis in [name for name in AXES if name in of_op[0]["shape"]]:
            for panel in _panels_of(op, axis, of_op):
                if len({row["shape"][axis] for row in panel.rows}) > 1:
                    drawn += panel.rows
                    yield panel
        alone = [row for row in of_op if row not in drawn]
        if alone:
            sizes = [n for n, v in alone[0]["shape"].items() if type(v) in (int, float)]
            yield from _panels_of(op, next((n for n in reversed(AXES) if n in sizes), sizes[0]), alone)


def roofline(panel: Panel, floors: list[dict]) -> dict[str, list[tuple[float, float, bool]]]:
    """For each floor of the panel's operator its (size, milliseconds, whether it binds) in this panel."""
    shapes = [json.loads(shape) for shape in dict.fromkeys(json.dumps(row["shape"]) for row in panel.rows)]
    lines: dict[str, list[tuple[float, float, bool]]] = {}
    for name in dict.fromkeys(floor["name"] for floor in floors):
        of_name = [floor for floor in floors if floor["name"] == name]
        if name in _READ:
            values = of_name[0]["shape"]["keys"] * of_name[0]["shape"]["dim"]
            each = of_name[0]["ms"] / values
            points = []
            for shape in shapes:
                values = shape["keys"] * shape["dim"]
                points.append((shape[panel.axis], each * values, values * _READ[name] >= BEYOND_CACHES))
        else:
            points = [(f["shape"][panel.axis], f["ms"], True) for f in of_name if f["shape"] in shapes]
        if points:
            lines[name] = sorted(points)
    return lines


def _panels_of(op: str, axis: str, rows: list[dict]) -> list[Panel]:
    """One panel for each setting of all but ``axis``; for the share of open rows if their being some is not
    enough to tell two rows of a size apart."""
    groups: dict[str, list[dict]] = {}
    for row in rows:
        rest = {n: v for n, v in row["shape"].items() if n != axis}
        if axis == "batch" and "open" in rest:
            rest["open"] = rest["open"] > 0
        groups.setdefault(json.dumps([rest, row["device"], row["threads"]]), []).append(row)
    varying = {n for row in rows for n, v in row["shape"].items() if v != rows[0]["shape"].get(n)}
    result = []
    for group in groups.values():
        parts: dict[float, list[dict]] = {}
        sizes = {json.dumps(row["shape"]) for row in group}
        crowded = len(sizes) > len({row["shape"][axis] for row in group})
        for row in group:
            shape = row["shape"]
            parts.setdefault(shape["open"] / shape["batch"] if crowded else 0.0, []).append(row)
        for share, part in parts.items():
            shape = part[0]["shape"] | ({"open": f"{share:.0%} of rows"} if crowded else {})
            if "open" in shape and not crowded:
                shape["open"] = "some rows" if shape["open"] else "none"
            said = [_said(n, v) for n, v in shape.items() if n != axis and n in varying]
            place = f"{part[0]['device']}, {part[0]['threads']} threads"
            result.append(Panel(op, axis, ", ".join(filter(None, [*said, place])), part))
    return result


def _said(name: str, value: object) -> str:
    if name == "near":
        return "near a key" if value else "far from all keys"
    if isinstance(value, bool):
        return name if value else ""
    return f"{ {'batch': 'B', 'keys': 'N'}.get(name, name)} {value}"


def _in_lines(block: list[Panel]) -> list[list[Panel]]:
    """At most three to a line; those alike in being near, massive and so on stay together if they can."""
    kinds: dict[tuple, list[Panel]] = {}
    for panel in block:
        flags = tuple((n, v) for n, v in panel.rows[0]["shape"].items() if isinstance(v, bool))
        kinds.setdefault(flags, []).append(panel)
    lines: list[list[Panel]] = [[]]
    for kind in kinds.values():
        for i in range(0, len(kind), COLUMNS):
            part = kind[i : i + COLUMNS]
            if len(lines[-1]) + len(part) > COLUMNS:
                lines.append([])
            lines[-1] += part
    return lines


def _names(rows: list[dict]) -> dict[tuple[str, str], int]:
    """A number for each implementation of an operator, which is its colour in all panels."""
    return {key: i for i, key in enumerate(dict.fromkeys((row["impl"], row["dtype"]) for row in rows))}


def _draw_panel(place, panel: Panel, names: dict[tuple[str, str], int], floors: list[dict]) -> None:
    for (impl, dtype), number in names.items():
        of_name = [row for row in panel.rows if (row["impl"], row["dtype"]) == (impl, dtype)]
        of_name.sort(key=lambda row: row["shape"][panel.axis])
        middle = [row["median_ms"] for row in of_name]
        ours = impl.startswith(panel.op)
        if of_name:
            place.errorbar(
                [row["shape"][panel.axis] for row in of_name],
                middle,
                yerr=[
                    [row["median_ms"] - row["min_ms"] for row in of_name],
                    [row["max_ms"] - row["median_ms"] for row in of_name],
                ],
                fmt="D-" if ours else "o--",
                linewidth=2 if ours else 1,
                markersize=7 if ours else 5,
                color=f"C{number}",
                capsize=2,
                label=f"{impl}, {dtype}",
            )
    for number, (name, points) in enumerate(roofline(panel, floors).items()):
        style = dict(color="black", linewidth=2.5 if number == 0 else 1.2, zorder=1)
        for (x, ms, bound), (next_x, next_ms, next_bound) in zip(points, points[1:], strict=False):
            place.plot([x, next_x], [ms, next_ms], "-" if bound and next_bound else ":", **style)
        binding = [(x, ms) for x, ms, bound in points if bound]
        place.plot(*zip(*binding or [(None, None)], strict=True), "_-", label=f"roofline: {name}", **style)
    place.set(xscale="log", yscale="log", xlabel=AXES.get(panel.axis, panel.axis), ylabel="milliseconds")
    place.set_title(f"{panel.op}\n{panel.setting}", fontsize=10)
    sizes = {row["shape"][panel.axis]: row["shape"] for row in panel.rows}
    labels = [f"{x}\n({s['open']} open)" if s.get("open") else str(x) for x, s in sizes.items()]
    place.set_xticks(list(sizes), labels)
    place.set_xticks([], minor=True)
    place.grid(True, which="both", alpha=0.25)


if __name__ == "__main__":
    _content = json.loads(Path(sys.argv[1]).read_text())
    draw(_content["rows"], _content["floors"], Path(sys.argv[2]))
