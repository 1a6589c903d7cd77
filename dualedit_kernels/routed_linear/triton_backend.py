"""The entry of the Triton `routed_linear`; the kernels are imported on the first call."""

from __future__ import annotations

from collections.abc import Callable

from .. import triton_support
from ..backend import Implementation


def implementations() -> list[Implementation]:
    """The one entry."""
    names = ("low_rank", "low_rank_backward", "full", "full_backward")
    merit = "Triton reads each row's slot on the device, without a host synchronisation"
    return [Implementation("triton", {name: _call(name) for name in names}, triton_support.refuses, merit)]


def _call(name: str) -> Callable:
    def run(*args: object) -> object:
        from . import triton_kernel

        return getattr(triton_kernel, name)(*args)

    return run
