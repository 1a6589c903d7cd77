"""What the frozen model makes of a training step's questions: the same in every step, so it may be kept.

Nothing below the first edited layer depends on what is trained, nor does what the model says without an edit.
Keeping both for the questions that come again leaves a step the layers above the first edited one to run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..models.architectures import find_decoder_layers
from ..runtime.context import framed, recording, runtime_of
from ..runtime.partial import PartialForward, move
from .batches import Part
from .losses import answer_positions


@dataclass
class FrozenRun:
    """What a frozen model makes of a part's rows.

    Attributes:
        layers: the layers above the first edited one, and the states behind that.
        edits: name of a wrapped layer above the first to the states [T, D] of the part's edits there; those
            of the first are among the states of `layers`. Empty where the part holds no edits.
        before: [K, D] states behind the last layer, without an edit, in front of the answers' tokens; None
            where no answer of the part must stay.
    """

    layers: PartialForward
    edits: dict[str, Tensor]
    before: Tensor | None

    def to(self, device: torch.device | str) -> FrozenRun:
        """The same on another device."""
        edits, before = move((self.edits, self.before), device, {})
        return FrozenRun(self.layers.to(device), edits, before)

    def nbytes(self) -> int:
        """Memory that its tensors take."""
        found = {id(tensor): tensor for tensor in _tensors((self.layers.__dict__, self.edits, self.before))}
        return sum(tensor.numel() * tensor.element_size() for tensor in found.values())


class FrozenModel:
    """Runs a frozen model on parts, and keeps what it makes of those that have a name.

    Args:
        base: the Hugging Face model, with wrapped layers.
        layers: names of the wrapped layers.

    Attributes:
        keep_bytes: main memory that kept runs may take. Once it is used up, no further ones are kept.
        kept_bytes: what they take.
    """

    def __init__(self, base: nn.Module, layers: Sequence[str]):
        self.base = base
        numbers = {int(name.rpartition(".")[2]): name for name in layers}
        self.first, self.last = min(numbers), max(numbers)
        self.first_name = numbers[self.first]
        self.depth = len(find_decoder_layers(base)[1])
        self.keep_bytes = self.kept_bytes = 0
        self._kept: dict[bytes, FrozenRun] = {}

    @torch.no_grad()
    def run(self, part: Part) -> FrozenRun:
        """The frozen model's run of a part, on the part's device."""
        if part.name is not None and part.name in self._kept:
            return self._kept[part.name].to(part.labels.device)
        found = self._run(part)
        if part.name is not None:
            size = found.nbytes()
            if self.kept_bytes + size <= self.keep_bytes:
                self._kept[part.name] = found.to("cpu")
                self.kept_bytes += size
        return found

    def edit_states(self, part: Part, run: FrozenRun) -> dict[str, Tensor]:
        """Wrapped layer's name to the states [T, D] of a part's edits; empty where it holds none."""
        if not part.holds_edits:
            return {}
        return {self.first_name: run.layers.states[part.edit_columns], **run.edits}

    def _run(self, part: Part) -> FrozenRun:
        stop = self.depth if part.keeps else self.last + 1 if part.holds_edits else self.first + 1
        with framed(runtime_of(self.base), "masks", part.prompt), recording(self.base) as seen:
            layers = PartialForward(self.base, part.inputs, self.first + 1, stop)
        others = seen.keys() - {self.first_name} if part.holds_edits else ()
        edits = {name: seen[name][part.edit_columns] for name in others}
        before = layers.end[answer_positions(part.labels)] if part.keeps else None
        layers.end = None
        return FrozenRun(layers, edits, before)


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists and dictionaries."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from _tensors(each)
    elif isinstance(value, Mapping):
        yield from _tensors(tuple(value.values()))
