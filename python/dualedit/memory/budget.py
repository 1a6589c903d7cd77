"""How much memory the values of stored edits may take, and which of them are there now."""

from __future__ import annotations

import itertools
import math
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

_UNITS = {"": 1, "b": 1}
_UNITS |= {f"{letter}b": 1000**power for power, letter in enumerate("kmgt", 1)}
_UNITS |= {f"{letter}ib": 1024**power for power, letter in enumerate("kmgt", 1)}
_LARGEST = 2**62
_BESIDE = 768  # bytes that a tensor takes beside its values, about; they count, as edits may be small
TIERS = ("host", "device")
Rows = dict[str, Tensor]


def bytes_of(size: object, argument: str) -> int:
    """A size in bytes: a whole number, or a text such as "500MB" or "1.5 GiB".

    Raises:
        ValueError: names the argument and what it takes.
    """
    number: float = -1.0
    if isinstance(size, int) and not isinstance(size, bool):
        number = size
    elif isinstance(size, str):
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", size)
        if found is not None and found[2].lower() in _UNITS:
            number = float(found[1]) * _UNITS[found[2].lower()]
    if not (math.isfinite(number) and 0 <= number <= _LARGEST):
        raise ValueError(
            f"{argument}={size!r}: pass bytes (a whole number from 0 on), or a text such as '500MB' or "
            "'2GiB'."
        )
    return int(number)


@dataclass(frozen=True)
class Budget:
    """How much memory the values of an adapter's stored edits may take; the rest stays on the disk.

    Keys, radii and numbers are always in memory: an edit is found as fast as ever. The values of an edit that
    answers are read from its file, and kept until others need the room, the least recently used first.

    Attributes:
        host: bytes of the computer's memory, or a text such as "500MB".
        device: bytes of an accelerator's memory, for layers that lie on one; with 0, values are there while
            they are used.

    Raises:
        ValueError: no size.
    """

    host: int | str = "256MB"
    device: int | str = "256MB"

    def __post_init__(self) -> None:
        for name in TIERS:
            object.__setattr__(self, name, bytes_of(getattr(self, name), f"budget.{name}"))

    @classmethod
    def of(cls, budget: object) -> Budget:
        """A budget as functions take it: itself, or the size of its tier in the computer's memory.

        Raises:
            ValueError: neither.
        """
        return budget if isinstance(budget, Budget) else cls(host=bytes_of(budget, "budget"))


class Tiers:
    """The values that are in memory now, of all layers of an adapter; the least recently used make room."""

    def __init__(self, budget: Budget):
        self.budget = budget
        self._lock = threading.Lock()
        self._held: dict[str, OrderedDict[tuple, Rows]] = {tier: OrderedDict() for tier in TIERS}
        self._bytes = dict.fromkeys(TIERS, 0)
        self._beside = dict.fromkeys(TIERS, 0)
        self.new_number: Callable[[], int] = itertools.count().__next__

    def __deepcopy__(self, memo) -> Tiers:
        return self  # a copied model shares what is in memory: values never change

    def __reduce__(self) -> Any:
        raise TypeError(
            "edits that were loaded with a budget are read from an open file, and that cannot be pickled. "
            "Load them in the other process, or without a budget."
        )

    def get(self, tier: str, key: tuple) -> Rows | None:
        """An edit's values, if they are there; they are the last that will be let go."""
        with self._lock:
            found = self._held[tier].get(key)
            if found is not None:
                self._held[tier].move_to_end(key)
            return found

    def put(self, tier: str, key: tuple, rows: Rows) -> None:
        """Keep an edit's values, and let others go as far as the budget asks. Larger ones are not kept."""
        size, beside, most = size_of(rows), _BESIDE * len(rows), int(getattr(self.budget, tier))
        if size + beside > most:
            return
        with self._lock:
            held = self._held[tier]
            if key in held:
                return
            held[key] = rows
            self._bytes[tier] += size
            self._beside[tier] += beside
            while self._bytes[tier] + self._beside[tier] > most:
                _, gone = held.popitem(last=False)
                self._bytes[tier] -= size_of(gone)
                self._beside[tier] -= _BESIDE * len(gone)

    def used(self) -> dict[str, int]:
        """Bytes of the values in each tier."""
        with self._lock:
            return dict(self._bytes)


def size_of(rows: Mapping[str, Tensor]) -> int:
    """Bytes of tensors."""
    return sum(table.numel() * table.element_size() for table in rows.values())
