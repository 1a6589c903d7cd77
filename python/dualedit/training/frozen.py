"""A frozen model's layers on a CPU, at the speed that the processor has.

A training step is mostly products with the frozen model's weights. In fp32 PyTorch hands them to MKL, which
on AMD processors runs at half of what oneDNN reaches (see `dualedit_kernels.products`). In bf16 it takes
oneDNN by itself; but oneDNN wants a weight in blocks of its own, and for a weight that lies as PyTorch lays
it every product copies it there first: an eighth of the time of 1,222 x 1,024 x 2,752 on one core of an EPYC
(Zen 5). A frozen weight can be laid so once, for as long as there is memory for the copies. What is left is
attention and the norms; see `attention.py` and `norms.py`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from dualedit_kernels.products import ONEDNN, by_onednn, onednn_refuses

from .attention import attention_by_head
from .forwards import forwards
from .norms import quick_norms

# Of the memory that is free when a block begins, what copies of weights may take.
_SHARE = 0.25


class _Room:
    """Bytes that are left for copies of weights."""

    def __init__(self, size: int):
        self.left = size

    def take(self, size: int) -> bool:
        """Whether there is room for so many bytes; they are taken then."""
        if size > self.left:
            return False
        self.left -= size
        return True


class _Laid:
    """A frozen weight [O, I] with copies as oneDNN wants them, for products with it and with its transpose.

    Each is made when it is first needed, if there is room; no bit of a product depends on that, so that a run
    which is resumed with less memory free comes to the same end. A weight that changes all the same is used
    as it is from then on.
    """

    def __init__(self, weight: Tensor, room: _Room):
        self.weight, self.room = weight, room
        self.made_from = self._state()
        self.copies: dict[bool, Tensor | None] = {}

    def product(self, x: Tensor, bias: Tensor | None, transposed: bool = False) -> Tensor:
        """x [P, I] @ weight.T + bias, or x [P, O] @ weight."""
        matrix = self.weight.t() if transposed else self.weight
        # In fp32 a single row is summed in another order, as are small products, which oneDNN does not get.
        same = x.dtype == torch.bfloat16 or (len(x) > 1 and by_onednn(x, matrix))
        laid = self._copy(matrix, transposed) if same and x.dtype == matrix.dtype else None
        if laid is None:
            return ONEDNN.linear(x, matrix, bias)
        bias = None if bias is None else bias.contiguous()  # the operator does not look at its stride
        return torch.ops.mkldnn._linear_pointwise(x.contiguous(), laid, bias, "none", [], "")

    def _copy(self, matrix: Tensor, transposed: bool) -> Tensor | None:
        if self._state() != self.made_from:
            return None
        if transposed not in self.copies:
            fits = self.room.take(matrix.numel() * matrix.element_size())
            self.copies[transposed] = _laid_out(matrix) if fits else None
        return self.copies[transposed]

    def _state(self) -> tuple[int, int]:
        return self.weight.data_ptr(), self.weight._version


def _laid_out(matrix: Tensor) -> Tensor | None:
    """A copy of a weight [O, I] that oneDNN multiplies with as it is; None where it has none."""
    try:
        return torch.ops.mkldnn._reorder_linear_weight(matrix.detach(), None)
    except (AttributeError, RuntimeError):  # not in this PyTorch, or not for this dtype on this processor
        return None


class _FrozenLinear(torch.autograd.Function):
    """x [P, I] times a weight [O, I] that is not trained."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, laid: _Laid) -> Tensor:
        ctx.save_for_backward(weight)  # so that a change before the backward pass is noticed
        ctx.laid = laid
        return laid.product(x, bias)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        _ = ctx.saved_tensors
        return ctx.laid.product(grad.contiguous(), None, transposed=True), None, None, None


def _forward_of(linear: nn.Linear, room: _Room) -> Callable[[Tensor], Tensor]:
    plain, laid = linear.forward, _Laid(linear.weight, room)

    def forward(x: Tensor) -> Tensor:
        if x.dtype != linear.weight.dtype or laid.weight is not linear.weight:
            return plain(x)  # autocast's to do, or a weight of another model
        flat = x.reshape(-1, x.shape[-1])
        return _FrozenLinear.apply(flat, linear.weight, linear.bias, laid).view(*x.shape[:-1], -1)

    return forward


@contextmanager
def quick_products(base: nn.Module, room: int | None = None) -> Iterator[int]:
    """Inside the block, frozen linear layers of a model on the CPU multiply with oneDNN, fp32 and bf16.

    Args:
        room: bytes that copies of their weights may take; None: a quarter of the memory that is free.

    Yields:
        how many layers do; 0 on a GPU, or where PyTorch has no oneDNN.
    """
    left = _Room(room_for_copies() if room is None else room)
    with forwards({m: _forward_of(m, left) for m in base.modules() if _multiplies(m)}) as count:
        yield count


def _multiplies(module: nn.Module) -> bool:
    """Whether a module is a linear layer that oneDNN can take over."""
    if type(module) is not nn.Linear or "forward" in module.__dict__:
        return False
    weight = module.weight
    if any(each.requires_grad for each in module.parameters()) or hasattr(weight, "placements"):
        return False  # trained, or cut up by FSDP
    known = weight.dtype in (torch.float32, torch.bfloat16)
    return known and onednn_refuses(weight.device.type, weight.dtype) is None


def room_for_copies() -> int:
    """Bytes that copies of weights may take in this process: others of the run share the machine."""
    try:
        processes = max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))  # as torchrun and accelerate say it
    except ValueError:
        processes = 1
    return int(_SHARE * spare_memory()) // processes


def spare_memory() -> int:
    """Bytes of memory that this process could take: of the machine, and of its container; 0 if unknown."""
    found = []
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                found.append(int(line.split()[1]) << 10)
    except (OSError, ValueError, IndexError):
        if "SC_AVPHYS_PAGES" in getattr(os, "sysconf_names", {}):
            found.append(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    group = Path("/sys/fs/cgroup")
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            found.append(int((group / limit).read_text()) - int((group / used).read_text()))
        except (OSError, ValueError):  # there is none, or it says "max"
            continue
    return max(0, min(found, default=0))


@contextmanager
def quick_layers(base: nn.Module) -> Iterator[None]:
    """Inside the block, a frozen model's linear layers, norms and eager attention are quick on the CPU.

    The training loop runs in it. Results differ by rounding at most; another model is not touched.
    """
    with quick_products(base), quick_norms(base), attention_by_head(base):
        yield
