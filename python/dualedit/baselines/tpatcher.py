"""T-Patcher (Huang et al., ICLR 2023): one neuron in the last feed-forward part for each token of a mistake.

A patch adds ReLU(q k + b) v to the part's output, for every token q that it is given. k, b and v are fitted
to the new answer, with an activation loss exp(-(q_e k + b)) that opens the neuron at its own query, and two
memory losses that keep it shut elsewhere: S(M k + b - beta) and S((M - q_e) k - gamma), S being the mean of
the largest exponentials, M queries noted from training facts. Earlier patches stay as they
are. Departures: the neuron has its own ReLU also where the model's feed-forward part is gated (the public
port of another group adds a gated one), and steps end when the answer is likely enough.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..data import EditSample
from ..models.architectures import find_decoder_layers, hidden_size
from ..runtime.partial import Replay
from .baseline import Question
from .gradient import fit
from .layers import feed_forward, layer_number, named_module
from .network_settings import TPatcherSettings
from .noting import noted_inputs
from .states import entering
from .trained import Trained
from .watching import first_of, with_first


def memory_loss(activation: Tensor, hardest: int) -> Tensor:
    """The mean of the largest exponentials of activations [N] (the paper's S)."""
    return activation.exp().topk(min(hardest, len(activation))).values.mean()


class TPatcher(Trained):
    """Neurons beside a feed-forward part; `network` holds the queries that they stay shut at."""

    name = "tp"
    settings: TPatcherSettings

    def _build(self) -> nn.Module:
        model, settings = self.model, self.settings
        count = len(find_decoder_layers(model)[1])
        name = feed_forward(model, count - 1) if settings.module is None else settings.module
        full = named_module(model, name)
        self._number = layer_number(model, full)
        self._part = model.get_submodule(full)
        self._neurons: list[tuple[Tensor, Tensor, Tensor]] = []  # k [T, D], b [T], v [T, D] of each edit
        network = nn.Module()
        network.register_buffer("queries", torch.zeros(0, hidden_size(model)))
        return network

    def prepare(self, samples: Sequence[EditSample]) -> None:
        """Note the part's inputs on training facts."""
        generator = torch.Generator().manual_seed(self.settings.seed)
        self.network.queries = noted_inputs(
            self.model, self.prompter, self._part, samples, self.settings.noted, False, generator
        )

    def edit(self, sample: EditSample) -> None:
        """Add a neuron for each token of the answer and fit them; earlier ones stay as they are."""
        inputs = self._lesson(sample)
        labels = inputs.pop("labels")
        at = (labels[0, 1:] != -100).nonzero()[:, 0]
        with self._applied():
            replay = Replay(self.model, inputs, self._number)
            with torch.no_grad():
                replay()
                queries = self._own_queries(replay, at)
            keys = queries / queries.square().sum(-1, keepdim=True)  # each opens by 1 at its own query
            new = (keys, torch.zeros(len(at), device=keys.device), torch.zeros_like(queries))
            self._neurons.append(new)
            try:
                fit(list(new), replay, labels, self.settings, penalty=lambda: self._penalty(queries, *new))
            except BaseException:
                self._neurons.pop()
                raise

    def _own_queries(self, replay: Replay, at: Tensor) -> Tensor:
        """[T, D] what the part is given where the answer's tokens are predicted."""
        seen: list[Tensor] = []

        def note(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            seen.append(entering(args, kwargs))

        handle = self._part.register_forward_pre_hook(note, with_kwargs=True)
        try:
            replay()
        finally:
            handle.remove()
        if seen[-1].ndim != 3 or seen[-1].shape[-1] != self.network.queries.shape[-1]:
            shape = tuple(seen[-1].shape)
            raise ValueError(
                f"module={self.settings.module!r} is given a tensor of shape {shape}: T-Patcher needs a part "
                f"that maps hidden states [B, L, {self.network.queries.shape[-1]}] to hidden states."
            )
        return seen[-1][0, at].float()

    def _penalty(self, queries: Tensor, keys: Tensor, bias: Tensor, _: Tensor) -> tuple[Tensor, bool]:
        settings, noted = self.settings, self.network.queries
        own = (queries * keys).sum(-1) + bias
        loss = settings.activation_weight * torch.exp(-own).sum()
        opens = bool((own > 0).all())
        if len(noted) and settings.memory_weight:
            activation = noted @ keys.T + bias  # [N, T]
            for each, top in zip(activation.T, own, strict=True):
                shut = memory_loss(each - settings.beta, settings.hardest)
                below = memory_loss(each - top - settings.gamma, settings.hardest)
                loss = loss + settings.memory_weight * (shut + below)
            opens = opens and bool(activation.max() <= 0)
        return loss, opens

    @contextmanager
    def _applied(self, questions: Sequence[Question] = ()) -> Iterator[None]:
        if self._off:
            yield
            return

        def patch(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
            if not self._neurons:
                return None
            keys, bias, values = (torch.cat(parts) for parts in zip(*self._neurons, strict=True))
            opened = torch.relu(entering(args, kwargs).float() @ keys.T + bias)
            hidden = first_of(output)
            return with_first(output, hidden + (opened @ values).to(hidden))

        handle = self._part.register_forward_hook(patch, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def reset(self) -> None:
        """Take the neurons away."""
        self._neurons = []

    def memory_bytes(self) -> int:
        """The neurons."""
        return sum(part.nbytes for neuron in self._neurons for part in neuron)
