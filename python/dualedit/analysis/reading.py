"""Reading what `dualedit eval` wrote: records (JSONL), rows (JSON), or a folder of both.

A file that was cut within its last line, because the run was stopped or has not ended, is read up to there
and says so. Anything else that is wrong is an error that names the file and the line.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..evaluation import PROTOCOLS, SCORINGS, Row
from ..evaluation.journal import MARK, VERSION
from ..evaluation.metrics import BY_KIND, METRICS, MORE_PROBED, PROBED

Key = tuple[str, str, int]
_WANTED = "dualedit eval wrote with --records or --json, or a folder of it"
_PHASES = ("after", "end")
_FIGURES = (*METRICS, *MORE_PROBED, *BY_KIND, "retention")


@dataclass(frozen=True)
class Records:
    """The records of one run.

    Attributes:
        file: where they are.
        arguments: of the run, by option.
        units: (method, protocol, edits stored) to the samples asked, by (phase, sample); a unit is what
            `evaluation.protocols.measure` yields.
        note: what is to be said about the file, or None.
    """

    file: Path
    arguments: Mapping[str, Any]
    units: Mapping[Key, Mapping[tuple[str, int], Mapping]]
    note: str | None = None


@dataclass(frozen=True)
class Results:
    """Everything that was read.

    Attributes:
        records: of each file of records.
        rows: rows of tables, each with the file it is from.
        notes: what is to be said about files.
    """

    records: tuple[Records, ...]
    rows: tuple[tuple[Path, Row], ...]
    notes: tuple[str, ...]


def read_results(path: str | os.PathLike) -> Results:
    """Read a file of records or rows, or a folder of such files.

    Args:
        path: a JSONL file of `dualedit eval --records`, a JSON file of `--json`, or a folder that holds some,
            directly in it; other files of the folder are left alone.

    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: a file is something else or damaged, with the line or row; nothing is in it.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder.")
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in (".json", ".jsonl"))
        files = [file for file in files if file.is_file() and _looks_ours(file)]
        if not files:
            raise ValueError(f"{path} holds no results: pass what {_WANTED}.")
    records: list[Records] = []
    rows: list[tuple[Path, Row]] = []
    for file in files:
        if _is_journal(file):
            records.append(_read_journal(file))
        else:
            rows += [(file, row) for row in _read_rows(file)]
    if not rows and not any(found.units for found in records):
        raise ValueError(f"{path} holds no sample that was asked to the end: let dualedit eval go on first.")
    notes = [found.note for found in records if found.note is not None]
    return Results(tuple(found for found in records if found.units), tuple(rows), tuple(notes))


def _text(file: Path) -> str:
    try:
        text = file.read_text(encoding="utf-8", errors="strict")
    except UnicodeDecodeError as error:
        # A stopped run may have been cut within a letter; anything before the last line is damage.
        data = file.read_bytes()
        if error.start < data.rfind(b"\n"):
            line = data[: error.start].count(b"\n") + 1
            raise ValueError(f"{file}, line {line} is not text in UTF-8.") from error
        text = data.decode("utf-8", errors="replace")
    if not text.strip():
        raise ValueError(f"{file} is empty: pass what {_WANTED}.")
    return text


def _start(file: Path) -> str:
    with file.open(encoding="utf-8", errors="replace") as opened:
        return opened.readline(2**20)


def _is_journal(file: Path) -> bool:
    return _start(file).lstrip().startswith(f'{{"{MARK}"')


def _looks_ours(file: Path) -> bool:
    """Whether a file of a folder is one of results; a damaged one is, too."""
    if _is_journal(file):
        return True
    with file.open(encoding="utf-8", errors="replace") as opened:
        return file.suffix == ".json" and "".join(opened.read(64).split()).startswith('{"rows":')


# ---------------------------------------------------------------------- records


def _read_journal(file: Path) -> Records:
    """A run's records, with those that other processes of an unfinished run keep beside the file."""
    parts = sorted(other for other in file.parent.glob("*") if other.name.startswith(f"{file.name}.part"))
    arguments: Mapping[str, Any] = {}
    units: dict[Key, dict[tuple[str, int], Mapping]] = {}
    cut = False
    for part in (file, *parts):
        head, lines, whole = _lines(part)
        if part == file:
            arguments = head
        for number, unit in lines:
            key, place = _checked(unit, f"{part}, line {number}")
            units.setdefault(key, {})[place] = unit
        cut = cut or not whole
    note = f"{file.name} ends within a line: its whole lines are used." if cut else None
    if parts:
        note = f"{file.name}: the run has not ended; what its processes have asked so far is used."
    return Records(file, arguments, units, note)


def _lines(file: Path) -> tuple[Mapping[str, Any], list[tuple[int, Mapping]], bool]:
    """The arguments of a journal, its other lines with their numbers, and whether the last one is whole."""
    lines = _text(file).split("\n")
    found: list[tuple[int, Any]] = []
    whole = True
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            found.append((number, json.loads(line)))
        except ValueError as error:
            if number < len(lines):
                raise ValueError(f"{file}, line {number} is damaged: {error}.") from error
            whole = False
    if not found:
        return {}, [], whole
    (_, head), *others = found
    if not isinstance(head, dict) or head.get(MARK) != VERSION or not isinstance(head.get("arguments"), dict):
        raise ValueError(f"{file}, line 1 was not written by this version of dualedit eval.")
    return head["arguments"], others, whole


