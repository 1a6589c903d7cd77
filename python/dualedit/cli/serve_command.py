"""`dualedit serve` with its options; what it does is in `serve.py`, which is heavy."""

from __future__ import annotations

from typing import Annotated

import typer

from .book_commands import ASKED, FOLDER
from .errors import options as named
from .options import Adapter, Edits, Layer, Model


def serve(
    edits: Edits = FOLDER,
    model: Model = None,
    method: Annotated[
        str | None, typer.Option(metavar="NAME", help="dualedit or balancedit, for a new folder.")
    ] = None,
    adapter: Adapter = None,
    layer: Layer = None,
    host: Annotated[
        str, typer.Option(metavar="ADDRESS", help="Where to listen; 0.0.0.0 is everywhere.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(metavar="N", help="Port; 0 takes a free one.")] = 8000,
    token: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="What changes must carry ($DUALEDIT_TOKEN; else one is drawn)."),
    ] = None,
    read_only: Annotated[bool, typer.Option("--read-only", help="No changes at all.")] = False,
    urls: Annotated[
        bool, typer.Option("--urls", help="Fetch pictures by their public http addresses, too.")
    ] = False,
    page: Annotated[bool, typer.Option("--page/--no-page", help="A page for people at /.")] = True,
    batch: Annotated[int, typer.Option(metavar="N", help="Questions answered together.")] = 16,
    tokens: Annotated[int, typer.Option(metavar="N", help="Most tokens of an answer.")] = 256,
    queue: Annotated[int, typer.Option(metavar="N", help="Most requests that wait.")] = 256,
) -> None:
    """Serve an edited model: a page to ask and correct, and a service that OpenAI's clients call.

    Edits are saved in the folder after each change.
    """
    from . import serve as work
    from .loading import Start

    options = work.Options(
        edits, model, Start(method, adapter, layer), host, port, token, read_only, urls, page, batch, tokens,
        queue,
    )  # fmt: skip
    options.check()
    with named(**ASKED):
        work.run(options)


def add_command(app: typer.Typer) -> None:
    """Put the command into the program."""
    app.command()(serve)
