"""Running some of a frozen model's decoder layers again, from states that one forward has left.

What is fitted or trained sits at some decoder layer and changes nothing below it. So one forward notes what
every layer from there on is called with. After that those layers run on their own, with other states, as
often as wanted. Fitting, training and routing keys all go through this module.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from contextvars import copy_context
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from ..models.architectures import find_decoder_layers, unwrap
from .context import runtime_of
from .frames import framed

Call = tuple[nn.Module, tuple, dict[str, Any]]
# How far apart two ways of computing the same logits may be at any position, in standard deviations of the
# logits: rounding stays far below, a mask or a position that is wrong comes to about 1.
_CLOSE = {torch.float32: 1e-2, torch.float64: 1e-6}
_COARSE = 0.1
# What layers raise that cannot be called on their own.
CANNOT = (TypeError, ValueError, RuntimeError, KeyError, IndexError, AttributeError)


class _Left(Exception):
    """Ends a forward early; only `leaving` raises and catches it."""


@contextmanager
def leaving(module: nn.Module, before: bool = False) -> Iterator[None]:
    """Inside the block, a forward ends when it has run `module`; what comes behind does not run.

    The block ends with it. Forwards of other threads are left alone.

    Args:
        before: end where `module` would begin.
    """
    own = threading.get_ident()

    def leave(*_: Any) -> None:
        if threading.get_ident() == own:
            raise _Left

    register = module.register_forward_pre_hook if before else module.register_forward_hook
    handle = register(leave)
    try:
        yield
    except _Left:
        pass
    finally:
        handle.remove()


def close(found: Tensor, wanted: Tensor) -> bool:
    """Whether two logits [..., V] of the same model are the same up to the rounding of their dtype."""
    if found.shape != wanted.shape:
        return False
    allowed = _CLOSE.get(wanted.dtype, _COARSE) * float(wanted.float().std())
    difference = (found.float() - wanted.float()).square().mean(-1).sqrt()
    return bool((difference <= allowed).all())


class PartialForward:
    """A model's decoder layers from number `start` on, and its head, as one forward calls them.

    Built by running that forward; whether it records gradients is the caller's to say.

    Args:
        model: a Hugging Face model, with or without editors.
        inputs: keyword arguments of its forward.
        start: number of the first layer to run again; the number of layers for the head alone.
        stop: the forward leaves out the layers from this number on, and the head. It only notes what they are
            called with. At least `start`, and at least 1. None: run the whole model.

    Attributes:
        start: number of the first layer.
        states: [B, L, D] in front of layer `start`.
        end: [B, L, D] behind the last layer, or None where it was left out.
        logits: [B, L, V] of the whole model, or None where it was left out.
    """

    def __init__(self, model: nn.Module, inputs: Mapping[str, Any], start: int, stop: int | None = None):
        self.model = unwrap(model)
        path, layers = find_decoder_layers(self.model)
        stack = self.model.get_submodule(path.rpartition(".")[0])
        self._runtime = runtime_of(self.model)
        self.start = start
        # What wrapped layers know of this forward (its masks) holds for the layers run again.
        self._pass: Any = None
        self.states: Tensor | None = None
        self.end: Tensor | None = None
        self.logits: Tensor | None = None
        self._layers: list[Call] = []
        self._head: list[Call] = []
        with ExitStack() as hooks:
            self._note_calls(hooks, stack, layers, start)
            if stop is None:
                self.logits = self.model(**{**inputs, "use_cache": False}).logits
            else:
                self._leave_out(hooks, layers, stop)
                with leaving(stack):
                    self.model(**{**inputs, "use_cache": False})

    def _note_calls(self, hooks: ExitStack, stack: nn.Module, layers: nn.ModuleList, start: int) -> None:
        own = threading.get_ident()
        again = {id(layer) for layer in layers[start:]}

        def note(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            if threading.get_ident() != own:
                return
            states, args, kwargs = _split(args, kwargs)
            if id(module) in again:
                if not self._layers:
                    self.states = states
                self._note_pass()
                self._layers.append((module, args, kwargs))
            elif self.states is not None:  # behind the layers: the final norm
                self._head.append((module, args, kwargs))

        def ended(module: nn.Module, args: tuple, output: Any) -> None:
            if threading.get_ident() != own:
                return
            self.end = _first(output)
            if start == len(layers):
                self.states = self.end
                self._note_pass()

        watched = [*layers[start:], *(child for child in stack.children() if child is not layers)]
        for module in watched:
            handle = module.register_forward_pre_hook(note, with_kwargs=True)
            hooks.callback(handle.remove)
        hooks.callback(layers[len(layers) - 1].register_forward_hook(ended).remove)

    def _note_pass(self) -> None:
        found = None if self._runtime is None else self._runtime.current_pass()
        if found is not None:
            self._pass = replace(found, entering=None)  # states that nobody asks for again

    def _leave_out(self, hooks: ExitStack, layers: nn.ModuleList, stop: int) -> None:
        tuples: list[bool] = []

        def look(module: nn.Module, args: tuple, output: Any) -> None:
            tuples.append(isinstance(output, tuple))

        def pass_on(*args: Any, **kwargs: Any) -> Any:
            states = _split(args, kwargs)[0]
            return (states,) if tuples[-1] else states

        def forget_end() -> None:
            self.end = None  # of a layer that was left out

        if stop < len(layers):
            hooks.callback(layers[stop - 1].register_forward_hook(look).remove)
            hooks.callback(forget_end)
        for layer in layers[stop:]:
            hooks.callback(_restore_forward, layer, layer.__dict__.get("forward"))
            layer.forward = pass_on

    @contextmanager
    def running(self) -> Iterator[None]:
        """Inside the block, wrapped layers see the forward that this was made of."""
        if self._pass is None:
            yield
            return
        with framed(self._runtime, "replayed", self._pass):
            yield

    def run(
        self, states: Tensor, recompute: bool = False, start: int | None = None, stop: int | None = None
    ) -> Tensor:
        """States [B, L, D] behind layers, from those in front of them.

        Args:
            recompute: keep nothing of the layers for the backward pass, and run them again there.
            start: number of the first layer to run, from `self.start` on; None: that one.
            stop: number of the layer in front of which to end; None: behind the last one.
        """
        first = 0 if start is None else start - self.start
        with self.running():
            for call in self._layers[first : None if stop is None else stop - self.start]:
                if recompute and torch.is_grad_enabled():
                    states = _checkpointed(call, states)
                else:
                    states = _called(call, states)
        return states

    def head(self, states: Tensor) -> Tensor:
        """Logits [..., V] of states [..., D] behind the last layer, at any positions."""
        for call in self._head:
            states = _called(call, states)
        return self.model.get_output_embeddings()(states)

    def reproduces(self, logits: Tensor, at: Tensor | None = None) -> bool:
        """Whether layers and head on their own give the logits of the whole model.

        They do not where a model does something between its layers, or to the logits.

        Args:
            logits: [B, L, V] of the whole model; at: [B, L] bool, positions to compare, or None for all.
        """
        try:
            with torch.no_grad():
                found = self.run(self.states)
                if at is not None:
                    found, logits = found[at][None], logits[at][None]
                return close(self.head(found), logits)
        except CANNOT as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            return False

    def to(self, device: torch.device | str) -> PartialForward:
        """The same with its tensors on another device; the model stays where it is."""
        moved, known = copy.copy(self), {}
        for name in ("states", "end", "logits", "_pass"):
            setattr(moved, name, move(getattr(self, name), device, known))
        for name in ("_layers", "_head"):
            calls = [(m, move(a, device, known), move(k, device, known)) for m, a, k in getattr(self, name)]
            setattr(moved, name, calls)
        return moved


class Replay:
    """The logits of one batch as a function of what is bound to the layers from `first` on.

    Where the layers on their own do not reproduce the model, the whole model runs instead.

    Args:
        model: a Hugging Face model whose edits are inactive or bound while this is built and called.
        inputs: its keyword arguments, batch included.
        first: number of the first decoder layer to run again.

    Attributes:
        exact: whether the layers on their own reproduce the model; if not, calls run the whole model.
    """

    def __init__(self, model: nn.Module, inputs: Mapping[str, Any], first: int):
        self.model, self.inputs = unwrap(model), {**inputs, "use_cache": False}
        with torch.no_grad():
            self._partial = PartialForward(model, inputs, first)
        # FSDP2 puts its pieces together in the whole model's forward only.
        sharded = any(isinstance(parameter, DTensor) for parameter in self.model.parameters())
        self.exact = not sharded and self._partial.reproduces(self._partial.logits)
        self._partial.logits = None

    def __call__(self, noise: Tensor | None = None) -> Tensor:
        """Logits [B, L, V] with what is bound now.

        Args:
            noise: [B, L, D], what is added to the states in front of the first layer, in their root mean
            squares.
                Left out where the whole model runs.
        """
        if not self.exact:
            return self.model(**self.inputs).logits
        states = self._partial.states
        if noise is not None:
            size = states.float().square().mean(-1, keepdim=True).sqrt()
            states = states + (size * noise.to(size)).to(states.dtype)
        return self._partial.head(self._partial.run(states))

    @property
    def shape(self) -> torch.Size:
        """Of the states in front of the first layer, [B, L, D]."""
        return self._partial.states.shape


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _split(args: tuple, kwargs: Mapping[str, Any]) -> tuple[Tensor, tuple, dict[str, Any]]:
    """The states among a layer's arguments, and the others."""
    if args:
        return args[0], args[1:], dict(kwargs)
    rest = dict(kwargs)
    return rest.pop("hidden_states", None), (), rest


