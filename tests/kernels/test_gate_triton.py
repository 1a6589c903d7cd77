"""The gate inside Triton's gated edit attention: decided as `nearest_key` does, in few launches."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from interpreter import DEVICE, Launches, in_any_order, on_triton
from test_gated_edit_attention_triton import compare, there

from dualedit_kernels import Gate, backend, gated_edit_attention, nearest_key, triton_support
from dualedit_kernels.gated_edit_attention.arguments import AttentionWeights, Slots
from dualedit_kernels.testing import attention_case

FEW = 8
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
METRICS = ["cosine", "l2"]
LAST = [2, 0, 1, 1, -1]
ROWS = len(LAST)


def asked(seed, count, metric="cosine", dtype=torch.float32, **sizes):
    """A case of five rows, and a gate of ``count`` keys: rows 0, 2 and 4 ask for keys of their own."""
    generator = torch.Generator().manual_seed(seed)
    sizes = dict(rows=ROWS, tokens=7, dim=40, mid=32, num_heads=2) | sizes
    lengths = torch.randint(1, 6, (count,), generator=generator).tolist()
    case = attention_case(generator, lengths=lengths, route=[-1] * ROWS, **sizes).to(dtype)
    last = torch.tensor(LAST)
    keys = torch.randn(count, sizes["dim"], generator=generator).to(dtype)
    for row in (0, 2, 4):
        near = case.hidden[row, LAST[row]].float() * (1 + 1e-3 * torch.randn((), generator=generator))
        keys[int(torch.randint(0, count, (), generator=generator))] = near.to(dtype)
    radius = torch.full((count,), 0.05 if metric == "cosine" else 0.5)
    return there(case), Gate(last.to(DEVICE), keys.to(DEVICE), radius.to(DEVICE), metric)


def decide(case, gate, **options):
    with backend.use_backend("triton"):
        return gated_edit_attention(**case.public() | {"route": None}, gate=gate, **options)


def look_up(case, gate):
    with backend.use_backend("triton"):
        rows = torch.arange(len(gate.last), device=gate.last.device)
        return nearest_key(case.hidden[rows, gate.last].contiguous(), gate.keys, gate.radius, gate.metric)


def same(case, gate):
    """The decision of `nearest_key`, which the first kernel of attention decides too, to the bit."""
    from dualedit_kernels.gated_edit_attention.triton_gate import open_rows

    route, distance = look_up(case, gate)
    slots = Slots(case.k, case.v, case.start, case.length)
    assert open_rows(case.hidden, case.span, None, gate, slots, 1e-5)[0][1].tolist() == route.tolist()
    return route, distance


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("count", [1, 3, FEW, FEW + 1, 40])
@on_triton
def test_decides_as_nearest_key(seed, count, dtype, metric):
    """Radii are the distances to their last bit: a bit less closes the rows that they opened."""
    case, gate = asked(seed, count, metric, dtype, tokens=3, dim=150, mid=16, num_heads=1)
    nearest, distance = same(case, replace(gate, radius=torch.full_like(gate.radius, torch.inf)))
    assert (nearest >= 0).all()
    radius = torch.full_like(gate.radius, -1).scatter_reduce(0, nearest, distance, "amax")
    edge = distance == radius[nearest]
    assert edge.any() and (same(case, replace(gate, radius=radius))[0] == nearest).all()
    less = radius.nextafter(torch.full_like(radius, -torch.inf))
    assert torch.equal(same(case, replace(gate, radius=less))[0], torch.where(edge, -1, nearest))


@pytest.mark.parametrize("count", [FEW, 30])
@pytest.mark.parametrize("metric", METRICS)
@on_triton
def test_ties_and_what_is_not_finite(seed, metric, count):
    case, gate = asked(seed, count, metric)
    keys = case.hidden[0, LAST[0]].repeat(count, 1)
    keys[:2] += 1
    radius = torch.full_like(gate.radius, torch.inf)
    assert same(case, replace(gate, keys=keys, radius=radius))[0][0] == 2  # the lowest of equal ones
    for bad in (torch.nan, torch.inf):
        case.hidden[2, LAST[2], 5] = bad
        keys[2] = bad
        route, _ = same(case, replace(gate, keys=keys, radius=radius))
        assert route[2] == -1 and route[0] == 3
        assert (same(case, replace(gate, keys=torch.full_like(keys, bad), radius=radius))[0] == -1).all()
        assert (same(case, replace(gate, radius=torch.full_like(radius, torch.nan)))[0] == -1).all()


@on_triton
def test_a_position_beyond_the_row_finds_nothing(seed):
    for count in (2, 12):
        case, gate = asked(seed, count, "l2")
        last = gate.last.clone()
        last[0], last[2] = 7, -8
        wide = replace(gate, last=last, radius=torch.full_like(gate.radius, torch.inf))
        out, route = decide(case, wide)
        assert route[[0, 2]].tolist() == [-1, -1] and (route[[1, 3, 4]] >= 0).all()
        assert torch.equal(out[[0, 2]], case.hidden[[0, 2]])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [1, 6, 20])
@on_triton
def test_against_float64(seed, count, dtype, monkeypatch):
    """Forward and backward, the route decided inside."""
    case, gate = asked(seed, count, dtype=dtype, tokens=19)
    route = decide(case, gate)[1].cpu()
    assert 1 <= (route >= 0).sum() < ROWS
    decided = []

    def through_gate(case):
        with backend.use_backend("triton"):
            out, found = gated_edit_attention(**case.public() | {"route": None}, gate=gate)
        decided.append(found.tolist())
        return out

    monkeypatch.setattr("test_gated_edit_attention_triton.through_operator", through_gate)
    whole = attention_case(torch.Generator(), ROWS, 1, 1, 1, 1, [], [])  # to be filled
    fields = {n: getattr(case, n) for n in case.__dataclass_fields__}
    cpu = {n: v.cpu() if isinstance(v, torch.Tensor) else v for n, v in fields.items()}
    compare(replace(whole, **cpu | {"route": route}), dtype, seed)
    assert decided == [route.tolist()]


@pytest.mark.parametrize("count", [3, 20])
@on_triton
def test_in_place_and_closed(seed, count):
    case, gate = asked(seed, count)
    want, route = decide(case, gate)
    for hidden in (case.hidden.clone(), case.hidden.transpose(0, 1).contiguous().transpose(0, 1)):
        out, found = decide(replace(case, hidden=hidden), gate, inplace=True)
        assert out is hidden and torch.equal(out, want) and torch.equal(found, route)
    closed = replace(gate, radius=torch.full_like(gate.radius, -1.0))
    hidden = case.hidden.clone()
    hidden[0, 0, 0] = torch.nan
    out, found = decide(replace(case, hidden=hidden), closed)
    assert (found == -1).all() and torch.equal(out.view(torch.int32), hidden.view(torch.int32))


@on_triton
def test_many_tokens_to_a_block(seed, monkeypatch):
    """With few multiprocessors a block has the statistics of many tokens to do."""
    from dualedit_kernels.gated_edit_attention import triton_gate

    case, gate = asked(seed, 3, tokens=50)
    want = decide(case, gate)
    for blocks in (1, 20, 10_000):
        monkeypatch.setattr(triton_gate, "processors", lambda tensor, blocks=blocks: blocks)
        found = decide(case, gate)
        assert torch.equal(found[0], want[0]) and torch.equal(found[1], want[1])


@on_triton
def test_heads_too_wide_for_a_tile(seed):
    case, gate = asked(seed, 3, mid=272, num_heads=1)
    want, route = decide(case, gate)
    assert (route >= 0).any() and not torch.equal(want, case.hidden)
    out, found = decide(replace(case, hidden=case.hidden.clone()), gate, inplace=True)
    assert torch.equal(out, want) and torch.equal(found, route)


@on_triton
def test_another_lookup_that_is_forced_decides(seed):
    case, gate = asked(seed, 3)
    with backend.use_backend(gated_edit_attention="triton", nearest_key="reference"), Launches() as seen:
        gated_edit_attention(**case.public() | {"route": None}, gate=gate)
    assert "aten.index.Tensor" in seen.names  # the query is taken out of the states for it


# ------------------------------------------------------------------------------------------------- launches


def launched(case, gate, name="gate"):
    """What the implementation launches, PyTorch's operators too."""
    torch.utils.deterministic.fill_uninitialized_memory = False  # which would be launches of its own
    entry = backend.explain("gated_edit_attention", DEVICE, case.hidden.dtype).implementation
    groups = case.public()
    try:
        with Launches() as seen:
            entry.functions[name](case.hidden, case.span, gate, groups["slots"], groups["weights"])
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = True
    return seen.names


