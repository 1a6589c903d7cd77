"""Which of the goals on a GPU a file of results reaches.

    python -m benchmarks.gpu.goals benchmarks/results/<gpu>.json

Every goal is computed from rows, floors and ratios that the benchmarks wrote: medians, and where several
shapes answer for a goal the worst of them. "Not measured" is a goal of which a row or a floor is missing,
be it that the benchmark did not get there or that a result was wrong and got no time. Attention is that of
bf16 weights; its roofline is the slower of its products at a large product's rate and its bytes at a large
copy's bandwidth. Ours and compiled peers stand in CUDA graphs; the published code does not, and is held
against ours without one. Closed rows are measured in place, where nothing has to be copied.

Source: the targets of this project; none is a promise, and a missed one is no error.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

DEVICE, DTYPE = "cuda", "bfloat16"
TOKENS, FEW_KEYS = 576, 1000  # of the image, and of the small table
SHARES = {1: 0.30, 8: 0.55, 32: 0.65}  # of the roofline by rows, all of them open
FASTER_PEER, FASTER_PUBLISHED, FASTER_QUARTER = 1.1, 2.7, 3.0
CLOSED_US, LOOKUP_US, MODEL_RATIO = 8.0, 6.0, 1.01
BANDWIDTH = {1: 0.85, 8: 0.85, 16: 0.85, 32: 0.80, 128: 0.80}  # of a copy's, by queries
KEYS = {"fp32": "", "bf16": " bf16 keys"}  # what the lookup's rows are called
METHODS, PARTS = ("dualedit", "balancedit"), ("prefill", "decode")
GRAPH = ", CUDA graph"


@dataclass
class Finding:
    """A goal and what was measured of it.

    limit, measured: in ``unit``; measured is None if something is missing. outcome: "reached", "missed",
    "not resolved" (the interval of a ratio holds the limit) or "not measured".
    """

    goal: str
    limit: float
    at_least: bool
    unit: str
    measured: float | None
    outcome: str


def findings(content: dict[str, list[dict]]) -> list[Finding]:
    """All goals, in the order of the table."""
    results = Results(content)
    return [*attention(results), *lookup(results), *whole_model(results)]


def table(found: list[Finding]) -> str:
    """A line for each goal, and one that counts them."""
    lines = []
    for one in found:
        sign = ">=" if one.at_least else "<="
        measured = "-" if one.measured is None else _said(one.measured, one.unit)
        lines.append(
            f"{one.goal:<66} {sign} {_said(one.limit, one.unit):<8} {measured:>10}  {one.outcome}"
        )
    counts = Counter(one.outcome for one in found)
    return "\n".join([*lines, ", ".join(f"{count} {name}" for name, count in counts.items())])


class Results:
    """Rows of a GPU and what belongs to their shapes."""

    def __init__(self, content: dict[str, list[dict]]):
        self.rows = [row for row in content.get("rows", []) if row["device"] == DEVICE]
        self.floors, self.ratios = content.get("floors", []), content.get("ratios", [])

    def shapes(self, op: str, **sizes: object) -> list[dict]:
        """The measured shapes of an operator that have these sizes, each once."""
        found = [r["shape"] for r in self.rows if r["op"] == op and sizes.items() <= r["shape"].items()]
        return [shape for i, shape in enumerate(found) if shape not in found[:i]]

    def ms(self, op: str, shape: dict, impl: str, suffix: str = "", dtype: str | None = None) -> float | None:
        """The median of an implementation; "ours" is the operator's own, whichever backend ran."""
        pattern = re.escape(op) + r" \([^)]*\)" if impl == "ours" else re.escape(impl)
        for row in self.rows:
            fits = row["op"] == op and row["shape"] == shape and dtype in (None, row["dtype"])
            if fits and re.fullmatch(pattern + re.escape(suffix), row["impl"]):
                return row["median_ms"]
        return None

    def floor(self, op: str, shape: dict, name: str) -> float | None:
        """Milliseconds of a floor."""
        of_name = [f["ms"] for f in self.floors if (f["op"], f["shape"], f["name"]) == (op, shape, name)]
        return of_name[0] if of_name else None


