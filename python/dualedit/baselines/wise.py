"""WISE (Wang et al., NeurIPS 2024): side memories of one feed-forward value matrix, found by activation.

A side memory is a copy W' of the matrix W that edits are written to. With a the matrix' input, the activation
of a question is |a (W' - W)|, and it goes to the memory with the largest one, if that is above a share of the
smallest activation among that memory's own edits; else W answers. Editing fits the answer
with a margin loss: unrelated inputs below alpha, its own above beta, and gamma between them.
Edits of one shard change a random share of W' only; full shards are merged by TIES (Yadav et al. 2023).
Departures: Adam, until the answer is likely enough; the margins are measured in mean lengths of the matrix'
own output; unrelated inputs are tokens noted from training facts; a question decides once, at its prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..data import EditSample
from ..runtime.partial import Replay
from .baseline import Question
from .gradient import fit
from .layers import decoder_layer, last_linear, layer_number, linear_module
from .network_settings import WISESettings
from .noting import noted_inputs
from .trained import Trained
from .watching import Watch, watching


def activation(inputs: Tensor, change: Tensor, columns: Tensor) -> Tensor:
    """[R] the mean length of a (W' - W) over some columns of the inputs (the paper's activation).

    Args:
        inputs: [R, L, I] of the matrix.
        change: [O, I], W' - W.
        columns: [R, L] bool.
    """
    lengths = (inputs @ change.T).norm(dim=-1)
    weight = columns.to(lengths)
    return (lengths * weight).sum(1) / weight.sum(1)


def route(activations: Tensor, thresholds: Tensor) -> Tensor:
    """[R] int64, the side memory that each question goes to, -1 for the model's own matrix.

    Args:
        activations: [R, M] of each question in each memory.
        thresholds: [M], above which a memory takes a question.
    """
    taken = activations.masked_fill(activations <= thresholds, float("-inf"))
    best, index = taken.max(dim=1)
    return index.masked_fill(best == float("-inf"), -1)


def margin_loss(own: Tensor, unrelated: Tensor, alpha: float, beta: float, gamma: float) -> Tensor:
    """max(0, u - alpha) + max(0, beta - o) + max(0, gamma - (o - u)) of activations."""
    parts = (unrelated - alpha, beta - own, gamma - (own - unrelated))
    return sum(torch.relu(part) for part in parts)


def ties_merge(changes: Sequence[Tensor], density: float) -> Tensor:
    """One change out of several: the largest of each, the heavier sign, the mean of those with it."""
    trimmed = []
    for change in changes:
        count = max(1, round(density * change.numel()))
        least = change.abs().flatten().kthvalue(change.numel() - count + 1).values
        trimmed.append(torch.where(change.abs() >= least, change, torch.zeros_like(change)))
    stacked = torch.stack(trimmed)
    sign = stacked.sum(0).sign()
    agreeing = (stacked.sign() == sign) & (stacked != 0)
    return (stacked * agreeing).sum(0) / agreeing.sum(0).clamp(min=1)


@dataclass
class _Side:
    """A side memory, or a shard of one: its change of the matrix, and its edits' activations."""

    change: Tensor
    mask: Tensor | None = None
    least: list[float] = field(default_factory=list)
    full: bool = False


