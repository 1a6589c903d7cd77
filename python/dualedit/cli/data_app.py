"""The options of `dualedit data`: build, check, stats."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .errors import options as named
from .options import Format, Images, SkipBad, path
from .terminal import quiet

app = typer.Typer(
    name="data", help="Build, check and count facts of your own.", no_args_is_help=True, add_completion=False
)
_READ = {"path": "FILE", "format": "--format", "image_root": "--images", "skip_bad": "--skip-bad",
         "limit": "--limit", "url": "--endpoint"}  # fmt: skip


def _folder(option: str, help: str):  # noqa: A002
    return typer.Option(option, parser=path, metavar="DIR", help=help)


def _count(help: str):  # noqa: A002
    return typer.Option(metavar="N", help=help)


@app.command()
def build(
    rows: Annotated[
        str,
        typer.Argument(metavar="ROWS", help="File with image, question, answer, new_answer; or toy, smol."),
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", parser=path, metavar="FILE", help="Where to write the facts.")
    ] = Path("facts.jsonl"),
    model: Annotated[
        str | None,
        typer.Option(
            "--model", "-m", metavar="MODEL", help="Who is asked: a folder, toy, smol, or none (nobody)."
        ),
    ] = None,
    text_model: Annotated[Path | None, _folder("--text-model", "Local language model for questions.")] = None,
    endpoint: Annotated[
        str | None, typer.Option(metavar="URL", help="OpenAI-compatible endpoint for questions, .../v1")
    ] = None,
    endpoint_model: Annotated[str, typer.Option(metavar="NAME", help="Its model.")] = "default",
    key_variable: Annotated[
        str, typer.Option(metavar="NAME", help="Environment variable with its key.")
    ] = "OPENAI_API_KEY",
    pictures: Annotated[
        Path | None, _folder("--pictures", "Own pictures: ID/same, ID/alike, unrelated.")
    ] = None,
    unlabelled: Annotated[
        Path | None, _folder("--unlabelled", "Pictures without labels, for look-alikes and unrelated ones.")
    ] = None,
    diffusers: Annotated[Path | None, _folder("--diffusers", "Local pipeline that draws pictures.")] = None,
    rephrases: Annotated[int, _count("Rephrased questions that test.")] = 4,
    edit_rephrases: Annotated[int, _count("Rephrased questions for editing.")] = 2,
    near_questions: Annotated[int, _count("Other questions about the picture.")] = 2,
    texts: Annotated[int, _count("Questions without a picture.")] = 2,
    other_images: Annotated[int, _count("Other pictures of the same thing.")] = 3,
    look_alikes: Annotated[int, _count("Pictures of look-alikes.")] = 2,
    unrelated_images: Annotated[int, _count("Pictures of other things.")] = 2,
    unanswered: Annotated[
        bool, typer.Option("--unanswered", help="Keep what the unedited model does not answer, too.")
    ] = False,
    limit: Annotated[int | None, typer.Option(metavar="N", help="The first rows alone.")] = None,
    images: Images = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave bad rows out.")] = False,
    price: Annotated[
        str | None, typer.Option(metavar="IN,OUT", help="Price of a million tokens, for the estimate.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it would take, and stop.")] = False,
    cache: Annotated[
        Path | None, typer.Option(parser=path, metavar="FILE", help="What was made; else beside --out.")
    ] = None,
    review: Annotated[
        Path | None, typer.Option(parser=path, metavar="FILE", help="Write a page to accept or reject on.")
    ] = None,
    decisions: Annotated[
        Path | None, typer.Option(parser=path, metavar="FILE", help="What that page saved.")
    ] = None,
) -> None:
    """Build facts with rephrasings, other pictures and look-alikes around rows of your own.

    A stopped build, run again, goes on.
    """
    from ..datasets.build import Wanted
    from . import data as work

    with quiet(), named(**_READ):
        wanted = Wanted(
            rephrases, edit_rephrases, near_questions, texts, other_images, look_alikes, unrelated_images,
            not unanswered,
        )  # fmt: skip
        work.build_facts(
            work.Options(
                rows, out, model, text_model, endpoint, endpoint_model, key_variable, pictures, unlabelled,
                diffusers, wanted, limit, images, skip_bad, price, dry_run, cache, review, decisions,
            )
        )  # fmt: skip


_FILE = Annotated[Path, typer.Argument(parser=path, metavar="FILE", help="File of facts.")]


@app.command()
def check(
    file: _FILE,
    test: Annotated[
        Path | None, typer.Option(parser=path, metavar="FILE", help="Test facts that must be others.")
    ] = None,
    format: Format = "auto",
    images: Images = None,
    skip_bad: SkipBad = False,
) -> None:
    """Say what is wrong or missing in a file of facts; exit code 1 if something is wrong."""
    from . import data as work

    with quiet(), named(**_READ):
        code = work.check(file, test, format, images, skip_bad)
    raise typer.Exit(code)


@app.command()
def stats(
    file: _FILE,
    format: Format = "auto",
    images: Images = None,
    skip_bad: SkipBad = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Count what is in a file of facts."""
    from . import data as work

    with quiet(), named(**_READ):
        work.stats(file, format, images, skip_bad, json)


@app.command()
def schema() -> None:
    """Print the JSON Schema of a line of facts.jsonl."""
    from ..datasets.build.checking import SCHEMA

    print(SCHEMA.read_text(encoding="utf-8"), end="")
