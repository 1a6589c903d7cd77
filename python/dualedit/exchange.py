"""Edits in files that people and other programs write: JSON lines with pictures, and tables (CSV)."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .files import write_whole
from .models.images import noted_picture, open_image

_LONGEST = 64 * 2**20  # characters of one line
_LISTS = ("rephrases", "tags")
_COLUMNS = {"question": "prompt", "answer": "target", "picture": "image", "file": "image"}
_KNOWN = ("image", "prompt", "target", "rephrases", "author", "note", "tags", "expires")
# Of a record: what another model has to find out anew.
_OWN = ("replaces", "overlaps", "tried", "seconds", "steps", "probability", "answer", "failed", "template")


def export_lines(records: Iterable[tuple[int, Mapping[str, Any]]]) -> str:
    """JSON lines of edits: question, answer, picture (PNG in base64), and what people noted.

    Args:
        records: number and record of each edit.
    """
    lines = []
    for edit_id, record in records:
        kept = {name: value for name, value in record.items() if name not in _OWN}
        lines.append(json.dumps({"id": edit_id, **kept}, ensure_ascii=False, allow_nan=False))
    return "".join(line + "\n" for line in lines)


def write_export(file: str | os.PathLike[str], records: Iterable[tuple[int, Mapping[str, Any]]]) -> None:
    """Write `export_lines` to a file, whole or not at all. Raises OSError."""
    write_whole(Path(file), export_lines(records))


def read_requests(file: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Edits to be told, from JSON lines (.jsonl, .json) or a table (.csv), as `Editor.edit_many` takes them.

    A line is a mapping, a table has a heading: image (a path from the file's folder on, or empty), prompt (or
    question), target (or answer), and if need be rephrases, author, note, tags, expires; lists in a table are
    separated by "|". A line of an export holds its picture itself.

    Returns:
        one mapping for each edit; those of an export have "uid" and "disabled" too.

    Raises:
        ValueError: names the line and what is wrong with it.
    """
    path = Path(file)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8: {error}.") from error
    rows = _table(path, text) if path.suffix.lower() == ".csv" else _lines(path, text)
    found = []
    for number, row in rows:
        try:
            found.append(_request(row, path.parent))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
    return found


def _table(path: Path, text: str) -> list[tuple[int, dict[str, Any]]]:
    try:
        reader = csv.DictReader(text.splitlines(), strict=True)
        rows = [(reader.line_num, dict(row)) for row in reader]
    except csv.Error as error:
        raise ValueError(f"{path} is no table (CSV): {error}.") from error
    for number, row in rows:
        if None in row or None in row.values():
            raise ValueError(f"{path}, line {number}: it has not as many columns as the heading.")
        for name in _LISTS:
            if row.get(name):
                row[name] = [part.strip() for part in row[name].split("|") if part.strip()]
    return [(number, {k.strip(): v for k, v in row.items() if v not in ("", None)}) for number, row in rows]


def _lines(path: Path, text: str) -> list[tuple[int, dict[str, Any]]]:
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            if len(line) > _LONGEST:
                raise ValueError(f"it has more than {_LONGEST} characters")
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: no JSON ({error}).") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: {type(row).__name__}, not a mapping.")
        rows.append((number, row))
    return rows


def _request(row: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    exported = "uid" in row or "image_sha256" in row
    named = {_COLUMNS.get(name, name): value for name, value in row.items() if not exported or name in _KNOWN}
    unknown = sorted(set(named) - set(_KNOWN) - {"id"})
    if unknown:
        raise ValueError(f"{unknown[0]!r} is not known; there are {', '.join(_KNOWN)}.")
    named.pop("id", None)
    for name in ("prompt", "target"):
        if not isinstance(named.get(name), str) or not named[name].strip():
            raise ValueError(f"{name} is {named.get(name)!r}: it takes a text.")
    image = noted_picture(row) if exported else None
    if not exported and named.get("image"):
        if not isinstance(named["image"], str):
            raise ValueError(f"image is {named['image']!r}: it takes the path of a picture.")
        place = folder / named["image"]
        open_image(str(place))  # says what is wrong before anything is stored
        named["image"] = str(place)
        image = named["image"]
    request = {**named, "image": image}
    if exported:
        lost = image is None and row.get("image_sha256") is not None
        digest = row.get("image_sha256")
        uid = row.get("uid")
        request |= {"uid": uid, "disabled": bool(row.get("disabled")), "image_sha256": digest, "lost": lost}
    return request
