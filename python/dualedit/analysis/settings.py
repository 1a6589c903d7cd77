"""Results sorted into settings: what was asked in the same way about the same facts, and may be compared."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..evaluation import PROTOCOLS, SCORINGS, Plan, Row
from ..evaluation.results import results_of
from .reading import Records, Results

_SCORES = {"free": "correct", "teacher_forced": "teacher_forced", "published": "published"}
# Runs that differ in these asked the same questions.
_NOT_FACTS = ("--methods", "--scoring", "--edits", "--protocol", "--adapter", "--layer", "--weights",
              "--published-threshold", "version")  # fmt: skip


@dataclass
class Setting:
    """One protocol, one number of edits, one set of facts.

    Attributes:
        protocol: "single", "batch" or "sequential".
        edits: stored at once (single: 1).
        facts: how many were asked about, at most.
        source: names of the files.
        arguments: of the run, by option; empty for rows alone.
        rows: scoring to the rows of the methods.
        units: method to the samples that were asked, in their order: the last time they were (of a sequence,
            after its last edit). Empty for rows alone.
        late: whether `units` are those from the end of a sequence.
        notes: what is to be said.
    """

    protocol: str
    edits: int
    facts: int
    source: list[str]
    arguments: Mapping[str, Any]
    rows: dict[str, list[Row]] = field(default_factory=dict)
    units: dict[str, list[Mapping]] = field(default_factory=dict)
    late: bool = False
    notes: list[str] = field(default_factory=list)

    @property
    def title(self) -> str:
        """The setting in a few words."""
        asked = f"{self.facts} fact{'' if self.facts == 1 else 's'}"
        stored = f"{self.edits:,} edit{'' if self.edits == 1 else 's'}"
        if self.protocol == "single":
            return f"One edit at a time, {asked}"
        told = f", {asked} asked" if self.facts != self.edits else ""
        how = "at once" if self.protocol == "batch" else "one after the other"
        return f"{stored} {how}{told}"


def settings_of(results: Results) -> list[Setting]:
    """The settings of everything that was read, by protocol and number of edits.

    Figures of records are worked out anew; rows of a JSON file that say the same are left out.
    """
    found: dict[str, Setting] = {}
    for records in results.records:
        _add_records(found, records)
    from_records = [row for setting in found.values() for rows in setting.rows.values() for row in rows]
    for file, row in results.rows:
        if not any(_same(row, other) for other in from_records):
            _add_row(found, file, row)
    return sorted(found.values(), key=lambda one: (PROTOCOLS.index(one.protocol), one.edits))


def score_of(probe: Mapping) -> float | None:
    """How right an answer was, in [0, 1]: by free generation where that was asked, else token by token."""
    for name in _SCORES.values():
        if probe[name] is not None:
            return float(probe[name])
    return None


def _add_records(found: dict[str, Setting], records: Records) -> None:
    about = {name: value for name, value in records.arguments.items() if name not in _NOT_FACTS}
    for (method, protocol, count), units in records.units.items():
        after, end, note = _phases(units)
        if not after:
            continue
        key = json.dumps([protocol, count, about], sort_keys=True)
        setting = found.get(key)
        if setting is None:
            edits = 1 if protocol == "single" else count
            setting = found[key] = Setting(protocol, edits, len(after), [], records.arguments)
        name = method if method not in setting.units else f"{method} ({records.file.stem})"
        if records.file.name not in setting.source:
            setting.source.append(records.file.name)
        setting.facts = max(setting.facts, len(after))
        setting.late = setting.late or bool(end)
        setting.units[name] = end or after
        probes = [probe for unit in after for probe in unit["probes"]]
        scorings = tuple(s for s in SCORINGS if any(probe[_SCORES[s]] is not None for probe in probes))
        seed = records.arguments.get("--seed")
        plan = Plan(protocol, scorings or ("free",), seed=seed if isinstance(seed, int) else 0)
        for result in results_of([*after, *end], name, plan, count):
            setting.rows.setdefault(result.row.scoring, []).append(result.row)
        wanted = len(_asked(plan, records.arguments, count))
        if len(after) < wanted:
            setting.notes.append(f"{name}: {len(after)} of {wanted} facts have been asked so far.")
        if note:
            setting.notes.append(f"{name}: {note}")


def _phases(units: Mapping[tuple[str, int], Mapping]) -> tuple[list[Mapping], list[Mapping], str]:
    """The samples after their edit and at the end of a sequence; an end that is not whole is left out."""
    ordered = [units[place] for place in sorted(units)]
    after = [unit for unit in ordered if unit["phase"] == "after"]
    end = [unit for unit in ordered if unit["phase"] == "end"]
    if end and [_asked_in(unit) for unit in after] != [_asked_in(unit) for unit in end]:
        return after, [], "not everything has been asked again after the last edit; that is left out."
    return after, end, ""


def _asked_in(unit: Mapping) -> tuple:
    return unit["sample"], [probe["metric"] for probe in unit["probes"]]


def _asked(plan: Plan, arguments: Mapping[str, Any], count: int) -> list[int]:
    asked = arguments.get("--asked")
    return Plan(plan.protocol, asked=asked if isinstance(asked, int) and asked > 0 else None).places(count)


def _add_row(found: dict[str, Setting], file: Path, row: Row) -> None:
    key = json.dumps([str(file), row.protocol, row.edits, row.n])
    if key not in found:
        found[key] = Setting(row.protocol, row.edits, row.n, [file.name], {})
    found[key].rows.setdefault(row.scoring, []).append(row)


def _same(one: Row, other: Row) -> bool:
    if (one.method, one.scoring, one.protocol, one.edits, one.n) != (
        other.method, other.scoring, other.protocol, other.edits, other.n,
    ):  # fmt: skip
        return False
    return all(_close(value, other.metrics.get(name)) for name, value in one.metrics.items())


def _close(one: float | None, other: float | None) -> bool:
    if one is None or other is None:
        return one is other
    return math.isclose(one, other, abs_tol=1e-6)


def columns_of(rows: Sequence[Row], names: Sequence[str]) -> list[str]:
    """Of the named metrics, those that some row has a figure for."""
    return [name for name in names if any(row.metrics.get(name) is not None for row in rows)]
