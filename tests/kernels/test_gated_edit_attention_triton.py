"""gated_edit_attention in Triton against float64, forward and backward, on the GPU or in the interpreter."""

from dataclasses import replace

import pytest
import torch
from interpreter import DEVICE, on_triton

from dualedit_kernels import Gate, backend, gated_edit_attention
from dualedit_kernels.gated_edit_attention.reference import gated_edit_attention_reference
from dualedit_kernels.testing import assert_as_exact, attention_case, max_error, sample_shape

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CASES = {
    "mixed": dict(rows=5, tokens=19, dim=24, mid=32, num_heads=2, lengths=[7, 1, 40], route=[2, -1, 0, 1, 2]),
    "one token": dict(rows=1, tokens=1, dim=8, mid=16, num_heads=1, lengths=[1], route=[0], span=1.1),
    "head 80": dict(rows=2, tokens=5, dim=40, mid=80, num_heads=1, lengths=[9], route=[0, 0]),
    "head 128": dict(rows=1, tokens=6, dim=16, mid=256, num_heads=2, lengths=[70], route=[0], span=1.1),
    "two tiles": dict(rows=1, tokens=70, dim=136, mid=48, num_heads=3, lengths=[33], route=[0]),
    "empty slots": dict(
        rows=4, tokens=6, dim=8, mid=16, num_heads=1, lengths=[0, 4, 0, 3], route=[0, 1, 2, 3]
    ),
}
CLOSED = {
    "all closed": dict(rows=3, tokens=6, dim=8, mid=8, num_heads=2, lengths=[4], route=[-1, -1, -1]),
    "beyond the last slot": dict(rows=3, tokens=6, dim=8, mid=8, num_heads=2, lengths=[4], route=[1, 7, -5]),
    "no span": dict(rows=3, tokens=6, dim=8, mid=8, num_heads=2, lengths=[4], route=[0, 0, 0], span=0.0),
    "no slots": dict(rows=3, tokens=6, dim=8, mid=8, num_heads=2, lengths=[], route=[-1, -1, -1]),
    "no rows": dict(rows=0, tokens=6, dim=8, mid=8, num_heads=2, lengths=[4], route=[]),
    "no tokens": dict(rows=2, tokens=0, dim=8, mid=8, num_heads=2, lengths=[4], route=[0, 0]),
}


def sample(seed, case, **changes):
    return attention_case(torch.Generator().manual_seed(seed), **case | changes)


def there(case):
    """The case on the device where Triton runs."""
    tensors = {n: getattr(case, n) for n in case.__dataclass_fields__}
    return replace(case, **{n: t.to(DEVICE) for n, t in tensors.items() if isinstance(t, torch.Tensor)})


def through_operator(case):
    with backend.use_backend(gated_edit_attention="triton"):
        return gated_edit_attention(**case.public())[0]


def through_reference(case):
    return gated_edit_attention_reference(**case.public())


def gradients(case, function, cotangent):
    case = case.require_grad()
    out = function(case)
    leaves = [getattr(case, n) for n in case.DIFFERENTIABLE]
    with backend.use_backend(gated_edit_attention="triton"):
        grads = torch.autograd.grad(out, leaves, cotangent, materialize_grads=True)
    return out.detach().cpu(), [g.cpu() for g in grads]


def compare(case, dtype, seed, factor=3.0):
    """Output and gradients against float64, each within ``factor`` times PyTorch's error.

    In fp32 a score's own rounding is allowed besides. A kernel sums the products of a score in one
    accumulator, a CPU's BLAS in many, which rounds less: with heads of 128, plain NumPy products were up to
    3.4 times PyTorch's error away (6 random cases), and gradients through them up to 12 units in the last
    place of their largest (60). One accumulator's error grows with the root of the number of products.
    """
    generator = torch.Generator().manual_seed(seed + 1)
    cotangent = torch.randn(case.hidden.shape, generator=generator, dtype=torch.float64)
    rounded = case.to(dtype)
    products = case.k.shape[1] / case.num_heads if dtype == torch.float32 else 0
    summing = products**0.5 * torch.finfo(dtype).eps
    exact = gradients(rounded.to(torch.float64), through_reference, cotangent.to(dtype).double())
    plain = gradients(rounded.to(dtype), through_reference, cotangent.to(dtype))
    actual = gradients(there(rounded.to(dtype)), through_operator, cotangent.to(dtype).to(DEVICE))
    assert actual[0].dtype == dtype
    assert_as_exact("out", actual[0], plain[0], exact[0], factor)
    for name, got, low, true in zip(case.DIFFERENTIABLE, actual[1], plain[1], exact[1], strict=True):
        if name != "hidden" and not true.any():  # one key: its softmax is 1, whatever the query
            values = exact[1][2]  # of edits without any token there are none, and then nothing moves
            scale = float(values.abs().max()) if values.numel() else 0.0
            assert max_error(got, true) <= 1e-5 * scale, f"d_{name}"
        else:
            assert_as_exact(f"d_{name}", got, low, true, factor, summing * float(true.abs().max()))
    unchanged = ~(case.span & (case.route >= 0)[:, None])
    assert torch.equal(actual[0][unchanged], rounded.hidden[unchanged])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
