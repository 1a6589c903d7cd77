"""Launches of the shipped GPU kernels at the shapes of LLaVA-1.5-7B, recorded without a GPU.

The configurations are not a list kept by hand: the shipped launch code runs on meta tensors, and every launch
is recorded with its tiles and the facts that Triton specialises on (dtypes, divisibility by 16, sizes of 1).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TRITON_TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.uint8: "u8",
}


@dataclass(frozen=True)
class Launch:
    """One launch as Triton would specialise it. grid: its programs; not part of what is compiled."""

    kernel: object
    name: str
    signature: tuple[tuple[str, str], ...]
    constexprs: tuple[tuple[str, object], ...]
    divisible: tuple[int, ...]
    options: tuple[tuple[str, int], ...]
    grid: tuple[int, ...] = field(compare=False)
    scene: str = field(compare=False)


def scenes() -> Iterator[tuple[str, Callable[[], object]]]:
    """Calls of the shipped launch code on meta tensors, which together use every tile configuration."""
    for name, dtype in DTYPES.items():
        for rows in (1, 2, 8):
            for metric in ("l2", "cosine"):
                yield (
                    f"nearest_key {name} B={rows} {metric}",
                    lambda d=dtype, b=rows, m=metric: _nearest(d, b, m),
                )
        for count in (1, 8):
            yield f"nearest_key {name} N={count}", lambda d=dtype, n=count: _nearest(d, 8, "cosine", n)
        for tokens in (1, 40, 640):
            for rank in (8, 64):
                yield (
                    f"low_rank {name} L={tokens} R={rank}",
                    lambda d=dtype, t=tokens, r=rank: _low_rank(d, t, r),
                )
            yield f"full {name} L={tokens}", lambda d=dtype, t=tokens: _full(d, t)
        for rows, tokens in ((1, 40), (8, 640)):
            for head in (128,) if tokens == 40 else (16, 64, 80, 128, 256):
                if head <= (128 if dtype == torch.float32 else 256):  # wider heads are not Triton's
                    yield (
                        f"attention {name} B={rows} L={tokens} head={head}",
                        lambda d=dtype, b=rows, t=tokens, h=head: _attention(d, b, t, h),
                    )
        for slots in (1, 2, 4, 8, 100):
            for metric in ("l2", "cosine"):
                yield (
                    f"gate {name} N={slots} {metric}",
                    lambda d=dtype, n=slots, m=metric: _gate(d, n, m),
                )


def launches(arch: int, only: str = "", wanted: Callable[[str], bool] = lambda scene: True) -> list[Launch]:
    """The distinct launches of all scenes on an architecture; ``only``: part of a kernel's name."""
    found: dict[Launch, None] = {}
    for scene, run in scenes():
        if wanted(scene):
            with _recording(scene, arch) as recorded:
                run()
            found.update((launch, None) for launch in recorded if only in launch.name)
    return list(found)


