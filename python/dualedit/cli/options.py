"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def path(text: str | Path) -> Path:
    """A path of the command line; an empty one would be the working folder, which nobody means by it."""
    if not str(text).strip():
        raise typer.BadParameter("it is empty: pass a path, or . for the working folder.")
    return Path(text)


Edits = Annotated[
    Path, typer.Option("--edits", "-e", parser=path, metavar="DIR", help="Folder of saved edits.")
]
Model = Annotated[
    Path | None,
    typer.Option(
        "--model", "-m", parser=path, metavar="DIR",
        help="Hugging Face model (a folder, or ORG/NAME[@REVISION]), smol or toy.",
    ),
]
NoModel = Annotated[
    Path | None, typer.Option("--model", "-m", parser=path, hidden=True, help="Not needed to remove an edit.")
]
Adapter = Annotated[
    Path | None, typer.Option(parser=path, metavar="DIR", help="Trained DualEdit adapters, for --model.")
]
Layer = Annotated[str | None, typer.Option(metavar="NAME", help="Linear layer for BalancEdit, for --model.")]
Format = Annotated[str, typer.Option(metavar="NAME", help="Format of --data.")]
Images = Annotated[
    Path | None,
    typer.Option(
        "--images", "--image-root", parser=path, metavar="DIR", help="Where image paths of --data start from."
    ),
]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Leave bad rows of --data out.")]
Picture = Annotated[str, typer.Argument(metavar="IMAGE", help="Picture file; - asks without a picture.")]
Question = Annotated[str, typer.Argument(metavar="QUESTION", help="The question, in quotes.")]
