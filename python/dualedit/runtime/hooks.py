"""What a forward calls on its way: hooks of the model and of the stack that owns the decoder layers.

They are classes, not closures, so that a model with them can be copied and pickled.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor, nn

from . import compile as compiling
from .frames import find, framed, pop
from .sequence import Sequence

_CACHE_ATTRIBUTE = "_dualedit_sequence"
# Arguments that only calls with packed sequences have (padding-free training, continuous batching).
_PACKED_ARGUMENTS = ("cu_seq_lens_q", "cu_seqlens", "seq_idx", "block_table")


def packed_by(inputs: Mapping[str, Any]) -> str:
    """The name of an argument that packed sequences have, or ""."""
    return next((name for name in _PACKED_ARGUMENTS if inputs.get(name) is not None), "")


class Runtime(Protocol):
    """What hooks tell: `context.EditRuntime`, which installs them."""

    handle: Tensor

    def enter_call(self, given: Mapping[str, Any]) -> None:
        """The model's forward begins."""

    def enter_pass(self, inputs: Mapping[str, Any], start: int, known: Sequence | None) -> Sequence:
        """A call of the stack begins, over a cache of `start` columns that belong to `known`."""


class CallBegins:
    """Pre-hook of the model: notes the arguments of its forward."""

    def __init__(self, runtime: Runtime):
        self.runtime = runtime

    def __call__(self, module, args, kwargs):
        if compiling.tracing():
            return compiling.trace_call(self.runtime.handle, args, kwargs)
        return self.runtime.enter_call(_named(module, args, kwargs))


class PassBegins:
    """Pre-hook of the stack that owns the decoder layers."""

    def __init__(self, runtime: Runtime):
        self.runtime = runtime

    def __call__(self, module, args, kwargs):
        inputs = kwargs if compiling.tracing() else _named(module, args, kwargs)
        cache = inputs.get("past_key_values")
        start, ticket = _filled(cache), getattr(cache, _CACHE_ATTRIBUTE, None)
        if compiling.tracing():
            packed = packed_by(inputs)
            return args, compiling.trace_pass(self.runtime.handle, kwargs, start, ticket, packed)
        sequence = self.runtime.enter_pass(inputs, int(start), getattr(ticket, "sequence", None))
        if cache is not None and sequence is not getattr(ticket, "sequence", None):
            _remember(cache, sequence.new_ticket())
        return None


class Checkpointing:
    """Stands in for a layer's gradient checkpointing, so that backward runs the layer within its own call.

    Backward comes when the call is long over; without this, an edited linear layer in it would not know whose
    input it sees. `previous` is what transformers set.
    """

    def __init__(self, runtime: Runtime, previous: Any):
        self.runtime = runtime
        self.previous = previous

    def __call__(self, function, *args):
        frame = find(self.runtime, "pass")
        if frame is None:
            return self.previous(function, *args)

        def within(*given):
            with framed(self.runtime, "replayed", frame.content):
                return function(*given)

        return self.previous(within, *args)


class Ends:
    """Forward hook, called on errors too: the call is over; a cache it made belongs to its sequence."""

    def __init__(self, runtime: Runtime, kind: str):
        self.runtime = runtime
        self.kind = kind

    def __call__(self, module, args, output):
        if compiling.tracing():
            return self._trace(output) if self.kind == "pass" else None
        if self.kind == "pass":
            frame = find(self.runtime, "pass")
            cache = _cache_in(output)
            if cache is not None and frame is not None:
                known = getattr(getattr(cache, _CACHE_ATTRIBUTE, None), "sequence", None)
                if known is not frame.content.sequence:
                    _remember(cache, frame.content.sequence.new_ticket())
        pop(self.runtime, self.kind)
        return None

    def _trace(self, output):
        hidden, ticket = compiling.trace_end(self.runtime.handle, output[0])
        cache = _cache_in(output)
        if cache is not None:
            _remember(cache, ticket)
        if isinstance(output, tuple):
            return hidden, *output[1:]
        output.last_hidden_state = hidden
        return output


def _filled(cache: Any) -> int | Tensor:
    """Columns in a cache; a static cache may count them on the device."""
    return cache.get_seq_length() if hasattr(cache, "get_seq_length") else 0


def _remember(cache: Any, ticket: Tensor) -> None:
    if hasattr(cache, "__dict__"):
        setattr(cache, _CACHE_ATTRIBUTE, ticket)


def _cache_in(output: Any) -> Any:
    """The key-value cache that a stack returns, in an output object or a tuple."""
    if isinstance(output, tuple):
        return next((part for part in output if hasattr(part, "get_seq_length")), None)
    return getattr(output, "past_key_values", None)


def _named(module: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a module's forward by name."""
    if not args:
        return dict(kwargs)  # as transformers calls; reading a signature costs more than all the rest here
    names = list(inspect.signature(module.forward).parameters)
    return {**dict(zip(names, args, strict=False)), **kwargs}
