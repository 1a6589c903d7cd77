"""gated_edit_attention against float64, forward and backward, for every implementation that runs here."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from dualedit_kernels import Gate, backend, encode_keys, fold_query, gated_edit_attention
from dualedit_kernels.gated_edit_attention import eager
from dualedit_kernels.gated_edit_attention.reference import gated_edit_attention_reference
from dualedit_kernels.testing import AttentionCase, assert_as_exact, attention_case, sample_shape

IMPLEMENTATIONS = [
    entry.name
    for entry in backend.families()["gated_edit_attention"]
    if entry.refuses("cpu", torch.float32) is None
]
OPS = torch.ops.dualedit_kernels
CASES = {
    "mixed": dict(rows=5, tokens=19, dim=24, mid=16, num_heads=4, lengths=[7, 1, 30], route=[2, -1, 0, 1, 2]),
    "one slot": dict(rows=4, tokens=12, dim=16, mid=8, num_heads=1, lengths=[9], route=[0, 0, 0, 0]),
    "one token": dict(rows=1, tokens=1, dim=8, mid=8, num_heads=2, lengths=[1], route=[0], span=1.1),
    "whole rows": dict(
        rows=3, tokens=10, dim=20, mid=12, num_heads=3, lengths=[5, 5], route=[1, 0, 1], span=1.1
    ),
    "empty slot": dict(rows=3, tokens=6, dim=8, mid=8, num_heads=2, lengths=[0, 4], route=[0, 1, -1]),
}
CLOSED = {
    "all closed": dict(rows=3, tokens=6, dim=8, mid=8, num_heads=2, lengths=[4], route=[-1, -1, -1]),
    "no span": dict(rows=3, tokens=6, dim=8, mid=8, num_heads=2, lengths=[4], route=[0, 0, 0], span=0.0),
    "no slots": dict(rows=3, tokens=6, dim=8, mid=8, num_heads=2, lengths=[], route=[-1, -1, -1]),
    "no rows": dict(rows=0, tokens=6, dim=8, mid=8, num_heads=2, lengths=[4], route=[]),
    "no tokens": dict(rows=2, tokens=0, dim=8, mid=8, num_heads=2, lengths=[4], route=[0, 0]),
}


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request, poison):
    with backend.use_backend(gated_edit_attention=request.param):
        yield request.param


def gradients(case: AttentionCase, function, cotangent):
    case = case.require_grad()
    leaves = [getattr(case, n) for n in case.DIFFERENTIABLE]
    out = function(case)
    return out.detach(), torch.autograd.grad(out, leaves, cotangent, materialize_grads=True)


def through_operator(case):
    return gated_edit_attention(**case.public())[0]


def through_reference(case):
    return gated_edit_attention_reference(**case.public())


def compare(case, dtype, generator, factor=2.0):
    cotangent = torch.randn(case.hidden.shape, generator=generator, dtype=torch.float64)
    rounded = case.to(dtype)  # everyone starts from the same rounded inputs
    exact = gradients(rounded.to(torch.float64), through_reference, cotangent.to(dtype).double())
    plain = gradients(rounded.to(dtype), through_reference, cotangent.to(dtype))
    actual = gradients(rounded.to(dtype), through_operator, cotangent.to(dtype))
    assert actual[0].dtype == dtype
    assert_as_exact("out", actual[0], plain[0], exact[0], factor)
    # Sums that cancel are as exact as what they add up, not as what is left.
    scale = max(float(grad.abs().max()) for grad in exact[1] if grad.numel())
    floor = 0.0 if dtype == torch.bfloat16 else 4 * torch.finfo(dtype).eps * scale
    for name, got, low, true in zip(case.DIFFERENTIABLE, actual[1], plain[1], exact[1], strict=True):
        assert_as_exact(f"d_{name}", got, low, true, factor, floor)
    unchanged = ~(case.span & (case.route >= 0)[:, None])
    assert torch.equal(actual[0][unchanged], rounded.hidden[unchanged])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_against_float64(implementation, generator, name, dtype):
    compare(attention_case(generator, **CASES[name]), dtype, generator, factor=3.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_rows_in_one_piece(poison, generator, dtype):
    """Tokens that lie side by side, in memory with gaps, too: what is around them stays."""
    span = torch.zeros(5, 23, dtype=torch.bool)
    for row, (first, last) in enumerate([(0, 23), (3, 9), (22, 23), (1, 4), (7, 20)]):
        span[row, first:last] = True
    sizes = dict(rows=5, tokens=23, dim=24, mid=16, num_heads=2, lengths=[7, 1, 30], route=[2, 0, -1, 1, 0])
    case = attention_case(generator, span=span, **sizes).to(dtype)
    exact = through_reference(case.to(torch.float64))
    plain = through_reference(case)
    for name in [entry.name for entry in backend.families()["gated_edit_attention"]]:
        if _refused(name, dtype):
            continue
        with backend.use_backend(gated_edit_attention=name):
            out = through_operator(case)
            wide = torch.zeros(5, 23, 48, dtype=dtype)
            wide[:, :, ::2] = case.hidden
            gated_edit_attention(**case.public() | {"hidden": wide[:, :, ::2]}, inplace=True)
        assert_as_exact(name, out, plain, exact, 3.0)
        assert_as_exact(f"{name} strided", wide[:, :, ::2], plain, exact, 3.0)
        assert not wide[:, :, 1::2].any()
        unchanged = ~(case.span & (case.route >= 0)[:, None])
        assert torch.equal(out[unchanged], case.hidden[unchanged])


def _refused(name, dtype):
    entries = {entry.name: entry for entry in backend.families()["gated_edit_attention"]}
    return entries[name].refuses("cpu", dtype) is not None


def test_random_shapes(implementation, generator):
    for _ in range(12):
        shape = sample_shape(generator)
        slots = shape.pop("slots")
        lengths = torch.randint(0, 33, (slots,), generator=generator).tolist()
        route = torch.randint(-1, slots, (shape["rows"],), generator=generator).tolist()
        print(shape, lengths, route)
        compare(
            attention_case(generator, lengths=lengths, route=route, **shape), torch.float32, generator, 4.0
        )


@pytest.mark.parametrize("name", CLOSED)
def test_closed_is_bit_identical(implementation, generator, name):
    case = attention_case(generator, **CLOSED[name]).to(torch.bfloat16)
    if case.hidden.numel():
        case.hidden[0, 0, 0] = torch.nan  # even a NaN passes through
    out, route = gated_edit_attention(**case.public())
    assert torch.equal(out.view(torch.int16), case.hidden.view(torch.int16))
    assert (out is case.hidden) == (not (case.route >= 0).any())  # nothing routed, nothing copied
    assert torch.equal(route, case.route)
    fresh = through_operator(case.to(torch.bfloat16).require_grad())
    assert torch.equal(fresh.view(torch.int16), case.hidden.view(torch.int16)) and fresh.requires_grad
    grads = gradients(case, through_operator, torch.ones_like(case.hidden))[1]
    assert torch.equal(grads[0], torch.ones_like(case.hidden))
    assert all(not grad.any() for grad in grads[1:])


def test_closed_rows_do_not_see_open_ones(implementation, generator):
    """A NaN in an open row, or in another edit's keys, must not leak."""
    case = attention_case(generator, **CASES["mixed"]).to(torch.float32)
    clean = through_operator(case)
    case.hidden[0] = torch.nan
    case.k[7:8] = torch.nan  # slot 1, which only row 3 uses
    out = through_operator(case)
    assert torch.equal(out[1], case.hidden[1])
    assert torch.isfinite(out[[1, 2]]).all() and torch.isnan(out[3][case.span[3]]).all()
    torch.testing.assert_close(out[2], clean[2], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["mixed", "whole rows"])
