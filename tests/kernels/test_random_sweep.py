"""Random shapes, strides, dtypes and routes, every implementation."""

from dataclasses import replace

import pytest
import torch
from interpreter import DEVICE, on_triton

from dualedit_kernels import (
    Full,
    LowRank,
    backend,
    gated_edit_attention,
    nearest_key,
    routed_linear,
)
from dualedit_kernels.gated_edit_attention.reference import gated_edit_attention_reference
from dualedit_kernels.routed_linear.reference import routed_full_reference, routed_low_rank_reference
from dualedit_kernels.testing import (
    assert_as_exact,
    assert_nearest,
    attention_case,
    rounding_of_sums,
    sample_shape,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def names(operator, dtype=torch.float32):
    return [e.name for e in backend.families()[operator] if e.refuses("cpu", dtype) is None]


class Draw:
    """Random choices from one generator."""

    def __init__(self, generator):
        self.generator = generator

    def number(self, low, high):
        return int(torch.randint(low, high + 1, (), generator=self.generator))

    def one_of(self, choices):
        return choices[self.number(0, len(choices) - 1)]

    def normal(self, *shape, scale=1.0):
        return torch.randn(*shape, generator=self.generator) * scale

    def laid_out(self, tensor):
        """The same values, contiguous or not, on whatever address."""
        kind = self.number(0, 3)
        if kind == 1 and tensor.ndim > 1:
            return tensor.transpose(0, 1).contiguous().transpose(0, 1)
        room = torch.full((*tensor.shape[:-1], 2 * tensor.shape[-1] + 3), torch.nan, dtype=tensor.dtype)
        here = room[..., 1 : 1 + tensor.shape[-1]] if kind == 2 else room[..., 3::2]
        return tensor if kind < 2 else here.copy_(tensor)


def look_up(draw, most_keys, device):
    keys_of, dim = draw.number(1, most_keys), draw.one_of([1, 3, 16, 33, 64, 130, 515])
    rows, metric = draw.number(1, 9), draw.one_of(["l2", "cosine"])
    keys = draw.normal(keys_of, dim).to(draw.one_of(DTYPES))
    query = draw.normal(rows, dim) + keys[draw.number(0, keys_of - 1)].float() * draw.number(0, 1)
    query, keys = draw.laid_out(query.to(draw.one_of(DTYPES))), draw.laid_out(keys)
    radius = torch.rand(keys_of, generator=draw.generator) * draw.one_of([0.5, 2.0, 2 * dim**0.5])
    radius = draw.laid_out(radius)
    print(rows, keys_of, dim, metric, query.dtype, query.stride(), keys.dtype, keys.stride())
    found = nearest_key(query.to(device), keys.to(device), radius.to(device), metric)
    assert_nearest(*(t.cpu() for t in found), query, keys, radius, metric)


@pytest.mark.parametrize("name", names("nearest_key"))
def test_nearest_key(name, generator, poison):
    draw = Draw(generator)
    with backend.use_backend(nearest_key=name):
        for _ in range(12):
            look_up(draw, 400, "cpu")


@on_triton
def test_nearest_key_in_triton(generator):
    draw = Draw(generator)
    with backend.use_backend(nearest_key="triton"):
        for _ in range(3):
            look_up(draw, 70, DEVICE)


def linear(draw, most, device):
    kind, dtype, slots = draw.one_of(["low_rank", "full"]), draw.one_of(DTYPES), draw.number(1, 4)
    rows, tokens, size, out, rank = (draw.number(1, n) for n in (5, most, most, most, 12))
    index = torch.randint(-1, slots, (rows, 2), generator=draw.generator)[:, draw.number(0, 1)]
    tensors = {"base": draw.normal(rows, tokens, out), "x": draw.normal(rows, tokens, size)}
    if kind == "full":
        tensors |= {"full": draw.normal(slots, out, size, scale=size**-0.5), "bias": draw.normal(out)}
    else:
        tensors["down"] = draw.normal(slots, rank, size, scale=size**-0.5)
        tensors["up"] = draw.normal(slots, out, rank)
    tensors = {name: draw.laid_out(t.to(dtype)) for name, t in tensors.items()}
    cotangent = draw.laid_out(draw.normal(rows, tokens, out).to(dtype))
    print(kind, dtype, index.tolist(), {name: (t.shape, t.stride()) for name, t in tensors.items()})

    def reference(t, index):
        if "full" in t:
            return routed_full_reference(t["base"], t["x"], t["full"], t["bias"], index)
        return routed_low_rank_reference(t["base"], t["x"], t["down"], t["up"], index)

    def operator(t, index):
        values = Full(t["full"]) if "full" in t else LowRank(t["down"], t["up"])
        return routed_linear(t["x"], None, t.get("bias"), values, index, base=t["base"])

    def results(function, tensors, index, cotangent):
        leaves = [t.detach().requires_grad_(True) for t in tensors.values()]
        y = function(dict(zip(tensors, leaves, strict=True)), index)
        return [y.detach(), *torch.autograd.grad(y, leaves, cotangent, materialize_grads=True)]

    wide = {name: t.double() for name, t in tensors.items()}
    exact = results(reference, wide, index, cotangent.double())
    plain = results(reference, tensors, index, cotangent)
    sizes = {name: t.abs() for name, t in wide.items()}
    sizes = results(reference, sizes, index, cotangent.double().abs())
    there = {name: t.to(device) for name, t in tensors.items()}
    actual = results(operator, there, index.to(device), cotangent.to(device))
    for name, got, low, true, size in zip(["y", *tensors], actual, plain, exact, sizes, strict=True):
        floor = rounding_of_sums(max(rows * tokens, tensors["x"].shape[2], out), dtype, size)
        assert_as_exact(name, got.cpu(), low, true, 3.0, floor)
    assert torch.equal(actual[0].cpu()[index < 0], tensors["base"][index < 0])


@pytest.mark.parametrize("name", names("routed_linear"))
def test_routed_linear(name, generator, poison):
    draw = Draw(generator)
    with backend.use_backend(routed_linear=name):
        for _ in range(12):
            linear(draw, 70, "cpu")


@on_triton
def test_routed_linear_in_triton(generator):
    draw = Draw(generator)
    with backend.use_backend(routed_linear="triton"):
        for _ in range(2):
            linear(draw, 24, DEVICE)


def attention(draw, dtypes, device):
    """Output, in place and every gradient; slots overlap, leave gaps, and some are empty."""
    shape, dtype = sample_shape(draw.generator), draw.one_of(dtypes)
    slots = shape.pop("slots")
    lengths = [draw.number(0, 33) for _ in range(slots)]
    route = [draw.number(-1, slots - 1) for _ in range(shape["rows"])]
    case = attention_case(draw.generator, lengths=lengths, route=route, **shape).to(dtype)
    shift = draw.number(0, 3)  # slots neither begin nor end where the tables do
    start = (case.start - shift).clamp(min=0)
    case = replace(case, start=start, length=torch.minimum(case.length, len(case.k) - start))
    loose = {name: draw.laid_out(getattr(case, name)) for name in case.DIFFERENTIABLE}
    wide_span = torch.zeros(*case.span.shape, 3, dtype=torch.bool)
    wide_span[..., 1] = case.span
    loose |= {"span": wide_span[..., 1], "route": torch.stack([case.route] * 2, 1)[:, 1]}
    cotangent = draw.laid_out(draw.normal(*case.hidden.shape).to(dtype))
    print(dtype, shape, route, start, case.length, {n: t.stride() for n, t in loose.items()})

    def results(function, case, cotangent):
        leaves = [getattr(case, n).detach().requires_grad_(True) for n in case.DIFFERENTIABLE]
        out = function(replace(case, **dict(zip(case.DIFFERENTIABLE, leaves, strict=True))))
        return [out.detach(), *torch.autograd.grad(out, leaves, cotangent, materialize_grads=True)]

    def reference(case):
        return gated_edit_attention_reference(**case.public())

    def operator(case):
        return gated_edit_attention(**case.public())[0]

    exact = results(reference, case.to(torch.float64), cotangent.double())
    plain = results(reference, case, cotangent)
    fields = {n: getattr(case, n) for n in case.__dataclass_fields__} | loose
    there = {n: t.to(device) for n, t in fields.items() if isinstance(t, torch.Tensor)}
    there = replace(case, **there)
    actual = results(operator, there, cotangent.to(device))
    # Sums that cancel are as exact as what they add up, not as what is left.
    largest = max(float(true.abs().max()) for true in exact[1:] if true.numel())
    unit = torch.finfo(torch.float32).eps if dtype == torch.float32 else 0.0
    for name, got, low, true in zip(["out", *case.DIFFERENTIABLE], actual, plain, exact, strict=True):
        assert_as_exact(name, got.cpu(), low, true, 4.0, 0.0 if name == "out" else 8 * unit * largest)
    closed = ~(case.span & (case.route >= 0)[:, None])
    assert torch.equal(actual[0].cpu()[closed], case.hidden[closed])

    inside = there.hidden.clone(memory_format=torch.preserve_format)
    with torch.no_grad():
        out = gated_edit_attention(**there.public() | {"hidden": inside}, inplace=True)[0]
    assert out is inside
    assert_as_exact("in place", out.cpu(), plain[0], exact[0], 4.0)
    assert torch.equal(out.cpu()[closed], case.hidden[closed])


@pytest.mark.parametrize("name", names("gated_edit_attention", torch.bfloat16))
def test_gated_edit_attention(name, generator, poison):
    draw = Draw(generator)
    fit = [dtype for dtype in DTYPES if name in names("gated_edit_attention", dtype)]
    with backend.use_backend(gated_edit_attention=name):
        for _ in range(12):
            attention(draw, fit, "cpu")


@on_triton
def test_gated_edit_attention_in_triton(seed):
    draw = Draw(torch.Generator().manual_seed(seed))
    with backend.use_backend(gated_edit_attention="triton"):
        for _ in range(3):
            attention(draw, DTYPES, DEVICE)
