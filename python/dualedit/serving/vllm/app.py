"""The HTTP interface of the front: OpenAI's routes, those for the edits, health and metrics."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.middleware.trustedhost import TrustedHostMiddleware

from ...editing import Edit
from ...store import publish
from ..app import TEXT, BodyLimit, add_error_handlers
from ..edits import edit_routes
from ..service import Service
from ..settings import Refused
from .front import Front

log = logging.getLogger("dualedit.vllm")
_AGAIN = 1.0  # seconds until a publication that failed is tried again


class PublishingService(Service):
    """An edited model whose changes are published: confirmed when they are in the store.

    Args:
        editor, folder, settings: as `Service`.
        store: address of the store.
    """

    def __init__(self, editor: Any, folder: Path, settings: Any, store: str):
        super().__init__(editor, folder, settings)
        self.store = store
        self._behind = threading.Event()
        self._closed = threading.Event()

    def start(self) -> None:
        super().start()
        threading.Thread(target=self._catch_up, name="dualedit-publish", daemon=True).start()

    def close(self) -> None:
        self._closed.set()
        super().close()

    def _noted(self, who: str, what: str, edit: Edit) -> Edit:
        try:
            publish(self.folder, self.store)
        except (OSError, ValueError) as error:
            # It is saved, and the next publication takes it along.
            self._behind.set()
            log.error("edit %s is saved and not published: %s", edit.id, error)
            super()._noted(who, what, edit)
            raise Refused(
                503, "not_published", f"Edit {edit.id} is saved, and is published later: {error}", 5
            ) from error
        return super()._noted(who, what, edit)

    def _catch_up(self) -> None:
        while not self._closed.wait(_AGAIN):
            if not self._behind.is_set():
                continue
            try:
                publish(self.folder, self.store)
                self._behind.clear()
            except (OSError, ValueError) as error:
                log.error("still not published: %s", error)


def create_front(front: Front, service: Service) -> FastAPI:
    """The application of a front, and of the service that makes its edits.

    Args:
        front: to the servers of the model.
        service: whose editor makes edits; it answers no questions.
    """
    from ... import __version__

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        front.store.follow(0.25)
        yield
        service.close()
        await front.close()

    settings = service.settings
    app = FastAPI(title="DualEdit", version=__version__, lifespan=lifespan)
    app.add_middleware(BodyLimit, limit=settings.limits.body)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(settings.hosts))
    app.include_router(_chat_routes(front, settings.name))
    app.include_router(edit_routes(service))
    add_error_handlers(app, service)

    @app.get("/health")
    async def health() -> Response:
        alive = await front.replicas.alive()
        state = {
            "status": "ok" if alive else "no server", "model": settings.name, "version": __version__,
            "store": front.store.now().version, "edits": front.store.now().manifest.edits,
            "servers": {replica.url: replica.url in alive for replica in front.replicas.replicas},
        }  # fmt: skip
        return JSONResponse(state, 200 if alive else 503)

    @app.get("/metrics")
    def metrics() -> Response:
        mine = "".join(
            f"# TYPE dualedit_front_{name}_total counter\ndualedit_front_{name}_total {count}\n"
            for name, count in front.counts.items()
        )
        version = f"# TYPE dualedit_store_version gauge\ndualedit_store_version {front.store.now().version}\n"
        return Response(service.metrics.text() + (mine + version).encode(), media_type=TEXT)

    return app


def _chat_routes(front: Front, model: str) -> APIRouter:
    router, began = APIRouter(), int(time.time())

    @router.get("/v1/models")
    def models() -> dict[str, Any]:
        one = {"id": model, "object": "model", "created": began, "owned_by": "dualedit"}
        return {"object": "list", "data": [one]}

    @router.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        try:
            body = await request.json()
        except ValueError as error:
            raise Refused(400, "invalid_request", f"The body is no JSON: {error}") from error
        if not isinstance(body, dict) or not isinstance(body.get("messages"), list):
            raise Refused(400, "invalid_request", "messages: pass a list.")
        if body.get("model") not in (None, "", model):
            raise Refused(404, "model_not_found", f"model={body['model']!r}: this service has {model!r}.")
        found = await front.answer({**body, "model": model})
        headers = found.chosen.headers()
        number = None if found.chosen.edit is None else found.chosen.edit.id
        if found.whole is not None:
            return JSONResponse({**found.whole, "dualedit": {"edit": number}}, headers=headers)
        assert found.chunks is not None
        events = _events(found.chunks)
        first = await anext(events)  # what a server refuses is told by the status, before the stream begins
        headers["Cache-Control"] = "no-cache"
        return StreamingResponse(_again(first, events), media_type="text/event-stream", headers=headers)

    return router


async def _events(chunks: AsyncIterator[dict[str, Any]]) -> AsyncIterator[str]:
    name, began = None, False
    try:
        async for chunk in chunks:
            name, began = name or chunk.get("id"), True
            chunk["id"] = name  # an answer that another server has gone on with is still one
            yield f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"
    except Refused as error:
        if not began:
            raise
        said = {"message": str(error), "type": "server_error", "code": error.code}
        yield f"data: {json.dumps({'error': said})}\n\n"
        return
    yield "data: [DONE]\n\n"


async def _again(first: str, rest: AsyncIterator[str]) -> AsyncIterator[str]:
    yield first
    async for event in rest:
        yield event
