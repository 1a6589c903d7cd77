"""nearest_key in CUDA C++ against float64: the shipped kernels, on the CPU thread by thread and on a GPU.

The source is compiled with an ordinary C++ compiler against `cuda_on_cpu.h`; nothing but the launch syntax is
rewritten. This proves the indexing, the shuffles and the arithmetic, not the speed.
"""

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from dualedit_kernels import backend, nearest_key
from dualedit_kernels.testing import assert_nearest, exact_distances

pytestmark = pytest.mark.slow  # as a whole: together they take longer than an inner loop may

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
SHAPES = [(1, 1, 1), (1, 7, 5), (3, 40, 129), (9, 101, 136), (5, 3, 257), (2, 70, 520), (4, 33, 64)]
ENTRY = """
extern "C" int lookup(
    const void* query, int query_type, int64_t query_stride, const void* keys, int key_type, int64_t
    key_stride, const float* radius, int64_t batch, int64_t count, int64_t dim, int cosine, int processors,
    void* scratch, int64_t bytes, int64_t* index, float* distance) {
  using namespace dualedit;
  if (nearest_key_cuda_scratch(batch, count, dim, processors) > static_cast<size_t>(bytes)) return 2;
  CudaLookup l{query, CudaType(query_type), query_stride, keys, CudaType(key_type), key_stride, radius,
               batch, count, dim, cosine != 0, index, distance};
  return nearest_key_cuda(l, processors, scratch, nullptr);
}
extern "C" int64_t scratch_bytes(int64_t batch, int64_t count, int64_t dim, int processors) {
  return static_cast<int64_t>(dualedit::nearest_key_cuda_scratch(batch, count, dim, processors));
}
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """The kernels compiled for the CPU."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("there is no g++ to compile the CUDA kernels for the CPU")
    folder = tmp_path_factory.mktemp("cuda")
    for header in ("cuda_runtime_api.h", "cuda_bf16.h", "cuda_fp16.h", "math_constants.h"):
        (folder / header).write_text(f'#include "{HERE}/cuda_on_cpu.h"\n')
    launch = re.compile(r"([A-Za-z_]\w*(?:<\w+>)?)<<<(.+?), 0, stream>>>\(")
    text, launches = launch.subn(r"emulate(\1)(\2)(", (CSRC / "cuda/nearest_key.cu").read_text())
    assert launches == 3
    (folder / "nearest_key.cpp").write_text(text + ENTRY)
    command = [compiler, "-O1", "-std=c++17", "-fPIC", "-shared", f"-I{folder}", f"-I{CSRC}"]
    subprocess.run([*command, str(folder / "nearest_key.cpp"), "-o", str(folder / "library.so")], check=True)
    found = ctypes.CDLL(str(folder / "library.so"))
    found.scratch_bytes.restype = ctypes.c_int64
    return found


