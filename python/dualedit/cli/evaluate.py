"""`dualedit eval`: figures of editing methods on the embedded benchmark or on facts of the user's own."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import write_whole
from .demo import figure
from .figures import print_tables
from .methods import Source, choose_methods, open_methods
from .terminal import shows_progress, use_few_threads

if TYPE_CHECKING:
    from ..data import EditSample
    from ..evaluation import Row

BENCHMARKS = ("embedded", "pictures")
PROTOCOLS = ("single", "batch", "sequential")
SCORINGS = {
    "free": "free generation",
    "teacher_forced": "teacher-forced",
    "published": "published (sees the answer)",
}
CONTENTS = "contents of --data"  # among the arguments of records
_EDITS, _ASKED = 100, 100  # of the embedded benchmark, unless told otherwise


@dataclass(frozen=True)
class Facts:
    """Where the facts come from.

    Attributes:
        benchmark: a name of `BENCHMARKS`, where there is no `data`.
        data: file of facts, as `datasets.load_samples` reads it.
        format, images, skip_bad: how it is read; `images` is the folder that image paths start from.
        seed: which facts are drawn.
        world_seed: of the embedded benchmark, another number, other brands: ones that the embedded model has
            never seen.
        families: of the benchmark `pictures`, which things the facts are about; None for all.
        unseen: of the benchmark `pictures`, things that the model's training has not seen.
    """

    benchmark: str = "embedded"
    data: Path | None = None
    format: str = "auto"
    images: Path | None = None
    skip_bad: bool = False
    seed: int = 0
    world_seed: int = 0
    families: tuple[str, ...] | None = None
    unseen: bool = False

    @property
    def pictures(self) -> bool:
        """Whether the facts are those of the benchmark `pictures`."""
        return self.data is None and self.benchmark == "pictures"


@dataclass(frozen=True)
class Options:
    """Options of an evaluation.

    Attributes:
        methods: what to measure, as given; None for the editors that `source` has what they need for.
        scorings: names of `SCORINGS`.
        protocol: "single" stores one edit at a time, "batch" all at once, "sequential" one after the other.
        edits: numbers of edits, each of them a row a method and scoring; None takes 100 of the embedded
            benchmark and all of a file.
        asked: most facts whose questions are asked with many edits stored; None as for `edits`.
        source: the model and its editors.
        facts: the facts.
        json, records: files for the rows and for what was asked and answered, or None.
    """

    methods: str | None
    scorings: tuple[str, ...]
    protocol: str
    edits: tuple[int, ...] | None
    asked: int | None
    source: Source
    facts: Facts
    json: Path | None
    records: Path | None

    def check(self) -> None:
        """Refuse what cannot be done. Raises ValueError."""
        if self.facts.benchmark not in BENCHMARKS:
            raise ValueError(f"--benchmark {self.facts.benchmark}: choose one of {', '.join(BENCHMARKS)}.")
        if self.protocol not in PROTOCOLS:
            raise ValueError(f"--protocol {self.protocol}: choose one of {', '.join(PROTOCOLS)}.")
        if not self.scorings or set(self.scorings) - set(SCORINGS):
            given = ",".join(self.scorings)
            raise ValueError(f"--scoring {given}: choose from {', '.join(SCORINGS)}, or all.")
        if min(self.edits or (1,)) < 1 or (self.asked or 1) < 1:
            raise ValueError("--edits and --asked: pass numbers of at least 1.")
        if self.source.model is not None and self.facts.data is None and not self.facts.pictures:
            raise ValueError("--model: the embedded benchmark is about the embedded model; pass --data too.")
        if self.facts.pictures and self.source.model is None:
            raise ValueError("--benchmark pictures: pass --model smol, or a model of your own.")
        if (self.facts.families or self.facts.unseen) and not self.facts.pictures:
            raise ValueError("--family and --unseen are for --benchmark pictures.")
        for option, file in (("--json", self.json), ("--records", self.records)):
            if file is not None and file.is_dir():
                raise ValueError(f"{option} {file} is a folder: pass a file.")
        self.source.check()
        choose_methods(self.methods, self.source)


def numbers(text: str, option: str) -> tuple[int, ...]:
    """Whole numbers from "1,10,100". Raises ValueError."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{option} {text}: pass whole numbers, such as 1,10,100.") from None


def names(text: str | None) -> tuple[str, ...] | None:
    """Names from "flags,logos"; None for None."""
    return None if text is None else tuple(name.strip() for name in text.split(",") if name.strip())


def scorings(text: str) -> tuple[str, ...]:
    """Names from "free,published" or "all", each once."""
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    return tuple(SCORINGS) if names == ("all",) else names


def run(options: Options) -> None:
    """Measure, print a line as each row is done, write the JSON."""
    from rich.console import Console

    from ..evaluation import Journal, Plan, Unedited, evaluate, join_processes

    if options.source.model is None:
        use_few_threads()
    processes = join_processes()
    first = processes.index == 0
    console = Console(highlight=False, quiet=not first)
    names = choose_methods(options.methods, options.source)
    samples, counts = _samples(options, console)
    asked = options.asked if options.asked or options.facts.data is not None else _ASKED
    plan = Plan(
        options.protocol, options.scorings, asked, explain=options.records is not None,
        seed=options.facts.seed,
    )  # fmt: skip
    journal = None
    if options.records is not None:
        journal = Journal(options.records, _arguments(options, names, counts, asked), processes)
    forced = set(options.scorings) != {"free"}
    unedited = Unedited(samples, plan.more, forced, plan.max_new_tokens)
    rows: dict[tuple[int, int], list[Row]] = {}
    for number, method in enumerate(open_methods(names, options.source)):
        for place, count in enumerate(counts):
            taken = samples[: _taken(options, count, asked, len(samples))]
            grouped = replace(plan, together=count) if plan.protocol == "batch" else plan
            results = evaluate(
                method, taken, grouped, unedited, journal, processes, progress=shows_progress()
            )
            rows[place, number] = [result.row for result in results]
            for row in rows[place, number]:
                _tell(console, row)
            if options.json is not None and first:
                ordered = [row.to_dict() for key in sorted(rows) for row in rows[key]]
                write_whole(options.json, json.dumps({"rows": ordered}, indent=1) + "\n")
    if journal is not None:
        journal.close()
    print_tables(console, [row for key in sorted(rows) for row in rows[key]], SCORINGS)


