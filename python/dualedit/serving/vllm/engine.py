"""The edits inside one engine process: they write to the rows of the requests that carry them."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...memory.budget import Budget
from ...store import EditFile, Store
from ...tuners.dualedit.modules import EditKV
from .answers import AGAIN, GONE, HIT, UNREADABLE, Code
from .plan import Plan, Planner, Request, Span
from .values import EditedLayer, EngineEdits, parse_name

log = logging.getLogger("dualedit.vllm")
_PICTURES = 4096  # mean image tokens that are remembered, one of the residual stream's width each
SETTINGS = ("store", "device", "host", "values", "cache", "router")


class Engine:
    """The edits of one model in one process of vLLM.

    What a forward is about is in `plan`; the runner sets it, the model's layers ask. Whatever goes wrong with
    an edit is told in the place of its answer: an exception would end the engine for everybody.

    Args:
        settings: `--additional-config`'s entry "dualedit": "store" (address); and "device", "host" (memory
            for values, as "256MB"), "values" (see `EngineEdits`), "cache" (folder for copies of remote
            files), "router" (whether this engine answers with routing keys).
        device, dtype: of the residual stream.
        eos: token that ends an answer.
        follow: whether to read new versions of the store in a thread.
    """

    def __init__(
        self, settings: Mapping[str, Any], device: torch.device, dtype: torch.dtype, eos: int,
        follow: bool = True,
    ):  # fmt: skip
        unknown = sorted(set(settings) - set(SETTINGS))
        if unknown or "store" not in settings:
            raise ValueError(f"additional_config['dualedit'] has {unknown or 'no store'}: give {SETTINGS}.")
        budget = Budget(**{name: settings[name] for name in ("host", "device") if name in settings})
        self.store = Store(settings["store"], settings.get("cache"), newest=0)  # the budget keeps values
        self.edits = EngineEdits(self.store, device, dtype, budget, settings.get("values", "as stored"))
        self.routes = bool(settings.get("router", False))
        self.planner = Planner(self.edits.image_ids, every=self.routes)
        self.plan = Plan()
        self.keys: dict[str, Tensor] = {}  # a router's answers of this forward, by request
        self.counts = {"tokens": 0, "edited": 0, "asked": 0, "hits": 0, "faults": 0}
        self._eos = eos
        # Values of linear layers apply to every token; what is written to the stream, to prompts alone.
        self._every_token = any(layer.linear is not None for layer in self.edits.layers)
        self._pictures: OrderedDict[str, tuple[Tensor, int]] = OrderedDict()
        if follow:
            self.store.follow()

    # ------------------------------------------------------------------ plans

    def begin(self, plan: Plan) -> None:
        """What the next forward is about."""
        self.plan = plan
        self.keys = {}

    def end(self) -> None:
        """The forward is over; what is to be said in the place of answers stays until the next one."""
        self.plan = Plan([], self.plan.sampled)

    def concern(
        self, plan: Plan, request: Request, start: int, length: int, computed: int,
        pictures: Mapping[str, Tensor],
    ) -> None:  # fmt: skip
        """Put a request into a plan, as far as the edits are concerned with it.

        Args:
            start, length: its rows in the batch.
            computed: tokens of it that came before.
            pictures: the tokens [n, D] of pictures as they enter the decoder, by identifier.
        """
        if computed >= request.size and not (request.edit is not None and self._every_token):
            # Its prompt is over: nothing is written, no key is made; it may have something to say.
            told = request.told is not None
            plan.sampled.append((request, computed + length - request.size) if told else (None, -1))
            return
        if request.edit is None and self.edits.router is not None:
            for picture in request.pictures:
                tokens = None if picture in self._pictures else pictures.get(picture)
                if tokens is not None:
                    self._pictures[picture] = (tokens.detach().float().sum(0), len(tokens))
                    if len(self._pictures) > _PICTURES:
                        self._pictures.popitem(last=False)
        plan.spans.append(Span(request, start, length, computed))
        plan.sampled.append((request, computed + length - request.size))

    # ------------------------------------------------------------------ the decoder layer's output (DualEdit)

    def stream(self, layer: EditedLayer, gate: bool, hidden: Tensor, residual: Tensor) -> None:
        """Write edits into the rows of a decoder layer's output, which is hidden + residual, both [T, D]."""
        if gate:
            self._ask(lambda rows: hidden[rows] + residual[rows])
        for span in self.plan.spans:
            count = span.prompt_rows  # DualEdit edits the prompt; the answer attends to it
            tables = self._tables(span.request, layer) if count else None
            if tables is None:
                continue
            rows = slice(span.start, span.start + count)
            image = span.request.image[span.computed : span.computed + count].to(hidden.device)
            x = (hidden[rows] + residual[rows])[None]
            none = torch.zeros(1, dtype=torch.int64, device=x.device)
            for part, adapter in layer.parts.items():
                k, v = tables[f"k_{part}"], tables[f"v_{part}"]
                kv = EditKV(k, v, none, torch.tensor([len(k)], device=x.device))
                marked = (image if part == "vision" else ~image)[None]
                x, _ = adapter(x, marked, kv, route=none)
            # The stream is their sum: exactly x, whatever the dtype.
            residual[rows] = x[0]
            hidden[rows] = 0
            self.counts["tokens"] += count

    # ------------------------------------------------------------------ a linear layer's output (BalancEdit)

    def linear(self, layer: EditedLayer, gate: bool, x: Tensor, out: Tensor, part: LinearPart) -> None:
        """Put edits' values in the place of a linear layer's own, in its output [T, O] for x [T, I]."""
        if gate:
            self._ask(lambda rows: part.whole_input(x[rows]))
        for span in self.plan.spans:
            tables = self._tables(span.request, layer)
            if tables is None:
                continue
            rows = slice(span.start, span.start + span.length)
            own = out[rows, part.first : part.first + part.size]
            if "weight" in tables:
                own.copy_(part.full(x[rows], tables["weight"].to(x.dtype)))
            else:
                own.add_(part.low_rank(x[rows], tables["down"].to(x.dtype), tables["up"].to(x.dtype)))
            self.counts["tokens"] += span.length

    # ------------------------------------------------------------------ values

    def _tables(self, request: Request, layer: EditedLayer) -> dict[str, Tensor] | None:
        """The rows of a request's edit at a layer; None: it has none, or they cannot be read."""
        if request.edit is None or request.told is not None:
            return None
        try:
            return self.edits.values_of(self._file(request))[layer.memory]
        except Exception as error:  # of a damaged file, a place that is not reached, a wrong name
            log.error("edit %s of request %s: %s", request.edit, request.id, error)
            self.counts["faults"] += 1
            request.told = self._message(request, UNREADABLE)
            return None

    def _file(self, request: Request) -> EditFile:
        if request.file is None:
            number, version, at = parse_name(request.edit)
            moment = self.store.now() if at is None else self.store.at(at)
            request.file = moment.file_of(number)
            if request.file.version != version:
                raise ValueError(f"it is {request.file.name} at version {moment.version} of the store")
            self.counts["edited"] += 1
        return request.file

    # ------------------------------------------------------------------ keys

    def _ask(self, states_of) -> None:
        """Make the keys of the prompts that end in this forward; look up those that ask.

        Args:
            states_of: gives the gate's states of a slice of rows, [n, D].
        """
        ending: list[tuple[Span, Tensor | None]] = []
        for span in self.plan.spans:
            if not span.prompt_rows or not (self.routes or span.request.ask is not None):
                continue
            state = self._state(span, states_of)
            if span.ends_prompt:
                ending.append((span, state))
        if not ending:
            return
        found = self._keys([(span.request, state) for span, state in ending])
        made = [(span, key) for (span, _), key in zip(ending, found, strict=True)]
        if self.routes:
            self.keys = {span.request.id: key for span, key in made if key is not None}
            return
        for version in {span.request.ask for span, _ in made}:
            mine = [(s.request, key) for s, key in made if s.request.ask == version]
            self._look_up(version, mine)

    def _state(self, span: Span, states_of) -> Tensor | None:
        """What the key is made of [1, D]: the last token's state, or the mean so far; None: not known."""
        request, count = span.request, span.prompt_rows
        if getattr(self.edits.config, "key", "last") != "mean":
            last = span.start + count - 1
            return states_of(slice(last, last + 1)) if span.ends_prompt else None
        if span.computed == 0:
            request.total, request.seen = None, 0
        if request.seen != span.computed:
            return None  # the beginning came from the prefix cache
        part = states_of(slice(span.start, span.start + count)).float().sum(0)
        request.total = part if request.total is None else request.total + part
        request.seen += count
        return (request.total / request.size)[None]

    def _keys(self, asked: list[tuple[Request, Tensor | None]]) -> list[Tensor | None]:
        """The routing keys [P] of prompts, float32 on the CPU; None: one that cannot be made."""
        router = self.edits.router
        keys: list[Tensor | None] = [None] * len(asked)
        places, states, means = [], [], []
        for place, (request, state) in enumerate(asked):
            mean = self._mean_image(request) if router is not None and request.shown else None
            if state is None or (router is not None and request.shown and mean is None):
                continue
            places.append(place)
            states.append(state)
            if router is not None:
                blank = torch.zeros(router.picture.map.shape[1], device=state.device)
                means.append(blank if mean is None else mean.to(state.device))
        if places:
            rows = torch.cat(states)
            made = rows if router is None else router(rows, torch.stack(means))
            for place, key in zip(places, made.float().cpu(), strict=True):
                keys[place] = key
        return keys

    def _mean_image(self, request: Request) -> Tensor | None:
        """The mean image token [D] of a request's pictures; None: one of them is not known (any more)."""
        found = [self._pictures.get(picture) for picture in request.pictures]
        if not found or any(each is None for each in found):
            return None
        return sum(each[0] for each in found) / sum(each[1] for each in found)

    def _look_up(self, version: int | None, asked: list[tuple[Request, Tensor | None]]) -> None:
        try:
            lookup = self.edits.lookup(version)
        except Exception as error:
            log.error("version %s: %s", version, error)
            for request, _ in asked:
                request.told = self._message(request, GONE)
            return
        self.counts["asked"] += len(asked)
        known = [(request, key) for request, key in asked if key is not None]
        for request, key in asked:
            if key is None:
                request.told = self._message(request, AGAIN)
        if not known:
            return
        routes = lookup.routes(torch.stack([key for _, key in known]))
        for (request, _), route in zip(known, routes, strict=True):
            if route.edit is not None:
                self.counts["hits"] += 1
                request.told = self._message(request, HIT, route.edit.id)

    # ------------------------------------------------------------------ what is said instead

    def _message(self, request: Request, kind: int, number: int = 0) -> list[int]:
        code = Code.parse(request.code)
        return [self._eos] if code is None else code.message(kind, number)

    def spoken(self, logits: Tensor | None) -> Tensor | None:
        """Logits [B, V] of the next tokens, those rows replaced in which the worker has something to say."""
        sampled = self.plan.sampled
        if not any(request is not None and request.told is not None for request, _ in sampled):
            return logits
        if logits is None or len(logits) != len(sampled):
            return logits  # of a dummy run, or of prompt tokens
        for row, (request, number) in enumerate(sampled):
            if request is not None and request.told is not None and number >= 0:
                token = request.told[min(number, len(request.told) - 1)]
                logits[row] = float("-inf")
                logits[row, token] = 0.0
        return logits