class WISE(Trained):
    """Side memories of one linear layer; `network` holds unrelated inputs of it."""

    name = "wise"
    settings: WISESettings

    def _build(self) -> nn.Module:
        model, settings = self.model, self.settings
        name = settings.module
        if name is None:
            name = last_linear(model, decoder_layer(model, None, 5 / 6))
        full = linear_module(model, name)
        self._number = layer_number(model, full)
        self._linear: nn.Linear = model.get_submodule(full)
        self._sides: list[_Side] = []
        self._edits = 0
        network = nn.Module()
        network.register_buffer("unrelated", torch.zeros(0, self._linear.in_features))
        return network

    def prepare(self, samples: Sequence[EditSample]) -> None:
        """Note the matrix' inputs on training facts."""
        settings = self.settings
        generator = torch.Generator().manual_seed(settings.seed)
        self.network.unrelated = noted_inputs(
            self.model, self.prompter, self._linear, samples, settings.noted, settings.routed_by == "last",
            generator,
        )  # fmt: skip

    # ------------------------------------------------------------------ routing

    def _columns(self, prompt: Tensor, last: Tensor) -> Tensor:
        """[R, L] bool, the columns that activations are taken over."""
        if self.settings.routed_by == "prompt":
            return prompt
        return torch.zeros_like(prompt).scatter(1, last[:, None], True)

    def _routes(self, inputs: Tensor, columns: Tensor) -> Tensor:
        inputs = inputs.float()
        found = torch.stack([activation(inputs, side.change, columns) for side in self._sides], dim=1)
        least = [self.settings.act_ratio * min(side.least) for side in self._sides]
        return route(found, torch.tensor(least, device=found.device))

    @contextmanager
    def _applied(self, questions: Sequence[Question] = ()) -> Iterator[None]:
        if self._off or not self._sides:
            yield
            return
        with watching(self.model) as watch:
            handle = self._linear.register_forward_hook(lambda *call: self._written(watch, *call))
            try:
                yield
            finally:
                handle.remove()

    def _written(self, watch: Watch, module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        inputs = args[0]
        if watch.decided is None:
            columns = self._columns(watch.prompt, watch.last)
            watch.decided = self._routes(inputs, columns.to(inputs.device))
        rows = (watch.decided >= 0).nonzero()[:, 0]
        if not len(rows):
            return None
        output = output.clone()
        for row in rows.tolist():
            change = self._sides[int(watch.decided[row])].change
            output[row] += (inputs[row].float() @ change.T).to(output)
        return output

    # ------------------------------------------------------------------ editing

    def edit(self, sample: EditSample) -> None:
        """Fit the answer in the side memory that is being filled; it is merged when its shards are full."""
        settings = self.settings
        unrelated = self.network.unrelated
        inputs = self._lesson(sample)
        labels = inputs.pop("labels")
        prompt = inputs["attention_mask"].bool() & (labels == -100)
        last = (labels[0] != -100).int().argmax()[None] - 1
        columns = self._columns(prompt, last)
        replay = Replay(self.model, inputs, self._number)
        side = self._filling()
        start = side.change.clone()
        delta = torch.zeros_like(start)
        size = float(nn.functional.linear(unrelated, self._linear.weight.float()).norm(dim=-1).mean())
        seen: list[Tensor] = []

        def write(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
            seen[:] = [args[0]]
            return output + (args[0].float() @ (start + delta * side.mask).T).to(output)

        def penalty() -> tuple[Tensor, bool]:
            change = start + delta * side.mask
            own = activation(seen[0].float(), change, columns)
            far = (unrelated @ change.T).norm(dim=-1).mean()
            loss = margin_loss(own, far, *(size * m for m in (settings.alpha, settings.beta, settings.gamma)))
            return loss.sum() / size, float(loss.detach()) <= 0

        handle = self._linear.register_forward_hook(write)
        try:
            fit([delta], replay, labels, settings, penalty=penalty)
            with torch.no_grad():
                own = float(activation(seen[0].float(), start + delta * side.mask, columns))
        finally:
            handle.remove()
        if all(side is not known for known in self._sides):
            self._sides.append(side)
        side.change = (start + delta * side.mask).detach()
        side.least.append(own)
        self._edits += 1
        if self._edits % settings.shard_edits == 0:
            side.full = True
            self._merge()

    def _filling(self) -> _Side:
        """The shard that takes the next edit."""
        if self._sides and not self._sides[-1].full:
            return self._sides[-1]
        weight = self._linear.weight
        generator = torch.Generator().manual_seed(1_000_003 * self.settings.seed + self._edits)
        mask = torch.rand(weight.shape, generator=generator) < self.settings.mask_ratio
        return _Side(torch.zeros_like(weight, dtype=torch.float32), mask.to(weight.device).float())

    def _merge(self) -> None:
        """Make one side memory of the newest shards, once there are enough."""
        shards = [side for side in self._sides if side.full and side.mask is not None]
        if len(shards) < self.settings.shards:
            return
        merged = _Side(ties_merge([shard.change for shard in shards], self.settings.density), full=True)
        merged.least = [least for shard in shards for least in shard.least]
        self._sides = [side for side in self._sides if all(side is not shard for shard in shards)] + [merged]

    def reset(self) -> None:
        """Drop the side memories."""
        self._sides, self._edits = [], 0

    def memory_bytes(self) -> int:
        """The side memories and the masks of open shards."""
        parts = [part for side in self._sides for part in (side.change, side.mask) if part is not None]
        return sum(part.nbytes for part in parts)
