"""The HTTP interface of a service: routes, errors in OpenAI's form, health, metrics, and the page."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware

from ..checking import EditFailed
from .chat import chat_routes
from .edits import edit_routes
from .service import Service
from .settings import Refused

TEXT = "text/plain; version=0.0.4; charset=utf-8"


def create_app(service: Service) -> FastAPI:
    """The application of a service; its worker runs as long as the application does.

    Args:
        service: not started yet.

    Raises:
        ImportError: `service.settings.page` without gradio.
    """
    from .. import __version__

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        service.close()

    app = FastAPI(title="DualEdit", version=__version__, lifespan=lifespan)
    app.add_middleware(BodyLimit, limit=service.settings.limits.body)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(service.settings.hosts))
    app.include_router(chat_routes(service))
    app.include_router(edit_routes(service))
    add_error_handlers(app, service)

    @app.get("/health")
    def health() -> Response:
        state = {"status": "ok" if service.worker.alive else "stopped", "model": service.settings.name}
        more = {"edits": len(service.edits), "waiting": service.worker.waiting, "version": __version__}
        return JSONResponse({**state, **more}, 200 if service.worker.alive else 503)

    @app.get("/metrics")
    def metrics() -> Response:
        return Response(service.metrics.text(), media_type=TEXT)

    if service.settings.page:
        from .page import mount_page

        return mount_page(app, service)
    return app


def add_error_handlers(app: FastAPI, service: Service) -> None:
    """Have errors answered in OpenAI's form."""

    def told(status: int, code: str | None, message: str, headers: dict[str, str] | None = None) -> Response:
        service.metrics.failed(status)
        kind = "invalid_request_error" if status < 500 else "server_error"
        error = {"message": message, "type": kind, "param": None, "code": code}
        return JSONResponse({"error": error}, status, headers)

    @app.exception_handler(Refused)
    async def refused(_: Request, error: Refused) -> Response:
        headers = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
        if error.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return told(error.status, error.code, str(error), headers)

    @app.exception_handler(EditFailed)
    async def failed(_: Request, error: EditFailed) -> Response:
        return told(422, "edit_failed", str(error))

    @app.exception_handler(ValueError)
    async def wrong(_: Request, error: ValueError) -> Response:
        return told(400, "invalid_value", str(error))

    @app.exception_handler(RequestValidationError)
    async def unreadable(_: Request, error: RequestValidationError) -> Response:
        first: dict[str, Any] = next(iter(error.errors()), {})
        place = ".".join(str(part) for part in first.get("loc", ())[1:])
        return told(400, "invalid_request", f"{place}: {first.get('msg', 'cannot be read')}".lstrip(": "))

    @app.exception_handler(HTTPException)
    async def other(_: Request, error: HTTPException) -> Response:
        return told(error.status_code, None, str(error.detail), dict(error.headers or {}))

    @app.exception_handler(Exception)
    async def bug(_: Request, error: Exception) -> Response:
        return told(500, "internal_error", f"{type(error).__name__}: see the service's log.")


class BodyLimit:
    """Answers 413 to a body of more bytes than `limit`, announced or not, before it is read whole."""

    def __init__(self, app: Any, limit: int):
        self.app, self.limit = app, limit

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self.limit:
            await self._refuse(scope, receive, send)
            return
        seen, begun = 0, False

        async def counted() -> Any:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self.limit:
                raise _TooLarge
            return message

        async def noted(message: Any) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self.app(scope, counted, noted)
        except _TooLarge:
            if not begun:
                await self._refuse(scope, receive, send)

    async def _refuse(self, scope: Any, receive: Any, send: Any) -> None:
        message = f"A request may have {self.limit:,} bytes."
        error = {"message": message, "type": "invalid_request_error", "param": None, "code": "body_too_large"}
        await JSONResponse({"error": error}, 413, {"Connection": "close"})(scope, receive, send)


class _TooLarge(BaseException):
    """Not an Exception, so that no handler of a route takes it for its own."""
