"""One edit adapter of a model, as everything that stores, finds or counts edits sees it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dualedit_kernels import nearest_key

from ..memory import MemoryGroup, Snapshot
from ..memory.routing import nearest_edit
from ..models.architectures import unwrap
from ..runtime.context import runtime_of
from ..runtime.frames import States
from ..runtime.recording import record_states
from ..runtime.sequence import Prompt
from .config import EditConfig
from .layer import EditLayer
from .method import EditMethod, Inputs, check_distances


@dataclass(frozen=True)
class EditAdapter:
    """An adapter of any editing method, with its stored edits.

    Attributes:
        base: the base model that it stands on.
        name: PEFT's name of the adapter.
        config: its settings.
        group: its stored edits.
    """

    base: nn.Module
    name: str
    config: EditConfig
    group: MemoryGroup

    @property
    def method(self) -> EditMethod:
        """What kind of edits it holds."""
        return self.config.method

    @property
    def metric(self) -> str:
        """Distance between keys: "l2" or "cosine"."""
        return self.method.metric(self.config)

    @property
    def layers(self) -> dict[str, EditLayer]:
        """The wrapped layers that hold its edits, by layer name."""
        layers = (module for module in self.base.modules() if isinstance(module, EditLayer))
        return {layer.layer_name: layer for layer in layers if self.group in layer.groups.values()}

    @property
    def gate_layer(self) -> EditLayer:
        """The wrapped layer that looks edits up."""
        return self.layers[self.group.gate_name]

    def stored(self) -> Snapshot:
        """Keys, radii and numbers of the stored edits as they are now."""
        return self.group.snapshot()[self.group.gate_name]

    def radii(self, stored: Snapshot) -> Tensor:
        """How far each of the stored edits reaches [N] float32, in the adapter's distance."""
        return self.method.radii(self.config, stored.tables["radius"])

    def key_of(self, states: States, prompt: Prompt) -> Tensor:
        """The routing keys [B, P] of recorded states."""
        layer = self.gate_layer
        with torch.no_grad():
            return layer.routing_key(self.name, states[layer.layer_name], prompt, states.mean_image)

    def keys_of(self, inputs: Inputs) -> Tensor:
        """The routing keys [B, P] of a batch of prompts. The layers above the gate do not run."""
        return self.key_of(*record_states(self.base, inputs, until=self.gate_layer))

    def nearest(self, query: Tensor) -> tuple[Snapshot, Tensor, Tensor]:
        """The stored edits, and the row [B] and distance [B] of the one nearest to each key [B, P]."""
        stored = self.stored()
        return (stored, *nearest_edit(query, stored, self.metric))

    def distances(self, key: Tensor, samples: Sequence[Inputs]) -> list[float]:
        """From an edit's key [1, P] to the keys of samples.

        Raises:
            ValueError: one of them is not finite.
        """
        if not samples:
            return []
        keys = torch.cat([self.keys_of(sample) for sample in samples]).float()
        everywhere = torch.full((1,), float("inf"), device=key.device)
        found = nearest_key(keys, key.float(), everywhere, self.metric)[1].tolist()
        check_distances(found)
        return found


def adapter_of(base: nn.Module, adapter_name: str) -> EditAdapter:
    """An edit adapter of a base model by its name. Raises KeyError for an unknown name."""
    config = base.peft_config[adapter_name]
    group = runtime_of(base).groups[(config.method.tuner_class.prefix, adapter_name)]
    return EditAdapter(base, adapter_name, config, group)


def active_adapter(model: nn.Module) -> EditAdapter:
    """The adapter that edits go to.

    Raises:
        ValueError: the model has no edit adapter, or several are active.
    """
    base = unwrap(model)
    runtime = runtime_of(base)
    layers = [module for module in base.modules() if isinstance(module, EditLayer)]
    off = frozenset() if runtime is None else runtime.switched_off()
    active = {n for layer in layers for n in layer.active_adapters if n in layer.configs}
    names = sorted(active - off)
    if runtime is None or not names:
        raise ValueError(
            f"{type(base).__name__} has no active edit adapter: call inject_dualedit(model, ...) or "
            f"inject_balancedit(model, layer=...) first."
        )
    if len(names) > 1:
        raise ValueError(
            f"Several edit adapters are active ({', '.join(names)}): choose one with "
            f"model.set_adapter(name), or switch the others off meanwhile: "
            f"with dualedit.disabled(model, {names[-1]!r}): ..."
        )
    return adapter_of(base, names[0])
