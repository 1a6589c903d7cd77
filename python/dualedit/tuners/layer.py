"""The wrapped layers: a decoder layer with DualEdit's adapters, a linear layer with BalancEdit's codebook."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from dualedit_kernels import Full, LowRank, nearest_key, routed_linear

from ..memory import EditMemory, MemoryGroup, Snapshot
from ..memory.routing import Decision, cosine_radius, last_state, pool_key, route_codebook
from ..memory.routing_keys import PooledKey, RoutingKey
from ..runtime import compile as compiling
from ..runtime.context import Bound, EditRuntime, ForwardPass, Record
from .config import BalancEditConfig, DualEditConfig, EditConfig
from .dualedit.modules import EditCrossAttention, EditKV

_UNKNOWN = (
    "The image positions are unknown: this call passes embeddings instead of input_ids, or the model has no "
    "image token id. Pass input_ids (and image_token_ids=[...] to inject_dualedit), or state the positions "
    "with dualedit.explicit_masks(model, text, image)."
)


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _with_first(output: Any, hidden: Tensor) -> Any:
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def place_of(module: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Device that a module computes on and floating dtype of its weights.

    Weights that accelerate keeps on the disk, or on the CPU beside a GPU, show as "meta"; its hook knows.
    """
    parameters = list(module.parameters())
    floating = [p for p in parameters if p.is_floating_point()]
    device = parameters[0].device if parameters else torch.device("cpu")
    if device.type == "meta":
        hooks = (getattr(part, "_hf_hook", None) for part in module.modules())
        places = (getattr(one, "execution_device", None) for hook in hooks for one in _each_hook(hook))
        device = torch.device(next((place for place in places if place is not None), device))
    return device, floating[0].dtype if floating else torch.float32


def _each_hook(hook: Any) -> tuple:
    return tuple(getattr(hook, "hooks", (hook,)))


