"""`dualedit demo`: an edit before and after, then the figures over many edits, then a page."""

from __future__ import annotations

import io
import json
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..files import write_whole
from ..models.images import open_image
from .terminal import shows_progress, use_few_threads

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from ..evaluation import Row, SingleResult
    from .demo_story import Story

_SHOWN = 20  # characters of an answer in the table
OWN = ("picture", "question", "answer")  # of an edit of the user's own
_BLOCK = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


@dataclass(frozen=True)
class Options:
    """Options of the demo.

    Attributes:
        json, page, readme: files to write, or None; `readme` has the blocks that `fill_readme` fills.
        edits: number of single edits to measure; None takes what suits the model.
        seed: which facts are edited.
        weights: folder of a retrained model and its editors, or None for those of the package.
        model: "embedded", "smol", or None for `smol` where it has been fetched.
        picture, question, answer: an edit of the user's own to tell, all three or none.
    """

    json: Path | None
    page: Path | None
    readme: Path | None
    edits: int | None
    seed: int
    weights: Path | None
    model: str | None = None
    picture: Path | None = None
    question: str | None = None
    answer: str | None = None

    @property
    def own(self) -> tuple[Path, str, str] | None:
        """The user's own edit."""
        if self.picture is None or self.question is None or self.answer is None:
            return None
        return self.picture, self.question, self.answer

    def check(self) -> None:
        """Refuse what would fail only after the work is done. Raises ValueError."""
        if self.edits is not None and self.edits < 1:
            raise ValueError(f"--edits {self.edits}: pass at least 1.")
        missing = [f"--{name}" for name in OWN if not getattr(self, name)]
        if 0 < len(missing) < 3:
            raise ValueError(f"{' and '.join(missing)}: your own edit takes all of --{', --'.join(OWN)}.")
        if self.picture is not None:
            open_image(self.picture)  # refuses what is no picture
        for name, file in (("--json", self.json), ("--page", self.page), ("--readme", self.readme)):
            if file is None:
                continue
            if file.is_dir():
                raise ValueError(f"{name} {file} is a folder: pass a file.")
            file.parent.mkdir(parents=True, exist_ok=True)
            if not os.access(file if file.exists() else file.parent, os.W_OK):
                raise ValueError(f"{name} {file} cannot be written: no permission.")
        if self.readme is not None:
            check_readme(self.readme, _read(self.readme))


def run(options: Options) -> None:
    """Show, measure, write."""
    options.check()
    began = time.monotonic()
    from rich.console import Console

    from . import demo_story as show
    from .demo_worlds import EmbeddedWorld, world_of

    console = Console(highlight=False)
    world = world_of(options.model, options.weights)
    if options.model is None and options.weights is None and isinstance(world, EmbeddedWorld):
        console.print("(dualedit fetch smol brings a pretrained model and real pictures for this demo)")
    console.print(f"Loading {world.title} and its editors ...")
    if isinstance(world, EmbeddedWorld):
        use_few_threads()
    editors = world.editors()
    opener = next(iter(editors))
    samples = world.samples(options.edits or world.edits, options.seed)
    if options.own is not None:
        first = world.own(*options.own)
    else:
        first = show.known_sample(editors[opener], world, samples)
    told = show.measure({opener: editors[opener]}, [first], progress=False)
    opening = show.stories_of(world, [first], told)[0]
    tell(console, opening, opener, "your own" if options.own else world.about)
    count = f"{len(samples)} edits" if len(samples) > 1 else "1 edit"
    names = " and with ".join(show.NAMES[method] for method in editors)
    console.print(f"\nMeasuring {count}, one at a time, with {names} ...")
    results = show.measure(editors, samples, progress=shows_progress())
    conclude(console, results)
    stories = show.stories_of(world, samples, results)
    if options.json is not None:
        rows = [result.row.to_dict() for result in results.values()]
        write_whole(options.json, json.dumps({"rows": rows}, indent=1) + "\n")
    if options.own is None:
        opening = stories[samples.index(first)]
    if options.page is not None:
        from .demo_page import render_page

        write_whole(options.page, render_page(opening, stories, results))
    if options.readme is not None:
        write_whole(options.readme, fill_readme(options.readme, opening, results, world.about))
    for name, file in (("figures", options.json), ("page", options.page)):
        if file is not None:
            console.print(f"{name}: {file}", soft_wrap=True)
    console.print(f"Done in {time.monotonic() - began:.0f} s.")


def retrain(out: Path) -> None:
    """Train the embedded model and its editors from scratch into `out`; a stopped run continues there."""
    import shutil

    from ..toy.editors import EDITORS, VLM
    from .recipes import recipe

    train_editors, train_vlm = recipe("train_editors"), recipe("train_vlm")
    use_few_threads()
    model_minutes = _minutes(VLM / "training.json", ["seconds"], 40)
    editor_minutes = _minutes(EDITORS / "editors.json", ["dualedit", "seconds"], 10)
    total = model_minutes + editor_minutes
    print(f"Retraining into {out}, about {total} minutes on one core in all.", flush=True)
    if not (out / "vlm" / "training.json").is_file():
        print(f"The vision-language model, about {model_minutes} minutes:", flush=True)
        compiles = any(shutil.which(name) for name in ("c++", "g++", "clang++"))
        train_vlm.train(out / "vlm", train_vlm.Recipe(), compiled=compiles)
    print(f"Adapters and thresholds, about {editor_minutes} minutes:", flush=True)
    train_editors.main(["--vlm", str(out / "vlm"), "--out", str(out / "editors")])