class LinearPart:
    """Where in a linear layer of vLLM one of Hugging Face's lies, and how tensor parallelism cuts it.

    Args:
        first, size: columns of the output of this process that are this layer's.
        rank: which rows of a value those are, in pieces of `size`; None: all, its inputs are cut instead.
        inputs: of this process, of a layer whose inputs are cut; None: all are here.
        bias: of the layer, added to a full value's product.
        reduce, gather: sum over, and join of, the processes.
    """

    def __init__(
        self, first: int, size: int, rank: int | None, inputs: slice | None, bias: Tensor | None, reduce,
        gather,
    ):  # fmt: skip
        self.first, self.size, self.rank, self.inputs = first, size, rank, inputs
        self.bias, self._reduce, self._gather = bias, reduce, gather

    def whole_input(self, x: Tensor) -> Tensor:
        """Rows [n, I] with the inputs of all processes."""
        return x if self.inputs is None else self._gather(x.contiguous())

    def _rows(self, value: Tensor) -> Tensor:
        return value if self.rank is None else value[self.rank * self.size : (self.rank + 1) * self.size]

    def low_rank(self, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        """up down x, [n, size]; down [R, I], up [O, R]."""
        if self.inputs is None:
            return F.linear(F.linear(x, down), self._rows(up))
        return F.linear(self._reduce(F.linear(x, down[:, self.inputs])), up)

    def full(self, x: Tensor, weight: Tensor) -> Tensor:
        """W x + b, [n, size]; W [O, I]."""
        if self.inputs is None:
            return F.linear(x, self._rows(weight), self.bias)
        out = self._reduce(F.linear(x, weight[:, self.inputs]))
        return out if self.bias is None else out + self.bias

