"""`dualedit data build | check | stats`: facts of one's own."""

from __future__ import annotations

import json as js
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import write_whole
from .loading import SMOL, load_base
from .terminal import shows_progress, use_few_threads

if TYPE_CHECKING:
    from ..data import EditSample
    from ..datasets.build import Answerer, Cost, Generator, SourceRow, Wanted

WORLDS = ("toy", SMOL)
_WORLD_ROWS = 8  # of a world, unless told otherwise
_SHOWN = 12


@dataclass(frozen=True)
class Options:
    """Options of a build; see `dualedit data build --help`."""

    rows: str
    out: Path
    model: str | None
    text_model: Path | None
    endpoint: str | None
    endpoint_model: str
    key_variable: str
    pictures: Path | None
    unlabelled: Path | None
    diffusers: Path | None
    wanted: Wanted
    limit: int | None
    images: Path | None
    skip_bad: bool
    price: str | None
    dry_run: bool
    cache: Path | None
    review: Path | None
    decisions: Path | None

    @property
    def asked(self) -> str:
        """The model that is asked: a world's own unless told otherwise. Raises ValueError."""
        if self.model is None and not self.of_world:
            raise ValueError(
                f"{self.rows}: pass --model MODEL, which says what must stay (a folder, toy or smol), or "
                f"--model none."
            )
        return self.model or self.rows

    @property
    def of_world(self) -> bool:
        """Whether the rows are a world's own."""
        return self.rows in WORLDS and not Path(self.rows).is_file()

    @property
    def folder(self) -> Path:
        """Where pictures are written."""
        return self.out.parent / f"{self.out.stem}_images"


def read_rows(options: Options) -> tuple[list[SourceRow], Sequence[EditSample]]:
    """The rows, and what a world knows about them; bad rows are told."""
    from ..datasets.build import read_source, write_source

    file, samples = Path(options.rows), []
    if options.of_world:
        samples = world_samples(options.rows, options.limit or _WORLD_ROWS)
        file = write_source(samples, options.folder)
    found, bad = read_source(file, options.images, options.skip_bad)
    for problem in bad:
        print(f"left out: {problem}")
    return found[: options.limit], samples


def world_samples(name: str, count: int) -> list[EditSample]:
    """Facts of the embedded world, or of the fetched pictures."""
    if name == "toy":
        from ..toy.samples import edit_samples
        from ..toy.world import World

        return edit_samples(World(0), "train", count)
    from ..smol import load_concepts
    from ..smol.benchmark import Pictures

    return Pictures(load_concepts()).samples("training", count)


def build_facts(options: Options) -> None:
    """Estimate, build, write the facts and the page."""
    from tqdm.auto import tqdm

    from ..datasets import to_jsonl
    from ..datasets.build import Cache, build, estimate, read_decisions, render_review, without_rejected

    use_few_threads()
    if options.limit is not None and options.limit < 1:
        raise ValueError(f"--limit {options.limit}: pass a number from 1 up.")
    prices, _ = _prices(options.price), options.asked
    rows, samples = read_rows(options)
    answerer = _answerer(options)
    generators = _generators(options, rows, samples, answerer)
    cache = Cache(options.cache or options.out.with_name(f"{options.out.stem}.cache.jsonl"))
    costs, cached = estimate(rows, generators, options.wanted, cache)
    print(f"{len(rows)} rows; {_told(costs, cached, prices)}")
    if options.dry_run:
        return

    def show(them: Iterable[Any]) -> Iterable[Any]:
        return tqdm(them, desc="building", unit="fact", disable=not shows_progress())

    built = build(rows, generators, options.wanted, answerer, cache, show)
    for drop in built.drops[:_SHOWN]:
        print(f"dropped: {drop}")
    if len(built.drops) > _SHOWN:
        print(f"dropped: {len(built.drops) - _SHOWN} more")
    for short in built.short[:_SHOWN]:
        print(f"fewer than wanted: {short}")
    if len(built.short) > _SHOWN:
        print(f"fewer than wanted: {len(built.short) - _SHOWN} more")
    kept = built.samples
    if options.decisions is not None:
        kept = without_rejected(kept, read_decisions(options.decisions, kept))
        print(f"{len(kept)} of {len(built.samples)} facts are accepted")
    if options.review is not None:
        write_whole(options.review, render_review(built.samples, built.drops))
        print(f"page: {options.review}")
    to_jsonl(kept, options.out)
    print(f"facts: {options.out}")


