"""One row of a data set, read field by field; every fault names its field."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

from ..models.images import ImageSource, image_source
from .templates import PromptTemplate


class Problem(NamedTuple):
    """What is wrong with, or worth knowing about, one row.

    Attributes:
        file: the file, or what stands for it.
        index: the row's number, from 0.
        field: the field's name in the file, such as "alt" or "keep[1].image"; "" for the whole row.
        reason: in words.
    """

    file: str
    index: int  # type: ignore[assignment]  # takes the place of tuple.index
    field: str
    reason: str

    def __str__(self) -> str:
        return f"{self.file}, row {self.index}{self.field and f', field {self.field!r}'}: {self.reason}"


class RowError(ValueError):
    """A row that makes no sample."""

    def __init__(self, field: str, reason: str):
        super().__init__(f"{field}: {reason}")
        self.field = field
        self.reason = reason


class ImageFinder:
    """Turns the paths of a file into paths of this machine.

    Args:
        roots: folders that relative paths start from, tried in order.
        verify: whether files are looked for.
    """

    def __init__(self, roots: Iterable[str | os.PathLike], verify: bool = True):
        self.roots = [os.path.abspath(os.path.expanduser(os.fspath(root))) for root in roots]
        self.verify = verify
        self._found: dict[str, tuple[str, bool]] = {}

    def find(self, path: str) -> tuple[str, bool]:
        """The absolute path, and whether the file is there (always true when not verifying)."""
        if path not in self._found:
            places = [os.path.normpath(os.path.join(root, path)) for root in self.roots]
            look = self.verify or len(places) > 1
            there = next((place for place in places if os.path.isfile(place)), None) if look else places[0]
            self._found[path] = (there or places[0], there is not None or not self.verify)
        return self._found[path]


def briefly(value: Any, length: int = 60) -> str:
    """A value in an error message."""
    text = repr(value)
    return text if len(text) <= length else text[: length - 3] + "..."


@lru_cache(maxsize=256)
def _meant(key: str, known: tuple[str, ...]) -> str | None:
    return next(iter(difflib.get_close_matches(key, known, 1, 0.8)), None)


class Row:
    """A record, or an object inside one, with checked access.

    Attributes:
        missing: (field, reason) of images that are not there, filled while the row is read.
        notes: (field, remark), likewise.
    """

    def __init__(self, record: Mapping, finder: ImageFinder, template: PromptTemplate, within: str = ""):
        self.record = record
        self.finder = finder
        self.template = template
        self.within = within
        self.missing: list[tuple[str, str]] = []
        self.notes: list[tuple[str, str]] = []

    def error(self, key: str, reason: str) -> RowError:
        """The error for one of this row's fields."""
        return RowError(self.within + key, reason)

    def mistyped(self, key: str, value: Any, remedy: str) -> RowError:
        """The error for a value of the wrong type."""
        return self.error(key, f"is {briefly(value)}, a {type(value).__name__}: {remedy}.")

    def has(self, key: str) -> bool:
        """Whether a field is there and not null."""
        return self.record.get(key) is not None

    def needed(self, key: str) -> Any:
        """A field that has to be there."""
        if not self.has(key):
            state = "null" if key in self.record else "missing"
            raise self.error(
                key, f"is {state}; the row has: {', '.join(sorted(map(str, self.record))) or 'nothing'}."
            )
        return self.record[key]

    def text(self, key: str) -> str:
        """A field that has to be a text with something in it."""
        value = self.needed(key)
        if not isinstance(value, str):
            raise self.mistyped(key, value, "write a text, in quotes")
        if not value.strip():
            raise self.error(key, "is empty: write a text, or leave the row out.")
        return value

    def optional_text(self, key: str) -> str | None:
        """A text that may be missing, null or empty, which gives None."""
        value = self.record.get(key)
        return None if value is None or (isinstance(value, str) and not value.strip()) else self.text(key)

    def prompt(self, key: str, kind: str = "image") -> str:
        """A question in the template's wording."""
        return self.template.apply(self.text(key), kind)

    def image(self, key: str) -> ImageSource:
        """An image that has to be given."""
        self.needed(key)
        return self.optional_image(key)

    def optional_image(self, key: str) -> ImageSource:
        """An image, with its path made absolute; None where there is none."""
        return self.image_from(key, self.record.get(key))

    def image_from(self, key: str, value: Any) -> ImageSource:
        """An image given by the value of (part of) a field."""
        try:
            source = image_source(value)
        except ValueError as error:
            raise self.error(key, f"cannot be used: {error}") from error
        if not isinstance(source, str):
            return source
        path, there = self.finder.find(source)
        if not there:
            roots = ", ".join(map(repr, self.finder.roots))
            where = "" if os.path.isabs(source) else f" below {roots}"
            self.missing.append((self.within + key, f"image {source!r} is not there{where}"))
        return path

    def items(self, key: str) -> list:
        """A list that may be missing; an object of lists (a table's columns) becomes a list of objects."""
        value = self.record.get(key)
        if value is None:
            return []
        if isinstance(value, Mapping) and all(isinstance(column, list) for column in value.values()):
            return [dict(zip(value, cells, strict=True)) for cells in zip(*value.values(), strict=False)]
        if not isinstance(value, (list, tuple)):
            raise self.mistyped(key, value, "write a list, in brackets")
        return list(value)

    def child(self, key: str, record: Any) -> Row:
        """An object inside this row; its faults and missing images are this row's."""
        if not isinstance(record, Mapping):
            raise self.mistyped(key, record, "write an object, in braces")
        row = Row(record, self.finder, self.template, f"{self.within}{key}.")
        row.missing, row.notes = self.missing, self.notes
        return row

    def children(self, key: str) -> list[Row]:
        """The objects of a list field."""
        return [self.child(f"{key}[{i}]", record) for i, record in enumerate(self.items(key))]

    def check_keys(self, known: tuple[str, ...]) -> None:
        """Refuse a field that looks like a misspelt one; note any other unknown field."""
        for key in self.record:
            if key in known or self.record[key] is None:
                continue
            meant = _meant(str(key), known)
            if meant is not None and not self.has(meant):
                names = ", ".join(known)
                raise self.error(key, f"is no known field; did you mean {meant!r}? The fields are: {names}.")
            self.notes.append((self.within + str(key), "is no known field and was not read"))
