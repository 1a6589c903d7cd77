"""`nearest_key` of the compiled library on NVIDIA GPUs (csrc/cuda), where the library was built with nvcc."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from .. import library
from ..backend import Implementation

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def implementations() -> list[Implementation]:
    """The one entry."""
    merit = "CUDA C++ register tiles of exact differences"
    return [Implementation("cuda", {"nearest_key": _run}, _refuses, merit)]


def _run(query: Tensor, keys: Tensor, radius: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    if not query.numel() or not keys.numel():
        index = torch.full((len(query),), -1, dtype=torch.int64, device=query.device)
        return index, torch.full((len(query),), torch.inf, device=query.device)
    query, keys = (t if t.stride(1) == 1 else t.contiguous() for t in (query, keys))
    return torch.ops.dualedit_kernels.nearest_key_cuda(query, keys, radius.contiguous(), metric == "cosine")


def _refuses(device: str, dtype: torch.dtype) -> str | None:
    if device != "cuda":
        return "it runs on NVIDIA GPUs only"
    if library.COMPILED is None:
        return f"the compiled library is {library.COMPILED_REASON}"
    if not hasattr(ctypes.CDLL(str(library.COMPILED)), "dualedit_has_cuda"):
        return "the compiled library was built without nvcc"
    if dtype not in _DTYPES:
        return f"it has no {str(dtype).removeprefix('torch.')}"
    return None
