"""Figures of `dualedit eval` as tables on the terminal: a line a metric, a column a method."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .demo import figure

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from ..evaluation import Row

_BESIDE, _COLUMN = 32, 24  # characters of metrics and their meanings, and of a method


def print_tables(console: Console, rows: Sequence[Row], titles: dict[str, str]) -> None:
    """A table for each scoring and number of edits.

    Args:
        titles: scoring to its name.
    """
    groups: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.scoring, row.edits), []).append(row)
    for (scoring, edits), own in groups.items():
        asked = ", ".join(dict.fromkeys(str(row.n) for row in own))
        stored = "1 edit" if edits == 1 else f"{edits} edits"
        console.print(
            f"\n[bold]{titles[scoring].capitalize()}[/bold], {stored} stored, {asked} facts asked about: "
            "% right [95% interval]",
            soft_wrap=True,
        )
        fitting = max(1, (console.width - _BESIDE) // _COLUMN)
        for first in range(0, len(own), fitting):
            console.print(figures_table(own[first : first + fitting]))


def figures_table(rows: Sequence[Row]) -> Table:
    """The metrics that some row has, the two that sum up first."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from ..analysis.settings import columns_of
    from ..analysis.wording import IN_ORDER, MEANINGS, TITLES, method_name

    table = Table(box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    table.add_column("", no_wrap=True)
    for row in rows:
        table.add_column(method_name(row.method), justify="right", no_wrap=True)
    table.add_column("", style="dim")
    for name in columns_of(rows, IN_ORDER):
        cells = [figure(row, name) if name in row.metrics else "-" for row in rows]
        table.add_row(TITLES[name], *cells, MEANINGS[name])
    return table
