"""`dualedit report`: a page and a table of what `dualedit eval` measured."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import write_whole
from .evaluate import CONTENTS, draw, fingerprint

if TYPE_CHECKING:
    from ..data import EditSample


@dataclass(frozen=True)
class Options:
    """Options of a report.

    Attributes:
        results: a file of records or rows, or a folder of them.
        out: the page to write.
        markdown: file for the table, or None for the terminal.
        examples: how many facts are shown for each method.
    """

    results: Path
    out: Path
    markdown: Path | None
    examples: int

    def check(self) -> None:
        """Refuse what cannot be done. Raises ValueError or FileNotFoundError."""
        if not self.results.exists():
            raise FileNotFoundError(f"{self.results}: no such file or folder.")
        if self.examples < 0:
            raise ValueError(f"--examples {self.examples}: pass 0 or more.")
        for option, file in (("--out", self.out), ("--markdown", self.markdown)):
            if file is None:
                continue
            if file.is_dir():
                raise ValueError(f"{option} {file} is a folder: pass a file.")
            if file.resolve() == self.results.resolve() or file.suffix in (".json", ".jsonl"):
                raise ValueError(f"{option} {file} may hold results: pass another file.")
            file.parent.mkdir(parents=True, exist_ok=True)
            if not os.access(file if file.exists() else file.parent, os.W_OK):
                raise ValueError(f"{option} {file} cannot be written: no permission.")
        if self.markdown is not None and self.markdown.resolve() == self.out.resolve():
            raise ValueError(f"--out and --markdown are both {self.out}: pass two files.")


def run(options: Options) -> None:
    """Read, write the page, write or print the table."""
    from ..analysis import markdown_tables, read_results, render_report

    results = read_results(options.results)
    page = render_report(results, samples_again, options.examples)
    table = markdown_tables(results)
    write_whole(options.out, page)
    if options.markdown is None:
        print(table)
    else:
        write_whole(options.markdown, table)
        print(f"table: {options.markdown}")
    print(f"page: {options.out}")


def samples_again(arguments: Mapping[str, Any]) -> Sequence[EditSample] | str:
    """The samples that a run asked about, in its order, for their pictures.

    Args:
        arguments: of the run, as its records hold them.

    Returns:
        the samples, or one sentence that says why they are not to be had.
    """
    seed, data = arguments.get("--seed"), arguments.get("--data", 0)
    if not isinstance(seed, int) or not isinstance(data, str | None):
        return "The records do not say which facts were asked about, so that pictures are missing."
    if data is None:
        if arguments.get("--benchmark") == "pictures":
            return _pictures(arguments, seed)
        world = arguments.get("--world-seed")
        if arguments.get("--benchmark") != "embedded" or not isinstance(world, int):
            return "The records are about a benchmark that is not known here, so that pictures are missing."
        return _World(world, seed)
    return _own(arguments, seed)


class _World(Sequence):
    """Samples of the embedded benchmark, each drawn when it is asked for."""

    def __init__(self, world_seed: int, seed: int):
        from ..toy.world import World

        self._world, self._seed = World(world_seed), seed

    def __len__(self) -> int:
        from ..toy.world import ATTRIBUTES

        return len(self._world.entities("test")) * len(ATTRIBUTES)

    def __getitem__(self, place):
        from ..toy.samples import edit_sample

        return edit_sample(self._world, "test", place, self._seed)


def _pictures(arguments: Mapping[str, Any], seed: int) -> Sequence[EditSample] | str:
    from .evaluate import pictures

    counts = arguments.get("--edits")
    try:
        benchmark, split = pictures(seed, arguments.get("--families"), bool(arguments.get("--unseen")))
        facts = benchmark.facts(split)
        asked = max(counts) if isinstance(counts, list) and counts else 0
        asked = max(asked, arguments.get("--asked") or 0)
        return benchmark.samples(split, min(len(facts), asked) or None)
    except (ValueError, TypeError) as error:
        return f"The benchmark's pictures are not to be had ({error})."


def _own(arguments: Mapping[str, Any], seed: int) -> Sequence[EditSample] | str:
    from ..datasets import load_samples

    file = Path(arguments["--data"])
    if not file.is_file():
        return f"{file}, the file of facts, is not there any more; pictures are shown as far as found."
    if fingerprint(file) != arguments.get(CONTENTS):
        return f"{file}, the file of facts, has changed since; pictures are shown as far as found."
    images, form = arguments.get("--images"), arguments.get("--format")
    try:
        skip = bool(arguments.get("--skip-bad"))
        loaded = load_samples(file, form or "auto", images, skip, verify_images=skip)
    except ValueError as error:
        return f"{file} cannot be read again: {error}"
    counts = arguments.get("--edits")
    count = max(counts) if isinstance(counts, list) and counts else len(loaded)
    return draw(loaded, count, seed)