def _tell(console, row: Row) -> None:
    """A line as soon as a method is measured; tables follow at the end."""
    cells = ", ".join(f"{name} {figure(row, key)}" for name, key in (("Avg", "avg"), ("HM", "hm")))
    what = f"{row.method}, {SCORINGS[row.scoring]}, {row.edits} stored, {row.n} asked"
    console.print(f"{what}: {cells}", soft_wrap=True)
    if row.scoring == "free" and row.costs is not None:
        edit, size, answer, plain = (
            0.0 if row.costs[name] is None else row.costs[name]
            for name in ("edit_seconds", "edit_bytes", "answer_seconds", "answer_seconds_unedited")
        )
        told = f"{edit:.3g} s, {size / 1024:.0f} KiB; an answer: {answer:.3g} s, unedited {plain:.3g} s"
        slower = f" ({answer / plain:.2f} x)" if plain else ""
        trained = row.costs.get("training_seconds")
        before = "" if trained is None else f"; trained before for {trained:.0f} s"
        console.print(f"  an edit: {told}{slower}{before}", soft_wrap=True)


def _taken(options: Options, count: int, asked: int | None, there: int) -> int:
    """How many facts a row is about: few edits are stored in several groups, up to `asked` facts in all."""
    if options.protocol != "batch" or asked is None or asked <= count:
        return count
    return min(-(-asked // count) * count, there // count * count)


def _samples(options: Options, console) -> tuple[Sequence[EditSample], tuple[int, ...]]:
    """All facts that are needed, and how many of them each row takes from their beginning."""
    facts = options.facts
    if facts.pictures:
        return _of_pictures(options)
    if facts.data is None:
        from ..toy.samples import edit_samples
        from ..toy.world import ATTRIBUTES, World

        world = World(facts.world_seed)
        there = len(world.entities("test")) * len(ATTRIBUTES)
        counts = options.edits or (_EDITS,)
        if max(counts) > there:
            raise ValueError(f"--edits {max(counts)}: this world has {there} test facts.")
        asked = options.asked or _ASKED
        count = min(there, max(_taken(options, count, asked, there) for count in counts))
        return edit_samples(world, "test", count, facts.seed), counts
    from ..datasets import load_samples

    loaded = load_samples(facts.data, facts.format, facts.images, facts.skip_bad)
    if loaded.skipped:
        console.print(f"{len(loaded.skipped)} of {len(loaded) + len(loaded.skipped)} rows are left out.")
    counts = options.edits or (len(loaded),)
    if max(counts) > len(loaded):
        raise ValueError(f"--edits {max(counts)}: {facts.data} has {len(loaded)} facts.")
    return draw(loaded, max(counts), facts.seed), counts


def _of_pictures(options: Options) -> tuple[Sequence[EditSample], tuple[int, ...]]:
    facts, counts = options.facts, options.edits or (_EDITS,)
    benchmark, split = pictures(facts.seed, facts.families, facts.unseen)
    there = len(benchmark.facts(split))
    if max(counts) > there:
        raise ValueError(f"--edits {max(counts)}: there are {there} such facts.")
    asked = options.asked or _ASKED
    count = min(there, max(_taken(options, count, asked, there) for count in counts))
    return benchmark.samples(split, count), counts


def pictures(seed: int, families: Sequence[str] | None, unseen: bool):
    """The benchmark `pictures` and the split that figures are from.

    Raises ValueError for a family that there is not, and where the pictures have not been fetched.
    """
    from ..smol import FAMILIES, load_concepts
    from ..smol.benchmark import Pictures

    unknown = set(families or ()) - set(FAMILIES)
    if unknown:
        raise ValueError(f"--family {','.join(families)}: choose from {', '.join(FAMILIES)}.")
    return Pictures(load_concepts(), seed, families or FAMILIES), "unseen" if unseen else "test"


def draw(samples: Sequence[EditSample], count: int, seed: int) -> list[EditSample]:
    """So many of a file's facts at random; all of them stay in the file's order."""
    drawn = list(samples)
    if count < len(drawn):
        random.Random(seed).shuffle(drawn)
    return drawn[:count]


def _arguments(
    options: Options, names: Sequence[str], counts: Sequence[int], asked: int | None
) -> dict[str, Any]:
    """Everything that decides the figures, by option."""
    from .. import __version__

    told: dict[str, Any] = {
        "--methods": names, "--scoring": options.scorings, "--protocol": options.protocol, "--edits": counts,
        "--asked": asked, "version": __version__,
    }  # fmt: skip
    for group in (options.source, options.facts):
        for field in fields(group):
            value = getattr(group, field.name)
            value = str(value) if isinstance(value, Path) else value
            told["--" + field.name.replace("_", "-")] = value
    del told["--published"]
    if options.facts.data is not None:
        told[CONTENTS] = fingerprint(options.facts.data)
    return told


def fingerprint(file: Path) -> str:
    """Tells a file's contents from others'."""
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]
