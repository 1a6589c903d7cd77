"""Fitting the value of a BalancEdit edit: fine-tuning one linear layer on one answer."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dualedit_kernels import Full, LowRank

from .architectures import find_decoder_layers, unwrap
from .config import BalancEditConfig
from .context import bound
from .layer import BalancEditLayer
from .replay import Replay


def to_device(inputs: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """Inputs where the model takes them: on its device, floating ones in its dtype."""
    weight = model.get_input_embeddings().weight
    moved = {}
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            value = value.to(weight.device)
            value = value.to(model.dtype) if value.is_floating_point() else value
            value = value.clone() if value.is_inference() else value  # autograd refuses those
        moved[name] = value
    return moved


def _new_value(layer: BalancEditLayer, config: BalancEditConfig) -> list[nn.Parameter]:
    device = next(layer.base_layer.parameters()).device
    inputs, outputs = layer.base_layer.in_features, layer.base_layer.out_features
    if config.value == "full":
        weight = layer.base_layer.weight
        weight = weight.full_tensor() if isinstance(weight, DTensor) else weight
        if not weight.is_floating_point() or weight.shape != (outputs, inputs):
            raise ValueError(
                f"value='full': {layer.layer_name} is quantised ({weight.dtype}), so there is no whole "
                f"weight to copy. Use value='low_rank'."
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
        the value's tensors (full weight, or down and up), and {"steps", "probability"} of the fit.
    """
    base = unwrap(model)
    inputs = to_device(inputs, base)
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
        for part, gradient in zip(parts, torch.autograd.grad(loss, parts), strict=True):
            part.grad = gradient
        optimizer.step()
    if probability < 0.5:
        warnings.warn(
            f"The edit did not take: after {step} steps the least likely target token has probability "
            f"{probability:.2f}. Raise max_steps ({config.max_steps}) or learning_rate "
            f"({config.learning_rate}).",
            stacklevel=4,
        )
    return [part.detach() for part in parts], {"steps": step, "probability": probability}
