"""Adding, listing, looking up and removing edits by tensors alone: no processor, no text, any method."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .memory.routing import nearest_edit
from .models.architectures import target_token_type
from .models.targets import append_target
from .tuners.adapter import EditAdapter, active_adapter
from .tuners.method import Inputs


@dataclass(frozen=True)
class Edit:
    """A stored edit.

    Attributes:
        id: its number; never used again in this process.
        prompt, target: the question and the new answer, where they were given as text.
        radius: how far from its key it applies, in the adapter's distance (DualEdit: cosine distance).
        created: when it was stored, ISO 8601, UTC.
        seconds: what storing it took.
        probability: what the edited model gave the least likely token of the target when the edit was stored;
            None where nobody asked (DualEdit without `refine_steps`).
        replaces: edits of the same image and question that this one took the place of, as they were noted.
    """

    id: int
    prompt: str
    target: str
    radius: float
    created: str
    seconds: float
    replaces: tuple[dict, ...] = ()
    probability: float | None = None


@dataclass(frozen=True)
class Lookup:
    """The stored edit nearest to an input.

    Attributes:
        edit_id: its number, or None when nothing is stored.
        distance: to its key; infinite when nothing is stored.
        radius: of that edit.
        fired: whether the input lies inside the radius, so that the edit applies.
    """

    edit_id: int | None
    distance: float
    radius: float
    fired: bool


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode: dropout in the run that is stored would be stored with it."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def lookup_many(model: nn.Module, inputs: Inputs) -> list[Lookup]:
    """For each row of a batch, the stored edit nearest to it and whether it applies. No model is changed.

    Args:
        inputs: what a processor returns for a batch of prompts, padding masked.
    """
    adapter = active_adapter(model)
    nothing = Lookup(None, float("inf"), 0.0, False)
    if not len(adapter.stored()):
        return [nothing] * inputs["input_ids"].shape[0]
    stored, index, distance = adapter.nearest(inputs)
    radii = adapter.radii(stored)[index.clamp(min=0)].tolist()
    return [
        nothing if row < 0 else Lookup(stored.id_of(row), far, radius, far <= radius)
        for row, far, radius in zip(index.tolist(), distance.tolist(), radii, strict=True)
    ]


def lookup(model: nn.Module, inputs: Inputs) -> Lookup:
    """The stored edit nearest to one input, and whether it applies. The model is not changed.

    Args:
        inputs: what a processor returns for one prompt.
    """
    return lookup_many(model, inputs)[0]


def edit_of(adapter: EditAdapter, edit_id: int) -> Edit:
    """A stored edit as it was noted. Raises KeyError for an unknown number."""
    stored = adapter.stored()
    return _as_edit(adapter, edit_id, float(adapter.radii(stored)[stored.row_of(edit_id)]))


def _as_edit(adapter: EditAdapter, edit_id: int, radius: float) -> Edit:
    record = adapter.group.first.record(edit_id)
    return Edit(
        id=edit_id,
        prompt=record.get("prompt", ""),
        target=record.get("target", ""),
        radius=radius,
        created=record.get("created", ""),
        seconds=record.get("seconds", 0.0),
        replaces=tuple(record.get("replaces", ())),
        probability=record.get("probability"),
    )


def _same_question(adapter: EditAdapter, key: Tensor) -> list[int]:
    """Stored edits with the very same key [1, P]: another edit of the same image and question."""
    stored = adapter.stored()
    if not len(stored):
        return []
    index, distance = nearest_edit(key, stored, adapter.metric)
    scale = float(key.float().norm()) if adapter.metric == "l2" else 1.0
    return [stored.id_of(int(index[0]))] if float(distance[0]) <= 1e-6 * scale else []


def add_edit(
    model: nn.Module,
    inputs: Inputs,
    target_ids: Tensor,
    positives: Sequence[Inputs] = (),
    negatives: Sequence[Inputs] = (),
    note: Mapping[str, Any] | None = None,
) -> Edit:
    """Store one edit in the model's active adapter.

    DualEdit runs the edit once through the frozen model and keeps its projected keys and values, with
    `refine_steps` mended where the edited model does not answer the edit's own question; BalancEdit fits a
    value at its layer. An edit with the very key of a stored one (same image and question) takes its
    place, and says so in `replaces`; any other overlap is left to the nearest key.

    Args:
        model: with an active edit adapter.
        inputs: what a processor returns for the prompt, `input_ids` [1, P], image included.
        target_ids: [T] int64, tokens of the new answer, as they follow the prompt.
        positives: inputs that must be recognised as this question (an own radius, and so BalancEdit, needs
            one).
        negatives: inputs that must not (likewise).
        note: kept with the edit; "prompt" and "target" are shown in lists.

    Raises:
        ValueError: no adapter, an empty target, a missing image, samples that are missing. Nothing is stored.
    """
    began = time.perf_counter()
    adapter = active_adapter(model)
    group = adapter.group
    full = append_target(inputs, target_ids, target_token_type(adapter.base))
    with _evaluating(adapter.base), torch.inference_mode(False):  # a value is fitted with gradients
        new = adapter.method.make_edit(adapter, inputs, full, positives, negatives)
    old = _same_question(adapter, new.key)
    record = {
        **dict(note or {}),
        **new.notes,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "seconds": round(time.perf_counter() - began, 4),
        "replaces": [{"id": i, **group.first.record(i)} for i in old],
    }
    rows = {place: {t: r.detach() for t, r in row.items()} for place, row in new.rows.items()}
    edit_id = group.add(rows, record)
    for replaced in old:
        group.remove(replaced)
    return edit_of(adapter, edit_id)


def remove_edit(model: nn.Module, edit_id: int) -> None:
    """Forget one edit of the active adapter. Raises KeyError for an unknown number."""
    active_adapter(model).group.remove(edit_id)


def list_edits(model: nn.Module) -> list[Edit]:
    """The active adapter's edits, oldest first."""
    adapter = active_adapter(model)
    stored = adapter.stored()
    radii = adapter.radii(stored).tolist()
    return [_as_edit(adapter, i, radius) for i, radius in zip(stored.ids, radii, strict=True)]
