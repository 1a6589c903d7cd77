"""Loading samples: `load_samples` from a file, `from_records` from rows that are already in memory."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import overload

from ..data import EditSample
from . import easyedit, own
from .detection import detect_format
from .reading import RawRow, read_rows
from .rows import ImageFinder, Problem, Row, RowError
from .templates import PromptTemplate, find_template

_BUILDERS: dict[str, Callable[[Row, str], EditSample]] = {
    "evqa": easyedit.evqa_sample,
    "eic": easyedit.eic_sample,
    "vlkeb": easyedit.vlkeb_sample,
    "mmke": easyedit.mmke_sample,
    "okedit": own.okedit_sample,
    "jsonl": own.own_sample,
}
FORMATS = tuple(_BUILDERS)
_NAMED = ("okedit", "jsonl")  # rows have ids of their own, which must not repeat
_SHOWN = 5


@dataclass(frozen=True, eq=False, repr=False)
class LoadedSamples(Sequence[EditSample]):
    """Samples, and what became of the rows that they come from.

    Attributes:
        samples: in the file's order.
        source: the file, or what stands for it.
        format: one of `FORMATS`.
        template: name of the prompt template.
        rows: the row number of each sample.
        skipped: rows that were left out (skip_bad=True): (file, index, field, reason).
        notes: remarks on rows that were kept, in the same shape: targets the model already gives, and
            fields not read (each once, at its first row).
    """

    samples: tuple[EditSample, ...]
    source: str
    format: str
    template: str
    rows: tuple[int, ...]
    skipped: tuple[Problem, ...] = ()
    notes: tuple[Problem, ...] = ()

    def __len__(self) -> int:
        return len(self.samples)

    @overload
    def __getitem__(self, index: int) -> EditSample: ...
    @overload
    def __getitem__(self, index: slice) -> LoadedSamples: ...
    def __getitem__(self, index: int | slice) -> EditSample | LoadedSamples:
        if not isinstance(index, slice):
            return self.samples[index]
        return LoadedSamples(
            self.samples[index],
            self.source,
            self.format,
            self.template,
            self.rows[index],
            self.skipped,
            self.notes,
        )

    def __repr__(self) -> str:
        rest = f", {len(self.skipped)} rows left out" if self.skipped else ""
        return f"<{len(self)} samples of format {self.format!r} from {self.source!r}{rest}>"


def load_samples(
    path: str | os.PathLike,
    format: str = "auto",
    image_root: str | os.PathLike | Sequence[str | os.PathLike] | None = None,
    skip_bad: bool = False,
    prompt_template: str | None = None,
    limit: int | None = None,
    verify_images: bool = True,
) -> LoadedSamples:
    """Samples of a data set's file, or of a user's own. No image is opened.

    Args:
        path: a JSON list of objects, or one object a line (JSONL).
        format: "evqa", "eic", "vlkeb", "mmke", "okedit" or "jsonl" (the user's own; see the package's
            docstring), or "auto", which tells them apart by their fields. E-VQA and a VLKEB file without
            portability have the same fields and give the same samples; "auto" goes by VLKEB's image folders.
        image_root: the folder that relative image paths start from, or several, tried in order (EasyEdit
            keeps rephrased images elsewhere); the file's own folder by default.
        skip_bad: leave bad rows out and list them in `.skipped`, instead of raising.
        prompt_template: "plain" (default), "raw", "dualedit", "easyedit" (see `TEMPLATES`), or a text with
            {prompt} in it that words every question.
        limit: at most this many samples.
        verify_images: look for each image file; without, a missing one is found when it is opened.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an argument; a file that cannot be read; no known format; a bad row, with file, row and
            field; missing images, all of them counted and the first few named; or no good row at all.
    """
    rows = read_rows(path)
    roots = _roots(image_root, os.path.dirname(os.path.abspath(path)))
    return _load(rows, str(path), format, ImageFinder(roots, verify_images), skip_bad, prompt_template, limit)


def from_records(
    records: Iterable[Mapping],
    format: str = "auto",
    image_root: str | os.PathLike | Sequence[str | os.PathLike] | None = None,
    skip_bad: bool = False,
    prompt_template: str | None = None,
    limit: int | None = None,
    verify_images: bool = True,
    source: str = "records",
) -> LoadedSamples:
    """Samples of rows in memory, such as those of a Hugging Face `datasets.Dataset`.

    Args:
        records: mappings with the fields of a format; images may be paths, bytes, PIL images or the
            {"bytes": ..., "path": ...} of an image column that is not decoded. Cast image columns with
            `datasets.Image(decode=False)`: compressed bytes take far less memory than decoded pictures. A
            column that is null counts as missing.
        image_root: as in `load_samples`; the current folder by default.
        source: what errors and reports call these rows.
        format, skip_bad, prompt_template, limit, verify_images: as in `load_samples`.

    Raises:
        ValueError: as `load_samples`; the records are empty, or one mapping instead of many.
    """
    if isinstance(records, (Mapping, str, bytes)):
        raise ValueError(
            f"records is a {type(records).__name__}: pass an iterable of mappings, one for each row."
        )
    rows = []
    for i, record in enumerate(records):
        fault = (
            None
            if isinstance(record, Mapping)
            else f"is a {type(record).__name__}: each row should be a mapping"
        )
        rows.append(RawRow(i, f"row {i}", record, fault))
    if not rows:
        raise ValueError("records is empty: there is nothing to load.")
    finder = ImageFinder(_roots(image_root, os.getcwd()), verify_images)
    return _load(rows, source, format, finder, skip_bad, prompt_template, limit)


def _roots(
    image_root: str | os.PathLike | Sequence[str | os.PathLike] | None, default: str
) -> list[str | os.PathLike]:
    if image_root is None:
        return [default]
    roots = [image_root] if isinstance(image_root, (str, os.PathLike)) else list(image_root)
    for root in roots:
        if not os.path.isdir(os.path.expanduser(root)):
            raise ValueError(
                f"image_root={os.fspath(root)!r} is no folder: pass the folder that image paths start from."
            )
    if not roots:
        raise ValueError("image_root is an empty list: pass a folder, or None for the file's own.")
    return roots


def _load(
    rows: list[RawRow],
    source: str,
    format: str,
    finder: ImageFinder,
    skip_bad: bool,
    prompt_template: str | None,
    limit: int | None,
) -> LoadedSamples:
    if format != "auto" and format not in FORMATS:
        raise ValueError(f"format={format!r} is unknown: choose 'auto' or one of {FORMATS}.")
    if limit is not None and (not isinstance(limit, int) or limit < 1):
        raise ValueError(f"limit={limit!r}: pass a number of samples from 1 up, or None for all.")
    template = find_template(prompt_template)
    if format == "auto":
        if all(row.problem is not None for row in rows):
            raise ValueError(f"{source}, {rows[0].place} {rows[0].problem}.")
        format = detect_format([row.record for row in rows if row.problem is None], source)
    reader = _Reader(source, format, finder, template, skip_bad)
    for row in rows:
        if limit is not None and len(reader.samples) + len(reader.missing_rows) >= limit:
            break
        reader.read(row)
    reader.finish()
    return LoadedSamples(
        tuple(reader.samples), source, format, template.name, tuple(reader.rows), tuple(reader.skipped),
        tuple(reader.notes),
    )  # fmt: skip


def _column(field: str) -> str:
    """A field's name without the numbers of list entries."""
    return re.sub(r"\[\d+\]", "[]", field)


