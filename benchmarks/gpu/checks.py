"""What the run on a GPU checks before it measures: every implementation against float64, and CUDA graphs."""

from __future__ import annotations

import torch

from benchmarks.common import captured, place

LOOKUPS = ((1, 1, 1), (3, 7, 33), (1, 3000, 1024), (9, 3001, 1000), (33, 500, 4096))  # B, N, D
LINEARS = ((1, 1024, 768, 8), (7, 33, 65, 3), (130, 1024, 1000, 64))  # L, I, O, R
ATTENTIONS = (
    dict(rows=5, tokens=19, dim=24, mid=32, num_heads=2, lengths=[7, 1, 40], route=[2, -1, 0, 1, 2]),
    dict(rows=3, tokens=600, dim=1024, mid=1024, num_heads=8, lengths=[620, 3], route=[0, -1, 1]),
)
GRAPH = dict(rows=4, tokens=64, dim=256, mid=256, num_heads=2, lengths=[70, 3], route=[0, -1, 1, -1])


def check() -> str:
    """Every implementation that runs on this GPU, against float64 on the GPU."""
    from dualedit_kernels import backend

    done: list[str] = []
    for family, compare in (
        ("nearest_key", _check_nearest),
        ("routed_linear", _check_routed),
        ("gated_edit_attention", _check_attention),
    ):
        for entry in backend.families()[family]:
            dtypes = (torch.float32, torch.bfloat16, torch.float16)
            fit = [dtype for dtype in dtypes if entry.refuses(place("cuda"), dtype) is None]
            for dtype in fit:
                with backend.use_backend(**{family: entry.name}):
                    compare(dtype)
            if fit:
                done.append(f"{family}={entry.name}")
    return f"{len(done)} implementations agree with float64: {', '.join(done)}"


def _check_nearest(dtype: torch.dtype) -> None:
    from dualedit_kernels import nearest_key
    from dualedit_kernels.testing import assert_nearest

    generator = torch.Generator().manual_seed(1)
    for rows, count, dim in LOOKUPS:
        keys = torch.randn(count, dim, generator=generator).to(dtype)
        query = torch.randn(rows, dim, generator=generator)
        radius = torch.full((count,), dim**0.5 * 1.35)
        for metric in ("l2", "cosine"):
            answer = nearest_key(*(t.to(place("cuda")) for t in (query, keys, radius)), metric)
            assert_nearest(*(t.cpu() for t in answer), query, keys, radius, metric)


def _check_routed(dtype: torch.dtype) -> None:
    from dualedit_kernels import Full, LowRank, routed_linear
    from dualedit_kernels.routed_linear.reference import routed_full_reference, routed_low_rank_reference
    from dualedit_kernels.testing import assert_as_exact

    generator = torch.Generator().manual_seed(2)

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(place("cuda"), dtype)

    index = torch.tensor([2, -1, 0, 2], device=place("cuda"))
    for tokens, size, out, rank in LINEARS:
        base, x, bias = normal(4, tokens, out), normal(4, tokens, size), normal(out)
        down, up, full = normal(3, rank, size, scale=size**-0.5), normal(3, out, rank), normal(3, out, size)
        low = (base, x, down, up, index)
        whole = (base, x, full * size**-0.5, bias, index)
        for values, reference, args in (
            (LowRank(down, up), routed_low_rank_reference, low),
            (Full(whole[2]), routed_full_reference, whole),
        ):
            got = routed_linear(x, None, bias, values, index, base=base)
            exact = reference(*(t.double() if t.is_floating_point() else t for t in args))
            assert_as_exact(f"{type(values).__name__} L={tokens}", got, reference(*args), exact, 3.0)
            assert torch.equal(got[1], base[1])


def _check_attention(dtype: torch.dtype) -> None:
    from dualedit_kernels import gated_edit_attention
    from dualedit_kernels.gated_edit_attention.reference import gated_edit_attention_reference as reference
    from dualedit_kernels.testing import assert_as_exact

    for size in ATTENTIONS:
        case = _case(size).to(dtype)
        plain = reference(**case.public())
        exact = reference(**case.to(torch.float64).public())
        with torch.no_grad():
            got = gated_edit_attention(**case.public())[0]
            inplace = gated_edit_attention(**case.public() | {"hidden": case.hidden.clone()}, inplace=True)[0]
        assert_as_exact("out", got, plain, exact, 3.0)
        assert torch.equal(inplace, got)
        closed = ~(case.span & (case.route >= 0)[:, None])
        assert torch.equal(got[closed], case.hidden[closed])


def _case(size: dict[str, object]):
    from dataclasses import replace

    from dualedit_kernels.testing import attention_case

    case = attention_case(torch.Generator().manual_seed(3), **size)
    tensors = {name: getattr(case, name) for name in case.__dataclass_fields__}
    there = {n: t.to(place("cuda")) for n, t in tensors.items() if isinstance(t, torch.Tensor)}
    return replace(case, **there)


def capture() -> str:
    """Capture the operators in one CUDA graph; replays with other rows and routes give the bits of calls."""
    from dualedit_kernels import Gate, LowRank, gated_edit_attention, routed_linear

    device, dim = place("cuda"), GRAPH["dim"]
    case = _case(GRAPH).to(torch.bfloat16)
    keys = case.hidden[:2, 5].clone()
    last = torch.full((4,), 5, device=device)
    gate = Gate(last, keys, torch.full((2,), 0.05, device=device))
    down, up = (torch.randn(2, *shape, device=device).to(torch.bfloat16) for shape in ((8, dim), (dim, 8)))
    fixed = case.public() | {"route": None, "gate": gate}

    @torch.no_grad()
    def work(hidden: torch.Tensor) -> torch.Tensor:
        out, route = gated_edit_attention(**fixed | {"hidden": hidden})
        return routed_linear(out, None, None, LowRank(down, up), route, base=hidden)

    static = case.hidden.clone()
    replay = captured(lambda: work(static))
    open_rows = 0
    for order in ([0, 1, 2, 3], [2, 3, 0, 1], [3, 3, 2, 2], [1, 0, 1, 0]):
        static.copy_(case.hidden[order])
        result = replay()
        want = work(case.hidden[order].clone())
        assert torch.equal(result, want), f"a replay with the rows {order} differs from a call"
        open_rows += int((result != static).flatten(1).any(1).sum())
    assert open_rows == 8, f"{open_rows} rows were open over the replays, expected 8"
    return "nearest_key, gated_edit_attention and routed_linear replay bit for bit with other routes"
