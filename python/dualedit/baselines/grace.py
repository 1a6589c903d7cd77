"""GRACE (Hartvigsen et al. 2023): a codebook of states at one decoder layer, each with a deferral radius.

Where the last prompt token's state enters the layer inside the radius of its nearest key, that key's value
takes the place of the layer's output there (their Eq. 1); everywhere else the layer itself answers. A new
edit farther than its radius beside the nearest one's gets a key of its own; a nearer one with another answer
too, and both radii shrink to half the distance; one with the same answer widens the nearest radius instead
(their Algorithm 1). Departures: the value starts from the layer's own output ("warm" in their code), the
lookup happens once, at the prompt, and holds for the answer, and an edit with the very key of a stored one
takes its place (halving a distance of zero would leave both unreachable).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dualedit_kernels import nearest_key

from ..data import EditSample
from ..editing import Edit
from ..editor import Explanation
from ..models.architectures import find_decoder_layers, resolve_layer
from ..runtime.partial import Replay
from .baseline import Baseline, Question, stored_edit
from .gradient import fit
from .settings import GRACESettings
from .states import entering, last_states
from .watching import first_of, watching, with_first


@dataclass
class _Entry:
    key: Tensor  # [D] float32
    value: Tensor  # [D] float32
    epsilon: float
    answer: list[int]
    edit: Edit


class GRACE(Baseline):
    """Keys, values and radii; the model's weights stay as they are."""

    name = "grace"

    def __init__(self, model: nn.Module, processor: Any, template: str | None, settings: GRACESettings):
        super().__init__(model, processor, template)
        self.settings = settings
        path, layers = find_decoder_layers(self.model)
        layer = 2 * len(layers) // 3 if settings.layer is None else settings.layer
        name = resolve_layer(self.model, layer, "layer")
        self._number = int(name.removeprefix(path + "."))
        self._layer = self.model.get_submodule(name)
        self._entries: list[_Entry] = []
        self._stored = 0

    # ------------------------------------------------------------------ looking up

    def _lookup(self, query: Tensor, everywhere: bool = False) -> tuple[Tensor, Tensor]:
        """Number of the nearest entry (-1 outside its radius, unless `everywhere`) and distance, [R] each."""
        keys = torch.stack([entry.key for entry in self._entries])
        radius = [float("inf") if everywhere else entry.epsilon for entry in self._entries]
        return nearest_key(query.float(), keys, torch.tensor(radius, device=keys.device), "l2")

    @contextmanager
    def _applied(self, questions: Sequence[Question] = ()) -> Iterator[None]:
        if self._off or not self._entries:
            yield
            return

        def replace(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
            if not watch.begins:  # a decode step: the prompt has been decided on
                return None
            states = entering(args, kwargs)
            rows = torch.arange(states.shape[0], device=states.device)
            columns = watch.last.to(rows)
            index, _ = self._lookup(states[rows, columns])
            hit = (index >= 0).nonzero()[:, 0]
            if not len(hit):
                return None
            values = torch.stack([self._entries[i].value for i in index[hit].tolist()])
            return _written(output, hit, columns[hit], values)

        with watching(self.model) as watch:
            handle = self._layer.register_forward_hook(replace, with_kwargs=True)
            try:
                yield
            finally:
                handle.remove()

    def explain(self, questions: Sequence[Question]) -> list[Explanation | None]:
        """Which edit fires for each question, or is nearest, with its distance and radius."""
        if self._off or not self._entries:
            return [Explanation(False, None, float("inf"), 0.0) for _ in questions]
        query = last_states(self.model, self._layer, self.prompter, questions)
        index, distance = self._lookup(query, everywhere=True)
        found = []
        for i, far in zip(index.tolist(), distance.tolist(), strict=True):
            entry = self._entries[i]
            found.append(Explanation(far <= entry.epsilon, entry.edit, far, entry.epsilon))
        return found

    # ------------------------------------------------------------------ editing

    def edit(self, sample: EditSample) -> None:
        """Add a key and fit its value, or widen the key that has this answer already."""
        began = time.perf_counter()
        request = sample.request
        inputs = self._lesson(sample)
        labels = inputs.pop("labels")
        answer = labels[labels != -100].tolist()
        asked = [(request.image, request.prompt)]
        key = last_states(self.model, self._layer, self.prompter, asked)[0].float()
        entry = self._place(key, answer)
        last = int((labels[0] != -100).int().argmax()) - 1
        value = self._fitted(inputs, labels, last, None if entry is None else entry.value)
        if entry is None:
            entry = _Entry(key, value, self.settings.epsilon, answer, None)
            entry.epsilon = self._room(key)
            self._entries.append(entry)
        self._stored += 1
        entry.value, entry.answer = value, answer
        entry.edit = stored_edit(self._stored, sample, entry.epsilon, time.perf_counter() - began)

    def _place(self, key: Tensor, answer: list[int]) -> _Entry | None:
        """The stored entry that a new edit shares, its radius widened; None for a key of its own."""
        if not self._entries:
            return None
        index, distance = self._lookup(key[None], everywhere=True)
        nearest, far = self._entries[int(index[0])], float(distance[0])
        if far <= 1e-6 * float(key.norm()):
            return nearest
        if far <= nearest.epsilon + self.settings.epsilon and nearest.answer == answer:
            nearest.epsilon = max(nearest.epsilon, far)
            return nearest
        return None

    def _room(self, key: Tensor) -> float:
        """The radius of a new key; where it meets its neighbour's, both get half of the distance."""
        if not self._entries:
            return self.settings.epsilon
        index, distance = self._lookup(key[None], everywhere=True)
        nearest, far = self._entries[int(index[0])], float(distance[0])
        if far > nearest.epsilon + self.settings.epsilon:
            return self.settings.epsilon
        nearest.epsilon = far / 2 * (1 - 1e-5)
        return far / 2

    def _fitted(self, inputs: dict[str, Tensor], labels: Tensor, last: int, start: Tensor | None) -> Tensor:
        replay = Replay(self.model, inputs, self._number)
        value = None if start is None else start.clone()

        def replace(module: nn.Module, args: tuple, output: Any) -> Any:
            nonlocal value
            if value is None:
                value = first_of(output)[0, last].detach().float().clone()
            return _written(output, torch.tensor([0]), torch.tensor([last]), value[None])

        handle = self._layer.register_forward_hook(replace)
        try:
            with torch.no_grad():
                replay()  # the first run only tells where the value starts
            fit([value], replay, labels, self.settings)
        finally:
            handle.remove()
        return value.detach()

    def reset(self) -> None:
        """Empty the codebook."""
        self._entries = []

    def memory_bytes(self) -> int:
        """Keys, values and a radius each."""
        return sum(entry.key.nbytes + entry.value.nbytes + 4 for entry in self._entries)


def _written(output: Any, rows: Tensor, columns: Tensor, values: Tensor) -> Any:
    """A layer's output with values [K, D] at the given rows [K] and columns [K]."""
    hidden = first_of(output).clone()
    hidden[rows.to(hidden.device), columns.to(hidden.device)] = values.to(hidden)
    return with_first(output, hidden)
