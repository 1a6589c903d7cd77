"""nearest_key with coded keys: the answer of the lookup without codes, bit for bit, whatever the data."""

import dataclasses

import pytest
import torch

from dualedit_kernels import KeyCodes, backend, encode_keys, library, nearest_key
from dualedit_kernels.nearest_key import cpp
from dualedit_kernels.nearest_key.codes import part_of
from dualedit_kernels.testing import assert_nearest

IMPLEMENTATIONS = [
    entry.name for entry in backend.families()["nearest_key"] if entry.refuses("cpu", torch.float32) is None
]
CODED = [name for name in IMPLEMENTATIONS if name.startswith("cpp-")]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 64, 1), (3, 65, 7), (9, 301, 130), (33, 257, 66), (70, 100, 1027)]


@pytest.fixture(params=IMPLEMENTATIONS, autouse=True)
def implementation(request, poison):
    with backend.use_backend(nearest_key=request.param):
        yield request.param


def same(query, keys, metric="l2", codes=None, radius=None):
    """Compare with the lookup without codes, the whole batch and its first query alone; return the answer."""
    codes = encode_keys(keys, metric) if codes is None else codes
    radius = torch.full((len(keys),), torch.inf) if radius is None else radius
    for rows in (query[:1], query):
        want = nearest_key(rows, keys, radius, metric)
        got = nearest_key(rows, keys, radius, metric, codes)
        assert torch.equal(got[0], want[0])
        assert torch.equal(got[1], want[1])
    return want


@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_same_bits_and_float64(generator, shape, dtype, metric):
    rows, count, dim = shape
    query = torch.randn(rows, dim, generator=generator)
    keys = torch.randn(count, dim, generator=generator).to(dtype)
    radius = torch.rand(count, generator=generator) * 2 * dim**0.5
    index, distance = same(query, keys, metric, radius=radius)
    assert_nearest(index, distance, query, keys, radius, metric)


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_near_keys_ties_and_neighbours_one_ulp_apart(generator, metric):
    dim, count = 200, 1000
    keys = torch.randn(count, dim, generator=generator)
    keys[500:750] = keys[:250]  # ties
    keys[750:] = keys[:250]
    at = torch.randint(0, dim, (250, 1), generator=generator)
    moved = torch.nextafter(keys[:250].gather(1, at), torch.tensor(torch.inf))
    keys[750:] = keys[750:].scatter(1, at, moved)
    order = torch.randperm(count, generator=generator)
    query = torch.cat([keys[:40], keys[:40] + 1e-3 * torch.randn(40, dim, generator=generator)])
    same(query, keys[order], metric)
    same(query, keys, metric)


@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "own"])
def test_massive_activations(generator, metric, dtype, shared):
    """A few dimensions of size 1e3, nearest distances of about 1: shared by all keys, or each key's own."""
    dim, count = 1024, 400
    keys = torch.randn(count, dim, generator=generator) * 0.3
    size = torch.tensor([1000.0, -2500.0, 3000.0])
    keys[:, [7, 500, 900]] += size if shared else size * torch.rand(count, 3, generator=generator)
    keys = keys.to(dtype)
    chosen = torch.randint(0, count, (24,), generator=generator)
    query = keys[chosen].float() + torch.randn(24, dim, generator=generator) * 0.03
    index, _ = same(query, keys, metric)
    if metric == "l2":
        assert torch.equal(index, chosen)
    same(torch.randn(24, dim, generator=generator), keys, metric)  # queries without them


@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize("width", [1e-6, 1e-2, 0.3])
def test_clusters(generator, metric, width):
    centres = torch.randn(12, 96, generator=generator) * 3
    keys = centres[torch.randint(0, 12, (900,), generator=generator)]
    keys = keys + width * torch.randn(900, 96, generator=generator)
    query = centres + width * torch.randn(12, 96, generator=generator)
    same(query, keys, metric)


@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e-12, 1e12, 1e18, 1e19, 1e30])
def test_very_small_and_very_large(generator, metric, scale):
    keys = torch.randn(200, 40, generator=generator)
    query = torch.cat([torch.randn(5, 40, generator=generator), keys[:5] + 0.01])
    same(query * scale, keys * scale, metric)
    same(query, keys * scale, metric)
    same(query * scale, keys, metric)
    mixed = keys * torch.where(torch.rand(200, 1, generator=generator) < 0.5, scale, 1.0)
    same(torch.cat([query, query * scale]), mixed, metric)


