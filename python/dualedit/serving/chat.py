"""`/v1/chat/completions` and `/v1/models`, as OpenAI's clients call them."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, StreamingResponse

from .batches import Answer, Asked
from .pictures import open_messages
from .schema import ChatRequest, chunk_json, completion_json, new_id, usage_json
from .service import Service
from .settings import Refused

_LOOK = 1.0  # seconds between two looks whether the client is still there


def chat_routes(service: Service) -> APIRouter:
    """The routes of a service for questions."""
    router, settings, began = APIRouter(), service.settings, int(time.time())

    @router.get("/v1/models")
    def models() -> dict[str, Any]:
        one = {"id": settings.name, "object": "model", "created": began, "owned_by": "dualedit"}
        return {"object": "list", "data": [one]}

    @router.post("/v1/chat/completions")
    async def chat(asked: ChatRequest, request: Request):
        _check(asked, service)
        conversation = await run_in_threadpool(open_messages, asked.messages, settings)
        tokens = asked.max_completion_tokens or asked.max_tokens or settings.limits.tokens
        stop = (asked.stop,) if isinstance(asked.stop, str) else tuple(asked.stop or ())
        job = Asked((None, conversation), tokens, stop)
        if asked.stream:
            return await _stream(service, job, asked, request)
        service.ask(job)
        answer = await _wait(job, request)
        return JSONResponse(completion_json(settings.name, answer), headers=_headers(answer.edit))

    return router


def _headers(edit: int | None) -> dict[str, str]:
    return {"X-DualEdit-Edit": "none" if edit is None else str(edit)}


def _check(asked: ChatRequest, service: Service) -> None:
    """Refuse what this service does not do, rather than leave it out silently."""
    settings = service.settings
    if asked.model not in (None, "", settings.name):
        raise Refused(404, "model_not_found", f"model={asked.model!r}: this service has {settings.name!r}.")
    limit = settings.limits.tokens
    wanted = asked.max_completion_tokens or asked.max_tokens or 0
    if wanted > limit:
        raise Refused(400, "max_tokens_too_large", f"max_tokens={wanted}: an answer may have {limit}.")
    text_only = (asked.response_format or {}).get("type", "text") == "text"
    for name, wrong in (
        ("n", (asked.n or 1) != 1), ("tools", bool(asked.tools)), ("logprobs", bool(asked.logprobs)),
        ("response_format", not text_only),
    ):  # fmt: skip
        if wrong:
            raise Refused(400, "unsupported_parameter", f"{name} is not supported by this service.")
    if isinstance(asked.stop, list) and len(asked.stop) > 4:
        raise Refused(400, "invalid_stop", f"stop has {len(asked.stop)} texts: pass at most 4.")


async def _wait(job: Asked, request: Request) -> Answer:
    """The answer; a client that leaves takes its question out of the queue."""
    done = asyncio.wrap_future(job.done)
    try:
        while not done.done():
            await asyncio.wait([done], timeout=_LOOK)
            if not done.done() and await request.is_disconnected():
                raise Refused(499, "client_left", "The client has left.")
        return done.result()
    finally:
        job.cancelled = True


async def _stream(service: Service, job: Asked, asked: ChatRequest, request: Request) -> StreamingResponse:
    loop, pieces = asyncio.get_running_loop(), asyncio.Queue()

    def tell(piece: tuple[str, int | None] | None) -> None:
        try:
            loop.call_soon_threadsafe(pieces.put_nowait, piece)
        except RuntimeError:
            job.cancelled = True  # the loop is closed

    job.on_text = lambda text, edit: tell((text, edit))
    service.ask(job).add_done_callback(lambda _: tell(None))
    try:
        first = await pieces.get()  # which edit answers is known with the first token, and headers go first
    except asyncio.CancelledError:
        job.cancelled = True
        raise
    if first is None:
        job.done.result()  # raises what went wrong
        raise Refused(500, "no_answer", "The model gave no answer.")
    usage = bool((asked.stream_options or {}).get("include_usage"))
    body = _events(service.settings.name, job, pieces, usage)
    headers = {**_headers(first[1]), "Cache-Control": "no-cache"}
    return StreamingResponse(body, media_type="text/event-stream", headers=headers)


async def _events(model: str, job: Asked, pieces: asyncio.Queue, usage: bool) -> AsyncIterator[str]:
    name = new_id()

    def event(body: dict[str, Any]) -> str:
        return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"

    try:
        yield event(chunk_json(name, model, {"role": "assistant", "content": ""}))
        while (piece := await pieces.get()) is not None:
            if piece[0]:
                yield event(chunk_json(name, model, {"content": piece[0]}))
        try:
            answer = job.done.result()
        except Exception as error:  # headers are out: the stream says it, as OpenAI's does
            yield event({"error": {"message": str(error), "type": "server_error", "code": None}})
            return
        yield event({**chunk_json(name, model, {}, answer.finish), "dualedit": {"edit": answer.edit}})
        if usage:
            yield event({**chunk_json(name, model, None), "usage": usage_json(answer)})
        yield "data: [DONE]\n\n"
    finally:
        job.cancelled = True
