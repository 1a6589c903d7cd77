"""Storing one edit in a model's active adapter, from tensors alone: no processor, no text."""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass
from typing import Any, Mapping, Sequence

import torch
from torch import Tensor, nn

from dualedit_kernels import Full, LowRank, nearest_key

from .architectures import find_decoder_layers, unwrap
from .config import BalancEditConfig, DualEditConfig
from .context import Prompt, bound, describe_prompt, recording, runtime_of
from .layer import BalancEditLayer, EditLayer
from .memory import MemoryGroup, Snapshot
from .model import active_group
from .replay import Replay
from .routing import cosine_radius, last_state, pool_key

Inputs = Mapping[str, Tensor]


@dataclass(frozen=True)
class Edit:
    """A stored edit.

    Attributes:
        id: its number; never used again in this process.
        prompt, target: the question and the new answer, where they were given as text.
        radius: how far from its key it applies, in the adapter's distance (DualEdit: cosine distance).
        created: when it was stored, ISO 8601, UTC.
        seconds: what storing it took.
        replaces: edits of the same image and question that this one took the place of, as they were noted.
    """

    id: int
    prompt: str
    target: str
    radius: float
    created: str
    seconds: float
    replaces: tuple[dict, ...] = ()


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


def append_target(inputs: Inputs, target_ids: Tensor) -> dict[str, Tensor]:
    """The inputs of a prompt with the target's tokens behind it, and labels for them.

    Args:
        inputs: what a processor returns for one prompt; `input_ids` [1, P] without padding.
        target_ids: [T] or [1, T] int64.

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
        if isinstance(value, Tensor) and value.shape == ids.shape and name != "input_ids":
            # Masks continue with 1, token types with 0: the target is attended text.
            full[name] = torch.cat([value, torch.full_like(target, int("attention" in name)).to(value)], dim=1)
    full["input_ids"] = torch.cat([ids, target], dim=1)
    full["labels"] = torch.cat([torch.full_like(ids, -100), target], dim=1)
    return full


def _to_device(inputs: Inputs, model: nn.Module) -> dict[str, Any]:
    weight = model.get_input_embeddings().weight
    moved = {}
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            value = value.to(weight.device)
            value = value.to(model.dtype) if value.is_floating_point() else value
            value = value.clone() if value.is_inference() else value  # autograd refuses those
        moved[name] = value
    return moved


def record_states(model: nn.Module, inputs: Inputs) -> tuple[dict[str, Tensor], Prompt]:
    """What the wrapped layers of the frozen model see of an input, by layer name, and its prompt."""
    base = unwrap(model)
    inputs = _to_device(inputs, base)
    ids = inputs["input_ids"]
    prompt = describe_prompt(
        ids, inputs.get("attention_mask"), inputs.get("labels"), runtime_of(base).image_ids, tuple(ids.shape), ids.device
    )
    call = {name: value for name, value in inputs.items() if name != "labels"}
    with torch.no_grad(), recording(base) as states:
        base(**call, use_cache=False)
    return states, prompt


def _query(states: dict[str, Tensor], prompt: Prompt, layer_name: str, config: DualEditConfig | BalancEditConfig) -> Tensor:
    """The vector [B, D] by which an input is looked up."""
    hidden = states[layer_name]
    if isinstance(config, BalancEditConfig):
        return pool_key(hidden, config.key, prompt.prompt(), prompt.last)
    return last_state(hidden, prompt.last if config.gate == "prompt" else prompt.last_input)


def _gate_layer(group: MemoryGroup) -> str:
    return next(name for name, memory in group.memories.items() if memory is group.first)


def _metric(config: DualEditConfig | BalancEditConfig) -> str:
    return config.metric if isinstance(config, BalancEditConfig) else "cosine"


def _radii(stored: Snapshot, config: DualEditConfig | BalancEditConfig) -> Tensor:
    radius = stored.tables["radius"]
    return radius.float() if isinstance(config, BalancEditConfig) else cosine_radius(radius, config.threshold)


def lookup_many(model: nn.Module, inputs: Inputs) -> list[Lookup]:
    """For each row of a batch, the stored edit nearest to it and whether it applies. The model is not changed.

    Args:
        inputs: what a processor returns for a batch of prompts, padding masked.
    """
    _, config, group = active_group(model)
    nothing = Lookup(None, float("inf"), 0.0, False)
    if not len(group):
        return [nothing] * inputs["input_ids"].shape[0]
    states, prompt = record_states(model, inputs)
    query = _query(states, prompt, _gate_layer(group), config)
    stored = group.snapshot()[_gate_layer(group)]
    radius = _radii(stored, config)
    keys = stored.tables["key"].to(query.dtype)
    everywhere = torch.full_like(radius, float("inf"))
    index, distance = nearest_key(query, keys, everywhere, _metric(config))
    radii = radius.tolist()
    return [
        nothing if row < 0 else Lookup(stored.ids[row], far, radii[row], far <= radii[row])
        for row, far in zip(index.tolist(), distance.tolist())
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
    )


def _distances(key: Tensor, others: Sequence[Tensor], metric: str) -> list[float]:
    if not others:
        return []
    everywhere = torch.full((1,), float("inf"), device=key.device)
    return nearest_key(torch.cat(list(others)).float(), key.float(), everywhere, metric)[1].tolist()


def _queries(model: nn.Module, samples: Sequence[Inputs], layer: str, config) -> list[Tensor]:
    return [_query(*record_states(model, sample), layer, config) for sample in samples]


def _balancedit_radius(config: BalancEditConfig, positive: list[float], negative: list[float]) -> float:
    """alpha d(positive) + (1 - alpha) d(negative), for the farthest positive and the nearest negative sample."""
    if not positive or not negative:
        raise ValueError(
            f"positives ({len(positive)}) and negatives ({len(negative)}): BalancEdit sets the radius of an edit "
            f"between at least one of each. Pass a rephrased prompt and, for instance, the prompt with a black image."
        )
    far, near = max(positive), min(negative)
    radius = config.alpha * far + (1 - config.alpha) * near
    if far >= near:
        # Inside the negative sample by construction: the radius that still leaves it alone is just below it.
        radius = min(radius, near * (1 - 1e-4))
        warnings.warn(
            f"The positive sample (distance {far:.4g}) is not nearer than the negative one ({near:.4g}); the radius is "
            f"clamped to {radius:.4g}. Rewordings of this edit may not be recognised: pass closer rephrases.",
            stacklevel=4,
        )
    return radius


def _dualedit_radius(config: DualEditConfig, positive: list[float], negative: list[float]) -> float:
    """NaN (the config's threshold), or as far as given positives need and given negatives allow."""
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
    wants = any(table.endswith("_vision") for memory in group.memories.values() for table in memory.token_tables)
    if wants and (prompt.image is None or not bool(prompt.image.any())):
        raise ValueError(
            "inputs hold no image: the edit's image is missing, and this adapter edits image positions. Pass the "
            "image to the processor together with a prompt that has its image placeholder."
        )


def _add_dualedit(model, name, config, group, inputs, target_ids, positives, negatives):
    layers = edit_layers(model, group)
    full = append_target(inputs, target_ids)
    with torch.no_grad():
        states, prompt = record_states(model, full)
        _check_image(group, prompt)
        gate = _gate_layer(group)
        mask = full.get("attention_mask")
        attended = torch.ones_like(prompt.text[0]) if mask is None else mask[0].to(prompt.text.device) != 0
        rows = _dualedit_rows(layers, name, states, attended)
        key = _query(states, prompt, gate, config)
        distances = [
            _distances(key, _queries(model, samples, gate, config), "cosine") for samples in (positives, negatives)
        ]
    rows[gate] |= {"key": key[0], "radius": torch.tensor(_dualedit_radius(config, *distances))}
    return rows, key, {}


def _new_value(layer: BalancEditLayer, config: BalancEditConfig) -> list[nn.Parameter]:
    device = next(layer.base_layer.parameters()).device
    inputs, outputs = layer.base_layer.in_features, layer.base_layer.out_features
    if config.value == "full":
        weight = layer.base_layer.weight
        if not weight.is_floating_point() or weight.shape != (outputs, inputs):
            raise ValueError(
                f"value='full': {layer.layer_name} is quantised ({weight.dtype}), so there is no whole weight to copy. "
                f"Use value='low_rank'."
            )
        return [nn.Parameter(weight.detach().float().clone())]
    # LoRA's start: a random way down, nothing comes back up. Seeded, so that the same edit gives the same value.
    generator = torch.Generator().manual_seed(0)
    down = torch.randn(config.rank, inputs, generator=generator) / inputs**0.5
    return [nn.Parameter(down.to(device)), nn.Parameter(torch.zeros(outputs, config.rank, device=device))]


def _as_values(parts: list[nn.Parameter]) -> LowRank | Full:
    return Full(parts[0][None]) if len(parts) == 1 else LowRank(parts[0][None], parts[1][None])


def fit_value(
    model: nn.Module, layer: BalancEditLayer, config: BalancEditConfig, inputs: Inputs
) -> tuple[list[Tensor], dict[str, Any]]:
    """Fine-tune the value of one edit by next-token loss on its target, from the edited layer upward.

    Args:
        inputs: from `append_target`; labels say which tokens are the target.

    Returns:
        the value's tensors (full weight, or down and up), and {"steps", "probability"} of the fit.
    """
    base = unwrap(model)
    inputs = _to_device(inputs, base)
    labels = inputs.pop("labels")
    target = labels[:, 1:] != -100
    parts = _new_value(layer, config)
    optimizer = torch.optim.Adam(parts, lr=config.learning_rate)
    route = torch.zeros(1, dtype=torch.int64, device=labels.device)
    number = int(layer.layer_name.removeprefix(find_decoder_layers(base)[0] + ".").split(".")[0])
    with bound(base, route, {}):
        replay = Replay(base, inputs, number)
    for step in range(config.max_steps + 1):
        with torch.enable_grad(), bound(base, route, {layer.layer_name: _as_values(parts)}):
            logits = replay()[:, :-1][target].float()
            loss = nn.functional.cross_entropy(logits, labels[:, 1:][target])
        probability = float(logits.detach().softmax(-1).gather(1, labels[:, 1:][target][:, None]).min())
        if probability >= config.stop_probability or step == config.max_steps:
            break
        # Not backward(): trainable parts of the model (an adapter beside this one) keep their gradients.
        for part, gradient in zip(parts, torch.autograd.grad(loss, parts)):
            part.grad = gradient
        optimizer.step()
    if probability < 0.5:
        warnings.warn(
            f"The edit did not take: after {step} steps the least likely target token has probability "
            f"{probability:.2f}. Raise max_steps ({config.max_steps}) or learning_rate ({config.learning_rate}).",
            stacklevel=4,
        )
    return [part.detach() for part in parts], {"steps": step, "probability": probability}


def _add_balancedit(model, name, config, group, inputs, target_ids, positives, negatives):
    layer_name = _gate_layer(group)
    layer = edit_layers(model, group)[layer_name]
    key = _query(*record_states(model, inputs), layer_name, config)
    positive, negative = (
        _distances(key, _queries(model, samples, layer_name, config), config.metric) for samples in (positives, negatives)
    )
    radius = _balancedit_radius(config, positive, negative)
    parts, fit = fit_value(model, layer, config, append_target(inputs, target_ids))
    fit |= {"d_positive": max(positive), "d_negative": min(negative)}
    names = ("weight",) if config.value == "full" else ("down", "up")
    rows = {"key": key[0], "radius": torch.tensor(radius), **dict(zip(names, parts))}
    return {layer_name: rows}, key, fit


def _same_question(group: MemoryGroup, key: Tensor, metric: str) -> list[int]:
    """Stored edits with the very same key: another edit of the same image and question."""
    if not len(group):
        return []
    keys = group.first.snapshot().tables["key"].to(key.dtype)
    everywhere = torch.full((keys.shape[0],), float("inf"), device=keys.device)
    index, distance = nearest_key(key, keys, everywhere, metric)
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

    DualEdit runs the edit once through the frozen model and keeps its projected keys and values; BalancEdit fits
    a value at its layer. An edit with the very key of a stored one (same image and question) takes its place, and
    says so in `replaces`; any other overlap is left to the nearest key.

    Args:
        model: with an active edit adapter.
        inputs: what a processor returns for the prompt, `input_ids` [1, P], image included.
        target_ids: [T] int64, tokens of the new answer, as they follow the prompt.
        positives: inputs that must be recognised as this question (BalancEdit needs one).
        negatives: inputs that must not (BalancEdit needs one).
        note: kept with the edit; "prompt" and "target" are shown in lists.

    Raises:
        ValueError: no adapter, an empty target, a missing image, samples that are missing. Nothing is stored.
    """
    began = time.perf_counter()
    name, config, group = active_group(model)
    base = unwrap(model)
    modes = [(module, module.training) for module in base.modules() if module.training]
    base.eval()  # dropout in the run that is stored would be stored with it
    try:
        method = _add_dualedit if isinstance(config, DualEditConfig) else _add_balancedit
        with torch.inference_mode(False):  # a value is fitted with gradients
            rows, key, fit = method(model, name, config, group, inputs, target_ids, positives, negatives)
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
    edit_id = group.add({place: {t: r.detach() for t, r in row.items()} for place, row in rows.items()}, record)
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

