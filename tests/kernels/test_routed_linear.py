"""routed_linear against float64, forward and backward, for every implementation that runs here."""

import pytest
import torch
import torch.nn.functional as F

from dualedit_kernels import Full, LowRank, backend, routed_linear
from dualedit_kernels.routed_linear.reference import routed_full_reference, routed_low_rank_reference
from dualedit_kernels.testing import assert_as_exact, rounding_of_sums

IMPLEMENTATIONS = [
    entry.name for entry in backend.families()["routed_linear"] if entry.refuses("cpu", torch.float32) is None
]
INDICES = {
    "mixed": [1, -1, 2, 1, 0],
    "all closed": [-1] * 5,
    "one slot": [2] * 5,
    "one row": [0],
    "no rows": [],
}


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request, poison):
    with backend.use_backend(routed_linear=request.param):
        yield request.param


def inputs(generator, kind, rows, tokens=7, size=11, out=13, rank=3, slots=3):
    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    tensors = {"x": normal(rows, tokens, size), "weight": normal(out, size), "bias": normal(out)}
    if kind == "low_rank":
        return tensors | {"down": normal(slots, rank, size), "up": normal(slots, out, rank)}
    return tensors | {"full": normal(slots, out, size)}


def values_of(tensors):
    return Full(tensors["full"]) if "full" in tensors else LowRank(tensors["down"], tensors["up"])


def through_operator(tensors, index):
    return routed_linear(tensors["x"], tensors["weight"], tensors["bias"], values_of(tensors), index)


def through_reference(tensors, index):
    base = F.linear(tensors["x"], tensors["weight"], tensors["bias"])
    if "full" in tensors:
        return routed_full_reference(base, tensors["x"], tensors["full"], tensors["bias"], index)
    return routed_low_rank_reference(base, tensors["x"], tensors["down"], tensors["up"], index)


def gradients(tensors, function, index, cotangent):
    leaves = {name: value.detach().clone().requires_grad_(True) for name, value in tensors.items()}
    out = function(leaves, index)
    return out.detach(), torch.autograd.grad(out, list(leaves.values()), cotangent, materialize_grads=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["low_rank", "full"])
@pytest.mark.parametrize("name", INDICES)
def test_against_float64(implementation, generator, name, kind, dtype):
    index = torch.tensor(INDICES[name], dtype=torch.int64)
    tensors = {n: t.to(dtype) for n, t in inputs(generator, kind, len(index)).items()}
    cotangent = torch.randn(len(index), 7, 13, generator=generator).to(dtype)
    wide = {n: t.double() for n, t in tensors.items()}
    exact = gradients(wide, through_reference, index, cotangent.double())
    plain = gradients(tensors, through_reference, index, cotangent)
    actual = gradients(tensors, through_operator, index, cotangent)
    assert actual[0].dtype == dtype
    assert_as_exact("y", actual[0], plain[0], exact[0], 3.0)
    # Routed rows that share a slot may be added up together or one by one.
    sizes = {n: t.abs() for n, t in wide.items()}
    sizes = gradients(sizes, through_reference, index, cotangent.double().abs())
    names = zip(tensors, actual[1], plain[1], exact[1], sizes[1], strict=True)
    for leaf, got, low, true, size in names:
        floor = rounding_of_sums(max(len(index) * 7, 13), dtype, size)
        assert_as_exact(f"d_{leaf}", got, low, true, 3.0, floor)


def test_the_bound_of_sums_catches_faults(generator):
    """The floor is for another order of adding, not for a term that is missing or a scale that is off."""
    left, right = (torch.randn(35, n, generator=generator) for n in (13, 11))
    plain, exact = left.t() @ right, left.t().double() @ right.double()
    size = left.t().double().abs() @ right.double().abs()
    floor = rounding_of_sums(35, torch.float32, size)
    assert_as_exact("as it is", plain, plain, exact, 3.0, floor)
    backwards = torch.stack([a[:, None] * b for a, b in zip(left.flip(0), right.flip(0), strict=True)]).sum(0)
    assert_as_exact("backwards", backwards, plain, exact, 3.0, floor)
    for wrong in (left[1:].t() @ right[1:], plain * (1 + 1e-4), plain.to(torch.bfloat16).float()):
        with pytest.raises(AssertionError, match="error"):
            assert_as_exact("wrong", wrong, plain, exact, 3.0, floor)


@pytest.mark.parametrize("kind", ["low_rank", "full"])
def test_unrouted_rows_are_bit_identical(implementation, generator, kind):
    index = torch.tensor([-1, 1, -1, 0])
    tensors = {n: t.to(torch.bfloat16) for n, t in inputs(generator, kind, 4).items()}
    base = F.linear(tensors["x"], tensors["weight"], tensors["bias"])
    assert torch.equal(through_operator(tensors, index)[index < 0], base[index < 0])
    base[0, 0, 0] = torch.nan
    given = routed_linear(tensors["x"], None, tensors["bias"], values_of(tensors), index, base=base)
    assert torch.equal(given[index < 0].view(torch.int16), base[index < 0].view(torch.int16))
    assert torch.isfinite(given[index >= 0]).all() and given.data_ptr() != base.data_ptr()


