"""nearest_key against faiss, torch.cdist and the matrix product trick.

    python -m benchmarks.bench_nearest_key --json benchmarks/results/<machine>.json

Every rival answers the same question, the nearest key of each query and its distance. Ours also applies the
radius. Queries are near a key (a stored edit is asked for; most keys can be given up early), or as far
from all keys as the keys are from each other. With --massive the keys look like hidden states, with a few
activations of size 1e3 that all share; with --clustered they lie about 50 centres, at a fifth of the distance
between those; otherwise they are Gaussian. A rival whose argmin or distance is wrong is not timed: there, the
expansion |q|^2 - 2 q.k + |k|^2 is.

"Coded" rows pass `encode_keys` of the keys, and must agree bit for bit with the rows without. The codes are
made once, not timed with the lookup, and take a quarter of the bytes of fp32 keys (half of bf16) beside the
keys themselves; their size, the time that encoding took and the share of the keys whose distance was computed
exactly are printed with the rows.

On a GPU the lookup also stands in a CUDA graph, CALLS times one behind the other: what one costs inside a
model's graph, without Python and without launches. Keys beyond the caches are held against the bandwidth of a
large copy, bytes read and written.
"""

from __future__ import annotations

import itertools
import statistics
import time

import torch
from torch import Tensor

from benchmarks.common import BEYOND_CACHES, Benchmark, Rival, arguments, bandwidth, captured, place
from dualedit_kernels import KeyCodes, backend, encode_keys, nearest_key
from dualedit_kernels.nearest_key.cpp import last_coded

SHAPES = [(1_000, 4096), (100_000, 1024), (100_000, 4096)]
BATCHES, BATCHES_CUDA = (1, 8, 32), (1, 8, 16, 32, 128)
CALLS = 20  # lookups in one CUDA graph


def main() -> None:
    """Run the benchmark from the command line."""
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument(
        "--massive", action="store_true", help="keys with massive activations, as hidden states have"
    )
    parser.add_argument("--clustered", action="store_true", help="keys in clusters")
    parser.add_argument("--shapes", help="numbers of keys x dimensions, e.g. 1000x4096,100000x1024")
    options = parser.parse_args()
    benchmark = Benchmark("nearest_key", options)
    cuda = options.device == "cuda"
    speed = bandwidth(options.device)
    shapes = (SHAPES[::2] if cuda else SHAPES[:1]) if options.quick else SHAPES
    if options.shapes is not None:
        shapes = [tuple(int(size) for size in shape.split("x")) for shape in options.shapes.split(",")]
    for count, dim in shapes:
        codes: dict[torch.dtype, KeyCodes] = {}
        for batch, near in itertools.product(BATCHES_CUDA if cuda else BATCHES, (False, True)):
            shape = {"batch": batch, "keys": count, "dim": dim, "near": near, "massive": options.massive}
            if options.clustered:
                shape["clustered"] = True
            query, keys = problem(shape, place(options.device))
            times = benchmark.compare(shape, rivals(query, keys, options, codes), floors(shape, speed))
            if batch == 1 and not near:
                for line in read_rates(shape, speed, times):
                    print(f"    {line}", flush=True)
            report_codes(query, keys, codes)
    benchmark.finish()


def report_codes(query: Tensor, keys: Tensor, codes: dict[torch.dtype, KeyCodes]) -> None:
    """Print what the codes cost and how many exact distances a lookup with them needed."""
    if torch.float32 not in codes:
        return
    held = codes[torch.float32]
    nearest_key(query, keys, torch.ones(len(keys)), "l2", held)
    exact_ones, given_up = last_coded()
    share, size = exact_ones / (len(query) * len(keys)), held.nbytes() / (keys.numel() * 4)
    print(f"    codes: {size:.1%} of the fp32 keys' bytes; {share:.3%} of the distances computed exactly; "
          f"{given_up} of {len(query)} queries without codes", flush=True)  # fmt: skip


def floors(shape: dict, speed: float) -> dict[str, float]:
    """Milliseconds to read the keys once from memory, where they are too many to stay in a cache."""
    sizes = {name: shape["keys"] * shape["dim"] * size for name, size in (("fp32", 4), ("bf16", 2))}
    return {
        f"read {name} keys once": size / speed * 1e3 for name, size in sizes.items() if size >= BEYOND_CACHES
    }