@contextmanager
def _recording(scene: str, arch: int) -> Iterator[list[Launch]]:
    """Record the launches of Triton kernels, as if on an architecture, in place of launching them."""
    from triton.runtime.jit import JITFunction

    from dualedit_kernels import triton_support
    from dualedit_kernels.gated_edit_attention import triton_backward as backward
    from dualedit_kernels.gated_edit_attention import triton_gate as gate
    from dualedit_kernels.gated_edit_attention import triton_kernel as attention
    from dualedit_kernels.nearest_key import triton_kernel as nearest
    from dualedit_kernels.routed_linear import triton_kernel as routed

    recorded: list[Launch] = []

    def run(kernel, *args, grid, warmup, **options):
        recorded.append(_specialise(kernel, args, options, grid, scene))

    assert not triton_support.interpreting(), "the interpreter does not compile: unset TRITON_INTERPRET"
    patches = (
        (JITFunction, "run", run),
        *((owner, "generation", lambda tensor: arch // 10) for owner in (attention, backward, routed)),
        (gate, "processors", lambda tensor: 132),
        (nearest, "processors", lambda tensor: 132),
        (routed, "processors", lambda tensor: 132),
    )
    before = [getattr(owner, name) for owner, name, _ in patches]
    try:
        for owner, name, value in patches:
            setattr(owner, name, value)
        yield recorded
    finally:
        for (owner, name, _), value in zip(patches, before, strict=True):
            setattr(owner, name, value)


def _specialise(
    kernel, args: tuple, options: dict[str, object], grid: tuple[int, ...], scene: str
) -> Launch:
    names = [p.name for p in kernel.params]
    values = dict(zip(names, args, strict=False))
    launch_options = {name: value for name, value in options.items() if name not in names}
    values.update((name, value) for name, value in options.items() if name in names)
    signature, constexprs, divisible = [], [], []
    for i, parameter in enumerate(kernel.params):
        value, name = values[parameter.name], parameter.name
        fixed = parameter.do_not_specialize
        if parameter.is_constexpr or (isinstance(value, int) and value == 1 and not fixed):
            signature.append((name, "constexpr"))
            constexprs.append((name, value))
        elif isinstance(value, torch.Tensor):
            signature.append((name, "*" + TRITON_TYPES[value.dtype]))
            divisible.append(i)
        elif isinstance(value, float):
            signature.append((name, "fp32"))
        else:
            signature.append((name, "i32" if abs(value) < 2**31 else "i64"))
            if value % 16 == 0 and not fixed:
                divisible.append(i)
    return Launch(
        kernel, kernel.fn.__name__, tuple(signature), tuple(constexprs), tuple(divisible),
        tuple(sorted(launch_options.items())), tuple(grid), scene,
    )  # fmt: skip


def _meta(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def _nearest(dtype: torch.dtype, rows: int, metric: str, count: int = 1000) -> None:
    from dualedit_kernels.nearest_key import triton_kernel

    query, keys = _meta(rows, 4096, dtype=dtype), _meta(count, 4096, dtype=dtype)
    triton_kernel.nearest_key(query, keys, _meta(count, dtype=torch.float32), metric)


def _low_rank(dtype: torch.dtype, tokens: int, rank: int) -> None:
    from dualedit_kernels.routed_linear import triton_kernel

    base, x = _meta(4, tokens, 11008, dtype=dtype), _meta(4, tokens, 4096, dtype=dtype)
    down, up = _meta(100, rank, 4096, dtype=dtype), _meta(100, 11008, rank, dtype=dtype)
    index = _meta(4, dtype=torch.int64)
    triton_kernel.low_rank(base, x, down, up, index)
    triton_kernel.low_rank_backward(base, x, down, up, index, [True] * 3)


def _full(dtype: torch.dtype, tokens: int) -> None:
    from dualedit_kernels.routed_linear import triton_kernel

    base, x = _meta(4, tokens, 11008, dtype=dtype), _meta(4, tokens, 4096, dtype=dtype)
    weight, bias, index = (
        _meta(100, 11008, 4096, dtype=dtype), _meta(11008, dtype=dtype), _meta(4, dtype=torch.int64),
    )  # fmt: skip
    triton_kernel.full(base, x, weight, bias, index)
    triton_kernel.full_backward(base, x, weight, index, [True] * 4)


def _attention(dtype: torch.dtype, rows: int, tokens: int, head: int) -> None:
    from dualedit_kernels.gated_edit_attention import triton_backward, triton_kernel

    hidden, span, slots, weights = _layer(dtype, rows, tokens, head, slots=100)
    route = _meta(rows, dtype=torch.int64)
    triton_kernel.forward(hidden, span, route, None, slots, weights)
    triton_kernel.forward_(hidden, span, route, None, slots, weights)
    triton_backward.backward(hidden, hidden, span, route, slots, weights, [True] * 7)


def _gate(dtype: torch.dtype, count: int, metric: str) -> None:
    """What a gate has launched before the projection, among ``count`` keys."""
    from dualedit_kernels.gated_edit_attention import triton_gate
    from dualedit_kernels.gated_edit_attention.arguments import Gate

    hidden, span, slots, weights = _layer(dtype, 8, 640, 128, count)
    keys, radius = _meta(count, 4096, dtype=dtype), _meta(count, dtype=torch.float32)
    gate = Gate(_meta(8, dtype=torch.int64), keys, radius, metric)
    triton_gate.open_rows(hidden, span, None, gate, slots, weights.eps)


def _layer(dtype: torch.dtype, rows: int, tokens: int, head: int, slots: int) -> tuple:
    """(hidden, span, Slots, AttentionWeights)"""
    from dualedit_kernels.gated_edit_attention.arguments import AttentionWeights, Slots

    dim, heads = 4096, 8
    size = heads * head
    hidden, span = _meta(rows, tokens, dim, dtype=dtype), _meta(rows, tokens, dtype=torch.bool)
    k, v = (_meta(620 * slots, size, dtype=dtype) for _ in range(2))
    start, length = (_meta(slots, dtype=torch.int64) for _ in range(2))
    weights = [_meta(*shape, dtype=dtype) for shape in ((size, dim), (size,), (dim, size), (dim,))]
    return hidden, span, Slots(k, v, start, length), AttentionWeights(*weights, heads, 1e-5)
