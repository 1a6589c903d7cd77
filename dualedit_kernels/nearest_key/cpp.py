"""`nearest_key` of the compiled library: one implementation for each instruction set of the processor."""

from __future__ import annotations

import ctypes
from functools import partial

import torch
from torch import Tensor

from .. import library
from ..backend import Implementation

# Instruction sets as numbered in csrc/cpu/nearest_key.h, best first, and how they read codes.
_SETS = {"avx512": (2, "AVX512-VNNI"), "avx2": (1, "AVX2"), "portable": (0, "plain C++")}
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Below, coding the queries costs more than the keys do.
FEWEST_KEYS = 64
# Overloads are looked up once: lookups among few keys take microseconds.
_PLAIN = torch.ops.dualedit_kernels.nearest_key_cpp.default
_CODED = torch.ops.dualedit_kernels.nearest_key_codes_cpp.default


def implementations() -> list[Implementation]:
    """One entry for each instruction set, best first."""
    return [
        Implementation(
            f"cpp-{name}",
            {"nearest_key": partial(_run, number), "nearest_key_coded": partial(_run_coded, number)},
            partial(_refuses, number),
            f"C++ register tiles of exact differences; codes of keys are read with {reader}",
        )
        for name, (number, reader) in _SETS.items()
    ]


def last_coded() -> tuple[int, int]:
    """Of the last lookup with codes: distances computed exactly, and queries that the codes were no use for.

    For tests and benchmarks; of the whole process, all threads.
    """
    counts = (ctypes.c_int64 * 2)()
    ctypes.CDLL(str(library.COMPILED)).dualedit_last_coded(counts)
    return counts[0], counts[1]


def _run(isa: int, query: Tensor, keys: Tensor, radius: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    return _PLAIN(_rows(query), keys.contiguous(), radius.contiguous(), metric == "cosine", isa)


def _run_coded(
    isa: int, query: Tensor, keys: Tensor, radius: Tensor, metric: str, codes: list[Tensor]
) -> tuple[Tensor, Tensor]:
    if keys.shape[0] < FEWEST_KEYS:
        return _run(isa, query, keys, radius, metric)
    return _CODED(_rows(query), keys.contiguous(), radius.contiguous(), metric == "cosine", isa, *codes)


def _rows(query: Tensor) -> Tensor:
    # A conversion that changes nothing still takes a microsecond.
    return (query if query.dtype == torch.float32 else query.to(torch.float32)).contiguous()


def _refuses(isa: int, device: str, dtype: torch.dtype) -> str | None:
    if device != "cpu":
        return "it runs on the CPU only"
    if library.COMPILED is None:
        return f"the compiled library is {library.COMPILED_REASON}"
    if dtype not in _DTYPES:
        return f"it has no {str(dtype).removeprefix('torch.')}"
    if isa > ctypes.CDLL(str(library.COMPILED)).dualedit_best_isa():
        return "this processor lacks the instruction set"
    return None
