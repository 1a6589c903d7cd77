"""The rows that a data set is built from: a picture, a question, the answer so far and the new one."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from ...models.images import open_image
from ..reading import read_rows
from ..rows import ImageFinder, Problem, Row, RowError
from ..templates import find_template

KEYS = ("id", "image", "question", "answer", "new_answer", "thing")


@dataclass(frozen=True)
class SourceRow:
    """One fact to build questions around.

    Attributes:
        id: unique; the row's number without one.
        image: absolute path of the picture.
        question, new_answer: the edit.
        answer: what is right so far, or None.
        thing: what the picture shows, in a few words, or "".
        place: where the row stands in its file, in words.
    """

    id: str
    image: str
    question: str
    new_answer: str
    answer: str | None = None
    thing: str = ""
    place: str = ""


def read_source(
    path: str | os.PathLike[str], image_root: str | os.PathLike[str] | None = None, skip_bad: bool = False
) -> tuple[list[SourceRow], list[Problem]]:
    """The rows of a JSON list or JSON lines, and those that were left out.

    Args:
        path: rows with `image`, `question`, `new_answer` and, where there are any, `answer`, `thing`, `id`.
        image_root: folder that image paths start from; the file's own by default.
        skip_bad: leave bad rows out, instead of raising.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a bad row: without a picture, with one that cannot be read, with a field missing or an id
            that came before; names its line. Or no good row at all.
    """
    root = Path(path).resolve().parent if image_root is None else Path(image_root)
    finder, template = ImageFinder([root]), find_template(None)
    found: list[SourceRow] = []
    bad: list[Problem] = []
    seen: dict[str, str] = {}
    for raw in read_rows(path):
        try:
            if raw.problem is not None:
                raise RowError("", raw.problem)
            row = _read(Row(raw.record, finder, template), str(raw.index), raw.place)
            if row.id in seen:
                raise RowError("id", f"is {row.id!r}, as in {seen[row.id]}: each row needs its own.")
            if row.new_answer.strip().lower() == (row.answer or "").strip().lower():
                raise RowError("new_answer", "is the answer: there is nothing to correct.")
        except RowError as error:
            if not skip_bad:
                field = f", field {error.field!r}" if error.field else ""
                raise ValueError(
                    f"{path}, {raw.place}{field} {error.reason} (skip_bad=True leaves such rows out.)"
                ) from error
            bad.append(Problem(str(path), raw.index, error.field, error.reason))
            continue
        seen[row.id] = raw.place
        found.append(row)
    if not found:
        raise ValueError(f"{path}: none of {len(bad)} rows can be used. First: {bad[0]}")
    return found, bad


def _read(row: Row, name: str, place: str) -> SourceRow:
    row.check_keys(KEYS)
    image = row.image("image")
    if row.missing:
        raise RowError(*row.missing[0])
    try:
        open_image(image)
    except ValueError as error:
        raise RowError("image", f"cannot be used: {error}") from error
    if not isinstance(image, str):
        raise RowError("image", "should be the path of a picture.")
    given = row.record.get("id")
    return SourceRow(
        name if given is None else str(given), image, row.text("question"), row.text("new_answer"),
        row.optional_text("answer"), row.optional_text("thing") or "", place,
    )  # fmt: skip
