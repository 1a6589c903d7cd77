"""One training step: the losses of a batch, with gradients to the adapters.

Every row is bound to its edit, with the gate open: what the gate would keep out at answering time is what the
locality terms are about. The frozen model runs once for each row; above the first edited layer the rows run
again with the edits written, and the output head computes the positions in front of the answers alone.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..models.architectures import unwrap
from ..models.placement import to_device
from ..runtime.context import bound, framed, recording, runtime_of
from ..runtime.partial import CANNOT, close
from ..runtime.sequence import Prompt
from ..tuners.adapter import active_adapter
from ..tuners.dualedit.modules import EditKV
from ..tuners.layer import EditLayer
from .batches import Batch, Part
from .frozen import FrozenModel, FrozenRun
from .losses import CHANGE, IGNORED, answer_positions, sums_by_term, token_losses

Edits = dict[str, dict[str, EditKV]]


def trainable_layers(model: nn.Module) -> tuple[str, dict[str, EditLayer]]:
    """The active adapter's name and its layers by name.

    Raises:
        ValueError: the model holds edits (their keys and values would go stale), or its active adapter is not
            DualEdit's.
    """
    adapter = active_adapter(model)
    if len(adapter.group):
        raise ValueError(f"model holds {len(adapter.group)} edits: train on an adapter without any.")
    if not adapter.method.trains_adapters:
        raise ValueError(
            f"adapter {adapter.name!r} is a {type(adapter.config).__name__}: only DualEdit's adapters are "
            f"trained."
        )
    return adapter.name, adapter.layers


class TrainingStep(nn.Module):
    """The losses of a batch as a module, so that DDP and FSDP see one forward a step.

    Args:
        model: from `inject_dualedit`, without stored edits. All but the active adapter's weights are frozen.
        recompute, by_difficulty: see `Recipe`.
        autocast: dtype of the adapters' products where their weights are in fp32, or None.

    Attributes:
        partial: whether the layers above the first edited one run on their own; else the whole model runs for
            every loss. `choose_way` compares the two and decides.

    Raises:
        ValueError: the model holds edits, or its active adapter is not DualEdit's.
    """

    def __init__(
        self,
        model: nn.Module,
        recompute: bool = False,
        autocast: torch.dtype | None = None,
        by_difficulty: bool = False,
    ):
        super().__init__()
        self.adapter, self.layers = trainable_layers(model)
        self.model = model
        self.recompute, self.autocast, self.by_difficulty = recompute, autocast, by_difficulty
        self.frozen = FrozenModel(self.base, list(self.layers))
        self.partial = True
        model.requires_grad_(False)
        for parameter in self.trained().values():
            parameter.requires_grad_(True)

    @property
    def base(self) -> nn.Module:
        """The Hugging Face model."""
        return unwrap(self.model)

    def trained(self) -> dict[str, nn.Parameter]:
        """The adapters' weights by name: wrapped layer, part, weight."""
        return {
            f"{layer_name}.{name}": parameter
            for layer_name, layer in self.layers.items()
            for name, parameter in layer.dualedit_adapter[self.adapter].named_parameters()
        }

    def forward(self, batch: Batch) -> Tensor:
        """The sums over its answers of each term's losses, [6] float32 in the order of `TERMS`."""
        batch = on_device(batch, self.base)
        losses, answers = [], []
        for part, (now, before) in zip(batch.parts, self.logits(batch), strict=True):
            at = part.labels != IGNORED
            change = batch.terms[part.answer[at]] < len(CHANGE)
            losses.append(token_losses(now, before, part.labels[at], change))
            answers.append(part.answer[at])
        sums = sums_by_term(torch.cat(losses), torch.cat(answers), batch.terms, self.by_difficulty)
        return sums + 0.0 * sum(weight.sum() for weight in self._unused(batch))

    def _unused(self, batch: Batch) -> list[nn.Parameter]:
        """Weights of the image adapter where no row of a batch has an image.

        They get a gradient of zero: other processes, whose rows may have one, wait for it.
        """
        if any(part.prompt.image is not None and bool(part.prompt.image.any()) for part in batch.parts):
            return []
        adapters = [layer.dualedit_adapter[self.adapter] for layer in self.layers.values()]
        return [weight for parts in adapters if "vision" in parts for weight in parts["vision"].parameters()]

    # ------------------------------------------------------------------ both ways to the logits

    def logits(self, batch: Batch) -> list[tuple[Tensor, Tensor | None]]:
        """Logits [K, V] in front of the answers' tokens, with the edits and without, part by part.

        Args:
            batch: on the model's device; without the edits only parts with answers that must stay are run.
        """
        kind, dtype = batch.terms.device.type, self.autocast
        with torch.autocast(kind, dtype) if dtype is not None else nullcontext():
            return self._partial_logits(batch) if self.partial else self._whole_logits(batch)

    def _partial_logits(self, batch: Batch) -> list[tuple[Tensor, Tensor | None]]:
        """Logits [K, V] in front of the answers' tokens, with the edits and without, part by part."""
        runs = [self.frozen.run(part) for part in batch.parts]
        pairs = list(zip(batch.parts, runs, strict=True))
        edits = self._project(batch, [self.frozen.edit_states(*pair) for pair in pairs])
        found = []
        for part, run in pairs:
            with torch.no_grad():
                before = None if run.before is None else run.layers.head(run.before[None])[0]
            found.append((self._edited_logits(part, run, edits), before))
        return found

    def _edited_logits(self, part: Part, run: FrozenRun, edits: Edits) -> Tensor:
        with bound(self.base, part.route, edits):
            with run.layers.running():
                states = self.layers[self.frozen.first_name].edited(run.layers.states, run.layers.states)
            states = run.layers.run(states, self.recompute)
        return run.layers.head(states[answer_positions(part.labels)][None])[0]

    def _whole_logits(self, batch: Batch) -> list[tuple[Tensor, Tensor | None]]:
        """The same, by the whole model."""
        states, before, found = [], [], []
        for part in batch.parts:
            with torch.no_grad(), framed(runtime_of(self.base), "masks", part.prompt):
                with recording(self.base) as seen:
                    logits = self.base(**part.inputs, use_cache=False).logits
            before.append(logits[answer_positions(part.labels)] if part.keeps else None)
            states.append({name: seen[name][part.edit_columns] for name in seen if part.holds_edits})
        edits = self._project(batch, states)
        for part, old in zip(batch.parts, before, strict=True):
            with framed(runtime_of(self.base), "masks", part.prompt), bound(self.base, part.route, edits):
                logits = self.base(**part.inputs, use_cache=False).logits[answer_positions(part.labels)]
            found.append((logits, old))
        return found

    def _project(self, batch: Batch, states: list[dict[str, Tensor]]) -> Edits:
        """Keys and values of the batch's edits, with gradients, one edit after the other by number.

        Args:
            states: of each part, wrapped layer's name to the states [T, D] of its edits.
        """
        lengths = torch.zeros(batch.edits, dtype=torch.int64, device=batch.terms.device)
        start, begin = torch.zeros_like(lengths), 0
        # Tokens come part by part; an edit lies where its part's tokens are.
        for part in batch.parts:
            if part.holds_edits:
                own = part.edit_columns.sum(1)
                lengths[part.route] = own
                start[part.route] = begin + own.cumsum(0) - own
                begin += int(own.sum())
        joined = {name: torch.cat([each[name] for each in states if each]) for name in self.layers}
        return {
            layer_name: {
                name: EditKV(
                    *adapter.project_edit(joined[layer_name]), start, lengths, adapter.query_weights()
                )
                for name, adapter in layer.dualedit_adapter[self.adapter].items()
            }
            for layer_name, layer in self.layers.items()
        }

    # ------------------------------------------------------------------ choosing

    @torch.no_grad()
    def choose_way(self, batch: Batch) -> bool:
        """Set `partial` by whether the layers on their own reproduce the model on a batch; returns it."""
        self.partial = all(self._reproduced(part) for part in on_device(batch, self.base).parts)
        return self.partial

    def _reproduced(self, part: Part) -> bool:
        with framed(runtime_of(self.base), "masks", part.prompt), recording(self.base):
            wanted = self.base(**part.inputs, use_cache=False).logits
        try:
            layers = self.frozen.run(part).layers
        except CANNOT as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            return False
        return layers.reproduces(wanted, answer_positions(part.labels))

    @torch.no_grad()
    def same_answers(self, packed: Batch, plain: Batch) -> bool:
        """Whether the unedited model says the same to the packed questions of a batch as to each alone."""
        try:
            first, second = (self._answers(on_device(batch, self.base)) for batch in (packed, plain))
        except CANNOT as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            return False
        return set(first) == set(second) and all(close(first[n], second[n]) for n in first)

    def _answers(self, batch: Batch) -> dict[int, Tensor]:
        found = {}
        for part in batch.parts:
            with framed(runtime_of(self.base), "masks", part.prompt), recording(self.base):
                logits = self.base(**part.inputs, use_cache=False).logits[answer_positions(part.labels)]
            numbers = part.answer[part.answer >= 0]
            found |= {int(n): logits[numbers == n] for n in numbers.unique()}
        return found


def on_device(batch: Batch, base: nn.Module) -> Batch:
    """A batch where the model takes it."""
    device = base.get_input_embeddings().weight.device

    def moved(value: Tensor | None) -> Tensor | None:
        return None if value is None else value.to(device)

    parts = tuple(
        replace(
            part,
            inputs=to_device(part.inputs, base),
            prompt=Prompt(*(moved(value) for value in vars(part.prompt).values())),
            labels=moved(part.labels),
            answer=moved(part.answer),
            route=moved(part.route),
            edit_columns=moved(part.edit_columns),
        )
        for part in batch.parts
    )
    return Batch(parts, batch.terms.to(device), batch.edits)
