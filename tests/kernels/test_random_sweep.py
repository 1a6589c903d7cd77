"""Random shapes, strides, dtypes and routes, every implementation; attention has them in its own tests."""

import pytest
import torch
from interpreter import DEVICE, on_triton

from dualedit_kernels import Full, LowRank, backend, nearest_key, routed_linear
from dualedit_kernels.routed_linear.reference import routed_full_reference, routed_low_rank_reference
from dualedit_kernels.testing import assert_as_exact, assert_nearest, rounding_of_sums

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def names(operator):
    return [e.name for e in backend.families()[operator] if e.refuses("cpu", torch.float32) is None]


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