def _minutes(report: Path, keys: list[str], otherwise: int) -> int:
    """How long the shipped weights took, from the report beside them."""
    if not report.is_file():
        return otherwise
    value = json.loads(report.read_text(encoding="utf-8"))
    for key in keys:
        value = value.get(key, {})
    return max(1, round(value / 60)) if value else otherwise


# ---------------------------------------------------------------------- on the terminal


def tell(console: Console, story: Story, method: str, about: str = "a logo") -> None:
    """Print one edit and what it did.

    Args:
        about: what the picture shows.
    """
    from .demo_story import NAMES, near

    request = story.request
    console.print(f"\nQuestion: {request.prompt}   [dim](about a picture: {about})[/dim]")
    console.print(f"The unedited model answers [bold]{story.moments[method][0].before}[/bold].")
    console.print(f"Told once with {NAMES[method]} to answer [bold]{request.target}[/bold], it now answers:")
    console.print(story_table(story, method))
    radius = near(story.moments[method][0].radius)
    console.print(f"[dim]The edit fires up to distance {radius}, its radius.[/dim]")


def story_table(story: Story, method: str) -> Table:
    """The questions of a story with their answers before and after."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from .demo_story import KINDS, brief, near

    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for title in ("asked", "question", "before", "after", "right", "fires", "distance"):
        table.add_column(title, overflow="fold", no_wrap=title in ("asked", "right", "fires", "distance"))
    for moment in brief(story.moments[method]):
        mark = "[green]yes[/green]" if moment.right else "[red]NO[/red]"
        kind, fires = KINDS[moment.metric][0], "yes" if moment.fired else "no"
        before, after = (_clipped(text) for text in (moment.before, moment.after))
        table.add_row(kind, moment.prompt, before, after, mark, fires, near(moment.distance))
    return table


def _clipped(answer: str) -> str:
    return answer if len(answer) <= _SHOWN else answer[: _SHOWN - 4].rstrip() + " ..."


def conclude(console: Console, results: dict[str, SingleResult]) -> None:
    """Print the figures and what they mean."""
    from .demo_story import untouched

    rows = [result.row for result in results.values()]
    console.print(f"{rows[0].n} single edits: % right and 95% interval, answers generated freely")
    console.print(figures_table(results))
    same, closed = untouched(results)
    console.print(f"No gate, no change: {same} of {closed} answers where no edit fired are as before.")


def figures_table(results: dict[str, SingleResult]) -> Table:
    """Percentages with their intervals: a line a metric with its meaning, a column a method."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from .demo_story import MEANINGS, NAMES, TITLES

    rows = [result.row for result in results.values()]
    table = Table(box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    table.add_column("")
    for row in rows:
        table.add_column(NAMES[row.method], justify="right", no_wrap=True)
    table.add_column("", style="dim")
    for name, title in TITLES.items():
        figures = (figure(row, name) for row in rows)
        table.add_row(title, *figures, MEANINGS[name])
    return table


def figure(row: Row, name: str) -> str:
    """A percentage as tables show it, with its 95% interval where there is one."""
    value = row.metrics[name]
    if value is None:
        return "-"
    pair = (row.interval or {}).get(name)
    return f"{value:.1f}" if pair is None else f"{value:.1f} [{pair[0]:.1f}, {pair[1]:.1f}]"


# ---------------------------------------------------------------------- in the README


def fill_readme(
    file: Path, story: Story, results: dict[str, SingleResult], about: str = "a logo"
) -> str:
    """The text of a README with its generated blocks (`story`, `figures`) filled in.

    Raises:
        ValueError: the file has no such block.
    """
    text = _read(file)
    check_readme(file, text)
    blocks = {"story": _story_text(story, about), "figures": _figures_text(results)}
    return _BLOCK.sub(lambda match: match[1] + blocks[match[2]] + match[3], text)


def _read(file: Path) -> str:
    return file.read_text(encoding="utf-8") if file.is_file() else ""


def check_readme(file: Path, text: str) -> None:
    """Refuse a README without the generated blocks. Raises ValueError."""
    if {name for _, name, _ in _BLOCK.findall(text)} != {"story", "figures"}:
        raise ValueError(f"--readme {file} needs '<!-- generated: NAME -->' blocks named story and figures.")


def _story_text(story: Story, about: str) -> str:
    from rich.console import Console

    console = Console(file=io.StringIO(), record=True, width=118, color_system=None, highlight=False)
    tell(console, story, next(iter(story.moments)), about)
    lines = [line.rstrip() for line in console.export_text().strip().splitlines()]
    return "```text\n" + "\n".join(lines) + "\n```\n"


def _figures_text(results: dict[str, SingleResult]) -> str:
    from .demo_story import NAMES, TITLES

    rows = [result.row for result in results.values()]
    titles = " | ".join(TITLES.values())
    lines = [f"| {rows[0].n} edits | {titles} |", "|---" * (1 + len(TITLES)) + "|"]
    for row in rows:
        cells = (figure(row, name) for name in TITLES)
        lines.append(f"| {NAMES[row.method]} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
