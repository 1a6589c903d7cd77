"""What an engine holds of a store: the adapter's weights, the values of the edits in use, and their keys."""

from __future__ import annotations

import logging
import re
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftConfig
from torch import Tensor, nn

from ...memory.routing_keys import PooledKey
from ...store import EditFile, Store
from ...store.lookup import Lookup
from ...tuners.config import EditConfig
from ...tuners.dualedit.modules import EditCrossAttention

log = logging.getLogger("dualedit.vllm")
_LAYER = re.compile(r"\.layers\.(\d+)(?:\.(.+))?$")
_NAME = re.compile(r"(\d{1,15})-v(\d{1,9})(?:@(\d{1,15}))?")
VALUES = ("as stored", "int8")


@dataclass(frozen=True)
class EditedLayer:
    """A layer that edits change.

    Attributes:
        memory: in front of what names its tables begin.
        number: of the decoder layer.
        linear: name of the linear layer inside it; None: the decoder layer's own output is written to.
        parts: "text" and "vision" to the cross-attention that writes there (DualEdit alone).
    """

    memory: str
    number: int
    linear: str | None
    parts: Mapping[str, EditCrossAttention] = field(default_factory=dict)


class EngineEdits:
    """The edits of one engine process.

    Args:
        store: what it reads.
        device, dtype: of the model's residual stream; values are kept so.
        slots: how many edits' values are kept on the device; others are read again (from the store's own
            memory of edits, its files, or its address).
        values: "as stored", or "int8": keys and values of DualEdit in eight bits with a scale for each token.

    Attributes:
        config: the adapter's settings.
        layers: the layers that edits change; the one with the gate first.
        router: the pooled routing key, where the adapter has one.
        image_ids: ids of image tokens.

    Raises:
        ValueError: a method that this engine does not run, or settings that it cannot follow.
    """

    def __init__(
        self, store: Store, device: torch.device, dtype: torch.dtype, slots: int = 64, values: str = VALUES[0]
    ):
        if values not in VALUES:
            raise ValueError(f"values={values!r}: choose one of {VALUES}.")
        if slots < 1:
            raise ValueError(f"slots={slots}: pass a whole number from 1 on.")
        self.store, self.device, self.dtype, self.slots, self.values = store, device, dtype, slots, values
        settings, state = store.adapter()
        config = PeftConfig.from_peft_type(**settings)
        if not isinstance(config, EditConfig):
            raise ValueError(f"The store holds a {settings.get('peft_type')} adapter, not edits.")
        if getattr(config, "gate", "prompt") != "prompt":
            raise ValueError("gate='published' sees the answer: an engine cannot route by it.")
        self.config = config
        self.image_ids = list(config.image_token_ids or [])
        memories = store.now().manifest.memories
        self.layers = [self._layer(memory, state) for memory in memories]
        self.router = self._router(memories[0].rpartition(".")[0], state)
        self._slots: OrderedDict[tuple[int, int], dict[str, dict[str, Tensor]]] = OrderedDict()
        self._lookups: dict[int, Lookup] = {}

    def _layer(self, memory: str, state: Mapping[str, Tensor]) -> EditedLayer:
        layer = memory.rpartition(".")[0]
        found = _LAYER.search(layer)
        if found is None:
            raise ValueError(f"{layer} is no layer of a decoder that this engine knows.")
        parts = {}
        for part in ("text", "vision"):
            own = f"{layer}.dualedit_adapter.{part}."
            weights = {name.removeprefix(own): t for name, t in state.items() if name.startswith(own)}
            if weights:
                middle, width = weights["in_proj.weight"].shape
                made = EditCrossAttention(width, middle, self.config.num_heads, self.config.norm_eps)
                parts[part] = self._loaded(made, weights, self.dtype)
        return EditedLayer(memory, int(found[1]), found[2], parts)

    def _router(self, layer: str, state: Mapping[str, Tensor]) -> PooledKey | None:
        if getattr(self.config, "key", None) != "pooled":
            return None
        for container in ("dualedit_router", "balancedit_adapter"):
            own = f"{layer}.{container}."
            weights = {name.removeprefix(own): t for name, t in state.items() if name.startswith(own)}
            if weights:
                half, seen = weights["picture.map"].shape
                made = PooledKey(seen, 2 * half, state_size=weights["question.map"].shape[1])
                return self._loaded(made, weights, torch.float32)
        raise ValueError(f"{layer}: the store has no weights of the pooled key.")

    def _loaded(self, module: nn.Module, weights: Mapping[str, Tensor], dtype: torch.dtype) -> Any:
        module.load_state_dict(weights)
        return module.to(self.device, dtype).eval().requires_grad_(False)

    @property
    def width(self) -> int:
        """Of a routing key."""
        return int(self.store.now().keys.shape[1])

    # ------------------------------------------------------------------ values

    def values_of(self, file: EditFile) -> dict[str, dict[str, Tensor]]:
        """Memory to table to rows of an edit, on the device.

        Raises:
            Damaged, OSError: the file cannot be read, or is not what was written.
        """
        key = (file.id, file.version)
        found = self._slots.get(key)
        if found is None:
            tables = self.store.edit(file).tables
            found = {
                memory: {n: self._kept(n, t) for n, t in each.items() if n not in ("key", "radius")}
                for memory, each in tables.items()
            }
            self._slots[key] = found
            while len(self._slots) > self.slots:
                self._slots.popitem(last=False)
        else:
            self._slots.move_to_end(key)
        return {m: {n: _opened(t, self.dtype) for n, t in each.items()} for m, each in found.items()}

    def _kept(self, name: str, table: Tensor) -> Any:
        table = table.to(self.device)
        if self.values == "int8" and name[:2] in ("k_", "v_"):
            return quantised(table.float())
        # A copy: what is mapped from a file is not aligned, which changes the last bit of a product.
        return table.to(self.dtype, copy=True)

    @property
    def held(self) -> int:
        """How many edits' values are on the device."""
        return len(self._slots)

    # ------------------------------------------------------------------ routing

    def lookup(self, version: int) -> Lookup:
        """The edits of a version of the store, looked up by key. Raises KeyError where it is gone."""
        found = self._lookups.get(version)
        if found is None:
            method = self.config.method
            found = Lookup(
                self.store.at(version), method.metric(self.config), lambda r: method.radii(self.config, r)
            )
            self._lookups[version] = found
            for old in sorted(self._lookups)[:-4]:
                del self._lookups[old]
        return found


def quantised(table: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [T, M] in eight bits, and a scale for each [T, 1]."""
    scale = table.abs().amax(dim=-1, keepdim=True).clamp(min=1e-12) / 127
    return (table / scale).round().clamp(-127, 127).to(torch.int8), scale


def _opened(table: Any, dtype: torch.dtype) -> Tensor:
    return table if isinstance(table, Tensor) else (table[0].float() * table[1]).to(dtype)


def parse_name(name: object) -> tuple[int, int, int | None]:
    """(id, version, version of the store) of an edit's name as requests carry it. Raises ValueError."""
    found = _NAME.fullmatch(name) if isinstance(name, str) else None
    if found is None:
        raise ValueError(f"dualedit={name!r}: pass ID-vVERSION@STORE, as 3-v1@12.")
    return int(found[1]), int(found[2]), None if found[3] is None else int(found[3])