@pytest.fixture(params=[1, 3, 200], ids=lambda n: f"{n} processors")
def lookup(request, library):
    """nearest_key through the library, the keys split for a GPU of some size."""

    def run(query, keys, radius, metric="l2"):
        sizes = [ctypes.c_int64(n) for n in (len(query), len(keys), query.shape[1])]
        scratch = torch.full((library.scratch_bytes(*sizes, request.param) // 4,), torch.nan)
        guard = torch.full((8,), -9, dtype=torch.int64)  # behind the results nothing may be written
        index = torch.cat([torch.full((len(query),), -7), guard])
        distance = torch.cat([torch.full((len(query),), torch.nan), torch.full((8,), -9.0)])

        def pointer(tensor):
            return ctypes.c_void_p(tensor.data_ptr())

        status = library.lookup(
            pointer(query), TYPES[query.dtype], ctypes.c_int64(query.stride(0)),
            pointer(keys), TYPES[keys.dtype], ctypes.c_int64(keys.stride(0)), pointer(radius), *sizes,
            int(metric == "cosine"), request.param, pointer(scratch), ctypes.c_int64(scratch.nbytes),
            pointer(index), pointer(distance),
        )  # fmt: skip
        assert status == 0 and torch.equal(index[-8:], guard) and distance[-8:].eq(-9).all()
        return index[:-8], distance[:-8]

    return run


@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize("dtype", list(TYPES), ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(lookup, generator, shape, dtype, metric):
    rows, count, dim = shape
    query = torch.randn(rows, dim, generator=generator)
    keys = torch.randn(count, dim, generator=generator).to(dtype)
    nearest = exact_distances(query, keys, metric).min(1).values
    radius = torch.full((count,), float(nearest.median()) * 1.001)
    assert_nearest(*lookup(query, keys, radius, metric), query, keys, radius, metric)
    narrow = query.to(dtype)
    assert_nearest(*lookup(narrow, keys, radius, metric), narrow, keys, radius, metric)


def test_strided_and_misaligned_rows(lookup, generator):
    for offset, dim in ((1, 24), (0, 23), (8, 24)):
        query = torch.randn(5, 40, generator=generator)[:, offset : offset + dim]
        keys = torch.randn(21, 40, generator=generator).to(torch.bfloat16)[:, offset : offset + dim]
        radius = torch.full((21,), 50.0)
        for metric in ("l2", "cosine"):
            assert_nearest(*lookup(query, keys, radius, metric), query, keys, radius, metric)


def test_massive_activations(lookup, generator):
    massive = torch.zeros(1024)
    massive[[7, 500]] = torch.tensor([1000.0, -2500.0])
    keys = massive + torch.randn(30, 1024, generator=generator) * 0.3
    query = keys[[3, 17, 29]] + torch.randn(3, 1024, generator=generator) * 0.03
    index, distance = lookup(query, keys, torch.full((30,), 1e6))
    best, nearest = exact_distances(query, keys, "l2").min(1)
    assert torch.equal(index, nearest) and float(((distance - best) / best).abs().max()) <= 1e-5


def test_ties_go_to_the_lowest_index(lookup, generator):
    base = torch.randn(1, 40, generator=generator)
    for count, first in ((3, 1), (100, 37), (100, 98)):
        keys = torch.randn(count, 40, generator=generator) + 9
        keys[first:] = base + 0.25
        assert lookup(base.repeat(9, 1), keys, torch.full((count,), 100.0))[0].tolist() == [first] * 9


def test_radius_belongs_to_the_nearest_key(lookup):
    query, keys = torch.tensor([[0.0, 0.0]]), torch.tensor([[3.0, 4.0], [30.0, 40.0]])
    index, distance = lookup(query, keys, torch.tensor([4.9, 1000.0]))
    assert index.tolist() == [-1] and distance.tolist() == [5.0]
    assert lookup(query, keys, torch.tensor([5.0, 0.0]))[0].tolist() == [0]


@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_values_that_are_not_finite(lookup, generator, metric, bad):
    query = torch.randn(7, 20, generator=generator)
    keys = torch.cat([torch.full((1, 20), bad), query + 0.01, torch.full((3, 20), bad)])
    query[3, 11] = bad
    index, distance = lookup(query, keys, torch.full((len(keys),), torch.inf), metric)
    assert index.tolist() == [1, 2, 3, -1, 5, 6, 7]
    assert distance[3] == torch.inf and torch.isfinite(distance[[0, 1, 2, 4, 5, 6]]).all()


def test_zero_has_no_direction(lookup, generator):
    keys = torch.cat([torch.zeros(1, 6), torch.randn(4, 6, generator=generator)])
    query = torch.stack([torch.zeros(6), -keys[2]])
    radius = torch.full((5,), torch.inf)
    index, distance = lookup(query, keys, radius, "cosine")
    assert index[0] == -1 and distance[0] == torch.inf
    assert_nearest(index[1:] - 1, distance[1:], query[1:], keys[1:], radius[1:], "cosine")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize("dtype", list(TYPES), ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (70, 3000, 1024), (1, 5000, 4096)], ids=str)
def test_on_the_gpu(generator, shape, dtype, metric):
    rows, count, dim = shape
    query = torch.randn(rows, dim, generator=generator)
    keys = torch.randn(count, dim, generator=generator).to(dtype)
    radius = torch.full((count,), float(exact_distances(query[:1], keys[:64], metric).median()))
    with backend.use_backend(nearest_key="cuda"):
        index, distance = nearest_key(query.cuda(), keys.cuda(), radius.cuda(), metric)
        empty = nearest_key(query.cuda(), keys[:0].cuda(), radius[:0].cuda(), metric)
    assert empty[0].eq(-1).all() and empty[1].eq(torch.inf).all()
    assert_nearest(index.cpu(), distance.cpu(), query, keys, radius, metric)
