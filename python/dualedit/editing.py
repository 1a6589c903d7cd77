"""Storing one edit in a model's active adapter, from tensors alone: no processor, no text."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dualedit_kernels import nearest_key

from .memory import MemoryGroup, Snapshot
from .memory.routing import cosine_radius
from .models.architectures import target_token_type, unwrap
from .runtime.context import Prompt, recording, runtime_of
from .runtime.frames import States
from .tuners.config import BalancEditConfig, DualEditConfig
from .tuners.fitting import fit_value, refine_edit, to_device
from .tuners.layer import EditLayer
from .tuners.model import active_group

Inputs = Mapping[str, Tensor]
# Tensors over patches or over a Q-Former's own tokens, which may happen to be as long as the prompt.
_OTHER_SEQUENCES = ("input_ids", "pixel_", "qformer_")


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


def edit_layers(model: nn.Module, group: MemoryGroup) -> dict[str, EditLayer]:
    """The wrapped layers that hold a group's memories, by layer name."""
    layers = (module for module in unwrap(model).modules() if isinstance(module, EditLayer))
    return {layer.layer_name: layer for layer in layers if group in layer.groups.values()}


def append_target(inputs: Inputs, target_ids: Tensor, token_type: int = 0) -> dict[str, Tensor]:
    """The inputs of a prompt with the target's tokens behind it, and labels for them.

    Args:
        inputs: what a processor returns for one prompt; `input_ids` [1, P] without padding.
        target_ids: [T] or [1, T] int64.
        token_type: what marks the target's tokens in token types (`architectures.target_token_type`).

    Raises:
        ValueError: no input ids, more than one row, or an empty target.
    """
    ids = inputs.get("input_ids")
    if ids is None or ids.ndim != 2 or ids.shape[0] != 1:
        shape = None if ids is None else tuple(ids.shape)
        raise ValueError(f"inputs['input_ids'] has shape {shape}: pass one prompt of shape [1, P].")
    target = target_ids.reshape(1, -1).to(ids)
    if target.shape[1] == 0:
        raise ValueError("target_ids is empty: an edit needs an answer of at least one token.")
    full = dict(inputs)
    for name, value in inputs.items():
        if not isinstance(value, Tensor) or name.startswith(_OTHER_SEQUENCES):
            continue
        if value.shape == ids.shape:
            # The target is attended text: attention masks continue with 1, masks of pictures with 0.
            more = 1 if "attention" in name else token_type if name == "token_type_ids" else 0
            full[name] = torch.cat([value, torch.full_like(target, more).to(value)], dim=1)
        elif value.shape[:2] == ids.shape and "attention_mask" in name:
            # Which pictures each token sees (Mllama, Idefics): the target sees what the last token saw.
            full[name] = torch.cat([value, value[:, -1:].repeat_interleave(target.shape[1], 1)], dim=1)
    full["input_ids"] = torch.cat([ids, target], dim=1)
    full["labels"] = torch.cat([torch.full_like(ids, -100), target], dim=1)
    return full


def record_states(model: nn.Module, inputs: Inputs) -> tuple[States, Prompt]:
    """What the wrapped layers of the frozen model see of an input, by layer name, and its prompt."""
    base = unwrap(model)
    inputs = to_device(inputs, base)
    ids = inputs.get("input_ids")
    if ids is None:
        raise ValueError(
            f"inputs={sorted(inputs)}: input_ids are missing, so image and text cannot be told apart."
        )
    prompt = runtime_of(base).describe(inputs, tuple(ids.shape), ids.device)
    call = {name: value for name, value in inputs.items() if name != "labels"}
    with torch.no_grad(), recording(base) as states:
        base(**call, use_cache=False)
    return states, prompt


def _query(
    model: nn.Module, name: str, config: DualEditConfig | BalancEditConfig, states: States, prompt: Prompt
) -> Tensor:
    """The vector [B, D] (or [B, key_dim]) by which adapter `name` looks an input up."""
    group = active_group(model)[2]
    layer_name = _gate_layer(group)
    hidden, layer = states[layer_name], edit_layers(model, group)[layer_name]
    with torch.no_grad():
        if isinstance(config, BalancEditConfig):
            return layer.route_key(name, hidden, prompt.prompt(), prompt.last, states.pictured)
        last = prompt.last if config.gate == "prompt" else prompt.last_input
        return layer.route_key(name, hidden, prompt.text, prompt.image, last, states.pictured)


def _gate_layer(group: MemoryGroup) -> str:
    return next(name for name, memory in group.memories.items() if memory is group.first)


def _metric(config: DualEditConfig | BalancEditConfig) -> str:
    return config.metric if isinstance(config, BalancEditConfig) else "cosine"


def _radii(stored: Snapshot, config: DualEditConfig | BalancEditConfig) -> Tensor:
    radius = stored.tables["radius"]
    return radius.float() if isinstance(config, BalancEditConfig) else cosine_radius(radius, config.threshold)