class EditLayer(nn.Module, BaseTunerLayer):
    """What both wrapped layers share: the base layer, the runtime, one memory and one group for each adapter.

    Attributes:
        layer_name: full name of the wrapped module in the base model.
    """

    def __init__(self, base_layer: nn.Module, layer_name: str, runtime: EditRuntime):
        super().__init__()
        self.base_layer = base_layer
        self.layer_name = layer_name
        self.runtime = runtime
        self.number = compiling.number(self)
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
        self.number = compiling.number(self)  # a copy is another layer

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Not possible: an edit applies to some inputs only."""
        raise ValueError(
            "Edits cannot be merged into the base weights: they apply only to the inputs that they match. "
            "Keep the adapter, or call unload() to drop the edits."
        )

    def unmerge(self) -> None:
        """Nothing is ever merged."""

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """An input-dependent edit has no low-rank weight difference."""
        return False

    def _finish_update(self, config: EditConfig) -> None:
        for name in (*self.adapter_layer_names, *self.other_param_names):
            getattr(self, name).train(self.training)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _running(self, adapters: nn.ModuleDict) -> list[str]:
        off = self.runtime.switched_off()
        return [name for name in self.active_adapters if name in adapters and name not in off]

    def _leave_group(self, adapter_name: str) -> None:
        """A deleted adapter's memory is nobody's any more, whichever library deletes it."""
        group = self.groups.pop(adapter_name, None)
        if group is None:
            return
        group.memories.pop(self.layer_name, None)
        if not group.memories:
            groups = self.runtime.groups
            for key in [key for key, known in groups.items() if known is group]:
                del groups[key]

    def router(self, name: str) -> nn.Module | None:
        """What makes an adapter's routing key of states; None: a state itself is the key."""
        raise NotImplementedError

    def looks(self, name: str) -> bool:
        """Whether an adapter's key reads the image tokens where they enter the decoder."""
        return isinstance(self.router(name), PooledKey)

    def _note_picture(self, mode: Record) -> None:
        forward = self.runtime.current_pass()
        if forward is not None and any(self.looks(name) for name in self.configs):
            mode.states.pictured = forward.pictured()

    def _picture(self, name: str, forward: ForwardPass) -> Tensor | None:
        """What `route_key` gets to see of a running call's images."""
        if not self.looks(name):
            return None
        if forward.sequence.prompt.image is None and self.runtime.image_ids:
            raise ValueError(_UNKNOWN)  # without the picture a pooled key would match no edit, silently
        return forward.pictured()

    def _current_pass(self, memory: EditMemory) -> ForwardPass | None:
        forward = self.runtime.current_pass()
        if forward is None and len(memory):
            raise RuntimeError(
                f"{self.layer_name} ran outside a forward of its model, so the {len(memory)} stored edits "
                f"cannot tell whose input this is. Call the model itself, or disable the adapter."
            )
        return forward


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
        # Learned routing keys, for the adapters that have one, at the layer that holds their gate.
        self.dualedit_router = nn.ModuleDict()
        self.dualedit_memory = nn.ModuleDict()
        self.roles: dict[str, Role] = {}
        self.configs: dict[str, DualEditConfig] = {}
        self.groups: dict[str, MemoryGroup] = {}

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
        router = _router_of(config, hidden_size)
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
        memory = EditMemory(keys, tokens, device=device, dtype=dtype)
        self.dualedit_memory[adapter_name] = memory
        group.memories[self.layer_name] = memory
        self.roles[adapter_name] = role
        self.configs[adapter_name] = config
        self.groups[adapter_name] = group
        self._finish_update(config)

    def delete_adapter(self, adapter_name: str) -> None:
        """Drop an adapter with its edits."""
        super().delete_adapter(adapter_name)
        for kept in (self.roles, self.configs):
            kept.pop(adapter_name, None)
        self._leave_group(adapter_name)

    def forward(self, *args, **kwargs):
        output = self.base_layer(*args, **kwargs)
        hidden = _first(output)
        if compiling.tracing():
            return _with_first(output, compiling.trace_edit(self.number, hidden, hidden))
        edited = self.edited(hidden, hidden)
        return output if edited is hidden else _with_first(output, edited)

    def edited(self, x: Tensor, base: Tensor) -> Tensor:
        """The base layer's output [B, L, D] with the edits that apply written to it, or itself."""
        mode = self.runtime.mode()
        if isinstance(mode, Record):
            mode.states[self.layer_name] = base
            self._note_picture(mode)
            return base
        if self.disable_adapters:
            return base
        for name in self._running(self.dualedit_adapter):
            base = self._edit(base, name, mode)
        return base

    def _edit(self, hidden: Tensor, name: str, bound: Bound | None) -> Tensor:
        edits = None if bound is None else bound.edits.get(self.layer_name)
        if bound is not None and edits is None:
            return hidden
        forward = self._current_pass(self.dualedit_memory[name])
        if forward is None or not forward.in_prompt:
            return hidden
        if bound is not None:
            return self._apply_all(hidden, name, forward, forward.decision_rows(bound.route), edits)
        decision = forward.sequence.decisions.get(self.groups[name])
        if decision is None:
            decision = self._decide(hidden, name, forward)
        if decision.nothing:
            return hidden
        snapshot = decision.snapshots[self.layer_name]
        return self._apply_all(hidden, name, forward, forward.decision_rows(decision.route), _kv_of(snapshot))

    def _decide(self, hidden: Tensor, name: str, forward: ForwardPass) -> Decision:
        """The gate: nearest stored edit to the last token's state, and whether it is near enough."""
        snapshots = self.groups[name].snapshot()
        snapshot = snapshots.get(self.layer_name)
        route = None
        if self.roles[name].gate and snapshot is not None and len(snapshot):
            route = self._gate(hidden, name, forward, snapshot)
        decision = Decision(route, snapshots)
        forward.sequence.decisions[self.groups[name]] = decision
        return decision

    def _gate(self, hidden: Tensor, name: str, forward: ForwardPass, snapshot: Snapshot) -> Tensor:
        config = self.configs[name]
        prompt = forward.sequence.prompt
        last = forward.position(prompt.last if config.gate == "prompt" else prompt.last_input)
        image = None if prompt.image is None else forward.columns(prompt.image)
        pictured, text = self._picture(name, forward), forward.columns(prompt.text)
        query = self.route_key(name, hidden.detach(), text, image, last.clamp(min=0), pictured)
        radius = cosine_radius(snapshot.tables["radius"], config.threshold)
        keys = snapshot.tables["key"]  # as stored, whatever the query's dtype: the codes are of these
        return nearest_key(query, keys, radius, "cosine", snapshot.codes(keys, "cosine"))[0]

    def router(self, name: str) -> nn.Module | None:
        return self.dualedit_router[name] if name in self.dualedit_router else None

    def route_key(
        self,
        name: str,
        hidden: Tensor,
        text: Tensor,
        image: Tensor | None,
        last: Tensor,
        pictured: Tensor | None = None,
    ) -> Tensor:
        """The vectors [B, D] or [B, key_dim] by which an adapter looks up states [B, L, D].

        Args:
            text, image: [B, L] bool, the prompt's tokens; image None where they are not known.
            last: [B] int64, column of the token that the gate reads.
            pictured: [B, D], the mean image token as it enters the decoder, which a pooled key reads.
        """
        router = self.router(name)
        if router is None:
            return last_state(hidden, last)
        if isinstance(router, PooledKey):
            return router(last_state(hidden, last), pictured)
        return router(hidden, text, image, last)

    def _apply_all(
        self, hidden: Tensor, name: str, forward: ForwardPass, route: Tensor, edits: dict[str, EditKV]
    ) -> Tensor:
        prompt = forward.sequence.prompt
        for part, adapter in self.dualedit_adapter[name].items():
            mask = prompt.text if part == "text" else prompt.image
            if mask is None or (prompt.image is None and self.runtime.image_ids):
                raise ValueError(_UNKNOWN)
            span = forward.columns(mask).to(hidden.device)
            hidden, _ = adapter(hidden, span, edits[part], route=route.to(hidden.device))
        return hidden