def _called(call: Call, states: Tensor) -> Tensor:
    module, args, kwargs = call
    return _first(module(states, *args, **kwargs))


def _checkpointed(call: Call, states: Tensor) -> Tensor:
    # What is bound travels in context variables. Backward comes when they are long other ones.
    context = copy_context()
    return checkpoint(lambda given: context.run(_called, call, given), states, use_reentrant=False)


def _restore_forward(module: nn.Module, own: Callable[..., Any] | None) -> None:
    if own is None:  # its class's
        del module.forward
    else:
        module.forward = own


def move(value: Any, device: torch.device | str, known: dict[int, Any]) -> Any:
    """A value with the tensors in it on another device.

    Args:
        value: a tensor, a dataclass, tuple, list or dictionary of such, or anything else, which stays.
        known: what was moved already, by the id of what it was: layers share masks, and copies shall, too.
    """
    if id(value) in known:
        return known[id(value)]
    if isinstance(value, Tensor):
        found = value.to(device)
    elif isinstance(value, (tuple, list)) and type(value) in (tuple, list):
        found = type(value)(move(each, device, known) for each in value)
    elif isinstance(value, dict):
        found = {name: move(each, device, known) for name, each in value.items()}
    elif hasattr(value, "__dataclass_fields__"):
        found = copy.copy(value)
        for name in value.__dataclass_fields__:
            object.__setattr__(found, name, move(getattr(value, name), device, known))
    else:
        return value
    known[id(value)] = found
    return found
