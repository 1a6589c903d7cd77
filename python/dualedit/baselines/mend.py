"""MEND (Mitchell et al., ICLR 2022): a network that makes an edit's change of the weights from its gradient.

At a linear layer the gradient of one edit is a sum of outer products of what the layer is given, u, and the
error at its output, d, one for each token. A network maps (u, d) to (u', d') for each token, and the weight
changes by -alpha times the mean of d' u'^T, alpha a learned rate for each layer: a short
cut for the one gradient step that would not do. Layers of one shape share a network, with a scale and shift
of their own; it starts as the identity. Departures: u and d are normalised by their mean and deviation over
the first training batches, and not further; the loss on new answers includes the edit's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..data import EditSample
from .hypernetwork import Gradient, HyperNetwork, gradients_of
from .lessons import Passed, lessons_of
from .network_settings import MENDSettings

_BATCHES, _EDITS = 8, 6  # of the normalisation


class _LowRankLayer(nn.Module):
    """x + ReLU((U V x + b) * scale + shift), scale and shift by the layer that is edited."""

    def __init__(self, width: int, rank: int, layers: int):
        super().__init__()
        rank = min(rank, width)
        self.u = nn.Parameter(torch.zeros(width, rank))
        self.v = nn.Parameter(torch.randn(rank, width) * width**-0.5)
        self.bias = nn.Parameter(torch.zeros(width))
        self.scale = nn.Parameter(torch.ones(layers, width))
        self.shift = nn.Parameter(torch.zeros(layers, width))

    def forward(self, x: Tensor, layer: int) -> Tensor:
        inner = (x @ self.v.T) @ self.u.T + self.bias
        # A clamp, whose gradient at zero is one: with u at zero a ReLU would never leave it.
        return x + (inner * self.scale[layer] + self.shift[layer]).clamp(min=0)


class GradientTransform(nn.Module):
    """(u, d) of each token to (u', d'), for layers of one shape.

    Args:
        inputs, outputs: I and O of the layers.
        layers: how many they are.
    """

    def __init__(self, inputs: int, outputs: int, rank: int, hidden: int, layers: int, rate: float):
        super().__init__()
        width = inputs + outputs
        self.split = (inputs, outputs)
        self.inner = nn.ModuleList(_LowRankLayer(width, rank, layers) for _ in range(hidden + 1))
        self.log_rate = nn.Parameter(torch.full((layers,), rate).log())
        self.register_buffer("mean", torch.zeros(layers, width))
        self.register_buffer("deviation", torch.ones(layers, width))

    def forward(self, gradient: Gradient, layer: int) -> tuple[Tensor, Tensor]:
        """u' [E, L, I] and -alpha d' [E, L, O]; zero where a token's gradient is."""
        both = torch.cat([gradient.inputs, gradient.errors], dim=-1)
        x = (both - self.mean[layer]) / (self.deviation[layer] + 1e-7)
        for inner in self.inner:
            x = inner(x, layer)
        live = (gradient.errors != 0).any(-1, keepdim=True)
        u, d = (x * live).split(self.split, dim=-1)
        return u, -self.log_rate[layer].exp() * d / live.sum(1, keepdim=True).clamp(min=1)


@dataclass
class _Factors:
    u: Tensor  # [E, L, I]
    d: Tensor  # [E, L, O]


class MEND(HyperNetwork):
    """One network for all layers of a shape."""

    name = "mend"
    settings: MENDSettings

    def _make(self, linears: Mapping[str, nn.Linear]) -> nn.Module:
        shapes: dict[str, list[str]] = {}
        for name, linear in linears.items():
            shapes.setdefault(f"{linear.in_features}x{linear.out_features}", []).append(name)
        self._place = {name: (shape, i) for shape, names in shapes.items() for i, name in enumerate(names)}
        settings = self.settings
        return nn.ModuleDict(
            {
                shape: GradientTransform(
                    linears[names[0]].in_features, linears[names[0]].out_features, settings.rank,
                    settings.hidden, len(names), settings.edit_rate,
                )
                for shape, names in shapes.items()
            }
        )  # fmt: skip

    def prepare(self, samples: Sequence[EditSample]) -> None:
        """Mean and deviation of u and d over the first edits."""
        found: dict[str, list[Tensor]] = {name: [] for name in self.names}
        generator = torch.Generator().manual_seed(self.settings.seed)
        for begin in range(0, min(len(samples), _BATCHES * _EDITS), _EDITS):
            lessons = lessons_of(samples[begin : begin + _EDITS], generator)
            gradients, _ = gradients_of(self.model, self.names, self._passed(*lessons.edits()))
            for name, gradient in gradients.items():
                live = (gradient.errors != 0).any(-1)
                found[name].append(torch.cat([gradient.inputs, gradient.errors], dim=-1)[live])
        for name, parts in found.items():
            shape, number = self._place[name]
            whole = torch.cat(parts)
            self.network[shape].mean[number] = whole.mean(0)
            self.network[shape].deviation[number] = whole.std(0)

    def _changes(self, passed: Passed, gradients: Mapping[str, Gradient]) -> dict[str, _Factors]:
        found = {}
        for name, gradient in gradients.items():
            shape, number = self._place[name]
            found[name] = _Factors(*self.network[shape](gradient, number))
        return found

    def _added(self, change: _Factors, inputs: Tensor, owner: Tensor) -> Tensor:
        return (inputs @ change.u[owner].transpose(1, 2)) @ change.d[owner]

    def _dense(self, change: _Factors) -> Tensor:
        return change.d[0].T @ change.u[0]
