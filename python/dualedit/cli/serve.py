"""`dualedit serve`: a page and a service around one edited model."""

from __future__ import annotations

import ipaddress
import os
import secrets
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .loading import Start, is_smol, model_for, open_or_start
from .terminal import quiet

if TYPE_CHECKING:
    from ..serving import Example, Settings

TOKEN = "DUALEDIT_TOKEN"
_MISSING = "{} is not installed, which dualedit serve needs: pip install fastapi uvicorn prometheus-client{}"


@dataclass(frozen=True)
class Options:
    """What the command line says.

    Attributes:
        edits, model, start: as the other commands take them.
        host, port: where to listen.
        token: that changes must carry; None draws one.
        read_only, urls, page: see `Settings`.
        batch, tokens, queue: see `Limits`.
    """

    edits: Path
    model: Path | None
    start: Start
    host: str
    port: int
    token: str | None
    read_only: bool
    urls: bool
    page: bool
    batch: int
    tokens: int
    queue: int

    def check(self) -> None:
        """Refuse what cannot be. Raises ValueError, or ImportError for an extra that is missing."""
        self.start.check()
        for name, value in (("--batch", self.batch), ("--tokens", self.tokens), ("--queue", self.queue)):
            if value < 1:
                raise ValueError(f"{name} {value}: pass a whole number from 1 on.")
        if not 0 <= self.port < 65536:
            raise ValueError(f"--port {self.port}: pass a number from 0 to 65535; 0 takes any free one.")
        try:
            import fastapi  # noqa: F401
            import prometheus_client  # noqa: F401
            import uvicorn  # noqa: F401
        except ImportError as error:
            raise ImportError(_MISSING.format(error.name, "")) from error
        if self.page:
            try:
                import gradio  # noqa: F401
            except ImportError as error:
                raise ImportError(_MISSING.format(error.name, " gradio; or pass --no-page.")) from error


def is_loopback(host: str) -> bool:
    """Whether an address is reached from this machine alone."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def settings_of(options: Options, token: str) -> Settings:
    """The service's settings of a command line."""
    from ..serving import Limits, Settings

    model = model_for(options.edits, options.model)
    name = "embedded" if model is None else "smol" if is_smol(model) else model.name
    hosts = ("localhost", "127.0.0.1", "[::1]", options.host) if is_loopback(options.host) else ("*",)
    limits = Limits(questions=options.queue, batch=options.batch, tokens=options.tokens)
    return Settings(
        name=name, token=token, read_only=options.read_only, urls=options.urls, hosts=hosts,
        page=options.page, limits=limits,
    )  # fmt: skip


def run(options: Options) -> None:
    """Serve until Ctrl-C."""
    import uvicorn

    from ..serving import Service, create_app

    token = options.token or os.environ.get(TOKEN) or secrets.token_urlsafe(16)
    with quiet():
        editor = open_or_start(options.edits, options.model, options.start)
        examples = _examples(model_for(options.edits, options.model)) if options.page else []
        service = Service(editor, options.edits, settings_of(options, token), examples)
    config = uvicorn.Config(create_app(service), options.host, options.port, log_level="warning")
    listening = config.bind_socket()  # port 0 takes any free one
    listening.listen(config.backlog)  # who calls from now on waits and is not turned away
    host, port = listening.getsockname()[:2]
    _announce(options, f"http://{f'[{host}]' if ':' in host else host}:{port}", token)
    uvicorn.Server(config).run(sockets=[listening])


def _examples(model: Path | None) -> list[Example]:
    """Pictures for the page that the shipped models know something about."""
    from ..models.images import rgb
    from ..serving import Example

    if model is None:
        from ..toy.pictures import sample_pictures

        found = []
        for picture in sample_pictures():
            title = Path(picture.file).stem.replace("-again", " again")
            asked = tuple(question for question, _ in picture.questions)
            found.append(Example(picture.image, title, picture.shows, asked))
        return found
    if not is_smol(model):
        return []
    from ..smol import load_concepts
    from ..smol.wordings import ATTRIBUTES, OF_THINGS, QUESTIONS

    found = []
    for family in ("flags", "food"):
        asked = tuple(QUESTIONS[name].question for name in ATTRIBUTES.get(family, OF_THINGS)[:3])
        one, other = [concept for concept in load_concepts((family,)) if len(concept.pictures) > 1][:2]
        drawings = [*list(one.pictures.items())[:2], next(iter(other.pictures.items()))]
        for concept, (artist, file) in zip((one, one, other), drawings, strict=True):
            shows = f"{concept.name}, drawn by {artist}"
            found.append(Example(rgb(str(file)), concept.name, shows, asked))
    return found


def _announce(options: Options, address: str, token: str) -> None:
    count = f"edits in {options.edits}"
    print(f"Serving {settings_of(options, token).name} with the {count}. Ctrl-C ends it.")
    query = "" if options.read_only else f"?token={token}"
    if options.page:
        print(f"  page      {address}/{query}")
    print(f"  service   {address}/v1   (OpenAI's clients: base_url; docs: {address}/docs)")
    if not options.read_only:
        print(f"  token     {token}   (for changes: Authorization: Bearer ...)")
    if not is_loopback(options.host):
        print("  Whoever reaches this address may ask. It is not encrypted: put a proxy with TLS in front.")
    sys.stdout.flush()