@pytest.mark.parametrize("kind", ["low_rank", "full"])
def test_base_is_the_layers_own_output(implementation, generator, kind):
    """A base that is not x @ weight.T (a quantised layer, say) is kept for LowRank and replaced for Full."""
    index = torch.tensor([1, -1, 0])
    tensors = inputs(generator, kind, 3)
    base = torch.randn(3, 7, 13, generator=generator, dtype=torch.float64).requires_grad_(True)
    y = routed_linear(tensors["x"], None, None, values_of(tensors), index, base=base)
    grad = torch.autograd.grad(y.sum(), base)[0]
    if kind == "low_rank":
        want = base[0] + tensors["x"][0] @ tensors["down"][1].t() @ tensors["up"][1].t()
        assert torch.equal(grad, torch.ones_like(base))
    else:
        want = tensors["x"][0] @ tensors["full"][1].t()
        assert grad[1].eq(1).all() and not grad[[0, 2]].any()
    torch.testing.assert_close(y[0], want)
    assert torch.equal(y[1], base[1])


@pytest.mark.parametrize("kind", ["low_rank", "full"])
def test_gradcheck(implementation, generator, kind):
    index = torch.tensor([1, -1, 1, 0])
    tensors = inputs(generator, kind, 4, tokens=2, size=3, out=4, rank=2, slots=2)
    leaves = [t.requires_grad_(True) for t in tensors.values()]
    assert torch.autograd.gradcheck(
        lambda *given: through_operator(dict(zip(tensors, given, strict=True)), index), leaves
    )


@pytest.mark.parametrize("kind", ["low_rank", "full"])
def test_values_of_another_dtype(implementation, generator, kind):
    index = torch.tensor([1, -1, 0])
    tensors = {n: t.float() for n, t in inputs(generator, kind, 3).items()}
    narrow = {n: t.to(torch.bfloat16) for n, t in tensors.items()}
    mixed = narrow | {n: t.requires_grad_(True) for n, t in tensors.items() if n in ("down", "up", "full")}
    y = through_operator(mixed, index)
    assert y.dtype == torch.bfloat16 and torch.equal(y, through_operator(narrow, index))
    y.float().sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in mixed.values() if t.requires_grad)


def test_opcheck(implementation, generator):
    for rows in INDICES.values():
        index = torch.tensor(rows, dtype=torch.int64)
        for kind in ("low_rank", "full"):
            tensors = {n: t.requires_grad_(True) for n, t in inputs(generator, kind, len(rows)).items()}
            base = torch.randn(len(rows), 7, 13, generator=generator, dtype=torch.float64, requires_grad=True)
            if kind == "full":
                arguments = (base, tensors["x"], tensors["full"], tensors["bias"], index)
                torch.library.opcheck(torch.ops.dualedit_kernels.routed_full.default, arguments)
            else:
                arguments = (base, tensors["x"], tensors["down"], tensors["up"], index)
                torch.library.opcheck(torch.ops.dualedit_kernels.routed_low_rank.default, arguments)


@pytest.mark.parametrize("kind", ["low_rank", "full"])
def test_compiles_with_gradients(implementation, generator, kind):
    index = torch.tensor([1, -1, 0])
    tensors = inputs(generator, kind, 3)
    cotangent = torch.randn(3, 7, 13, generator=generator, dtype=torch.float64)
    want = gradients(tensors, through_operator, index, cotangent)
    compiled = torch.compile(through_operator, fullgraph=True, backend="aot_eager")
    got = gradients(tensors, compiled, index, cotangent)
    for a, b in zip([got[0], *got[1]], [want[0], *want[1]], strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"x": torch.ones(3, 11)}, ValueError, "x has shape"),
        ({"weight": None}, ValueError, "weight and base are both None"),
        ({"weight": torch.ones(13, 12)}, ValueError, "weight has shape"),
        ({"bias": torch.ones(12)}, ValueError, "bias has shape"),
        ({"base": torch.ones(3, 7, 12)}, ValueError, "base has shape"),
        ({"index": torch.zeros(3)}, TypeError, "index has dtype"),
        ({"index": torch.full((3,), 3)}, IndexError, "index holds 3, but there are 3 values"),
        (
            {"values": LowRank(torch.ones(3, 2, 10), torch.ones(3, 13, 2))},
            ValueError,
            "values.down has shape",
        ),
        ({"values": LowRank(torch.ones(3, 2, 11), torch.ones(3, 13, 1))}, ValueError, "values.up has shape"),
        ({"values": Full(torch.ones(3, 12, 11))}, ValueError, "values.weight has shape"),
        ({"values": torch.ones(3)}, TypeError, "values is Tensor"),
    ],
)
def test_errors_name_the_argument(generator, change, error, words):
    tensors = {n: t.float() for n, t in inputs(generator, "low_rank", 3).items()}
    arguments = dict(
        x=tensors["x"],
        weight=tensors["weight"],
        bias=None,
        values=values_of(tensors),
        index=torch.tensor([0, 1, -1]),
    )
    with pytest.raises(error, match=words):
        routed_linear(**arguments | change)


@pytest.mark.parametrize("kind", ["low_rank", "full"])
def test_nothing_routed_copies_nothing(implementation, generator, kind):
    index = torch.full((3,), -1)
    tensors = inputs(generator, kind, 3)
    base = torch.randn(3, 7, 13, generator=generator, dtype=torch.float64)
    assert routed_linear(tensors["x"], None, None, values_of(tensors), index, base=base) is base
    x = tensors["x"].requires_grad_(True)
    y = routed_linear(x, None, None, values_of(tensors), index, base=base)
    assert y is not base and torch.equal(y, base)
    assert not torch.autograd.grad(y.sum(), x)[0].any()