def _router_of(config: DualEditConfig, hidden_size: int) -> nn.Module | None:
    if config.key == "last":
        return None
    if config.key == "pooled":
        return PooledKey(hidden_size, config.key_dim)
    return RoutingKey(hidden_size, config.key_dim, eps=config.norm_eps)


def _kv_of(snapshot: Snapshot) -> dict[str, EditKV]:
    parts = [name[2:] for name in snapshot.tables if name.startswith("k_")]
    return {
        part: EditKV(
            snapshot.tables[f"k_{part}"], snapshot.tables[f"v_{part}"], snapshot.start, snapshot.length
        )
        for part in parts
    }


class BalancEditLayer(EditLayer):
    """A linear layer with a codebook: rows inside an edit's radius use that edit's weight."""

    adapter_layer_names = ("balancedit_adapter",)
    other_param_names = ("balancedit_memory",)

    def __init__(self, base_layer: nn.Module, layer_name: str, runtime: EditRuntime):
        super().__init__(base_layer, layer_name, runtime)
        # Values are fitted edit by edit; all that an adapter itself may have is a pooled key. PEFT finds an
        # adapter by its entry here.
        self.balancedit_adapter = nn.ModuleDict()
        self.balancedit_memory = nn.ModuleDict()
        self.configs: dict[str, BalancEditConfig] = {}
        self.groups: dict[str, MemoryGroup] = {}

    def update_layer(
        self, adapter_name: str, config: BalancEditConfig, group: MemoryGroup, hidden_size: int | None
    ) -> None:
        """Add an adapter: an empty codebook. `hidden_size`: of the residual stream, for a pooled key."""
        device, dtype = place_of(self.base_layer)
        inputs, outputs = self.base_layer.in_features, self.base_layer.out_features
        if config.value == "full":
            values = {"weight": (outputs, inputs)}
        else:
            values = {"down": (config.rank, inputs), "up": (outputs, config.rank)}
        router, width = nn.Module(), inputs
        if config.key == "pooled":
            router, width = PooledKey(hidden_size, config.key_dim, state_size=inputs), config.key_dim
            if next(router.parameters()).device.type != "meta":
                router.to(device=device, dtype=dtype)
        self.balancedit_adapter[adapter_name] = router
        memory = EditMemory({"key": (width,), "radius": (), **values}, {}, device=device, dtype=dtype)
        self.balancedit_memory[adapter_name] = memory
        group.memories[self.layer_name] = memory
        self.configs[adapter_name] = config
        self.groups[adapter_name] = group
        self._finish_update(config)

    def delete_adapter(self, adapter_name: str) -> None:
        """Drop an adapter with its edits."""
        super().delete_adapter(adapter_name)
        self.configs.pop(adapter_name, None)
        self._leave_group(adapter_name)

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        base = self.base_layer(x, *args, **kwargs)
        if compiling.tracing():
            return compiling.trace_edit(self.number, x, base)
        return self.edited(x, base)

    def edited(self, x: Tensor, base: Tensor) -> Tensor:
        """The base layer's output for x with the values of the edits that apply in its place, or itself."""
        mode = self.runtime.mode()
        if isinstance(mode, Record):
            forward = self.runtime.current_pass()
            mode.states[self.layer_name] = (
                x if forward is None else self._by_row(x, forward.batch, forward.length)
            )
            self._note_picture(mode)
            return base
        if self.disable_adapters:
            return base
        for name in self._running(self.balancedit_adapter):
            base = self._edit(x, base, name, mode)
        return base

    def _edit(self, x: Tensor, base: Tensor, name: str, bound: Bound | None) -> Tensor:
        if bound is not None:
            values = bound.edits.get(self.layer_name)
            return base if values is None else self._routed(x, base, values, bound.route)
        forward = self._current_pass(self.balancedit_memory[name])
        if forward is None:
            return base
        decision = forward.sequence.decisions.get(self.groups[name])
        if decision is None:
            decision = self._decide(x, name, forward)
        if decision.nothing:
            return base
        route = forward.decision_rows(decision.route)
        return self._routed(x, base, values_of(decision.snapshots[self.layer_name]), route)

    def _by_row(self, x: Tensor, batch: int, length: int) -> Tensor:
        """x as [B, L, width]: OPT and others hand linear layers all tokens, row after row."""
        if x.ndim == 2 and x.shape[0] == batch * length:
            return x.view(batch, length, -1)
        if x.shape[:-1] != (batch, length):
            raise ValueError(
                f"{self.layer_name} gets inputs of shape {tuple(x.shape)} for {batch} x {length} tokens: "
                f"rows of a batch cannot be told apart (a mixture-of-experts layer, probably). Edit a "
                f"linear layer that sees every token."
            )
        return x

    def _routed(self, x: Tensor, base: Tensor, values: LowRank | Full, route: Tensor) -> Tensor:
        bias = getattr(self.base_layer, "bias", None) if isinstance(values, Full) else None
        rows = x if x.ndim == 3 else x.view(len(route), -1, x.shape[-1])
        below = base.view(*rows.shape[:2], -1)
        return routed_linear(rows, None, bias, values, route.to(x.device), base=below).view(base.shape)

    def router(self, name: str) -> nn.Module | None:
        return self.balancedit_adapter[name] if self.configs[name].key == "pooled" else None

    def route_key(
        self, name: str, x: Tensor, prompt: Tensor, last: Tensor, pictured: Tensor | None = None
    ) -> Tensor:
        """The vectors [B, D] or [B, key_dim] float32 by which an adapter looks up layer inputs [B, L, D].

        Args:
            prompt: [B, L] bool, the prompt's tokens.
            last: [B] int64, column of the last of them.
            pictured: [B, hidden size], the mean image token as it enters the decoder, for a pooled key.
        """
        router = self.router(name)
        if router is None:
            return pool_key(x, self.configs[name].key, prompt, last)
        return router(last_state(x, last), pictured)

    def _decide(self, x: Tensor, name: str, forward: ForwardPass) -> Decision:
        config = self.configs[name]
        snapshots = self.groups[name].snapshot()
        snapshot = snapshots[self.layer_name]
        route = None
        # A decision is made on the prompt; when it went by with the adapter switched off, there is none to
        # make.
        if len(snapshot) and forward.in_prompt:
            x = self._by_row(x.detach(), forward.batch, forward.length)
            prompt = forward.sequence.prompt
            inside, last = forward.columns(prompt.prompt()), forward.position(prompt.last)
            query = self.route_key(name, x, inside, last, self._picture(name, forward))
            route, _ = route_codebook(query, inside, config.metric, snapshot)
        decision = Decision(route, snapshots)
        forward.sequence.decisions[self.groups[name]] = decision
        return decision


def values_of(snapshot: Snapshot) -> LowRank | Full:
    """The stored values of a codebook in the operator's form."""
    if "weight" in snapshot.tables:
        return Full(snapshot.tables["weight"])
    return LowRank(snapshot.tables["down"], snapshot.tables["up"])