def lookup_many(model: nn.Module, inputs: Inputs) -> list[Lookup]:
    """For each row of a batch, the stored edit nearest to it and whether it applies. No model is changed.

    Args:
        inputs: what a processor returns for a batch of prompts, padding masked.
    """
    name, config, group = active_group(model)
    nothing = Lookup(None, float("inf"), 0.0, False)
    if not len(group):
        return [nothing] * inputs["input_ids"].shape[0]
    query = _query(model, name, config, *record_states(model, inputs))
    stored = group.snapshot()[_gate_layer(group)]
    radius = _radii(stored, config)
    keys = stored.tables["key"]
    everywhere = torch.full_like(radius, float("inf"))
    metric = _metric(config)
    index, distance = nearest_key(query, keys, everywhere, metric, stored.codes(keys, metric))
    radii = radius.tolist()
    return [
        nothing if row < 0 else Lookup(stored.ids[row], far, radii[row], far <= radii[row])
        for row, far in zip(index.tolist(), distance.tolist(), strict=True)
    ]


def lookup(model: nn.Module, inputs: Inputs) -> Lookup:
    """The stored edit nearest to one input, and whether it applies. The model is not changed.

    Args:
        inputs: what a processor returns for one prompt.
    """
    return lookup_many(model, inputs)[0]


def edit_of(group: MemoryGroup, edit_id: int, config: DualEditConfig | BalancEditConfig) -> Edit:
    """A stored edit as it was noted. Raises KeyError for an unknown number."""
    row = group.first.row_of(edit_id)
    record = group.first.record(edit_id)
    return Edit(
        id=edit_id,
        prompt=record.get("prompt", ""),
        target=record.get("target", ""),
        radius=float(_radii(group.first.snapshot(), config)[row]),
        created=record.get("created", ""),
        seconds=record.get("seconds", 0.0),
        replaces=tuple(record.get("replaces", ())),
        probability=record.get("probability"),
    )


def _distances(key: Tensor, others: Sequence[Tensor], metric: str) -> list[float]:
    if not others:
        return []
    everywhere = torch.full((1,), float("inf"), device=key.device)
    distances = nearest_key(torch.cat(list(others)).float(), key.float(), everywhere, metric)[1].tolist()
    if not all(map(math.isfinite, distances)):
        raise ValueError(
            f"positives, negatives: the distances {distances} are not all finite, and a radius made of "
            f"them would open the edit to every input. The forward of a sample overflowed; run the model "
            "in bfloat16 or float32."
        )
    return distances


def _queries(model: nn.Module, name: str, config, samples: Sequence[Inputs]) -> list[Tensor]:
    return [_query(model, name, config, *record_states(model, sample)) for sample in samples]


def _own_radius(
    config: DualEditConfig | BalancEditConfig, positive: list[float], negative: list[float]
) -> float:
    """alpha d(positive) + (1 - alpha) d(negative), of the farthest positive and nearest negative sample."""
    if not positive or not negative:
        raise ValueError(
            f"positives ({len(positive)}) and negatives ({len(negative)}): the radius of an edit lies "
            f"between at least one of each. Pass a rephrased prompt and, for instance, the prompt "
            "with a black image."
        )
    far, near = max(positive), min(negative)
    # A negative sample stays outside whatever alpha is: the widest radius ends just before it.
    radius = min(config.alpha * far + (1 - config.alpha) * near, near * (1 - 1e-4))
    if far >= near:
        warnings.warn(
            f"The positive sample (distance {far:.4g}) is not nearer than the negative one ({near:.4g}); "
            f"the radius is clamped to {radius:.4g}. Rewordings of this edit may not be recognised: pass "
            "closer rephrases.",
            stacklevel=4,
        )
    return radius


def _dualedit_radius(config: DualEditConfig, positive: list[float], negative: list[float]) -> float:
    """NaN (the config's threshold), its own, or as far as given positives need and negatives allow."""
    if config.radius == "own":
        return _own_radius(config, positive, negative)
    if not positive and not negative:
        return float("nan")
    radius = max([1.0 - config.threshold, *positive])
    return min([radius, *(d * (1 - 1e-4) for d in negative)])


def _dualedit_rows(
    layers: dict[str, EditLayer], name: str, states: dict[str, Tensor], attended: Tensor
) -> dict[str, dict[str, Tensor]]:
    rows: dict[str, dict[str, Tensor]] = {}
    for layer_name, layer in layers.items():
        hidden = states[layer_name][0][attended]
        rows[layer_name] = {}
        for part, adapter in layer.dualedit_adapter[name].items():
            k, v = adapter.project_edit(hidden)
            rows[layer_name] |= {f"k_{part}": k.to(hidden.dtype), f"v_{part}": v.to(hidden.dtype)}
    return rows