def _checked(unit: Any, where: str) -> tuple[Key, tuple[str, int]]:
    """A record's key, and its phase and sample, after looking at everything that is read of it later."""
    for name, fault in _faults(unit):
        raise ValueError(f"{where}: {name} {fault}; dualedit eval --records writes such lines.")
    key = (unit["method"], unit["protocol"], unit["edits"])
    return key, (unit["phase"], unit["sample"])


def _faults(unit: Any) -> Iterator[tuple[str, str]]:
    if not isinstance(unit, dict):
        yield "it", "is no JSON object"
        return
    wanted = {"method": str, "protocol": str, "edits": int, "phase": str, "sample": int, "id": str,
              "family": str, "target": str, "costs": dict, "probes": list}  # fmt: skip
    yield from _missing(unit, wanted)
    if unit["protocol"] not in PROTOCOLS:
        yield "protocol", f"is {unit['protocol']!r}"
    if unit["phase"] not in _PHASES:
        yield "phase", f"is {unit['phase']!r}"
    for name, value in unit["costs"].items():
        if not isinstance(value, _NUMBER):
            yield f"costs.{name}", f"is {value!r}"
    for place, probe in enumerate(unit["probes"]):
        if not isinstance(probe, dict):
            yield f"probes[{place}]", "is no JSON object"
            return
        yield from _missing(probe, {"metric": str, "prompt": str, "expected": str, "before": str}, place)
        if probe["metric"] not in (*PROBED, *MORE_PROBED):
            yield f"probes[{place}].metric", f"is {probe['metric']!r}"
        for name, kinds in _OPTIONAL.items():
            value = probe.setdefault(name, None)
            if value is not None and not isinstance(value, kinds):
                yield f"probes[{place}].{name}", f"is {value!r}"


_NUMBER = (int, float)
_OPTIONAL = {
    "image": str, "kind": str, "answer": str, "correct": bool, "contains": bool, "fired": bool, "edit": str,
    "edit_prompt": str, "distance": _NUMBER, "radius": _NUMBER, "teacher_forced": _NUMBER,
    "published": _NUMBER,
}  # fmt: skip


def _missing(
    found: Mapping, wanted: Mapping[str, type], place: int | None = None
) -> Iterator[tuple[str, str]]:
    before = "" if place is None else f"probes[{place}]."
    for name, kind in wanted.items():
        if name not in found:
            yield before + name, "is missing"
        if not isinstance(found[name], kind) or isinstance(found[name], bool):
            yield before + name, f"is {found[name]!r}"


# ---------------------------------------------------------------------- rows


def _read_rows(file: Path) -> list[Row]:
    text = _text(file)
    try:
        whole = json.loads(text)
    except ValueError as error:
        line = getattr(error, "lineno", 1)
        raise ValueError(
            f"{file}, line {line} is neither JSON of dualedit eval --json nor a line of --records: {error}."
        ) from error
    rows = whole.get("rows") if isinstance(whole, dict) else None
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"{file}, line 1: no rows of figures; pass what {_WANTED}.")
    return [_row(row, f"{file}, row {number}") for number, row in enumerate(rows, start=1)]


def _row(row: Any, where: str) -> Row:
    if not isinstance(row, dict):
        raise ValueError(f"{where}: it is no JSON object.")
    for name, fault in _missing(row, {"method": str, "n": int, "metrics": dict}):
        raise ValueError(f"{where}: {name} {fault}.")
    scoring, protocol = row.get("scoring", "free"), row.get("protocol", "single")
    if scoring not in SCORINGS or protocol not in PROTOCOLS:
        raise ValueError(f"{where}: scoring {scoring!r}, protocol {protocol!r} are not both known.")
    return Row(
        row["method"], row["n"], _figures(row["metrics"], f"{where}, metrics"),
        _figures(row.get("stderr") or {}, f"{where}, stderr"), scoring, protocol, row.get("edits", 1),
        interval=_intervals(row.get("interval"), where),
        contains=_figures(row["contains"], f"{where}, contains") if row.get("contains") else None,
        end=_end(row.get("end"), where),
        costs=_figures(row["costs"], f"{where}, costs", ()) if row.get("costs") else None,
    )  # fmt: skip


def _figures(found: Any, where: str, names: tuple[str, ...] = _FIGURES) -> dict[str, float | None]:
    """Numbers by name; of `names`, those that are not there are None, and others are left out."""
    if not isinstance(found, dict):
        raise ValueError(f"{where} is {found!r}: numbers by name are wanted.")
    chosen = {name: found.get(name) for name in names or found}
    for name, value in chosen.items():
        if value is not None and (not isinstance(value, _NUMBER) or isinstance(value, bool)):
            raise ValueError(f"{where}: {name} is {value!r}: a number or null is wanted.")
    return chosen


def _intervals(found: Any, where: str) -> dict[str, list[float] | None] | None:
    if found is None:
        return None
    pairs = found.items() if isinstance(found, dict) else ()
    good = {
        name: pair
        for name, pair in pairs
        if pair is None
        or isinstance(pair, list) and len(pair) == 2 and all(isinstance(value, _NUMBER) for value in pair)
    }
    if not isinstance(found, dict) or len(good) < len(found):
        raise ValueError(f"{where}: interval holds something else than [low, high] by name.")
    return {name: good.get(name) for name in _FIGURES}


def _end(found: Any, where: str) -> dict[str, Mapping] | None:
    if found is None:
        return None
    if not isinstance(found, dict):
        raise ValueError(f"{where}: end is {found!r}.")
    return {
        "metrics": _figures(found.get("metrics"), f"{where}, end"),
        "stderr": _figures(found.get("stderr") or {}, f"{where}, end"),
        "interval": _intervals(found.get("interval"), where) or dict.fromkeys(_FIGURES),
    }