def test_lengths_that_differ(generator):
    """Bounds by right angles: what coding left over of the longer side is most of the distance's doubt."""
    for dim in (16, 32, 64):
        keys, query = (torch.randn(n, dim, generator=generator) for n in (2000, 64))
        for scale in (0.01, 0.1, 10.0, 100.0):
            same(query * scale, keys)


@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize("rows, dtype", [(2, torch.float32), (7, torch.bfloat16), (40, torch.float32)])
def test_heads_of_the_codes(generator, metric, dtype, rows):
    """Several panels of keys; queries that are near a key, far from all, in a cluster, or no numbers."""
    count, dim = 1300, 522
    centres = torch.randn(20, dim, generator=generator)
    keys = torch.randn(count, dim, generator=generator)
    keys[600:1200] = centres.repeat(30, 1) + 0.2 * keys[600:1200]
    keys[1150:1250] = keys[:100]  # ties
    keys[77], keys[700, 3] = torch.nan, torch.inf
    keys = keys.to(dtype)
    near = keys[torch.randint(0, count, (rows,), generator=generator)].float()
    near = near + 0.1 * torch.randn(rows, dim, generator=generator)
    far = torch.randn(rows, dim, generator=generator)
    within = centres[torch.randint(0, 20, (rows,), generator=generator)]
    mixed = torch.cat([near, far, within])[torch.randperm(3 * rows, generator=generator)[:rows]]
    mixed[-1, 0] = torch.nan
    for query in (near, within, mixed, keys[:rows].float(), 1e-3 * far, 30 * far):
        same(query, keys, metric)
    same(near[:, :512], keys[:1030, :512].contiguous(), metric)
    last = keys.clone()
    last[1290:] = last[1289]  # the nearest ones at the very end
    same(last[1289:1290].float() + 0.01, last, metric)


