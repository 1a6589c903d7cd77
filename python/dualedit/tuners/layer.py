"""What every wrapped layer shares: base layer, the adapters' memories, and the decision for a sequence."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..memory import EditMemory, Fired, MemoryGroup, Snapshot
from ..memory.routing import Decision, nearest_edit
from ..memory.routing_keys import PooledKey
from ..runtime import compile as compiling
from ..runtime.context import EditRuntime
from ..runtime.frames import Record
from ..runtime.sequence import ForwardPass, Prompt
from .config import EditConfig

UNKNOWN_IMAGE = (
    "The image positions are unknown: this call passes embeddings instead of input_ids, or the model has no "
    "image token id. Pass input_ids (and image_token_ids=[...] to inject_dualedit), or state the positions "
    "with dualedit.explicit_masks(model, text, image)."
)
CANNOT_MERGE = (
    "Edits cannot be merged into the base weights: they apply only to the inputs that they match. "
    "Keep the adapter, or call unload() to drop the edits."
)


class EditLayer(nn.Module, BaseTunerLayer):
    """A layer of the base model with the adapters of one method on it.

    Attributes:
        layer_name: full name of the wrapped module in the base model.
        configs, groups: settings and stored edits of each adapter, by adapter name.
    """

    configs: dict[str, EditConfig]

    def __init__(self, base_layer: nn.Module, layer_name: str, runtime: EditRuntime):
        super().__init__()
        self.base_layer = base_layer
        self.layer_name = layer_name
        self.runtime = runtime
        self.handle = compiling.handle(self)
        self.configs = {}
        self.groups: dict[str, MemoryGroup] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        # A wrapper is born in train mode; gradient checkpointing and dropout below must not notice it.
        self.train(base_layer.training)

    def __getattr__(self, name: str) -> Any:
        # Model code reads attributes of its decoder layers (attention_type, layer_idx, in_features ...).
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer" or "base_layer" not in self.__dict__.get("_modules", {}):
                raise
            return getattr(self.base_layer, name)

    def __setstate__(self, state):
        super().__setstate__(state)
        self.handle = compiling.handle(self)  # a copy is another layer

    # ------------------------------------------------------------------ what a method's layer says

    @abstractmethod
    def edited(self, x: Tensor, base: Tensor) -> Tensor:
        """The base layer's output with the edits that apply written to it, or itself.

        Args:
            x: what the adapters read.
            base: the base layer's output.
        """

    @abstractmethod
    def routing_key(
        self, name: str, states: Tensor, prompt: Prompt, mean_image: Tensor | None = None
    ) -> Tensor:
        """The vectors [B, P] by which an adapter looks its inputs up.

        Args:
            name: of the adapter.
            states: [B, L, D], what the layer records.
            prompt: of these L columns.
            mean_image: [B, hidden size], the mean image token as it enters the decoder, for a pooled key.
        """

    @staticmethod
    @abstractmethod
    def stored_edits(snapshot: Snapshot | Fired) -> Any:
        """Edits in the form in which `bound` takes them: all stored ones, or those that answer a batch."""

    def router(self, name: str) -> nn.Module | None:
        """The trained part of an adapter's routing key; None: states themselves are the key."""
        return None

    def holds_gate(self, name: str) -> bool:
        """Whether an adapter looks its edits up at this layer."""
        return True

    # ------------------------------------------------------------------ PEFT's life cycle

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Not possible: an edit applies to some inputs only."""
        raise ValueError(CANNOT_MERGE)

    def unmerge(self) -> None:
        """Nothing is ever merged."""

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """An input-dependent edit has no low-rank weight difference."""
        return False

    def _add(self, adapter_name: str, config: EditConfig, memory: EditMemory, group: MemoryGroup) -> None:
        """Note a new adapter, whose modules are in place."""
        group.memories[self.layer_name] = memory
        self.configs[adapter_name] = config
        self.groups[adapter_name] = group
        for name in (*self.adapter_layer_names, *self.other_param_names):
            getattr(self, name).train(self.training)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Drop an adapter with its edits, whichever library asks for it."""
        super().delete_adapter(adapter_name)
        self.configs.pop(adapter_name, None)
        group = self.groups.pop(adapter_name, None)
        if group is None:
            return
        group.memories.pop(self.layer_name, None)
        if not group.memories:
            groups = self.runtime.groups
            for key in [key for key, known in groups.items() if known is group]:
                del groups[key]

    # ------------------------------------------------------------------ for a method's `edited`

    def _running(self) -> list[str]:
        """Names of the adapters that are on in this block of code."""
        if self.disable_adapters:
            return []
        off = self.runtime.switched_off()
        return [name for name in self.active_adapters if name in self.configs and name not in off]

    def _record(self, mode: Record, states: Tensor) -> None:
        mode.states[self.layer_name] = states
        forward = self.runtime.current_pass()
        if forward is not None and any(self.reads_image(name) for name in self.configs):
            mode.states.mean_image = forward.mean_image()

    def reads_image(self, name: str) -> bool:
        """Whether an adapter's key reads the image tokens where they enter the decoder."""
        return isinstance(self.router(name), PooledKey)

    def _mean_image(self, name: str, forward: ForwardPass) -> Tensor | None:
        if not self.reads_image(name):
            return None
        if forward.sequence.prompt.image is None and self.runtime.image_ids:
            raise ValueError(UNKNOWN_IMAGE)  # without the picture a pooled key would match no edit, silently
        return forward.mean_image()

    def _current_pass(self, name: str) -> ForwardPass | None:
        forward = self.runtime.current_pass()
        if forward is None and len(self.groups[name]):
            raise RuntimeError(
                f"{self.layer_name} ran outside a forward of its model, so the {len(self.groups[name])} "
                f"stored edits cannot tell whose input this is. Call the model itself, or disable the "
                f"adapter."
            )
        return forward

    def _decision(self, name: str, states: Tensor, forward: ForwardPass) -> Decision:
        """Which edit each row gets, as it was decided before or is decided now."""
        decision = forward.sequence.decisions.get(self.groups[name])
        return self._decide(name, states, forward) if decision is None else decision

    def _decide(self, name: str, states: Tensor, forward: ForwardPass) -> Decision:
        """Decide once for a sequence, from its prompt, at the gate's layer."""
        snapshots = self.groups[name].snapshot()
        stored = snapshots.get(self.layer_name)
        route = None
        # When the prompt went by with the adapter switched off, there is nothing to decide on.
        if self.holds_gate(name) and stored is not None and len(stored) and forward.in_prompt:
            route = self._route(name, states.detach(), forward, stored)
        decision = forward.sequence.decisions[self.groups[name]] = Decision(route, snapshots)
        return decision

    def _route(self, name: str, states: Tensor, forward: ForwardPass, stored: Snapshot) -> Tensor:
        config, prompt = self.configs[name], forward.prompt()
        query = self.routing_key(name, states, prompt, self._mean_image(name, forward))
        radius = config.method.radii(config, stored.tables["radius"])
        index, _ = nearest_edit(query, stored, config.method.metric(config), radius)
        # No prompt, no question, no edit.
        return torch.where(prompt.prompt().any(dim=1).to(index.device), index, -1)
