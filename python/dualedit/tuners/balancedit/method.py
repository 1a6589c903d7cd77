"""How BalancEdit stores an edit: a key, a radius of its own, and a weight fitted at one linear layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dualedit_kernels import Full, LowRank

from ...models.architectures import unwrap
from ...models.placement import place_of, to_device
from ...runtime.context import bound
from ...runtime.partial import Replay
from ...runtime.recording import record_states
from ...runtime.sequence import Prompt
from ..adapter import EditAdapter
from ..fitting import Goal, fit_to_answer, layer_number, why_no_gradient
from ..method import EditMethod, Inputs, NewEdit, check_mean_image
from .config import BalancEditConfig
from .layer import BalancEditLayer, codebook_key
from .model import BalancEditModel

# Of the states that a value reads, where it is hard to fit: as far as other pictures of a thing are apart.
_NOISE = 0.2


class BalancEditMethod(EditMethod):
    """BalancEdit (ICML 2025): nearest key, its own radius, its own weight."""

    name = "balancedit"
    title = "BalancEdit"
    paper = "https://arxiv.org/abs/2505.01343"
    config_class = BalancEditConfig
    tuner_class = BalancEditModel

    def metric(self, config: BalancEditConfig) -> str:
        return config.metric

    def radius(
        self, config: BalancEditConfig, positive: Sequence[float], negative: Sequence[float]
    ) -> float:
        own = super().radius(config, positive, negative)
        return own if config.max_radius is None else min(own, config.max_radius)

    def make_edit(
        self, adapter: EditAdapter, inputs: Inputs, full: Inputs, positives: Sequence[Inputs],
        negatives: Sequence[Inputs],
    ) -> NewEdit:  # fmt: skip
        layer, config = adapter.gate_layer, adapter.config
        states, prompt = record_states(adapter.base, inputs, until=layer)
        check_mean_image(states, prompt)
        key = adapter.key_of(states, prompt)
        positive, negative = (adapter.distances(key, samples) for samples in (positives, negatives))
        radius = self.radius(config, positive, negative)
        parts, fit = fit_value(adapter.base, layer, config, full)
        names = ("weight",) if config.value == "full" else ("down", "up")
        rows = {"key": key[0], "radius": torch.tensor(radius), **dict(zip(names, parts, strict=True))}
        notes = {**fit, "d_positive": max(positive), "d_negative": min(negative)}
        return NewEdit({layer.layer_name: rows}, key, notes)

    def advice(self, config: BalancEditConfig) -> str:
        return (
            f"Try more max_steps ({config.max_steps}), another learning_rate ({config.learning_rate}), a "
            f"higher "
            f"rank ({config.rank}), another layer, or a shorter answer."
        )

    def published_key(self, config: BalancEditConfig, hidden: Tensor, prompt: Prompt) -> Tensor:
        # As published: a pooled key's picture is not part of it.
        return codebook_key("last" if config.key == "pooled" else config.key, hidden, prompt)


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


def fit_value(
    model: nn.Module, layer: BalancEditLayer, config: BalancEditConfig, inputs: Mapping[str, Tensor]
) -> tuple[list[Tensor], dict[str, Any]]:
    """Fine-tune the value of one edit by next-token loss on its target, from the edited layer upward.

    Args:
        inputs: from `append_target`; labels say which tokens are the target.

    Returns:
        the value's tensors (full weight, or down and up), and what `fit_to_answer` returns.

    Raises:
        ValueError: no gradient reaches the layer, or its weight cannot be copied for a full value.
    """
    base = unwrap(model)
    inputs = to_device(inputs, base)
    labels = inputs.pop("labels")
    parts = _new_value(layer, config)
    route = torch.zeros(1, dtype=torch.int64, device=labels.device)
    with bound(base, route, {}):
        replay = Replay(base, inputs, layer_number(layer.layer_name, base))

    def logits_of() -> Tensor:
        with bound(base, route, {layer.layer_name: _as_values(parts)}):
            return replay()

    generator = torch.Generator().manual_seed(0)

    def harder() -> Tensor:
        noise = _NOISE * torch.randn(replay.shape, generator=generator)
        with bound(base, route, {layer.layer_name: _as_values(parts)}):
            return replay(noise)

    goal = Goal(config.learning_rate, config.max_steps, config.stop_probability)
    fit = fit_to_answer(
        logits_of, labels, parts, goal,
        f"No gradient comes back to {layer.layer_name}: {why_no_gradient(base)}",
        harder,
    )  # fmt: skip
    return [part.detach() for part in parts], fit
