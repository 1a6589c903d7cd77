"""The entry of the Triton `nearest_key`; the kernels are imported on the first call."""

from __future__ import annotations

from torch import Tensor

from .. import triton_support
from ..backend import Implementation


def implementations() -> list[Implementation]:
    """The one entry."""
    merit = "Triton tiles of exact differences, the keys split over the GPU"
    return [Implementation("triton", {"nearest_key": _run}, triton_support.refuses, merit)]


def _run(query: Tensor, keys: Tensor, radius: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    from . import triton_kernel

    return triton_kernel.nearest_key(query, keys, radius, metric)
