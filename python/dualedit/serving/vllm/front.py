"""The front of vLLM's servers: which edit answers, its salt, and one version of the store for each answer."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import torch

from ...memory.budget import Budget
from ...store import EditFile, Moment, Store
from ..settings import Refused
from .answers import AGAIN, CODE, GONE, HIT, WHY, Code
from .plan import ASK, EDIT
from .replicas import Replicas
from .salt import salt_of
from .values import EngineEdits

log = logging.getLogger("dualedit.vllm")
FORMS = ("optimistic", "router")
# What only the front sets; and what changes which token comes next, so that a worker could not speak.
_OURS = ("vllm_xargs", "kv_transfer_params", "prompt_logprobs", "request_id", "return_token_ids")
_STEERED = (
    "response_format", "structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar",
    "logit_bias", "allowed_token_ids", "bad_words", "min_tokens", "ignore_eos", "tools",
)  # fmt: skip
_BOUNDS = ("stop", "stop_token_ids", "max_tokens", "max_completion_tokens", "stream", "stream_options")


@dataclass(frozen=True)
class Chosen:
    """What was decided about a request.

    Attributes:
        edit: that answers it; None: none.
        moment: the version of the store that its answer comes from.
    """

    edit: EditFile | None
    moment: Moment

    def headers(self) -> dict[str, str]:
        """What clients are told."""
        number = "none" if self.edit is None else str(self.edit.id)
        return {"X-DualEdit-Edit": number, "X-DualEdit-Version": str(self.moment.version)}


@dataclass(frozen=True)
class Answered:
    """A whole answer, or the chunks of one, and what was decided."""

    chosen: Chosen
    whole: dict[str, Any] | None = None
    chunks: AsyncIterator[dict[str, Any]] | None = None


class Front:
    """Takes OpenAI's chat requests to servers that have the edits.

    Args:
        store: that the servers read, too; it is followed here.
        replicas: servers with the edits (`models.EditedModel`).
        code: tokens that a worker may speak with.
        form: "optimistic": a request runs as if no edit answered it, its key is looked up where it is made,
            and only a hit is asked again with its edit. "router": its key comes from a router first.
        routers: servers of the router's keys, for the form "router", and for requests that steer which tokens
            come next, whose worker could not say what it has found.
    """

    def __init__(
        self, store: Store, replicas: Replicas, code: Code, form: str = FORMS[0],
        routers: Replicas | None = None,
    ):  # fmt: skip
        if form not in FORMS:
            raise ValueError(f"form={form!r}: choose one of {', '.join(FORMS)}.")
        if form == "router" and routers is None:
            raise ValueError("form='router' needs routers: the address of a server that gives routing keys.")
        self.store, self.replicas, self.code, self.form, self.routers = store, replicas, code, form, routers
        self.edits = EngineEdits(store, torch.device("cpu"), torch.float32, Budget(0, 0))
        self.counts = {"asked": 0, "edited": 0, "again": 0}

    async def close(self) -> None:
        """End following the store, and give connections back."""
        self.store.close()
        await self.replicas.close()
        if self.routers is not None:
            await self.routers.close()

    # ------------------------------------------------------------------ asking

    async def answer(self, body: dict[str, Any]) -> Answered:
        """What a chat request (OpenAI's body) is answered.

        Raises:
            Refused: with a status of 4xx or 5xx.
        """
        body = dict(body)
        for name in _OURS:
            if body.pop(name, None) is not None:
                raise Refused(400, "unsupported_parameter", f"{name} is set by this service.")
        wish = body.pop("dualedit", None)
        own = body.pop("cache_salt", None)
        if own is not None and not (isinstance(own, str) and own):
            raise Refused(400, "invalid_request", "cache_salt: pass a text that is not empty.")
        moment = self.store.now()
        self.counts["asked"] += 1
        if wish is not None:
            return await self._edited(body, self._wished(wish, moment), own)
        if not moment.manifest.edits:
            return await self._edited(body, Chosen(None, moment), own)
        steered = (body.get("n") or 1) != 1 or any(body.get(name) for name in _STEERED)
        if self.form == "router" or (steered and self.routers is not None):
            return await self._edited(body, await self._routed(body, moment, own), own)
        if steered:
            names = ", ".join(name for name in _STEERED if body.get(name)) or "n"
            raise Refused(400, "unsupported_parameter", f"{names}: this service has no router for it.")
        return await self._optimistic(body, moment, own)

    def _wished(self, wish: Any, moment: Moment) -> Chosen:
        number = wish.get("edit") if isinstance(wish, dict) else None
        if number == "none":
            return Chosen(None, moment)
        if type(number) is not int:
            raise Refused(400, "invalid_request", 'dualedit: pass {"edit": NUMBER} or {"edit": "none"}.')
        return Chosen(self._file(number, moment), moment)

    def _file(self, number: int, moment: Moment) -> EditFile:
        try:
            return moment.file_of(number)
        except KeyError:
            raise Refused(404, "edit_not_found", f"There is no edit {number}.") from None

    async def _routed(self, body: dict[str, Any], moment: Moment, own: str | None) -> Chosen:
        """The edit whose key is nearest to that of the router."""
        assert self.routers is not None
        lookup = self.edits.lookup(moment.version)
        fresh = None
        for _ in range(2):
            sent = ("messages", "model", "chat_template_kwargs")
            asked = {name: body[name] for name in sent if name in body}
            asked |= {"task": "embed", "use_activation": False, "encoding_format": "float"}
            salt = salt_of(moment.manifest.store, None, own, fresh)
            if salt is not None:
                asked["cache_salt"] = salt
            found = await self.routers.post("/pooling", asked)
            key = torch.tensor(found["data"][0]["data"], dtype=torch.float32).reshape(1, -1)
            if bool(key.any()):
                return Chosen((await asyncio.to_thread(lookup.routes, key))[0].edit, moment)
            fresh = uuid.uuid4().hex  # what came from the prefix cache is no part of a key
            self.counts["again"] += 1
        raise Refused(503, "no_key", f"No routing key: {WHY[AGAIN]}.", 1)

    async def _edited(self, body: dict[str, Any], chosen: Chosen, own: str | None) -> Answered:
        """The answer with an edit, or of the model as it is."""
        extra: dict[str, Any] = {}
        name = None
        if chosen.edit is not None:
            self.counts["edited"] += 1
            name = chosen.edit.name
            try:  # a worker that cannot read it would have to say so: better before than after
                await asyncio.to_thread(self.store.edit, chosen.edit)
            except (ValueError, OSError) as error:
                said = f"Edit {chosen.edit.id} cannot be read: {error}"
                raise Refused(422, "edit_damaged", said) from error
            extra = {EDIT: f"{name}@{chosen.moment.version}", CODE: str(self.code)}
        request = self._request(body, extra, salt_of(chosen.moment.manifest.store, name, own))
        found = await self._said(request, listens=bool(extra))
        if found[0] is not None:
            raise Refused(503, "edit_unreadable", f"A server cannot answer: {WHY.get(found[0][0], '?')}.", 1)
        return Answered(chosen, found[1], found[2])

    async def _optimistic(self, body: dict[str, Any], moment: Moment, own: str | None) -> Answered:
        """The answer of the model as it is, unless its key opens an edit: then that edit's."""
        extra = {ASK: moment.version, CODE: str(self.code)}
        fresh = None
        for _ in range(4):
            request = self._request(body, extra, salt_of(moment.manifest.store, None, own, fresh))
            message, whole, chunks = await self._said(request, listens=True)
            if message is None:
                return Answered(Chosen(None, moment), whole, chunks)
            kind, number = message
            if kind == HIT:
                return await self._edited(body, Chosen(self._file(number, moment), moment), own)
            self.counts["again"] += 1
            if kind == AGAIN:
                fresh = uuid.uuid4().hex
            elif kind == GONE:
                await asyncio.sleep(0.2)
            else:
                break
        raise Refused(503, "no_key", f"A server cannot answer: {WHY.get(kind, '?')}.", 1)

    # ------------------------------------------------------------------ one request to a server

    def _request(self, body: dict[str, Any], extra: dict[str, Any], salt: str | None) -> dict[str, Any]:
        made = dict(body)
        if extra:
            made |= {"vllm_xargs": extra, "return_token_ids": True}
        if salt is not None:
            made["cache_salt"] = salt
        return made

    async def _said(
        self, request: dict[str, Any], listens: bool
    ) -> tuple[tuple[int, int] | None, dict[str, Any] | None, AsyncIterator[dict[str, Any]] | None]:
        """(what a worker said instead, the whole answer, its chunks); one of them is not None."""
        if request.get("stream"):
            chunks = self.replicas.stream(request)
            return await self._listened(request, chunks) if listens else (None, None, chunks)
        whole = await self.replicas.post("/v1/chat/completions", request)
        choice = whole["choices"][0]
        tokens = choice.get("token_ids") or []
        if listens and tokens[:1] == [self.code.mark]:
            return await self._message(request, tokens, choice.get("finish_reason")), None, None
        return None, _plain(whole, listens), None

    async def _listened(self, request: dict[str, Any], chunks: AsyncIterator[dict[str, Any]]):
        """Hold the first token back until it is known whether it is one of the answer's."""
        held: list[dict[str, Any]] = []
        tokens: list[int] = []
        finish = None
        async for chunk in chunks:
            held.append(chunk)
            for choice in chunk.get("choices") or ():
                tokens += choice.get("token_ids") or []
                finish = choice.get("finish_reason") or finish
            if tokens and tokens[0] != self.code.mark:
                return None, None, _after(held, chunks)
            if tokens and self.code.read(tokens, finish == "stop") is not None:
                break
        await chunks.aclose()  # type: ignore[attr-defined]
        if not tokens:
            return None, None, _after(held, _nothing())
        return await self._message(request, tokens, finish), None, None

    async def _message(
        self, request: dict[str, Any], tokens: list[int], finish: str | None
    ) -> tuple[int, int]:
        """A worker's message; asked again by itself where the request's own bounds have cut it."""
        message = self.code.read(tokens, finish == "stop")
        if message is None:
            alone = {name: value for name, value in request.items() if name not in _BOUNDS}
            found = await self.replicas.post("/v1/chat/completions", {**alone, "max_tokens": 24})
            choice = found["choices"][0]
            message = self.code.read(choice.get("token_ids") or [], choice.get("finish_reason") == "stop")
        if message is None:
            raise Refused(502, "server_error", "A server's message cannot be read.")
        return message


async def _after(held: list[dict[str, Any]], chunks: AsyncIterator[dict[str, Any]]):
    for chunk in held:
        yield _plain(chunk, True)
    async for chunk in chunks:
        yield _plain(chunk, True)


async def _nothing() -> AsyncIterator[dict[str, Any]]:
    return
    yield {}


def _plain(body: dict[str, Any], listened: bool) -> dict[str, Any]:
    """An answer without the tokens that were listened to."""
    if listened:
        body.pop("prompt_token_ids", None)
        for choice in body.get("choices") or ():
            choice.pop("token_ids", None)
    return body
