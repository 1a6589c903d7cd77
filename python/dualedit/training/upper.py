"""The upper part of a frozen model, run on its own with gradients, from states computed once without.

Nothing below the first edited layer depends on the adapters, so its states are computed once a batch. Above
it two runs are needed at most: one without the edits (what the model would have said, and the states that
become keys and values) and one with them. Up to the second edited layer they share the positions that the
first edit cannot reach (see `reach.py`); where they do not, the backward pass ends at the positions that it
writes to (see `asked.py`). Only the positions whose next token counts go through the last layer (see
`narrow.py`; where it cannot be narrowed, through its feed-forward part), the final norm and the
output head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..models.architectures import find_decoder_layers
from ..runtime.context import Bound, framed, recording, runtime_of
from ..runtime.sequence import ForwardPass, Prompt, Sequence
from ..tuners import EditLayer
from ..tuners.dualedit import DualEditLayer
from .asked import asked_at, left_by
from .narrow import can_narrow, run_narrow
from .reach import Listening, Reach, reached, run_reached, worth_it


class _Seen(Exception):
    """Leaves a forward when everything needed has been seen."""


class _StandIn(nn.Module):
    """Takes an upper layer's place while the lower ones run: notes its arguments, computes nothing."""

    def __init__(self, real: nn.Module, note: Callable[[nn.Module, tuple, dict], Any]):
        super().__init__()
        self._real = (real,)  # in a tuple, so that it is no child
        self._note = note

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_real"][0], name)  # model code reads attributes of its layers

    def forward(self, *args, **kwargs):
        return self._note(self._real[0], args, kwargs)


@dataclass
class Lower:
    """What the lower layers make of some rows.

    Attributes:
        states: [R, L, D] behind the first edited layer, without the edit.
        calls: the modules above it with their arguments, states left out.
        reach: where the first edit arrives by the last edited layer, if the runs up to there share the other
            positions; then a run without the edit has to come before one with it.
        left: what a run without the edit, if there was one, has left of the layer above (see `asked.py`).
    """

    states: Tensor
    calls: list[tuple[nn.Module, tuple, dict]]
    reach: Reach | None = None
    left: dict[nn.Module, Tensor] = field(default_factory=dict)


def _split(args: tuple, kwargs: dict[str, Any]) -> tuple[Tensor, tuple, dict]:
    """The states among a layer's arguments, and the others."""
    if args:
        return args[0], args[1:], dict(kwargs)
    rest = dict(kwargs)
    return rest.pop("hidden_states"), (), rest


