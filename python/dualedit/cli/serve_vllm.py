"""`dualedit serve --engine vllm`: a front, servers of vLLM with the edits, and an editor for new ones."""

from __future__ import annotations

import os
import secrets
import shlex
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from .loading import is_smol, model_for, open_or_start
from .serve import TOKEN, Options, is_loopback, settings_of
from .terminal import quiet


@dataclass(frozen=True)
class EngineOptions:
    """What the command line says of the engine.

    Attributes:
        store: address of the store; None: beside the folder of edits.
        form: "optimistic" or "router".
        replicas: how many servers are started here.
        servers, routers: addresses of servers that run already; then none are started.
        vllm: options of vLLM's own, as one text.
        values: "as stored" or "int8".
    """

    store: str | None
    form: str
    replicas: int
    servers: tuple[str, ...]
    routers: tuple[str, ...]
    vllm: str
    values: str

    def check(self) -> None:
        """Refuse what cannot be. Raises ValueError, or ImportError for what is missing."""
        from ..serving.vllm.front import FORMS
        from ..serving.vllm.launch import check_vllm
        from ..serving.vllm.values import VALUES

        if self.form not in FORMS:
            raise ValueError(f"--form {self.form}: choose one of {', '.join(FORMS)}.")
        if self.values not in VALUES:
            raise ValueError(f"--values {self.values!r}: choose one of {', '.join(VALUES)}.")
        if self.replicas < 1:
            raise ValueError(f"--replicas {self.replicas}: pass a whole number from 1 on.")
        if self.form == "router" and self.servers and not self.routers:
            raise ValueError("--form router with --server needs the address of a router: --router URL.")
        if not self.servers:
            check_vllm()


def run(options: Options, engine: EngineOptions) -> None:
    """Serve until Ctrl-C."""
    import uvicorn

    from ..serving.vllm.app import PublishingService, create_front
    from ..serving.vllm.front import Front
    from ..serving.vllm.launch import Server, Servers, architecture_of
    from ..serving.vllm.replicas import Replicas
    from ..store import Store, publish

    token = options.token or os.environ.get(TOKEN) or secrets.token_urlsafe(16)
    model = model_for(options.edits, options.model)
    if is_smol(model):
        raise ValueError("--engine vllm does not serve smol, which vLLM does not know. Leave --engine out.")
    if model is None:
        from ..toy.model import WEIGHTS as model
    architecture_of(model)
    store = engine.store or f"{options.edits}-store"
    with quiet():
        # A request is routed once, so an edit that the adapter cannot write is refused, not given to another.
        start = replace(options.start, fallback="none")
        editor = open_or_start(options.edits, options.model, start)
        settings = settings_of(options, token)
        service = PublishingService(editor, options.edits, settings, store)
        if not (options.edits / "adapter_config.json").is_file():
            from ..storage import save_edits

            save_edits(editor.model, options.edits)  # servers need the adapter before the first edit
        publish(options.edits, store)
        opened = Store(store)
        code = code_of(editor)
    started = None
    servers, routers = list(engine.servers), list(engine.routers)
    if not servers:
        base = Server(model, settings.name, store, shlex.split(engine.vllm), None, engine.values)
        wanted = [base] * engine.replicas
        if engine.form == "router":
            wanted = [*wanted, replace(base, router=gate_of(opened) + 1)]
        logs = Path(tempfile.mkdtemp(prefix="dualedit-vllm-"))
        print(f"Starting {len(wanted)} servers of vLLM; their logs are in {logs}.", flush=True)
        started = Servers(wanted, logs)
        started.start()
        servers, routers = started.urls[: engine.replicas], started.urls[engine.replicas :]
    try:
        front = Front(
            opened, Replicas(servers), code, engine.form, Replicas(routers) if routers else None
        )
        config = uvicorn.Config(create_front(front, service), options.host, options.port, log_level="warning")
        listening = config.bind_socket()
        listening.listen(config.backlog)
        host, port = listening.getsockname()[:2]
        _announce(options, f"http://{host}:{port}", token, settings.name, store, len(servers))
        uvicorn.Server(config).run(sockets=[listening])
    finally:
        if started is not None:
            started.close()


def gate_of(store) -> int:
    """Number of the decoder layer at which a store's edits are looked up."""
    import torch

    from ..serving.vllm.values import EngineEdits

    return EngineEdits(store, torch.device("cpu"), torch.float32).layers[0].number


def code_of(editor):
    """The tokens that a worker of an editor's model may speak with."""
    from ..models.architectures import image_token_ids
    from ..serving.vllm.answers import Code
    from ..tuners.adapter import active_adapter

    config = active_adapter(editor.model).config
    images = config.image_token_ids or image_token_ids(editor.model.get_base_model())
    if not images:
        raise ValueError("--engine vllm: the model's config names no image token, and its workers need one.")
    ends = editor.model.generation_config.eos_token_id
    ends = list(ends) if isinstance(ends, (list, tuple)) else [ends]
    tokenizer = editor.prompter.tokenizer
    avoided = [*images, *tokenizer.all_special_ids]
    return Code.of(images[0], [end for end in ends if end is not None] or [tokenizer.eos_token_id], avoided)


def _announce(options: Options, address: str, token: str, name: str, store: str, servers: int) -> None:
    print(f"Serving {name} with the edits in {options.edits} on {servers} server(s). Ctrl-C ends it.")
    print(f"  service   {address}/v1   (OpenAI's clients: base_url; docs: {address}/docs)")
    print(f"  store     {store}")
    if not options.read_only:
        print(f"  token     {token}   (for changes: Authorization: Bearer ...)")
    if not is_loopback(options.host):
        print("  Whoever reaches this address may ask. It is not encrypted: put a proxy with TLS in front.")
    sys.stdout.flush()
