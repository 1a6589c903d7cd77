"""Finding the modules that a baseline works on, by name or by default."""

from __future__ import annotations

import difflib

from torch import nn

from ..models.architectures import find_decoder_layers, resolve_layer


def named_module(model: nn.Module, name: str, argument: str = "module") -> str:
    """The full name of a module from its name or an unambiguous end of it. Raises ValueError."""
    names = [full for full, _ in model.named_modules() if full]
    if name in names:
        return name
    ends = [full for full in names if full.endswith("." + name)]
    if len(ends) == 1:
        return ends[0]
    if ends:
        listed = ", ".join(ends[:6])
        raise ValueError(f"{argument}={name!r} is ambiguous: it matches {listed}. Pass one full name.")
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.3) or names[-3:]
    raise ValueError(f"{argument}={name!r}: no such module. Nearest: {', '.join(near)}.")


def decoder_layer(model: nn.Module, layer: int | str | None, share: float) -> int:
    """Number of a decoder layer; None takes the one at a share of the depth. Raises ValueError."""
    path, layers = find_decoder_layers(model)
    chosen = min(int(share * len(layers)), len(layers) - 1) if layer is None else layer
    return int(resolve_layer(model, chosen, "layer").removeprefix(path + "."))


def layer_number(model: nn.Module, name: str, argument: str = "module") -> int:
    """Number of the decoder layer that a module lies in. Raises ValueError for one outside the decoder."""
    path, _ = find_decoder_layers(model)
    if not name.startswith(path + "."):
        raise ValueError(f"{argument}={name!r} is not in the decoder ({path}.*): pass a module of it.")
    return int(name.removeprefix(path + ".").split(".")[0])


def linear_module(model: nn.Module, name: str, argument: str = "module") -> str:
    """The full name of a linear layer with plain weights in the decoder.

    Raises:
        ValueError: no such module, one outside the decoder, or one whose weight is no plain matrix.
    """
    full = named_module(model, name, argument)
    layer_number(model, full, argument)
    module = model.get_submodule(full)
    weight = getattr(module, "weight", None)
    if not isinstance(module, nn.Linear) or not weight.is_floating_point():
        kind = type(module).__name__
        raise ValueError(
            f"{argument}={name!r} is a {kind}: this method needs a torch.nn.Linear with floating weights. "
            f"Pass one (as layers.7.mlp.down_proj), of a model that is not quantised."
        )
    return full


def last_linear(model: nn.Module, number: int) -> str:
    """The full name of a decoder layer's last linear layer: where its feed-forward part writes.

    Raises:
        ValueError: the layer has no `torch.nn.Linear`.
    """
    path, layers = find_decoder_layers(model)
    names = [name for name, module in layers[number].named_modules() if isinstance(module, nn.Linear)]
    if not names:
        kinds = sorted({type(module).__name__ for module in layers[number].modules()})
        raise ValueError(
            f"layer {number} has no torch.nn.Linear (it has {', '.join(kinds)}): load the model without "
            f"quantisation, or pass a module that this method takes."
        )
    return f"{path}.{number}.{names[-1]}"


def feed_forward(model: nn.Module, number: int) -> str:
    """The full name of a decoder layer's feed-forward part, states in and states out.

    Raises:
        ValueError: it is no module of its own.
    """
    path, _ = find_decoder_layers(model)
    inside = last_linear(model, number).removeprefix(f"{path}.{number}.")
    if "." not in inside:
        raise ValueError(
            f"layer {number}: its feed-forward part is no module of its own, {inside} lies in the layer "
            f"itself. Pass module=NAME of one that maps hidden states to hidden states."
        )
    return f"{path}.{number}.{inside.rpartition('.')[0]}"