class UpperPart:
    """Runs a frozen model's lower layers once, and its upper layers with given edits.

    Args:
        base: the Hugging Face model, with wrapped layers.
        layers: its wrapped layers by name.
        adapter: name of the adapter.
        recompute: keep nothing of the upper layers for the backward pass.

    Attributes:
        narrow: whether the last layer is entered at the needed positions only, where it can be.
        share: whether the layers up to the last edited one run with an edit at those positions only that it
            reaches, where they can.
    """

    def __init__(
        self, base: nn.Module, layers: Mapping[str, DualEditLayer], adapter: str, recompute: bool = False
    ):
        self.base, self.layers, self.adapter, self.recompute = base, dict(layers), adapter, recompute
        self.narrow = self.share = True
        self.runtime = runtime_of(base)
        path, self.decoder = find_decoder_layers(base)
        self.stack = base.get_submodule(path.rpartition(".")[0])
        numbers = sorted(int(name.rpartition(".")[2]) for name in layers)
        self.first, self.last = numbers[0], numbers[-1]
        self.first_name, self.last_name = (
            next(name for name in layers if name.endswith(f".{number}")) for number in (self.first, self.last)
        )

    def lower(self, inputs: Mapping[str, Any], prompt: Prompt) -> Lower:
        """Run the frozen layers up to the first edited one, without gradient."""
        calls: list[tuple[nn.Module, tuple, dict]] = []
        tuples = []

        def note(module: nn.Module, args: tuple, kwargs: dict) -> Any:
            states, args, kwargs = _split(args, kwargs)
            calls.append((module, args, kwargs))
            return (states,) if tuples else states

        first = self.decoder[self.first]
        children = [child for child in self.stack.children() if child is not self.decoder]
        kept = dict(self.decoder._modules)

        def behind(module: nn.Module, args: tuple, kwargs: dict) -> None:
            if calls or self.first == len(kept) - 1 and self.first_name in seen:
                _, rest, named = _split(args, kwargs)
                calls.append((module, rest, named))

        handles = [child.register_forward_pre_hook(behind, with_kwargs=True) for child in children]
        handles.append(
            first.register_forward_hook(
                lambda m, a, output: tuples.append(1) if isinstance(output, tuple) else None
            )
        )
        handles.append(self.stack.register_forward_hook(_leave))
        try:
            for name in list(kept)[self.first + 1 :]:
                self.decoder._modules[name] = _StandIn(kept[name], note)
            with torch.no_grad(), framed(self.runtime, "masks", prompt), recording(self.base) as seen:
                try:
                    self.base(**inputs, use_cache=False)
                except _Seen:
                    pass
        finally:
            self.decoder._modules.update(kept)
            for handle in handles:
                handle.remove()
        lower = Lower(seen[self.first_name], calls)
        lower.reach = self._reach(lower, prompt) if self.share else None
        return lower

    def _reach(self, lower: Lower, prompt: Prompt) -> Reach | None:
        """Where the first edit arrives, if the runs with it and without can share the other positions."""
        between = lower.calls[: self.last - self.first]
        if not between or not all(can_narrow(*call, prompt.text) for call in between):
            return None
        # Whatever else writes to a layer would have to be asked where.
        modules = [module for module, _, _ in between]
        others = any(isinstance(module, EditLayer) for module in modules[:-1])
        if others or modules[-1] is not self.layers[self.last_name]:
            return None
        at = reached(
            self.spans(self.first_name, prompt), [kwargs["attention_mask"] for _, _, kwargs in between]
        )
        return Reach(at) if worth_it(at) else None

    def spans(self, name: str, prompt: Prompt) -> Tensor:
        """[R, L] bool: the positions that a wrapped layer's adapters write to."""
        parts = self.layers[name].dualedit_adapter[self.adapter]
        spans = [prompt.text if part == "text" else prompt.image for part in parts]
        return torch.stack([torch.zeros_like(prompt.text) if s is None else s for s in spans]).any(0)

    def unedited(
        self, lower: Lower, prompt: Prompt, at: Tensor | None
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """What the wrapped layers see without an edit, by layer name, and the last states [K, D] somewhere.

        Args:
            at: [R, L] bool, the positions; or None: only as far as the last wrapped layer.
        """
        doors = [Listening() for _ in range(self.last - self.first)] if lower.reach is not None else []
        calls = [
            (module, args, {**kwargs, "past_key_values": door})
            for door, (module, args, kwargs) in zip(doors, lower.calls, strict=False)
        ]
        told, last = replace(lower, calls=calls + lower.calls[len(doors) :]), None
        with torch.no_grad(), recording(self.base) as states, self._leaving(lower, prompt):
            states[self.first_name] = hidden = lower.states
            if at is not None:
                last = self._run(told, hidden, prompt, at)
            else:
                with self._passing(prompt):
                    for module, args, kwargs in told.calls[: self.last - self.first]:
                        hidden = _first(module(hidden, *args, **kwargs))
        if lower.reach is not None:
            lower.reach.kept = [door.kept for door in doors if door.kept is not None]
            lower.reach.states = states[self.last_name]
        return states, last

    @contextmanager
    def _leaving(self, lower: Lower, prompt: Prompt) -> Iterator[None]:
        """Inside the block, a run without the edit leaves `Lower.left`."""
        if lower.reach is not None or not lower.calls or self.first == len(self.decoder) - 1:
            yield  # what is shared then is shared at all layers, or there is no upper layer
            return
        with left_by(_unwrapped(lower.calls[0][0]), self.spans(self.first_name, prompt)) as lower.left:
            yield

    def edited(
        self, lower: Lower, prompt: Prompt, at: Tensor, route: Tensor, edits: Mapping[str, Any]
    ) -> Tensor:
        """Last states [K, D] at the positions `at` with each row's edit written into it, with gradients."""
        hidden = lower.states
        for part, adapter in self.layers[self.first_name].dualedit_adapter[self.adapter].items():
            span = prompt.text if part == "text" else prompt.image
            hidden, _ = adapter(hidden, span, edits[self.first_name][part], route=route)
        mode, begin = Bound(route, edits), 0
        if lower.reach is not None:
            hidden = self._rewritten(lower.reach, self.reached(lower, hidden, prompt), prompt, mode)
            begin = self.last - self.first
        return self._run(lower, hidden, prompt, at, mode, begin)

    def reached(self, lower: Lower, hidden: Tensor, prompt: Prompt) -> Tensor:
        """States [K, D] at the reached positions behind the last edited layer, before its own edit.

        Args:
            hidden: [R, L, D] behind the first, edited.
        """
        calls = [(module, kwargs) for module, _, kwargs in lower.calls[: self.last - self.first]]
        calls[-1] = calls[-1][0].base_layer, calls[-1][1]

        def run(states: Tensor) -> Tensor:
            with self._passing(prompt):
                return run_reached(calls, states, lower.reach)

        return self._remembered(run, hidden)

    def _rewritten(self, reach: Reach, found: Tensor, prompt: Prompt, mode: Bound) -> Tensor:
        """[R, L, D]: the last edited layer's output, from the states [K, D] at the reached positions."""
        layer, states = self.layers[self.last_name], reach.states
        with self._passing(prompt), framed(self.runtime, "mode", mode):
            if bool((self.spans(self.last_name, prompt) & reach.at).any()):
                states = states.index_put((reach.at,), found)
                return layer.edited(states, states)
            # What this layer writes to does not depend on what is trained: no gradient is asked for there.
            return layer.edited(states, states).index_put((reach.at,), found)

    @contextmanager
    def _passing(self, prompt: Prompt) -> Iterator[None]:
        rows, length = prompt.text.shape
        with framed(self.runtime, "pass", ForwardPass(Sequence(prompt), 0, rows, length)):
            yield

    def _run(
        self, lower: Lower, hidden: Tensor, prompt: Prompt, at: Tensor, mode: Any = None, begin: int = 0
    ) -> Tensor:
        layers = len(self.decoder) - 1 - self.first
        # Where the last layer is a wrapped one, its states are noted at every position.
        top = layers - 1 if self.last < len(self.decoder) - 1 else None
        narrow = False
        for number, (module, args, kwargs) in enumerate(lower.calls[begin:layers], begin):
            only = at if number == top else None
            narrow = only is not None and self.narrow and can_narrow(module, args, kwargs, at)
            # Below the first of these layers only what the edit writes to has a gradient.
            whole = number == 0 and mode is not None and not narrow
            asked = self.spans(self.first_name, prompt) if whole else None

            def run(states, module=module, args=args, kwargs=kwargs, only=only, narrow=narrow, asked=asked):
                # Frames are set here and not outside: a recomputation in backward has to find them too.
                inside = framed(self.runtime, "mode", mode) if mode is not None else nullcontext()
                cut = asked_at(_unwrapped(module), asked, lower.left) if asked is not None else nullcontext()
                with self._passing(prompt), inside, cut:
                    if narrow:
                        return run_narrow(module, states, kwargs, only)
                    with _only_at(module, only):
                        return _first(module(states, *args, **kwargs))

            hidden = self._remembered(run, hidden)
        return hidden if narrow else hidden[at]

    def _remembered(self, run: Callable[[Tensor], Tensor], states: Tensor) -> Tensor:
        """run(states), kept for the backward pass or to be computed again there."""
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(run, states, use_reentrant=False)
        return run(states)

    def logits(self, lowers: list[Lower], states: list[Tensor]) -> list[Tensor]:
        """Logits [K, V] of the last states [K, D] of some rows each.

        For all rows together: for few positions the output head costs what reading its weights costs.
        """
        layers = len(self.decoder) - 1 - self.first
        if any(args or kwargs for lower in lowers for _, args, kwargs in lower.calls[layers:]):
            return [self._head(*pair) for pair in zip(lowers, states, strict=True)]
        if not states:
            return []
        return list(self._head(lowers[0], torch.cat(states)).split([len(each) for each in states]))

    def _head(self, lower: Lower, states: Tensor) -> Tensor:
        hidden = states[None]  # [1, K, D]
        for module, args, kwargs in lower.calls[len(self.decoder) - 1 - self.first :]:
            hidden = _first(module(hidden, *args, **kwargs))
        return self.base.get_output_embeddings()(hidden)[0]


def _unwrapped(layer: nn.Module) -> nn.Module:
    return layer.base_layer if isinstance(layer, EditLayer) else layer


def _leave(module: nn.Module, args: tuple, output: Any) -> None:
    raise _Seen


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def _only_at(layer: nn.Module, at: Tensor | None) -> Iterator[None]:
    """Let a decoder layer's feed-forward part work at the given positions [R, L] only; zero elsewhere.

    For the last layer, whose states at other positions nobody reads.
    """
    inner = getattr(layer, "mlp", None) if at is not None else None
    if not isinstance(inner, nn.Module):
        yield
        return

    def gather(module: nn.Module, args: tuple):
        return (args[0][at][None],)

    def scatter(module: nn.Module, args: tuple, output: Tensor):
        return output.new_zeros((*at.shape, output.shape[-1])).index_put((at,), output[0])

    handles = inner.register_forward_pre_hook(gather), inner.register_forward_hook(scatter)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
