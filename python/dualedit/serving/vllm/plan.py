"""What one forward of an engine knows of its requests: rows, how far each has come, which edit it carries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...store import EditFile
from .answers import CODE

# In a request's extra arguments: the name of an edit's file, or the store's version to ask.
EDIT, ASK = "dualedit", "dualedit_ask"


@dataclass
class Request:
    """What is kept of a request from its first chunk to its last token.

    Attributes:
        id: the engine's.
        size: P, how many tokens the prompt has.
        image: [P] bool, those that stand for image content; shown: whether there are any.
        pictures: identifiers of its pictures' features, in order.
        edit: name of the edit that it carries.
        file: that edit's file, once it was found.
        ask: version of the store among whose edits one is to be found for it.
        code: how a worker may speak to who asked (`answers.Code`).
        total: sum [D] of the gate's states over the prompt so far, for keys that are a mean, of
            `seen` tokens.
        told: tokens that are answered instead, where its key opened an edit, or something is wrong with its
            own.
    """

    id: str
    size: int
    image: Tensor
    shown: bool
    pictures: tuple[str, ...]
    edit: str | None
    ask: int | None
    code: str | None = None
    file: EditFile | None = None
    total: Tensor | None = None
    seen: int = 0
    told: list[int] | None = None


@dataclass
class Span:
    """The rows of one request in one forward.

    Attributes:
        request: whose they are.
        start, length: first row in the flat batch, and how many.
        computed: tokens of the request that came before.
    """

    request: Request
    start: int
    length: int
    computed: int

    @property
    def prompt_rows(self) -> int:
        """How many of the rows are of the prompt."""
        return max(0, min(self.length, self.request.size - self.computed))

    @property
    def ends_prompt(self) -> bool:
        """Whether the last token of the prompt is among them."""
        return self.computed < self.request.size <= self.computed + self.length


@dataclass
class Plan:
    """The forward that runs now.

    Attributes:
        spans: of all requests that concern the edits, in the order of the batch.
        sampled: all requests of the batch in order (None: one in whose answer nothing is said), with the
            number of the answer's token that comes next, from 0; less than 0 within the prompt.
    """

    spans: list[Span] = field(default_factory=list)
    sampled: list[tuple[Request | None, int]] = field(default_factory=list)


class Planner:
    """Makes the plans of one engine's forwards.

    Args:
        image_ids: ids of image tokens.
        every: whether requests without extra arguments are planned for, too (a router's are).
    """

    def __init__(self, image_ids: Sequence[int], every: bool = False):
        self._image_ids, self._every = torch.tensor(list(image_ids), dtype=torch.int64), every
        self._known: dict[str, Request] = {}

    def request(
        self, request_id: str, prompt: Sequence[int], pictures: Sequence[str], extra: dict[str, Any] | None
    ) -> Request:
        """What is known of a request, noted at its first forward."""
        found = self._known.get(request_id)
        if found is None or found.size != len(prompt):
            ids = torch.tensor(prompt, dtype=torch.int64)
            image = torch.isin(ids, self._image_ids)
            extra = extra or {}
            edit, ask = extra.get(EDIT), extra.get(ASK)
            if ask is not None and type(ask) is not int:
                ask = -1  # no version: it is told so
            found = Request(
                request_id, len(prompt), image, bool(image.any()), tuple(pictures),
                None if edit is None else str(edit), ask, extra.get(CODE),
            )  # fmt: skip
            self._known[request_id] = found
        return found

    def wants(self, extra: dict[str, Any] | None) -> bool:
        """Whether a request with these extra arguments concerns the edits."""
        return self._every or (bool(extra) and (EDIT in extra or ASK in extra))

    def forget(self, alive: Any) -> None:
        """Drop the requests that have ended, once there are many of them."""
        if len(self._known) < 2 * len(alive) + 64:
            return
        for gone in [request_id for request_id in self._known if request_id not in alive]:
            del self._known[gone]
