"""The public `nearest_key`, its fake implementation and its backends."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backend, checks
from ..library import LIBRARY, NAMESPACE
from . import cpp, cuda, triton_backend
from .codes import METRICS, MOST_DIMENSIONS, KeyCodes, check_codes
from .reference import nearest_key_reference

_MANY_VALUES = 1 << 22


def nearest_key(
    query: Tensor, keys: Tensor, radius: Tensor, metric: str = "l2", codes: KeyCodes | None = None
) -> tuple[Tensor, Tensor]:
    """Find the nearest key of each query, then ask whether the query lies within THAT key's radius.

    Args:
        query: [B, D], fp32, bf16, fp16 or fp64.
        keys: [N, D], fp32, bf16, fp16 or fp64; N may be 0.
        radius: [N] fp32, in the unit of the distance; inclusive (a query at distance == radius is inside).
        metric: "l2" (Euclidean distance) or "cosine" (1 - cosine similarity; a similarity threshold tau is
            a radius of 1 - tau).
        codes: of these very keys, from `encode_keys` for this metric. The result is the same with and
            without, bit for bit; the compiled library on the CPU finds it from fewer bytes, the others do not
            look at them. Values are not compared: codes of other values give wrong results, of which only
            some are noticed.

    Returns:
        index: [B] int64, the nearest key, or -1 when the query lies outside its radius.
        distance: [B] fp32 to the nearest key, inside or not; inf when there is none (N = 0, a query that is
            not finite or, for "cosine", zero).

    Distances are sums of direct differences with fp32 accumulation (fp64 if an input is fp64), so they stay
    exact for hidden states with massive activations. Ties go to the lowest index. A key that is not finite
    (or, for "cosine", zero) is never nearest. Indices have no gradient.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device or value.
        RuntimeError: codes contradict an exact distance: the keys changed after they were encoded.

    Source: codebook lookup with per-edit radius of GRACE (arXiv:2211.11031) and BalancEdit
    (arXiv:2505.01343); DualEdit's last-token cosine gate (arXiv:2506.13638) is metric="cosine".
    """
    checks.tensor("query", query, ("B", "D"), checks.FLOATS, query)
    if query.shape[1] == 0:
        raise ValueError("query has D=0 dimensions: there is nothing to compare, pass D of at least 1.")
    checks.tensor("keys", keys, ("N", query.shape[1]), checks.FLOATS, query)
    checks.tensor("radius", radius, (keys.shape[0],), (torch.float32,), query)
    checks.choice("metric", metric, METRICS)
    tensors = None
    if codes is not None:
        check_codes("codes", codes, keys, metric)
        tensors = codes.tensors()
    if query.requires_grad or keys.requires_grad or radius.requires_grad:
        query, keys, radius = query.detach(), keys.detach(), radius.detach()
    plain = type(query) is Tensor and type(keys) is Tensor and type(radius) is Tensor
    if plain and not torch.compiler.is_compiling():
        # What the operator does, without the way through the dispatcher: a fifth of a lookup among few keys.
        return _run(query, keys, radius, metric, tensors)
    return torch.ops.dualedit_kernels.nearest_key(query, keys, radius, metric, tensors)


def codes_pay(keys: Tensor) -> bool:
    """Whether lookups among these keys [N, D] become faster by codes of them.

    They do where the implementation that runs reads codes and there are 2^22 values or more; below, a lookup
    takes a fraction of a millisecond with and without.
    """
    if torch.compiler.is_compiling() or keys.device.type != "cpu" or keys.numel() < _MANY_VALUES:
        return False
    chosen = backend.explain("nearest_key", "cpu", keys.dtype).implementation
    return "nearest_key_coded" in chosen.functions and keys.shape[1] <= MOST_DIMENSIONS


def _run(
    query: Tensor, keys: Tensor, radius: Tensor, metric: str, codes: list[Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    wider = query if query.dtype == torch.float64 else keys
    if codes is not None:
        chosen = backend.explain("nearest_key", wider.device.type, wider.dtype).implementation
        coded = chosen.functions.get("nearest_key_coded")
        if coded is not None:  # of the compiled library, which autocast does not reach
            return coded(query, keys, radius, metric, codes)
    return backend.run("nearest_key", "nearest_key", wider, query, keys, radius, metric)


def _fake(
    query: Tensor, keys: Tensor, radius: Tensor, metric: str, codes: list[Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    rows = query.shape[0]
    return query.new_empty((rows,), dtype=torch.int64), query.new_empty((rows,), dtype=torch.float32)


LIBRARY.impl("nearest_key", _run, "CompositeExplicitAutograd")
torch.library.register_fake(f"{NAMESPACE}::nearest_key", _fake, lib=LIBRARY)
backend.register(
    "nearest_key",
    *cpp.implementations(),
    *triton_backend.implementations(),
    *cuda.implementations(),
    backend.Implementation(
        "reference", {"nearest_key": nearest_key_reference}, backend.anywhere, "plain PyTorch runs everywhere"
    ),
)