def attention(results: Results) -> Iterator[Finding]:
    """Open rows against the roofline, the compiled peer and the published algorithm; closed rows alone."""
    op = "gated_edit_attention"

    def of(name: str, rows: int, open_rows: int, limit: float, unit: str, over, under) -> Finding:
        shapes = results.shapes(op, batch=rows, open=open_rows, tokens=TOKENS)
        values = [_quotient(over(shape), under(shape)) for shape in shapes]
        return _finding(f"attention, B={rows}, {name}", limit, unit != "us", unit, values)

    def timed(impl: str, suffix: str = ""):
        return lambda shape: results.ms(op, shape, impl, suffix, DTYPE)

    def roofline(shape: dict) -> float | None:
        parts = ("products at full rate", "bytes at full bandwidth")
        floors = [results.floor(op, shape, f"{DTYPE} {part}") for part in parts]
        return None if None in floors else max(floors)

    graph, peer = timed("ours", GRAPH), timed("cached K/V compiled", GRAPH)
    for rows, share in SHARES.items():
        yield of("all open: share of the roofline", rows, rows, share, "%", roofline, graph)
    for rows in SHARES:
        yield of("all open: speed, compiled SDPA in a graph = 1", rows, rows, FASTER_PEER, "x", peer, graph)
    for rows in SHARES:
        name = "all open: speed, published algorithm = 1"
        yield of(name, rows, rows, FASTER_PUBLISHED, "x", timed("published"), timed("ours"))
    yield of("8 open: speed, compiled SDPA in a graph = 1", 32, 8, FASTER_QUARTER, "x", peer, graph)
    for rows in SHARES:
        closed = timed("ours", f", in place{GRAPH}")
        yield of("closed, in place, in a graph", rows, 0, CLOSED_US, "us", closed, lambda shape: 1e-3)


def lookup(results: Results) -> Iterator[Finding]:
    """Tables beyond the caches against the bandwidth of a copy, and a query among 1,000 keys."""
    op = "nearest_key"
    for keys, suffix in KEYS.items():
        for batch, share in BANDWIDTH.items():
            values = []
            for shape in results.shapes(op, batch=batch):
                floor = results.floor(op, shape, f"read {keys} keys once")
                if floor is not None:  # else the caches hold these keys
                    values.append(_quotient(floor, results.ms(op, shape, "ours", suffix + GRAPH)))
            name = f"lookup, B={batch}, large table, {keys} keys: share of copy bandwidth"
            yield _finding(name, share, True, "%", values)
    for keys, suffix in KEYS.items():
        shapes = results.shapes(op, batch=1, keys=FEW_KEYS)
        values = [_quotient(results.ms(op, shape, "ours", suffix + GRAPH), 1e-3) for shape in shapes]
        yield _finding(f"lookup, B=1, 1,000 {keys} keys, in a graph", LOOKUP_US, False, "us", values)


def whole_model(results: Results) -> Iterator[Finding]:
    """What stored edits cost a question that none answers, judged by the interval of the ratio."""
    for method in METHODS:
        for part in PARTS:
            shapes = results.shapes("whole_model", method=method, part=part)
            found = [
                ratio
                for ratio in results.ratios
                if (ratio["op"], ratio["impl"]) == ("whole_model", method) and ratio["shape"] in shapes
            ]
            name = f"whole model, {method}, {part}: time, plain model = 1"
            finding = _finding(name, MODEL_RATIO, False, "x", [ratio["ratio"] for ratio in found])
            if found:
                worst = max(found, key=lambda ratio: ratio["ratio"])
                finding.outcome = (
                    "reached" if worst["high"] <= MODEL_RATIO
                    else "missed" if worst["low"] > MODEL_RATIO
                    else "not resolved"
                )  # fmt: skip
            yield finding


def _finding(name: str, limit: float, at_least: bool, unit: str, values: list[float | None]) -> Finding:
    """The worst of the values against the limit; not measured if there is none, or one is missing."""
    if not values or None in values:
        return Finding(name, limit, at_least, unit, None, "not measured")
    worst = min(values) if at_least else max(values)
    reached = worst >= limit if at_least else worst <= limit
    return Finding(name, limit, at_least, unit, worst, "reached" if reached else "missed")


def _quotient(over: float | None, under: float | None) -> float | None:
    return None if over is None or under is None else over / under


def _said(value: float, unit: str) -> str:
    if unit == "%":
        return f"{value:.1%}"
    return f"{value:.3f} x" if unit == "x" else f"{value:.2f} us"


def main(argv: list[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, help="a file that the benchmarks wrote on a GPU")
    print(table(findings(json.loads(parser.parse_args(argv).results.read_text()))))


if __name__ == "__main__":
    main()
