"""Rows of a JSON or JSONL file, with everything that can be wrong with the file itself."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple


class RawRow(NamedTuple):
    """A row as the file has it.

    Attributes:
        index: number among the rows, from 0.
        place: where it stands, in words.
        record: the parsed object.
        problem: why it could not be parsed, or None.
    """

    index: int  # type: ignore[assignment]  # takes the place of tuple.index
    place: str
    record: Any
    problem: str | None = None


def read_rows(path: str | os.PathLike) -> list[RawRow]:
    """All rows of a JSON list or of a JSONL file; blank lines do not count.

    A line of JSONL that cannot be parsed is a row with a problem; a JSON list that cannot be parsed is an
    error, for nothing after the fault can be trusted.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not UTF-8, not JSON (with line and column), empty, or another top-level type.
    """
    name = str(path)
    if not Path(path).is_file():
        raise FileNotFoundError(f"path={name!r}: no such file. Pass the data set's JSON or JSONL file.")
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"path={name!r} is not UTF-8 text ({error}): pass a JSON or JSONL file.") from error
    first = text.lstrip()[:1]
    if not first:
        raise ValueError(
            f"path={name!r} is empty: the file should hold a JSON list or one JSON object a line."
        )
    if first == "[":
        return _list_rows(text, name)
    if first == "{":
        return _line_rows(text, name)
    raise ValueError(
        f"path={name!r} begins with {text.lstrip()[:20]!r}: the file should hold a JSON list or one JSON "
        "object a line."
    )


def _list_rows(text: str, name: str) -> list[RawRow]:
    try:
        records = json.loads(text)
    except json.JSONDecodeError as error:
        hint = "The file breaks off: download or copy it again" if _is_cut(error) else "Mend the file there"
        raise ValueError(
            f"path={name!r}, line {error.lineno}, column {error.colno}: {error.msg}. {hint}."
        ) from error
    if not records:
        raise ValueError(f"path={name!r} holds an empty list: there is nothing to load.")
    return [RawRow(i, f"row {i}", record, _no_object(record)) for i, record in enumerate(records)]


def _line_rows(text: str, name: str) -> list[RawRow]:
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    rows = []
    for index, (number, line) in enumerate(lines):
        place = f"line {number}"
        try:
            record = json.loads(line)
            rows.append(RawRow(index, place, record, _no_object(record)))
        except json.JSONDecodeError as error:
            cut = "; the line breaks off, so download or copy the file again" if _is_cut(error) else ""
            fault = f"is not JSON at column {error.colno}: {error.msg}{cut}"
            rows.append(RawRow(index, place, None, fault))
    if rows[0].problem and len(rows) > 1:
        _refuse_object(text, name)
    return rows


def _is_cut(error: json.JSONDecodeError) -> bool:
    """Whether the text ends where JSON would go on."""
    return len(error.doc.rstrip()) - error.pos <= 1 or error.msg.startswith("Unterminated")


def _refuse_object(text: str, name: str) -> None:
    """Say so when the file is one object spread over lines, which would read as a row of faults a line."""
    try:
        keys = list(json.loads(text))
    except json.JSONDecodeError:
        return
    raise ValueError(
        f"path={name!r} holds one object with the keys {keys[:8]}: the file should hold a JSON list of rows "
        "or one JSON object a line. Write the list, or each row on one line, to a file of its own."
    )


def _no_object(record: Any) -> str | None:
    return None if isinstance(record, dict) else f"is a {type(record).__name__}: each row should be an object"