def test_chunks_agree(generator, name, monkeypatch):
    """The batched implementation gives the same whatever the budget for scores."""
    case = attention_case(generator, **CASES[name])
    cotangent = torch.randn(case.hidden.shape, generator=generator, dtype=torch.float64)
    whole = gradients(case, through_operator, cotangent)
    for budget in (1, 600, 3000):
        monkeypatch.setattr(eager, "_SCORES", budget)
        parts = gradients(case, through_operator, cotangent)
        for got, want in zip([parts[0], *parts[1]], [whole[0], *whole[1]], strict=True):
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["mixed", "one token", "empty slot"])
def test_gradcheck(implementation, generator, name):
    small = CASES[name] | {
        "tokens": min(5, CASES[name]["tokens"]),
        "dim": 6,
        "mid": CASES[name]["num_heads"] * 2,
    }
    case = attention_case(generator, **small).require_grad()
    inputs = tuple(getattr(case, n) for n in case.DIFFERENTIABLE)

    def function(*tensors):
        return gated_edit_attention(**case.with_tensors(*tensors).public())[0]

    assert torch.autograd.gradcheck(function, inputs)


def test_only_needed_gradients(implementation, generator):
    case = attention_case(generator, **CASES["mixed"])
    full = dict(
        zip(
            case.DIFFERENTIABLE,
            gradients(case, through_operator, torch.ones_like(case.hidden))[1],
            strict=True,
        )
    )
    for name in case.DIFFERENTIABLE:
        fresh = case.to(torch.float64)
        leaf = getattr(fresh, name).requires_grad_(True)
        torch.testing.assert_close(torch.autograd.grad(through_operator(fresh).sum(), leaf)[0], full[name])


