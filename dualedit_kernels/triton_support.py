"""When Triton kernels can run, and what they need to know about the device they are launched on.

Imports Triton nowhere: the package works where Triton is not installed.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def interpreting() -> bool:
    """Whether Triton interprets kernels on the CPU (TRITON_INTERPRET=1); meant for tests, it is very slow."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def refuses(device: str, dtype: torch.dtype) -> str | None:
    """The reason why Triton kernels cannot run for a device type and dtype, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if interpreting():
        if device != "cpu":
            return "TRITON_INTERPRET=1 is for the CPU"
    elif device != "cuda":
        return "it runs on NVIDIA GPUs only"
    else:
        reason = _refuses_gpu()
        if reason is not None:
            return reason
    if dtype not in DTYPES:
        return f"it has no {str(dtype).removeprefix('torch.')}"
    return None


def _refuses_gpu() -> str | None:
    if torch.version.hip is not None:
        return "it has not been tried on AMD GPUs"
    if not torch.cuda.is_available():
        return None  # the question is theoretical: answer for a GPU that would do
    major, minor = torch.cuda.get_device_capability()
    return None if major >= 8 else f"it needs compute capability 8.0, this GPU has {major}.{minor}"


def on_device(tensor: Tensor) -> AbstractContextManager:
    """Launch on the device of ``tensor``, which need not be the current one."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def processors(tensor: Tensor) -> int:
    """Streaming multiprocessors of the device of ``tensor``; 4 in the interpreter."""
    return _processors(tensor.device.index or 0) if tensor.is_cuda else 4


def generation(tensor: Tensor) -> int:
    """Major compute capability of the device of ``tensor``; 9 where there is none."""
    return _generation(tensor.device.index or 0) if tensor.is_cuda else 9


def room(generation: int) -> dict[str, int]:
    """Options of a launch whose registers, left to the assembler, spill on Blackwell (compute capability 10).

    It gives up eight or sixteen bytes there to fit one block more to a multiprocessor.
    """
    return {"maxnreg": 168} if generation >= 10 else {}


@functools.cache
def _generation(index: int) -> int:
    return torch.cuda.get_device_capability(index)[0]


@functools.cache
def _processors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


_SOME = 1 << 14
_by_stream: dict[tuple[torch.device, int], Tensor] = {}
_for_graphs: dict[torch.device, Tensor] = {}  # what no graph has been given yet
_given: list[Tensor] = []


def counters(like: Tensor, count: int) -> Tensor:
    """[count] int32 zeros on the device of ``like``, for a kernel that counts in them and leaves them zero.

    Launches in one stream follow each other and share them. Those of a CUDA graph may be replayed beside
    anything else, so each has its own, which it keeps for good. Nothing is launched to make them but by a
    device's and a stream's first calls. The device must be the current one (`on_device`).
    """
    if like.is_cuda and torch.cuda.is_current_stream_capturing():
        left = _for_graphs.get(like.device)
        if left is None or len(left) < count:
            return torch.zeros(count, dtype=torch.int32, device=like.device)  # captured: one launch more
        _for_graphs[like.device] = left[count:]
        _given.append(left[:count])  # a graph holds an address, not the tensor
        return left[:count]
    if like.is_cuda and len(_for_graphs.get(like.device, ())) < _SOME // 2:
        _for_graphs[like.device] = torch.zeros(_SOME, dtype=torch.int32, device=like.device)
    stream = torch.cuda.current_stream(like.device).cuda_stream if like.is_cuda else 0
    held = _by_stream.get((like.device, stream))
    if held is None or len(held) < count:
        held = torch.zeros(power_of_two(max(count, 64)), dtype=torch.int32, device=like.device)
        _by_stream[like.device, stream] = held
    return held


def power_of_two(value: int) -> int:
    """The smallest power of two that is not below ``value``."""
    return 1 << max(0, value - 1).bit_length()
