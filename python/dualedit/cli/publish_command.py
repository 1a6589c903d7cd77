"""`dualedit publish`: from a folder of edits to a store that servers read."""

from __future__ import annotations

import json as json_
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from .options import path
from .terminal import quiet


def publish(
    folder: Annotated[Path, typer.Argument(parser=path, metavar="FOLDER", help="Folder of saved edits.")],
    store: Annotated[
        str, typer.Argument(metavar="STORE", help="A folder, or an address such as s3://bucket/edits.")
    ],
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Bring a store to what a folder of edits holds; servers that read it follow by themselves.

    Only what changed is written. No model is loaded.
    """
    if not store.strip():
        raise typer.BadParameter("STORE is empty: pass a folder or an address.")
    from ..store import publish as work

    with quiet():
        done = work(folder, store)
    if json:
        print(json_.dumps(asdict(done)))
    elif done.added or done.changed or done.removed:
        changes = f"{done.added} added, {done.changed} changed, {done.removed} removed"
        print(f"{store}: version {done.version}, {done.edits} edits ({changes}).")
    else:
        print(f"{store}: version {done.version}, {done.edits} edits; nothing new.")


def add_command(app: typer.Typer) -> None:
    """Put the command into the program."""
    app.command()(publish)
