"""Which implementation runs for which operator and device, and why.

The order of preference is written down in `Implementation` entries that each operator registers once, best
first. A choice is never silent: `explain` gives it with its reason, ``python -m dualedit_kernels`` prints
them all, and a forced implementation that cannot run raises an error in place of falling back.

Force one with the environment variable ``DUALEDIT_BACKEND`` ("reference" for every operator, or
"nearest_key=reference,gated_edit_attention=eager"), or with `use_backend` for a block of code. Both hold for
the whole process, all threads.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

ENVIRONMENT = "DUALEDIT_BACKEND"


@dataclass(frozen=True)
class Implementation:
    """One way to run an operator.

    functions: the callables of this implementation by operator name (e.g. forward and backward).
    refuses: given the device type and the dtype of the main tensor, the reason it cannot run, or None.
    merit: why it is preferred where it can run.
    """

    name: str
    functions: dict[str, Callable]
    refuses: Callable[[str, torch.dtype], str | None]
    merit: str


@dataclass(frozen=True)
class Choice:
    """The implementation that runs and the reason for it."""

    implementation: Implementation
    reason: str


_families: dict[str, list[Implementation]] = {}
_overrides: dict[str, str] = {}
_cache: dict[tuple[str, str, torch.dtype], Choice] = {}


def register(family: str, *implementations: Implementation) -> None:
    """Declare the implementations of an operator family, best first."""
    _families[family] = list(implementations)
    _cache.clear()


def families() -> dict[str, list[Implementation]]:
    """All operator families with their implementations, best first."""
    return {family: list(entries) for family, entries in _families.items()}


def explain(family: str, device: str, dtype: torch.dtype) -> Choice:
    """The implementation of ``family`` that runs on a device type ("cpu", "cuda", ...) for a dtype, and why.

    Raises RuntimeError if an implementation is forced that cannot run there, or is unknown.
    """
    key = (family, device, dtype)
    if key not in _cache:
        _cache[key] = _choose(*key)
    return _cache[key]


def run(family: str, operator: str, main: Tensor, *args: Any) -> Any:
    """Call ``operator`` with the implementation chosen for the device and dtype of ``main``."""
    function = explain(family, main.device.type, main.dtype).implementation.functions[operator]
    if torch.is_autocast_enabled(main.device.type):
        # The dtype is the operator's contract: autocast must not reach inside it.
        with torch.autocast(main.device.type, enabled=False):
            return function(*args)
    return function(*args)


@contextmanager
def use_backend(name: str | None = None, **by_family: str) -> Iterator[None]:
    """Force an implementation inside the block: for every operator that has it, or by operator family.

    ``use_backend("reference")``, ``use_backend(nearest_key="cpp")``.
    """
    before = dict(_overrides)
    if name is not None:
        _overrides.update({family: name for family in _families})
    for family, wanted in by_family.items():
        if family not in _families:
            raise ValueError(f"{family!r} is not an operator family: use one of {', '.join(_families)}.")
        _overrides[family] = wanted
    _cache.clear()
    try:
        yield
    finally:
        _overrides.clear()
        _overrides.update(before)
        _cache.clear()


def _forced(family: str) -> tuple[str | None, str]:
    if family in _overrides:
        return _overrides[family], "use_backend"
    for part in filter(None, os.environ.get(ENVIRONMENT, "").split(",")):
        target, _, name = part.strip().rpartition("=")
        if target in ("", family):
            return name, f"{ENVIRONMENT}={os.environ[ENVIRONMENT]}"
    return None, ""


def _choose(family: str, device: str, dtype: torch.dtype) -> Choice:
    entries = _families[family]
    forced, source = _forced(family)
    if forced is not None:
        for entry in entries:
            if entry.name == forced:
                refusal = entry.refuses(device, dtype)
                if refusal is None:
                    return Choice(entry, f"forced by {source}")
                raise RuntimeError(f"{family}: {forced!r} is forced by {source} but cannot run: {refusal}.")
        known = ", ".join(entry.name for entry in entries)
        raise RuntimeError(f"{family}: {forced!r} (forced by {source}) is unknown: use one of {known}.")
    passed: dict[str, list[str]] = {}
    for entry in entries:
        refusal = entry.refuses(device, dtype)
        if refusal is None:
            break
        passed.setdefault(refusal, []).append(entry.name)
    reasons = [f"not {', '.join(names)}: {refusal}" for refusal, names in passed.items()]
    if refusal is not None:
        raise RuntimeError(f"{family}: no implementation for {dtype} on {device}: {'; '.join(reasons)}.")
    return Choice(entry, "; ".join([entry.merit, *reasons]))


def anywhere(device: str, dtype: torch.dtype) -> str | None:
    """The `refuses` of an implementation written in plain PyTorch: it runs everywhere."""
    return None
