"""The commands on a folder of edits, and their options. Each imports what is heavy itself."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .errors import options as named
from .options import Adapter, Edits, Layer, Model, NoModel, Picture, Question, path
from .terminal import quiet

ASKED = {"image": "IMAGE", "prompt": "QUESTION", "target": "ANSWER", "rephrases": "--rephrase",
         "tags": "--tag", "negatives": "--unlike", "layer": "--layer", "folder": "--edits",
         "expires": "--expires", "note": "--note", "author": "--author"}  # fmt: skip
FOLDER = Path("edits")
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Number = Annotated[int, typer.Argument(metavar="ID", help="Number of the edit, from 'dualedit list'.")]
Author = Annotated[str | None, typer.Option(metavar="NAME", help="Who says so.")]
Note = Annotated[str | None, typer.Option(metavar="TEXT", help="Why, or where it is from.")]
Tags = Annotated[list[str] | None, typer.Option(metavar="TAG", help="A tag; may be repeated.")]
Expires = Annotated[
    str | None,
    typer.Option(metavar="WHEN", help="From then on it answers nothing (ISO 8601, as 2030-01-31)."),
]


def add_commands(app: typer.Typer) -> None:
    """Register the commands of this file."""
    for name, command in _COMMANDS.items():
        app.command(name=name)(command)


def list_(
    edits: Edits = FOLDER,
    json: Json = False,
    text: Annotated[str | None, typer.Option(metavar="TEXT", help="In question, answer or note.")] = None,
    tag: Annotated[str | None, typer.Option(metavar="TAG", help="With this tag.")] = None,
    author: Annotated[str | None, typer.Option(metavar="NAME", help="Of this author.")] = None,
    since: Annotated[str | None, typer.Option(metavar="WHEN", help="Stored then or later.")] = None,
    failed: Annotated[bool, typer.Option("--failed", help="Those that failed.")] = False,
    off: Annotated[bool, typer.Option("--off", help="Those that are off.")] = False,
) -> None:
    """List the saved edits."""
    from .book import show_list

    show_list(edits, json, text, tag, author, since, failed, off)


def show(
    edit_id: Number,
    edits: Edits = FOLDER,
    json: Json = False,
    picture: Annotated[
        Path | None, typer.Option(parser=path, metavar="FILE", help="Write its picture, or thumbnail, here.")
    ] = None,
) -> None:
    """Show all that is noted about a saved edit."""
    from .book import show as work

    work(edits, edit_id, json, picture)


def remove(
    edit_ids: Annotated[
        list[int], typer.Argument(metavar="ID", help="Number of the edit, from 'dualedit list'.")
    ],
    edits: Edits = FOLDER,
    model: NoModel = None,
    json: Json = False,
) -> None:
    """Forget saved edits."""
    from .book import remove as work

    work(edits, edit_ids, json)


def enable(edit_id: Number, edits: Edits = FOLDER, json: Json = False) -> None:
    """Let a saved edit answer that was off."""
    from .book import switch

    switch(edits, edit_id, True, json)


def disable(edit_id: Number, edits: Edits = FOLDER, json: Json = False) -> None:
    """Keep a saved edit and let it answer nothing."""
    from .book import switch

    switch(edits, edit_id, False, json)


def note(
    edit_id: Number,
    edits: Edits = FOLDER,
    author: Author = None,
    note: Note = None,
    tag: Tags = None,
    expires: Expires = None,
    json: Json = False,
) -> None:
    """Note something with a saved edit; an empty text takes a note away."""
    from .book import annotate

    with named(**ASKED):
        annotate(edits, edit_id, author, note, tag or None, expires, json)


def undo(edits: Edits = FOLDER, json: Json = False) -> None:
    """Take the last change of the saved edits back."""
    from .book import step

    step(edits, "undo", json)


def redo(edits: Edits = FOLDER, json: Json = False) -> None:
    """Do the change again that was taken back last."""
    from .book import step

    step(edits, "redo", json)


def replace(
    edit_id: Number,
    answer: Annotated[str, typer.Argument(metavar="ANSWER", help="The new answer.")],
    edits: Edits = FOLDER,
    model: Model = None,
    json: Json = False,
) -> None:
    """Tell a saved edit another answer, to its own picture and question."""
    from .telling import replace as work

    with quiet(), named(**ASKED):
        work(edits, model, edit_id, answer, json)


def export(
    file: Annotated[Path, typer.Argument(parser=path, metavar="FILE", help="JSON lines to write.")],
    edits: Edits = FOLDER,
    json: Json = False,
) -> None:
    """Write the saved edits to one file, with their pictures."""
    from .book import export as work

    work(edits, file, json)


def import_(
    file: Annotated[
        Path, typer.Argument(parser=path, metavar="FILE", help="An export, JSON lines, or a table (.csv).")
    ],
    edits: Edits = FOLDER,
    model: Model = None,
    method: Annotated[
        str | None, typer.Option(metavar="NAME", help="dualedit or balancedit, for a folder's first edit.")
    ] = None,
    adapter: Adapter = None,
    layer: Layer = None,
    fallback: Annotated[str, typer.Option(metavar="NAME", help="As of 'dualedit edit'.")] = "balancedit",
    keep_failed: Annotated[bool, typer.Option("--keep-failed", help="Save those, too, that fail.")] = False,
    json: Json = False,
) -> int:
    """Tell many edits: of an export, or of a file with image, question and answer in each line."""
    from .loading import Start
    from .telling import import_edits

    start = Start(method, adapter, layer, fallback)
    start.check()
    with quiet(), named(**ASKED):
        return import_edits(edits, model, start, file, keep_failed, json)


def merge(
    other: Annotated[Path, typer.Argument(parser=path, metavar="DIR", help="Another folder of saved edits.")],
    edits: Edits = FOLDER,
    model: Model = None,
    json: Json = False,
) -> None:
    """Take over another folder's edits of the same base model."""
    from .telling import merge as work

    with quiet(), named(**ASKED):
        work(edits, model, other, json)


