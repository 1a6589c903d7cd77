"""The table of a report as Markdown, for a README or a pull request."""

from __future__ import annotations

from collections.abc import Sequence

from ..evaluation import Row
from .reading import Results
from .settings import columns_of, settings_of
from .wording import IN_ORDER, SCORINGS, TITLES, method_name


def markdown_tables(results: Results) -> str:
    """A table for each setting and scoring, with 95% intervals (or, where rows have none, standard errors).

    Args:
        results: from `read_results`.
    """
    parts = []
    for setting in settings_of(results):
        for scoring, rows in setting.rows.items():
            parts.append(f"**{setting.title}. {SCORINGS[scoring]}**, {_measure(rows)}\n\n{_table(rows)}")
        parts += [f"{_plain(note)}\n" for note in setting.notes]
    parts += [f"{_plain(note)}\n" for note in results.notes]
    return "\n".join(parts)


def figure(row: Row, name: str) -> tuple[str, str]:
    """A metric of a row in words: the percentage, and how sure it is ("" where that is not known)."""
    value, error = row.metrics.get(name), row.stderr.get(name)
    if value is None:
        return "–", ""
    pair = None if row.interval is None else row.interval.get(name)
    if pair is not None:
        return f"{value:.1f}", f"[{pair[0]:.1f}, {pair[1]:.1f}]"
    return f"{value:.1f}", "" if error is None else f"± {error:.1f}"


def _measure(rows: Sequence[Row]) -> str:
    if all(row.interval is not None for row in rows):
        return "% [95% interval]:"
    return "% ± standard error:"


def _table(rows: Sequence[Row]) -> str:
    names = columns_of(rows, IN_ORDER)
    lines = ["| | " + " | ".join(TITLES[name] for name in names) + " |", "|---" * (1 + len(names)) + "|"]
    for row in rows:
        cells = [_cell(*figure(row, name)) for name in names]
        lines.append(f"| {_plain(method_name(row.method))} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(value: str, sure: str) -> str:
    return f"{value} {sure}".strip()


def _plain(text: str) -> str:
    """Text that no table or heading of Markdown trips over."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