def _answerer(options: Options) -> Answerer | None:
    from ..datasets.build import Answerer

    if options.asked == "none":
        return None
    return Answerer(*load_base(None if options.asked == "toy" else Path(options.asked)))


def _generators(
    options: Options, rows: Sequence[SourceRow], samples: Sequence[EditSample], answerer: Answerer | None
) -> list[Generator]:
    """What was asked for; the user's own pictures go first, a world last."""
    from ..datasets.build import (
        DiffusersPictures,
        Endpoint,
        FromSamples,
        LocalTextModel,
        Neighbours,
        PictureFolder,
        TextGenerator,
    )

    found: list[Generator] = []
    if options.pictures is not None:
        found.append(PictureFolder(options.pictures))
    if options.unlabelled is not None:
        if answerer is None:
            raise ValueError("--unlabelled compares pictures by the model's vision tower: pass --model.")
        neighbours = Neighbours(answerer, options.unlabelled, [row.image for row in rows])
        for broken in neighbours.broken:
            print(f"left out: {broken}")
        found.append(neighbours)
    if options.diffusers is not None:
        found.append(DiffusersPictures(options.diffusers, options.folder))
    if options.endpoint is not None:
        endpoint = Endpoint(options.endpoint, options.endpoint_model, options.key_variable)
        found.append(TextGenerator(endpoint))
    if options.text_model is not None:
        found.append(TextGenerator(LocalTextModel(options.text_model)))
    if samples:
        found.append(FromSamples(samples, options.folder))
    if not found:
        raise ValueError(
            "Nothing is to make questions or pictures: pass --endpoint, --text-model, --pictures, "
            "--unlabelled "
            "or --diffusers."
        )
    return found


def _prices(text: str | None) -> tuple[float, float] | None:
    if text is None:
        return None
    try:
        first, second = (float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"--price {text}: pass two numbers, such as 0.15,0.6.") from None
    return first, second


def _told(costs: dict[str, Cost], cached: int, prices: tuple[float, float] | None) -> str:
    parts = []
    for name, cost in costs.items():
        told = []
        if cost.requests:
            told.append(
                f"{cost.requests} requests, about {cost.tokens_in:,} tokens in, {cost.tokens_out:,} out"
            )
            if prices is not None:
                price = (cost.tokens_in * prices[0] + cost.tokens_out * prices[1]) / 1e6
                told.append(f"about {price:.2f} to pay, at most twice that")
        if cost.pictures:
            told.append(f"{cost.pictures} pictures to draw")
        parts.append(f"{name}: {', '.join(told) or 'nothing to pay'}")
    if cached:
        parts.append(f"{cached} results are cached")
    return "; ".join(parts) or "nothing to make"


def check(file: Path, test: Path | None, format: str, images: Path | None, skip_bad: bool) -> int:
    """Print findings; 1 where something is wrong."""
    from ..datasets import load_samples
    from ..datasets.build import check_facts

    loaded = load_samples(file, format, images, skip_bad, verify_images=False)
    for problem in (*loaded.skipped, *loaded.notes):
        print(f"note     {problem}")
    other = None if test is None else load_samples(test, "auto", images, skip_bad, verify_images=False)
    found = check_facts(loaded, other)
    for one in found:
        print(one)
    wrong = sum(one.wrong for one in found)
    print(f"{len(loaded)} facts: {wrong} wrong, {len(found) - wrong} missing")
    return int(wrong > 0)


def stats(file: Path, format: str, images: Path | None, skip_bad: bool, json: bool) -> None:
    """Print counts."""
    from ..datasets import load_samples
    from ..datasets.build import stats_of

    found = stats_of(load_samples(file, format, images, skip_bad, verify_images=False))
    if json:
        print(js.dumps(found, indent=1))
        return
    for name, value in found.items():
        if name != "probes" and value not in (None, {}):
            print(f"{name:36}{_value(value)}")
    for name, counts in found["probes"].items():
        told = f"{counts['all']} in {counts['facts']} facts, {counts['least']} to {counts['most']} each"
        print(f"{name:36}{told}")


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {number:g}" for name, number in value.items())
    if isinstance(value, list):
        return f"{value[0]!r}, {value[1]} times"
    return str(value)