@on_triton
def test_against_float64(seed, name, dtype):
    compare(sample(seed, CASES[name]), dtype, seed)


@on_triton
def test_random_shapes(seed):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(4):
        shape = sample_shape(generator)
        slots = shape.pop("slots")
        lengths = torch.randint(0, 33, (slots,), generator=generator).tolist()
        route = torch.randint(-1, slots, (shape["rows"],), generator=generator).tolist()
        print(shape, lengths, route)
        compare(attention_case(generator, lengths=lengths, route=route, **shape), torch.float32, seed, 4.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@on_triton
def test_large_tiles(seed, dtype):
    """The tiles of large inputs give the same as those of small ones, odd sizes included."""
    from dualedit_kernels.gated_edit_attention import triton_kernel

    case = sample(seed, CASES["two tiles"], tokens=150)
    products, attention = triton_kernel.product_tiles, triton_kernel.attention_tiles
    assert products(dtype, 150, 136, 9)["BT"] == 64 and attention(dtype, 16, 150, 9)["BT"] == 128
    triton_kernel.product_tiles = lambda dtype, *_: products(dtype, 1 << 16, 1 << 12, 9)
    try:
        assert triton_kernel.product_tiles(dtype, 1, 1, 9)["BT"] == 128
        compare(case, dtype, seed)
    finally:
        triton_kernel.product_tiles = products


@on_triton
def test_more_tokens_than_offsets_count_are_refused_backward(seed):
    from dualedit_kernels.gated_edit_attention import triton_backward

    case, limit = there(sample(seed, CASES["mixed"]).to(torch.float32)), triton_backward.MOST_TOKENS
    rows, tokens, _ = case.hidden.shape
    cotangent = torch.ones_like(case.hidden)
    assert limit == 2**31 - 1
    try:
        triton_backward.MOST_TOKENS = rows * tokens * case.num_heads - 1
        with pytest.raises(ValueError, match=f"{rows} x {tokens} tokens .* split the batch"):
            gradients(case, through_operator, cotangent)
        triton_backward.MOST_TOKENS += 1
        gradients(case, through_operator, cotangent)
    finally:
        triton_backward.MOST_TOKENS = limit


@pytest.mark.parametrize("name", CLOSED)
@on_triton
def test_closed_is_bit_identical(seed, name):
    case = sample(seed, CLOSED[name]).to(torch.bfloat16)
    if case.hidden.numel():
        case.hidden[0, 0, 0] = torch.nan  # even a NaN passes through
    out = through_operator(there(case))
    assert torch.equal(out.cpu().view(torch.int16), case.hidden.view(torch.int16))
    grads = gradients(there(case), through_operator, torch.ones_like(case.hidden).to(DEVICE))[1]
    assert torch.equal(grads[0], torch.ones_like(case.hidden))
    assert all(not grad.any() for grad in grads[1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@on_triton
def test_nothing_leaks(seed, dtype):
    """NaN in tokens that do not change, in an open row, or in another edit's keys stays where it is."""
    case = sample(seed, CASES["mixed"]).to(dtype)
    cotangent = torch.ones_like(case.hidden)
    clean = gradients(there(case), through_operator, cotangent.to(DEVICE))
    outside = ~(case.span & (case.route >= 0)[:, None])
    case = case.to(dtype)
    case.hidden[outside] = torch.nan
    out, grads = gradients(there(case), through_operator, cotangent.to(DEVICE))
    assert torch.equal(out[~outside], clean[0][~outside])
    for name, got, want in zip(case.DIFFERENTIABLE, grads, clean[1], strict=True):
        assert torch.equal(got, want), name

    case = sample(seed, CASES["mixed"]).to(dtype)
    case.hidden[0] = torch.nan
    case.k[7:8] = torch.nan  # slot 1, which only row 3 uses
    out = through_operator(there(case)).cpu()
    assert torch.equal(out[[1, 2]], clean[0][[1, 2]])
    assert torch.isnan(out[3][case.span[3]]).all() and torch.equal(
        out[3][~case.span[3]], case.hidden[3][~case.span[3]]
    )


@on_triton
def test_slots_may_overlap_and_leave_gaps(seed):
    case = sample(seed, CASES["mixed"])
    case = replace(case, start=torch.tensor([3, 5, 20]), length=torch.tensor([8, 1, 20]))
    compare(case, torch.float32, seed)


@on_triton
def test_strided_inputs(seed):
    """Every tensor with its two last dimensions swapped in memory."""
    case = sample(seed, CASES["mixed"]).to(torch.float32)
    want = gradients(there(case), through_operator, torch.ones_like(case.hidden).to(DEVICE))
    names = ("hidden", "span", "k", "v", "w_q", "w_o")
    swapped = {n: getattr(case, n).detach().mT.contiguous().mT for n in names}
    case = there(replace(case.to(torch.float32), **swapped))
    assert not case.k.is_contiguous() and not case.span.is_contiguous()
    cotangent = torch.ones(case.hidden.mT.shape, device=DEVICE).mT
    got = gradients(case, through_operator, cotangent)
    assert torch.equal(got[0], want[0])
    for name, a, b in zip(case.DIFFERENTIABLE, got[1], want[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, msg=name)


@on_triton
def test_massive_activations(seed):
    """Statistics of tokens whose norm is one activation of 2500."""
    case = sample(seed, CASES["mixed"], dim=200)
    case.hidden[:, :, 7] += 2500
    compare(case, torch.float32, seed)
    compare(case, torch.bfloat16, seed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@on_triton
def test_inplace_gives_the_same_bits(seed, dtype):
    case = there(sample(seed, CASES["mixed"]).to(dtype))
    want = through_operator(case)
    for hidden in (case.hidden.clone(), case.hidden.transpose(0, 1).contiguous().transpose(0, 1)):
        with backend.use_backend(gated_edit_attention="triton"):
            out, _ = gated_edit_attention(**case.public() | {"hidden": hidden}, inplace=True)
        assert out is hidden and torch.equal(hidden, want)


@on_triton
def test_gate_routes_by_the_last_token(seed):
    case = sample(seed, CASES["mixed"]).to(torch.float32)
    last = torch.tensor([3, 0, 18, 7, 5])
    keys = torch.stack([case.hidden[0, 3], case.hidden[2, 18], case.hidden[4, 5]])
    gate = Gate(last.to(DEVICE), keys.to(DEVICE), torch.full((3,), 0.01, device=DEVICE), "cosine")
    moved = there(case)
    with backend.use_backend("triton"):
        out, route = gated_edit_attention(**moved.public() | {"route": None}, gate=gate)
    assert route.tolist() == [0, -1, 1, -1, 2]
    assert torch.equal(out, through_operator(replace(moved, route=route)))


@on_triton
def test_only_needed_gradients(seed):
    case = there(sample(seed, CASES["mixed"]).to(torch.float32))
    whole = gradients(case, through_operator, torch.ones_like(case.hidden))[1]
    for name, want in zip(case.DIFFERENTIABLE, whole, strict=True):
        fresh = case.to(torch.float32)
        leaf = getattr(fresh, name).requires_grad_(True)
        with backend.use_backend(gated_edit_attention="triton"):
            got = torch.autograd.grad(through_operator(fresh).sum(), leaf)[0]
        torch.testing.assert_close(got.cpu(), want, rtol=1e-5, atol=1e-6, msg=name)


@on_triton
def test_heads_too_wide_for_a_tile(seed):
    """Heads of 192 use a wide tile; of 264, in fp32 of 136, the batched implementation throughout."""
    from dualedit_kernels.gated_edit_attention import triton_kernel

    attend, heads = triton_kernel.attend, []
    triton_kernel.attend = lambda q, *rest: (heads.append(q.shape[2]), attend(q, *rest))
    try:
        for mid, dtype in (
            (192, torch.bfloat16),
            (264, torch.bfloat16),
            (128, torch.float32),
            (136, torch.float32),
        ):
            compare(sample(seed, CASES["head 80"], mid=mid), dtype, seed)
    finally:
        triton_kernel.attend = attend
    assert heads == [192, 128]
    case = there(sample(seed, CASES["head 80"], mid=264).to(torch.float32))
    want = through_operator(case)
    with backend.use_backend(gated_edit_attention="triton"):
        assert torch.equal(gated_edit_attention(**case.public(), inplace=True)[0], want)
