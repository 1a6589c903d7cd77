"""How DualEdit stores an edit: its hidden states, projected to keys and values at the edited layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...memory.routing import cosine_radius
from ...memory.tables import NO_RADIUS
from ...runtime.recording import record_states
from ...runtime.sequence import Prompt
from ..adapter import EditAdapter
from ..method import EditMethod, Inputs, NewEdit, check_mean_image, radius_between
from .config import DualEditConfig
from .layer import DualEditLayer
from .model import DualEditModel
from .refine import refine_edit
from .tokens import keep_most_read


class DualEditMethod(EditMethod):
    """DualEdit (COLM 2025): one forward of the frozen model makes an edit; one threshold opens its gate."""

    name = "dualedit"
    title = "DualEdit"
    paper = "https://arxiv.org/abs/2506.13638"
    config_class = DualEditConfig
    tuner_class = DualEditModel
    trains_adapters = True
    one_threshold = True
    asks_other_questions = True

    def metric(self, config: DualEditConfig) -> str:
        return "cosine"

    def radii(self, config: DualEditConfig, stored: Tensor) -> Tensor:
        return cosine_radius(stored, config.threshold)

    def needs_image(self, config: DualEditConfig) -> bool:
        return config.vis_layer is not None

    def needs_samples(self, config: DualEditConfig) -> bool:
        return config.radius == "own"

    def radius(self, config: DualEditConfig, positive: Sequence[float], negative: Sequence[float]) -> float:
        """`NO_RADIUS` (the config's threshold), its own, or as far as positives need and negatives allow."""
        if config.radius == "own":
            return radius_between(config.alpha, positive, negative)
        if not positive and not negative:
            return NO_RADIUS
        radius = max([1.0 - config.threshold, *positive])
        return max(0.0, min([radius, *(d * (1 - 1e-4) for d in negative)]))

    def make_edit(
        self, adapter: EditAdapter, inputs: Inputs, full: Inputs, positives: Sequence[Inputs],
        negatives: Sequence[Inputs],
    ) -> NewEdit:  # fmt: skip
        layers, config = adapter.layers, adapter.config
        with torch.no_grad():
            # In the model's order: behind the last of them nothing is needed.
            states, prompt = record_states(adapter.base, full, until=list(layers.values())[-1])
            _check_image(layers, adapter.name, prompt)
            check_mean_image(states, prompt)
            mask = full.get("attention_mask")
            everything = torch.ones_like(prompt.text[0])
            attended = everything if mask is None else mask[0].to(everything.device) != 0
            rows = _project(layers, adapter.name, states, attended)
            if config.image_mass < 1 and prompt.image is not None:
                _drop_seldom_read(layers, adapter, states, prompt, attended, rows)
            key = adapter.key_of(states, prompt)
            positive, negative = (adapter.distances(key, samples) for samples in (positives, negatives))
        notes: dict[str, Any] = {}
        if config.refine_steps and self.untrained(adapter) is None:
            rows, notes = refine_edit(adapter.base, layers, config, full, prompt, rows)
        radius = torch.tensor(self.radius(config, positive, negative))
        rows[adapter.gate_layer.layer_name] |= {"key": key[0], "radius": radius}
        return NewEdit(rows, key, notes)


    def untrained(self, adapter: EditAdapter) -> str | None:
        for layer in adapter.layers.values():
            for part in layer.dualedit_adapter[adapter.name].values():
                if any(bool(p.any()) for p in part.o_proj.parameters()):
                    return None
        return (
            f"the adapters {adapter.name!r} are not trained (their output projections are zero), so they "
            f"write "
            "nothing. Train them (dualedit train), load trained ones (load_edits, or inject_dualedit with "
            "adapter=folder), or use BalancEdit, which needs no training"
        )

    def advice(self, config: DualEditConfig) -> str:
        more = "refine_steps=200" if not config.refine_steps else "more refine_steps, a higher refine_rate"
        return (
            f"Try {more}, a shorter answer, or a BalancEdit adapter for what this one cannot write "
            "(Editor(..., fallback=...))."
        )


def _project(
    layers: Mapping[str, DualEditLayer], name: str, states: Mapping[str, Tensor], attended: Tensor
) -> dict[str, dict[str, Tensor]]:
    """Keys and values of an edit's tokens, by layer and table.

    Args:
        states: layer name to hidden states [1, L, D].
        attended: [L] bool, False at padding.
    """
    rows: dict[str, dict[str, Tensor]] = {}
    for layer_name, layer in layers.items():
        hidden = states[layer_name][0][attended]
        rows[layer_name] = {}
        for part, adapter in layer.dualedit_adapter[name].items():
            k, v = adapter.project_edit(hidden)
            rows[layer_name] |= {f"k_{part}": k.to(hidden.dtype), f"v_{part}": v.to(hidden.dtype)}
    return rows


def _drop_seldom_read(
    layers: Mapping[str, DualEditLayer], adapter: EditAdapter, states: Mapping[str, Tensor], prompt: Prompt,
    attended: Tensor, rows: dict[str, dict[str, Tensor]],
) -> None:  # fmt: skip
    """Leave out the image tokens that the edit's own question hardly reads, at each layer."""
    assert prompt.image is not None
    positions = {"text": prompt.text[0], "vision": prompt.image[0]}
    for name, layer in layers.items():
        rows[name] = keep_most_read(
            dict(layer.dualedit_adapter[adapter.name].items()), rows[name], states[name][0], positions,
            prompt.image[0].to(attended.device)[attended], adapter.config.image_mass,
        )  # fmt: skip


def _check_image(layers: Mapping[str, DualEditLayer], name: str, prompt: Prompt) -> None:
    if not any(layer.roles[name].vision for layer in layers.values()):
        return
    if prompt.image is None:
        raise ValueError(
            "The image positions of inputs are unknown: the model's config names no image token. State them "
            "with dualedit.explicit_masks(model, text, image), or pass image_token_ids=[...] to "
            "inject_dualedit."
        )
    if not bool(prompt.image.any()):
        raise ValueError(
            "inputs hold no image: the edit's image is missing, and this adapter edits image positions. "
            "Pass the image to the processor together with a prompt that has its image placeholder."
        )
