"""Runs tests of Triton kernels: on the GPU where there is one, else in Triton's interpreter on the CPU.

Triton decides when a kernel is defined whether it is interpreted, so one process cannot hold both kinds. A
test decorated with `on_triton` is sent to a worker process that was started with TRITON_INTERPRET=1, imports
the same test module and runs the same function there; a failure comes back with its traceback. Nothing is
skipped.

The interpreter keeps bf16 as the integers of its bits. Three of its operations are then silently wrong, and
`mend_bfloat16` replaces two of them in the worker (in tests alone):

- ``tl.dot`` multiplies the bits as integers: mended, the operands are widened first;
- a cast of fp32 to bf16 cuts off where the GPU rounds to nearest even: mended;
- arithmetic on bf16 values works on the bits: not mended, kernels convert with ``.to(tl.float32)`` first.
"""

from __future__ import annotations

import functools
import importlib
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

import numpy
import pytest
import torch

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


def mend_bfloat16() -> None:
    """Give the interpreter of this process the dot and the rounding of bf16 that the GPU has."""
    from triton import language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    dot, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def create_dot(self, a, b, *rest):
        a, b = (self.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return dot(self, a, b, *rest)

    def cast_impl(self, source, target):
        if source.dtype.scalar == tl.float32 and target.scalar == tl.bfloat16:
            rounded = torch.from_numpy(numpy.ascontiguousarray(source.data)).to(torch.bfloat16)
            return TensorHandle(rounded.view(torch.uint16).numpy(), tl.bfloat16)
        return cast(self, source, target)

    InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl = create_dot, cast_impl


def _start() -> None:
    torch.set_num_threads(1)
    poison_uninitialised_memory()
    mend_bfloat16()


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