ATTENTION = ["statistics_kernel", "project_kernel", "attend_kernel", "output_kernel"]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("count", [1, FEW, FEW + 1, 300])
@on_triton
def test_launches_of_a_gate(seed, count, metric):
    case, gate = asked(seed, count, metric)
    with backend.use_backend("triton"):
        launched(case, gate)  # a stream's first call makes its counters
        want = [*(["scan_kernel"] if count > FEW else []), *ATTENTION]
        assert launched(case, gate) == want and len(want) == (5 if count > FEW else 4)
        assert launched(case, gate, "gate_") == want


@on_triton
def test_launches_of_a_lookup_and_of_a_route(seed):
    from dualedit_kernels.nearest_key import triton_kernel

    torch.utils.deterministic.fill_uninitialized_memory = False
    for count in (1, FEW, 300):
        case, gate = asked(seed, count)
        query = case.hidden[:, 0].contiguous()
        triton_kernel.nearest_key(query, gate.keys, gate.radius, "l2")
        with Launches() as seen:
            triton_kernel.nearest_key(query, gate.keys, gate.radius, "l2")
        assert seen.names == ["scan_kernel"]
    with backend.use_backend("triton"):
        assert launched(case, case.route, "forward") == ATTENTION


@on_triton
def test_launches_that_are_added_are_seen(seed):
    """The counting itself: one more kernel, and one more operator of PyTorch."""
    from dualedit_kernels.gated_edit_attention import triton_gate

    case, gate = asked(seed, 2)
    opened = triton_gate.open_rows

    def more(hidden, span, route, gate, slots, eps):
        route = opened(hidden, span, route, gate, slots, eps)[0][1]
        return opened(hidden, span, route + 0, None, slots, eps)

    from dualedit_kernels.gated_edit_attention import triton_kernel

    triton_kernel.open_rows = more
    try:
        with backend.use_backend("triton"):
            assert launched(case, gate) == [ATTENTION[0], "aten.add.Tensor", *ATTENTION]
    finally:
        triton_kernel.open_rows = opened


