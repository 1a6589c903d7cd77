"""A decoder layer whose output DualEdit's adapters may write to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dualedit_kernels import Gate

from ...memory import EditMemory, Fired, MemoryGroup, Snapshot
from ...memory.routing import Decision, last_state
from ...memory.routing_keys import PooledKey
from ...models.placement import place_of
from ...runtime import compile as compiling
from ...runtime.context import EditRuntime
from ...runtime.frames import Bound, Record
from ...runtime.sequence import ForwardPass, Prompt
from ..layer import UNKNOWN_IMAGE, EditLayer
from .config import DualEditConfig
from .modules import EditCrossAttention, EditKV


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _with_first(output: Any, hidden: Tensor) -> Any:
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


@dataclass(frozen=True)
class Role:
    """What a decoder layer does for one adapter: edit text positions, image positions, hold the gate."""

    text: bool
    vision: bool
    gate: bool


class DualEditLayer(EditLayer):
    """A decoder layer whose output the adapters may write to.

    The edit is applied outside the base layer's `__call__`: inside it, gradient checkpointing would run the
    edit twice and, with two forwards before one backward, with the wrong state. transformers notes
    `output_hidden_states` inside it, so the entry of an edited layer shows what came before the edit; the
    entries of the layers above are computed from the edited states.
    """

    adapter_layer_names = ("dualedit_adapter", "dualedit_router")
    other_param_names = ("dualedit_memory",)

    def __init__(self, base_layer: nn.Module, layer_name: str, runtime: EditRuntime):
        super().__init__(base_layer, layer_name, runtime)
        self.dualedit_adapter = nn.ModuleDict()
        # Pooled routing keys, for the adapters that have one, at the layer that holds their gate.
        self.dualedit_router = nn.ModuleDict()
        self.dualedit_memory = nn.ModuleDict()
        self.roles: dict[str, Role] = {}

    def update_layer(
        self, adapter_name: str, config: DualEditConfig, role: Role, hidden_size: int, group: MemoryGroup
    ) -> None:
        """Add an adapter: its cross-attentions and an empty memory."""
        device, dtype = place_of(self.base_layer)
        parts = [name for name, wanted in (("text", role.text), ("vision", role.vision)) if wanted]
        adapters = nn.ModuleDict(
            {
                part: EditCrossAttention(
                    hidden_size, config.mid_dim, config.num_heads, config.norm_eps, config.init_weights
                )
                for part in parts
            }
        )
        router = PooledKey(hidden_size, config.key_dim) if config.key == "pooled" else None
        if next(adapters.parameters()).device.type != "meta":
            for made in (adapters, router):
                if made is not None:
                    made.to(device=device, dtype=dtype)
        self.dualedit_adapter[adapter_name] = adapters
        if role.gate and router is not None:
            self.dualedit_router[adapter_name] = router
        tokens = {f"{kind}_{part}": config.mid_dim for part in parts for kind in ("k", "v")}
        width = hidden_size if router is None else config.key_dim
        keys = {"key": (width,), "radius": ()} if role.gate else {}
        memory = EditMemory(keys, tokens, device=device, dtype=dtype, kind=config.kv_dtype)
        self.dualedit_memory[adapter_name] = memory
        self.roles[adapter_name] = role
        self._add(adapter_name, config, memory, group)

    def delete_adapter(self, adapter_name: str) -> None:
        """Drop an adapter with its edits."""
        self.roles.pop(adapter_name, None)
        super().delete_adapter(adapter_name)

    def forward(self, *args, **kwargs):
        output = self.base_layer(*args, **kwargs)
        hidden = _first(output)
        if compiling.tracing():
            return _with_first(output, compiling.trace_edit(self.handle, hidden, hidden))
        edited = self.edited(hidden, hidden)
        return output if edited is hidden else _with_first(output, edited)

    def edited(self, x: Tensor, base: Tensor) -> Tensor:
        """The base layer's output [B, L, D] with the edits that apply written to it, or itself."""
        mode = self.runtime.mode()
        if isinstance(mode, Record):
            self._record(mode, base)
            return base
        for name in self._running():
            base = self._edit(base, name, mode)
        return base

    def _edit(self, hidden: Tensor, name: str, bound: Bound | None) -> Tensor:
        edits = None if bound is None else bound.edits.get(self.layer_name)
        if bound is not None and edits is None:
            return hidden
        forward = self._current_pass(name)
        if forward is None or not forward.in_prompt:
            return hidden
        if bound is not None:
            return self._write(hidden, name, forward, edits, route=bound.route)[0]
        if self._decides_while_writing(name, forward):
            return self._decide_and_write(hidden, name, forward)
        decision = self._decision(name, hidden, forward)
        if decision.nothing:
            return hidden
        return self._write_fired(hidden, name, forward, decision)

    def _write_fired(self, hidden: Tensor, name: str, forward: ForwardPass, decision: Decision) -> Tensor:
        fired = decision.fired(self.layer_name)
        return self._write(hidden, name, forward, self.stored_edits(fired), route=fired.route)[0]

    def _decides_while_writing(self, name: str, forward: ForwardPass) -> bool:
        """Whether the text adapter is to decide the gate itself: the key is the very state that it edits."""
        role, prompt, group = self.roles[name], forward.sequence.prompt, self.groups[name]
        if not (role.gate and role.text) or self.router(name) is not None or not len(group):
            return False
        # Where positions are unknown, an error is due only if an edit fires: it is looked up first.
        known = prompt.image is not None or not (self.runtime.image_ids or role.vision)
        return known and group not in forward.sequence.decisions

    def _decide_and_write(self, hidden: Tensor, name: str, forward: ForwardPass) -> Tensor:
        config, prompt, group = self.configs[name], forward.prompt(), self.groups[name]
        snapshots = group.snapshot()
        stored = snapshots[self.layer_name]
        if not stored.whole:  # an operator cannot decide by tables that are not in one piece
            decision = self._decide(name, hidden, forward)
            return hidden if decision.nothing else self._write_fired(hidden, name, forward, decision)
        last = (prompt.last if config.gate == "prompt" else prompt.last_input).to(hidden.device)
        radius, metric = config.method.radii(config, stored.tables["radius"]), config.method.metric(config)
        keys = stored.tables.kept["key"]
        gate = Gate(last, keys, radius, metric, stored.codes(keys, metric))
        hidden, route = self._write(hidden, name, forward, self.stored_edits(stored), gate=gate)
        # No prompt, no question, no edit; nor has anything been written, without a token to write to.
        route = torch.where(prompt.prompt().any(dim=1).to(route.device), route, -1)
        forward.sequence.decisions[group] = Decision(route, snapshots)
        return hidden

    def _write(
        self,
        hidden: Tensor,
        name: str,
        forward: ForwardPass,
        edits: Mapping[str, EditKV],
        route: Tensor | None = None,
        gate: Gate | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(edited states, route [B]): the route that is given, or that the first adapter decides by gate."""
        if route is not None:
            route = forward.decision_rows(route).to(hidden.device)
        prompt = forward.sequence.prompt
        for part, adapter in self.dualedit_adapter[name].items():
            mask = prompt.text if part == "text" else prompt.image
            if mask is None or (prompt.image is None and self.runtime.image_ids):
                raise ValueError(UNKNOWN_IMAGE)
            span = forward.columns(mask).to(hidden.device)
            hidden, route = adapter(hidden, span, edits[part], route, gate if route is None else None)
        return hidden, route

    def holds_gate(self, name: str) -> bool:
        """Whether an adapter looks its edits up at this layer: at the earlier one of its two."""
        return self.roles[name].gate

    def router(self, name: str) -> nn.Module | None:
        """The pooled key of an adapter, where it has one."""
        return self.dualedit_router[name] if name in self.dualedit_router else None

    def routing_key(
        self, name: str, states: Tensor, prompt: Prompt, mean_image: Tensor | None = None
    ) -> Tensor:
        """The state of the last prompt token [B, D] (gate="published": of the last input token), or the
        pooled key [B, key_dim] made of it."""
        last = prompt.last if self.configs[name].gate == "prompt" else prompt.last_input
        state, router = last_state(states, last), self.router(name)
        return state if router is None else router(state, mean_image)

    @staticmethod
    def stored_edits(snapshot: Snapshot | Fired) -> dict[str, EditKV]:
        """Keys and values of edits by part ("text", "vision")."""
        tables = snapshot.tables
        return {
            name[2:]: EditKV(tables[name], tables[f"v_{name[2:]}"], snapshot.start, snapshot.length)
            for name in tables
            if name.startswith("k_")
        }