def _check_image(group: MemoryGroup, prompt: Prompt) -> None:
    wants = any(
        table.endswith("_vision") for memory in group.memories.values() for table in memory.token_tables
    )
    if wants and prompt.image is None:
        raise ValueError(
            "The image positions of inputs are unknown: the model's config names no image token. State them "
            "with dualedit.explicit_masks(model, text, image), or pass image_token_ids=[...] to "
            "inject_dualedit."
        )
    if wants and not bool(prompt.image.any()):
        raise ValueError(
            "inputs hold no image: the edit's image is missing, and this adapter edits image positions. "
            "Pass the image to the processor together with a prompt that has its image placeholder."
        )


def _check_picture(states: States, prompt: Prompt) -> None:
    """Pictures that come in behind the first layer, over empty places, would leave a pooled key blind."""
    if states.pictured is None or prompt.image is None or not bool(prompt.image.any()):
        return
    if not bool(states.pictured.any()):
        raise ValueError(
            "The image tokens of this model are empty where they enter the decoder, so key='pooled' would "
            "not see the picture. Use key='last'."
        )


def _add_dualedit(model, name, config, group, inputs, full, positives, negatives):
    layers = edit_layers(model, group)
    with torch.no_grad():
        states, prompt = record_states(model, full)
        _check_image(group, prompt)
        _check_picture(states, prompt)
        gate = _gate_layer(group)
        mask = full.get("attention_mask")
        attended = torch.ones_like(prompt.text[0]) if mask is None else mask[0].to(prompt.text.device) != 0
        rows = _dualedit_rows(layers, name, states, attended)
        key = _query(model, name, config, states, prompt)
        distances = [
            _distances(key, _queries(model, name, config, samples), "cosine")
            for samples in (positives, negatives)
        ]
    fit: dict[str, Any] = {}
    if config.refine_steps:
        rows, fit = refine_edit(model, layers, config, full, prompt, rows)
    rows[gate] |= {"key": key[0], "radius": torch.tensor(_dualedit_radius(config, *distances))}
    return rows, key, fit


def _add_balancedit(model, name, config, group, inputs, full, positives, negatives):
    layer_name = _gate_layer(group)
    layer = edit_layers(model, group)[layer_name]
    states, prompt = record_states(model, inputs)
    _check_picture(states, prompt)
    key = _query(model, name, config, states, prompt)
    positive, negative = (
        _distances(key, _queries(model, name, config, samples), config.metric)
        for samples in (positives, negatives)
    )
    radius = _own_radius(config, positive, negative)
    parts, fit = fit_value(model, layer, config, full)
    fit |= {"d_positive": max(positive), "d_negative": min(negative)}
    names = ("weight",) if config.value == "full" else ("down", "up")
    rows = {"key": key[0], "radius": torch.tensor(radius), **dict(zip(names, parts, strict=True))}
    return {layer_name: rows}, key, fit


def _same_question(group: MemoryGroup, key: Tensor, metric: str) -> list[int]:
    """Stored edits with the very same key: another edit of the same image and question."""
    if not len(group):
        return []
    stored = group.first.snapshot()
    keys = stored.tables["key"]
    everywhere = torch.full((keys.shape[0],), float("inf"), device=keys.device)
    index, distance = nearest_key(key, keys, everywhere, metric, stored.codes(keys, metric))
    scale = float(key.float().norm()) if metric == "l2" else 1.0
    return [group.ids()[int(index[0])]] if float(distance[0]) <= 1e-6 * scale else []


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
    name, config, group = active_group(model)
    base = unwrap(model)
    full = append_target(inputs, target_ids, target_token_type(base))
    modes = [(module, module.training) for module in base.modules() if module.training]
    base.eval()  # dropout in the run that is stored would be stored with it
    try:
        method = _add_dualedit if isinstance(config, DualEditConfig) else _add_balancedit
        with torch.inference_mode(False):  # a value is fitted with gradients
            rows, key, fit = method(model, name, config, group, inputs, full, positives, negatives)
    finally:
        for module, mode in modes:
            module.training = mode
    old = _same_question(group, key, _metric(config))
    record = {
        **dict(note or {}),
        **fit,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "seconds": round(time.perf_counter() - began, 4),
        "replaces": [{"id": i, **group.first.record(i)} for i in old],
    }
    edit_id = group.add(
        {place: {t: r.detach() for t, r in row.items()} for place, row in rows.items()}, record
    )
    for replaced in old:
        group.remove(replaced)
    return edit_of(group, edit_id, config)


def remove_edit(model: nn.Module, edit_id: int) -> None:
    """Forget one edit of the active adapter. Raises KeyError for an unknown number."""
    active_group(model)[2].remove(edit_id)


def list_edits(model: nn.Module) -> list[Edit]:
    """The active adapter's edits, oldest first."""
    _, config, group = active_group(model)
    return [edit_of(group, edit_id, config) for edit_id in group.ids()]