class _Reader:
    """Turns rows into samples, and keeps what was wrong with them."""

    def __init__(
        self, source: str, format: str, finder: ImageFinder, template: PromptTemplate, skip_bad: bool
    ):
        self.source = source
        self.format = format
        self.finder = finder
        self.template = template
        self.skip_bad = skip_bad
        self.samples: list[EditSample] = []
        self.rows: list[int] = []
        self.skipped: list[Problem] = []
        self.notes: list[Problem] = []
        self.missing: list[Problem] = []
        self.missing_rows: set[int] = set()
        self.ids: dict[str, str] = {}
        self.unread: set[str] = set()

    def read(self, raw: RawRow) -> None:
        """Add the row's sample, or say what is wrong with it."""
        if raw.problem is not None:
            self._refuse(raw, RowError("", raw.problem))
            return
        row = Row(raw.record, self.finder, self.template)
        try:
            sample = _BUILDERS[self.format](row, str(raw.index))
            if self.format in _NAMED and sample.id in self.ids:
                raise RowError(
                    "id", f"is {sample.id!r}, as in {self.ids[sample.id]}: each row needs its own."
                )
        except RowError as error:
            self._refuse(raw, error)
            return
        self.ids[sample.id] = raw.place
        if row.missing:
            problems = [Problem(self.source, raw.index, field, reason) for field, reason in row.missing]
            if self.skip_bad:
                self.skipped.append(problems[0])
            else:
                self.missing += problems
                self.missing_rows.add(raw.index)
            return
        self.samples.append(sample)
        self.rows.append(raw.index)
        self._note(raw, row, sample)

    def _refuse(self, raw: RawRow, error: RowError) -> None:
        if not self.skip_bad:
            field = f", field {error.field!r}" if error.field else ""
            raise ValueError(
                f"{self.source}, {raw.place}{field} {error.reason} (format {self.format!r}; skip_bad=True "
                "leaves bad rows out and lists them.)"
            ) from error
        self.skipped.append(Problem(self.source, raw.index, error.field, error.reason))

    def _note(self, raw: RawRow, row: Row, sample: EditSample) -> None:
        remarks = []
        for field, remark in row.notes:
            if _column(field) not in self.unread:
                self.unread.add(_column(field))
                remarks.append((field, remark))
        before, target = sample.base_answer, sample.request.target
        if before is not None and before.strip().lower() == target.strip().lower():
            field = "target" if self.format in _NAMED else "alt"
            remarks.append((field, f"{target!r} is what the unedited model answers: nothing to correct"))
        self.notes += [Problem(self.source, raw.index, field, remark) for field, remark in remarks]

    def finish(self) -> None:
        """Raise for images that are not there, and for a file without a good row."""
        if self.missing:
            first = "\n  ".join(map(str, self.missing[:_SHOWN]))
            more = f"\n  and {len(self.missing) - _SHOWN} more" if len(self.missing) > _SHOWN else ""
            raise ValueError(
                f"{self.source}: {len(self.missing)} images of {len(self.missing_rows)} rows are not there:\n"
                f"  {first}{more}\nPass image_root=, the folder (or folders) that the paths start from; "
                "skip_bad=True leaves these rows out."
            )
        if not self.samples:
            raise ValueError(
                f"{self.source}: none of {len(self.skipped)} rows makes a sample. First: {self.skipped[0]}"
            )