@pytest.mark.parametrize("massive", [False, True])
def test_some_queries_are_near(generator, massive):
    """Heads are tried on a few queries of a batch: whether those are the near ones must not show."""
    dim = 640
    for rows, count in ((5, 64), (8, 90), (9, 150), (17, 130), (24, 481), (31, 1008)):
        keys = torch.randn(count, dim, generator=generator)
        query = torch.randn(rows, dim, generator=generator)
        near = torch.rand(rows, generator=generator) < torch.rand((), generator=generator)
        query[near] = (
            keys[torch.randint(0, count, (int(near.sum()),), generator=generator)] + 0.1 * query[near]
        )
        for rows_of in (keys, query):
            rows_of[:, [1, dim - 3]] += 1000.0 * massive
        print(rows, count, near.tolist())
        same(query, keys)
        same(query.flip(0), keys)
        one = keys.clone()  # so tight that every bound leaves every key in question
        one[:] = keys[0] + 1e-4 * keys
        same(query, one)
        half = torch.cat([keys[: count // 2], one[count // 2 :]])
        same(torch.cat([query, one[-3:] + 1e-4]), half)


def test_keys_that_no_cache_holds(generator, implementation):
    """Their exact distances are taken in another order, several queries to a key."""
    if implementation not in CODED:
        pytest.skip("reads no codes")
    keys = torch.randn(16500, 520, generator=generator)  # 34 MB
    query = torch.randn(9, 520, generator=generator)
    query[3:] = query[0] + 0.05 * query[3:]
    keys[16000] = keys[77]
    query[1] = keys[77]
    same(query, keys)
    same(query, keys.bfloat16())


@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize("dim, dtype", [(509, torch.float32), (1027, torch.bfloat16), (770, torch.float16)])
def test_distances_in_parts(generator, dim, dtype, metric):
    """Keys of which several are nearest up to what codes resolve: none of them may be given up too early."""
    keys = torch.randn(70, dim, generator=generator).repeat_interleave(5, 0)
    keys = keys[torch.randperm(len(keys), generator=generator)]
    keys += 3e-3 * torch.randn(len(keys), dim, generator=generator)
    keys[:, [3, dim // 3, dim - 2]] += 300 * torch.rand(len(keys), 3, generator=generator).round()
    keys[40:60] = keys[60:80]  # ties
    keys = keys.to(dtype)
    own = torch.randn(24, dim, generator=generator)
    own[:, [3, dim // 3, dim - 2]] += 300
    for query in (own, own[:6], 0.1 * own, keys[40:64].float() + 0.3 * own):
        index, distance = same(query, keys, metric)
        assert_nearest(index, distance, query, keys, torch.full((len(keys),), torch.inf), metric)
    keys[300], keys[301, dim - 1] = torch.nan, torch.inf
    same(own, keys, metric)
    behind = keys.clone()  # all that tells them apart is at the end
    behind[:, : dim * 3 // 4] = behind[0, : dim * 3 // 4]
    same(own, behind, metric)


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_parts_of_different_sizes(generator, metric):
    """Parts large, tiny or zero, of keys or of queries: their scales differ by up to 10^25."""
    dim = 2061
    for rows in (3, 12):
        keys, query = torch.randn(200, dim, generator=generator), torch.randn(rows, dim, generator=generator)
        query[1] = keys[150] + 1e-3 * query[1]
        for count in (len(keys), rows):
            size = torch.pow(10.0, torch.randint(-22, 3, (count, 9), generator=generator).float())
            size[torch.rand(size.shape, generator=generator) < 0.3] = 0.0
            size[:, 0] = 1.0
            sizes = size.repeat_interleave(256, 1)[:, :dim]
            same(query * sizes[:rows], keys, metric)
            if count == len(keys):
                same(query, keys * sizes, metric)
                same(query * sizes[:rows], keys * sizes[:1], metric)
                same(query * sizes[:rows], keys * sizes, metric)


def test_most_distances_are_given_up(generator, implementation):
    if implementation not in CODED:
        pytest.skip("reads no codes")
    keys, query = torch.randn(1000, 2048, generator=generator), torch.randn(32, 2048, generator=generator)
    same(query, keys)
    nearest_key(query, keys, torch.ones(1000), "l2", encode_keys(keys))
    assert 32 <= cpp.last_coded()[0] <= 32 * 10  # about 5; without parts 15


@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 0.0])
def test_values_without_a_distance(generator, metric, bad):
    keys = torch.randn(150, 20, generator=generator)
    query = torch.cat([torch.randn(4, 20, generator=generator), keys[[3, 100, 149]]])
    keys[torch.randint(0, 150, (30,), generator=generator)] = bad
    keys[torch.randint(0, 150, (30,), generator=generator), 11] = bad
    query[2] = bad
    same(query, keys, metric)
    same(query, torch.full_like(keys, bad), metric)
    keys[:, 5] = bad
    same(query, keys, metric)


def test_zero_width_and_one_key_repeated(generator):
    query = torch.randn(6, 33, generator=generator)
    same(query, query[:1].repeat(300, 1))
    same(query, torch.zeros(300, 33))
    same(torch.eye(80), torch.eye(80))
    for metric in ("l2", "cosine"):
        same(torch.empty(0, 33), torch.randn(100, 33, generator=generator), metric)
        same(query, torch.empty(0, 33), metric)
        same(query, torch.randn(3, 33, generator=generator), metric)


def test_threads_agree(generator):
    query, keys = torch.randn(20, 300, generator=generator), torch.randn(6001, 300, generator=generator)
    keys[4000:] = keys[:2001]
    torch.set_num_threads(2)
    try:
        same(query, keys)
    finally:
        torch.set_num_threads(1)


def test_large_batches(generator):
    query, keys = torch.randn(530, 24, generator=generator), torch.randn(500, 24, generator=generator)
    query[::7] = torch.nan
    same(query, keys)


def test_codes_are_read_and_rule_most_keys_out(generator, implementation):
    """Guards the others: were the codes left unread, all of them would pass."""
    if implementation not in CODED:
        pytest.skip("reads no codes")
    keys = torch.randn(3000, 768, generator=generator)
    for rows in (1, 6, 40):
        for query in (torch.randn(rows, 768, generator=generator), keys[:rows] + 0.1):
            same(query, keys)
            exact, given_up = cpp.last_coded()
            assert given_up == 0
            assert 0 < exact <= rows * 0.1 * len(keys)
    # Massive activations, each key's own: kept apart, so the bounds stay narrow.
    keys[:, [5, 300]] += 2000 * torch.rand(3000, 2, generator=generator)
    nearest_key(keys[:6] + 0.1, keys, torch.ones(3000), "l2", encode_keys(keys))
    assert cpp.last_coded()[0] <= 6 * 60


def test_bounds_that_are_no_use(generator, implementation):
    """All keys far from their centre and close together: the lookup goes on without codes."""
    if implementation not in CODED:
        pytest.skip("reads no codes")
    side = torch.where(torch.arange(2000)[:, None] < 1000, 1.0, -1.0)
    keys = side * torch.randn(1, 256, generator=generator)
    keys = keys + 1e-4 * torch.randn(2000, 256, generator=generator)
    query = keys[:5] + 1e-4 * torch.randn(5, 256, generator=generator)
    same(query, keys)
    nearest_key(query, keys, torch.ones(2000), "l2", encode_keys(keys))
    assert cpp.last_coded()[1] == 5


def unblocked(tensor, count):
    """Of [blocks, F, 48, ...]: the rows of keys [count, F, ...]."""
    return tensor.transpose(1, 2).flatten(0, 1)[:count]


@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize("dim, parts", [(77, 1), (530, 5), (2061, 11)])
def test_codes_hold_what_they_promise(generator, metric, dim, parts):
    """|key - decoded key| <= error, in float64."""
    keys = torch.randn(90, dim, generator=generator) * torch.rand(90, 1, generator=generator)
    keys[:, 4] *= 300
    keys[11] = 0.0
    keys[12] = torch.nan
    codes = encode_keys(keys, metric)
    assert codes.codes.shape == (2, -(-dim // 4), 48, 4)
    assert codes.values.shape == (2, parts + 5 + len(codes.apart), 48)
    scale, lengths, apart = unblocked(codes.values, 90).double().split([parts, 5, len(codes.apart)], 1)
    length, head, error, tail, tail_error = lengths.unbind(1)
    part = part_of(dim)
    assert part * (parts - 1) < dim <= part * parts
    value = unblocked(codes.codes, 90).flatten(1)[:, :dim].double() - 128
    value *= scale.repeat_interleave(part, 1)[:, :dim]
    decoded = value + codes.centre[:dim]
    decoded[:, codes.apart] = apart
    exact = keys.double()
    if metric == "cosine":
        exact = exact / exact.norm(dim=1, keepdim=True)
    known = error.isfinite()
    assert known.tolist() == [i != 12 and (metric == "l2" or i != 11) for i in range(90)]
    left, centred = (exact - decoded)[known], (exact - codes.centre[:dim])[known]
    centred[:, codes.apart] = 0.0
    assert (left.norm(dim=1) <= error[known]).all()
    torch.testing.assert_close(length, value.norm(dim=1), rtol=1e-7, atol=0)
    torch.testing.assert_close(head, value[:, :part].norm(dim=1), rtol=1e-7, atol=0)
    # Right angles: a part of the bounds holds only with them.
    for rest, own in zip(left.split(part, 1), value[known].split(part, 1), strict=True):
        assert ((rest * own).sum(1).abs() <= 1e-7 * own.square().sum(1)).all()
    cut = part * (parts // 2 if parts >= 4 else parts)  # what is behind it
    torch.testing.assert_close(tail[known], centred[:, cut:].norm(dim=1), rtol=1e-6, atol=0)
    assert (left[:, cut:].norm(dim=1) <= tail_error[known]).all()
    assert (tail_error[known] <= error[known]).all()
    assert codes.apart.tolist() == [4] or metric == "cosine"
    assert not codes.centre[codes.apart].any()


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_growing(generator, metric):
    """Codes that grow row by row are codes of all rows; the shorter ones stay valid."""
    keys = torch.randn(300, 50, generator=generator) + 2
    query = torch.randn(5, 50, generator=generator) + 2
    codes, sizes, kept = None, [64, 65, 79, 80, 81, 127, 128, 129, 200, 300], []
    for size in sizes:
        codes = encode_keys(keys[:size], metric, codes)
        assert codes.count == size
        kept.append(codes)
    for size, codes in zip(sizes, kept, strict=True):
        same(query, keys[:size], metric, codes)
    # Two tables that grow from one: the second must not write over the first.
    one, other = torch.cat([keys[:65], keys[100:110]]), torch.cat([keys[:65], keys[200:230]])
    first, second = (encode_keys(table, metric, kept[1]) for table in (one, other))
    same(query, one, metric, first)
    same(query, other, metric, second)
    same(query, keys[:65], metric, kept[1])


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_codes_of_some_of_the_keys(generator, metric):
    """Selected codes are those of the selected keys, and can grow."""
    keys = torch.randn(300, 50, generator=generator)
    keys[:, 7] *= 1000
    query = torch.cat([torch.randn(5, 50, generator=generator), keys[:3]])
    codes = encode_keys(keys, metric)
    for count in (0, 64, 65, 96, 250):
        rows = torch.randperm(300, generator=generator)[:count]
        some = codes.select(rows)
        if count:
            same(query, keys[rows], metric, some)
        longer = torch.cat([keys[rows], keys[:33]])
        same(query, longer, metric, encode_keys(longer, metric, some))
        assert torch.equal(unblocked(some.values, count), unblocked(codes.values, 300)[rows])
        assert torch.equal(unblocked(some.codes, count), unblocked(codes.codes, 300)[rows])
    same(query, keys, metric, codes)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"keys": torch.ones(99, 8)}, ValueError, "codes were made for keys 100, this lookup has keys 99"),
        ({"keys": torch.ones(100, 9), "query": torch.ones(2, 9)}, ValueError, "made for dimensions 8"),
        ({"keys": torch.ones(100, 8).bfloat16()}, ValueError, "made for dtype torch.float32"),
        ({"metric": "cosine"}, ValueError, "made for metric l2"),
        ({"codes": torch.ones(3)}, TypeError, "codes must be KeyCodes, got Tensor: make them with"),
    ],
)
def test_codes_of_other_keys_are_refused(change, error, words):
    arguments = {"query": torch.ones(2, 8), "keys": torch.ones(100, 8), "metric": "l2"}
    arguments["codes"] = encode_keys(arguments["keys"])
    arguments |= change
    with pytest.raises(error, match=words):
        nearest_key(radius=torch.ones(len(arguments["keys"])), **arguments)


def test_codes_on_another_device_are_refused():
    codes = encode_keys(torch.ones(100, 8))
    moved = dataclasses.replace(codes, codes=codes.codes.to("meta"))
    with pytest.raises(ValueError, match="made for device meta, this lookup has device cpu"):
        nearest_key(torch.ones(2, 8), torch.ones(100, 8), torch.ones(100), "l2", moved)


def test_stale_codes_are_noticed_where_a_distance_contradicts_them(generator, implementation):
    if implementation not in CODED:
        pytest.skip("reads no codes")
    keys = torch.randn(200, 64, generator=generator)
    codes = encode_keys(keys)
    query = keys[:3].clone()
    keys[:] = torch.randn(200, 64, generator=generator)
    with pytest.raises(RuntimeError, match="codes contradict keys"):
        nearest_key(query, keys, torch.ones(200), "l2", codes)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"keys": [[1.0]]}, TypeError, "keys must be a tensor"),
        ({"keys": torch.ones(3)}, ValueError, "keys has shape"),
        ({"keys": torch.ones(3, 0)}, ValueError, "keys has D=0 dimensions: codes hold 1 to 65536"),
        ({"keys": torch.ones(1, 65537)}, ValueError, "keys has D=65537"),
        ({"keys": torch.ones(3, 4, dtype=torch.int32)}, TypeError, "keys has dtype"),
        ({"keys": torch.ones(3, 4), "metric": "dot"}, ValueError, "metric='dot' is unknown"),
        ({"keys": torch.ones(3, 4), "known": 5}, TypeError, "known must be KeyCodes, got int"),
    ],
)
def test_errors_of_encoding(arguments, error, words):
    with pytest.raises(error, match=words):
        encode_keys(**arguments)


def test_opcheck_and_compile(generator):
    query, keys = torch.randn(4, 12, generator=generator), torch.randn(90, 12, generator=generator)
    codes, radius = encode_keys(keys), torch.ones(90)
    assert isinstance(codes, KeyCodes) and codes.nbytes() == 96 * (12 + 6 * 4) + 16 * 4
    operator = torch.ops.dualedit_kernels.nearest_key.default
    torch.library.opcheck(operator, (query, keys, radius, "l2", codes.tensors()))
    compiled = torch.compile(nearest_key, fullgraph=True, backend="aot_eager")
    for got, want in zip(
        compiled(query, keys, radius, "l2", codes), nearest_key(query, keys, radius), strict=True
    ):
        assert torch.equal(got, want)


def test_the_report_says_how_codes_are_read():
    if library.COMPILED is None:
        pytest.skip("the compiled library is not there")
    reason = backend.families()["nearest_key"][0].merit
    assert "codes of keys are read with" in reason
