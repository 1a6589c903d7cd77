"""nearest_key in Triton against float64, on the GPU or in the interpreter."""

import pytest
import torch
from interpreter import DEVICE, on_triton

from dualedit_kernels import backend, nearest_key
from dualedit_kernels.testing import assert_nearest, exact_distances

# (B, N, D): odd, beyond every tile, smaller than a tile, one of each
SHAPES = [(1, 1, 1), (1, 7, 5), (3, 40, 129), (9, 101, 130), (5, 3, 257), (2, 70, 520)]
METRICS = ["l2", "cosine"]


def lookup(query, keys, radius, metric="l2"):
    with backend.use_backend(nearest_key="triton"):
        index, distance = nearest_key(*(t.to(DEVICE) for t in (query, keys, radius)), metric)
    assert index.dtype == torch.int64 and distance.dtype == torch.float32
    return index.cpu(), distance.cpu()


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@on_triton
def test_against_float64(seed, shape, dtype, metric):
    rows, count, dim = shape
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(rows, dim, generator=generator)
    keys = torch.randn(count, dim, generator=generator).to(dtype)
    nearest = exact_distances(query, keys, metric).min(1).values
    radius = torch.full((count,), float(nearest.median()) * 1.001)
    assert_nearest(*lookup(query, keys, radius, metric), query, keys, radius, metric)
    narrow = query.to(dtype)
    assert_nearest(*lookup(narrow, keys, radius, metric), narrow, keys, radius, metric)


@pytest.mark.parametrize("parts", [1, 2, 7, 1000])
@on_triton
def test_any_split_gives_the_same(seed, parts):
    from dualedit_kernels.nearest_key import triton_kernel

    generator = torch.Generator().manual_seed(seed)
    query, keys = torch.randn(6, 33, generator=generator), torch.randn(90, 33, generator=generator)
    keys[50:] = keys[:40]
    radius = torch.full((90,), 100.0)
    want = lookup(query, keys, radius)
    share, count = triton_kernel.split(90, 8, parts)
    assert share % 8 == 0 and (count - 1) * share < 90 <= count * share and count <= parts
    default = triton_kernel.split
    triton_kernel.split = lambda *sizes: default(*sizes[:2], parts)
    try:
        got = lookup(query, keys, radius)
    finally:
        triton_kernel.split = default
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1]) and bool((got[0] < 50).all())


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@on_triton
def test_massive_activations(seed, metric, dtype):
    """Norms of 1e3 to 3e3 with a nearest distance of about 1: every argmin right, distances to 1e-5."""
    generator = torch.Generator().manual_seed(seed)
    dim, count, rows = 1024, 40, 8
    massive = torch.zeros(dim)
    massive[[7, 500]] = torch.tensor([1000.0, -2500.0])
    keys = (massive + torch.randn(count, dim, generator=generator) * 0.3).to(dtype)
    chosen = torch.randint(0, count, (rows,), generator=generator)
    query = keys[chosen].float() + torch.randn(rows, dim, generator=generator) * 0.03
    radius = torch.full((count,), 1e6)
    index, distance = lookup(query, keys, radius, metric)
    best, nearest = exact_distances(query, keys, metric).min(1)
    if metric == "l2":
        assert torch.equal(index, nearest)
        assert float(((distance - best) / best).abs().max()) <= 1e-5
    else:  # fp32 directions resolve angles this small to about 1e-3 of the distance
        assert_nearest(index, distance, query, keys, radius, metric, rtol=2e-2)


@on_triton
def test_radius_belongs_to_the_nearest_key():
    """A far key with a large radius must not catch what the nearest key rejects; the radius is inclusive."""
    query, keys = torch.tensor([[0.0, 0.0]]), torch.tensor([[3.0, 4.0], [30.0, 40.0]])
    index, distance = lookup(query, keys, torch.tensor([4.9, 1000.0]))
    assert index.tolist() == [-1] and distance.tolist() == [5.0]
    assert lookup(query, keys, torch.tensor([5.0, 0.0]))[0].tolist() == [0]


@on_triton
def test_ties_go_to_the_lowest_index(seed):
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(1, 40, generator=generator)
    for count, first in ((3, 1), (100, 37), (100, 98)):
        keys = torch.randn(count, 40, generator=generator) + 9
        keys[first:] = base + 0.25
        assert lookup(base.repeat(9, 1), keys, torch.full((count,), 100.0))[0].tolist() == [first] * 9


@pytest.mark.parametrize("metric", METRICS)
@on_triton
def test_nothing_to_find(metric):
    index, distance = lookup(torch.ones(3, 8), torch.empty(0, 8), torch.empty(0), metric)
    assert index.tolist() == [-1] * 3 and distance.tolist() == [torch.inf] * 3
    index, distance = lookup(torch.empty(0, 8), torch.ones(4, 8), torch.ones(4), metric)
    assert index.shape == distance.shape == (0,)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@on_triton
def test_values_that_are_not_finite(seed, metric, bad):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(7, 20, generator=generator)
    keys = torch.cat([torch.full((1, 20), bad), query + 0.01, torch.full((3, 20), bad)])
    query[3, 11] = bad
    index, distance = lookup(query, keys, torch.full((len(keys),), torch.inf), metric)
    assert index.tolist() == [1, 2, 3, -1, 5, 6, 7]
    assert distance[3] == torch.inf and torch.isfinite(distance[[0, 1, 2, 4, 5, 6]]).all()


@on_triton
def test_zero_has_no_direction(seed):
    keys = torch.cat([torch.zeros(1, 6), torch.randn(4, 6, generator=torch.Generator().manual_seed(seed))])
    query = torch.stack([torch.zeros(6), -keys[2]])
    radius = torch.full((5,), torch.inf)
    index, distance = lookup(query, keys, radius, "cosine")
    assert index[0] == -1 and distance[0] == torch.inf
    assert_nearest(index[1:] - 1, distance[1:], query[1:], keys[1:], radius[1:], "cosine")


@on_triton
def test_strided_inputs(seed):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(48, 6, generator=generator).t()
    keys = torch.randn(40, 96, generator=generator)[::2, 48:]
    radius = torch.full((40,), 50.0)[::2]
    assert_nearest(*lookup(query, keys, radius), query, keys, radius, "l2")
