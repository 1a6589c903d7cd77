"""Methods that change the model's own weights: what was there before is kept and put back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from .baseline import Baseline


class WeightEditor(Baseline):
    """Keeps the old weights of the parameters that it changes; `_before` is filled by `_keep`."""

    def _keep(self, names: Iterator[str] | list[str]) -> None:
        """Copy the parameters that are about to change, unless an earlier edit did."""
        if not self._before:
            self._before = {name: self.model.get_parameter(name).detach().clone() for name in names}

    _before: dict[str, Tensor]

    def _write(self, weights: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, value in weights.items():
                self.model.get_parameter(name).copy_(value)

    def reset(self) -> None:
        """Put the old weights back, bit for bit."""
        self._write(self._before)
        self._before = {}

    @contextmanager
    def unedited(self) -> Iterator[None]:
        """The old weights are in place inside."""
        now = {name: self.model.get_parameter(name).detach().clone() for name in self._before}
        self._write(self._before)
        try:
            yield
        finally:
            self._write(now)

    def memory_bytes(self) -> int:
        """The changed weights, which have to be kept whole; 0 without an edit."""
        return sum(value.nbytes for value in self._before.values())
