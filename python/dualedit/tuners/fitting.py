"""Fitting one edit to its answer: the value of a BalancEdit edit, keys and values of a DualEdit one."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dualedit_kernels import Full, LowRank

from ..models.architectures import find_decoder_layers, unwrap
from ..runtime.context import bound, explicit_masks
from ..runtime.partial import Replay
from ..runtime.sequence import Prompt
from .config import BalancEditConfig, DualEditConfig
from .dualedit.modules import EditKV
from .layer import BalancEditLayer, DualEditLayer, place_of


def to_device(inputs: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """Inputs where the model takes them: on its device, floating ones in its dtype."""
    device, _ = place_of(model.get_input_embeddings())
    moved = {}
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            value = value.to(device)
            value = value.to(model.dtype) if value.is_floating_point() else value
            value = value.clone() if value.is_inference() else value  # autograd refuses those
        moved[name] = value
    return moved


def _new_value(layer: BalancEditLayer, config: BalancEditConfig) -> list[nn.Parameter]:
    device, _ = place_of(layer.base_layer)
    inputs, outputs = layer.base_layer.in_features, layer.base_layer.out_features
    if config.value == "full":
        weight = layer.base_layer.weight
        weight = weight.full_tensor() if isinstance(weight, DTensor) else weight
        if not weight.is_floating_point() or weight.shape != (outputs, inputs):
            raise ValueError(
                f"value='full': {layer.layer_name} is quantised ({weight.dtype}), so there is no whole "
                f"weight to copy. Use value='low_rank'."
            )
        if weight.device.type == "meta":
            raise ValueError(
                f"value='full': the weight of {layer.layer_name} is offloaded, so there is none to copy. Use "
                f"value='low_rank', or keep the layer in memory (device_map)."
            )
        return [nn.Parameter(weight.detach().float().clone())]
    # LoRA's start: a random way down, nothing comes back up. Seeded, so that the same edit gives the same
    # value.
    generator = torch.Generator().manual_seed(0)
    down = torch.randn(config.rank, inputs, generator=generator) / inputs**0.5
    return [nn.Parameter(down.to(device)), nn.Parameter(torch.zeros(outputs, config.rank, device=device))]


def _as_values(parts: list[nn.Parameter]) -> LowRank | Full:
    return Full(parts[0][None]) if len(parts) == 1 else LowRank(parts[0][None], parts[1][None])


@dataclass(frozen=True)
class Goal:
    """When fitting ends: after `steps` of Adam at `rate`, or with each target token at `probability`."""

    rate: float
    steps: int
    probability: float


def _descend(
    logits_of: Callable[[], Tensor], labels: Tensor, parts: list[Tensor], goal: Goal, stuck: str
) -> dict[str, Any]:
    """Fit parts in place until the target is the answer; {"steps", "probability"} of the last look.

    Args:
        logits_of: logits [1, L, V] as a function of the parts.
        labels: [1, L], -100 at all but the target's tokens.
        stuck: the error's text where no gradient comes back.
    """
    target = labels[:, 1:] != -100
    wanted = labels[:, 1:][target]
    optimizer = torch.optim.Adam(parts, lr=goal.rate)
    for step in range(goal.steps + 1):
        with torch.enable_grad():
            logits = logits_of()[:, :-1][target].float()
            loss = nn.functional.cross_entropy(logits, wanted)
        probability = least_probability(logits, wanted)
        if probability >= goal.probability or step == goal.steps:
            break
        # Not backward(): trainable parts of the model (an adapter beside this one) keep their gradients.
        gradients = torch.autograd.grad(loss, parts) if loss.requires_grad else ()
        if step == 0 and not any(bool(gradient.any()) for gradient in gradients):
            raise ValueError(stuck)
        for part, gradient in zip(parts, gradients, strict=True):
            part.grad = gradient
        optimizer.step()
    return {"steps": step, "probability": probability}


def least_probability(logits: Tensor, wanted: Tensor) -> float:
    """The smallest probability that logits [T, V] give the tokens wanted [T]."""
    return float(logits.detach().float().softmax(-1).gather(1, wanted[:, None]).min())


def _number_of(layer_name: str, base: nn.Module) -> int:
    return int(layer_name.removeprefix(find_decoder_layers(base)[0] + ".").split(".")[0])


def _warn_if_weak(fit: Mapping[str, Any], raise_what: str) -> None:
    if fit["probability"] < 0.5:
        warnings.warn(
            f"The edit did not take: after {fit['steps']} steps the least likely target token has "
            f"probability {fit['probability']:.2f}. Raise {raise_what}.",
            stacklevel=5,
        )


def fit_value(
    model: nn.Module, layer: BalancEditLayer, config: BalancEditConfig, inputs: Mapping[str, Tensor]
) -> tuple[list[Tensor], dict[str, Any]]:
    """Fine-tune the value of one edit by next-token loss on its target, from the edited layer upward.

    Args:
        inputs: from `append_target`; labels say which tokens are the target.

    Returns:
        the value's tensors (full weight, or down and up), and {"steps", "probability"} of the fit.

    Raises:
        ValueError: no gradient reaches the layer, or its weight cannot be copied for a full value.
    """
    base = unwrap(model)
    inputs = to_device(inputs, base)
    labels = inputs.pop("labels")
    parts = _new_value(layer, config)
    route = torch.zeros(1, dtype=torch.int64, device=labels.device)
    with bound(base, route, {}):
        replay = Replay(base, inputs, _number_of(layer.layer_name, base))

    def logits_of() -> Tensor:
        with bound(base, route, {layer.layer_name: _as_values(parts)}):
            return replay()

    goal = Goal(config.learning_rate, config.max_steps, config.stop_probability)
    fit = _descend(
        logits_of, labels, parts, goal,
        f"No gradient comes back to {layer.layer_name}: the layers above it pass none (4-bit weights on a "
        f"CPU do not). Store the edit on another device or precision, or use DualEdit.",
    )  # fmt: skip
    _warn_if_weak(fit, f"max_steps ({config.max_steps}) or learning_rate ({config.learning_rate})")
    return [part.detach() for part in parts], fit


def refine_edit(
    model: nn.Module,
    layers: Mapping[str, DualEditLayer],
    config: DualEditConfig,
    inputs: Mapping[str, Tensor],
    prompt: Prompt,
    rows: Mapping[str, Mapping[str, Tensor]],
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Run an edit's own question once with the edit written; where its answer is not the target, mend that.

    What is mended are the edit's own keys and values, by next-token loss on its target through the layers
    from the first edited one on; adapters and model stay as they are. Not in the paper, whose edits nobody
    checks: of those that adapters trained once have never seen, a few are not written.

    Args:
        layers: the wrapped layers by name.
        inputs: from `append_target`; labels say which tokens are the target.
        prompt: what is text and what image in them.
        rows: layer name to "k_text", "v_text", "k_vision", "v_vision" [T, M] of the edit.

    Returns:
        the rows in the same dtypes, and {"steps", "probability"}: of the least likely target token at the
        end.

    Raises:
        ValueError: no gradient comes back to the keys and values.
    """
    base = unwrap(model)
    inputs = to_device(inputs, base)
    labels = inputs.pop("labels")
    target = labels[:, 1:] != -100
    route = torch.zeros(1, dtype=torch.int64, device=labels.device)
    parts: dict[str, dict[str, Tensor]] = {}

    def as_stored() -> dict[str, dict[str, Tensor]]:
        return {
            place: {name: part.to(rows[place][name].dtype) for name, part in row.items()}
            for place, row in parts.items()
        }

    def edits() -> dict[str, dict[str, EditKV]]:
        return {place: _one_edit(row) for place, row in as_stored().items()}

    with explicit_masks(base, prompt.text, prompt.image):
        with torch.no_grad(), bound(base, route, {place: _one_edit(row) for place, row in rows.items()}):
            logits = base(**inputs, use_cache=False).logits[:, :-1][target]
        probability = least_probability(logits, labels[:, 1:][target])
        if probability >= config.refine_probability:
            return {place: dict(row) for place, row in rows.items()}, {"steps": 0, "probability": probability}
        for place, row in rows.items():
            parts[place] = {name: part.detach().float().requires_grad_(True) for name, part in row.items()}
        with bound(base, route, edits()):
            replay = Replay(base, inputs, min(_number_of(name, base) for name in layers))

        def logits_of() -> Tensor:
            with bound(base, route, edits()):
                return replay()

        leaves = [part for row in parts.values() for part in row.values()]
        goal = Goal(config.refine_rate, config.refine_steps, config.refine_probability)
        fit = _descend(
            logits_of, labels, leaves, goal,
            "No gradient comes back to the edit's keys and values: the layers above pass none (4-bit weights "
            "on a CPU do not). Store the edit on another device or precision, or set refine_steps=0.",
        )  # fmt: skip
    _warn_if_weak(fit, f"refine_steps ({config.refine_steps}) or refine_rate ({config.refine_rate})")
    found = as_stored()
    return {place: {n: part.detach() for n, part in row.items()} for place, row in found.items()}, fit


def _one_edit(row: Mapping[str, Tensor]) -> dict[str, EditKV]:
    """A single edit's keys and values by part, as a layer takes them."""
    return {
        name[2:]: EditKV(
            k, row[f"v_{name[2:]}"],
            torch.zeros(1, dtype=torch.int64, device=k.device),
            torch.tensor([k.shape[0]], device=k.device),
        )
        for name, k in row.items()
        if name.startswith("k_")
    }  # fmt: skip
