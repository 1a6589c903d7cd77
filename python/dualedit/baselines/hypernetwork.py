"""What MEND and KE share: the gradient of an edit at some linear layers, and writing a change made of it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..data import EditSample
from ..models.architectures import find_decoder_layers
from .layers import last_linear, layer_number, linear_module
from .lessons import Lessons, Passed, rows_of, written_and_kept
from .trained import Trained
from .weights import WeightEditor


@dataclass
class Gradient:
    """The gradient of each edit's loss at one linear layer, as the sums that it consists of.

    Attributes:
        inputs: [E, L, I] float32, what the layer is given.
        errors: [E, L, O] float32, gradient of an edit's loss at the layer's output; zero at padding.
    """

    inputs: Tensor
    errors: Tensor

    @property
    def whole(self) -> Tensor:
        """[E, O, I], the gradient at the weight."""
        return torch.einsum("elo,eli->eoi", self.errors, self.inputs)


def gradients_of(
    model: nn.Module, names: Sequence[str], passed: Passed
) -> tuple[dict[str, Gradient], Tensor]:
    """The gradient of each row's loss at named linear layers, and the losses [E].

    A row's loss is the mean cross-entropy of its answer. Rows do not mix: one backward pass gives them all.
    """
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    handles = []
    for name in names:

        def note(module: nn.Module, args: tuple, output: Tensor, name: str = name) -> None:
            inputs[name], outputs[name] = args[0].detach(), output

        handles.append(model.get_submodule(name).register_forward_hook(note))
    rows = passed.rows
    try:
        with torch.inference_mode(False), torch.enable_grad():
            logits = passed.logits(passed.states.detach().clone().requires_grad_(True))
            token = nn.functional.cross_entropy(logits.float(), rows.wanted, reduction="none")
            count = torch.bincount(rows.row, minlength=len(rows.labels))
            losses = token.new_zeros(len(rows.labels)).index_add(0, rows.row, token) / count
            errors = torch.autograd.grad(losses.sum(), [outputs[name] for name in names])
    finally:
        for handle in handles:
            handle.remove()
    found = zip(names, errors, strict=True)
    return {name: Gradient(inputs[name].float(), e.float()) for name, e in found}, losses.detach()


class HyperNetwork(Trained, WeightEditor):
    """Linear layers whose weights change by what a network makes of an edit's gradient.

    Attributes:
        settings: with "modules", names of linear layers, or None for the last ones of the last `layers`
            decoder layers.
    """

    def _build(self) -> nn.Module:
        self._before: dict[str, Tensor] = {}
        model, settings = self.model, self.settings
        if settings.modules is None:
            count = len(find_decoder_layers(model)[1])
            layers = range(max(0, count - settings.layers), count)
            names = [last_linear(model, number) for number in layers]
        else:
            names = list(settings.modules)
        self.names = [linear_module(model, name, "modules") for name in names]
        self._first = min(layer_number(model, name) for name in self.names)
        self._checked = False
        return self._make({name: model.get_submodule(name) for name in self.names})

    @abstractmethod
    def _make(self, linears: Mapping[str, nn.Linear]) -> nn.Module:
        """The untrained network for these layers."""

    @abstractmethod
    def _changes(self, passed: Passed, gradients: Mapping[str, Gradient]) -> dict[str, Any]:
        """For each layer, whatever `_added` and `_dense` read: the changes of E edits."""

    @abstractmethod
    def _added(self, change: Any, inputs: Tensor, owner: Tensor) -> Tensor:
        """[R, L, O] what edit `owner` [R] adds to a layer's output at inputs [R, L, I]."""

    @abstractmethod
    def _dense(self, change: Any) -> Tensor:
        """[O, I], the change of the first edit's weight."""

    def _passed(self, questions: Sequence, answers: Sequence[str]) -> Passed:
        rows = rows_of(self.model, self.prompter, questions, answers)
        passed = Passed(self.model, rows, self._first, check=not self._checked)
        self._checked = True
        return passed

    def training_loss(self, lessons: Lessons, keep_weight: float) -> Tensor:
        edits = self._passed(*lessons.edits())
        gradients, _ = gradients_of(self.model, self.names, edits)
        changes = self._changes(edits, gradients)
        asked = self._passed(lessons.questions, lessons.answers)
        owner = lessons.owner.to(asked.states.device)
        with self._bound(lambda name, inputs: self._added(changes[name], inputs, owner)):
            written, kept = written_and_kept(asked.logits(), asked, lessons)
        return self._combined(written, kept, keep_weight)

    def _combined(self, written: Tensor, kept: Tensor, keep_weight: float) -> Tensor:
        return written + keep_weight * kept

    @contextmanager
    def _bound(self, added: Callable[[str, Tensor], Tensor]) -> Iterator[None]:
        """Inside the block, layers add something to their output."""
        handles = []
        for name in self.names:

            def write(module: nn.Module, args: tuple, output: Tensor, name: str = name) -> Tensor:
                return output + added(name, args[0].float()).to(output)

            handles.append(self.model.get_submodule(name).register_forward_hook(write))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def edit(self, sample: EditSample) -> None:
        """One gradient, one pass of the network, one change of the weights; earlier edits may suffer."""
        request = sample.request
        passed = self._passed([(request.image, request.prompt)], [request.target])
        gradients, _ = gradients_of(self.model, self.names, passed)
        with torch.no_grad():
            changes = self._changes(passed, gradients)
            self._keep([f"{name}.weight" for name in self.names])
            for name in self.names:
                weight = self.model.get_submodule(name).weight
                weight.add_(self._dense(changes[name]).to(weight))
