"""Runs tests of Triton kernels: on the GPU where there is one, else in Triton's interpreter on the CPU.

Triton decides when a kernel is defined whether it is interpreted, so one process cannot hold both kinds. A
test decorated with `on_triton` is sent to a worker process that was started with TRITON_INTERPRET=1, imports
the same test module and runs the same function there; a failure comes back with its traceback. Nothing is
skipped.

The interpreter's bf16 is mended in the worker, see `dualedit_kernels.testing.mend_interpreter`.
"""

from __future__ import annotations

import functools
import importlib
import math
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from dualedit_kernels.testing import mend_interpreter

INTERPRETING = os.environ.get("TRITON_INTERPRET", "0") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETING else "cpu"

_workers: list[ProcessPoolExecutor] = []


def on_triton(test: Callable) -> Callable:
    """Run a test function where Triton can run. Its arguments must be picklable (a seed, not a generator)."""

    @functools.wraps(test)
    def run(**arguments):
        if INTERPRETING or DEVICE == "cuda":
            poison_uninitialised_memory()
            return test(**arguments)
        return _submit(_call, test.__module__, test.__name__, arguments)

    return run


def in_the_interpreter(test: Callable) -> Callable:
    """Like `on_triton`, but in the interpreter even where there is a GPU."""

    @functools.wraps(test)
    def run(**arguments):
        if INTERPRETING:
            return test(**arguments)
        return _submit(_call, test.__module__, test.__name__, arguments)

    return run


def poison_uninitialised_memory() -> None:
    """Fill uninitialised memory with NaN (integers: the largest value), so that a skipped write shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True


def _start() -> None:
    torch.set_num_threads(1)
    poison_uninitialised_memory()
    mend_interpreter()


def _call(module: str, name: str, arguments: dict[str, object]) -> None:
    getattr(importlib.import_module(module), name)(**arguments)


def _submit(function: Callable, *arguments: object) -> object:
    pytest.importorskip("triton", reason="Triton is not installed here")
    before = {name: os.environ.get(name) for name in ("TRITON_INTERPRET", "OMP_NUM_THREADS")}
    os.environ.update(TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    try:
        if not _workers:
            spawn = multiprocessing.get_context("spawn")
            _workers.append(ProcessPoolExecutor(1, mp_context=spawn, initializer=_start))
        future = _workers[0].submit(function, *arguments)
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
    return future.result()


class Launches(TorchDispatchMode):
    """Names of all that a GPU would be asked to run inside the block, in order, however it is called.

    Triton kernels by their name, PyTorch's operators by theirs; those that only make or view a tensor are
    left out. What an operator of this library calls is not seen: call the implementation itself.
    """

    FREE = ("empty", "new_empty", "empty_like", "view", "detach", "slice", "alias", "t", "_to_copy", "expand")

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __enter__(self):
        from triton.runtime.interpreter import InterpretedFunction
        from triton.runtime.jit import JITFunction

        self._kind = InterpretedFunction if INTERPRETING else JITFunction
        self._run = self._kind.run

        def run(kernel, *args, **options):
            self.names.append(kernel.fn.__name__)
            with _disable_current_modes():
                return self._run(kernel, *args, **options)

        self._kind.run = run
        return super().__enter__()

    def __exit__(self, *error):
        self._kind.run = self._run
        return super().__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket.__name__ not in self.FREE:
            self.names.append(str(function))
        return function(*args, **(kwargs or {}))


@contextmanager
def in_any_order(seed: int) -> Iterator[None]:
    """Interpret the programs of every launch in a random order: on a GPU none is promised."""
    from triton.runtime.interpreter import InterpreterBuilder

    place, generator, orders = InterpreterBuilder.set_grid_idx, torch.Generator().manual_seed(seed), {}

    def set_grid_idx(self, *at):
        if not any(at):  # a launch begins
            orders[id(self)] = torch.randperm(math.prod(self.grid_dim), generator=generator).tolist()
        sizes = self.grid_dim
        number = orders[id(self)][(at[0] * sizes[1] + at[1]) * sizes[2] + at[2]]
        number, z = divmod(number, sizes[2])
        place(self, *divmod(number, sizes[1]), z)

    InterpreterBuilder.set_grid_idx = set_grid_idx
    try:
        yield
    finally:
        InterpreterBuilder.set_grid_idx = place
