"""Checks of arguments: every error names the argument, the value and the remedy."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def tensor(
    name: str, value: object, shape: Sequence[int | str], dtypes: Sequence[torch.dtype], like: Tensor
) -> None:
    """Raise unless ``value`` is a tensor on the device of ``like`` with that shape and one of those dtypes.

    A letter in ``shape`` matches any size, a number matches itself.
    """
    # A lookup takes microseconds: no generator, and no instance check where the type says it.
    if type(value) is not Tensor and not isinstance(value, Tensor):
        raise TypeError(
            f"{name} must be a tensor, got {type(value).__name__}: pass one of shape {_show(shape)}."
        )
    sizes = value.shape
    fits = len(sizes) == len(shape)
    for want, got in zip(shape, sizes, strict=False):
        if want != got and type(want) is not str:
            fits = False
    if not fits:
        raise ValueError(
            f"{name} has shape {list(value.shape)}, expected {_show(shape)}: reshape {name} or the others."
        )
    if value.dtype not in dtypes:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name} has dtype {value.dtype}, expected {wanted}: convert it with {name}.to(...).")
    if value is not like and value.device != like.device:
        raise ValueError(f"{name} is on {value.device}, the others on {like.device}: move it there.")


def choice(name: str, value: object, allowed: Sequence[object]) -> None:
    """Raise unless ``value`` is one of ``allowed``."""
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is unknown: use one of {', '.join(repr(a) for a in allowed)}.")


def nothing_routed(route: Tensor) -> bool:
    """Whether every route is -1, where that can be asked without waiting: eagerly, on the CPU."""
    if route.device.type != "cpu" or type(route) is not Tensor or torch.compiler.is_compiling():
        return False
    return not bool((route >= 0).any())


def _show(shape: Sequence[int | str]) -> str:
    return "[" + ", ".join(str(size) for size in shape) + "]"
