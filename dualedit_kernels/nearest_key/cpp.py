"""`nearest_key` of the compiled library: one implementation for each instruction set of the processor."""

from __future__ import annotations

import ctypes
from functools import partial

import torch
from torch import Tensor

from .. import library
from ..backend import Implementation

# Instruction sets as numbered in csrc/cpu/nearest_key.h, best first.
_SETS = {"avx512": 2, "avx2": 1, "portable": 0}
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def implementations() -> list[Implementation]:
    """One entry for each instruction set, best first."""
    merit = "C++ register tiles of exact differences"
    return [
        Implementation(
            f"cpp-{name}", {"nearest_key": partial(_run, number)}, partial(_refuses, number), merit
        )
        for name, number in _SETS.items()
    ]


def _run(isa: int, query: Tensor, keys: Tensor, radius: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    return torch.ops.dualedit_kernels.nearest_key_cpp(
        query.to(torch.float32).contiguous(), keys.contiguous(), radius.contiguous(), metric == "cosine", isa
    )


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
