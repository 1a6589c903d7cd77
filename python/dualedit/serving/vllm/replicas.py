"""vLLM's servers behind the front: asked in turn, and asked again elsewhere where one fails."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from ..settings import Refused

log = logging.getLogger("dualedit.vllm")
_REST = 0.5  # seconds that a server is left alone after it failed
_CHAT = "/v1/chat/completions"


@dataclass
class Replica:
    """One server.

    Attributes:
        url: without a path.
        rests_until: it failed, and is not asked before then (`time.monotonic`).
    """

    url: str
    rests_until: float = 0.0


class Replicas:
    """Servers of one model.

    Args:
        urls: of the servers.
        patience: seconds that a request waits for one that answers.
        client: of httpx; None makes one.
    """

    def __init__(self, urls: Sequence[str], patience: float = 60.0, client: httpx.AsyncClient | None = None):
        if not urls:
            raise ValueError("urls is empty: name at least one server.")
        self.replicas = [Replica(url.rstrip("/")) for url in urls]
        self.patience = patience
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=256)
        self._client = client or httpx.AsyncClient(timeout=httpx.Timeout(600, connect=5), limits=limits)
        self._next = 0

    async def close(self) -> None:
        """Give the connections back."""
        await self._client.aclose()

    def _choose(self) -> Replica:
        """The next in turn of those that do not rest; of all, where all rest."""
        now = time.monotonic()
        awake = [replica for replica in self.replicas if replica.rests_until <= now] or self.replicas
        self._next += 1
        return awake[self._next % len(awake)]

    async def alive(self) -> list[str]:
        """The servers that say that they are well."""

        async def well(replica: Replica) -> bool:
            try:
                return (await self._client.get(f"{replica.url}/health", timeout=5)).status_code == 200
            except httpx.HTTPError:
                return False

        found = await asyncio.gather(*(well(replica) for replica in self.replicas))
        return [replica.url for replica, ok in zip(self.replicas, found, strict=True) if ok]

    # ------------------------------------------------------------------ requests

    async def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """A request that is answered in one piece.

        Raises:
            Refused: what the server refused (with its status), or 503: no server answers in time.
        """
        end = time.monotonic() + self.patience
        while True:
            replica = self._choose()
            try:
                found = await self._client.post(replica.url + path, json=body)
                if found.status_code < 500:
                    return _checked(found.status_code, found.content)
                error: Exception = _failed(found.status_code, found.content)
            except httpx.HTTPError as failure:
                error = failure
            await self._rest(replica, end, error)

    async def stream(self, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """The chunks of a streamed chat completion.

        Where a server dies, another one is asked the same and what was said already is left out, as long as
        the answer is the same: one without chance (temperature 0), or one of which nothing was said.

        Raises:
            Refused: as `post`; or 502 where an answer cannot be continued.
        """
        end, said = time.monotonic() + self.patience, ""
        repeats = body.get("temperature") == 0 and (body.get("n") or 1) == 1
        while True:
            replica, again = self._choose(), ""
            try:
                async with self._client.stream("POST", replica.url + _CHAT, json=body) as answer:
                    if answer.status_code >= 400:
                        content = await answer.aread()
                        if answer.status_code < 500:
                            _checked(answer.status_code, content)
                        raise _failed(answer.status_code, content)
                    whole = False
                    async for line in answer.aiter_lines():
                        if not line.startswith("data: "):
                            continue
                        if line == "data: [DONE]":
                            whole = True
                            continue
                        chunk = json.loads(line[6:])
                        if "error" in chunk:
                            raise httpx.RemoteProtocolError(str(chunk["error"]))
                        text = _text(chunk)
                        again += text
                        if len(again) > len(said):
                            if not again.startswith(said):
                                raise Refused(502, "answer_lost", "A server failed within the answer.")
                            fresh = len(again) - len(said)
                            if fresh < len(text):
                                chunk["choices"][0]["delta"]["content"] = text[-fresh:]
                            said = again
                        elif said and len(again) <= len(said) and text:
                            continue  # was said before the other server died
                        yield chunk
                    if whole:
                        return
                    raise httpx.RemoteProtocolError("the stream ended early")
            except httpx.HTTPError as error:
                if said and not repeats:
                    raise Refused(502, "answer_lost", "A server failed within the answer.") from error
                await self._rest(replica, end, error)

    async def _rest(self, replica: Replica, end: float, error: Exception) -> None:
        log.warning("%s: %s", replica.url, error)
        replica.rests_until = time.monotonic() + _REST
        if time.monotonic() > end:
            raise Refused(503, "no_server", "No server of the model answers.", 5) from error
        if all(each.rests_until > time.monotonic() for each in self.replicas):
            await asyncio.sleep(_REST / 2)


def _text(chunk: dict[str, Any]) -> str:
    choices = chunk.get("choices") or []
    return (choices[0].get("delta") or {}).get("content") or "" if choices else ""


def _failed(status: int, content: bytes) -> httpx.HTTPError:
    return httpx.RemoteProtocolError(f"status {status}: {content[:200].decode(errors='replace')}")


def _checked(status: int, content: bytes) -> dict[str, Any]:
    """The JSON of an answer. Raises Refused where it is one of 4xx."""
    try:
        found = json.loads(content)
    except ValueError:
        found = {}
    if status >= 400:
        error = found.get("error") or {}
        message = error.get("message") if isinstance(error, dict) else str(error)
        raise Refused(status, "invalid_request", message or f"The server of the model says {status}.")
    return found
