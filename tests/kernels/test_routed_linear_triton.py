"""routed_linear in Triton against float64, forward and backward, on the GPU or in the interpreter."""

import pytest
import torch
from interpreter import DEVICE, on_triton

from dualedit_kernels import Full, LowRank, backend, routed_linear
from dualedit_kernels.routed_linear.reference import routed_full_reference, routed_low_rank_reference
from dualedit_kernels.testing import assert_as_exact, rounding_of_sums

# rows' slots, tokens, input, output, rank, slots
CASES = {
    "mixed": ([1, -1, 2, 1, 0], 19, 40, 77, 3, 3),
    "decode": ([0, 1, -1], 1, 130, 65, 8, 2),
    "split input": ([0, -1], 1, 1100, 20, 5, 1),
    "rank 1": ([2, 2], 5, 9, 11, 1, 3),
    "rank 64": ([0, -1, 0], 17, 33, 24, 64, 1),
    "rank 70": ([1], 3, 20, 20, 70, 2),
    "all closed": ([-1, -1], 7, 12, 10, 4, 2),
    "no slots": ([-1, -1], 7, 12, 10, 4, 0),
    "no rows": ([], 7, 12, 10, 4, 2),
    "beyond a tile": ([0], 70, 24, 140, 4, 1),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def inputs(seed, kind, case, dtype):
    index, tokens, size, out, rank, slots = CASES[case]
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0):
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(dtype)

    tensors = {"base": normal(len(index), tokens, out), "x": normal(len(index), tokens, size)}
    if kind == "low_rank":
        values = {"down": normal(slots, rank, size, scale=size**-0.5), "up": normal(slots, out, rank)}
    else:
        values = {"full": normal(slots, out, size, scale=size**-0.5), "bias": normal(out)}
    cotangent = normal(len(index), tokens, out)
    return tensors | values, torch.tensor(index, dtype=torch.int64), cotangent


def through_operator(t, index):
    values = Full(t["full"]) if "full" in t else LowRank(t["down"], t["up"])
    with backend.use_backend(routed_linear="triton"):
        return routed_linear(t["x"], None, t.get("bias"), values, index, base=t["base"])


def through_reference(t, index):
    if "full" in t:
        return routed_full_reference(t["base"], t["x"], t["full"], t["bias"], index)
    return routed_low_rank_reference(t["base"], t["x"], t["down"], t["up"], index)


def gradients(tensors, function, index, cotangent):
    leaves = {name: value.detach().clone().requires_grad_(True) for name, value in tensors.items()}
    out = function(leaves, index)
    with backend.use_backend(routed_linear="triton"):
        grads = torch.autograd.grad(out, list(leaves.values()), cotangent, materialize_grads=True)
    return out.detach(), grads


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["low_rank", "full"])
@pytest.mark.parametrize("case", CASES)
@on_triton
def test_against_float64(seed, case, kind, dtype):
    tensors, index, cotangent = inputs(seed, kind, case, dtype)
    wide = {n: t.double() for n, t in tensors.items()}
    exact = gradients(wide, through_reference, index, cotangent.double())
    plain = gradients(tensors, through_reference, index, cotangent)
    there = {n: t.to(DEVICE) for n, t in tensors.items()}
    actual = gradients(there, through_operator, index.to(DEVICE), cotangent.to(DEVICE))
    assert actual[0].dtype == dtype
    assert_as_exact("y", actual[0].cpu(), plain[0], exact[0], 2.0)
    # Routed rows that share a slot may be added up together or one by one.
    sizes = {n: t.abs() for n, t in wide.items()}
    sizes = gradients(sizes, through_reference, index, cotangent.double().abs())
    longest = max(len(index) * tensors["x"].shape[1], *tensors["x"].shape[2:], tensors["base"].shape[2])
    for leaf, got, low, true, size in zip(tensors, actual[1], plain[1], exact[1], sizes[1], strict=True):
        assert_as_exact(f"d_{leaf}", got.cpu(), low, true, 3.0, rounding_of_sums(longest, dtype, size))


@pytest.mark.parametrize("kind", ["low_rank", "full"])
@on_triton
def test_unrouted_rows_are_bit_identical(seed, kind):
    tensors, index, _ = inputs(seed, kind, "mixed", torch.bfloat16)
    closed = index < 0
    tensors["base"][closed.nonzero()[0, 0], 0, 0] = torch.nan
    tensors["x"][closed] = torch.nan
    for rows in (index, torch.full_like(index, -1), index + 100):  # beyond the last slot: no edit, no crash
        closed = (rows < 0) | (rows > 2)
        y = through_operator({n: t.to(DEVICE) for n, t in tensors.items()}, rows.to(DEVICE)).cpu()
        assert torch.equal(y[closed].view(torch.int16), tensors["base"][closed].view(torch.int16))
        assert torch.isfinite(y[~closed]).all()


@pytest.mark.parametrize("kind", ["low_rank", "full"])
@on_triton
def test_closed_rows_do_not_reach_gradients(seed, kind):
    tensors, index, cotangent = inputs(seed, kind, "mixed", torch.float32)
    want = gradients(
        {n: t.to(DEVICE) for n, t in tensors.items()},
        through_operator,
        index.to(DEVICE),
        cotangent.to(DEVICE),
    )
    tensors["x"][index < 0] = torch.nan
    got = gradients(
        {n: t.to(DEVICE) for n, t in tensors.items()},
        through_operator,
        index.to(DEVICE),
        cotangent.to(DEVICE),
    )
    for name, a, b in zip(tensors, got[1], want[1], strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("kind", ["low_rank", "full"])
@on_triton
def test_base_of_another_dtype_and_strides(seed, kind):
    tensors, index, cotangent = inputs(seed, kind, "mixed", torch.bfloat16)
    tensors["base"] = tensors["base"].float() + 1e-4
    want = gradients(
        {n: t.double() for n, t in tensors.items()}, through_reference, index, cotangent.double()
    )
    plain = gradients(tensors, through_reference, index, cotangent.float())
    there = {n: t.to(DEVICE) for n, t in tensors.items()}
    there["x"] = there["x"].transpose(0, 1).contiguous().transpose(0, 1)
    got = gradients(there, through_operator, index.to(DEVICE), cotangent.float().to(DEVICE))
    assert got[0].dtype == torch.float32 and got[1][0].dtype == torch.float32
    assert_as_exact("y", got[0].cpu(), plain[0], want[0], 2.0)
    for name, a, low, true in zip(tensors, got[1], plain[1], want[1], strict=True):
        assert_as_exact(f"d_{name}", a.cpu(), low, true, 3.0)


@pytest.mark.parametrize("kind", ["low_rank", "full"])
@on_triton
def test_only_needed_gradients(seed, kind):
    tensors, index, cotangent = inputs(seed, kind, "mixed", torch.float32)
    there = {n: t.to(DEVICE) for n, t in tensors.items()}
    index, cotangent = index.to(DEVICE), cotangent.to(DEVICE)
    whole = dict(zip(tensors, gradients(there, through_operator, index, cotangent)[1], strict=True))
    for name in tensors:
        leaf = there[name].detach().clone().requires_grad_(True)
        out = through_operator({n: t.detach() for n, t in there.items()} | {name: leaf}, index)
        with backend.use_backend(routed_linear="triton"):
            assert torch.equal(torch.autograd.grad(out, leaf, cotangent)[0], whole[name]), name
