"""A start for the text adapter: it writes each token that it looks at, before any training.

The published adapters start with an output projection of zero. Nothing then tells the attention where to
look until the output projection has learned to turn states into words, thousands of steps later. But what it
has to learn is the same for every edit, to write the token that an edit's state stands for, and is a linear
map, which least squares finds in one pass over random tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..models.architectures import unwrap
from ..models.placement import to_device
from ..runtime.partial import PartialForward
from ..tuners.adapter import active_adapter

_ROWS = 128  # tokens that run together


@dataclass(frozen=True)
class Copying:
    """How well the map that an adapter starts with tells tokens apart that it was not fitted on.

    Attributes:
        tokens: how many it was fitted on; tested: how many others it was tried with.
        found: the share of those, in [0, 1], whose own direction is the nearest of all that were tried.
    """

    tokens: int
    tested: int
    found: float


@torch.no_grad()
def start_by_copying(
    model: nn.Module,
    prompt: Mapping[str, Tensor],
    tokens: int = 4000,
    strength: float = 2.0,
    shrinkage: float = 1e-3,
    seed: int = 0,
) -> Copying:
    """Set the value and output projections of the active adapter's text layer, in closed form.

    Random tokens of the vocabulary are put behind a prompt. The regression goes from their normalised states
    at the text layer to the direction in which the output head reads each of them, and its `mid_dim` largest
    singular directions are shared between the two projections. Query and key stay as they were.

    Args:
        model: from `inject_dualedit`, without stored edits.
        prompt: what a processor returns for one question without an image.
        tokens: how many random tokens; nine in ten are fitted on.
        strength: length of what is written where all attention is on one token, in lengths of the states that
            it is added to.
        shrinkage: share of the mean variance that is added to each direction.
        seed: of the choice of tokens.

    Raises:
        ValueError: the adapter has no text layer, or has edits; fewer tokens than 20.
    """
    adapter = active_adapter(model)
    parts = [
        (layer, layer.dualedit_adapter[adapter.name]["text"])
        for layer in adapter.layers.values()
        if "text" in layer.dualedit_adapter[adapter.name]
    ]
    if not parts:
        raise ValueError(f"adapter {adapter.name!r} edits no text positions: there is nothing to copy with.")
    if len(adapter.group):
        raise ValueError(f"model holds {len(adapter.group)} edits: set the start of an adapter without any.")
    if tokens < 20:
        raise ValueError(f"tokens={tokens}: pass at least 20.")
    layer, attention = parts[0]
    base = unwrap(model)
    inputs = to_device(prompt, base)
    number = int(layer.layer_name.rpartition(".")[2])
    drawn = _some_tokens(base, tokens, seed).to(inputs["input_ids"].device)
    states = _states_of(base, inputs, drawn, number)
    size, directions = _directions(base, inputs, drawn, number)

    norm = attention.edit_norm
    seen = nn.functional.layer_norm(states.float(), norm.normalized_shape, eps=norm.eps).double()
    fitted = len(drawn) * 9 // 10
    centre = seen[:fitted].mean(0)
    x, y = seen[:fitted] - centre, directions[:fitted].double()
    spread = x.T @ x
    spread += shrinkage * spread.trace() / len(spread) * torch.eye(len(spread)).to(spread)
    u, s, v = torch.linalg.svd(torch.linalg.solve(spread, x.T @ y).T)
    told = nn.functional.normalize((seen[fitted:] - centre) @ (u * s @ v).T, dim=1) @ directions.double().T
    own = torch.arange(fitted, len(drawn), device=told.device)
    found = float((told.argmax(1) == own).double().mean())

    rank = min(len(attention.v_proj.weight), len(s))
    root = s[:rank].sqrt()
    # A regression tells less than there is: what it writes is brought to the length that was asked for.
    length = ((x @ v[:rank].T * s[:rank]) @ u[:, :rank].T).norm(dim=1).mean()
    down = root[:, None] * v[:rank]
    attention.edit_norm.weight.fill_(1.0)
    attention.edit_norm.bias.zero_()
    attention.v_proj.weight[:rank] = down.to(attention.v_proj.weight)
    attention.v_proj.bias[:rank] = -(down @ centre).to(attention.v_proj.bias)
    attention.o_proj.weight.zero_()
    attention.o_proj.weight[:, :rank] = (u[:, :rank] * root * (strength * size / length)).to(
        attention.o_proj.weight
    )
    attention.o_proj.bias.zero_()
    return Copying(fitted, len(drawn) - fitted, found)


def _some_tokens(base: nn.Module, count: int, seed: int) -> Tensor:
    """Different tokens of the vocabulary [K], all of them where there are fewer."""
    known = base.get_input_embeddings().weight.shape[0]
    return torch.randperm(known, generator=torch.Generator().manual_seed(seed))[:count]


def _longer(inputs: Mapping[str, Any], tokens: Tensor) -> dict[str, Any]:
    """One prompt with each of some tokens [K] behind it."""
    ids = inputs["input_ids"].expand(len(tokens), -1)
    ids = torch.cat([ids, tokens[:, None]], 1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _states_of(base: nn.Module, inputs: Mapping[str, Any], tokens: Tensor, number: int) -> Tensor:
    """States [K, D] behind layer `number` of tokens [K], each as the last of the prompt."""
    found = []
    for some in tokens.split(_ROWS):
        run = PartialForward(base, _longer(inputs, some), number + 1, number + 1)
        found.append(run.states[:, -1])
    return torch.cat(found)


def _directions(
    base: nn.Module, inputs: Mapping[str, Any], tokens: Tensor, number: int
) -> tuple[Tensor, Tensor]:
    """The size of the prompt's last state behind layer `number`, and the unit directions [K, D] in which the
    head reads tokens [K]: the gradients of their logits, at the end of the prompt."""
    ids = inputs["input_ids"]
    prompt = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    size = PartialForward(base, prompt, number + 1, number + 1).states[0, -1].float().norm()
    run = PartialForward(base, prompt, number + 1)
    found = []
    for some in tokens.split(_ROWS):
        with torch.enable_grad():
            end = run.end[:, -1].expand(len(some), -1).detach().clone().requires_grad_()
            logits = run.head(end[None])[0]
            (gradient,) = torch.autograd.grad(logits.gather(1, some[:, None]).sum(), end)
        found.append(gradient.float())
    every = torch.cat(found)
    return size, nn.functional.normalize(every - every.mean(0), dim=1)
