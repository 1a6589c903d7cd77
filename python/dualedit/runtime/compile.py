"""An editor's Python inside a compiled model: behind operators, which torch.compile runs and does not read.

What a call knows lives in a context variable, which the compiler cannot follow: each touch would cut the
graph in two. So while a graph is traced (and no gradient is recorded), the hooks and the wrapped layers put
an operator in their place. The model's own states pass through it: the graph orders the operators as it
orders everything else, and cannot leave one out.

An operator takes tensors. The object that it asks comes as a handle: an empty tensor that the object holds
and that knows whose it is. Like a parameter it is an input of the graph, so graphs keep no object alive.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("dualedit", "FRAGMENT")
# Python that a captured CUDA graph would not repeat.
_TAGS = tuple(tag for tag in (getattr(torch.Tag, "cudagraph_unsafe", None),) if tag is not None)
_KNOWN = ("input_ids", "attention_mask", "labels")
_STREAM = ("inputs_embeds", "input_ids", "hidden_states")


def tracing() -> bool:
    """Whether this call is being traced into a graph that the operators below keep whole."""
    return torch.compiler.is_compiling() and not torch.is_grad_enabled()


class _Owner:
    """Whose a handle is. A copied handle has no owner, until its holder makes a new one."""

    def __init__(self, thing: Any = None):
        self.thing = None if thing is None else weakref.ref(thing)

    def __reduce__(self):
        return _Owner, ()


def handle(thing: Any) -> Tensor:
    """An empty tensor by which operators find the object; it is not kept alive. Copies need their own."""
    made = torch.empty(0, device="cpu")
    made.owner = _Owner(thing)
    return made


def _owner(given: Tensor) -> Any:
    return given.owner.thing()


def _tensors(given: Mapping[str, Any]) -> list[Tensor | None]:
    return [value if isinstance(value, Tensor) else None for value in map(given.get, _KNOWN)]


def _stream_of(args: tuple, kwargs: Mapping[str, Any]) -> str | None:
    return next((name for name in _STREAM if isinstance(kwargs.get(name), Tensor)), None)


def trace_call(runtime: Tensor, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Note the arguments of the model's call when the graph runs; returns the arguments to go on with."""
    name = _stream_of(args, kwargs)
    if name is not None:
        stream = torch.ops.dualedit.enter_call(kwargs[name], runtime, *_tensors(kwargs))
        return args, {**kwargs, name: stream}
    if args and isinstance(args[0], Tensor) and not args[0].is_floating_point():
        known = _tensors({**kwargs, "input_ids": args[0]})
        return (torch.ops.dualedit.enter_call(args[0], runtime, *known), *args[1:]), kwargs
    return args, kwargs


def trace_pass(
    runtime: Tensor, kwargs: dict[str, Any], start: int | Tensor, ticket: Tensor | None, packed: str
) -> dict[str, Any]:
    """Begin a call of the stack when the graph runs; returns the arguments to go on with.

    Args:
        start: columns in the cache.
        ticket: what the cache carries of its sequence.
        packed: name of an argument that packed sequences have, or "".
    """
    name = _stream_of((), kwargs)
    if name is None:
        raise ValueError("input_ids and inputs_embeds are both None: pass one of them.")
    # As a tensor: a number would be compiled in, and each step of a generation compiled anew.
    start = start.reshape(1) if isinstance(start, Tensor) else torch.full((1,), start, dtype=torch.int64)
    stream = torch.ops.dualedit.enter_pass(kwargs[name], runtime, *_tensors(kwargs), start, ticket, packed)
    return {**kwargs, name: stream}


def trace_end(runtime: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """End a call of the stack when the graph runs; returns its states to go on with, and a ticket."""
    return torch.ops.dualedit.leave_pass(hidden, runtime)


def trace_edit(layer: Tensor, x: Tensor, base: Tensor) -> Tensor:
    """A wrapped layer's output when the graph runs, from its input and the base layer's output."""
    return torch.ops.dualedit.edit(base, layer, x)


def _enter_call(stream: Tensor, runtime: Tensor, ids, mask, labels) -> Tensor:
    _owner(runtime).enter_call(dict(zip(_KNOWN, (ids, mask, labels), strict=True)))
    return stream.clone()


def _enter_pass(
    stream: Tensor, runtime: Tensor, ids, mask, labels, start: Tensor, ticket, packed: str
) -> Tensor:
    inputs = dict(zip(_KNOWN, (ids, mask, labels), strict=True)) | {"hidden_states": stream}
    if packed:
        inputs[packed] = True
    _owner(runtime).enter_pass(inputs, int(start), getattr(ticket, "sequence", None))
    return stream.clone()


def _leave_pass(hidden: Tensor, runtime: Tensor) -> tuple[Tensor, Tensor]:
    sequence = _owner(runtime).leave_pass()
    return hidden.clone(), torch.empty(0) if sequence is None else sequence.new_ticket()


def _edit(base: Tensor, layer: Tensor, x: Tensor) -> Tensor:
    edited = _owner(layer).edited(x, base)
    return base.clone() if edited is base else edited


def _like(stream: Tensor, *rest: object) -> Tensor:
    return torch.empty_like(stream)


def _like_and_ticket(hidden: Tensor, runtime: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(hidden), torch.empty(0)


_GIVEN = "Tensor runtime, Tensor? ids, Tensor? mask, Tensor? labels"
for _name, _schema, _run, _fake in (
    ("enter_call", f"(Tensor stream, {_GIVEN}) -> Tensor", _enter_call, _like),
    ("enter_pass", f"(Tensor stream, {_GIVEN}, Tensor start, Tensor? ticket, str packed) -> Tensor",
     _enter_pass, _like),
    ("leave_pass", "(Tensor hidden, Tensor runtime) -> (Tensor, Tensor)", _leave_pass, _like_and_ticket),
    ("edit", "(Tensor base, Tensor layer, Tensor x) -> Tensor", _edit, _like),
):  # fmt: skip
    _LIBRARY.define(_name + _schema, tags=_TAGS)
    _LIBRARY.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"dualedit::{_name}", _fake, lib=_LIBRARY)