def read_rates(shape: dict, speed: float, times: dict[str, list[float]]) -> list[str]:
    """For each lookup of one query that reads all keys: how fast, beside what memory gives a plain sum."""
    lines = []
    for impl, turns in times.items():
        if not impl.startswith("nearest_key") or "coded" in impl:
            continue
        size = shape["keys"] * shape["dim"] * (2 if "bf16 keys" in impl else 4)
        rate = size / (statistics.median(turns) / 1e3)
        where = "" if size >= BEYOND_CACHES else "; caches hold these keys"
        lines.append(
            f"{impl} reads {rate / 1e9:.1f} GB/s, {rate / speed:.0%} of memory's {speed / 1e9:.1f}{where}"
        )
    return lines


def problem(shape: dict, device: str) -> tuple[Tensor, Tensor]:
    """Queries, near some key each or far from all, and keys, in fp32, drawn on the device."""
    batch, count, dim = shape["batch"], shape["keys"], shape["dim"]

    def normal(rows: int, generator: torch.Generator) -> Tensor:
        return torch.randn(rows, dim, generator=generator, device=device)

    def some_of(count: int, number: int) -> Tensor:
        return torch.randint(0, count, (number,), generator=generator, device=device)

    def states(rows: int) -> Tensor:
        result = normal(rows, generator).mul_(0.05)
        if shape.get("clustered"):
            result = result * 0.2 + centres[some_of(len(centres), rows)]
        if shape["massive"]:
            result[:, [dim // 7, dim // 2]] += torch.tensor([1000.0, -2500.0], device=device)
        return result

    generator = torch.Generator(device).manual_seed(0)
    centres = normal(50, torch.Generator(device).manual_seed(1)).mul_(0.05)
    keys = states(count).to(torch.bfloat16).float()  # every dtype then holds the same keys
    query = states(batch)
    if shape["near"]:
        query = keys[some_of(count, batch)] + normal(batch, generator) * 0.01
    return query, keys


def rivals(query: Tensor, keys: Tensor, options, codes: dict[torch.dtype, KeyCodes]) -> list[Rival]:
    """Ours in every dtype, with and without codes (made where ``codes`` has none), then the others."""
    want_index, want_distance = exact(query, keys)

    def wrong(result: tuple[Tensor, Tensor]) -> str | None:
        index, distance = result
        bad = int((index != want_index).sum())
        if bad:
            return f"{bad} of {len(index)} nearest keys are wrong"
        error = float(((distance - want_distance).abs() / want_distance).max())
        return f"distance is off by {error:.1%}" if error > 1e-3 else None

    radius = torch.full((len(keys),), torch.inf, device=keys.device)
    result = []
    for suffix, held in (("", keys), (" bf16 keys", keys.to(torch.bfloat16))):
        chosen = backend.explain("nearest_key", keys.device.type, held.dtype).implementation
        dtype = str(held.dtype).removeprefix("torch.")
        plain = _ours(query, held, radius)
        result.append(Rival(f"nearest_key ({chosen.name}){suffix}", dtype, plain, wrong))
        if options.device == "cuda":
            graph, name = captured(plain, CALLS), f"nearest_key ({chosen.name}){suffix}, CUDA graph"
            result.append(Rival(name, dtype, graph, wrong, calls=CALLS))
        if "nearest_key_coded" in chosen.functions:
            if held.dtype not in codes:
                began = time.thread_time()
                codes[held.dtype] = encode_keys(held)
                print(f"    {dtype} keys encoded in {time.thread_time() - began:.2f} s")
            coded = _ours(query, held, radius, codes[held.dtype])
            name = f"nearest_key ({chosen.name}, coded){suffix}"
            result.append(Rival(name, dtype, coded, _not_the_bits_of(plain(), wrong)))
    if options.device == "cpu":
        result += _faiss(query, keys, wrong, options)
    else:
        for name, peer in (("faiss-gpu", faiss_gpu), ("cuVS", cuvs)):
            result += _if_it_runs(name, lambda peer=peer: peer(query, keys, wrong))
    squares = keys.square().sum(1)
    result.append(Rival("torch matmul trick", "float32", lambda: _trick(query, keys, squares), wrong))
    if keys.numel() * len(query) <= 1 << 26:
        result.append(Rival("torch.cdist", "float32", lambda: _smallest(torch.cdist(query, keys)), wrong))
    return result


def exact(query: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest keys and distances in float64, where even the expansion keeps ten digits."""
    query = query.double()
    parts = []
    for block in keys.split(1 << 14):
        block = block.double()
        parts.append(torch.addmm(block.square().sum(1), query, block.t(), alpha=-2).min(1))
    smallest, part = torch.stack([part.values for part in parts]).min(0)
    index = torch.stack([part.indices for part in parts]).gather(0, part[None])[0] + part * (1 << 14)
    return index, (smallest + query.square().sum(1)).clamp(min=0).sqrt()


def _ours(query: Tensor, keys: Tensor, radius: Tensor, codes: KeyCodes | None = None):
    return lambda: nearest_key(query, keys, radius, "l2", codes)


def _not_the_bits_of(want: tuple[Tensor, Tensor], wrong):
    def check(result: tuple[Tensor, Tensor]) -> str | None:
        same = torch.equal(result[0], want[0]) and torch.equal(result[1], want[1])
        return wrong(result) if same else "the result differs from the lookup without codes"

    return check


def _trick(query: Tensor, keys: Tensor, squares: Tensor) -> tuple[Tensor, Tensor]:
    distance = torch.addmm(squares, query, keys.t(), alpha=-2)  # |k|^2 - 2 q.k
    smallest, index = distance.min(1)
    return index, (smallest + query.square().sum(1)).clamp(min=0).sqrt()


def _smallest(distance: Tensor) -> tuple[Tensor, Tensor]:
    smallest, index = distance.min(1)
    return index, smallest


def _faiss(query: Tensor, keys: Tensor, wrong, options) -> list[Rival]:
    try:
        import faiss
    except ImportError:
        print("    faiss is not installed (pip install faiss-cpu): left out")
        return []
    faiss.omp_set_num_threads(options.threads)
    flat = faiss.IndexFlatL2(keys.shape[1])
    flat.add(keys.numpy())
    rows = query.numpy()
    default = faiss.cvar.distance_compute_blas_threshold

    def search() -> tuple[Tensor, Tensor]:
        squared, index = flat.search(rows, 1)
        return torch.from_numpy(index[:, 0]), torch.from_numpy(squared[:, 0]).clamp(min=0).sqrt()

    def blas(on: bool) -> None:
        faiss.cvar.distance_compute_blas_threshold = 1 if on else default

    return [
        Rival("faiss IndexFlatL2", "float32", search, wrong),
        Rival("faiss IndexFlatL2, BLAS forced", "float32", search, wrong, blas),
    ]


def faiss_gpu(query: Tensor, keys: Tensor, wrong) -> list[Rival]:
    """faiss' exact index on the GPU, given torch's tensors as they are; none in a faiss without GPUs."""
    import faiss

    if not hasattr(faiss, "StandardGpuResources"):
        raise ImportError("this faiss is built without GPUs")
    import faiss.contrib.torch_utils  # noqa: F401  (lets indices take torch tensors, on torch's stream)

    config = faiss.GpuIndexFlatConfig()
    config.device = keys.device.index or 0
    resources = faiss.StandardGpuResources()
    flat = faiss.GpuIndexFlatL2(resources, keys.shape[1], config)
    flat.add(keys)

    def search() -> tuple[Tensor, Tensor]:
        squared, index = flat.search(query, 1)
        return index[:, 0], squared[:, 0].clamp(min=0).sqrt()

    return [Rival("faiss GpuIndexFlatL2", "float32", search, wrong)]


def cuvs(query: Tensor, keys: Tensor, wrong) -> list[Rival]:
    """cuVS' brute force on torch's stream, into tensors that are made once."""
    from cuvs.common import Resources
    from cuvs.neighbors import brute_force

    resources = Resources(stream=torch.cuda.current_stream(keys.device).cuda_stream)
    flat = brute_force.build(keys, metric="sqeuclidean", resources=resources)
    index = torch.empty(len(query), 1, dtype=torch.int64, device=query.device)
    squared = torch.empty(len(query), 1, device=query.device)

    def search() -> tuple[Tensor, Tensor]:
        brute_force.search(flat, query, 1, neighbors=index, distances=squared, resources=resources)
        return index[:, 0], squared[:, 0].clamp(min=0).sqrt()

    return [Rival("cuVS brute force", "float32", search, wrong)]


def _if_it_runs(name: str, make) -> list[Rival]:
    """The rivals that ``make`` gives; none, with the reason printed, if the package is absent or fails."""
    try:
        rivals = make()
        for rival in rivals:
            rival.run()
    except ImportError as error:
        print(f"    {name} is left out: {error}")
        return []
    except Exception as error:  # a peer that its own build or driver fails must not end the benchmark
        print(f"    {name} is left out, it failed: {type(error).__name__}: {error}")
        return []
    return rivals


if __name__ == "__main__":
    main()