def test_inplace(implementation, generator):
    case = attention_case(generator, **CASES["mixed"]).to(torch.float32)
    want = through_operator(case)
    hidden = case.hidden.clone()
    out, _ = gated_edit_attention(**case.public() | {"hidden": hidden}, inplace=True)
    assert out is hidden and torch.equal(hidden, want)
    wide = torch.zeros(5, 19, 48)
    strided = wide[:, :, ::2]
    strided.copy_(case.hidden)
    gated_edit_attention(**case.public() | {"hidden": strided}, inplace=True)
    torch.testing.assert_close(strided, want)
    assert not wide[:, :, 1::2].any()
    with pytest.raises(ValueError, match="inplace=True cannot record a gradient"):
        gated_edit_attention(**case.require_grad().public(), inplace=True)


def test_gate_is_nearest_key_of_the_last_token(implementation, generator):
    case = attention_case(generator, **CASES["mixed"]).to(torch.float32)
    last = torch.tensor([18, 3, 0, 7, 18])
    asked = case.hidden[torch.arange(5), last]
    gate = Gate(last, torch.stack([asked[2], asked[3], asked[0]]), torch.tensor([1e-3, 1e-3, 1e-3]), "cosine")
    arguments = case.public()
    arguments.pop("route")
    out, route = gated_edit_attention(**arguments, gate=gate)
    assert route.tolist() == [2, -1, 0, 1, -1]
    want, _ = gated_edit_attention(**arguments, route=route)
    assert torch.equal(out, want)
    coded = replace(gate, codes=encode_keys(gate.keys, "cosine"))
    assert torch.equal(gated_edit_attention(**arguments, gate=coded)[0], want)
    none = replace(gate, radius=torch.full((3,), -1.0))
    hidden, route = gated_edit_attention(**arguments, gate=none)
    assert hidden is case.hidden and route.tolist() == [-1] * 5


def test_gate_as_an_operator(implementation, generator):
    """What a compiled program calls: differentiable, and the same as the lookup and then the route."""
    case = attention_case(generator, **CASES["mixed"])
    last = torch.tensor([18, 3, 0, 7, 18])
    keys = torch.stack([case.hidden[0, 0], case.hidden[2, 0], case.hidden[4, 18]])
    gate = Gate(last, keys, torch.tensor([1e-3, 1e-3, 1e-3]), "cosine")
    arguments = {name: value for name, value in case.public().items() if name != "route"}
    route = gated_edit_attention(**arguments, gate=gate)[1]
    assert route.tolist() == [-1, -1, 1, -1, 2]
    decide = (gate.last, gate.keys, gate.radius, gate.metric)
    plain = (case.hidden, case.span, *decide, *case.args()[3:])
    torch.library.opcheck(OPS.gated_edit_attention_gate_.default, plain)
    cotangent = torch.randn(case.hidden.shape, generator=generator, dtype=torch.float64)
    want = gradients(replace(case, route=route), through_operator, cotangent)
    case = case.require_grad()
    torch.library.opcheck(OPS.gated_edit_attention_gate.default, (case.hidden, *plain[1:]))
    inputs = [getattr(case, n) for n in case.DIFFERENTIABLE]

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(*tensors):
        changed = case.with_tensors(*tensors)
        return gated_edit_attention(**changed.public() | {"route": None}, gate=gate)

    out, found = compiled(*inputs)
    assert torch.equal(found, route)
    grads = torch.autograd.grad(out, inputs, cotangent)
    for got, true in zip([out.detach(), *grads], [want[0], *want[1]], strict=True):
        torch.testing.assert_close(got, true)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"last": torch.zeros(4, dtype=torch.int64)}, ValueError, "gate.last has shape"),
        ({"keys": torch.ones(3, 23)}, ValueError, "gate.keys has shape"),
        ({"radius": torch.ones(2)}, ValueError, "gate.radius has shape"),
        ({"metric": "dot"}, ValueError, "gate.metric='dot' is unknown"),
        ({"keys": torch.ones(2, 24), "radius": torch.ones(2)}, ValueError, "2 keys, there are 3 slots"),
    ],
)
def test_errors_name_what_is_wrong_with_a_gate(generator, change, error, words):
    case = attention_case(generator, **CASES["mixed"]).to(torch.float32)
    gate = Gate(torch.zeros(5, dtype=torch.int64), torch.ones(3, 24), torch.ones(3))
    with pytest.raises(error, match=words):
        gated_edit_attention(**case.public() | {"route": None}, gate=replace(gate, **change))


