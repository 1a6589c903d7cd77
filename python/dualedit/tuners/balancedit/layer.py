"""A linear layer with BalancEdit's codebook: rows inside an edit's radius use that edit's weight."""

from __future__ import annotations

from torch import Tensor, nn

from dualedit_kernels import Full, LowRank, routed_linear

from ...memory import EditMemory, Fired, MemoryGroup, Snapshot
from ...memory.routing import last_state
from ...memory.routing_keys import PooledKey
from ...models.placement import place_of
from ...runtime import compile as compiling
from ...runtime.context import EditRuntime
from ...runtime.frames import Bound, Record
from ...runtime.sequence import Prompt, mean_state
from ..layer import EditLayer
from .config import BalancEditConfig


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
        self._add(adapter_name, config, memory, group)

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        base = self.base_layer(x, *args, **kwargs)
        if compiling.tracing():
            return compiling.trace_edit(self.handle, x, base)
        return self.edited(x, base)

    def edited(self, x: Tensor, base: Tensor) -> Tensor:
        """The base layer's output for x with the values of the edits that apply in its place, or itself."""
        mode = self.runtime.mode()
        if isinstance(mode, Record):
            forward = self.runtime.current_pass()
            self._record(mode, x if forward is None else self._by_row(x, forward.batch, forward.length))
            return base
        for name in self._running():
            base = self._edit(x, base, name, mode)
        return base

    def _edit(self, x: Tensor, base: Tensor, name: str, bound: Bound | None) -> Tensor:
        if bound is not None:
            values = bound.edits.get(self.layer_name)
            return base if values is None else self._routed(x, base, values, bound.route)
        forward = self._current_pass(name)
        if forward is None:
            return base
        decision = forward.sequence.decisions.get(self.groups[name])
        if decision is None:
            rows = self._by_row(x, forward.batch, forward.length) if len(self.groups[name]) else x
            decision = self._decision(name, rows, forward)
        if decision.nothing:
            return base
        fired = decision.fired(self.layer_name)
        return self._routed(x, base, self.stored_edits(fired), forward.decision_rows(fired.route))

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
        """The pooled key of an adapter, where it has one."""
        return self.balancedit_adapter[name] if self.configs[name].key == "pooled" else None

    def routing_key(
        self, name: str, states: Tensor, prompt: Prompt, mean_image: Tensor | None = None
    ) -> Tensor:
        """The layer's input over the prompt [B, D] float32: its mean or its last token; or the pooled key."""
        router = self.router(name)
        if router is not None:
            return router(last_state(states, prompt.last), mean_image)
        return codebook_key(self.configs[name].key, states, prompt)

    @staticmethod
    def stored_edits(snapshot: Snapshot | Fired) -> LowRank | Full:
        """Values of the codebook in the operator's form."""
        if "weight" in snapshot.tables:
            return Full(snapshot.tables["weight"])
        return LowRank(snapshot.tables["down"], snapshot.tables["up"])


def codebook_key(key: str, states: Tensor, prompt: Prompt) -> Tensor:
    """The codebook's key [B, D] float32 of a layer's input [B, L, D]: the "mean" of the prompt's tokens, or
    its last one (BalancEdit, ICML 2025, Sec. 4.1)."""
    return mean_state(states, prompt.prompt()) if key == "mean" else last_state(states, prompt.last).float()