@pytest.mark.parametrize("at_once", [2048, 16])
@pytest.mark.parametrize("metric", METRICS)
@on_triton
def test_whichever_block_is_done_last(seed, metric, at_once):
    """Blocks in random order, several tiles of queries, the same counters again and again.

    at_once: with few, the last block compares in several steps, and a tie must not go to the last of them.
    """
    from dualedit_kernels.nearest_key import triton_kernel

    generator = torch.Generator().manual_seed(seed)
    query, keys = (torch.randn(n, 33, generator=generator) for n in (19, 90))
    keys[50:] = keys[:40]
    radius = torch.full((90,), torch.inf)
    triton_kernel._AT_ONCE, processors = at_once, triton_kernel.processors
    triton_kernel.processors = lambda tensor: 8
    try:
        _any_order(seed, query, keys, radius, metric)
    finally:
        triton_kernel._AT_ONCE, triton_kernel.processors = 2048, processors


def _any_order(seed, query, keys, radius, metric):
    with backend.use_backend("triton"):
        want = nearest_key(query.to(DEVICE), keys.to(DEVICE), radius.to(DEVICE), metric)
    assert (want[0] < 50).all()
    for turn in range(4):
        with backend.use_backend("triton"), in_any_order(seed + turn):
            found = nearest_key(query.to(DEVICE), keys.to(DEVICE), radius.to(DEVICE), metric)
        assert torch.equal(found[0], want[0]) and torch.equal(found[1], want[1])
        counters = [held for held in triton_support._by_stream.values() if held.device.type == DEVICE]
        assert counters and not any(held.any() for held in counters)


def test_launches_of_a_graph_have_counters_of_their_own(monkeypatch):
    """Streams share, graphs never do, and none of them sees a counter that somebody else counts in."""
    state = SimpleNamespace(capturing=False, stream=7)
    like = SimpleNamespace(is_cuda=True, device=torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state.capturing)
    current = lambda device: SimpleNamespace(cuda_stream=state.stream)  # noqa: E731
    monkeypatch.setattr(torch.cuda, "current_stream", current)
    monkeypatch.setattr(triton_support, "_by_stream", {})
    monkeypatch.setattr(triton_support, "_for_graphs", {})
    monkeypatch.setattr(triton_support, "_given", [])
    state.capturing = True
    first = triton_support.counters(like, 3)  # nothing was made before: the fill is part of the graph
    assert first.tolist() == [0, 0, 0] and not triton_support._for_graphs
    state.capturing = False
    here = triton_support.counters(like, 3)
    assert triton_support.counters(like, 5) is here and not here.any()
    more = triton_support.counters(like, 1000)
    assert len(more) >= 1000 and triton_support.counters(like, 3) is more
    state.stream = 8
    there = triton_support.counters(like, 3)
    state.capturing = True
    graphs = [triton_support.counters(like, 3) for _ in range(5)]
    spans = [(t.data_ptr(), t.data_ptr() + t.nbytes) for t in (first, more, there, *graphs)]
    for i, (begin, end) in enumerate(spans):
        assert all(end <= other or begin >= stop for other, stop in spans[i + 1 :])
    assert all(t.tolist() == [0, 0, 0] for t in graphs) and len(triton_support._given) == 5
    left = triton_support.counters(like, len(triton_support._for_graphs[like.device]) + 1)
    assert not left.any() and len(triton_support._given) == 5  # too many for what is left: captured again


def test_arguments_in_groups():
    tensors = [torch.ones(i) for i in range(4)]
    weights = AttentionWeights(torch.ones(12, 5), *tensors[:3], 3, 1e-5)
    assert weights.head == 4 and Slots(*tensors).length is tensors[3]
