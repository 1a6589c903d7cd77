"""Cached keys and values in fewer bytes: bfloat16, or eight bits a value with a scale for each row."""

from __future__ import annotations

import torch
from torch import Tensor

# "native" is the model's own dtype. Packed rows are bytes: a value each, then the row's scale (fp32).
KINDS = ("native", "bfloat16", "int8", "float8")
_SCALE = 4
_LARGEST = {"int8": 127.0, "float8": 448.0}  # of int8 without -128, and of float8_e4m3fn


def why_not(kind: str) -> str | None:
    """Why values cannot be kept so; None: they can."""
    if kind == "float8" and not hasattr(torch, "float8_e4m3fn"):
        return f"torch {torch.__version__} has no float8_e4m3fn; use 'int8'"
    return None


def is_packed(kind: str) -> bool:
    """Whether rows are bytes that have to be unpacked."""
    return kind in _LARGEST


def stored_width(width: int, kind: str) -> int:
    """Entries of a stored row of so many values."""
    return width + _SCALE if is_packed(kind) else width


def stored_dtype(dtype: torch.dtype, kind: str) -> torch.dtype:
    """Dtype of stored rows of a model of this dtype."""
    if is_packed(kind):
        return torch.uint8
    return torch.bfloat16 if kind == "bfloat16" else dtype


def pack(rows: Tensor, kind: str) -> Tensor:
    """Rows [T, M] of a floating dtype as they are stored: [T, stored_width(M)]."""
    if not is_packed(kind):
        return rows.to(stored_dtype(rows.dtype, kind))
    values = rows.detach().float()
    scale = values.abs().amax(1, keepdim=True) / _LARGEST[kind]
    # A row of zeros has no scale; one of subnormal values would divide by zero.
    usable = scale >= torch.finfo(torch.float32).tiny
    steps = torch.where(usable, values / torch.where(usable, scale, 1.0), 0.0)
    if kind == "int8":
        codes = steps.round().clamp(-127, 127).to(torch.int8)
    else:
        codes = steps.clamp(-448, 448).to(torch.float8_e4m3fn)
    scale = torch.where(usable, scale, 0.0).contiguous()
    return torch.cat([codes.view(torch.uint8), scale.view(torch.uint8)], 1)


def unpack(stored: Tensor, kind: str, dtype: torch.dtype) -> Tensor:
    """Stored rows [T, W] as values [T, M] of a dtype."""
    if not is_packed(kind):
        return stored.to(dtype)
    codes, scale = stored[:, :-_SCALE].contiguous(), stored[:, -_SCALE:].contiguous().view(torch.float32)
    values = codes.view(torch.int8 if kind == "int8" else torch.float8_e4m3fn).float()
    return (values * scale).to(dtype)


def are_storable(stored: Tensor, kind: str) -> bool:
    """Whether stored rows hold values that are finite."""
    if not is_packed(kind):
        if not stored.numel():
            return True
        # In one pass, without a table of truths: NaN is the smallest and largest of whatever holds it.
        return all(bool(torch.isfinite(end)) for end in torch.aminmax(stored))
    scale = stored[..., -_SCALE:].contiguous().view(torch.float32)
    if not bool((torch.isfinite(scale) & (scale >= 0)).all()):
        return False
    codes = stored[..., :-_SCALE]
    # float8_e4m3fn: 0x7f and 0xff are NaN, there is no infinity. int8: -128 is never written.
    wrong = codes == 0x80 if kind == "int8" else (codes & 0x7F) == 0x7F
    return not bool(wrong.any())
