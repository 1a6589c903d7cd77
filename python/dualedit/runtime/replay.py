"""Running only the upper part of a model again and again, from activations kept of one full run.

Fitting a value at one layer changes nothing below it. One full forward notes what every decoder layer from
there on was called with; after that a step costs the upper layers only. Whether this reproduces the model is
checked against the full forward's logits; where it does not (features added between layers, scaled logits),
the full model runs instead.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..models.architectures import find_decoder_layers, unwrap
from .context import runtime_of
from .frames import framed


def _states(args: tuple, kwargs: Mapping[str, Any]) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]


def _with_states(args: tuple, kwargs: dict[str, Any], states: Tensor) -> tuple[tuple, dict[str, Any]]:
    if args:
        return (states, *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": states}


class Replay:
    """The logits of one batch as a function of what is bound to the layers from `first` on.

    Args:
        model: a Hugging Face model whose edits are inactive or bound while this is built and called.
        inputs: its keyword arguments, batch included.
        first: number of the first decoder layer to run again.

    Attributes:
        exact: whether the upper part alone reproduces the model; if not, calls run the whole model.
    """

    def __init__(self, model: nn.Module, inputs: Mapping[str, Any], first: int):
        self.model = unwrap(model)
        self.inputs = {**inputs, "use_cache": False}
        self.first = first
        # What wrapped layers know of the full run's pass (its masks) holds for the layers run again.
        self._runtime = runtime_of(self.model)
        self._pass: Any = None
        # FSDP2 puts its pieces together in the whole model's forward only.
        sharded = any(isinstance(parameter, DTensor) for parameter in self.model.parameters())
        with torch.no_grad():
            self._calls, logits = self._record()
            self.exact = bool(self._calls) and not sharded and self._matches(logits)

    def _record(self) -> tuple[list[tuple[nn.Module, tuple, dict]], Tensor]:
        path, layers = find_decoder_layers(self.model)
        stack = self.model.get_submodule(path.rpartition(".")[0])
        watched = {
            id(m): m for m in [*layers[self.first :], *(c for c in stack.children() if c is not layers)]
        }
        calls: list[tuple[nn.Module, tuple, dict]] = []

        own = threading.get_ident()

        def note(module: nn.Module, args: tuple, kwargs: dict) -> None:
            if threading.get_ident() == own and (calls or module is layers[self.first]):
                if self._runtime is not None:
                    self._pass = self._runtime.current_pass() or self._pass
                calls.append((module, args, dict(kwargs)))

        handles = [m.register_forward_pre_hook(note, with_kwargs=True) for m in watched.values()]
        try:
            logits = self.model(**self.inputs).logits
        finally:
            for handle in handles:
                handle.remove()
        return calls, logits

    def _matches(self, logits: Tensor) -> bool:
        try:
            again = self._upper()
        except (TypeError, ValueError, RuntimeError, KeyError):
            return False
        return again.shape == logits.shape and torch.allclose(
            again.float(), logits.float(), rtol=1e-3, atol=1e-3
        )

    def _upper(self) -> Tensor:
        if self._pass is None:
            return self._run()
        with framed(self._runtime, "replayed", self._pass):
            return self._run()

    def _run(self) -> Tensor:
        states = _states(*self._calls[0][1:])
        for module, args, kwargs in self._calls:
            args, kwargs = _with_states(args, kwargs, states)
            output = module(*args, **kwargs)
            states = output[0] if isinstance(output, tuple) else output
        return self.model.get_output_embeddings()(states)

    def __call__(self) -> Tensor:
        """Logits [B, L, V] with what is bound now."""
        run: Callable[[], Tensor] = self._upper if self.exact else lambda: self.model(**self.inputs).logits
        return run()
