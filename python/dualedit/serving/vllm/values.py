"""What an engine holds of a store: the adapter's weights, the values of the edits in use, and their keys."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftConfig
from torch import Tensor, nn

from ...memory import packing
from ...memory.budget import Budget, Tiers
from ...memory.routing_keys import PooledKey
from ...store import EditFile, Store
from ...store.lookup import Lookup
from ...tuners.config import EditConfig
from ...tuners.dualedit.modules import EditCrossAttention

log = logging.getLogger("dualedit.vllm")
_LAYER = re.compile(r"\.layers\.(\d+)(?:\.(.+))?$")
_NAME = re.compile(r"(\d{1,15})-v(\d{1,9})(?:@(\d{1,15}))?")
VALUES = ("as stored", "int8", "float8")
_BETWEEN = "\0"  # between a memory and a table of it


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
        device, dtype: of the model's residual stream; values are used so.
        budget: bytes of values that are kept on the device and in the computer's memory; others are read
            again from the store's files.
        values: "as stored", or "int8" or "float8": DualEdit's keys and values are kept in eight bits with a
            scale for each token, however they are stored.

    Attributes:
        config: the adapter's settings.
        layers: the layers that edits change; the one with the gate first.
        router: the pooled routing key, where the adapter has one.
        image_ids: ids of image tokens.

    Raises:
        ValueError: a method that this engine does not run, or settings that it cannot follow.
    """

    def __init__(
        self, store: Store, device: torch.device, dtype: torch.dtype, budget: Budget | None = None,
        values: str = VALUES[0],
    ):  # fmt: skip
        if values not in VALUES:
            raise ValueError(f"values={values!r}: choose one of {VALUES}.")
        self.store, self.device, self.dtype = store, device, dtype
        self.tiers = Tiers(budget or Budget())
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
        # Rows that are stored in eight bits stay so, of whichever kind.
        stored = getattr(config, "kv_dtype", "native")
        self._kind = stored if packing.is_packed(stored) else values
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
        found = self.tiers.get("device", key)
        if found is None:
            found = {name: self._kept(name, table) for name, table in self._read(file).items()}
            self.tiers.put("device", key, found)
        values: dict[str, dict[str, Tensor]] = {}
        for name, table in found.items():
            memory, _, own = name.partition(_BETWEEN)
            if table.dtype == torch.uint8:
                table = packing.unpack(table, self._kind, self.dtype)
            values.setdefault(memory, {})[own] = table
        return values

    def _read(self, file: EditFile) -> dict[str, Tensor]:
        """The tables of an edit as they are stored, keys and radii left out, in the computer's memory."""
        key = (file.id, file.version)
        found = self.tiers.get("host", key)
        if found is None:
            tables = self.store.edit(file).tables
            # Copies: what is mapped from a file is not aligned, which changes the last bit of a product.
            found = {
                f"{memory}{_BETWEEN}{name}": table.clone()
                for memory, each in tables.items()
                for name, table in each.items()
                if name not in ("key", "radius")
            }
            self.tiers.put("host", key, found)
        return found

    def _kept(self, name: str, table: Tensor) -> Tensor:
        table = table.to(self.device)
        by_token = name.partition(_BETWEEN)[2][:2] in ("k_", "v_")
        if by_token and table.dtype != torch.uint8 and packing.is_packed(self._kind):
            return packing.pack(table, self._kind)
        return table if table.dtype == torch.uint8 else table.to(self.dtype)

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


def parse_name(name: object) -> tuple[int, int, int | None]:
    """(id, version, version of the store) of an edit's name as requests carry it. Raises ValueError."""
    found = _NAME.fullmatch(name) if isinstance(name, str) else None
    if found is None:
        raise ValueError(f"dualedit={name!r}: pass ID-vVERSION@STORE, as 3-v1@12.")
    return int(found[1]), int(found[2]), None if found[3] is None else int(found[3])