def explain(
    image: Picture, question: Question, edits: Edits = FOLDER, model: Model = None, json: Json = False
) -> None:
    """Say which edits are near to a question, how near, and which of them answers."""
    from .telling import explain as work

    with quiet(), named(**ASKED):
        work(edits, model, image, question, json)


def check(edits: Edits = FOLDER, model: Model = None, json: Json = False) -> int:
    """Ask every saved edit again; exit code 1 where one does not answer as told."""
    from .telling import check as work

    with quiet(), named(**ASKED):
        return work(edits, model, json)


def conflicts(edits: Edits = FOLDER, model: Model = None, json: Json = False) -> int:
    """List pairs of edits that contradict each other; exit code 1 where there are any."""
    from .telling import conflicts as work

    with quiet(), named(**ASKED):
        return work(edits, model, json)


Folder = Annotated[Path, typer.Argument(parser=path, metavar="FOLDER", help="Folder of saved edits.")]


def verify(folder: Folder = FOLDER, json: Json = False) -> None:
    """Read every byte of a folder of edits and compare it with what was written."""
    from .book import verify as work

    work(folder, json)


def compact(folder: Folder = FOLDER, json: Json = False) -> None:
    """Put all commits of a folder of edits into its adapters' own files."""
    from .book import compact as work

    with quiet():
        work(folder, json)


def migrate(folder: Folder = FOLDER, json: Json = False) -> None:
    """Give a folder of version 0.1, of PEFT, or changed by hand the files of this version."""
    from .book import migrate as work

    work(folder, json)


_COMMANDS = {
    "list": list_, "show": show, "remove": remove, "enable": enable, "disable": disable, "note": note,
    "undo": undo, "redo": redo, "replace": replace, "export": export, "import": import_, "merge": merge,
    "explain": explain, "check": check, "conflicts": conflicts, "verify": verify, "compact": compact,
    "migrate": migrate,
}  # fmt: skip
