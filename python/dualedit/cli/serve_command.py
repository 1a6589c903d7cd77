"""`dualedit serve` with its options; what it does is in `serve.py`, which is heavy."""

from __future__ import annotations

from dataclasses import replace
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
    engine: Annotated[
        str, typer.Option(metavar="NAME", help="own: this process; vllm: a front of vLLM's servers.")
    ] = "own",
    store: Annotated[
        str | None, typer.Option(metavar="PLACE", help="With vllm: where edits are published (EDITS-store).")
    ] = None,
    form: Annotated[
        str, typer.Option(metavar="NAME", help="With vllm: optimistic, or router: a key before the answer.")
    ] = "optimistic",
    replicas: Annotated[int, typer.Option(metavar="N", help="With vllm: servers that are started here.")] = 1,
    server: Annotated[
        list[str] | None, typer.Option(metavar="URL", help="With vllm: a server that runs already; repeated.")
    ] = None,
    router: Annotated[
        list[str] | None, typer.Option(metavar="URL", help="With vllm: a router that runs already.")
    ] = None,
    vllm: Annotated[str, typer.Option(metavar="TEXT", help="With vllm: its own options, in quotes.")] = "",
    values: Annotated[
        str, typer.Option(metavar="NAME", help="With vllm: values of edits: as stored, int8 or float8.")
    ] = "as stored",
    budget: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Memory for the edits' values, as 500MB; the rest stays on disk."),
    ] = None,
) -> None:
    """Serve an edited model: a page to ask and correct, and a service that OpenAI's clients call.

    Edits are saved in the folder after each change.
    """
    from . import serve as work
    from .loading import Start

    options = work.Options(
        edits, model, Start(method, adapter, layer, budget=budget), host, port, token, read_only, urls, page,
        batch, tokens, queue,
    )  # fmt: skip
    if engine not in ("own", "vllm"):
        raise ValueError(f"--engine {engine}: choose own or vllm.")
    if engine == "vllm":
        from . import serve_vllm

        options = replace(options, page=False)  # the page asks its own process's model
        options.check()
        own = serve_vllm.EngineOptions(
            store, form, replicas, tuple(server or ()), tuple(router or ()), vllm, values
        )
        own.check()
        with named(**ASKED):
            serve_vllm.run(options, own)
        return
    options.check()
    with named(**ASKED, budget="--budget"):
        work.run(options)


def add_command(app: typer.Typer) -> None:
    """Put the command into the program."""
    app.command()(serve)