def test_other_dtypes_are_converted(implementation, generator):
    """Adapters kept in fp32 on a bf16 model: the result is the model's dtype, the gradients the adapters'."""
    wide = attention_case(generator, **CASES["mixed"]).to(torch.float32)
    narrow = wide.to(torch.bfloat16)
    arguments = wide.require_grad().public() | {"hidden": narrow.hidden}
    out, _ = gated_edit_attention(**arguments)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, through_operator(narrow))
    out.float().sum().backward()
    assert wide.w_q.grad.dtype == wide.k.grad.dtype == torch.float32


def test_autocast_does_not_reach_inside(implementation, generator):
    case = attention_case(generator, **CASES["mixed"]).to(torch.float32)
    want = through_operator(case)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(through_operator(case), want)


def test_opcheck(implementation, generator):
    for name in ("mixed", "one token"):
        case = attention_case(generator, **CASES[name]).require_grad()
        torch.library.opcheck(OPS.gated_edit_attention.default, case.args())
        case = case.to(torch.float64)
        torch.library.opcheck(OPS.gated_edit_attention_.default, case.args())
    case = attention_case(generator, **CLOSED["all closed"])
    torch.library.opcheck(OPS.gated_edit_attention.default, case.require_grad().args())


def test_compiles_with_gradients(implementation, generator):
    case = attention_case(generator, **CASES["mixed"])
    cotangent = torch.randn(case.hidden.shape, generator=generator, dtype=torch.float64)
    want = gradients(case, through_operator, cotangent)
    inputs = [getattr(case, n) for n in case.DIFFERENTIABLE]

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(*tensors):
        public = case.with_tensors(*tensors).public()
        return gated_edit_attention(**public)[0] * 1.0

    out = compiled(*inputs)
    grads = torch.autograd.grad(out, inputs, cotangent)
    for got, true in zip([out.detach(), *grads], [want[0], *want[1]], strict=True):
        torch.testing.assert_close(got, true)


def test_fold_query_is_the_chain(generator):
    dim, mid = 20, 12

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_(True)

    parts = (normal(dim), normal(dim), normal(mid, dim), normal(mid), normal(mid, mid), normal(mid))
    x = normal(7, dim)
    want = F.linear(F.linear(F.layer_norm(x, (dim,), *parts[:2], 1e-5), *parts[2:4]), *parts[4:])
    w_q, b_q = fold_query(*parts)
    torch.testing.assert_close(F.linear(F.layer_norm(x, (dim,), eps=1e-5), w_q, b_q), want)
    assert torch.autograd.gradcheck(fold_query, parts)
    bare_w, bare_b = fold_query(parts[0], None, parts[2], None, parts[4], None)
    assert torch.equal(bare_w, w_q) and not bare_b.any()


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"hidden": torch.ones(5, 24)}, ValueError, "hidden has shape"),
        ({"span": torch.ones(5, 19)}, TypeError, "span has dtype"),
        ({"span": torch.ones(5, 18, dtype=torch.bool)}, ValueError, "span has shape"),
        ({"k": torch.ones(38, 15)}, ValueError, "k has shape"),
        ({"v": torch.ones(37, 16)}, ValueError, "v has shape"),
        ({"length": torch.ones(2, dtype=torch.int64)}, ValueError, "length has shape"),
        ({"b_o": torch.ones(23)}, ValueError, "b_o has shape"),
        ({"num_heads": 3}, ValueError, "num_heads=3 does not divide M=16"),
        ({"route": None}, ValueError, "exactly one of route and gate"),
        ({"route": torch.zeros(5, dtype=torch.int32)}, TypeError, "route has dtype"),
        ({"route": torch.full((5,), 3)}, IndexError, "route holds 3, but there are 3 slots"),
    ],
)
def test_errors_name_the_argument(generator, change, error, words):
    case = attention_case(generator, **CASES["mixed"]).to(torch.float32)
    with pytest.raises(error, match=words):
        gated_edit_attention(**replace(case, **change).public())
