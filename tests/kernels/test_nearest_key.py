"""nearest_key against float64, for every implementation that runs here."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from dualedit_kernels import backend, nearest_key
from dualedit_kernels.testing import assert_nearest, exact_distances

IMPLEMENTATIONS = [
    entry.name for entry in backend.families()["nearest_key"] if entry.refuses("cpu", torch.float32) is None
]
SHAPES = [
    (1, 1, 1),
    (1, 7, 5),
    (3, 1, 33),
    (4, 50, 64),
    (6, 24, 16),
    (9, 101, 130),
    (33, 67, 257),
    (70, 31, 1024),
]


@pytest.fixture(params=IMPLEMENTATIONS, autouse=True)
def implementation(request, poison):
    with backend.use_backend(nearest_key=request.param):
        yield request.param


@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(generator, shape, dtype, metric):
    rows, count, dim = shape
    query = torch.randn(rows, dim, generator=generator)
    keys = torch.randn(count, dim, generator=generator).to(dtype)
    nearest = exact_distances(query, keys, metric).min(1).values
    radius = torch.full((count,), float(nearest.median()) * 1.001)
    index, distance = nearest_key(query, keys, radius, metric)
    assert index.dtype == torch.int64 and distance.dtype == torch.float32
    assert_nearest(index, distance, query, keys, radius, metric)


@pytest.mark.parametrize(
    "query_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str
)
@pytest.mark.parametrize("key_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_mixed_dtypes(generator, query_dtype, key_dtype):
    query = torch.randn(5, 48, generator=generator).to(query_dtype)
    keys = torch.randn(29, 48, generator=generator).to(key_dtype)
    radius = torch.full((29,), 100.0)
    try:
        index, distance = nearest_key(query, keys, radius)
    except RuntimeError as error:  # a forced implementation says what it cannot do
        assert "cannot run" in str(error)
        return
    assert_nearest(index, distance, query, keys, radius, "l2")


@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_massive_activations(generator, metric, dtype):
    """Norms of 1e3 to 3e3 with a nearest distance of about 1: every argmin right, distances to 1e-5."""
    dim, count = 1024, 300
    massive = torch.zeros(dim)
    massive[[7, 500]] = torch.tensor([1000.0, -2500.0])
    keys = (massive + torch.randn(count, dim, generator=generator) * 0.3).to(dtype)
    chosen = torch.randint(0, count, (64,), generator=generator)
    query = keys[chosen].float() + torch.randn(64, dim, generator=generator) * 0.03
    index, distance = nearest_key(query, keys, torch.full((count,), 1e6), metric)
    every = exact_distances(query, keys, metric)
    best, nearest = every.min(1)
    if metric == "l2":
        assert torch.equal(index, nearest)
        assert float(((distance - best) / best).abs().max()) <= 1e-5
    else:  # the angles themselves are tiny here; fp32 directions resolve them to about 1e-3 of the distance
        assert_nearest(index, distance, query, keys, torch.full((count,), 1e6), metric, rtol=2e-2)


def test_radius_belongs_to_the_nearest_key():
    """A far key with a large radius must not catch what the nearest key rejects; the radius is inclusive."""
    query = torch.tensor([[0.0, 0.0]])
    keys = torch.tensor([[3.0, 4.0], [30.0, 40.0]])
    far_catches = nearest_key(query, keys, torch.tensor([4.9, 1000.0]))
    assert far_catches[0].tolist() == [-1] and far_catches[1].tolist() == [5.0]
    assert nearest_key(query, keys, torch.tensor([5.0, 0.0]))[0].tolist() == [0]


def test_ties_go_to_the_lowest_index(generator):
    base = torch.randn(1, 40, generator=generator)
    for count, first in ((3, 1), (200, 37), (200, 198)):
        keys = torch.randn(count, 40, generator=generator) + 9
        keys[first:] = base + 0.25
        index, _ = nearest_key(base.repeat(9, 1), keys, torch.full((count,), 100.0))
        assert index.tolist() == [first] * 9


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("strided", ["query", "keys", "both"])
def test_ties_of_strided_inputs_go_to_the_lowest_index(generator, dtype, strided):
    def laid_out(rows, name):
        return rows.t().contiguous().t() if strided in (name, "both") else rows

    for count, dim in ((2, 7), (2, 257), (5, 40)):
        keys = torch.randn(count, dim, generator=generator, dtype=dtype).repeat(3, 1)
        query = keys[[0, 1] * 8] + torch.randn(16, dim, generator=generator, dtype=dtype)
        radius = torch.full((3 * count,), torch.inf)
        try:
            index, _ = nearest_key(laid_out(query, "query"), laid_out(keys, "keys"), radius)
        except RuntimeError as error:  # a forced implementation says what it cannot do
            assert "cannot run" in str(error)
            return
        assert (index < count).all()


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_nothing_to_find(metric):
    index, distance = nearest_key(torch.ones(3, 8), torch.empty(0, 8), torch.empty(0), metric)
    assert index.tolist() == [-1] * 3 and distance.tolist() == [torch.inf] * 3
    index, distance = nearest_key(torch.empty(0, 8), torch.ones(4, 8), torch.ones(4), metric)
    assert index.shape == distance.shape == (0,)


@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_values_that_are_not_finite(generator, metric, bad):
    query = torch.randn(7, 20, generator=generator)
    keys = torch.cat([torch.full((1, 20), bad), query + 0.01, torch.full((3, 20), bad)])
    query[3, 11] = bad
    index, distance = nearest_key(query, keys, torch.full((len(keys),), torch.inf), metric)
    assert index.tolist() == [1, 2, 3, -1, 5, 6, 7]
    assert distance[3] == torch.inf and torch.isfinite(distance[[0, 1, 2, 4, 5, 6]]).all()


def test_zero_has_no_direction(generator):
    keys = torch.cat([torch.zeros(1, 6), torch.randn(4, 6, generator=generator)])
    query = torch.stack([torch.zeros(6), -keys[2]])
    index, distance = nearest_key(query, keys, torch.full((5,), torch.inf), "cosine")
    assert index[0] == -1 and distance[0] == torch.inf
    assert_nearest(index[1:] - 1, distance[1:], query[1:], keys[1:], torch.full((4,), torch.inf), "cosine")


def test_strided_inputs(generator):
    query = torch.randn(48, 6, generator=generator).t()
    keys = torch.randn(40, 96, generator=generator)[::2, ::2]
    radius = torch.full((40,), 50.0)[::2]
    index, distance = nearest_key(query, keys, radius)
    assert_nearest(index, distance, query, keys, radius, "l2")


def test_threads_agree(generator):
    query = torch.randn(5, 300, generator=generator)
    keys = torch.randn(4001, 300, generator=generator)
    keys[3000:] = keys[:1001]
    radius = torch.full((4001,), 50.0)
    one = nearest_key(query, keys, radius)
    torch.set_num_threads(2)
    try:
        two = nearest_key(query, keys, radius)
    finally:
        torch.set_num_threads(1)
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])


def test_no_gradient_and_opcheck(generator):
    query = torch.randn(4, 12, generator=generator, requires_grad=True)
    keys = torch.randn(9, 12, generator=generator)
    index, distance = nearest_key(query, keys, torch.ones(9))
    assert not index.requires_grad and not distance.requires_grad
    for metric in ("l2", "cosine"):
        arguments = (query.detach(), keys, torch.ones(9), metric)
        torch.library.opcheck(torch.ops.dualedit_kernels.nearest_key.default, arguments)


def test_compiles(generator):
    query, keys = torch.randn(4, 12, generator=generator), torch.randn(9, 12, generator=generator)
    compiled = torch.compile(nearest_key, fullgraph=True, backend="aot_eager")
    for got, want in zip(
        compiled(query, keys, torch.ones(9)), nearest_key(query, keys, torch.ones(9)), strict=True
    ):
        assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"query": torch.ones(8)}, ValueError, "query has shape"),
        ({"query": torch.ones(2, 0), "keys": torch.ones(3, 0)}, ValueError, "query has D=0"),
        ({"keys": torch.ones(3, 9)}, ValueError, "keys has shape"),
        ({"radius": torch.ones(4)}, ValueError, "radius has shape"),
        ({"radius": torch.ones(3, dtype=torch.float64)}, TypeError, "radius has dtype"),
        ({"keys": torch.ones(3, 8, dtype=torch.int32)}, TypeError, "keys has dtype"),
        ({"keys": torch.ones(3, 8, device="meta")}, ValueError, "keys is on meta"),
        ({"query": [[1.0]]}, TypeError, "query must be a tensor"),
        ({"metric": "dot"}, ValueError, "metric='dot' is unknown"),
    ],
)
def test_errors_name_the_argument(change, error, words):
    arguments = {"query": torch.ones(2, 8), "keys": torch.ones(3, 8), "radius": torch.ones(3)} | change
    with pytest.raises(error, match=words):
        nearest_key(**arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1500, 520), (1, 300, 4100), (7, 1203, 600), (5, 301, 4096)], ids=str)
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0], ids="{} near".format)
def test_keys_may_be_given_up_early(generator, shape, dtype, share):
    """Queries near a key let a scan skip most of the others; the answer stays exact, ties included."""
    rows, count, dim = shape
    keys = torch.randn(count, dim, generator=generator).to(dtype)
    chosen = torch.randint(0, count, (rows,), generator=generator)
    near = (torch.rand(rows, generator=generator) < share)[:, None]
    noise = torch.randn(rows, dim, generator=generator)
    query = torch.where(near, keys[chosen].float() + 0.05 * noise, noise)
    radius = torch.full((count,), 1e6)
    index, distance = nearest_key(query, keys, radius)
    assert_nearest(index, distance, query, keys, radius, "l2")
    copies = torch.cat([keys[: count // 2], keys])  # every key of the first half comes twice
    again, same = nearest_key(query, copies, torch.full((len(copies),), 1e6))
    assert torch.equal(same, distance)
    assert torch.equal(again, torch.where(index < count // 2, index, index + count // 2))


def test_tensors_without_values_have_shapes_found():
    """An eager call leaves the dispatcher out, which these need: the compiled library reads values."""
    with FakeTensorMode():
        index, distance = nearest_key(torch.empty(3, 8), torch.empty(5, 8), torch.empty(5))
    assert (index.shape, index.dtype) == ((3,), torch.int64)
    assert (distance.shape, distance.dtype) == ((3,), torch.float32)
